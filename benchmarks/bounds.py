"""What the importance-weighted bounds cost, against as many full forward passes of the same model.

    python benchmarks/bounds.py RUN... [--draws 512] [--repeats 3] [--threads 2] [--json]

Prints for every model, as medians of interleaved repeats, of one image:
    full          seconds of `draws` forward passes, encoders and pyramid each time
    iwae, pairs   seconds of `selfvae.iwae` at that many draws, without and with all pairs
    full_low, iwae_low
                  the same with the networks in bfloat16
    speedup, speedup_low, speedup_both, pairs_cost
                  full / iwae, full_low / iwae_low, full / iwae_low, pairs / iwae
"""

from __future__ import annotations

import json as jsonlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

import selfvae
from selfvae.precision import autocast


def seconds(task: Callable[[], object]) -> float:
    began = time.perf_counter()
    task()
    return time.perf_counter() - began


@torch.no_grad()
def main(
    runs: Positional[tuple[Path, ...]],
    draws: int = 512,
    repeats: int = 3,
    threads: int = 2,
    json: bool = False,
) -> None:
    torch.set_num_threads(threads)
    result: dict[str, dict[str, float]] = {}
    for run in runs:
        model = selfvae.load(run)
        x = torch.randint(0, 256, (1, *model.config.image_shape), dtype=torch.uint8)

        def low(task: Callable[[], object], model: selfvae.SelfVAE = model) -> object:
            with autocast(model, "bf16-mixed"):
                return task()

        ways: dict[str, Callable[[], object]] = {
            "full": lambda model=model, x=x: [model(x) for _ in range(draws)],
            "iwae": lambda model=model, x=x: selfvae.iwae(model, x, draws),
            "pairs": lambda model=model, x=x: selfvae.iwae(model, x, draws, pairs=True),
        }
        for name in ("full", "iwae"):
            ways[f"{name}_low"] = lambda task=ways[name], low=low: low(task)
        for way in ("iwae", "iwae_low"):
            ways[way]()  # what is done once is not counted
        found = {name: [] for name in ways}
        for _ in range(repeats):
            for name, task in ways.items():
                found[name].append(seconds(task))
        row = {name: statistics.median(values) for name, values in found.items()}
        row |= {
            "speedup": row["full"] / row["iwae"],
            "speedup_low": row["full_low"] / row["iwae_low"],
            "speedup_both": row["full"] / row["iwae_low"],
            "pairs_cost": row["pairs"] / row["iwae"],
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        result[run.name] = row
        if not json:
            print(run.name, "  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    if json:
        print(jsonlib.dumps(result))


if __name__ == "__main__":
    tyro.cli(main)
