"""Data: every source becomes memory-mapped uint8 arrays N x C x H x W, prepared once and cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Dataset", "Images", "augment", "batch_indices"]

_HELD_OUT = 0.15  # of the training images, for validation, where a source has no such split


class Images:
    """A uint8 array (N, C, H, W), usually memory-mapped, or the part of it that `index` names."""

    def __init__(self, array: np.ndarray, index: np.ndarray | None = None) -> None:
        self.array, self.index = array, index

    def __len__(self) -> int:
        return len(self.array) if self.index is None else len(self.index)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self), *self.array.shape[1:])

    def take(self, chosen: Sequence[int] | range | np.ndarray) -> Tensor:
        """The chosen images, uint8 (B, C, H, W), in memory."""
        rows = np.asarray(chosen, dtype=np.int64)
        return torch.from_numpy(np.array(self.array[rows if self.index is None else self.index[rows]]))


@dataclass(frozen=True)
class Dataset:
    """Images to train on, to choose by, and for final figures."""

    name: str
    train: Images
    validation: Images
    test: Images


def hold_out(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for validation: a fixed random 15% is held out."""
    order = np.random.default_rng(0).permutation(n)
    held = max(1, round(n * _HELD_OUT))
    return np.sort(order[held:]), np.sort(order[:held])


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """The images of a step: a new permutation of all n every epoch, a function of (seed, step) alone."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n
    out = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(n)
        out[epochs == epoch] = order[positions[epochs == epoch] % n]
    return out


def augment(x: Tensor, *, flip: bool = False, translate: int = 0) -> Tensor:
    """Random horizontal flips and shifts by up to `translate` pixels (edges repeated), on x's device."""
    b, _, h, w = x.shape
    rows = torch.arange(h, device=x.device).expand(b, h)
    cols = torch.arange(w, device=x.device).expand(b, w)
    if translate:
        shift = torch.randint(-translate, translate + 1, (2, b, 1), device=x.device)
        rows, cols = (rows + shift[0]).clamp(0, h - 1), (cols + shift[1]).clamp(0, w - 1)
    if flip:
        mirrored = torch.rand(b, 1, device=x.device) < 0.5
        cols = torch.where(mirrored, w - 1 - cols, cols)
    if not (flip or translate):
        return x
    images = torch.arange(b, device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[images, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
