"""Time and memory of models by image size and number of computed images.

    python -m benchmarks.cost [--out results/cost] [--model selfvae] [--size small] [--batch 8]

For square images of 32, 64 and 128 pixels and K = 0..3 transforms to 2 x 2 means, each in its own process:
seconds per training step and per generated batch, and the memory that training needs beyond that of the
libraries. Writes OUT/cost.json and OUT/cost.png.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import tyro

import selfvae
from benchmarks.measure import medians, own_peak
from benchmarks.speed import training
from selfvae.files import write_atomic

SIDES, LEVELS = (32, 64, 128), (0, 1, 2, 3)


def measure(model: str, size: str, side: int, levels: int, batch: int, repeats: int) -> dict[str, Any]:
    """Measure one model in this process."""
    before = own_peak()

    def built() -> selfvae.SelfVAE:
        return selfvae.build(model, size, (3, side, side), transforms=("mean2",) * levels)

    x = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    seconds = medians({"train": training(built(), x)}, repeats)
    memory = own_peak() - before
    net = built().eval()
    net.to(memory_format=torch.channels_last)
    seconds |= medians({"generate": lambda: selfvae.generate(net, batch)}, repeats)
    parameters = sum(p.numel() for p in net.parameters())
    return {"side": side, "levels": levels, "parameters": parameters, "bytes": memory, **seconds}


def plot(rows: list[dict[str, Any]], batch: int, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (key, title, unit) in zip(
        axes,
        (
            ("train", "training step, seconds per image", batch),
            ("generate", "generation, seconds per image", batch),
            ("bytes", "training memory, MB per image", 1e6 * batch),
        ),
        strict=True,
    ):
        for k in LEVELS:
            found = [row for row in rows if row["levels"] == k]
            axis.plot(
                [row["side"] for row in found], [row[key] / unit for row in found], "o-", label=f"K = {k}"
            )
        axis.set(xscale="log", yscale="log", title=title, xlabel="side of the image, pixels")
        axis.set_xticks(SIDES, SIDES)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)


def main(
    out: Path = Path("results/cost"),
    model: str = "selfvae",
    size: str = "small",
    batch: int = 8,
    repeats: int = 3,
    threads: int = 2,
    one: tuple[int, int] | None = None,
) -> None:
    """Measure.

    Args:
        out: folder for the figures.
        model: preset whose transforms are replaced.
        size: of the models.
        batch: images per step.
        repeats: of each measurement.
        threads: of torch.
        one: side and number of transforms: measure only these, in this process, and print the result.
    """
    torch.set_num_threads(threads)
    if one:
        print(json.dumps(measure(model, size, *one, batch, repeats)))
        return
    rows = []
    for side in SIDES:
        for levels in LEVELS:
            command = [sys.executable, "-m", "benchmarks.cost", "--one", str(side), str(levels)]
            command += ["--model", model, "--size", size, "--batch", str(batch)]
            command += ["--repeats", str(repeats), "--threads", str(threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    settings = {
        "model": model,
        "size": size,
        "batch": batch,
        "threads": threads,
        "torch": torch.__version__,
    }
    write_atomic(out / "cost.json", (json.dumps({**settings, "rows": rows}, indent=1) + "\n").encode())
    plot(rows, batch, out / "cost.png")


if __name__ == "__main__":
    tyro.cli(main)
