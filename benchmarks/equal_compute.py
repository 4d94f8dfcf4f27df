"""Comparison of recipes at equal compute: the same data and time on one core; bits/dim against seconds.

    python -m benchmarks.equal_compute RECIPE... --data CIFAR10 --seconds 3600 --out results/equal-compute

A recipe is a YAML file with flags of `selfvae train`. Each one trains for the given time on one thread,
with as many runs at a time as there are cores; then the averaged weights are scored on test images. An
interrupted comparison continues when it is started again; what is trained and scored is not done twice.
Writes OUT/curves.png (validation bits/dim against seconds), OUT/result.json and OUT/result.md, with means
over seeds and their standard deviation; the runs, with their scores, remain in OUT/runs.
"""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from selfvae.files import write_atomic


def command(*words: object) -> str:
    """Run a command of selfvae on one thread and return its output."""
    done = subprocess.run(
        [sys.executable, "-m", "selfvae.cli", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def scores_of(folder: Path, data: str, limit: int, steps: int) -> Any:
    """Return the scores of a run that has made some steps, from scores.json if they are there already."""
    file, asked = folder / "scores.json", {"data": data, "limit": limit, "steps": steps}
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("asked") != asked:
        found = json.loads(command("eval", folder, "--data", data, "--limit", limit, "--json"))
        kept = {"asked": asked, "scores": found}
        write_atomic(file, (json.dumps(kept) + "\n").encode())
    return kept["scores"]


def run(
    recipe: Path, seed: int, data: str, seconds: float, clock: str, limit: int, out: Path
) -> dict[str, Any]:
    """Train or resume a run, and score it."""
    folder = out / "runs" / f"{recipe.stem}-{seed}"
    ends = ["--max-seconds", seconds, "--clock", clock]
    if (folder / "checkpoint.safetensors").exists():
        command("train", "--resume", "--out", folder, *ends)
    else:
        # overrides the recipe: the time ends the run, not the number of steps
        command(
            "train", "--config", recipe, "--data", data, "--seed", seed, "--out", folder, *ends,
            "--steps", 10**7,
        )  # fmt: skip
    curve = list(csv.DictReader((folder / "log.csv").open()))
    info = json.loads(command("info", folder, "--json"))
    last, key = curve[-1], "val_bits_per_dim"
    scores = scores_of(folder, data, limit, int(last["step"]))
    spent = "cpu_seconds" if clock == "cpu" else "seconds"
    return {
        "recipe": recipe.stem,
        "seed": seed,
        "parameters": info["parameters"],
        "steps": int(last["step"]),
        "seconds": float(last["seconds"]),
        "cpu_seconds": float(last["cpu_seconds"]),
        "curve": [(float(row[spent]), float(row[key])) for row in curve if row[key]],
        **scores,
    }


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot validation bits/dim against seconds, with one colour per recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    twenty, colours = plt.get_cmap("tab20").colors, dict[str, Any]()  # type: ignore[attr-defined]
    for row in rows:
        new = row["recipe"] not in colours
        colour = colours.setdefault(row["recipe"], twenty[len(colours) % 20])
        axis.plot(*zip(*row["curve"], strict=True), color=colour, label=row["recipe"] if new else None)
    axis.set(xscale="log", xlabel="seconds of training on one core", ylabel="bits/dim, validation")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(file, dpi=110)


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one line per run, and one of means where a recipe has several seeds."""
    columns = "recipe, seed, parameters, steps, seconds (CPU), test ELBO (bits/dim), RE (nats), KL (nats)"
    lines = [f"| {columns.replace(', ', ' | ')} |", "|---" * 8 + "|"]
    for row in rows:
        terms = [", ".join(f"{value:.0f}" for value in row[f"{kind}_nats"]) for kind in ("re", "kl")]
        score = f"{row['bits_per_dim']:.3f} ± {row['bits_per_dim_stderr']:.3f}"
        spent = f"{row['seconds']:.0f} ({row['cpu_seconds']:.0f})"
        size = f"{row['parameters'] / 1e6:.2f} M"
        cells = [row["recipe"], str(row["seed"]), size, str(row["steps"]), spent, score, *terms]
        lines.append(f"| {' | '.join(cells)} |")
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["recipe"], []).append(row["bits_per_dim"])
    if any(len(values) > 1 for values in found.values()):
        lines += [
            "",
            "| recipe | seeds | test ELBO (bits/dim), mean ± standard deviation |",
            "|---|---|---|",
        ]
        for recipe, values in found.items():
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            lines.append(f"| {recipe} | {len(values)} | {statistics.mean(values):.3f}{spread} |")
    return "\n".join(lines) + "\n"


def main(
    recipes: Positional[tuple[Path, ...]],
    data: str,
    out: Path = Path("results/equal-compute"),
    seconds: float = 3600,
    clock: Literal["wall", "cpu"] = "wall",
    seeds: tuple[int, ...] = (0,),
    limit: int = 1000,
    together: int = os.cpu_count() or 1,
) -> None:
    """Compare.

    Args:
        recipes: YAML files with flags of `selfvae train`.
        data: as for train.
        out: folder for the results and the runs.
        seconds: training time per run.
        clock: wall time, or the process's CPU time (cpu) on a machine that is busy otherwise.
        seeds: each recipe is run with each seed.
        limit: number of test images that are scored.
        together: number of runs at a time.
    """
    if not seconds > 0 or not math.isfinite(seconds):
        raise ValueError(f"--seconds must be positive; got {seconds}")
    with ThreadPoolExecutor(together) as pool:
        waiting = [
            pool.submit(run, r, seed, data, seconds, clock, limit, out) for seed in seeds for r in recipes
        ]
        rows = [done.result() for done in waiting]
    write_atomic(out / "result.json", (json.dumps(rows, indent=1) + "\n").encode())
    write_atomic(out / "result.md", table(rows).encode())
    plot(rows, out / "curves.png")
    print(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
