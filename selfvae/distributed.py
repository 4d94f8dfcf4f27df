"""Work that several processes share: each does its part, and all of them get all results.

The processes are Fabric's, started by `launch` or by the usual launchers (torchrun, srun). A function that
shares its work must be called in each of them; in a single process everything runs as it is written.
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
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist

from selfvae.progress import Track, no_progress

if TYPE_CHECKING:  # Fabric takes long to import, and most of the package does without
    import logging

    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # else it tells the precision
    from lightning_fabric.strategies.strategy import Strategy

__all__ = [
    "accelerator",
    "distributed_map",
    "launch",
    "launch_fabric",
    "make_fabric",
    "on_rank_zero",
    "rank",
    "world_size",
]

Item = TypeVar("Item")
Result = TypeVar("Result")

_inside = False  # a task is being done: what it distributes in turn runs in this process


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def accelerator() -> Literal["cuda", "cpu"]:
    """The kind of device that everything runs on by default: a CUDA GPU if there is one, else the CPU.

    Never an Apple GPU (MPS): it has no float64, which transforms, scores and compressed files need.
    """
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_fabric(
    devices: int = 1,
    nodes: int = 1,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    strategy: Strategy | str = "auto",
) -> Fabric:
    """A Fabric, not yet launched, on the kind of device that `accelerator` says.

    Args:
        devices: GPUs or processes per node.
        nodes: number of nodes.
        precision: of the networks.
        strategy: how processes communicate.
    """
    import logging

    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # else it tells the precision

    return Fabric(
        accelerator=accelerator(),
        devices=devices,
        num_nodes=nodes,
        precision=precision,
        strategy=strategy,
    )


def launch(devices: int = 1) -> torch.device:
    """Start the other processes, if any; from then on only the first one prints.

    Where torchrun or srun has started the processes, on one or several machines, these are taken.

    Args:
        devices: GPUs or processes on this machine; 1 also for as many as torchrun or srun has started.

    Returns:
        This process's device.

    Raises:
        ValueError: if devices is below 1, or not as many as were started.
    """
    if devices < 1:
        raise ValueError(f"devices must be at least 1; got {devices}")
    started, nodes = _started()
    if started > 1 < devices != started:
        raise ValueError(
            f"the launcher has started {started} processes on each machine: leave --devices out, or give "
            f"{started}; got {devices}"
        )
    devices = max(devices, started)
    if devices * nodes == 1:
        return torch.device(accelerator())  # Fabric would do nothing, and takes seconds to import
    from lightning_fabric.strategies.ddp import DDPStrategy

    # one process's part may take hours longer than another's
    strategy = DDPStrategy(timeout=timedelta(days=30))
    fabric = make_fabric(devices, nodes, strategy=strategy)
    launch_fabric(fabric)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
    return fabric.device


def _started() -> tuple[int, int]:
    """Processes on each machine, and machines, that torchrun or srun has started."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    nodes = int(os.environ.get("SLURM_NNODES", 1))
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    return 1, 1


def launch_fabric(fabric: Fabric) -> None:
    """Start the processes of a Fabric; each leaves the process group before Python ends."""
    fabric.launch()
    # a thread of gloo's that frees a Python object while Python ends aborts the process (1 of 130 did)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def distributed_map(
    task: Callable[[Item], Result], items: Sequence[Item], track: Track = no_progress, text: str = ""
) -> list[Result]:
    """Compute [task(item) for item in items], distributed over the processes.

    Call it in every process; inside a task it runs in that process only. Every task has its own random
    state, derived from one number of torch's global random state and the item's position: the results are
    the same for any number of processes that begin with the same state.

    Args:
        task: takes an item; its result must be picklable if there are several processes.
        items: the same in every process.
        track: shows progress over the first process's part.
        text: what the progress is of.

    Returns:
        All results in the items' order, in every process.

    Raises:
        Exception: that of a task that failed, in every process.
        OSError: if another process has ended.
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
        try:
            dist.all_gather_object(parts, done)
        except RuntimeError as error:
            raise OSError(
                "another process has ended, perhaps on another machine: start the same command again on "
                f"all of them ({str(error).splitlines()[0][:80]})"
            ) from None
    for part in parts:
        if part and (failed := part[-1][1]):
            raise failed
    return [parts[i % processes][i // processes][0] for i in range(len(items))]  # type: ignore[misc]


def on_rank_zero(task: Callable[[], Any]) -> Any:
    """Run a task in the first process while the others wait; call it in every process.

    Returns:
        The task's result, in every process.
    """
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
