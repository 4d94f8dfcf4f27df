"""Downscaling: block means and bicubic interpolation."""

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


def _enlarge(y: Tensor, scale: tuple[int, int], mode: str) -> Tensor:
    """Interpolate images (B, c, h, w), float, to `scale` times their height and width."""
    size = y.shape[2] * scale[0], y.shape[3] * scale[1]
    return F.interpolate(y, size, mode=mode, align_corners=False)


class _MeanSupport(BlockSupport):
    """The sum of a block is known up to rounding: a value is possible if later phases can complete it."""

    restricts = truncates = True

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        n = self.groups
        later = torch.arange(n - 1, -1, -1, device=v.device).view(1, n, 1, 1, 1)
        return self._interval(n * self.y.long()[:, None] - (v.cumsum(1) - v), later * self.max_value)

    def step_bounds(self, v: Tensor, group: int, channel: int) -> tuple[Tensor, Tensor]:
        n = self.groups
        rest = n * self.y[:, channel].long() - v[:, :group, channel].sum(1)
        return self._interval(rest, (n - 1 - group) * self.max_value)

    def _interval(self, rest: Tensor, later: Tensor | int) -> tuple[Tensor, Tensor]:
        """The interval of an entry, given the rest of the sum and the most that later phases can add."""
        n = self.groups
        lo = (rest - n // 2 - later).clamp(min=0)
        hi = (rest + (n + 1) // 2 - 1).clamp(max=self.max_value)
        return lo, hi

    def refine(self, estimate: Tensor, v: Tensor) -> Tensor:
        """Share the difference between the remaining sum and the remaining estimates evenly among the
        remaining phases: the conditional mean of independent Gaussians of equal variance given their sum.
        """
        n = self.groups
        left = torch.arange(n, 0, -1, device=v.device).view(1, n, 1, 1, 1)
        rest = n * self.y.long()[:, None] - (v.cumsum(1) - v)
        expected = estimate.flip(1).cumsum(1).flip(1)
        return estimate + (rest - expected) / left

    def refine_group(self, estimate: Tensor, v: Tensor, group: int) -> Tensor:
        n = self.groups
        rest = n * self.y.long() - v[:, :group].sum(1)
        expected = estimate[:, group:].flip(1).cumsum(1)[:, -1]  # added in the order of `refine`
        return estimate[:, group] + (rest - expected) / (n - group)


class MeanDownscale(Transform):
    """The mean of each block of `rows` x `cols` pixels, rounded half up.

    The level above such a transform codes the pixels of a block given their mean, as SReC does with pooled
    pyramids (Cao et al. 2020; see also L3C, Mentzer et al. 2019).

    >>> MeanDownscale(2, 2)(torch.tensor([[[[1, 2], [2, 1]]]], dtype=torch.uint8)).item()
    2
    """

    def __init__(self, rows: int = 2, cols: int | None = None) -> None:
        super().__init__()
        self.scale = (rows, rows if cols is None else cols)
        if min(self.scale) < 1 or self.scale == (1, 1):
            raise ValueError(f"a block needs at least 2 pixels; got {self.scale[0]} x {self.scale[1]}")

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        (b, c, h, w), (n, m) = x.shape, self.scale
        self.size(h, w)
        total = x.reshape(b, c, h // n, n, w // m, m).int().sum((3, 5))
        return ((total + n * m // 2) // (n * m)).to(torch.uint8)

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        return _MeanSupport(y, spec, self.scale)

    @property
    def exact_estimate(self) -> bool:
        # then all weights are multiples of a power of two, and all sums exact
        return all(n & (n - 1) == 0 and n <= 16 for n in self.scale)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        return _enlarge(at_least_float32(y), self.scale, "bilinear")

    def interpolate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """Bicubic interpolation, shifted block by block such that its means are those of y."""
        y = at_least_float32(y)
        out = _enlarge(y, self.scale, "bicubic")
        missing = y - F.avg_pool2d(out, self.scale)
        return out + F.interpolate(missing, out.shape[2:], mode="nearest")

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

    The output equals Pillow's `Image.resize(..., BICUBIC)` byte for byte: weights of 22 bits, columns
    first, and rounding to uint8 after each pass.
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

    @property
    def exact_estimate(self) -> bool:
        return False  # float32 does not hold all sums

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        return _enlarge(at_least_float32(y), self.scale, "bicubic").clamp(0, spec.max_value)

    def interpolate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """Bicubic interpolation, twice corrected by what its downscaled version lacks (back-projection).

        Source: Irani & Peleg 1991.
        """
        y = at_least_float32(y)
        out = _enlarge(y, self.scale, "bicubic")
        for _ in range(2):
            small = F.interpolate(out, y.shape[2:], mode="bicubic", align_corners=False, antialias=True)
            out = out + _enlarge(y - small, self.scale, "bicubic")
        return out

    def extra_repr(self) -> str:
        return f"{self.scale[0]}"
