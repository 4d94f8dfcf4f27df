"""File format 3: the table of parts, and what becomes of damaged ones."""

import random
import struct
import tracemalloc
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfvae.codec import CodecError
from selfvae.codec.container import varint
from selfvae.codec.format3 import (
    NO_MODEL,
    Kind,
    PictureHeader,
    PicturePart,
    read,
    read_header,
    version_of,
    write,
)

MODEL = b"a model!"
RGBA = PictureHeader(MODEL, 4, 256, 24, 32)
PARTS = [
    PicturePart(Kind.METADATA, b"metadata"),
    PicturePart(Kind.LEVEL, b"coarse", 2),
    PicturePart(Kind.LEVEL, b"", 1),
    PicturePart(Kind.ALPHA, b"plane"),
    PicturePart(Kind.LEVEL, b"fine" * 50, 0),
]


@st.composite
def files(draw: st.DrawFn) -> tuple[PictureHeader, list[PicturePart]]:
    """Any header, and parts that fit it."""
    sides = st.integers(1, 1 << 13)
    header = PictureHeader(
        draw(st.binary(min_size=8, max_size=8)), draw(st.integers(1, 4)), draw(st.integers(2, 256)),
        draw(sides), draw(sides),
    )  # fmt: skip
    content = st.binary(max_size=200)
    parts = [PicturePart(Kind.METADATA, draw(content))] if draw(st.booleans()) else []
    if draw(st.booleans()):
        return header, [*parts, PicturePart(Kind.PIXELS, draw(content))]
    parts += [PicturePart(Kind.CORRECTIONS, draw(content))] if draw(st.booleans()) else []
    coarse = draw(st.sets(st.integers(1, 200), max_size=8))
    parts += [PicturePart(Kind.LEVEL, draw(content), k) for k in sorted(coarse, reverse=True)]
    parts += [PicturePart(Kind.ALPHA, draw(content))] if header.has_alpha else []
    return header, [*parts, PicturePart(Kind.LEVEL, draw(content), 0)]


@given(files())
def test_what_is_written_is_read(file: tuple[PictureHeader, list[PicturePart]]) -> None:
    header, parts = file
    data = write(header, parts)
    found, again = read(data)
    assert replace(found, parts=(), size=0) == header and again == parts
    assert version_of(data) == found.version == 3
    assert found.ends()[-1][1] == len(data)
    ends = [end for _, end in found.ends()]
    for cut in {*ends, *(max(end - 1, found.size) for end in ends)}:
        assert read(data[:cut], partial=True)[1] == parts[: sum(end <= cut for end in ends)]


def test_names_and_messages_of_cut_and_joined_files() -> None:
    data = write(RGBA, PARTS)
    assert [name for name, _ in read_header(data).ends()] == ["metadata", "y2", "y1", "alpha", "y0"]
    with pytest.raises(CodecError, match="cut short: .* of .* bytes"):
        read(data[:-1])
    with pytest.raises(CodecError, match="3 bytes follow"):
        read(data + b"abc")
    with pytest.raises(CodecError, match="part 'alpha'"):
        read(data.replace(b"plane", b"plano"))
    assert read(data.replace(b"coarse", b"course"))  # the model checks its own parts


def test_a_webp_file_costs_at_most_64_bytes_more() -> None:
    header = PictureHeader(NO_MODEL, 4, 256, 16_383, 5_000)
    webp = bytes(1 << 22)
    assert len(write(header, [PicturePart(Kind.PIXELS, webp)])) - len(webp) <= 40


def test_every_flipped_bit_and_every_cut_of_the_header_is_an_error() -> None:
    data = write(RGBA, PARTS)
    size = read_header(data).size
    for at in range(8 * size):
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(CodecError):
            read_header(bytes(damaged))
    for cut in range(size):
        with pytest.raises(CodecError, match="empty" if cut == 0 else "ends too early"):
            read(data[:cut], partial=True)


