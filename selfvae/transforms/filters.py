"""Separable filters in fixed-point arithmetic: the same result on every device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["fixed_point", "separable"]


_BITS = 22  # of a weight: sums of 2**22 * 255 per tap stay far below float64's exact 2**53


def _filter(x: Tensor, weights: Tensor) -> Tensor:
    """Filter float64 x (..., n) along the last axis by fixed-point weights (m, n): (..., m)."""
    out = torch.floor((x @ weights.T + 2 ** (_BITS - 1)) / 2**_BITS)
    return out.clamp(0, 255)


def separable(x: Tensor, weights: Callable[[int, torch.device], Tensor]) -> Tensor:
    """Filter x uint8 (B, C, H, W) along its rows, then along its columns.

    Args:
        x: Images.
        weights: Returns, for a length n and a device, fixed-point weights (m, n), float64. It must keep
            those that it has made on the device, since nothing may be copied to the device while a CUDA
            graph is recorded.

    Returns:
        uint8 (B, C, m(H), m(W)); each pass rounds half up.
    """
    h, w = x.shape[2:]
    across = _filter(x.double(), weights(w, x.device))
    down = _filter(across.transpose(2, 3), weights(h, x.device))
    return down.transpose(2, 3).to(torch.uint8).contiguous()


def fixed_point(rows: list[dict[int, float]], n: int) -> Tensor:
    """Convert rows of {index: weight} to normalised fixed-point weights, float64 (len(rows), n)."""
    out = torch.zeros(len(rows), n, dtype=torch.float64)
    for i, row in enumerate(rows):
        total = math.fsum(row.values())
        for j, weight in row.items():
            out[i, j] = math.floor(weight / total * 2**_BITS + 0.5)
    return out
