"""Data: every source becomes memory-mapped uint8 arrays N x C x H x W, prepared once and cached.

`load` takes a name (`SOURCES`) or a path. Prepared arrays lie in $SELFVAE_CACHE, by default
~/.cache/selfvae; delete a folder there to prepare its source again.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfvae.data.pictures import ENDINGS, open_picture, picture_size
from selfvae.files import atomic_path, below
from selfvae.progress import Track, no_progress

__all__ = [
    "Dataset",
    "HubSource",
    "Images",
    "augment",
    "batch_indices",
    "crop",
    "load",
    "photo",
    "square",
    "to_uint8",
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


# --- sources ----------------------------------------------------------------------------------------

Splits = dict[str, np.ndarray]  # "train", "validation", "test": uint8 (N, C, H, W)


def square(picture: Image.Image, size: int) -> np.ndarray:
    """The centre square, resized (antialiased bicubic) to size x size: RGB uint8 (3, size, size)."""
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1)


_PHOTOS = {
    "train": ("astronaut", "stereo_motorcycle", "retina", "hubble_deep_field", "immunohistochemistry"),
    "validation": ("rocket",),
    "test": ("chelsea", "coffee"),
}


def _shrunk(picture: np.ndarray, factor: int) -> np.ndarray:
    """A picture (H, W, 3) shrunk by block means, rounded half up: uint8 (3, h, w)."""
    h, w = picture.shape[0] // factor, picture.shape[1] // factor
    blocks = picture[: h * factor, : w * factor].reshape(h, factor, w, factor, 3)
    total = blocks.sum((1, 3), dtype=np.int64)
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8).transpose(2, 0, 1)


class _Places(NamedTuple):
    """Squares in pictures: which one (n,), and the corner there (n,) in pixels."""

    which: np.ndarray
    top: np.ndarray
    left: np.ndarray

    @classmethod
    def choose(
        cls, sizes: Sequence[tuple[int, int]], n: int, side: int, random: np.random.Generator
    ) -> _Places:
        """n random squares, each in any picture of these heights and widths."""
        which = random.integers(0, len(sizes), n)
        corners = [
            (random.integers(0, h - side + 1), random.integers(0, w - side + 1))
            for h, w in (sizes[i] for i in which)
        ]
        return cls(which, *np.array(corners).T)

    def cut(self, out: np.ndarray, i: int, picture: np.ndarray) -> None:
        """Put the squares in picture i, uint8 (3, h, w), where they belong in out (n, 3, side, side)."""
        side = out.shape[2]
        for j in np.flatnonzero(self.which == i):
            out[j] = picture[:, self.top[j] : self.top[j] + side, self.left[j] : self.left[j] + side]


def photo(name: str, factor: int) -> np.ndarray:
    """A colour photograph inside scikit-image, shrunk: uint8 (3, h, w)."""
    from skimage import data as skimage_data

    picture = getattr(skimage_data, name)()
    return _shrunk(np.asarray(picture[0] if isinstance(picture, tuple) else picture)[..., :3], factor)


def _photos(size: int) -> Splits:
    """Random crops of the colour photographs inside scikit-image; whole photographs are held out.

    The photographs are halved, which hides their JPEG traces; for training also shrunk to a third and a
    quarter, for variety.
    """

    def crops(split: str, n: int, factors: tuple[int, ...]) -> np.ndarray:
        random = np.random.default_rng([size, len(split)])
        pictures = [photo(name, factor) for name in _PHOTOS[split] for factor in factors]
        pictures = [p for p in pictures if min(p.shape[1:]) >= size]
        if not pictures:
            raise ValueError(
                f"photos: every photograph for {split} is smaller than size {size}: choose less"
            )
        places = _Places.choose([p.shape[1:] for p in pictures], n, size, random)
        out = np.empty((n, 3, size, size), np.uint8)
        for i, picture in enumerate(pictures):
            places.cut(out, i, picture)
        return out

    return {
        "train": crops("train", 16384, (2, 3, 4)),
        "validation": crops("validation", 512, (2,)),
        "test": crops("test", 1024, (2,)),
    }


def _split(images: np.ndarray, parts: Sequence[str], source: object) -> Splits:
    """Hold out a fixed random 15% for every part beyond "train"."""
    if len(images) < len(parts):
        raise ValueError(
            f"{source} holds {len(images)} image(s) to train on; at least {len(parts)} are needed to "
            f"split them into {', '.join(parts)}"
        )
    out: Splits = {}
    for part in parts:
        if part != "train":
            kept, held = hold_out(len(images))
            out[part], images = images[held], images[kept]
    return {"train": images, **out}


def _read_folder(folder: Path, size: int) -> np.ndarray:
    files = below(folder, ENDINGS)
    if not files:
        raise ValueError(
            f"{folder} holds no images: expected files ending in {', '.join(ENDINGS)} (or train.npy)"
        )
    out = np.empty((len(files), 3, size, size), np.uint8)
    for i, file in enumerate(files):
        out[i] = square(open_picture(file), size)
    return out


def _folder(folder: Path, size: int) -> Splits:
    """A folder of images; sub-folders train, validation, test are taken as the splits."""
    names = {"train": ["train"], "validation": ["validation", "valid", "val"], "test": ["test"]}
    given = {
        split: next((folder / n for n in known if (folder / n).is_dir()), None)
        for split, known in names.items()
    }
    if given["train"] is None:
        return _split(_read_folder(folder, size), ["train", "test", "validation"], folder)
    found = {split: _read_folder(path, size) for split, path in given.items() if path is not None}
    missing = [split for split in ("test", "validation") if split not in found]
    return {**found, **_split(found["train"], ["train", *missing], folder)}


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


def _arrays(path: Path, size: int | None) -> Dataset:
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


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub, read with the package `datasets`.

    repo: name on the hub, or a local folder of the same layout. column: of the images. splits: its names
    for train, validation and test; None: hold out 15% of train. box: left, top, right, bottom of a crop
    before the resize, in pixels.
    """

    repo: str
    column: str
    splits: tuple[str, str | None, str]
    size: int
    config: str | None = None
    revision: str | None = None
    box: tuple[int, int, int, int] | None = None
    note: str = ""

    def read(self, size: int) -> Splits:
        """All images as uint8 arrays (N, 3, size, size) by split."""
        try:
            import datasets
        except ImportError:
            raise ImportError(
                f"{self.repo} is read with the package datasets: pip install 'selfvae[hub]'"
            ) from None
        out: Splits = {}
        for ours, theirs in zip(("train", "validation", "test"), self.splits, strict=True):
            if theirs is None:
                continue
            try:
                rows = datasets.load_dataset(self.repo, self.config, split=theirs, revision=self.revision)
            except Exception as error:
                raise OSError(
                    f"{self.repo} (split {theirs}) could not be loaded: {error}. It is fetched from the "
                    "hub: check the network, or give --data a folder or .npy file"
                ) from error
            if self.column not in rows.column_names:
                raise ValueError(
                    f"{self.repo} has no column {self.column!r}; it has {', '.join(rows.column_names)}"
                )
            images = np.empty((len(rows), 3, size, size), np.uint8)
            for i, picture in enumerate(self._pictures(rows)):
                images[i] = square(picture, size)
            out[ours] = images
        if "validation" not in out:
            out |= _split(out["train"], ["train", "validation"], self.repo)
        return out

    def _pictures(self, rows: Any) -> Iterator[Image.Image]:
        for row in rows.select_columns([self.column]):
            picture: Image.Image = row[self.column]
            yield picture.crop(self.box) if self.box else picture


