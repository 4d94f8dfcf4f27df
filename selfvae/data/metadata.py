"""What a picture file says beside its pixels: colour profile, EXIF, XMP, texts."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

__all__ = ["Metadata"]

_LIMIT = 1 << 26  # bytes, unpacked: a few bytes of deflate could otherwise claim gigabytes
_PREFIX = b"Exif\0\0"  # of EXIF data in a JPEG file
_XMP_KEY = "XML:com.adobe.xmp"  # of the text that holds XMP in a PNG file
_RAW_EXIF = "Raw profile type exif"  # ImageMagick's way to put EXIF data into a PNG file
_COMMENT = "Comment"
_ORIENTATION = re.compile(rb'(tiff:Orientation(?:="|>))[0-9]')
_SHORT = 3  # the type of a 16-bit number in EXIF data
_JPEG_SEGMENT = 65533  # bytes that a segment of a JPEG file can hold
# tags of a TIFF file that describe it without saying where its pixels lie: names, dates, resolution,
# rating, copyright, and the folders of EXIF and GPS data
_DESCRIPTIVE = frozenset(
    {269, 270, 271, 272, 282, 283, 285, 296, 305, 306, 315, 316, 18246, 18249, 33432, 34665, 34853}
    | set(range(40091, 40096))
)


@dataclass(frozen=True)
class Metadata:
    """What a picture file says beside its pixels.

    Attributes:
        icc: Colour profile; empty without.
        exif: EXIF data from the TIFF header on ("II" or "MM"); empty without.
        xmp: XMP packet; empty without.
        text: Keys and values of the texts in a PNG file; the comment of a JPEG file has the key "Comment".
    """

    icc: bytes = b""
    exif: bytes = b""
    xmp: bytes = b""
    text: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.icc or self.exif or self.xmp or self.text)

    @staticmethod
    def of_tiff(file: Image.Image) -> bytes:
        """Read the EXIF data of a TIFF file before its pixels are loaded; empty for other files.

        These are its tags without those that say where its pixels lie.
        """
        if file.format != "TIFF":
            return b""
        try:
            exif = _descriptive(file.getexif())
            return exif.tobytes() if len(exif) else b""
        except Exception:  # Pillow's answers to odd tags are of many kinds; the pixels are what matters
            return b""

    @staticmethod
    def of(file: Image.Image, tags: bytes = b"") -> Metadata:
        """Read the metadata of an opened picture file whose pixels have been loaded.

        The orientation is reset to 1: read pixels are upright already (`pictures.open_picture`). All other
        bytes of EXIF data stay as they are, so that what cameras hide there still finds its place.
        Resolution, gamma and other chunks of a PNG file are not read.

        Args:
            file: The file.
            tags: EXIF data to take where `file` has none.
        """
        info = cast(Mapping[str, Any], file.info)
        text = {str(k): str(v) for k, v in getattr(file, "text", {}).items()}
        text.pop(_XMP_KEY, None)
        exif = _bytes(info.get("exif"))
        if _RAW_EXIF in text and not exif:
            try:  # after an empty line, a name and a length, in hexadecimal digits
                exif = bytes.fromhex("".join(text[_RAW_EXIF].split("\n")[3:]))
            except ValueError:
                exif = b""
            if exif:
                del text[_RAW_EXIF]
        exif = exif or tags
        if comment := _bytes(info.get("comment")):
            text[_COMMENT] = _comment(comment.rstrip(b"\0"))
        texts = tuple((k, v) for k, v in text.items() if _valid(k))
        xmp = _ORIENTATION.sub(rb"\g<1>1", _bytes(info.get("xmp")))
        return Metadata(_bytes(info.get("icc_profile")), _upright(exif.removeprefix(_PREFIX)), xmp, texts)

    def to_bytes(self) -> bytes:
        """Encode: one byte, 0 for plain or 1 for deflated, then the parts, each after its length.

        Lengths are 4 bytes, little-endian. Profile, EXIF and XMP come first, then keys and values in turn.

        Raises:
            ValueError: There are more than 64 MiB.
        """
        flat = [self.icc, self.exif, self.xmp, *(s.encode() for pair in self.text for s in pair)]
        plain = b"".join(struct.pack("<I", len(part)) + part for part in flat)
        if len(plain) > _LIMIT:
            raise ValueError(f"{len(plain):,} bytes of metadata are more than {_LIMIT:,}: strip them")
        packed = zlib.compress(plain, 9)
        return b"\1" + packed if len(packed) < len(plain) else b"\0" + plain

    @staticmethod
    def from_bytes(data: bytes) -> Metadata:
        """Decode what `to_bytes` returned.

        Raises:
            ValueError: These are no metadata.
        """
        if data[:1] not in (b"\0", b"\1"):
            raise ValueError("the metadata are damaged: they are neither plain nor deflated")
        flat, plain, at = [], data[1:], 0
        if data[0]:
            unpacker = zlib.decompressobj()
            try:
                plain = unpacker.decompress(plain, _LIMIT + 1)
            except zlib.error as error:
                raise ValueError(f"the metadata are damaged: {error}") from None
            if not unpacker.eof or unpacker.unused_data or len(plain) > _LIMIT:
                raise ValueError("the metadata are damaged: they do not end where they should")
        while at < len(plain):
            size = int.from_bytes(plain[at : at + 4], "little")
            if at + 4 + size > len(plain):
                raise ValueError("the metadata are damaged: they end too early")
            flat.append(plain[at + 4 : at + 4 + size])
            at += 4 + size
        if len(flat) < 3 or not len(flat) % 2:
            raise ValueError(f"the metadata are damaged: they have {len(flat)} parts")
        try:
            texts = [part.decode() for part in flat[3:]]
        except UnicodeDecodeError:
            raise ValueError("the metadata are damaged: a text is not UTF-8") from None
        pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
        if wrong := [key for key, _ in pairs if not _valid(key)]:
            raise ValueError(f"the metadata are damaged: {wrong[0]!r} is no key of a text")
        return Metadata(flat[0], flat[1], flat[2], pairs)

    def options(self, kind: str) -> dict[str, Any]:
        """Return the options of Pillow's `save` that write the metadata to a file of that kind.

        What the kind cannot hold is left out, see `lost`.

        Args:
            kind: The format, as Pillow calls it.
        """
        found: dict[str, Any] = {}
        lost = self.lost(kind)
        if self.icc and "colour profile" not in lost:
            found["icc_profile"] = self.icc
        if kind == "TIFF":  # there EXIF and XMP are tags beside those that describe the pixels
            exif = self._tags()
            if self.xmp:
                exif[ExifTags.Base.XMLPacket] = self.xmp
            return found | ({"exif": exif.tobytes()} if len(exif) else {})
        if self.exif and "EXIF" not in lost:
            found["exif"] = _PREFIX + self.exif
        if kind == "PNG":
            found["pnginfo"] = self._png()
        elif self.xmp and "XMP" not in lost:
            found["xmp"] = self.xmp
        if kind == "JPEG" and "texts" not in lost and self.text:
            found["comment"] = self.text[0][1].encode()
        return found

    def names(self) -> list[str]:
        """Return the names of what there is, e.g. "colour profile", "EXIF"."""
        values = {"colour profile": self.icc, "EXIF": self.exif, "XMP": self.xmp, "texts": self.text}
        return [name for name, value in values.items() if value]

    def lost(self, kind: str) -> list[str]:
        """Return the names of what a file of that kind, as Pillow calls it, cannot hold."""
        written = kind in ("PNG", "WEBP", "TIFF", "JPEG", "AVIF")
        fits = [len(part) + len(_PREFIX) <= _JPEG_SEGMENT - 29 for part in (self.exif, self.xmp)]
        held = {
            "colour profile": written,
            "EXIF": written and (kind != "JPEG" or fits[0]),
            "XMP": written and (kind != "JPEG" or fits[1]),
            "texts": kind == "PNG" or (kind == "JPEG" and self._is_comment()),
        }
        return [name for name in self.names() if not held[name]]

    def _is_comment(self) -> bool:
        """Whether the texts are one comment that a JPEG file can hold."""
        comments = [value.encode() for key, value in self.text if key == _COMMENT]
        return len(comments) == len(self.text) == 1 and len(comments[0]) <= _JPEG_SEGMENT

    def _tags(self) -> Image.Exif:
        """The EXIF data as tags of a TIFF file; none if they are broken."""
        exif = Image.Exif()
        try:
            exif.load(_PREFIX + self.exif if self.exif else b"")
            exif = _descriptive(exif)
            exif.tobytes()
        except Exception:  # as in `of_tiff`
            return Image.Exif()
        return exif

    def _png(self) -> PngInfo:
        info = PngInfo()
        for key, value in self.text:  # Pillow takes UTF-8 where Latin-1 does not do
            info.add_text(key, value, zip=len(value) > 1000)
        if self.xmp:
            info.add(b"iTXt", _XMP_KEY.encode() + bytes(5) + self.xmp)
        return info


def _bytes(value: object) -> bytes:
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    return value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else b""


def _comment(value: bytes) -> str:
    """The comment of a JPEG file, which does not tell its encoding."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _valid(key: str) -> bool:
    """Whether a PNG file may have a text of that key: 1 to 79 characters of Latin-1."""
    return 1 <= len(key) <= 79 and all(0 < ord(c) < 256 for c in key)


def _upright(exif: bytes) -> bytes:
    """Set the orientation in EXIF data to 1, in place."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 10:
        return exif
    start = struct.unpack_from(order + "I", exif, 4)[0]
    if start + 2 > len(exif):
        return exif
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from(order + "H", exif, start)[0], 12):
        if at + 12 > len(exif):
            break
        tag, kind, count = struct.unpack_from(order + "HHI", exif, at)
        if tag == ExifTags.Base.Orientation and kind == _SHORT and count:
            exif = exif[: at + 8] + struct.pack(order + "H", 1) + exif[at + 10 :]
    return exif


def _descriptive(exif: Image.Exif) -> Image.Exif:
    """Return the tags that say nothing about where pixels lie."""
    found = Image.Exif()
    for tag, value in exif.items():
        if tag in _DESCRIPTIVE:
            folder = tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
            found[tag] = exif.get_ifd(tag) if folder else value
    return found
