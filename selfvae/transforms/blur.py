"""Gaussian blur."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from selfvae.transforms.base import ImageSpec, Transform, check_image, full_range
from selfvae.transforms.filters import fixed_point, separable

__all__ = ["GaussianBlur"]


@functools.lru_cache(maxsize=8)
def _blur_weights(sigma: float, n: int, device: torch.device) -> Tensor:
    reach, rows = math.ceil(3 * sigma), []
    kernel = {d: math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)}
    for i in range(n):
        row: dict[int, float] = {}
        for d, weight in kernel.items():
            j = min(max(i + d, 0), n - 1)
            row[j] = row.get(j, 0.0) + weight
        rows.append(row)
    return fixed_point(rows, n).to(device)


class GaussianBlur(Transform):
    """Gaussian blur of standard deviation `sigma` pixels, cut at 3 sigma, edge pixels repeated."""

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"sigma must be positive (pixels); got {sigma}")
        self.sigma = sigma

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        return full_range(self, x)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        return separable(x, functools.partial(_blur_weights, self.sigma))

    def extra_repr(self) -> str:
        return f"{self.sigma}"
