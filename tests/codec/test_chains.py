"""Pictures through integer models: round trips, bands and threads, lengths, coarser images, archives."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from codec_models import INTEGER, bits, coded_always, integer, integer_codec, photo_like, shaped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import selfvae
from selfvae.codec import Archive, Codec, CodecError, chains, fallback, pack, picture, read_header
from selfvae.codec.chains import ChainCodec
from selfvae.data.metadata import Metadata
from selfvae.operations import generate, infer

METADATA = Metadata(b"profile" * 9, b"II*\0exif", b"<xmp/>", (("Title", "猫"),))


def chain_of(which: str) -> ChainCodec:
    chain = integer_codec(which).chain
    assert chain is not None
    return chain


def round_trip(which: str, x: Tensor) -> list[tuple[int, bytes]]:
    chain, (height, width) = chain_of(which), x.shape[2:]
    parts = chain.encode(x)
    back = chain.decode([data for _, data in parts], (height, width))[0]
    assert torch.equal(back[:, :, :height, :width], x)
    return parts


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many bands and strips in small pictures."""
    monkeypatch.setattr(chains, "_BAND", 64)
    monkeypatch.setattr(chains, "_STRIP", 200)
    monkeypatch.setattr(chains, "_JOINED", 32)


KINDS = ("photo", "noise", "black", "white", "gradient")


def drawn(kind: str, channels: int, num_values: int, height: int, width: int, seed: int = 0) -> Tensor:
    top, shape = num_values - 1, (1, channels, height, width)
    if kind == "photo":
        return photo_like(height, width, channels, num_values, seed)
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, num_values, shape, dtype=torch.uint8, generator=generator)
    if kind == "gradient":
        across = torch.linspace(0, top, width).round().byte()
        return across.expand(shape).contiguous()
    return torch.full(shape, top if kind == "white" else 0, dtype=torch.uint8)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(INTEGER)), st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 40),
    st.integers(0, 99), st.booleans(),
)  # fmt: skip
def test_round_trips(which: str, kind: str, height: int, width: int, seed: int, small: bool) -> None:
    spec = integer_codec(which).model.spec
    x = drawn(kind, spec.channels, spec.num_values, height, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(chains, "_BAND", 64)
            patch.setattr(chains, "_STRIP", 200)
            patch.setattr(chains, "_JOINED", 32)
        round_trip(which, x)


@pytest.mark.parametrize("which", INTEGER)
def test_extreme_shapes(which: str) -> None:
    codec = integer_codec(which)
    for size in ((1, 1), (1500, 3), (3, 1500)):
        round_trip(which, shaped(codec, *size))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(5000, 3), (3, 5000), (1, 20_000), (513, 769)])
