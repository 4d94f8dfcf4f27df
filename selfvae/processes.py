"""Work that several processes share: each takes its part, and all of them get everything back.

They are the processes of Fabric, started by `launch` or by the usual launchers (torchrun, srun); with one
process everything runs as it is written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric

from selfvae.progress import Track, silent

__all__ = ["alone", "launch", "rank", "spread"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launch(devices: int = 1, nodes: int = 1) -> torch.device:
    """Start the other processes, if any, and return this one's device; only the first one prints."""
    if devices < 1 or nodes < 1:
        raise ValueError(f"devices and nodes must be at least 1; got {devices} and {nodes}")
    # not on "auto": an Apple GPU knows no float64, which scores and files need
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes)
    fabric.launch()
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
    return fabric.device


def spread(
    task: Callable[[Item], Result], items: Sequence[Item], track: Track = silent, text: str = ""
) -> list[Result]:
    """[task(item) for item in items], in every process, each having done its share of it.

    Every task draws from a random state of its own, made of the global one and the item's number: the
    result is the same for any number of processes that begin with one state. What goes to `track` is the
    first process's share. If a task fails, its exception is raised in every process.
    """
    seed = int(torch.randint(2**62, ()))
    mine = range(rank(), len(items), world())
    done: list[tuple[Result | None, Exception | None]] = []
    for i in track(mine, text) if not rank() else mine:
        torch.manual_seed((seed + 0x9E3779B97F4A7C15 * (i + 1)) % 2**63)
        try:
            done.append((task(items[i]), None))
        except Exception as error:
            if world() == 1:
                raise
            done.append((None, error))
            break
    torch.manual_seed(seed)
    parts = [done]
    if world() > 1:
        parts = [[] for _ in range(world())]
        dist.all_gather_object(parts, done)
    for part in parts:
        if part and (failed := part[-1][1]):
            raise failed
    return [parts[i % len(parts)][i // len(parts)][0] for i in range(len(items))]  # type: ignore[misc]


def alone(task: Callable[[], Any]) -> Any:
    """What a task gives that the first process does while the others wait."""
    return spread(lambda _: task(), [None])[0]
