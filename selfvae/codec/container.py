"""The file format: a header, then one part per image or latent, coarsest first.

Format 2 (format 1 also coded the padding beyond the picture's borders):

    magic "SVAE", version (1 byte), fingerprint of the model (8 bytes)
    channels, num_values - 1, height, width, number of parts, bit mask of the parts that are latents:
        varints
    per part: bytes of side information, words of code (varints), CRC-32 of the image or latent (4 bytes)
    CRC-32 of everything after the header (4 bytes), CRC-32 of the header (4 bytes)
    the parts: side information, then words of 4 bytes

Numbers are little-endian. A varint has 7 bits per byte, lowest first; the high bit is set in all bytes but
the last. The words are one ANS stack, its top first: a prefix of the file contains a prefix of the parts.
"""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from selfvae.codec.tables import Words

__all__ = ["CodecError", "Header", "Part", "Reader", "check_size", "read", "varint", "write"]

MAGIC, VERSION = b"SVAE", 2
PADDED = 1  # the last version that coded pixels beyond a picture's borders
CHANGED = (
    "does not come back as it was: the file is damaged, or the model computes different values on this "
    "machine (in that case please report it, with the file)"
)
TOGETHER = 1 << 18  # pixels of an archive that are computed at once; part of the format
_PARTS = 64  # no model has more
_LATENT_PIXELS = "SELFVAE_LATENT_PIXELS"  # an environment variable


class CodecError(ValueError):
    """A file cannot be written or decoded; the message says why."""


def varint(n: int) -> bytes:
    """Encode a number >= 0, 7 bits per byte.

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


class Reader:
    """Reads bytes from the front.

    Args:
        data: The bytes.
        what: Their name in error messages.
    """

    def __init__(self, data: bytes, what: str = "the file's header") -> None:
        self.data, self.at, self.what = data, 0, what

    def take(self, n: int) -> bytes:
        """Read the next n bytes.

        Raises:
            CodecError: Fewer are left.
        """
        part = self.data[self.at : self.at + n]
        if len(part) < n:
            raise CodecError(f"the file is damaged or cut short: {self.what} ends too early")
        self.at += n
        return part

    def varint(self) -> int:
        """Read the next number.

        Raises:
            CodecError: The data end too early, or the number has more than 63 bits.
        """
        n = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            n |= (byte & 127) << shift
            if byte < 128:
                return n
        raise CodecError("the file is damaged: a number in it has more than 63 bits")


@dataclass(frozen=True)
class Part:
    """One image or latent: its name, bytes of side information, words of code, and checksum."""

    name: str
    side: int
    words: int
    crc: int

    @property
    def size(self) -> int:
        """Length in the file, bytes."""
        return self.side + 4 * self.words


@dataclass(frozen=True)
class Header:
    """The header of a file; its parts are in coding order."""

    fingerprint: bytes
    channels: int
    num_values: int
    height: int
    width: int
    parts: tuple[Part, ...]
    size: int = 0  # of the header, bytes
    crc: int = 0  # of everything after it
    version: int = VERSION

    def ends(self) -> list[tuple[str, int]]:
        """Return each part's name and the length of the file up to its end, in bytes."""
        sizes = itertools.accumulate((part.size for part in self.parts), initial=self.size)
        return [
            (part.name, end) for part, end in zip(self.parts, itertools.islice(sizes, 1, None), strict=True)
        ]

    def to_bytes(self, payload: bytes) -> bytes:
        """Encode the header of a file with that payload."""
        out = bytearray(MAGIC + bytes([self.version]) + self.fingerprint)
        latents = sum(1 << i for i, part in enumerate(self.parts) if part.name[0] == "z")
        for n in (self.channels, self.num_values - 1, self.height, self.width, len(self.parts), latents):
            out += varint(n)
        for part in self.parts:
            out += varint(part.side) + varint(part.words) + struct.pack("<I", part.crc)
        out += struct.pack("<I", zlib.crc32(payload))
        return bytes(out + struct.pack("<I", zlib.crc32(out)))


def write(header: Header, side: list[bytes], words: list[Words]) -> bytes:
    """Encode a file from the side information and the words of its parts, in the file's order."""
    payload = b"".join(n + w.astype("<u4").tobytes() for n, w in zip(side, words, strict=True))
    return header.to_bytes(payload) + payload


