"""Work that several processes share: each takes its part, and all of them get everything back.

They are the processes of Fabric, started by `launch` or by the usual launchers (torchrun, srun). What
shares its work must be called in every one of them; with one process everything runs as it is written.
"""

from __future__ import annotations

import atexit
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy

from selfvae.progress import Track, no_progress

__all__ = ["distributed_map", "launch", "launch_fabric", "on_rank_zero", "rank", "world_size"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_inside = False  # a task is being done: what it spreads in turn is its own


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launch(devices: int = 1) -> torch.device:
    """Start the other processes, if any, and return this one's device; only the first one prints."""
    if devices < 1:
        raise ValueError(f"devices must be at least 1; got {devices}")
    # not on "auto": an Apple GPU knows no float64, which scores and files need
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    # a share may take hours longer than another
    strategy = DDPStrategy(timeout=timedelta(days=30)) if devices > 1 else "auto"
    fabric = Fabric(accelerator=kind, devices=devices, strategy=strategy)
    launch_fabric(fabric)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
    return fabric.device


def launch_fabric(fabric: Fabric) -> None:
    """Start the processes of this Fabric; each leaves the others before Python ends."""
    fabric.launch()
    # a thread of gloo's that frees a Python object while Python ends aborts the process (1 of 130 did)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def distributed_map(
    task: Callable[[Item], Result], items: Sequence[Item], track: Track = no_progress, text: str = ""
) -> list[Result]:
    """[task(item) for item in items], in every process, each having done its share of it.

    Call it in every process; inside a task it runs in that process alone. Every task draws from a random
    state of its own, made of one number of the global one and the item's: the result is the same for any
    number of processes that begin with one state. `track` is given the first process's share. If a task
    fails, its exception is raised in every process.
    """
    seed = int(torch.randint(2**62, ()))
    first, processes = (0, 1) if _inside else (rank(), world_size())
    mine = range(first, len(items), processes)
    done: list[tuple[Result | None, Exception | None]] = []
    with _at_work():
        for i in track(mine, text) if not first else mine:
            torch.manual_seed((seed + 0x9E3779B97F4A7C15 * (i + 1)) % 2**63)
            try:
                done.append((task(items[i]), None))
            except Exception as error:
                if processes == 1:
                    raise
                done.append((None, _portable(error)))
                break
    parts = [done]
    if processes > 1:
        parts = [[] for _ in range(processes)]
        dist.all_gather_object(parts, done)
    for part in parts:
        if part and (failed := part[-1][1]):
            raise failed
    return [parts[i % processes][i // processes][0] for i in range(len(items))]  # type: ignore[misc]


def on_rank_zero(task: Callable[[], Any]) -> Any:
    """What a task gives that the first process does while the others wait; call it in every process."""
    return distributed_map(lambda _: task(), [None])[0]


@contextmanager
def _at_work() -> Iterator[None]:
    global _inside
    before, devices = _inside, [torch.cuda.current_device()] if torch.cuda.is_available() else []
    _inside = True
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        _inside = before


def _portable(error: Exception) -> Exception:
    """The exception as other processes can have it, with the traceback in its notes."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError("".join(traceback.format_exception(error)))
    return error
