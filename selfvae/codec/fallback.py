"""Pixels as ordinary lossless files, where these are smaller than what a model needs, or there is no model.

Pillow's WebP encoder runs in the calling thread only, and its output depends on the version of libwebp
alone. Whatever it writes, every later version reads.

The smallest files take long: libwebp then tries all its transforms. On a busy machine that took 20 to 50 s
of CPU time per megapixel of a photograph; quick settings took 0.6 s for files 0 to 3% larger (8% for
scanned text), and the quickest 0.15 s for files 3 to 7% larger. Of some drawings quick files are the
smaller ones, of a gradient by 5%, so both are tried.
`python -m benchmarks.pictures` measures it.
"""

from __future__ import annotations

import io
import struct
import zlib

import torch
from PIL import Image
from torch import Tensor

from selfvae.codec.container import CodecError
from selfvae.data.pictures import encode, encode_lossless, from_image, to_image

__all__ = [
    "WEBP_SIDE", "decode_pixels", "encode_alpha", "encode_pixels", "estimated_webp_size", "webp_size",
]  # fmt: skip

WEBP_SIDE = 16383  # pixels; no side of a WebP file is longer
_ROWS = 32  # in a strip by which sizes are estimated
_STRIP = 2**23  # pixels; WebP refers back by 2^20 at most
_EFFORTS = {"quality": 25, "method": 1}, {"quality": 75, "method": 5}
_FORMATS = ("WEBP", "PNG")
# what Pillow raises over broken files
_BROKEN = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip


def encode_pixels(x: Tensor, effort: int = 2) -> bytes:
    """Encode all channels as one lossless WebP file, or as PNG if a side is longer than WebP allows.

    WebP has no grey: it is stored as RGB, which costs next to nothing. Colours where alpha is 0 are kept.

    Args:
        x: uint8 (1, C, H, W), C = 1 to 4.
        effort: 2 for the smallest file that is known how to make; 1 or 0 for one setting each, which takes
            a fifteenth or a hundredth of the time.
    """
    picture = to_image(x[0])
    if max(x.shape[2:]) > WEBP_SIDE:
        return encode_lossless(picture, "PNG")
    data = encode(picture, "WEBP", **_EFFORTS[min(effort, 1)])
    return data if effort < 2 else min(encode_lossless(picture, "WebP"), data, key=len)


def webp_size(x: Tensor, effort: int) -> int:
    """Return the bytes that `encode_pixels` needs for x: exactly, or of a large picture strip by strip.

    A strip has many times more pixels than WebP looks back, and memory stays bounded.
    """
    rows = max(1, _STRIP // x.shape[3])
    return sum(len(encode_pixels(strip, effort)) for strip in x.split(rows, 2))


def estimated_webp_size(x: Tensor) -> int:
    """Estimate `webp_size` of effort 0 from every fourth one of the strips of 32 rows, or return 0.

    Where rows are equal, as in patterns, WebP can copy from rows that the estimate would not see.
    """
    height = x.shape[2]
    rows = x[0].permute(1, 0, 2).reshape(height, -1).contiguous().numpy()
    if height <= 4 * _ROWS or len({zlib.crc32(row) for row in rows}) < height:
        return 0
    some = torch.cat(x.split(_ROWS, 2)[::4], 2)
    return webp_size(some, effort=0) * height // some.shape[2]


def encode_alpha(alpha: Tensor) -> bytes:
    """Encode an alpha plane, uint8 (1, 1, H, W), as a lossless WebP or PNG file, whichever is smaller."""
    files = [encode_lossless(to_image(alpha[0]), "PNG")]
    if max(alpha.shape[2:]) <= WEBP_SIDE:
        files.append(encode_lossless(to_image(alpha[0]), "WebP"))
    return min(files, key=len)


def decode_pixels(data: bytes, channels: int, height: int, width: int) -> Tensor:
    """Decode what `encode_pixels` or `encode_alpha` returned.

    Args:
        data: The WebP or PNG file.
        channels: 1 to 4.
        height: Pixels; checked before any are decoded.
        width: Pixels; the same.

    Returns:
        uint8 (1, channels, height, width).

    Raises:
        CodecError: The file is damaged, or its picture is not of that size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
            if file.size != (width, height) or getattr(file, "n_frames", 1) != 1:
                raise CodecError(
                    f"the picture within the file has {file.size[1]} x {file.size[0]} pixels; the header "
                    f"says {height} x {width}"
                )
            x = from_image(file.convert("RGBA" if file.mode in ("RGBA", "LA") else "RGB"))
    except CodecError:
        raise
    except _BROKEN as error:
        raise CodecError(f"the picture within the file is damaged: {error}") from None
    alpha = x[:, 3:] if x.shape[1] == 4 else torch.full_like(x[:, :1], 255)  # opaque alpha is left out
    colours = x[:, :3]
    if channels < 3:
        if not torch.equal(colours, colours[:, :1].expand_as(colours)):
            raise CodecError("the picture within the file is not grey, as the header says: it is damaged")
        colours = colours[:, :1]
    elif channels not in (3, 4):
        raise CodecError(f"a picture has 1 to 4 channels; got {channels}")
    return torch.cat([colours, alpha], 1) if channels % 2 == 0 else colours.contiguous()
