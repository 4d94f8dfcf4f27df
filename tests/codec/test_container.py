"""The file format: headers, varints, fingerprints."""

from typing import Any

import pytest
from codec_models import fixed, golden_checksums
from torch import Tensor

from selfvae.codec import (
    Codec,
    CodecError,
    fingerprint,
    read_header,
)
from selfvae.codec.container import Header, Part, Reader, varint


def _forged(codec: Codec, data: bytes, **changes: Any) -> bytes:
    """The file with another header, its checksums right."""
    header = read_header(data)
    fields = {**header.__dict__, **changes}
    payload = data[header.size :]
    return Header(**fields).to_bytes(payload) + payload


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 2**31}, "more than"),
        ({"width": 0}, "makes no sense"),
        ({"channels": 5}, "makes no sense"),
        ({"num_values": 128}, "does not fit the model"),
        ({"parts": ()}, "makes no sense"),
        ({"parts": (Part("y0", 0, 2**40, 0),) * 5}, "cut short"),
        ({"parts": (Part("y0", 0, 0, 0),) * 65}, "claims 65 parts"),
        ({"height": 25}, "does not come back"),
        ({"fingerprint": b"12345678"}, "another model: 3132333435363738"),
    ],
)
def test_hostile_headers(codec: Codec, picture: Tensor, changes: dict[str, Any], words: str) -> None:
    data = _forged(codec, codec.compress(picture), **changes)
    with pytest.raises(CodecError, match=words):
        codec.decompress(data)


def test_notes_and_numbers_of_an_enemy(codec: Codec, picture: Tensor) -> None:
    header = read_header(codec.compress(picture))
    side = varint(2**62)
    parts = (Part("y4", len(side), 0, 0), *(Part("y0", 0, 0, 0) for _ in header.parts[1:]))
    forged = Header(header.fingerprint, 3, 256, 24, 32, parts).to_bytes(side) + side
    with pytest.raises(CodecError):
        codec.decompress(forged)
    with pytest.raises(CodecError, match="63 bits"):
        Reader(b"\xff" * 20).varint()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n", "not an .svae file"),
        (b"SV", "header ends too early"),
        (b"SVAE", "header ends too early"),
        (b"SVAE\x07", "format 7"),
    ],
)
def test_other_files(codec: Codec, data: bytes, words: str) -> None:
    with pytest.raises(CodecError, match=words):
        codec.decompress(data)


def test_a_code_that_begins_with_zeros(codec: Codec, picture: Tensor) -> None:
    data = codec.compress(picture)
    header = read_header(data)
    at = header.size + header.parts[0].side
    payload = data[header.size : at] + bytes(4) + data[at + 4 :]
    for damaged in (header.to_bytes(payload) + payload, (data[: header.size] + payload)[:-1]):
        with pytest.raises(CodecError, match="begins with zeros"):
            codec.decompress(damaged, partial=True)


def test_fingerprints() -> None:
    model, other = fixed(), fixed()
    assert fingerprint(model) == fingerprint(other) == fingerprint(fixed().double())
    next(other.parameters()).data[0] += 1e-3
    assert fingerprint(other) != fingerprint(model)
    assert fingerprint(model).hex() == golden_checksums()["fingerprint"]
