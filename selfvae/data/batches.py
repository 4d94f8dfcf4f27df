"""Images as uint8 arrays (N, C, H, W), usually memory-mapped: splits, batches, augmentation."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "Bytes",
    "Dataset",
    "Images",
    "Indices",
    "augment",
    "batch_indices",
    "create_array",
    "hold_out",
    "open_arrays",
    "ranges",
    "shuffled",
    "to_uint8",
]

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

_HELD_OUT = 0.15  # of the training images, for validation, where a source has no such split


class Images:
    """Images in a fixed order, usually in a memory-mapped file.

    Args:
        array: uint8 (N, C, H, W).
        index: int64 (n,), which images of the array, in which order; None: all, in the array's order.
    """

    def __init__(self, array: Bytes, index: Indices | None = None) -> None:
        self.array, self.index = array, index

    def __len__(self) -> int:
        return len(self.array) if self.index is None else len(self.index)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W); height and width in pixels."""
        return (len(self), *self.array.shape[1:])

    def take(self, chosen: Sequence[int] | range | Indices) -> Tensor:
        """Read images into memory.

        Args:
            chosen: positions in this order, from 0.

        Returns:
            uint8 (B, C, H, W).
        """
        rows = np.asarray(chosen, dtype=np.int64)
        return torch.from_numpy(np.array(self.array[rows if self.index is None else self.index[rows]]))

    def digest(self) -> str:
        """SHA-256 of the shape and of all images in their order, hexadecimal."""
        found = hashlib.sha256(repr(self.shape).encode())
        for part in ranges(len(self), 1024):
            found.update(self.take(part).numpy().tobytes())
        return found.hexdigest()


def ranges(n: int, size: int) -> list[range]:
    """0 to n - 1 in parts of `size`, the last one perhaps shorter.

    >>> ranges(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(start, min(n, start + size)) for start in range(0, n, size)]


@dataclass(frozen=True)
class Dataset:
    """Images to train on, to choose settings by, and for final figures.

    The first n images of `validation` and of `test` stand for the whole split: see `sources.load`.
    """

    name: str
    train: Images
    validation: Images
    test: Images


def hold_out(n: int) -> tuple[Indices, Indices]:
    """Choose a random 15% of n images, at least one; always the same ones.

    Returns:
        Indices of the images to train on, ascending, and of those held out, in a random order: the first
        of these are a random subset even where the images come class by class. int64 (m,) each.
    """
    order = np.random.default_rng(0).permutation(n)
    held = max(1, round(n * _HELD_OUT))
    return np.sort(order[held:]), order[:held]


def shuffled(images: Images) -> Images:
    """The same images in a random order, which depends on their number only."""
    order = np.random.default_rng([0, len(images)]).permutation(len(images))
    return Images(images.array, order if images.index is None else images.index[order])


@functools.lru_cache(maxsize=2)
def _epoch_order(n: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> Indices:
    """Choose the images of a training step.

    Every epoch visits all n images in a new random order. Nothing but the arguments counts, so that a
    resumed run sees the same batches.

    Args:
        n: images in the training set.
        batch_size: images per step.
        step: from 0.
        seed: of the order.

    Returns:
        int64 (batch_size,), 0 to n - 1.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n
    out = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = _epoch_order(n, seed, int(epoch))
        out[epochs == epoch] = order[positions[epochs == epoch] % n]
    return out


def augment(x: Tensor, *, flip: bool = False, translate: int = 0) -> Tensor:
    """Flip and shift images at random, each on its own, by torch's global random state.

    Args:
        x: (B, C, H, W), any dtype and device.
        flip: mirror each image left to right with probability 1/2.
        translate: shift by up to this many pixels in both directions; edges are repeated.

    Returns:
        x's shape, dtype and device.
    """
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


def to_uint8(x: Tensor) -> Tensor:
    """Convert floats in [0, 1] to 0..255, rounded to nearest.

    Args:
        x: floats of any shape; uint8 is returned as it is.

    Returns:
        uint8 of x's shape.

    Raises:
        ValueError: if x is of another dtype or has values outside [0, 1].
    """
    if x.dtype == torch.uint8:
        return x
    if x.is_floating_point() and not x.numel():
        return x.to(torch.uint8)
    if not x.is_floating_point() or not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"to_uint8 takes floats in [0, 1]; got {str(x.dtype).removeprefix('torch.')} in "
            f"[{x.min().item():g}, {x.max().item():g}]: scale the values first"
        )
    return (x * 255).round().to(torch.uint8)


def create_array(path: Path, n: int, shape: tuple[int, int, int]) -> Bytes:
    """Create an .npy file for n images (C, H, W), to be filled: a memory map, uint8 (n, C, H, W)."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(n, *shape))


def _open_array(path: Path, size: int | None) -> Bytes:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy array ({error})") from None
    hint = ""
    if array.ndim == 4 and array.shape[3] <= 4 < array.shape[1]:
        hint = ": transpose it with array.transpose(0, 3, 1, 2)"
    elif array.dtype != np.uint8:
        hint = ": store the values 0..255 as uint8"
    if array.dtype != np.uint8 or array.ndim != 4 or not 1 <= array.shape[1] <= 4 or not len(array):
        raise ValueError(
            f"{path} must be uint8 (N, C, H, W) with 1 to 4 channels; got {array.dtype} {array.shape}{hint}"
        )
    if size is not None and array.shape[2:] != (size, size):
        raise ValueError(
            f"{path} holds images of {array.shape[2]} x {array.shape[3]} pixels; {size} x {size} was "
            "asked for: leave the size out, or prepare another array"
        )
    return array


def open_arrays(path: Path, size: int | None) -> Dataset:
    """Open prepared images as memory maps; splits that are missing are held out of the training images.

    Args:
        path: an .npy file, or a folder with train.npy and perhaps validation.npy and test.npy: uint8
            (N, C, H, W), 1 to 4 channels, all of one shape.
        size: height and width in pixels that the images must have; None: any.

    Returns:
        Splits that have a file in the file's order; those held out, 15% each, in a fixed random order.

    Raises:
        ValueError: if an array has another dtype, shape or size, or too few images to hold some out.
    """
    name = path.stem if path.is_file() else path.name
    names = ("train", "validation", "test")
    files = {n: path / f"{n}.npy" for n in names} if path.is_dir() else {"train": path}
    arrays = {n: _open_array(f, size) for n, f in files.items() if f.exists()}
    shapes = {n: a.shape[1:] for n, a in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{path}: all arrays must hold images of one shape; got {shapes}")
    images = {n: Images(a) for n, a in arrays.items()}
    index = np.arange(len(arrays["train"]))
    for part in ("test", "validation"):
        if part not in images:
            if len(index) < 2:
                raise ValueError(f"{path} holds too few images to hold some out for {part}")
            kept, held = hold_out(len(index))
            images[part], index = Images(arrays["train"], index[held]), index[kept]
    if len(index) < len(arrays["train"]):
        images["train"] = Images(arrays["train"], index)
    return Dataset(name, images["train"], images["validation"], images["test"])
