"""Data sets of random crops, cut from photographs: whole photographs are held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from selfvae.data.batches import Bytes, create_array
from selfvae.data.pictures import ENDINGS, open_picture, picture_size
from selfvae.files import atomic_path, below
from selfvae.progress import Track, no_progress

__all__ = ["block_means", "crop", "photo", "write_sample_photos"]


_PHOTOS = {
    "train": ("astronaut", "stereo_motorcycle", "retina", "hubble_deep_field", "immunohistochemistry"),
    "validation": ("rocket",),
    "test": ("chelsea", "coffee"),
}


def block_means(picture: Bytes, factor: int) -> Bytes:
    """Shrink a picture by the means of blocks, rounded half up.

    Args:
        picture: uint8 (H, W, 3).
        factor: height and width of a block in pixels; incomplete blocks at the edges are left out.

    Returns:
        uint8 (3, H // factor, W // factor).
    """
    h, w = picture.shape[0] // factor, picture.shape[1] // factor
    blocks = picture[: h * factor, : w * factor].reshape(h, factor, w, factor, 3)
    total = blocks.sum((1, 3), dtype=np.int64)
    return ((total + factor**2 // 2) // factor**2).astype(np.uint8).transpose(2, 0, 1)


class _Places(NamedTuple):
    """Squares in pictures: the picture's index (n,), and the square's corner there (n,) in pixels."""

    which: npt.NDArray[np.int64]
    top: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]

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

    def cut(self, out: Bytes, i: int, picture: Bytes) -> None:
        """Copy the squares in picture i, uint8 (3, h, w), to their places in out (n, 3, side, side)."""
        side = out.shape[2]
        for j in np.flatnonzero(self.which == i):
            out[j] = picture[:, self.top[j] : self.top[j] + side, self.left[j] : self.left[j] + side]


def photo(name: str, factor: int) -> Bytes:
    """Shrink a colour photograph of scikit-image's by `block_means`.

    Args:
        name: of a function of skimage.data, e.g. "coffee".
        factor: by which height and width are divided.

    Returns:
        uint8 (3, h, w).
    """
    from skimage import data as skimage_data

    picture = getattr(skimage_data, name)()
    return block_means(np.asarray(picture[0] if isinstance(picture, tuple) else picture)[..., :3], factor)


def write_sample_photos(folder: Path, size: int) -> None:
    """Cut crops from the colour photographs of scikit-image; whole photographs are held out.

    The photographs are halved, which hides their JPEG artefacts; for training also shrunk to a third and
    a quarter, for variety.

    Args:
        folder: gets train.npy (16,384 crops), validation.npy (512) and test.npy (1,024).
        size: height and width of a crop in pixels.

    Raises:
        ValueError: if all photographs of a split are smaller than a crop.
    """
    for split, n, factors in (("train", 16384, (2, 3, 4)), ("validation", 512, (2,)), ("test", 1024, (2,))):
        random = np.random.default_rng([size, len(split)])
        pictures = [photo(name, factor) for name in _PHOTOS[split] for factor in factors]
        pictures = [p for p in pictures if min(p.shape[1:]) >= size]
        if not pictures:
            raise ValueError(
                f"photos: every photograph for {split} is smaller than size {size}: choose a smaller one"
            )
        places = _Places.choose([p.shape[1:] for p in pictures], n, size, random)
        out = create_array(folder / f"{split}.npy", n, (3, size, size))
        for i, picture in enumerate(pictures):
            places.cut(out, i, picture)


def crop(
    source: str | Path,
    out: str | Path,
    size: int = 64,
    shrink: Sequence[int] = (2, 3, 4),
    n: int = 20_000,
    seed: int = 0,
    track: Track = no_progress,
) -> dict[str, int]:
    """Cut random crops from a folder of photographs, as a data set to train on.

    A tenth of the pictures, at least one, is held out whole for validation, and as many for test. All
    versions of a picture are equally likely, whatever their size.

    Args:
        source: folder of at least three picture files; sub-folders too.
        out: folder to write, OUT/train.npy, validation.npy and test.npy; must not exist.
        size: height and width of a crop in pixels.
        shrink: factors by which every picture is shrunk first (means of blocks), which hides JPEG
            artefacts. A version that is smaller than a crop is left out.
        n: crops to train on; a twentieth of that for validation, and for test.
        seed: of the choice.
        track: shows progress over the pictures.

    Returns:
        The number of pictures in each split.

    Raises:
        FileExistsError: if `out` exists.
        FileNotFoundError: if `source` is no folder.
        ValueError: if an argument is out of range, a picture cannot be read, or fewer than three pictures
            are large enough.
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
    with atomic_path(out) as temporary:
        temporary.mkdir()
        for split, files in chosen.items():
            versions = [(f, k) for f in files for k in shrink if min(sides[f]) // k >= size]
            count = n if split == "train" else n // 20
            sizes = [(sides[f][0] // k, sides[f][1] // k) for f, k in versions]
            places = _Places.choose(sizes, count, size, random)
            crops = create_array(temporary / f"{split}.npy", count, (3, size, size))
            for file in track(files, f"cutting for {split}"):
                picture = np.asarray(open_picture(file).convert("RGB"))
                for i, (of, k) in enumerate(versions):
                    if of == file:
                        places.cut(crops, i, block_means(picture, k))
    return {split: len(files) for split, files in chosen.items()}
