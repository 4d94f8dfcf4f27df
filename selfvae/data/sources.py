"""Data: every source becomes memory-mapped uint8 arrays (N, C, H, W), prepared once and cached.

`load` takes a name (`SOURCES`) or a path. Prepared arrays are in $SELFVAE_CACHE, by default
~/.cache/selfvae; delete a folder there to prepare its source again. Preparing needs little memory: every
picture is written as soon as it is read. If several processes ask for a source, the first one prepares it
and the others wait.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image

from selfvae.data.batches import Bytes, Dataset, create_array, hold_out, open_arrays, shuffled
from selfvae.data.crops import write_sample_photos
from selfvae.data.pictures import ENDINGS, open_picture
from selfvae.files import atomic_path, below, cache_folder

__all__ = ["HUB", "SOURCES", "HubSource", "load", "square"]


def square(picture: Image.Image, size: int) -> Bytes:
    """Cut out the centre square and resize it (antialiased bicubic).

    Args:
        picture: of any mode and size.
        size: height and width of the result in pixels.

    Returns:
        RGB, uint8 (3, size, size).
    """
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1)


def _write(
    out: Path, squares: Iterable[Bytes], n: int, size: int, parts: tuple[str, ...], source: object
) -> None:
    """Write n squares, uint8 (3, size, size), as arrays of these splits, one after the other.

    A fixed random 15% of what is left is held out for every split beyond the first.
    """
    if n < len(parts):
        raise ValueError(
            f"{source} holds {n} image(s) to train on; at least {len(parts)} are needed to "
            f"split them into {', '.join(parts)}"
        )
    first, *others = parts
    left, places = np.arange(n), {}
    for part in others:
        kept, held = hold_out(len(left))
        places[part], left = np.sort(left[held]), left[kept]
    places[first] = left
    arrays = {
        part: create_array(out / f"{part}.npy", len(at), (3, size, size)) for part, at in places.items()
    }
    place = {i: (part, j) for part, at in places.items() for j, i in enumerate(at.tolist())}
    for i, image in enumerate(squares):
        part, j = place[i]
        arrays[part][j] = image


def _write_folder(out: Path, folder: Path, size: int) -> None:
    """Write a folder of pictures; sub-folders train, validation, test are the splits, if they are there."""
    names = {"train": ["train"], "validation": ["validation", "valid", "val"], "test": ["test"]}
    given = {
        split: next((folder / n for n in known if (folder / n).is_dir()), None)
        for split, known in names.items()
    }
    if given["train"] is None:
        given = {"train": folder, "validation": None, "test": None}
    missing = [split for split in ("test", "validation") if given[split] is None]
    for split, path in given.items():
        if path is None:
            continue
        files = below(path, ENDINGS)
        if not files:
            raise ValueError(
                f"{path} holds no images: expected files ending in {', '.join(ENDINGS)} (or train.npy)"
            )
        squares = (square(open_picture(file), size) for file in files)
        parts = ("train", *missing) if split == "train" else (split,)
        _write(out, squares, len(files), size, parts, folder)


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub, read with the package `datasets`.

    Args:
        repo: name on the hub, or a local folder of the same layout.
        column: of the images.
        splits: its names for train, validation and test; None: hold out 15% of train.
        size: height and width in pixels by default.
        config: name of its configuration, if it has several.
        revision: branch, tag or commit.
        box: left, top, right, bottom of a crop before the resize, in pixels.
        by_class: its images may come class by class: see `load`.
        note: what is special about it.
    """

    repo: str
    column: str
    splits: tuple[str, str | None, str]
    size: int
    config: str | None = None
    revision: str | None = None
    box: tuple[int, int, int, int] | None = None
    by_class: bool = False
    note: str = ""

    def write(self, out: Path, size: int) -> None:
        """Fetch all images and write OUT/train.npy, ...: uint8 (N, 3, size, size).

        Raises:
            ImportError: if the package `datasets` is missing.
            OSError: if the data set cannot be fetched.
            ValueError: if it has no such column, or too few images.
        """
        try:
            import datasets
        except ImportError:
            raise ImportError(
                f"{self.repo} is read with the package datasets: pip install 'selfvae[hub]'"
            ) from None
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
            squares = (square(picture, size) for picture in self._pictures(rows))
            parts = ("train", "validation") if ours == "train" and self.splits[1] is None else (ours,)
            _write(out, squares, len(rows), size, parts, self.repo)

    def _pictures(self, rows: Any) -> Iterator[Image.Image]:
        for row in rows.select_columns([self.column]):
            picture: Image.Image = row[self.column]
            yield picture.crop(self.box) if self.box else picture


