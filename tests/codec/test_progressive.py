"""Single files: exact round trips of every model, size and content; prefixes and cut files."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from codec_models import bits, cached_codec, fixed, gaussian
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import selfvae
from selfvae.codec import (
    Archive,
    Codec,
    CodecError,
    pack,
    read_header,
)
from selfvae.codec.container import Header


def test_round_trip_at_the_model_s_length(codec: Codec, picture: Tensor) -> None:
    data = codec.compress(picture)
    assert torch.equal(codec.decompress(data), picture)
    header = read_header(data)
    assert (header.channels, header.num_values, header.height, header.width) == (3, 256, 24, 32)
    ideal = bits(fixed(), picture)
    assert 8 * (len(data) - header.size) == pytest.approx(ideal, rel=0.003, abs=100)
    assert codec.compress(picture, verify=False) == data


@pytest.mark.parametrize(
    "options",
    [
        {"transforms": ("bits3",)}, {"transforms": ("mean2",)}, {"transforms": ("grey",)},
        {"transforms": ("subsample3",)}, {"transforms": ("bicubic2",), "consistent": False},
        {"transforms": ("sketch", "mean2")}, {"transforms": ("mean1x2",), "num_values": 8},
        {"transforms": ("mean3",), "residual_mean": False, "coefficients": "raw"},
        {"transforms": ("blur",)},
        {"image_shape": (1, 18, 18)}, {"image_shape": (4, 18, 18), "transforms": ("mean2",)},
        {"transforms": ("halve",), "num_values": 2, "image_shape": (3, 16, 16)},
        {"transforms": ("quincunx",), "image_shape": (3, 16, 16)},
        {"transforms": ("quincunx",), "image_shape": (3, 16, 16), "shared": True},
        {"transforms": ("checkerboard", "grey")},
    ],
)  # fmt: skip
def test_every_transform(options: dict[str, Any], picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"backbone": "residual", "width": 0.03, "image_shape": (3, 18, 18), **options}
    model = fixed("selfvae", **how)
    channels, levels = model.spec.channels, model.spec.num_values
    x = torch.cat([picture, picture[:, :1].flip(3)], 1)[:, :channels, :9, :13] // (256 // levels)
    codec = Codec(model)
    data = codec.compress(x, verify=False)
    assert torch.equal(codec.decompress(data), x)
    for k in range(1, len(model.levels)):  # every prefix, exactly
        rows, cols = model.scale(k)
        y = selfvae.infer(model, x, f"y{k}")[f"y{k}"][:, :, : -(-9 // rows), : -(-13 // cols)]
        assert torch.equal(codec.decompress(data, f"y{k}"), y)
    monkeypatch.setattr("selfvae.codec.float64.pictures._TILE", 4)
    monkeypatch.setattr("selfvae.codec.float64.pictures._MARGIN", 3)
    assert torch.equal(codec.decompress(codec.compress(x, verify=False)), x)


def test_a_model_that_is_not_finite(picture: Tensor) -> None:
    for model in (fixed(), gaussian()):
        next(model.levels[0].parameters()).data.fill_(math.nan)
        with pytest.raises(CodecError, match="not finite: it is damaged"):
            Codec(model).compress(picture)


@settings(max_examples=15, deadline=None)
@example(height=1, width=1, channels=1, kind="noise", which="gaussian")
@example(height=17, width=19, channels=3, kind="noise", which="halve")
@given(
    height=st.integers(1, 19), width=st.integers(1, 19), channels=st.sampled_from([1, 3]),
    kind=st.sampled_from(["black", "white", "noise", "checkered", "gradient"]),
    which=st.sampled_from(["halve", "gaussian"]),
)  # fmt: skip
def test_any_size_and_content(height: int, width: int, channels: int, kind: str, which: str) -> None:
    shape = (1, channels, height, width)
    i = torch.arange(math.prod(shape)).view(shape)
    x = {
        "black": 0 * i, "white": 0 * i + 255, "checkered": 255 * (i % 2), "gradient": i % 256,
        "noise": (i * 7919 + 13) * 104729 // 64 % 256,
    }[kind].byte()  # fmt: skip
    codec = cached_codec(which)
    assert torch.equal(codec.decompress(codec.compress(x, verify=False)), x)


def test_tiles_do_not_matter_much(codec: Codec, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tile is another format, but the length stays: the margin covers the networks' reach."""
    whole = codec.compress(picture)
    monkeypatch.setattr("selfvae.codec.float64.pictures._TILE", 5)
    seen: dict[str, int] = {}

    def track(tiles: Any, name: str) -> Any:
        seen[name] = len(tiles)
        return tiles

    data = codec.compress(picture, verify=False, track=track)
    assert seen["y0"] == 5 * 4 and abs(len(data) - len(whole)) < 40
    assert torch.equal(codec.decompress(data), picture)


