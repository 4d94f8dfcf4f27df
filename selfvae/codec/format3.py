"""The file format 3: a table of parts, then the parts.

    magic "SVAE", version (1 byte), fingerprint of the model (8 bytes, zeros if no part needs a model)
    channels, num_values - 1, height, width, number of parts: varints
    per part: kind (1 byte), size in bytes (varint), then
        of a LEVEL: the level that it completes (varint)
        of any other kind: CRC-32 of the part (4 bytes)
    CRC-32 of the header so far (4 bytes)
    the parts

Numbers are little-endian, varints as in `container`. The channels are grey, grey and alpha, RGB, or RGB and
alpha. Parts come in this order:

    METADATA  colour profile, EXIF, XMP, texts (`data.metadata.Metadata`); absent without
    then either
    CORRECTIONS   what makes the model's mixtures fit the picture (`codec.adaptation`); absent without
    LEVEL     one or more, coarsest first, the last one of level 0: the colours, coded with the model. They
              contain a check of what they decode to; a prefix of them decodes to a coarser image.
    ALPHA     before the last LEVEL, if there is alpha: the plane as a lossless WebP or PNG file
    or
    PIXELS    all channels as a lossless WebP file, or PNG where a side exceeds what WebP can hold
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from selfvae.codec.container import MAGIC, CodecError, Reader, check_size, check_start, varint

__all__ = [
    "NO_MODEL",
    "Kind",
    "PartEntry",
    "PictureHeader",
    "PicturePart",
    "read",
    "read_header",
    "version_of",
    "write",
]

VERSION = 3
NO_MODEL = bytes(8)  # the fingerprint in files that need none
_PARTS = 64  # no file has more


class Kind(IntEnum):
    """What a part contains; see the module."""

    METADATA = 1
    LEVEL = 2
    ALPHA = 3
    PIXELS = 4
    CORRECTIONS = 5


@dataclass(frozen=True)
class PicturePart:
    """A part's contents.

    Attributes:
        kind: What it contains.
        data: Its bytes.
        level: The level that a part of kind LEVEL completes; 0 for others.
    """

    kind: Kind
    data: bytes
    level: int = 0


@dataclass(frozen=True)
class PartEntry:
    """A part's entry in the table.

    Attributes:
        kind: What it contains.
        size: Bytes.
        level: As in `PicturePart`.
        crc: Checksum; 0 for parts of kind LEVEL, which contain their own.
    """

    kind: Kind
    size: int
    level: int = 0
    crc: int = 0

    @property
    def name(self) -> str:
        """For messages and tables: "metadata", "corrections", "y3", "alpha" or "pixels"."""
        return f"y{self.level}" if self.kind == Kind.LEVEL else self.kind.name.lower()


@dataclass(frozen=True)
class PictureHeader:
    """The header of a file.

    Attributes:
        fingerprint: Of the model, 8 bytes.
        channels: 1 to 4: grey, grey and alpha, RGB, RGB and alpha.
        num_values: Values per channel, 2 to 256.
        height: Pixels.
        width: Pixels.
        parts: The table, in the file's order; `write` fills it in.
        size: Bytes of the header, as `read_header` found them.
    """

    fingerprint: bytes
    channels: int
    num_values: int
    height: int
    width: int
    parts: tuple[PartEntry, ...] = ()
    size: int = 0

    @property
    def has_alpha(self) -> bool:
        """Whether the last channel is alpha."""
        return self.channels % 2 == 0

    @property
    def version(self) -> int:
        """The file format."""
        return VERSION

    def ends(self) -> list[tuple[str, int]]:
        """Return each part's name and the length of the file up to its end, in bytes."""
        ends = itertools.accumulate((part.size for part in self.parts), initial=self.size)
        return [(part.name, end) for part, end in zip(self.parts, list(ends)[1:], strict=True)]


def write(header: PictureHeader, parts: Sequence[PicturePart]) -> bytes:
    """Encode a file.

    Args:
        header: Its table is replaced by that of the parts.
        parts: In the file's order.

    Raises:
        CodecError: The parts are not in order, or too many, or the header makes no sense.
    """
    table = tuple(
        PartEntry(p.kind, len(p.data), p.level, 0 if p.kind == Kind.LEVEL else zlib.crc32(p.data))
        for p in parts
    )
    header = replace(header, parts=table)
    _check(header)
    out = bytearray(MAGIC + bytes([VERSION]) + header.fingerprint)
    for n in (header.channels, header.num_values - 1, header.height, header.width, len(table)):
        out += varint(n)
    for part in table:
        own = varint(part.level) if part.kind == Kind.LEVEL else struct.pack("<I", part.crc)
        out += bytes([part.kind]) + varint(part.size) + own
    out += struct.pack("<I", zlib.crc32(out))
    return bytes(out) + b"".join(part.data for part in parts)


