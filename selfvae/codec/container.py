"""The file: a header, then the parts in the order of the walk, the coarsest first.

Format 2 (1 coded what lies beyond the picture's borders as well):

    magic "SVAE", version (1 byte), fingerprint of the model (8 bytes)
    channels, num_values - 1, height, width, number of parts, which of them are latents (a bit
        each): varints
    for every part: bytes of notes, words of code (varints), CRC-32 of the image or latent (4 bytes)
    CRC-32 of all that follows the header (4 bytes), CRC-32 of the header (4 bytes)
    the parts: notes, then words of 4 bytes

Numbers are little-endian; a varint has 7 bits a byte, the lowest first, and the high bit set in all but the
last byte. The words are one ANS stack, its top first: a prefix of the file decodes a prefix of the parts.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

__all__ = ["CodecError", "Header", "Part", "Reader", "check_size", "read", "varint", "write"]

MAGIC, VERSION = b"SVAE", 2
PADDED = 1  # the version until which pixels beyond a picture's borders were coded
CHANGED = (
    "does not come back as it was: the file is damaged, or the model computes something else here (then "
    "please report it, with the file)"
)
_PARTS = 64  # more are in no model


class CodecError(ValueError):
    """The file cannot be decoded; the message says why."""


def varint(n: int) -> bytes:
    """A number >= 0, 7 bits a byte."""
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


class Reader:
    """Reads from the front of bytes; what is not there is an error."""

    def __init__(self, data: bytes, what: str = "the file's header") -> None:
        self.data, self.at, self.what = data, 0, what

    def take(self, n: int) -> bytes:
        """The next n bytes."""
        part = self.data[self.at : self.at + n]
        if len(part) < n:
            raise CodecError(f"the file is damaged or cut short: {self.what} ends too early")
        self.at += n
        return part

    def varint(self) -> int:
        """The next number."""
        n = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            n |= (byte & 127) << shift
            if byte < 128:
                return n
        raise CodecError("the file is damaged: a number in it has more than 63 bits")


@dataclass(frozen=True)
class Part:
    """One image or latent: its name, bytes of notes, words of code, checksum."""

    name: str
    notes: int
    words: int
    crc: int

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.notes + 4 * self.words


@dataclass(frozen=True)
class Header:
    """What a file says of itself. parts: in the order of the walk."""

    fingerprint: bytes
    channels: int
    num_values: int
    height: int
    width: int
    parts: tuple[Part, ...]
    size: int = 0  # bytes of the header
    crc: int = 0  # of all that follows it
    version: int = VERSION

    def ends(self) -> list[tuple[str, int]]:
        """Every part's name, and the bytes of the file up to its end."""
        sizes = itertools.accumulate((part.size for part in self.parts), initial=self.size)
        return [
            (part.name, end) for part, end in zip(self.parts, itertools.islice(sizes, 1, None), strict=True)
        ]

    def to_bytes(self, payload: bytes) -> bytes:
        """The header of that payload."""
        out = bytearray(MAGIC + bytes([self.version]) + self.fingerprint)
        latents = sum(1 << i for i, part in enumerate(self.parts) if part.name[0] == "z")
        for n in (self.channels, self.num_values - 1, self.height, self.width, len(self.parts), latents):
            out += varint(n)
        for part in self.parts:
            out += varint(part.notes) + varint(part.words) + struct.pack("<I", part.crc)
        out += struct.pack("<I", zlib.crc32(payload))
        return bytes(out + struct.pack("<I", zlib.crc32(out)))


def write(header: Header, notes: list[bytes], words: list[np.ndarray]) -> bytes:
    """A file from its parts; words uint32, in the order of the file."""
    payload = b"".join(n + w.astype("<u4").tobytes() for n, w in zip(notes, words, strict=True))
    return header.to_bytes(payload) + payload


def read(data: bytes, partial: bool = False) -> tuple[Header, list[tuple[bytes, np.ndarray]]]:
    """The header of a file, and notes and words of its parts.

    partial: take a file that was cut short; the parts that are whole are returned.

    Raises CodecError that says what is wrong.
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
                f"the file is cut short: {len(data)} of {header.size + whole} bytes are there; what they "
                "hold can be had as a partial picture (partial=True, or --partial)"
            )
    elif zlib.crc32(payload) != header.crc:
        raise CodecError("the file is damaged: its checksum does not fit")
    parts, at = [], 0
    for part in header.parts:
        if at + part.size > len(payload):
            break
        words = np.frombuffer(payload, "<u4", part.words, at + part.notes).astype(np.uint32)
        parts.append((payload[at : at + part.notes], words))
        at += part.size
    return header, parts


def _names(count: int, latents: int) -> list[str]:
    """z1, y1, z0, y0, ... from which of the parts are latents."""
    kinds = ["z" if latents >> i & 1 else "y" for i in range(count)]
    return [f"{kind}{kinds[i:].count('y') - 1}" for i, kind in enumerate(kinds)]


def check_size(height: int, width: int) -> None:
    """Raise CodecError for more pixels than Pillow would open without a warning."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise CodecError(
            f"{height} x {width} pixels are more than {limit}: raise PIL.Image.MAX_IMAGE_PIXELS if you "
            "trust the picture"
        )


def check_start(data: bytes, magic: bytes, version: int, kind: str) -> int:
    """The version of data; CodecError if that is above `version`, or it begins with another magic."""
    if not data:
        raise CodecError("the file is empty")
    if data[:4] != magic[: len(data)]:
        raise CodecError(f"not an {kind}: it begins with {data[:4]!r}, not with {magic!r}")
    found = data[4] if len(data) > 4 else version
    if not 1 <= found <= version:
        raise CodecError(f"the {kind} has format {found}; this version of selfvae reads 1 to {version}")
    return found


def read_header(data: bytes) -> Header:
    """The header alone; data may end anywhere after it."""
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
            f"the header makes no sense: {channels} channels of {top + 1} num_values, {height} x {width} "
            f"pixels, {count} parts"
        )
    return Header(fingerprint, channels, top + 1, height, width, parts, reader.at, crc, version)
