"""How long a model takes to generate and to reconstruct."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from selfvae.model import SelfVAE
from selfvae.operations import generate, reconstruct

__all__ = ["measure_speed"]


def measure_speed(
    model: SelfVAE, counts: Sequence[int] = (1, 20, 100), repeats: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Time generation and reconstruction, as in the papers' tables (1, 20 and 100 images).

    Args:
        model: any; images are of the size that it was built for.
        counts: images drawn at once.
        repeats: timed runs, after one that is not counted.
        seed: of the draws.

    Returns:
        generate_N_seconds and reconstruct_N_seconds (medians of the runs), parameters, device, threads,
        repeats.

    Raises:
        ValueError: if counts or repeats are below 1.
    """
    if repeats < 1 or min(counts) < 1:
        raise ValueError(f"counts and repeats must be at least 1; got {counts} and {repeats}")
    out: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }
    for n in counts:
        x = generate(model, n, seed=seed)
        tasks = {"generate": lambda n=n: generate(model, n, seed=seed)}
        if model.has_latents:
            tasks["reconstruct"] = lambda x=x: reconstruct(model, x, seed=seed)
        for name, task in tasks.items():
            out[f"{name}_{n}_seconds"] = _median_seconds(task, repeats, model.device)
    return out


def _median_seconds(task: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