def read(data: bytes, partial: bool = False) -> tuple[Header, list[tuple[bytes, Words]]]:
    """Read a file.

    Args:
        data: The file.
        partial: Accept a truncated file, and return the parts that are complete.

    Returns:
        The header, and side information and words of each part.

    Raises:
        CodecError: The file is damaged or truncated.
    """
    header = read_header(data)
    payload = data[header.size :]
    whole = sum(part.size for part in header.parts)
    if len(payload) > whole:
        raise CodecError(
            f"{len(payload) - whole} bytes follow the end of the picture: the file is damaged, or several "
            "were joined"
        )
    if len(payload) < whole:
        if not partial:
            raise CodecError(
                f"the file is cut short: {len(data)} of {header.size + whole} bytes are there; decode them "
                "as a partial picture (partial=True)"
            )
    elif zlib.crc32(payload) != header.crc:
        raise CodecError("the file is damaged: its checksum does not fit")
    parts, at = [], 0
    for part in header.parts:
        if at + part.size > len(payload):
            break
        words = np.frombuffer(payload, "<u4", part.words, at + part.side).astype(np.uint32)
        parts.append((payload[at : at + part.side], words))
        at += part.size
    return header, parts


def _names(count: int, latents: int) -> list[str]:
    """Return the names of the parts, e.g. z1, y1, z0, y0, from the bit mask of the latents."""
    kinds = ["z" if latents >> i & 1 else "y" for i in range(count)]
    return [f"{kind}{kinds[i:].count('y') - 1}" for i, kind in enumerate(kinds)]


def check_size(height: int, width: int, latents: bool = False) -> None:
    """Check a picture's size against the limit of Pillow, which reads no larger picture files.

    Args:
        height: In pixels, with the padding.
        width: The same.
        latents: Whether the file holds latents. These are computed from the whole picture at once, in up to
            4 kB of memory per pixel with narrow networks, so they have a lower limit: 2^18 pixels, as many
            as an archive codes at once, or what the environment variable SELFVAE_LATENT_PIXELS says.

    Raises:
        CodecError: The picture has more than 2 `PIL.Image.MAX_IMAGE_PIXELS` pixels, 179 million, or more
            than a model with latents may code.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:
        raise CodecError(
            f"{height} x {width} pixels are more than {2 * limit}: cut the picture up; or, if you trust "
            "it, set PIL.Image.MAX_IMAGE_PIXELS in Python to half its pixels or more"
        )
    if latents and height * width > _latent_pixels():
        raise CodecError(
            f"a model with latents codes at most {_latent_pixels()} pixels, since it needs the memory for "
            f"all of them at once; got {height} x {width}: cut the picture up; or, if you trust it and "
            f"have the memory, set the environment variable {_LATENT_PIXELS} to {height * width} or more"
        )


def _latent_pixels() -> int:
    found = os.environ.get(_LATENT_PIXELS) or str(TOGETHER)
    if not found.isdecimal():
        raise CodecError(f"{_LATENT_PIXELS} must be a number of pixels, e.g. {TOGETHER}; got {found!r}")
    return int(found)


def check_start(data: bytes, magic: bytes, version: int, kind: str) -> int:
    """Check magic and version of data.

    Returns:
        The version.

    Raises:
        CodecError: The magic is another one, or the version is above `version`.
    """
    if not data:
        raise CodecError("the file is empty")
    if data[:4] != magic[: len(data)]:
        raise CodecError(f"not an {kind}: it begins with {data[:4]!r}, not with {magic!r}")
    found = data[4] if len(data) > 4 else version
    if not 1 <= found <= version:
        raise CodecError(f"the {kind} has format {found}; this version of selfvae reads 1 to {version}")
    return found


def read_header(data: bytes) -> Header:
    """Read only the header; the data may end anywhere after it.

    Raises:
        CodecError: The header is damaged or truncated, or the file is of another kind.
    """
    version = check_start(data, MAGIC, VERSION, ".svae file")
    reader = Reader(data)
    reader.take(5)
    fingerprint = reader.take(8)
    channels, top, height, width, count, latents = (reader.varint() for _ in range(6))
    if count > _PARTS:
        raise CodecError(f"the file is damaged: it claims {count} parts")
    parts = tuple(
        Part(name, reader.varint(), reader.varint(), struct.unpack("<I", reader.take(4))[0])
        for name in _names(count, latents)
    )
    crc = struct.unpack("<I", reader.take(4))[0]
    checked = data[: reader.at]
    if zlib.crc32(checked) != struct.unpack("<I", reader.take(4))[0]:
        raise CodecError("the file is damaged: its header's checksum does not fit")
    if not (height and width and 1 <= channels <= 4 and 1 <= top <= 255 and parts):
        raise CodecError(
            f"the header makes no sense: {channels} channels of {top + 1} values, {height} x {width} "
            f"pixels, {count} parts"
        )
    return Header(fingerprint, channels, top + 1, height, width, parts, reader.at, crc, version)
