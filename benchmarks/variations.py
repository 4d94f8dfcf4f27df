"""Two sheets of a model with latents: interpolations in u, and variations at fixed u.

    python -m benchmarks.variations emoji-v3 EMOJI --out FOLDER

Both begin with test images, chosen by the seed; the sheets show only what the model draws. A row of
interpolations.png leads from the u of one image to that of another. A row of variations.png shows draws
with the same u.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from tyro.conf import Positional

import selfvae
from selfvae.data import sources
from selfvae.data.sheets import save_grid


def main(
    model: Positional[str],
    data: Positional[str],
    out: Path = Path("."),
    rows: int = 10,
    columns: int = 8,
    temperature: float = 0.8,
    between: float = 0.0,
    seed: int = 0,
) -> None:
    """Draw the sheets.

    Args:
        model: folder of a model, or a bundled one's name.
        data: data set, as for selfvae train.
        out: folder for interpolations.png and variations.png.
        rows: number of pairs and of varied images.
        columns: images per row.
        temperature: of the variations.
        between: temperature of the interpolations.
        seed: of the choice and the draws.
    """
    net = selfvae.load(model)
    test = sources.load(data, net.config.image_shape[1]).test
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    a, b = test.take(order[:rows].tolist()), test.take(order[rows : 2 * rows].tolist())
    frames = selfvae.interpolate(net, a, b, columns, temperature=between, seed=seed)
    save_grid(frames.flatten(0, 1), out / "interpolations.png", columns=columns)
    varied = selfvae.vary(net, a, columns, temperature=temperature, seed=seed)
    save_grid(varied.flatten(0, 1), out / "variations.png", columns=columns)


if __name__ == "__main__":
    tyro.cli(main)