_CELEBA_BOX = (15, 40, 15 + 148, 40 + 148)

HUB: dict[str, HubSource] = {
    "cifar10": HubSource("uoft-cs/cifar10", "img", ("train", None, "test"), 32),
    "imagenet32": HubSource(
        "benjamin-paine/imagenet-1k-32x32", "image", ("train", None, "validation"), 32,
        note="box-downsampled by Chrabaszcz et al. 2017, not van den Oord's version",
    ),
    "imagenet64": HubSource(
        "benjamin-paine/imagenet-1k-64x64", "image", ("train", None, "validation"), 64,
        note="box-downsampled by Chrabaszcz et al. 2017, not van den Oord's version",
    ),
    "imagenette": HubSource(
        "frgfm/imagenette", "image", ("train", None, "validation"), 64,
        config="full_size", revision="refs/convert/parquet",
    ),
    "celeba": HubSource(
        "flwrlabs/celeba", "image", ("train", "valid", "test"), 64, box=_CELEBA_BOX
    ),
}  # fmt: skip

SOURCES = ("photos", *HUB)


def _cache() -> Path:
    return Path(os.environ.get("SELFVAE_CACHE") or Path.home() / ".cache" / "selfvae")


def _write_folder(folder: Path, splits: Splits) -> None:
    """Write FOLDER/train.npy, ...: all of them or nothing."""
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for split, images in splits.items():
            np.save(temporary / f"{split}.npy", images)


