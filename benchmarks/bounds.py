"""Cost of the importance-weighted bounds, compared with as many full forward passes of the same model.

    python -m benchmarks.bounds RUN... [--draws 512] [--repeats 3] [--threads 2] [--json]

Prints for each model medians of interleaved repeats, for one image:
    full          seconds for DRAWS forward passes, each with encoders and pyramid
    iwae, tmc     seconds for `selfvae.iwae` with DRAWS draws, without and with all pairs (TMC)
    full_low, iwae_low
                  the same with the networks in bfloat16
    speedup, speedup_low, speedup_both, tmc_cost
                  full / iwae, full_low / iwae_low, full / iwae_low, tmc / iwae
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

import selfvae
from benchmarks.measure import medians
from selfvae.nn.precision import autocast


@torch.no_grad()
def main(
    runs: Positional[tuple[Path, ...]],
    draws: int = 512,
    repeats: int = 3,
    threads: int = 2,
    json: bool = False,
) -> None:
    """Measure.

    Args:
        runs: folders of trained models, or names of bundled ones.
        draws: importance draws.
        repeats: of each task, interleaved.
        threads: of torch.
        json: print only a JSON object.
    """
    torch.set_num_threads(threads)
    result: dict[str, dict[str, float]] = {}
    for run in runs:
        model = selfvae.load(run)
        x = torch.randint(0, 256, (1, *model.config.image_shape), dtype=torch.uint8)

        def low(task: Callable[[], object], model: selfvae.SelfVAE = model) -> object:
            with autocast(model.device, "bf16-mixed"):
                return task()

        ways: dict[str, Callable[[], object]] = {
            "full": lambda model=model, x=x: [model(x) for _ in range(draws)],
            "iwae": lambda model=model, x=x: selfvae.iwae(model, x, draws),
            "tmc": lambda model=model, x=x: selfvae.iwae(model, x, draws, tmc=True),
        }
        for name in ("full", "iwae"):
            ways[f"{name}_low"] = partial(low, ways[name])
        row = medians(ways, repeats)
        row |= {
            "speedup": row["full"] / row["iwae"],
            "speedup_low": row["full_low"] / row["iwae_low"],
            "speedup_both": row["full"] / row["iwae_low"],
            "tmc_cost": row["tmc"] / row["iwae"],
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        result[run.name] = row
        if not json:
            print(run.name, "  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    if json:
        print(jsonlib.dumps(result))


if __name__ == "__main__":
    tyro.cli(main)
