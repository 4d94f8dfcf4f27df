"""Picture files of any kind <-> uint8 tensors that a model takes.

Reading: palettes become RGB, one-bit pictures grey, CMYK and other colour spaces RGB; 16-bit grey keeps
the high byte (as Pillow does for 16-bit RGB); 32-bit integers and floats are refused; the orientation that
a camera noted is applied; of an animation the first frame is taken. Alpha is kept apart.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from selfvae.files import write_atomic
from selfvae.transforms import Greyscale, ImageSpec

__all__ = [
    "ENDINGS",
    "Picture",
    "check_ending",
    "encode",
    "from_image",
    "open_picture",
    "picture_size",
    "read",
    "read_exactly",
    "save",
    "show",
    "to_image",
    "to_spec",
    "write",
]

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

Source = Path | BinaryIO  # a stream is somebody else's file: only the formats of `ENDINGS` are taken there
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # as Pillow calls them


class _RefusedError(ValueError):
    """The file is a picture, but not one that can be taken."""


class Picture(NamedTuple):
    """pixels: uint8 (1, C, H, W), C = 1 (grey) or 3 (RGB). alpha: uint8 (1, 1, H, W), or None without."""

    pixels: Tensor
    alpha: Tensor | None = None


def _name(source: Source) -> str:
    return str(source) if isinstance(source, Path) else "the file"


def _open(source: Source) -> Image.Image:
    return Image.open(source, formats=None if isinstance(source, Path) else _FORMATS)


def open_picture(source: Source, exact: bool = False) -> Image.Image:
    """The file's picture in mode L, LA, RGB or RGBA; ValueError naming the file if that cannot be.

    exact: also if any pixel would be lost: more than 8 bits a channel, other colours, several pictures.
    """
    name = _name(source)
    try:
        with _open(source) as file:
            if exact:
                _check_exact(name, file)
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I;16") or (picture.mode == "I" and file.format == "PPM"):
                return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.mode in ("I", "F"):
                raise _RefusedError(
                    f"{name} has 32 bits a channel (mode {picture.mode}): convert it to 8 or 16 bits"
                )
            transparent = (
                picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info
            )
            grey = picture.mode in ("1", "L", "LA", "La")
            return picture.convert(("L" if grey else "RGB") + ("A" if transparent else ""))
    except _RefusedError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(name, error) from None


def picture_size(source: Source) -> tuple[int, int]:
    """Height and width in pixels of what `open_picture` gives, without reading the pixels."""
    try:
        with _open(source) as file:
            turned = 5 <= file.getexif().get(ExifTags.Base.Orientation, 1) <= 8
            return file.size if turned else file.size[::-1]
    except _UNREADABLE as error:
        raise _unreadable(_name(source), error) from None


# what Pillow raises over broken files
_UNREADABLE = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


def _unreadable(name: str, error: BaseException) -> ValueError:
    if isinstance(error, Image.DecompressionBombError):
        what = str(error).partition(",")[0]  # and not what Pillow suspects
        return ValueError(f"{name} cannot be read as an image ({what}): shrink it")
    unknown = "of no known kind; PNG, JPEG, WebP, TIFF, BMP, GIF are read"
    why = unknown if isinstance(error, UnidentifiedImageError) else error
    return ValueError(f"{name} cannot be read as an image ({why}): remove or repair it")


def from_image(picture: Image.Image) -> Tensor:
    """A Pillow image's values, uint8 (1, C, H, W)."""
    values = np.atleast_3d(np.asarray(picture))
    return torch.from_numpy(values.transpose(2, 0, 1).copy())[None]


def to_image(x: Tensor) -> Image.Image:
    """A Pillow image of values uint8 (C, H, W), 1 to 4 channels."""
    values = x.cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def _source(file: str | Source) -> Source:
    return Path(file) if isinstance(file, str) else file


def read(file: str | Source) -> Picture:
    """A picture file as tensors; rules and errors as above."""
    return _tensors(open_picture(_source(file)))


def _tensors(picture: Image.Image) -> Picture:
    x = from_image(picture)
    return Picture(x[:, :-1], x[:, -1:]) if x.shape[1] in (2, 4) else Picture(x)


