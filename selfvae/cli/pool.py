"""A folder's files on all cores: a process per core computes, this process writes and prints, in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Task", "cores", "describe", "in_worker", "run"]

Task = Callable[[Path, Path], tuple[bytes, str]]  # file, output file -> its bytes, and a line about it
_AHEAD = 2  # files per process that may be done before their turn to be written comes

_task: Task | None = None  # of a process in the pool


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_worker() -> bool:
    """Whether this is a process of a pool."""
    return _task is not None


def describe(file: Path, error: Exception) -> str:
    """What went wrong, with the file's name once."""
    return str(error) if str(file) in str(error) else f"{file}: {error}"


def run(task: Task, files: Mapping[Path, Path], jobs: int) -> Iterator[tuple[str, str]]:
    """Yield what became of each file, in order: a line and "", or "" and what went wrong.

    Only this process writes files, so that nothing is half written when it ends the others.

    Args:
        task: Computes an output file; picklable. Every process has its own copy.
        files: Inputs and outputs.
        jobs: Number of processes, each with one thread of torch.

    Raises:
        OSError: A process was killed.
    """
    from selfvae.files import write_atomic

    left, begun = iter(files.items()), deque[tuple[Path, Path, Future[tuple[bytes, str, str]]]]()
    with _pool(task, jobs) as pool:

        def begin() -> None:
            if (item := next(left, None)) is not None:
                begun.append((*item, pool.submit(_do, *item)))

        with _sigint_blocked():  # the processes start here, and stay deaf to Ctrl-C: this one ends them
            begin()
        for _ in range(_AHEAD * jobs):
            begin()
        while begun:
            file, target, future = begun.popleft()
            data, line, error = future.result()
            if not error:
                try:
                    write_atomic(target, data)
                except OSError as failed:
                    line, error = "", describe(file, failed)
            begin()
            yield line, error


@contextmanager
def _pool(task: Task, jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that are ended at once if an exception is raised."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forks of a process with torch's threads may hang
    pool = ProcessPoolExecutor(jobs, context, _start, (task,))
    try:
        yield pool
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise OSError("a process was ended, perhaps for want of memory: try --jobs 1") from None
        raise
    pool.shutdown()


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Defer Ctrl-C; processes started in between inherit that for good."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(task: Task) -> None:
    global _task
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _task = task


def _end_with_parent() -> None:
    """End this process with the one that started it, which may be killed without warning."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(file: Path, target: Path) -> tuple[bytes, str, str]:
    assert _task is not None
    try:
        return *_task(file, target), ""
    except (ValueError, OSError) as error:
        return b"", "", describe(file, error)
