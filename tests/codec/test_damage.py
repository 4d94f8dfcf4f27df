"""Damaged and forged files give an error or a picture, and nothing else."""

import bisect
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from codec_models import cached_codec, fixed, gaussian, mixed_album
from torch import Tensor

from selfvae.codec import (
    Archive,
    Codec,
    CodecError,
    pack,
    read_header,
)
from selfvae.codec.container import Header, Part


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


@pytest.mark.parametrize("which", ["halve", "gaussian"])
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
    [("vae", "flow"), ("selfvae", "flow"), ("selfvae-mean-3lvl", "mog-local"), ("selfvae", "normal")],
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
