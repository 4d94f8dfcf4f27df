"""Helpers of the benchmarks: interleaved timing, FLOPs, peak FLOP/s and memory."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Task", "flop_count", "medians", "own_peak", "peak_flops", "seconds"]

Task = Callable[[], object]


def seconds(task: Task) -> float:
    """Return the seconds of one run."""
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


def medians(tasks: Mapping[str, Task], repeats: int) -> dict[str, float]:
    """Return the median seconds of each task over interleaved repeats, after one warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats + 1):
        for name, task in tasks.items():
            found[name].append(seconds(task))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def flop_count(task: Task) -> int:
    """Return the FLOPs of a task's convolutions and matrix products, additions and multiplications."""
    with FlopCounterMode(display=False) as counter:
        task()
    return counter.get_total_flops()


def peak_flops(dtype: torch.dtype, repeats: int = 20) -> float:
    """Return the highest FLOP/s that torch reaches in matrix products and 3x3 convolutions."""
    a, b = torch.rand(2, 2048, 2048).to(dtype)
    x = torch.rand(16, 128, 32, 32).to(dtype, memory_format=torch.channels_last)
    w = torch.rand(128, 128, 3, 3).to(dtype, memory_format=torch.channels_last)
    tasks = (lambda: a @ b), (lambda: torch.conv2d(x, w, padding=1))
    with torch.no_grad():
        return max(flop_count(task) / min(seconds(task) for _ in range(repeats)) for task in tasks)


def own_peak() -> int:
    """Return the peak memory of this process, bytes."""
    try:  # getrusage may include the parent process
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
