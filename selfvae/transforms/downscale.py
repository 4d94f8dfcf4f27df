"""Smaller versions of an image: means of blocks, and bicubic downscaling."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvae.transforms.base import (
    BlockSupport,
    ImageSpec,
    Support,
    Transform,
    at_least_float32,
    check_image,
    full_range,
)
from selfvae.transforms.filters import fixed_point, separable

__all__ = ["BicubicDownscale", "MeanDownscale"]


class _MeanSupport(BlockSupport):
    """The block's sum is known up to rounding: a phase may take what the later ones can still complete."""

    restricts = truncates = True

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        n = self.groups
        total = n * self.y.long()[:, None]
        left = torch.arange(n - 1, -1, -1, device=v.device).view(1, n, 1, 1, 1) * self.max_value
        known = v.cumsum(1) - v
        lo = (total - n // 2 - known - left).clamp(min=0)
        hi = (total + (n + 1) // 2 - 1 - known).clamp(max=self.max_value)
        return lo, hi

    def refine(self, estimate: Tensor, v: Tensor) -> Tensor:
        """What the sum still holds beyond the guesses is shared evenly among the phases to come: the
        conditional mean of equal, independent Gaussians given their sum."""
        n = self.groups
        left = torch.arange(n, 0, -1, device=v.device).view(1, n, 1, 1, 1)
        rest = n * self.y.long()[:, None] - (v.cumsum(1) - v)
        guessed = estimate.flip(1).cumsum(1).flip(1)
        return estimate + (rest - guessed) / left


class MeanDownscale(Transform):
    """The mean of every block of `rows` x `cols` pixels, rounded half up.

    >>> MeanDownscale(2, 2)(torch.tensor([[[[1, 2], [2, 1]]]], dtype=torch.uint8)).item()
    2
    """

    def __init__(self, rows: int = 2, cols: int | None = None) -> None:
        super().__init__()
        self.scale = (rows, rows if cols is None else cols)
        if min(self.scale) < 1 or self.scale == (1, 1):
            raise ValueError(f"a block has at least 2 pixels; got {self.scale[0]} x {self.scale[1]}")

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        (b, c, h, w), (n, m) = x.shape, self.scale
        self.size(h, w)
        total = x.reshape(b, c, h // n, n, w // m, m).int().sum((3, 5))
        return ((total + n * m // 2) // (n * m)).to(torch.uint8)

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        return _MeanSupport(y, spec, self.scale)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        size = (y.shape[2] * self.scale[0], y.shape[3] * self.scale[1])
        return F.interpolate(at_least_float32(y), size, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        return f"{self.scale[0]}, {self.scale[1]}"


def _cubic(t: float, a: float = -0.5) -> float:
    t = abs(t)
    if t < 1:
        return ((a + 2) * t - (a + 3)) * t * t + 1
    return (((t - 5) * t + 8) * t - 4) * a if t < 2 else 0.0


@functools.lru_cache(maxsize=8)  # 8 n^2 / factor bytes each
def _bicubic_weights(factor: int, n: int, device: torch.device) -> Tensor:
    rows = []
    for i in range(n // factor):
        centre, reach = (i + 0.5) * factor, 2.0 * factor
        first, last = max(0, int(centre - reach + 0.5)), min(n, int(centre + reach + 0.5))
        rows.append({j: _cubic((j + 0.5 - centre) / factor) for j in range(first, last)})
    return fixed_point(rows, n).to(device)


class BicubicDownscale(Transform):
    """Antialiased bicubic downscaling by an integer factor (Keys' kernel, a = -1/2).

    The arithmetic is Pillow's (`Image.resize(..., BICUBIC)`): 22-bit weights, the columns first, each
    pass rounded to uint8. The bytes are the same.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 2:
            raise ValueError(f"factor must be at least 2; got {factor}")
        self.scale = (factor, factor)

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        return full_range(self, x)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        self.size(*x.shape[2:])
        return separable(x, functools.partial(_bicubic_weights, self.scale[0]))

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        size = (y.shape[2] * self.scale[0], y.shape[3] * self.scale[1])
        out = F.interpolate(at_least_float32(y), size, mode="bicubic", align_corners=False)
        return out.clamp(0, spec.max_value)

    def extra_repr(self) -> str:
        return f"{self.scale[0]}"
