"""Data: every source becomes memory-mapped uint8 arrays N x C x H x W, prepared once and cached.

`load` takes a name (`SOURCES`) or a path. Prepared arrays lie in $SELFVAE_CACHE, by default
~/.cache/selfvae; delete a folder there to prepare its source again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selfvae.data.batches import Dataset, Splits, hold_out, open_arrays, write_splits
from selfvae.data.crops import sample_photos
from selfvae.data.pictures import ENDINGS, open_picture
from selfvae.files import below

__all__ = ["HubSource", "load", "square"]


def square(picture: Image.Image, size: int) -> np.ndarray:
    """The centre square, resized (antialiased bicubic) to size x size: RGB uint8 (3, size, size)."""
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1)


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


def _prepare(name: str, key: str, read: Callable[[], Splits]) -> Dataset:
    """Arrays from the cache; made and renamed into place as a whole if they are not there."""
    folder = _cache() / key
    if not folder.is_dir():
        try:
            write_splits(folder, read())
        except OSError:
            if not folder.is_dir():  # another process may have been first
                raise
    dataset = open_arrays(folder, None)
    return Dataset(name, dataset.train, dataset.validation, dataset.test)


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
        return _prepare(name, f"photos-{n}", lambda: sample_photos(n))
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
        return open_arrays(path, size)
    if (path / "train.npy").exists():
        return open_arrays(path, size)
    n = size or 32
    return _prepare(path.name, f"folder-{n}-{_fingerprint(path)}", lambda: _folder(path, n))
