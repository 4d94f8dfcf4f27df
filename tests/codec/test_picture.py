"""Pictures with alpha and metadata through files of format 3, with a toy model."""

import random
import zlib

import pytest
import torch
from torch import Tensor

from selfvae.codec import CodecError, picture
from selfvae.codec.fallback import (
    decode_pixels,
    encode_alpha,
    encode_pixels,
    estimated_webp_size,
    webp_size,
)
from selfvae.codec.format3 import NO_MODEL, PictureHeader, read_header
from selfvae.codec.picture import Levels, decode, encode, read_metadata
from selfvae.data.crops import photo
from selfvae.data.metadata import Metadata
from selfvae.data.pictures import encode_lossless, to_image

MODEL = b"zlib zip"
CORRECTIONS = b"none"
METADATA = Metadata(b"profile" * 99, b"II*\0exif", b"<xmp/>", (("Title", "猫"),))


def code_levels(x: Tensor) -> tuple[bytes, Levels]:
    """Every second pixel, then all of them."""
    return CORRECTIONS, [
        (1, zlib.compress(x[..., ::2, ::2].numpy().tobytes(), 9)),
        (0, zlib.compress(x.numpy().tobytes(), 9)),
    ]


def decode_levels(header: PictureHeader, corrections: bytes, parts: Levels, upto: int) -> Tensor:
    if header.fingerprint != MODEL:
        raise CodecError("another model")
    assert corrections in (CORRECTIONS, b"")
    for level, data in parts:
        step = level + 1
        shape = 1, header.channels - header.has_alpha, -(-header.height // step), -(-header.width // step)
        try:
            y = torch.frombuffer(bytearray(zlib.decompress(data)), dtype=torch.uint8).view(shape)
        except (zlib.error, RuntimeError) as error:
            raise CodecError(f"damaged: {error}") from None
    if upto < level:  # a truncated file
        y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : header.height, : header.width]
    return y


def _random(channels: int, height: int = 23, width: int = 31) -> Tensor:
    return torch.randint(0, 256, (1, channels, height, width), dtype=torch.uint8)


def _periodic(channels: int) -> Tensor:
    """A picture that zlib compresses better than WebP does: small, with long repetitions."""
    return torch.arange(7, dtype=torch.uint8).mul(31).repeat(channels * 9).view(1, channels, 9, 7)


def _files(x: Tensor) -> tuple[bytes, bytes]:
    """With the model's parts whatever they cost, and without."""
    from selfvae.codec import picture

    header = PictureHeader(NO_MODEL, x.shape[1], 256, x.shape[2], x.shape[3])
    return picture._coded(x, header, [], code_levels, MODEL), encode(x)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("metadata", [None, METADATA])
def test_every_kind_of_picture_comes_back(channels: int, metadata: Metadata | None) -> None:
    for x in (_random(channels), _periodic(channels), torch.zeros(1, channels, 1, 1).byte()):
        for model in (None, code_levels):
            data = encode(x, metadata, model, MODEL, decode_levels=decode_levels)
            again, kept = decode(data, decode_levels)
            assert torch.equal(again, x) and kept == (metadata or Metadata()) == read_metadata(data)
        plain = len(data) - len(metadata.to_bytes()) - 6 if metadata else len(data)
        assert plain <= len(encode_lossless(to_image(x[0]), "WebP")) + 64
        for data in _files(x):
            assert torch.equal(decode(data, decode_levels)[0], x)


def test_the_smaller_one_is_taken() -> None:
    noise = encode(_random(3), None, code_levels, MODEL)
    assert read_header(noise).parts[0].name == "pixels" and read_header(noise).fingerprint == NO_MODEL
    file = encode(_random(3), METADATA, lambda x: (b"", [(2, b"a"), (0, b"b")]), MODEL)
    assert [part.name for part in read_header(file).parts] == ["metadata", "y2", "y0"]
    assert read_header(file).fingerprint == MODEL
    with pytest.raises(CodecError):  # a model that does not give the picture back
        encode(
            _random(3), None, lambda x: (b"", [(1, b"a"), (0, b"b")]), MODEL, decode_levels=decode_levels
        )


def test_the_slow_encoder_is_spared_where_the_model_is_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def pixels(x: Tensor, effort: int = 2) -> bytes:
        calls.append(effort)
        return bytes(1000)

    for module in ("picture", "fallback"):
        monkeypatch.setattr(f"selfvae.codec.{module}.encode_pixels", pixels)
    few, many = torch.zeros(1, 3, 9, 9).byte(), torch.zeros(1, 3, 64, 64).byte()  # over, under 2.5 bits
    clear = torch.zeros(1, 4, 64, 64).byte()
    for x, size, tried in (
        (few, 800, [0]), (few, 900, [0, 1]), (few, 960, [0, 1, 2]), (many, 800, [0, 1]),
        (many, 900, [0, 1, 2]), (clear, 500, [0, 1]), (clear, 700, [0, 1, 2]),
    ):  # fmt: skip
        encode(x, None, lambda x, n=size: (b"", [(0, bytes(n))]), MODEL, thorough=False)
        assert calls == tried
        calls.clear()
    encode(few, None, lambda x: (b"", [(0, bytes(10))]), MODEL)
    assert calls == [2]