def test_more_extreme_shapes(size: tuple[int, int]) -> None:
    for which in ("quincunx", "halve", "greyscale"):
        round_trip(which, shaped(integer_codec(which), *size))


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize("which", ["quincunx", "halve", "greyscale", "unrelated"])
def test_threads_and_strips_change_no_byte(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x = chain_of(which), shaped(integer_codec(which), 45, 31)
    parts = round_trip(which, x)
    bands = chain._grid(0, (45, 31)).bands()
    assert len(bands) > 4
    assert [rows.start for rows in bands[1:]] == [rows.stop for rows in bands[:-1]]
    for threads, strip in ((1, 1 << 20), (2, 1), (4, 1), (4, 1 << 20)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(chains, "_STRIP", strip)
        assert round_trip(which, x) == parts
    torch.set_num_threads(1)


@pytest.mark.parametrize("which", INTEGER)
def test_the_length_is_the_score(which: str) -> None:
    """A picture that the model itself draws needs its score, and 64 bits for each stream."""
    chain = chain_of(which)
    torch.manual_seed(0)
    x = generate(chain.model, 1, 96, 96)
    parts = chain.encode(x, verify=False)
    streams = sum(len(chain._grid(k, (96, 96)).bands()) if k < parts[0][0] else 1 for k, _ in parts)
    length = sum(8 * len(data) for _, data in parts)
    assert length == pytest.approx(bits(chain.model, x), rel=1e-3, abs=80 * streams)


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize("which", INTEGER)
def test_every_coarser_image(which: str) -> None:
    chain, x, size = chain_of(which), shaped(integer_codec(which), 45, 38), (45, 38)
    parts = [data for _, data in chain.encode(x)]
    n = len(chain.model.levels)
    exact = infer(chain.model, x, [f"y{k}" for k in range(n)])
    for k in range(n):
        found = chain.decode(parts, size, k)
        assert min(found) == k
        rows, cols = (-(-a // b) for a, b in zip(size, chain.model.scale(k), strict=True))
        assert torch.equal(found[k][:, :, :rows, :cols], exact[f"y{k}"][:, :, :rows, :cols])
    # a prefix of the parts gives the levels that it completes
    for i in range(1, len(parts) + 1):
        assert min(chain.decode(parts[:i], size)) == chain.joined(size) + 1 - i


def as_channels(x: Tensor, channels: int) -> Tensor:
    """A picture of 3 channels as one of 1 to 4, with alpha in the even ones."""
    alpha = x[:, :1].flip(3)
    return {1: x[:, :1], 2: torch.cat([x[:, :1], alpha], 1), 3: x, 4: torch.cat([x, alpha], 1)}[channels]


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("which", ["quincunx", "means"])
def test_files_with_alpha_and_metadata(which: str, channels: int) -> None:
    codec = integer_codec(which)
    x = as_channels(photo_like(35, 29), channels)
    data = coded_always(codec, x, METADATA)
    header = read_header(data)
    assert header.version == 3 and header.fingerprint == codec.fingerprint
    assert torch.equal(codec.decompress(data), x) and picture.read_metadata(data) == METADATA
    last = len(codec.model.levels) - 1
    for k in range(last + 1):
        y = codec.decompress(data, f"y{k}")
        assert y.shape[1] in (channels, channels - (channels % 2 == 0))
    with pytest.raises(CodecError, match="the file holds y"):
        codec.decompress(data, f"y{last + 1}")
    shown = 0
    for name, end in header.ends():
        if name[0] != "y":
            continue
        for cut in (end, min(end + 1, len(data) - 1)):
            y = codec.decompress(data[:cut], partial=True)
            shown += 1
            assert y.shape[2:] == x.shape[2:]
        with pytest.raises(CodecError, match="cut short|ends inside"):
            codec.decompress(data[: end - 1])
    assert shown > 1
    with pytest.raises(CodecError, match="cut short"):
        codec.decompress(data[: header.size], partial=True)


def test_a_grey_model_takes_grey_with_alpha_only() -> None:
    codec = integer_codec("grey-picture")
    x = photo_like(30, 33)
    for channels in (1, 2):
        own = as_channels(x, channels)
        assert torch.equal(codec.decompress(coded_always(codec, own)), own)
    for channels in (3, 4):
        with pytest.raises(ValueError, match=r"C one of \[1, 2\]"):
            codec.compress(as_channels(x, channels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_no_file_is_much_larger_than_webp(kind: str, channels: int) -> None:
    codec = integer_codec()
    x = as_channels(drawn(kind, 3, 256, 40, 56), channels)
    data = codec.compress(x)
    assert len(data) <= len(fallback.encode_pixels(x)) + 64
    assert torch.equal(codec.decompress(data), x)


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("which", ["quincunx", "greyscale"])
def test_archives(which: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from selfvae.codec import archive

    monkeypatch.setattr(archive, "TOGETHER", 3000)
    codec, x = integer_codec(which), photo_like(24, 30)
    album = [(f"deep/{i}.png", (x.int() + i).clamp(max=255).byte()) for i in range(6)]
    album.insert(2, ("grey.png", x[:, :1]))
    album += [
        ("one.png", x[:, :, :1, :1]),
        ("small.png", x[:, :, :5, :7]),
        ("grey small.png", x[:, :1, :5]),
    ]
    data = pack(codec, album, block=block)
    assert data[4] == 4
    found = Archive(codec, data)
    for (name, x), (other, back) in zip(album, found, strict=True):
        assert name == other and torch.equal(x, back)
    assert torch.equal(found["grey.png"], album[2][1]) and torch.equal(found[9], album[9][1])


def test_the_pictures_of_an_archive_share_corrections(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, album = integer_codec(), [(str(i), photo_like(32, 32, seed=i)) for i in range(40)]
    data = pack(codec, album, block=16)
    archive = Archive(codec, data)
    assert archive._shared and all(torch.equal(x, archive[name]) for name, x in album[::7])
    monkeypatch.setattr(chains, "_WORTH", 1 << 40)
    plain = pack(codec, album, block=16)
    assert not Archive(codec, plain)._shared
    assert len(data) < 0.95 * len(plain)


def test_a_large_picture_in_an_archive_has_its_own_corrections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "_STRIP", 1 << 12)
    codec, x = integer_codec(), photo_like(90, 100)
    assert codec.chain is not None
    stream, fit = codec.chain.encode_batch(x), codec.chain.fit(x)
    assert fit.data and fit.data in stream
    assert torch.equal(codec.chain.decode_batch(stream, 1, (90, 100)), x)
    assert torch.equal(Archive(codec, pack(codec, [("a", x)]))["a"], x)


@pytest.mark.usefixtures("small_bands")
def test_an_archive_of_large_pictures_has_bands() -> None:
    codec = integer_codec()
    album = [(str(i), photo_like(40, 50, seed=i)) for i in range(2)]
    data = pack(codec, album, block=1)
    for (_, x), (_, back) in zip(album, Archive(codec, data), strict=True):
        assert torch.equal(x, back)


def test_a_batch_costs_what_its_pictures_do() -> None:
    chain = chain_of("quincunx")
    torch.manual_seed(0)
    x = generate(chain.model, 6, 32, 32)
    assert 8 * len(chain.encode_batch(x)) == pytest.approx(
        float(-chain.model(x).elbo.sum()) / math.log(2), rel=1e-3, abs=80
    )
    assert torch.equal(chain.decode_batch(chain.encode_batch(x), 6, (32, 32)), x)


@pytest.mark.parametrize(("which", "channels"), [("quincunx", 4), ("quincunx", 2), ("grey-picture", 2)])
def test_archives_take_no_alpha(which: str, channels: int) -> None:
    with pytest.raises(ValueError, match="^a.png: archives hold no alpha"):
        pack(integer_codec(which), [("a.png", as_channels(photo_like(8, 8), channels))])


def test_estimates_that_differ_between_machines_are_refused() -> None:
    for name in ("bicubic2", "mean3", "grey+bicubic2"):
        model = integer("selfvae", image_shape=(3, 12, 12), transforms=(name,))
        with pytest.raises(ValueError, match=r"the estimate of y0 by .* differs between machines"):
            Codec(model)
    assert Codec(integer("selfvae", transforms=("mean4",))).chain


def test_a_model_with_other_weights_reads_nothing() -> None:
    codec, other = integer_codec("halve"), Codec(integer(**{**INTEGER["halve"], "components": 1}))
    data = coded_always(codec, photo_like(9, 9))
    with pytest.raises(CodecError, match="another model"):
        other.decompress(data)


def test_what_a_wrong_decoder_returns_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` compares pixels, and the streams' checksums hold whatever wrote them."""
    chain, x = chain_of("quincunx"), photo_like(30, 30)
    parts = [data for _, data in chain.encode(x)]
    level: Any = chain._levels[0]
    plain = level.network.__class__.__call__

    def off_by_one(self: Any, context: Tensor) -> Any:
        steps = plain(self, context)
        steps[..., 0, 0, :] += 1
        return steps

    monkeypatch.setattr(level.network.__class__, "__call__", off_by_one)
    with pytest.raises(CodecError):
        chain.decode(parts, (30, 30))
    assert isinstance(chain.model, selfvae.SelfVAE)


_MEMORY = """
import resource, sys, time
sys.path.insert(0, "tests/codec")
import torch
from codec_models import integer_codec
chain, n = integer_codec().chain, int(sys.argv[1])
ramp = (torch.arange(n) * 200 // n).byte()
x = torch.empty(1, 3, n, n, dtype=torch.uint8)
for i in range(0, n, 500):
    part = x[0, :, i : i + 500]
    part[:] = torch.randint(0, 4, part.shape, dtype=torch.uint8)
    part += ramp + i * 40 // n
chain.decode([data for _, data in chain.encode(x[:, :, :200, :200])], (200, 200))  # compiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fit = chain.fit(x)
parts = [data for _, data in chain.encode(x, fit, verify=False)]
assert torch.equal(chain.decode(parts, (n, n), corrections=fit.data)[0][..., :n, :n], x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_large_pictures_take_little_memory() -> None:
    """At most 20 bytes per pixel beyond 200 MB: 2 GB for 100 megapixels."""
    n = 1800
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(n)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 200e6 + 20 * n * n, f"{done.stdout} kB"