def read_exactly(file: str | Source) -> Tensor:
    """A picture file's pixels, uint8 (1, C, H, W), C = 1 or 3; ValueError where that would lose any.

    Refused are more than 8 bits a channel, colour spaces other than grey and RGB, several pictures in a
    file, and an alpha channel that says anything.
    """
    source = _source(file)
    picture = _tensors(open_picture(source, exact=True))
    if picture.alpha is not None and int(picture.alpha.min()) < 255:
        raise ValueError(f"{_name(source)} has an alpha channel, which would be lost: remove it first")
    return picture.pixels


def _check_exact(name: str, file: Image.Image) -> None:
    bits = getattr(file, "tag_v2", {}).get(258, (8,))  # of a TIFF file
    deep = max(bits if isinstance(bits, tuple) else (bits,)) > 8
    # what Pillow would shorten to 8 bits shows in how it unpacks the file
    unpacked = [str(tile[3]) for tile in getattr(file, "tile", ())]
    deep |= any(";16" in how for how in unpacked) or file.mode[0] in "IF"
    if file.format == "PPM":
        deep |= any(tile[0] in ("ppm", "ppm_plain") and _maximum(tile[3]) != 255 for tile in file.tile)  # type: ignore[attr-defined]
    if deep:
        raise _RefusedError(f"{name} has other than 8 bits a channel: convert it first, which loses some")
    if file.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"):
        raise _RefusedError(f"{name} is neither grey nor RGB (mode {file.mode}): convert it first")
    if getattr(file, "n_frames", 1) > 1:
        raise _RefusedError(f"{name} holds {file.n_frames} pictures; only one can be kept")  # type: ignore[attr-defined]


def _maximum(args: object) -> object:
    """The largest value of a PPM file, which Pillow scales to 255."""
    return args[1] if isinstance(args, tuple) and len(args) > 1 else 255


def to_spec(picture: Picture, spec: ImageSpec) -> Tensor:
    """The picture as an image of that format, uint8 (1, C, H, W).

    Grey is repeated for colour, colour becomes integer luma for grey, alpha (opaque where there is none)
    is the last of 2 or 4 channels, and fewer levels keep the high bits.
    """
    x, colours = picture.pixels, 1 if spec.channels < 3 else 3
    if x.shape[1] < colours:
        x = x.expand(-1, 3, -1, -1)
    elif x.shape[1] > colours:
        x = Greyscale()(x)
    if spec.channels in (2, 4):
        alpha = torch.full_like(x[:, :1], 255) if picture.alpha is None else picture.alpha
        x = torch.cat([x, alpha], 1)
    return (x.int() * spec.num_values // 256).to(torch.uint8)


def show(x: Tensor, spec: ImageSpec) -> Tensor:
    """An image of that format for the eye: its levels spread over 0..255; uint8 of the same shape."""
    return (x.int() * 255 // spec.max_value).to(torch.uint8)


def write(x: Tensor, path: str | Path, alpha: Tensor | None = None) -> None:
    """Write one image uint8 (C, H, W), 1 to 4 channels; alpha uint8 (h, w) is resized to it.

    The ending says which format; PNG and WebP files are lossless. Raises ValueError for an unknown ending
    or, with alpha, for a format that has none.
    """
    picture = to_image(x)
    if alpha is not None:
        mask = Image.fromarray(alpha.cpu().numpy())
        if mask.size != picture.size:
            mask = mask.resize(picture.size, Image.Resampling.BICUBIC)
        picture.putalpha(mask)
    save(picture, Path(path))


def check_ending(path: Path, alpha: bool = False) -> str:
    """The kind of file that the ending of `path` says; ValueError for none, or none that holds alpha."""
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    if kind not in Image.SAVE or kind == "SVAE":  # which Pillow knows once `selfvae.codec.use` was called
        raise _RefusedError(f"{path}: a picture file ends in .png, .webp, .jpg, ...; got {path.suffix!r}")
    if alpha and kind not in ("PNG", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000"):
        raise _RefusedError(f"{path}: {kind} files hold no alpha channel: write .png or .webp")
    return kind


def encode(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """A picture as a file of a kind of Pillow's; by default WebP is lossless, JPEG of quality 95."""
    if kind == "WEBP":
        options = {"lossless": True, "exact": True, **options}
    elif kind == "JPEG":
        options = {"quality": 95, **options}
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def save(picture: Image.Image, path: Path, **options: object) -> None:
    """Write a picture file whole or not at all."""
    kind = check_ending(path, alpha=picture.mode in ("LA", "RGBA"))
    write_atomic(path, encode(picture, kind, **options))