def _prepare(name: str, key: str, read: Callable[[], Splits]) -> Dataset:
    """Arrays from the cache; made and renamed into place as a whole if they are not there."""
    folder = _cache() / key
    if not folder.is_dir():
        try:
            _write_folder(folder, read())
        except OSError:
            if not folder.is_dir():  # another process may have been first
                raise
    dataset = _arrays(folder, None)
    return Dataset(name, dataset.train, dataset.validation, dataset.test)


def crop(
    source: str | Path,
    out: str | Path,
    size: int = 64,
    shrink: Sequence[int] = (2, 3, 4),
    n: int = 20_000,
    seed: int = 0,
    track: Track = no_progress,
) -> dict[str, int]:
    """Random crops of the photographs in a folder, as a data set to train on: OUT/train.npy, ....

    A tenth of the pictures, at least one, is held out whole for validation, and as many for test. Every
    shrunk picture gives as many crops, however large it is.

    Arguments:
        source: folder of at least three picture files; sub-folders too.
        out: folder to write; must not exist.
        size: height and width of a crop in pixels.
        shrink: factors by which every picture is shrunk first (means of blocks): what hides the traces of
            JPEG. Where that leaves less than a crop, the version is left out.
        n: crops to train on; a twentieth of that for validation, and for test.
        seed: of the choice.

    Returns the number of pictures in each split. Raises ValueError that says what does not fit.
    """
    folder, out = Path(source), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another folder to write to")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of pictures at {folder}")
    if size < 1 or n < 20 or not shrink or min(shrink) < 1:
        raise ValueError(
            "size must be at least 1 pixel, n at least 20, every shrink at least 1; "
            f"got {size}, {n}, {shrink}"
        )
    sides = {f: picture_size(f) for f in below(folder, ENDINGS)}
    large = [f for f, (h, w) in sides.items() if min(h, w) // min(shrink) >= size]
    if len(large) < 3:
        raise ValueError(
            f"{folder} holds {len(sides)} picture(s), {len(large)} from which {size} x {size} can be cut "
            f"after shrinking by {min(shrink)}; at least 3 are needed: choose a smaller size or shrink"
        )
    random = np.random.default_rng(seed)
    held = max(1, len(large) // 10)
    order = [large[i] for i in random.permutation(len(large))]
    chosen = {"test": order[:held], "validation": order[held : 2 * held], "train": order[2 * held :]}
    parts: Splits = {}
    for split, files in chosen.items():
        versions = [(f, k) for f in files for k in shrink if min(sides[f]) // k >= size]
        count = n if split == "train" else n // 20
        sizes = [(sides[f][0] // k, sides[f][1] // k) for f, k in versions]
        places = _Places.choose(sizes, count, size, random)
        parts[split] = np.empty((count, 3, size, size), np.uint8)
        for file in track(files, f"cutting for {split}"):
            picture = np.asarray(open_picture(file).convert("RGB"))
            for i, (of, k) in enumerate(versions):
                if of == file:
                    places.cut(parts[split], i, _shrunk(picture, k))
    _write_folder(out, parts)
    return {split: len(files) for split, files in chosen.items()}


def _fingerprint(folder: Path) -> str:
    """Changes whenever a file below the folder is added, removed or rewritten."""
    state = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            stat = file.stat()
            state.update(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return state.hexdigest()[:16]


def load(source: str | Path, size: int | None = None) -> Dataset:
    """Images from a name or a path, as memory-mapped uint8 arrays in three splits.

    Arguments:
        source: one of `SOURCES`, an .npy file (N, C, H, W), a folder with train.npy (and validation.npy,
            test.npy), or a folder of image files (with sub-folders train, validation, test, or split at
            random). What is missing is held out of the training images, 15% each, at random but fixed.
        size: height and width in pixels; by default the source's own, 32 for photos and folders.

    Raises ValueError or FileNotFoundError that names the file and what was expected.
    """
    name = str(source)
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel; got {size}")
    if name == "photos":
        n = size or 32
        return _prepare(name, f"photos-{n}", lambda: _photos(n))
    if name in HUB:
        hub_source = HUB[name]
        n = size or hub_source.size
        return _prepare(name, f"{name}-{n}", lambda: hub_source.read(n))
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"no data at {path}: expected a file or folder, or one of {', '.join(SOURCES)}"
        )
    if path.is_file():
        if path.suffix != ".npy":
            raise ValueError(f"{path} must be an .npy array or a folder; got a {path.suffix} file")
        return _arrays(path, size)
    if (path / "train.npy").exists():
        return _arrays(path, size)
    n = size or 32
    return _prepare(path.name, f"folder-{n}-{_fingerprint(path)}", lambda: _folder(path, n))
