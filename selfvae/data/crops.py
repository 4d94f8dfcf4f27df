"""Data sets of random crops, cut from photographs: whole photographs are held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from selfvae.data.batches import Splits, write_splits
from selfvae.data.pictures import ENDINGS, open_picture, picture_size
from selfvae.files import below
from selfvae.progress import Track, no_progress

__all__ = ["crop", "photo", "sample_photos"]


_PHOTOS = {
    "train": ("astronaut", "stereo_motorcycle", "retina", "hubble_deep_field", "immunohistochemistry"),
    "validation": ("rocket",),
    "test": ("chelsea", "coffee"),
}


def block_means(picture: np.ndarray, factor: int) -> np.ndarray:
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
    return block_means(np.asarray(picture[0] if isinstance(picture, tuple) else picture)[..., :3], factor)


def sample_photos(size: int) -> Splits:
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
                    places.cut(parts[split], i, block_means(picture, k))
    write_splits(out, parts)
    return {split: len(files) for split, files in chosen.items()}
