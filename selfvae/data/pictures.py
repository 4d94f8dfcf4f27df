"""Picture files of any kind <-> uint8 tensors that a model takes.

Reading: palettes become RGB, one-bit pictures grey, CMYK and other colour spaces RGB; 16-bit grey keeps
the high byte (as Pillow does for 16-bit RGB); 32-bit integers and floats are refused; the orientation that
a camera recorded is applied; of an animation the first frame is taken. Alpha and metadata are kept apart.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from selfvae.data.metadata import Metadata
from selfvae.files import write_atomic
from selfvae.transforms import Greyscale, ImageSpec

__all__ = [
    "ENDINGS",
    "LOSSLESS",
    "MODES",
    "Options",
    "Picture",
    "check_ending",
    "encode",
    "encode_lossless",
    "file_of",
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
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels
_STRIP = 2**22  # pixels
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # as Pillow calls them


class _RefusedError(ValueError):
    """The file is a picture, but not one that can be taken."""


class Picture(NamedTuple):
    """What a picture file holds.

    Attributes:
        pixels: uint8 (1, C, H, W), C = 1 (grey) or 3 (RGB).
        alpha: uint8 (1, 1, H, W), or None without.
        metadata: colour profile, EXIF, XMP and texts.
    """

    pixels: Tensor
    alpha: Tensor | None = None
    metadata: Metadata = Metadata()

    def channels(self) -> Tensor:
        """Pixels and alpha together, uint8 (1, C, H, W), C = 1 to 4."""
        return self.pixels if self.alpha is None else torch.cat([self.pixels, self.alpha], 1)


def _name(source: Source) -> str:
    return str(source) if isinstance(source, Path) else "the file"


def _open(source: Source) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns from half the size on that it refuses, and that `check_size` refuses
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source, formats=None if isinstance(source, Path) else _FORMATS)


def open_picture(source: Source, exact: bool = False) -> Image.Image:
    """Open a picture file and convert it as the module says.

    Args:
        source: path, or binary stream.
        exact: refuse what would lose information about pixels: more than 8 bits per channel, other
            colours, several pictures.

    Returns:
        A Pillow image of mode L, LA, RGB or RGBA.

    Raises:
        ValueError: if the file cannot be read, or is refused; the message names it.
    """
    return _load(source, exact)[0]


def _load(source: Source, exact: bool = False) -> tuple[Image.Image, Metadata]:
    """What `open_picture` gives, and the file's metadata."""
    name = _name(source)
    try:
        with _open(source) as file:
            if exact:
                _check_exact(name, file)
            tags = Metadata.of_tiff(file)  # while the file is open: reading the pixels may close it
            picture = _turned(file)
            return _converted(name, picture, file.format), Metadata.of(file, tags)
    except _RefusedError:
        raise
    except _UNREADABLE as error:
        raise _unreadable(name, error) from None


def _turned(file: Image.Image) -> Image.Image:
    """The picture upright; as it is stored if its EXIF data are broken."""
    file.load()
    return ImageOps.exif_transpose(file) if _orientation(file) > 1 else file


def _orientation(file: Image.Image) -> int:
    try:
        found = file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's answers to broken EXIF data are of many kinds
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _converted(name: str, picture: Image.Image, kind: str | None) -> Image.Image:
    """The picture in mode L, LA, RGB or RGBA."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind == "PPM"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise _RefusedError(
            f"{name} has 32 bits per channel (mode {picture.mode}): convert it to 8 or 16 bits"
        )
    transparent = picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info
    grey = picture.mode in ("1", "L", "LA", "La")
    mode = ("L" if grey else "RGB") + ("A" if transparent else "")
    return picture if picture.mode == mode else picture.convert(mode)


def picture_size(source: Source) -> tuple[int, int]:
    """Height and width in pixels of what `open_picture` gives, without reading the pixels.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        with _open(source) as file:
            return file.size if _orientation(file) >= 5 else file.size[::-1]
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
    width, height = picture.size
    x = torch.empty(1, len(picture.getbands()), height, width, dtype=torch.uint8)
    for top, bottom in _strips(height, width):
        values = np.atleast_3d(np.asarray(picture.crop((0, top, width, bottom))))
        x[0, :, top:bottom] = torch.from_numpy(values.transpose(2, 0, 1).copy())
    return x


