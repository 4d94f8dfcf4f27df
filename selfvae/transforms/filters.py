"""Separable filters in fixed-point arithmetic: the same bytes on every device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["fixed_point", "separable"]


_BITS = 22  # of the fixed-point filter weights: 2**22 * 255 * taps stays far below float64's 2**53


def _filter(x: Tensor, weights: Tensor) -> Tensor:
    """Integer filter along the last axis: float64 x (..., n), fixed-point weights (m, n) -> (..., m)."""
    out = torch.floor((x @ weights.T + 2 ** (_BITS - 1)) / 2**_BITS)
    return out.clamp(0, 255)


def separable(x: Tensor, weights: Callable[[int, torch.device], Tensor]) -> Tensor:
    """Filter the columns, then the rows; each pass rounds half up to a uint8 value.

    weights: for a length in pixels, on a device; those it has made before must be there already, since
        nothing may be copied to the device while a CUDA graph is recorded.
    """
    h, w = x.shape[2:]
    across = _filter(x.double(), weights(w, x.device))
    down = _filter(across.transpose(2, 3), weights(h, x.device))
    return down.transpose(2, 3).to(torch.uint8).contiguous()


def fixed_point(rows: list[dict[int, float]], n: int) -> Tensor:
    """Rows of {index: weight} -> normalised fixed-point weights, float64 (len(rows), n)."""
    out = torch.zeros(len(rows), n, dtype=torch.float64)
    for i, row in enumerate(rows):
        total = math.fsum(row.values())
        for j, weight in row.items():
            out[i, j] = math.floor(weight / total * 2**_BITS + 0.5)
    return out
