"""The frontier of small chains for photographs: test bits per sub-pixel against multiply-accumulates.

    python -m benchmarks.frontier results/frontier/frontier.json

The file has a dictionary per recipe of recipes/frontier, as its training run ended: "name", "share" (of the
GPU; runs of one share had equal time), "steps", "validation", "test" and "stderr" in bits per sub-pixel.
Multiply-accumulates per pixel are counted on the model that the recipe builds. Writes frontier.md and
frontier.png beside the file.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml
from tyro.conf import Positional

import selfvae
from benchmarks.measure import flop_count
from selfvae.files import write_atomic

RECIPES = Path(__file__).parents[1] / "recipes" / "frontier"


def cost(recipe: Path, side: int = 96) -> tuple[int, float]:
    """Return the parameters of a recipe's model, and its thousand multiply-accumulates per pixel."""
    flags = yaml.safe_load(recipe.read_text())
    options = {name: yaml.safe_load(value) for name, value in (o.split("=") for o in flags["options"])}
    model = selfvae.build(flags["model"], flags["size"], (3, side, side), **options)
    x = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    model.initialise(x)
    flops = flop_count(lambda: model(x))
    return sum(p.numel() for p in model.parameters()), flops / 2 / side**2 / 1000


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw test bits per sub-pixel against multiply-accumulates, a colour for each share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for share in sorted({row["share"] for row in rows}):
        group = [row for row in rows if row["share"] == share]
        at = [r["thousand_macs"] for r in group], [r["test"] for r in group]
        axis.scatter(*at, label=f"{share} of an H100")
        for row in group:
            axis.annotate(
                row["name"], (row["thousand_macs"], row["test"]), (5, 4), textcoords="offset points"
            )
    axis.set(xlabel="thousand multiply-accumulates per pixel", ylabel="test, bits per sub-pixel")
    axis.set_xlim(0, 1.5 * max(row["thousand_macs"] for row in rows))
    axis.legend(title="400 s of training on")
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    plt.close(figure)
    write_atomic(path, out.getvalue())


def main(found: Positional[Path], recipes: Path = RECIPES) -> None:
    """Write the table and the plot.

    Args:
        found: JSON file of what training found.
        recipes: folder of the recipes.
    """
    rows = sorted(json.loads(found.read_text()), key=lambda row: -row["test"])
    lines = [
        "| recipe | parameters | thousand MAC per pixel | share | steps | validation | test |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parameters, row["thousand_macs"] = cost(recipes / f"{row['name']}.yaml")
        lines.append(
            f"| {row['name']} | {parameters / 1e6:.2f} M | {row['thousand_macs']:.0f} | {row['share']} | "
            f"{row['steps']:,} | {row['validation']:.3f} | {row['test']:.3f} |"
        )
    write_atomic(found.with_suffix(".md"), ("\n".join(lines) + "\n").encode())
    plot(rows, found.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)