def test_a_quarter_of_the_rows_tells_the_size_of_a_photograph() -> None:
    x = torch.from_numpy(photo("coffee", 2)[:, :192].copy())[None]
    assert abs(estimated_webp_size(x) / webp_size(x, 0) - 1) < 0.07
    for unknown in (x[:, :, :128], x[:, :, :96].repeat(1, 1, 2, 1)):  # few rows; a pattern
        assert estimated_webp_size(unknown) == 0


def test_a_photograph_s_model_file_needs_no_whole_webp_file(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(photo("coffee", 2)[:, :192].copy())[None]
    tried: list[int] = []
    monkeypatch.setattr(picture, "webp_size", lambda x, effort: tried.append(effort) or 1)
    for share, count in ((0.85, 0), (0.9, 2)):
        size = round(share * estimated_webp_size(x))
        encode(x, None, lambda x, n=size: (b"", [(0, bytes(n))]), MODEL, thorough=False)
        assert len(tried) == count


@pytest.mark.parametrize("channels", [1, 4])
def test_smaller_versions_and_truncated_files(channels: int) -> None:
    x = _random(channels)
    coded, stored = _files(x)
    assert torch.equal(decode(coded, decode_levels, 1)[0], x[..., ::2, ::2])
    with pytest.raises(CodecError, match="holds y2, y0; got 'y1'"):
        decode(encode(x, None, lambda x: (b"", [(2, b"a"), (0, b"b")]), MODEL), decode_levels, 1)
    with pytest.raises(CodecError, match=f"needs the model {MODEL.hex()}"):
        decode(coded)
    end = dict(read_header(coded).ends())["y1"]
    with pytest.raises(CodecError, match="cut short"):
        decode(coded[:end], decode_levels)
    rough = decode(coded[:end], decode_levels, partial=True)[0]
    assert rough.shape == (1, min(channels, 3), 23, 31)  # the alpha plane has not arrived
    assert torch.equal(rough[..., ::2, ::2], x[:, :3, ::2, ::2])
    with pytest.raises(CodecError, match="before the end of its coarsest part"):
        decode(coded[: end - 1], decode_levels, partial=True)

    with pytest.raises(CodecError, match="without smaller versions"):
        decode(stored, upto=1)
    small = decode(stored, upto=1, coarser=lambda x, k: x[..., :: k + 1, :: k + 1])[0]
    assert torch.equal(small, x[..., ::2, ::2])
    with pytest.raises(CodecError, match="nothing can be shown"):
        decode(stored[:-1], partial=True)


def test_damaged_files_are_refused_or_come_back_unchanged() -> None:
    x, rng = _random(4, 9, 11), random.Random(0)
    for data in (encode(x, METADATA), _files(x)[0]):
        for _ in range(1000):
            damaged = bytearray(data)
            damaged[rng.randrange(len(data))] ^= rng.randint(1, 255)
            if rng.random() < 0.2:
                del damaged[rng.randrange(len(data)) :]
            try:
                assert torch.equal(decode(bytes(damaged), decode_levels)[0], x)  # a bit that means nothing
            except CodecError as error:
                assert len(str(error)) > 15


def test_what_is_no_picture_of_that_kind() -> None:
    with pytest.raises(TypeError, match="uint8"):
        encode(torch.zeros(1, 3, 2, 2))
    for shape in ((3, 2, 2), (1, 5, 2, 2), (2, 3, 2, 2), (1, 3, 0, 2)):
        with pytest.raises(ValueError, match="one picture"):
            encode(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="values 0 to 7; the picture holds 8"):
        encode(torch.full((1, 1, 2, 2), 8, dtype=torch.uint8), num_values=8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_files_within(channels: int) -> None:
    x = _random(channels)
    data = encode_pixels(x)
    assert data == encode_pixels(x) and data[8:12] == b"WEBP"
    assert torch.equal(decode_pixels(data, channels, 23, 31), x)
    with pytest.raises(CodecError, match="23 x 31 pixels; the header says 31 x 23"):
        decode_pixels(data, channels, 31, 23)
    for broken in (b"", b"nonsense", data[:60], encode_lossless(to_image(x[0]), "PNG")[:70]):
        with pytest.raises(CodecError, match="is damaged"):
            decode_pixels(broken, channels, 23, 31)
    if channels > 2:
        with pytest.raises(CodecError, match="not grey"):
            decode_pixels(data, channels - 2, 23, 31)


def test_transparent_colours_opaque_alpha_and_long_sides() -> None:
    x = _random(4)
    x[:, 3] = 0
    assert torch.equal(decode_pixels(encode_pixels(x), 4, 23, 31), x)
    x[:, 3] = 255
    assert torch.equal(decode_pixels(encode_pixels(x), 4, 23, 31), x)
    for channels in (1, 2, 3, 4):
        long = _random(channels, 1, 16_384)
        assert torch.equal(decode_pixels(encode_pixels(long), channels, 1, 16_384), long)
        assert torch.equal(decode(encode(long))[0], long)
    assert len(encode_alpha(torch.full((1, 1, 500, 500), 255, dtype=torch.uint8))) < 60
    for alpha in (_random(1), _random(1, 1, 16_384)):
        assert torch.equal(decode_pixels(encode_alpha(alpha), 1, *alpha.shape[2:]), alpha)
