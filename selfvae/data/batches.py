"""Images as uint8 arrays N x C x H x W, usually memory-mapped: splits, batches, augmentation."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfvae.files import atomic_path

__all__ = [
    "Dataset",
    "Images",
    "Splits",
    "augment",
    "batch_indices",
    "hold_out",
    "open_arrays",
    "ranges",
    "to_uint8",
    "write_splits",
]


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

    def digest(self) -> str:
        """A hash of the images."""
        found = hashlib.sha256(repr(self.shape).encode())
        for part in ranges(len(self), 1024):
            found.update(self.take(part).numpy().tobytes())
        return found.hexdigest()


def ranges(n: int, size: int) -> list[range]:
    """0 to n - 1 in parts of `size`, the last one perhaps shorter."""
    return [range(start, min(n, start + size)) for start in range(0, n, size)]


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


@functools.lru_cache(maxsize=2)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """The images of a step: a new permutation of all n every epoch, a function of (seed, step) alone."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // n
    out = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = _epoch_order(n, seed, int(epoch))
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


def to_uint8(x: Tensor) -> Tensor:
    """Floats in [0, 1], any shape -> uint8, rounded; raises ValueError for values outside."""
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


Splits = dict[str, np.ndarray]  # "train", "validation", "test": uint8 (N, C, H, W)


def _open_array(path: Path, size: int | None) -> np.ndarray:
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
    """An .npy file, or a folder with train.npy and, if there, validation.npy and test.npy."""
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


def write_splits(folder: Path, splits: Splits) -> None:
    """Write FOLDER/train.npy, ...: all of them or nothing."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for split, images in splits.items():
            np.save(temporary / f"{split}.npy", images)
