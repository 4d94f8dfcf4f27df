"""A plain reference to measure against: the same models and operations without optimisations.

float32, eager mode, contiguous layout; transforms image by image with Pillow; encoders run again for each
importance draw; one picture per file.
"""

from __future__ import annotations

import copy
import math
import types

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from selfvae import SelfVAE
from selfvae.codec import Codec
from selfvae.transforms import BicubicDownscale

__all__ = ["compress", "decompress", "iwae", "plain", "train_step"]


def plain(model: SelfVAE) -> SelfVAE:
    """Return a copy of a model that computes the same without optimisations."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.pyramid = types.MethodType(_pyramid, model)  # type: ignore[method-assign]
    return model


def _pyramid(model: SelfVAE, x: Tensor) -> list[Tensor]:
    ys = [x]
    for level in model.levels[:-1]:
        ys.append(torch.cat([_transform(level.transform, y[None]) for y in ys[-1]]))
    return ys


def _transform(transform: nn.Module, y: Tensor) -> Tensor:
    if not isinstance(transform, BicubicDownscale):
        out: Tensor = transform(y)
        return out
    rows, cols = transform.scale
    image = Image.fromarray(y[0].permute(1, 2, 0).cpu().numpy())
    small = image.resize((image.width // cols, image.height // rows), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].contiguous().to(y.device)


def train_step(model: SelfVAE, ema: SelfVAE | None, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Make a training step: with clipped gradients and an average of the weights, or as published."""
    optimizer.zero_grad()
    (-model(x).elbo.mean() / x[0].numel()).backward()
    if ema is None:
        optimizer.step()
        return
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        for average, value in zip(ema.parameters(), model.parameters(), strict=True):
            average.mul_(0.999).add_(value, alpha=0.001)


@torch.no_grad()
def iwae(model: SelfVAE, x: Tensor, draws: int) -> Tensor:
    """Return the importance-weighted bound from one full pass per draw."""
    weights = torch.stack([model(x).elbo for _ in range(draws)])
    return torch.logsumexp(weights, 0) - math.log(draws)


def compress(codec: Codec, x: Tensor) -> list[bytes]:
    """Compress each image to a file."""
    return [codec.compress(image[None], verify=False) for image in x]


def decompress(codec: Codec, files: list[bytes]) -> Tensor:
    """Decompress files of one size."""
    return torch.cat([codec.decompress(file) for file in files])