def to_image(x: Tensor) -> Image.Image:
    """A Pillow image of values uint8 (C, H, W), 1 to 4 channels."""
    channels, height, width = x.shape
    picture = Image.new(MODES[channels], (width, height))
    for top, bottom in _strips(height, width):
        values = x[:, top:bottom].cpu().permute(1, 2, 0).numpy()
        picture.paste(Image.fromarray(values[..., 0] if channels == 1 else values), (0, top))
    return picture


def _strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    """The first row of each strip and the one after its last; Pillow copies what it converts twice."""
    rows = max(1, _STRIP // max(width, 1))
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


def _source(file: str | Source) -> Source:
    return Path(file) if isinstance(file, str) else file


def read(file: str | Source, exact: bool = False) -> Picture:
    """Read a picture file as tensors; conversions as the module says.

    Args:
        file: path, or binary stream.
        exact: as for `open_picture`.

    Raises:
        ValueError: if the file cannot be read, or is refused; the message names it.
    """
    picture, metadata = _load(_source(file), exact)
    x = from_image(picture)
    alpha = x[:, -1:] if x.shape[1] in (2, 4) else None
    return Picture(x if alpha is None else x[:, :-1], alpha, metadata)


def read_exactly(file: str | Source) -> Tensor:
    """Read a picture file whose pixels uint8 tensors can hold without loss.

    Args:
        file: path, or binary stream.

    Returns:
        uint8 (1, C, H, W), C = 1 or 3.

    Raises:
        ValueError: if the file cannot be read, or has more than 8 bits per channel, a colour space other
            than grey and RGB, several pictures, or an alpha channel that is not opaque everywhere.
    """
    source = _source(file)
    picture = read(source, exact=True)
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
        stored = f"{file.format}, {_stored(file)}"
        raise _RefusedError(
            f"{name} does not have 8 bits per channel ({stored}): convert it first, with some loss"
        )
    if file.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"):
        raise _RefusedError(f"{name} is neither grey nor RGB (mode {file.mode}): convert it first")
    if getattr(file, "n_frames", 1) > 1:
        raise _RefusedError(f"{name} holds {file.n_frames} pictures; only one can be kept")  # type: ignore[attr-defined]


def _stored(file: Image.Image) -> str:
    """How a picture's values are stored, e.g. "RGB;16B"."""
    args = next((tile[3] for tile in getattr(file, "tile", ())), file.mode)
    if file.format == "PPM":
        return f"values up to {_maximum(args)}"
    return str(args[0] if isinstance(args, tuple) and args else args)


def _maximum(args: object) -> object:
    """The largest value of a PPM file, which Pillow scales to 255."""
    return args[1] if isinstance(args, tuple) and len(args) > 1 else 255


def to_spec(picture: Picture, spec: ImageSpec) -> Tensor:
    """Convert a picture to an image of a model.

    Grey is repeated for colour, colour becomes integer luma for grey, alpha (opaque where there is none)
    is the last of 2 or 4 channels, and fewer values keep the high bits.

    Returns:
        uint8 (1, C, H, W), 0 to `spec.max_value`.
    """
    x, colours = picture.pixels, 1 if spec.channels < 3 else 3
    if x.shape[1] < colours:
        x = x.expand(-1, 3, -1, -1)
    elif x.shape[1] > colours:
        x = Greyscale()(x)
    if spec.channels in (2, 4):
        alpha = torch.full_like(x[:, :1], 255) if picture.alpha is None else picture.alpha
        x = torch.cat([x, alpha], 1)
    return x if spec.num_values == 256 else (x.int() * spec.num_values // 256).to(torch.uint8)


def show(x: Tensor, spec: ImageSpec) -> Tensor:
    """Spread the values of an image of a spec, uint8 of any shape, over 0..255, for viewing."""
    return x if spec.max_value == 255 else (x.int() * 255 // spec.max_value).to(torch.uint8)


def write(
    x: Tensor, path: str | Path, alpha: Tensor | None = None, metadata: Metadata | None = None
) -> None:
    """Write an image as a picture file, whole or not at all; arguments and errors as for `file_of`."""
    path = Path(path)
    write_atomic(path, file_of(x, path, alpha, metadata))


def file_of(x: Tensor, path: Path, alpha: Tensor | None = None, metadata: Metadata | None = None) -> bytes:
    """Encode an image as the picture file that a path names.

    Args:
        x: uint8 (C, H, W), 1 to 4 channels.
        path: its ending says the format; PNG and WebP files are lossless.
        alpha: uint8 (h, w), resized to the image.
        metadata: what the format cannot hold of them is left out (`Metadata.lost`).

    Raises:
        ValueError: for an unknown ending, or for alpha in a format that has none.
    """
    picture = to_image(x)
    if alpha is not None:
        mask = Image.fromarray(alpha.cpu().numpy())
        if mask.size != picture.size:
            mask = mask.resize(picture.size, Image.Resampling.BICUBIC)
        picture.putalpha(mask)
    kind = check_ending(path, alpha=picture.mode in ("LA", "RGBA"))
    return encode(picture, kind, **(metadata.options(kind) if metadata else {}))


def check_ending(path: Path, alpha: bool = False) -> str:
    """The format, as Pillow calls it, that the ending of a path says.

    Raises:
        ValueError: if there is none, or none that holds alpha where that is needed.
    """
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    if kind not in Image.SAVE or kind == "SVAE":  # which Pillow knows once `selfvae.codec.use` was called
        raise _RefusedError(f"{path}: a picture file ends in .png, .webp, .jpg, ...; got {path.suffix!r}")
    if alpha and kind not in ("PNG", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000"):
        raise _RefusedError(f"{path}: {kind} files hold no alpha channel: write .png or .webp")
    return kind


Options = dict[str, Any]  # of Pillow's `save`

# by name: Pillow's format, and the options for the smallest file
LOSSLESS: dict[str, tuple[str, Options]] = {
    "PNG": ("PNG", {"optimize": True}),
    "WebP": ("WEBP", {"lossless": True, "quality": 100, "method": 6}),
    "JPEG 2000": ("JPEG2000", {"irreversible": False, "mct": 1}),  # with its colour transform
    "JPEG XL": ("JXL", {"lossless": True, "effort": 7}),
}


def encode(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode a picture as a file in memory.

    Args:
        picture: of a mode that the format can hold.
        kind: the format, as Pillow calls it.
        **options: of Pillow's `save`; by default WebP is lossless, JPEG of quality 95.

    Raises:
        OSError, ValueError: if the format cannot hold the picture.
    """
    if kind == "WEBP":
        options = {"lossless": True, "exact": True, **options}
    elif kind == "JPEG":
        options = {"quality": 95, **options}
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def encode_lossless(picture: Image.Image, name: str) -> bytes:
    """Encode a picture in one of the formats of `LOSSLESS`, as small as it gets; errors as `encode`."""
    kind, options = LOSSLESS[name]
    if picture.mode == "L":  # no colours to transform
        options = {key: value for key, value in options.items() if key != "mct"}
    return encode(picture, kind, **options)


def save(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture file whole or not at all.

    Args:
        picture: of a mode that the format can hold.
        path: its ending says the format.
        **options: see `encode`.

    Raises:
        ValueError: for an unknown ending, or for alpha in a format that has none.
    """
    kind = check_ending(path, alpha=picture.mode in ("LA", "RGBA"))
    write_atomic(path, encode(picture, kind, **options))
