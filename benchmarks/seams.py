"""Seams of tiled enhancement: differences of neighbouring pixels across tile borders and elsewhere.

    python -m benchmarks.seams RUN FOLDER [--tile 192] [--margin 32] [--limit N] [--out FOLDER] [--json]

Photographs are reduced to y1 and enhanced in tiles. Prints means over the photographs, in grey levels:
    border, elsewhere
        absolute difference of neighbouring rows and columns in different tiles; in different blocks of the
        transform, but in one tile
    photo_border, photo_elsewhere
        the same for the original photographs
    changed_border, changed_inside
        absolute difference from the result without tiles (temperature 0), within 2 pixels of a border;
        elsewhere
    consistency_error
        absolute difference between d(result) and y1
"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

import selfvae
from selfvae.data import pictures
from selfvae.operations import infer


def jumps(x: Tensor, tile: int, scale: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return mean differences across tile borders and across other blocks, of x (1, C, H, W)."""
    across, within = [], []
    for dim, block in zip((2, 3), scale, strict=True):
        step = x.double().diff(dim=dim).abs().mean([d for d in range(4) if d != dim])
        at = torch.arange(1, x.shape[dim])
        across.append(step[at % tile == 0])
        within.append(step[(at % block == 0) & (at % tile != 0)])
    return torch.cat(across).mean(), torch.cat(within).mean()


def near_border(x: Tensor, tile: int, reach: int = 2) -> Tensor:
    """Return whether each pixel lies within `reach` pixels of a tile border: bool (H, W)."""
    near = []
    for n in x.shape[2:]:
        at = torch.arange(n)
        to_border = torch.minimum(at % tile, tile - 1 - at % tile)
        inner = (at >= reach) & (at < n - reach)  # the picture's edges are not borders
        near.append((to_border < reach) & inner)
    return near[0][:, None] | near[1][None]


def main(
    model: Positional[Path],
    folder: Positional[Path],
    tile: int = 192,
    margin: int = 32,
    limit: int | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure.

    Args:
        model: folder of a trained model with computed images, or the name of a bundled one.
        folder: of photographs.
        tile: height and width of a tile, in pixels.
        margin: pixels of context on each side of a tile.
        limit: number of photographs; None: all.
        out: folder for the results; None: they are not kept.
        json: print only a JSON object.
    """
    net = selfvae.load(model)
    unit = net.multiples[0]
    if tile % unit[0] or tile % unit[1]:
        raise SystemExit(f"--tile must be divisible by {unit[0]} and {unit[1]} for this model; got {tile}")
    parts = selfvae.tiled(net, tile, margin)
    rows: list[dict[str, float]] = []
    for file in sorted(f for f in folder.iterdir() if f.suffix.lower() in pictures.ENDINGS)[:limit]:
        x = pictures.to_spec(pictures.read(file), net.spec)
        h, w = (n - n % m for n, m in zip(x.shape[2:], unit, strict=True))
        x = x[:, :, :h, :w]
        y = infer(net, x, "y1")["y1"]
        drawn = selfvae.enhance(parts, y, seed=0)
        plain, whole = (selfvae.enhance(m, y, temperature=0.0) for m in (parts, net))
        changed = (plain.double() - whole.double()).abs().mean((0, 1))
        near = near_border(x, tile)
        border, elsewhere = jumps(drawn, tile, net.scale(1))
        photo_border, photo_elsewhere = jumps(x, tile, net.scale(1))
        values = {
            "border": border,
            "elsewhere": elsewhere,
            "photo_border": photo_border,
            "photo_elsewhere": photo_elsewhere,
            "changed_border": changed[near].mean(),
            "changed_inside": changed[~near].mean(),
            "consistency_error": (infer(net, drawn, "y1")["y1"].double() - y.double()).abs().mean(),
        }
        rows.append({name: float(value) for name, value in values.items()})
        if out is not None:
            pictures.write(drawn[0], out / f"{file.stem}.png")
    if not rows:
        raise SystemExit(f"{folder} holds no pictures")
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    result = {"photographs": len(rows), "tile": tile, "margin": margin, **mean}
    print(jsonlib.dumps(result) if json else "\n".join(f"{k:<18}{v}" for k, v in result.items()))


if __name__ == "__main__":
    tyro.cli(main)