def test_a_file_cut_short(codec: Codec, picture: Tensor) -> None:
    data = codec.compress(picture)
    header = read_header(data)
    with pytest.raises(CodecError, match=r"cut short: \d+ of \d+ bytes"):
        codec.decompress(data[:-1])
    end, images = header.size, []
    for part in header.parts[:-1]:
        end += part.size
        x = codec.decompress(data[: end + 3], partial=True)
        assert x.shape == picture.shape
        assert torch.equal(x, codec.decompress(data[: end + 3], partial=True))
        images.append((x.double() - picture).square().mean().item())
        y = codec.decompress(data[:end], f"y{len(header.parts) - len(images)}", partial=True)
        assert torch.equal(y, codec.decompress(data, f"y{len(header.parts) - len(images)}"))
    assert images[-1] < images[0]
    assert torch.equal(codec.decompress(data, partial=True), picture)
    with pytest.raises(CodecError, match="before the end of its coarsest part"):
        codec.decompress(data[: header.size + 2], partial=True)


@pytest.mark.parametrize("name", ["selfvae-halve", "selfvae-quincunx"])
def test_nothing_is_paid_beyond_the_borders(name: str, picture: Tensor) -> None:
    """A picture of odd sides takes no more than its share of the padded one's bits, and comes back."""
    codec = Codec(fixed(name, image_shape=(3, 32, 32)))
    x = picture[:, :, :17, :19].contiguous()
    data = codec.compress(x)
    header = read_header(data)
    assert torch.equal(codec.decompress(data), x)
    rows, cols = codec.padded(17, 19)
    whole = picture[:, :, :1].expand(-1, -1, rows, -1)[..., :cols].clone()
    whole[:, :, :17, :19] = x
    share = 17 * 19 / (rows * cols)
    assert len(data) - header.size < (share + 0.05) * (len(codec.compress(whole)) - header.size)
    for k in range(1, len(codec.model.levels)):
        n, m = codec.model.scale(k)
        y = codec.decompress(data, f"y{k}")
        assert tuple(y.shape[2:]) == (-(-17 // n), -(-19 // m))
    album = [("a", x), ("b", x.flip(3)), ("c", x[:, :, :3])]
    for (_, a), (_, b) in zip(album, Archive(codec, pack(codec, album)), strict=True):
        assert torch.equal(a, b)


def test_too_large_and_too_many(codec: Codec, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16 - 1)
    with pytest.raises(ValueError, match="24 x 32 pixels are more than 766"):
        codec.compress(picture)
    with pytest.raises(ValueError, match="at most 64 components"):
        Codec(fixed(components=65))
    with pytest.raises(ValueError, match="no config"):
        Codec(selfvae.SelfVAE(fixed().levels))


def test_too_many_pixels_for_latents(picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    # their networks see the whole picture: a forged header would make them take any memory
    codec, chain = cached_codec("gaussian"), cached_codec("halve")
    data, packed = codec.compress(picture), pack(codec, [("a", picture), ("b", picture)])
    header = read_header(data)
    assert isinstance(header, Header)
    payload = data[header.size :]
    forged = replace(header, height=255, width=4000).to_bytes(payload) + payload
    refused = "at most 262144 pixels.*got 256 x 4000.*SELFVAE_LATENT_PIXELS to 1024000 or more"
    with pytest.raises(CodecError, match=refused):
        codec.decompress(forged)
    monkeypatch.setenv("SELFVAE_LATENT_PIXELS", "767")
    for task in (
        lambda: codec.compress(picture),
        lambda: codec.decompress(data),
        lambda: Archive(codec, packed),
    ):
        with pytest.raises(CodecError, match="at most 767 pixels.*got 24 x 32"):
            task()
    assert torch.equal(chain.decompress(chain.compress(picture)), picture)  # computed in tiles
    monkeypatch.setenv("SELFVAE_LATENT_PIXELS", "768")
    assert torch.equal(codec.decompress(data), picture)
    assert len(list(Archive(codec, packed))) == 2
    monkeypatch.setenv("SELFVAE_LATENT_PIXELS", "1e6")
    with pytest.raises(CodecError, match="must be a number of pixels.*got '1e6'"):
        codec.decompress(data)


def test_wrong_input(codec: Codec, picture: Tensor) -> None:
    data = codec.compress(picture)
    with pytest.raises(CodecError, match="several were joined"):
        codec.decompress(data + data)
    with pytest.raises(CodecError, match="the file holds y4, .*; got 'y9'"):
        codec.decompress(data, "y9")
    with pytest.raises(CodecError, match="another model"):
        Codec(fixed(components=2)).decompress(data)
    with pytest.raises(ValueError, match="one picture uint8"):
        codec.compress(picture.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="one picture uint8"):
        codec.compress(picture[:, :2])
    with pytest.raises(TypeError, match="uint8"):
        codec.compress(picture.float())
    with pytest.raises(ValueError, match="values 0 to 7"):
        Codec(fixed(num_values=8)).compress(picture)
