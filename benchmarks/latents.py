"""Information in each variable: how much of an image, coarse and fine, is recovered from it alone.

    python -m benchmarks.latents RUN... --data DATA [--limit 256] [--block 8] [--json]

An image is the sum of its coarse part, the means of BLOCK x BLOCK pixels, and its fine part, the residual.
The variables kept are inferred from x, all others are drawn at temperature 1. The score of a part is
    1 - E|part(x) - part(drawn)|^2 / E|part(x) - part(x')|^2
where x' is another image: 1 if the part is recovered exactly, 0 if nothing of it is. The papers claim that
u carries the global structure and z the details (selfVAE, section 4.3).
"""

from __future__ import annotations

import json as encode
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from tyro.conf import Positional

import selfvae
from selfvae import operations
from selfvae.data import sources
from selfvae.data.sheets import magnify


def parts(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the coarse and the fine part of images uint8 (B, C, H, W), float64 of that shape."""
    coarse = magnify(F.avg_pool2d(x.double(), block), block)
    return coarse, x.double() - coarse


def recovered(x: Tensor, drawn: Tensor, other: Tensor, block: int) -> tuple[float, float]:
    """Return the scores of the coarse and the fine part of x."""
    out = []
    for mine, theirs, others in zip(*(parts(images, block) for images in (x, drawn, other)), strict=True):
        out.append(1 - ((mine - theirs).square().mean() / (mine - others).square().mean()).item())
    return out[0], out[1]


def kept(model: selfvae.SelfVAE) -> list[str]:
    """Return the sets to compare: none, each latent, all latents, y1, and y1 with z0."""
    names = operations.variables(model)
    latents = [name for name in names if name[0] == "z"]
    sets = ["", *latents]
    if len(latents) > 1:
        sets.append(",".join(latents))
    if "y1" in names:
        sets += ["y1", *(["y1,z0"] if "z0" in names else [])]
    return sets


def main(
    runs: Positional[tuple[str, ...]],
    data: str,
    limit: int = 256,
    block: int = 8,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Measure.

    Args:
        runs: folders of trained models, or names of bundled ones.
        data: as for train; the first LIMIT test images are taken.
        limit: number of images.
        block: side of the blocks whose means are the coarse part, in pixels.
        seed: of the draws.
        json: print only a JSON object.
    """
    images = sources.load(data).test
    x = images.take(range(min(limit, len(images))))
    other = x.roll(1, 0)
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for run in runs:
        model = selfvae.load(run)
        found[Path(run).name] = rows = {}
        for given in kept(model):
            drawn = [
                operations.reconstruct(model, part, given, seed=seed + i) if given
                else selfvae.generate(model, len(part), *x.shape[2:], seed=seed + i)
                for i, part in enumerate(x.split(32))
            ]  # fmt: skip
            rows[given or "nothing"] = recovered(x, torch.cat(drawn), other, block)
    if json:
        print(encode.dumps(found))
        return
    print("| model | kept | coarse part | fine part |\n|---|---|---|---|")
    for name, rows in found.items():
        for given, (coarse, fine) in rows.items():
            print(f"| `{name}` | {given} | {coarse:.3f} | {fine:.3f} |")


if __name__ == "__main__":
    tyro.cli(main)