def version_of(data: bytes) -> int:
    """Return the file format of a .svae file, 1 to 3.

    Raises:
        CodecError: It is no .svae file, or of a later format.
    """
    return check_start(data, MAGIC, VERSION, ".svae file")


def read_header(data: bytes) -> PictureHeader:
    """Read only the header; the data may end anywhere after it.

    Raises:
        CodecError: The header is damaged or truncated, the file is of another format, or it has parts of
            kinds that this version does not know.
    """
    version = version_of(data)
    reader = Reader(data)
    reader.take(5)
    if version != VERSION:
        raise CodecError(f"the file has format {version}; expected {VERSION}")
    fingerprint = reader.take(8)
    channels, top, height, width, count = (reader.varint() for _ in range(5))
    if count > _PARTS:
        raise CodecError(f"the file is damaged: it claims {count} parts")
    table = [_entry(reader) for _ in range(count)]
    checked = data[: reader.at]
    if zlib.crc32(checked) != _uint32(reader):
        raise CodecError("the file is damaged: its header's checksum does not fit")
    known = set(Kind)
    if unknown := [kind for kind, *_ in table if kind not in known]:
        raise CodecError(
            f"the file has a part of kind {unknown[0]}, which this version of selfvae does not know: "
            "update selfvae"
        )
    parts = tuple(PartEntry(Kind(kind), *rest) for kind, *rest in table)
    header = PictureHeader(fingerprint, channels, top + 1, height, width, parts, reader.at)
    _check(header)
    return header


def read(data: bytes, partial: bool = False) -> tuple[PictureHeader, list[PicturePart]]:
    """Read a file.

    Args:
        data: The file.
        partial: Accept a truncated file, and return the parts that are complete.

    Raises:
        CodecError: The file is damaged or truncated. Damage in parts of kind LEVEL is left to the model.
    """
    header = read_header(data)
    whole = header.size + sum(part.size for part in header.parts)
    if len(data) > whole:
        raise CodecError(
            f"{len(data) - whole} bytes follow the end of the picture: the file is damaged, or several "
            "were joined"
        )
    if len(data) < whole and not partial:
        raise CodecError(
            f"the file is cut short: {len(data)} of {whole} bytes are there; decode them as a partial "
            "picture (partial=True)"
        )
    parts, at = [], header.size
    for entry in header.parts:
        part = data[at : at + entry.size]
        at += entry.size
        if at > len(data):
            break
        if entry.kind != Kind.LEVEL and zlib.crc32(part) != entry.crc:
            raise CodecError(f"the file is damaged: the checksum of its part {entry.name!r} does not fit")
        parts.append(PicturePart(entry.kind, part, entry.level))
    return header, parts


def _uint32(reader: Reader) -> int:
    return int.from_bytes(reader.take(4), "little")


def _entry(reader: Reader) -> tuple[int, int, int, int]:
    """Read kind, size, level and checksum of a part. Kinds to come have a checksum."""
    kind, size = reader.take(1)[0], reader.varint()
    if kind == Kind.LEVEL:
        return kind, size, reader.varint(), 0
    return kind, size, 0, _uint32(reader)


def _check(header: PictureHeader) -> None:
    """Check that a header describes a picture.

    Raises:
        CodecError: It does not.
    """
    h = header
    if not (h.height > 0 < h.width and 1 <= h.channels <= 4 and 2 <= h.num_values <= 256):
        raise CodecError(
            f"the header makes no sense: {h.channels} channels of {h.num_values} values, {h.height} x "
            f"{h.width} pixels"
        )
    if len(h.fingerprint) != len(NO_MODEL) or len(h.parts) > _PARTS:
        raise CodecError(f"{len(h.fingerprint)} bytes of fingerprint, {len(h.parts)} parts: too many")
    check_size(h.height, h.width)
    kinds = [part.kind for part in h.parts]
    levels = [part.level for part in h.parts if part.kind == Kind.LEVEL]
    pixels = [kind for kind in kinds if kind != Kind.METADATA]
    coded = [Kind.LEVEL] * len(levels)
    if h.has_alpha:
        coded[-1:-1] = [Kind.ALPHA]
    if levels and Kind.CORRECTIONS in kinds:
        coded.insert(0, Kind.CORRECTIONS)
    descending = all(a > b for a, b in itertools.pairwise(levels))
    if Kind.METADATA in kinds[1:] or (
        pixels != [Kind.PIXELS] and (pixels != coded or levels[-1:] != [0] or not descending)
    ):
        held = ", ".join(part.name for part in h.parts) or "none"
        raise CodecError(f"the parts of the file make no sense for {h.channels} channels: {held}")