_CELEBA_BOX = (15, 40, 15 + 148, 40 + 148)

HUB: dict[str, HubSource] = {
    "cifar10": HubSource("uoft-cs/cifar10", "img", ("train", None, "test"), 32),
    "imagenet32": HubSource(
        "benjamin-paine/imagenet-1k-32x32", "image", ("train", None, "validation"), 32,
        by_class=True, note="box-downsampled by Chrabaszcz et al. 2017, not van den Oord's version",
    ),
    "imagenet64": HubSource(
        "benjamin-paine/imagenet-1k-64x64", "image", ("train", None, "validation"), 64,
        by_class=True, note="box-downsampled by Chrabaszcz et al. 2017, not van den Oord's version",
    ),
    "imagenette": HubSource(
        "frgfm/imagenette", "image", ("train", None, "validation"), 64,
        config="full_size", revision="refs/convert/parquet", by_class=True,
    ),
    "celeba": HubSource(
        "flwrlabs/celeba", "image", ("train", "valid", "test"), 64, box=_CELEBA_BOX
    ),
}  # fmt: skip

SOURCES = ("photos", *HUB)


def _prepare(name: str, key: str, write: Callable[[Path], None]) -> Dataset:
    """Open arrays in the cache; if they are not there, `write` them into a folder, whole or not at all."""
    folder = cache_folder() / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{key}.lock")):  # the others wait for the first one
            if not folder.is_dir():
                with atomic_path(folder) as temporary:
                    temporary.mkdir()
                    write(temporary)
    dataset = open_arrays(folder, None)
    return Dataset(name, dataset.train, dataset.validation, dataset.test)


def _by_class(dataset: Dataset) -> Dataset:
    """The data set with validation and test images, which may come class by class, in a random order."""
    return Dataset(dataset.name, dataset.train, shuffled(dataset.validation), shuffled(dataset.test))


def _fingerprint(folder: Path) -> str:
    """Changes whenever a file below the folder is added, removed or rewritten."""
    state = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            stat = file.stat()
            state.update(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return state.hexdigest()[:16]


def load(source: str | Path, size: int | None = None) -> Dataset:
    """Open a source of images as memory-mapped arrays in three splits, prepared first if need be.

    Scores that are limited to n images (`limit`, validation during training, reports) take the first n of
    a split. Where these could be of one class, the order is random, but always the same: in splits held
    out by this function, in folders of picture files, and in hub data sets that come class by class.
    Splits that an array file holds, and CIFAR-10's and CelebA's test sets, keep their own order, so that
    "the first 1,000 images" means the same to everybody.

    Args:
        source: one of `SOURCES`, an .npy file (N, C, H, W), a folder with train.npy (and validation.npy,
            test.npy), or a folder of picture files (with sub-folders train, validation, test, or split at
            random). What is missing is held out of the training images, 15% each.
        size: height and width in pixels; by default the source's own, 32 for photos and folders.

    Returns:
        Images as uint8 (N, C, H, W).

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if a file is not as expected; the message names it.
        OSError, ImportError: if a data set cannot be fetched.
    """
    name = str(source)
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel; got {size}")
    if name == "photos":
        n = size or 32
        return _prepare(name, f"photos-{n}", lambda out: write_sample_photos(out, n))
    if name in HUB:
        hub_source = HUB[name]
        n = size or hub_source.size
        dataset = _prepare(name, f"{name}-{n}", lambda out: hub_source.write(out, n))
        return _by_class(dataset) if hub_source.by_class else dataset
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"no data at {path}: expected a file or folder, or one of {', '.join(SOURCES)}"
        )
    if path.is_file():
        if path.suffix != ".npy":
            raise ValueError(f"{path} must be an .npy array or a folder; got a {path.suffix} file")
        return open_arrays(path, size)
    if (path / "train.npy").exists():
        return open_arrays(path, size)
    n = size or 32
    key = f"folder-{n}-{_fingerprint(path)}"
    return _by_class(_prepare(path.name, key, lambda out: _write_folder(out, path, n)))