def test_random_damage_is_an_error_or_in_a_part_of_the_model() -> None:
    data = write(RGBA, PARTS)
    rng = random.Random(0)
    for _ in range(5000):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 5)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        try:
            _, parts = read(bytes(damaged), partial=True)
        except CodecError as error:
            assert len(str(error)) > 15
            continue
        for part, original in zip(parts, PARTS, strict=False):
            assert part.kind == Kind.LEVEL or part == original


def _forged(body: bytes) -> bytes:
    """A file with that header, its checksum right."""
    start = b"SVAE\3" + MODEL + body
    return start + struct.pack("<I", zlib.crc32(start))


def _table(channels: int, *parts: bytes, height: int = 24, width: int = 32, top: int = 255) -> bytes:
    numbers = (channels, top, height, width, len(parts))
    return b"".join(varint(n) for n in numbers) + b"".join(parts)


PIXELS, LEVEL = bytes([4]) + varint(0) + bytes(4), bytes([2]) + varint(0)
ALPHA, METADATA = bytes([3]) + varint(0) + bytes(4), bytes([1]) + varint(0) + bytes(4)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (_table(0, PIXELS), "makes no sense: 0 channels"),
        (_table(5, PIXELS), "makes no sense: 5 channels"),
        (_table(3, PIXELS, top=0), "of 1 values"),
        (_table(3, PIXELS, top=256), "of 257 values"),
        (_table(3, PIXELS, height=0), "0 x 32 pixels"),
        (_table(3, PIXELS, width=2**40), "are more than"),
        (_table(3), "make no sense for 3 channels: none"),
        (_table(3, METADATA), "make no sense for 3 channels: metadata"),
        (_table(3, PIXELS, PIXELS), "pixels, pixels"),
        (_table(3, PIXELS, METADATA), "pixels, metadata"),
        (_table(3, METADATA, METADATA, PIXELS), "metadata, metadata"),
        (_table(4, PIXELS, ALPHA), "pixels, alpha"),
        (_table(3, LEVEL + b"\1"), "y1"),
        (_table(3, LEVEL + b"\0", LEVEL + b"\1"), "y0, y1"),
        (_table(3, LEVEL + b"\0", LEVEL + b"\0"), "y0, y0"),
        (_table(3, LEVEL + b"\0", PIXELS), "y0, pixels"),
        (_table(4, LEVEL + b"\1", LEVEL + b"\0"), "for 4 channels: y1, y0"),
        (_table(3, ALPHA, LEVEL + b"\0"), "for 3 channels: alpha, y0"),
        (_table(4, LEVEL + b"\0", ALPHA), "for 4 channels: y0, alpha"),
        (_table(3, *[PIXELS] * 65), "claims 65 parts"),
        (_table(3, bytes([9]) + varint(7) + bytes(4), PIXELS), "kind 9, .* update selfvae"),
        (b"".join(varint(n) for n in (3, 255, 24, 32, 2**62)), "parts"),
        (b"\xff" * 20, "63 bits"),
    ],
)
def test_forged_headers(body: bytes, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        read(_forged(body), partial=True)


def test_sizes_in_a_forged_table_allocate_nothing() -> None:
    data = _forged(_table(3, bytes([4]) + varint(2**62) + bytes(4)))
    tracemalloc.start()
    with pytest.raises(CodecError, match="cut short"):
        read(data)
    assert read(data, partial=True)[1] == []
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n", "not an .svae file"),
        (b"SVAE\4", "format 4"),
        (b"SVAE\2", "expected 3"),
    ],
)
def test_other_files(data: bytes, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        read_header(data)


def test_parts_out_of_order_are_not_written() -> None:
    with pytest.raises(CodecError, match="make no sense"):
        write(RGBA, PARTS[::-1])
    with pytest.raises(CodecError, match="fingerprint"):
        write(replace(RGBA, fingerprint=b"short"), PARTS)
