"""A sheet of photographs, enhanced: what is given, the baseline, the mean, a draw, and the original.

    python -m benchmarks.sheets MODEL PICTURE... --out sheet.png

Whole pictures are computed; the sheet shows their middle at full size, a picture per row. PSNR of the whole
pictures is printed.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from torch import Tensor
from tyro.conf import Positional

import selfvae
from selfvae.data import pictures
from selfvae.data.sheets import magnify, save_grid, to_rgb
from selfvae.metrics.enhancement import baseline_enhancement, psnr
from selfvae.tiling import tiled_if_large


def middle(x: Tensor, height: int, width: int) -> Tensor:
    """Return the middle of images (B, C, H, W)."""
    top, left = (max(0, n - size) // 2 for n, size in zip(x.shape[2:], (height, width), strict=True))
    return x[..., top : top + height, left : left + width]


def main(
    model: Positional[str],
    files: Positional[tuple[Path, ...]],
    out: Path = Path("sheet.png"),
    height: int = 256,
    width: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Draw the sheet.

    Args:
        model: folder of a model, or a bundled one's name.
        files: pictures.
        out: PNG file.
        height: of what is shown of each picture, pixels.
        width: of that.
        temperature: of the draw.
        seed: of the draw.
    """
    net = selfvae.load(model)
    rows, cols = net.multiples[0]
    shown: list[Tensor] = []
    for file in files:
        x = pictures.to_spec(pictures.read(file), net.spec)
        x = x[:, :, : x.shape[2] // rows * rows, : x.shape[3] // cols * cols]
        y = net.levels[0].transform(x)
        large = tiled_if_large(net, x[0, 0].numel())
        found = {
            "baseline": baseline_enhancement(net, y),
            "mean": selfvae.enhance(large, y, decode="mean"),
            "draw": selfvae.enhance(large, y, temperature=temperature, seed=seed),
        }
        print(
            file.stem, {name: round(psnr(image, x).item(), 2) for name, image in found.items()}, flush=True
        )
        given = magnify(to_rgb(y), *net.scale(1))
        shown += [middle(image, height, width) for image in (given, *found.values(), x)]
    save_grid(torch.cat(shown), out, columns=5, zoom=1)


if __name__ == "__main__":
    tyro.cli(main)
