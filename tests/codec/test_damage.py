"""Damaged and forged files give an error or a picture, and nothing else."""

import bisect
import itertools
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_models import (
    cached_codec,
    coded_always,
    fixed,
    gaussian,
    integer_codec,
    mixed_album,
    photo_like,
    shaped,
)
from torch import Tensor

from selfvae.codec import (
    Archive,
    Codec,
    CodecError,
    chains,
    format3,
    pack,
    read_header,
)
from selfvae.codec.container import Header, Part
from selfvae.codec.symbols import SlotDecoder
from selfvae.data.metadata import Metadata


def _mutations(data: bytes) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    for _ in range(1200):  # flipped bits, one to three
        changed = bytearray(data)
        for at in rng.integers(0, 8 * len(data), rng.integers(1, 4)):
            changed[at // 8] ^= 1 << at % 8
        yield "flip", bytes(changed)
    for i in range(400):
        yield "cut" if i % 10 else "partial", data[: rng.integers(0, len(data))]
    for _ in range(200):  # a byte lost, doubled, replaced in the header
        at = int(rng.integers(0, 80))
        yield "lost", data[:at] + data[at + 1 :]
        yield "doubled", data[:at] + data[at : at + 1] + data[at:]
        yield "replaced", data[:at] + bytes([rng.integers(256)]) + data[at + 1 :]


@pytest.mark.parametrize("which", ["halve", pytest.param("gaussian", marks=pytest.mark.slow)])
def test_2000_damaged_files(which: str, picture: Tensor) -> None:
    codec = cached_codec(which)
    data = codec.compress(picture)
    count = refused = shown = 0
    for kind, damaged in _mutations(data):
        if damaged == data:
            continue
        count += 1
        with pytest.raises(CodecError):
            codec.decompress(damaged)
        if kind == "cut":  # most of them would be decoded, which takes long
            continue
        try:
            x = codec.decompress(damaged, partial=True)
        except CodecError:
            refused += 1
        else:
            shown += 1
            assert kind == "partial" and x.shape == picture.shape, kind
    assert count >= 2000 and shown >= 20 and refused >= 1600


@pytest.mark.parametrize(
    ("name", "prior"),
    [
        ("selfvae", "normal"),
        *(
            pytest.param(*names, marks=pytest.mark.slow)
            for names in (("vae", "flow"), ("selfvae", "flow"), ("selfvae-mean-3lvl", "mog-local"))
        ),
    ],
)
def test_forged_latents(name: str, prior: str, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forged code whose checksums all fit is some picture; if only the file's checksum fits, an error."""
    codec = Codec(gaussian(name, prior))
    data = codec.compress(picture[:, :, :8, :8])
    header, rng = read_header(data), np.random.default_rng(0)
    parts = tuple(Part(part.name, part.side, part.words, 0) for part in header.parts)
    shown = refused = 0
    for i in range(30):
        payload = bytearray(data[header.size :])
        if i % 3 == 0:
            payload = bytearray(rng.bytes(len(payload)))
        elif i % 3 == 1:
            at = int(rng.integers(len(payload)))
            payload[at : at + 16] = b"\xff" * len(payload[at : at + 16])
        else:
            payload[int(rng.integers(len(payload)))] ^= 1 << int(rng.integers(8))
        if i % 3 == 0:
            with pytest.raises(CodecError, match="does not come back as it was"):
                codec.decompress(header.to_bytes(bytes(payload)) + bytes(payload))
        forged = Header(**{**header.__dict__, "parts": parts}).to_bytes(bytes(payload)) + bytes(payload)
        with monkeypatch.context() as patch:
            patch.setattr("selfvae.codec.float64.pictures._sum", lambda value: 0)
            try:
                assert codec.decompress(forged).shape == (1, 3, 8, 8)
                shown += 1
            except CodecError:
                refused += 1
    assert shown + refused == 30 and shown > 20


def test_damaged_archives(codec: Codec, picture: Tensor) -> None:
    data, album = pack(codec, mixed_album(picture), block=4, verify=False), mixed_album(picture)
    rng, hit = np.random.default_rng(0), set()
    sizes = [block.size for block in Archive(codec, data).blocks]
    starts = list(itertools.accumulate(sizes[:-1], initial=len(data) - sum(sizes)))
    for _ in range(300):
        changed = bytearray(data)
        at = int(rng.integers(len(data)))
        changed[at] ^= 1 << int(rng.integers(8))
        number = bisect.bisect_right(starts, at) - 1
        with pytest.raises(CodecError):  # before anything of the damaged block is decoded
            next(Archive(codec, bytes(changed)).block(max(number, 0)))
        hit.add(number)
        with pytest.raises(CodecError):
            Archive(codec, data[:at])
    assert hit == {-1, 0, 1, 2}  # the index and each block
    # the other blocks remain readable
    changed = bytearray(data)
    changed[-1] ^= 1
    assert torch.equal(Archive(codec, bytes(changed))[0], album[0][1])
    for wrong in (b"", b"SVAE" + data[4:], data[:4] + b"\x03" + data[5:], data + b"x"):
        with pytest.raises(CodecError):
            Archive(codec, wrong)
    with pytest.raises(CodecError, match="another model"):
        Archive(Codec(fixed(components=2)), data)


# --- format 3: integer models -------------------------------------------------------------------------


def _album_3() -> list[tuple[str, Tensor]]:
    return [(f"{i}.png", photo_like(12, 10 + i // 4, seed=i)) for i in range(8)]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["greyscale", "quincunx"])
def test_2000_damaged_files_of_format_3(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, whatever was changed; of a truncated file the picture's size."""
    monkeypatch.setattr(chains, "_JOINED", 32)
    monkeypatch.setattr(chains, "_BAND", 64)
    codec, x = integer_codec(which), photo_like(20, 26)
    x = torch.cat([x, x[:, :1].flip(3)], 1)
    data = coded_always(codec, x, Metadata(b"profile"))
    count = shown = 0
    for kind, damaged in _mutations(data):
        if damaged == data:
            continue
        count += 1
        with pytest.raises(CodecError):
            codec.decompress(damaged)
        if kind != "partial":
            continue
        try:
            assert codec.decompress(damaged, partial=True).shape[2:] == x.shape[2:]
            shown += 1
        except CodecError:
            pass
    assert count >= 1990 and shown >= 10


def _forged(data: bytes, codec: Codec, rng: np.random.Generator) -> Iterator[bytes]:
    """Files with valid headers, whose levels are anything."""
    header, parts = format3.read(data)
    for i in range(48):
        changed = []
        for part in parts:
            own = bytearray(part.data)
            if part.kind == format3.Kind.LEVEL and (own or i % 5 == 0):
                if i % 4 == 0:
                    own = bytearray(rng.bytes(int(rng.integers(0, 200))))
                elif i % 4 == 1:
                    own = own[: rng.integers(len(own) + 1)]
                elif i % 4 == 2:
                    own[rng.integers(len(own))] ^= 1 << int(rng.integers(8))
                else:  # a plausible state, and any words after it
                    own = bytearray(rng.bytes(7) + bytes([1]) + rng.bytes(4 * int(rng.integers(300))))
            changed.append(format3.PicturePart(part.kind, bytes(own), part.level))
        yield format3.write(header, changed)


@pytest.mark.parametrize("which", ["quincunx", "halve", "means", "greyscale", "bits", "few-values"])
def test_forged_files_of_format_3(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "_JOINED", 32)
    monkeypatch.setattr(chains, "_BAND", 64)
    codec, rng = integer_codec(which), np.random.default_rng(0)
    data = coded_always(codec, shaped(codec, 12, 14))
    for forged in _forged(data, codec, rng):
        with pytest.raises(CodecError):
            codec.decompress(forged)
    # with checksums that fit, whatever was decoded is some picture
    monkeypatch.setattr(SlotDecoder, "finish", lambda self, checksum: None)
    shown = 0
    for forged in _forged(data, codec, rng):
        try:
            x = codec.decompress(forged)
        except CodecError:
            continue
        assert x.shape == (1, codec.model.spec.channels, 12, 14)
        assert int(x.max()) <= codec.model.spec.max_value
        shown += 1
    assert shown >= 1


def test_levels_that_a_model_does_not_have() -> None:
    codec = integer_codec("halve")
    data = coded_always(codec, photo_like(80, 90))
    header, parts = format3.read(data)
    assert len(parts) > 1
    for level in (7, 50, 1 << 40):
        first = format3.PicturePart(format3.Kind.LEVEL, parts[0].data, level)
        with pytest.raises(CodecError, match="does not fit the model|damaged"):
            codec.decompress(format3.write(header, [first, *parts[1:]]))
    with pytest.raises(CodecError):
        codec.decompress(format3.write(header, [parts[-1]]))


_MEMORY = """
import resource, sys, zlib
sys.path.insert(0, "tests/codec")
from codec_models import coded_always, integer_codec, photo_like
from selfvae.codec import CodecError, format3
from dataclasses import replace
codec = integer_codec("halve")
data = coded_always(codec, photo_like(16, 16))
header, parts = format3.read(data)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for height, width in ((20_000, 20_000), (1, 1 << 28), (1 << 28, 1), (4_000, 3_000)):
    try:
        codec.decompress(format3.write(replace(header, height=height, width=width), parts))
    except CodecError as error:
        print(error, file=sys.stderr)
    else:
        raise SystemExit("decoded")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_forged_size_takes_little_memory() -> None:
    """A few bytes may claim any size: the coarsest levels tell that they do not hold it."""
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300_000, f"{done.stdout} kB more"


@pytest.mark.slow
def test_damaged_archives_of_format_3() -> None:
    codec, rng, album = integer_codec(), np.random.default_rng(0), _album_3()
    data = pack(codec, album, block=3, verify=False)
    blocks = Archive(codec, data).blocks
    for _ in range(60):
        changed = bytearray(data)
        at = int(rng.integers(len(data)))
        changed[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(CodecError):
            list(Archive(codec, bytes(changed)))
        with pytest.raises(CodecError):
            Archive(codec, data[:at])
    # streams that are damaged, in blocks and an index whose checksums fit
    size = int.from_bytes(data[13:17], "little")
    index = json.loads(zlib.decompress(data[21 : 21 + size]))
    start = 21 + size
    for i in range(30):
        own = bytearray(data[start : start + blocks[0].size])
        if i % 2:
            own[rng.integers(len(own))] ^= 1 << int(rng.integers(8))
        else:
            own = bytearray(rng.bytes(len(own)))
        index["blocks"][0][2] = zlib.crc32(own)
        packed = zlib.compress(json.dumps(index).encode())
        head = len(packed).to_bytes(4, "little")
        head += zlib.crc32(packed, zlib.crc32(data[:13])).to_bytes(4, "little")
        forged = data[:13] + head + packed + bytes(own) + data[start + len(own) :]
        archive = Archive(codec, forged)
        with pytest.raises(CodecError):
            list(archive.block(0))
        assert torch.equal(archive[7], album[7][1])
