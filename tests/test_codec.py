"""The codec: every pixel back, at the length that the model promises, from damaged files nothing."""

import contextlib
import copy
import io
import json
import math
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from torch import Tensor

import selfvae
from selfvae.cli import main
from selfvae.codec import (
    Archive,
    Codec,
    CodecError,
    fingerprint,
    float64,
    pack,
    plugin,
    read_header,
    tables,
    use,
)
from selfvae.codec.ans import ANSCoder, _length, code
from selfvae.codec.container import Header, Part, Reader, varint
from selfvae.codec.float64 import SideInformation
from selfvae.codec.latents import _BY_RATE, _ROUNDED, Gaussian, InsufficientBits, _Integers, _noise
from selfvae.codec.tables import ONE, Channel, cumulative
from selfvae.distributions.latents import DiagonalNormal
from selfvae.distributions.pixels import PixelMixture, param_count
from selfvae.nn.flows import Coupling
from selfvae.operations import variables
from selfvae.transforms import ImageSpec, Support

GOLDEN = Path(__file__).parent / "golden"


def fixed(name: str = "selfvae-halve", **options: Any) -> selfvae.SelfVAE:
    """A small model whose weights are the same everywhere: multiples of 1/1000, by counting."""
    how = {"image_shape": (3, 16, 16), "width": 0.06, "components": 3, "latents": "none", **options}
    model = selfvae.build(name, "tiny", **how)
    for i, (key, value) in enumerate(sorted(model.state_dict().items())):
        if key.endswith("initialised"):
            value.fill_(True)
            continue
        n = torch.arange(value.numel()).view(value.shape) * 7919 + 104729 * (i + 1)
        value.copy_((n % 1009 - 504) / 1000 * (0.3 if key.endswith("gain") else 1.0))
    return model


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(fixed())


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """A smooth picture with an edge and some noise, uint8 (1, 3, 24, 32)."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    base = 100 + 3 * x + 2 * y + 60 * (x + y > 30)
    noise = torch.randn(3, 24, 32, generator=generator)
    return (base + torch.tensor([0.0, 10.0, -20.0]).view(3, 1, 1) + 4 * noise).clamp(0, 255).byte()[None]


def bits(model: selfvae.SelfVAE, x: Tensor) -> float:
    with torch.no_grad():
        return -model(x).elbo.mean().item() / math.log(2)


# --- whole numbers ------------------------------------------------------------------------------------


def test_the_logistics_table() -> None:
    """Against float64's own, at means and scales from one end to the other."""
    inverse = tables.inverse_table()
    assert inverse[-tables.FLATTEST] == 1 << 20 and (np.diff(inverse) >= 0).all()
    mean = np.array([[-5000, 0, 16, 4080, 4081, 9000]] * len(inverse))
    steps = np.arange(len(inverse))[:, None] + np.zeros_like(mean)
    for edge in (1, 100, 128, 255):
        found = cumulative(np.full(6, 32 * edge - 16), Channel(mean, inverse[steps], 5)) / 2.0**ONE
        t = (edge - 0.5 - mean / 32) * (inverse[steps] / 2**20)
        assert np.abs(found - 1 / (1 + np.exp(-np.clip(t, -40, 40)))).max() < 1e-4
    means = np.arange(-3000, 3000)[:, None]
    fine = cumulative(np.full(1, 200), Channel(means, np.full_like(means, inverse[100]), 5))
    assert (np.diff(fine[:, 0]) <= 0).all()  # ever less below an edge as the mean goes up


def test_the_normal_s_table() -> None:
    tail, slope = tables._tail_table("normal")
    exact = 2.0**ONE * torch.special.ndtr(-torch.arange(len(tail)).double() / 64).numpy()
    assert np.abs(tail - exact).max() <= 1 and tail[-1] == slope[-1] == 0


def test_the_ratios_table() -> None:
    nats = np.linspace(-5, 5, 1001)
    found = float64.ratios(nats, SideInformation(), 0) / 2.0**tables.SHARES
    assert np.abs(np.log(found) - nats.clip(-4, 4)).max() < 1 / 128
    assert tables.ratio_table().min() >= 2 and tables.ratio_table().max() < 1 << 18


def golden_tables() -> list[np.ndarray]:
    return [
        tables.weight_table(), tables.inverse_table(), *tables._tail_table("logistic"),
        *tables._tail_table("normal"), tables.ratio_table(),
    ]  # fmt: skip


def test_tables_are_the_same_everywhere() -> None:
    """Golden checksums: another value would make other machines' files unreadable."""
    assert [zlib.crc32(t.astype("<i8").tobytes()) for t in golden_tables()] == json.loads(
        (GOLDEN / "tables.json").read_text()
    )


def test_lengths() -> None:
    n = np.array([0, 1, 2, 3, 4, 255, 256, 2**38 - 1, 2**38, 2**62 - 1])
    assert _length(n).tolist() == [int(i).bit_length() for i in n]


def mixture(levels: int, components: int, n: int, seed: int = 0, spread: float = 2.0) -> PixelMixture:
    generator = torch.Generator().manual_seed(seed)
    format = ImageSpec(3, levels)
    params = spread * torch.randn(
        1, 1, param_count(3, components), 1, n, generator=generator, dtype=torch.float64
    )
    return PixelMixture(params, Support(torch.zeros(1, 3, 1, n), format), format)


def through(p: PixelMixture, v: Tensor | None, coder: ANSCoder, notes: SideInformation) -> Tensor:
    grid, found = (
        float64.QuantizedMixture(p, 0, notes),
        torch.zeros(1, 1, 3, 1, p.logits.shape[-1], dtype=torch.long),
    )
    weights = grid.weights()
    for c in range(3):
        known = None if v is None else v[0, 0, c, 0].numpy()
        values, weights = code(coder, weights, grid.channel(found), p.spec.num_values, None, known)
        found[0, 0, c, 0] = torch.from_numpy(values)
    return found


@pytest.mark.parametrize(("levels", "components"), [(256, 10), (256, 1), (2, 3), (32, 64), (8, 2)])
def test_code_length_is_the_likelihood(levels: int, components: int) -> None:
    p = mixture(levels, components, 20_000, spread=1.0)
    torch.manual_seed(0)
    x = p.sample()
    encoder, notes = ANSCoder(), SideInformation()
    v = x[:, None].long()
    assert torch.equal(through(p, v, encoder, notes), v)
    encoder.push()
    words = encoder.words()
    ideal = -p.log_prob(x).item() / math.log(2)
    assert 32 * len(words) == pytest.approx(ideal, rel=2e-3, abs=100)
    decoder = ANSCoder(words)
    assert torch.equal(through(p, None, decoder, SideInformation(notes.tobytes())), v)
    assert decoder.left() == 0


def test_values_far_from_every_mean_come_back() -> None:
    p = mixture(256, 2, 600, spread=30.0)  # sharp, far apart, some beyond the range
    for v in (torch.zeros(1, 1, 3, 1, 600).long(), torch.full((1, 1, 3, 1, 600), 255)):
        encoder, notes = ANSCoder(), SideInformation()
        through(p, v, encoder, notes)
        encoder.push()
        assert torch.equal(through(p, None, ANSCoder(encoder.words()), SideInformation(notes.tobytes())), v)


def test_intervals() -> None:
    """Only the interval's values are coded: one value costs nothing, two at most a bit."""
    rng, n = np.random.default_rng(0), 4000
    channel = Channel(
        rng.integers(-9000, 9000, (3, n)), tables.inverse_table()[rng.integers(0, 176, (3, n))], 5
    )
    weights = rng.integers(0, 1 << 20, (3, n))
    lo = rng.integers(0, 256, n)
    for width in (1, 2, 7, 256):
        hi = np.minimum(lo + width - 1, 255)
        v = rng.integers(lo, hi + 1)
        encoder = ANSCoder()
        code(encoder, weights, channel, 256, (lo, hi), v)
        encoder.push()
        words = encoder.words()
        found, after = code(ANSCoder(words), weights, channel, 256, (lo, hi), None)
        assert np.array_equal(found, v) and after.max() < 1 << 20 and after.min() >= 0
        assert len(words) == 0 if width == 1 else len(words) > 0


def test_rounding_near_a_border_follows_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.array([0.2, 0.5, 1.5 - 1e-9, -0.5 + 1e-9, 7.4999, 1e6 + 0.5])
    notes = SideInformation()
    whole = notes.quantize(values)
    assert whole.tolist() == [0, 1, 1, 0, 7, 1000001]
    for shift in (-1e-7, 1e-7):
        assert SideInformation(notes.tobytes()).quantize(values + shift).tolist() == whole.tolist()
    assert SideInformation(b"").quantize(values - 1e-7).tolist() != whole.tolist()
    plain = SideInformation()
    plain.quantize(np.array([0.2, 0.3]))
    assert plain.tobytes() == b""
    again = SideInformation(notes.tobytes() + varint(2 * 90))
    again.quantize(values)
    with pytest.raises(CodecError, match="corrects a value that does not exist"):
        again.check_used()
    with pytest.raises(CodecError, match="corrects a value twice"):
        SideInformation(varint(4) + varint(0))
    with pytest.raises(CodecError, match="corrects a value that needs none"):
        SideInformation(varint(0)).quantize(values)  # the first
    with pytest.raises(CodecError, match="not finite"):
        plain.quantize(np.array([np.nan]))


# --- pictures -----------------------------------------------------------------------------------------


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
    monkeypatch.setattr("selfvae.codec.progressive._TILE", 4)
    monkeypatch.setattr("selfvae.codec.progressive._MARGIN", 3)
    assert torch.equal(codec.decompress(codec.compress(x, verify=False)), x)


@pytest.mark.parametrize("name", ["vae", "selfvae", "selfvae-3"])
def test_latents_as_whole_numbers(name: str, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts z1, y1, z0, y0; as long as the scores of these whole numbers; in tiles too."""
    model = fixed(
        name, latents="all", posterior="uniform", prior="logistic", latent_channels=2, width=0.03,
        backbone="residual",
    )  # fmt: skip
    x, codec = picture[:, :, :21, :30], Codec(model)
    data = codec.compress(x)
    header = read_header(data)
    assert [part.name for part in header.parts] == variables(model)
    values = selfvae.infer(model, x, temperature=0, decode="mode")
    assert all(bool((z == z.round()).all()) for key, z in values.items() if key[0] == "z")
    score = 0.0

    def pick(key: str, p: Any) -> Tensor:
        nonlocal score
        score -= p.log_prob(values[key]).item() / math.log(2)
        return values[key]

    with torch.no_grad():
        model.walk(pick, model.blank(1, *values["y0"].shape[2:]))
    assert 8 * (len(data) - header.size) == pytest.approx(score, rel=0.004, abs=100)
    for part in header.parts[1:-1]:  # cut after any of them
        cut = data[: header.size + sum(p.size for p in header.parts[: header.parts.index(part)])]
        assert codec.decompress(cut, partial=True).shape == x.shape
    album = [("a", x), ("b", x.flip(3)), ("c", x[:, :, :3])]
    for (_, a), (_, b) in zip(album, Archive(codec, pack(codec, album)), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr("selfvae.codec.progressive._TILE", 8)
    monkeypatch.setattr("selfvae.codec.progressive._MARGIN", 3)
    assert torch.equal(codec.decompress(codec.compress(x, verify=False)), x)


def gaussian(name: str = "selfvae", prior: str = "flow", **options: Any) -> selfvae.SelfVAE:
    """A fixed model with Gaussian latents."""
    how = {"latent_channels": 2, "width": 0.03, "backbone": "residual", **options}
    return fixed(name, latents="all", prior=prior, **how)


def mean_bits(model: selfvae.SelfVAE, x: Tensor, draws: int = 64) -> float:
    torch.manual_seed(0)
    return sum(bits(model, x) for _ in range(draws)) / draws


@pytest.mark.parametrize("prior", ["normal", "mog-local", "flow", "flow-residual"])
@pytest.mark.parametrize("name", ["vae", "selfvae", "selfvae-3"])
def test_gaussian_latents(name: str, prior: str, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single files near the bound, exact prefixes, cut files, albums of plain and other pictures, tiles."""
    model = gaussian(name, prior)
    x, codec = picture[:, :, :21, :30], Codec(model)
    data = codec.compress(x)
    header = read_header(data)
    assert [part.name for part in header.parts] == variables(model)
    assert 8 * (len(data) - header.size) < 1.06 * mean_bits(model, codec_input(codec, x)) + 100
    assert codec.compress(x, verify=False) == data
    for k in range(1, len(model.levels)):
        y = selfvae.infer(model, x, f"y{k}")[f"y{k}"]
        found = codec.decompress(data, f"y{k}")
        assert torch.equal(found, y[:, :, : found.shape[2], : found.shape[3]])
    for i, part in enumerate(header.parts[1:], 1):
        cut = data[: header.size + sum(p.size for p in header.parts[:i])]
        assert codec.decompress(cut, partial=True).shape == x.shape, part.name
        for held in header.parts[:i]:
            if held.name[0] == "y":
                found = codec.decompress(cut, held.name, partial=True)
                assert torch.equal(found, codec.decompress(data, held.name))
    assert name == "vae" or header.parts[-1].words > 20  # the last part has some of its own
    black = torch.zeros_like(x)
    album = [("a", x), ("b", x.flip(3)), ("c", x[:, :, :3]), *((str(i), black) for i in range(5))]
    for (_, a), (_, b) in zip(album, Archive(codec, pack(codec, album)), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr("selfvae.codec.progressive._TILE", 8)
    monkeypatch.setattr("selfvae.codec.progressive._MARGIN", 3)
    assert torch.equal(codec.decompress(codec.compress(x, verify=False)), x)


def how_coded(codec: Codec, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """How the latents of a picture are coded: "drawn", "rounded" (on a grid) or "by rate"."""
    kinds: list[int] = []
    plain = Gaussian.code

    def code(prior: Any, shape: Any, stack: Any, notes: Any, known: Any) -> Any:
        kinds.append(known.kind)
        return plain(prior, shape, stack, notes, known)

    with monkeypatch.context() as patch:
        patch.setattr(Gaussian, "code", code)
        codec.push(x, ANSCoder())
    latents = [name for name in reversed(codec.names) if name[0] == "z"]
    named = zip(latents, kinds[-len(latents) :], strict=True)  # the last try's
    return {
        name: "drawn" if kind < _BY_RATE else "rounded" if kind >= _ROUNDED else "by rate"
        for name, kind in named
    }


def test_which_latents_are_drawn(picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a picture's own bits suffice for; plain pictures take coarser grids, or none."""
    codec = Codec(gaussian("selfvae", "normal"))
    rich = how_coded(codec, picture, monkeypatch)
    assert rich == {"z0": "by rate", "z1": "drawn"}
    draw = Gaussian.draw
    for dry, expected in (
        (1.0, "drawn"),
        (2.0, "by rate"),
    ):  # as if the stack were too small for steps below
        seen = []

        def tried(q: Any, stack: Any, notes: Any, fine: float, dry: float = dry, seen: Any = seen) -> Any:
            seen.append(fine)
            if fine < dry:
                raise InsufficientBits
            return draw(q, stack, notes, fine)

        with monkeypatch.context() as patch:
            patch.setattr(Gaussian, "draw", tried)
            found = how_coded(codec, picture, monkeypatch)
        assert found["z1"] == expected and seen == 2 * [0.25, 0.5, 1.0]
    flow = Codec(gaussian("vae", "flow"))
    assert how_coded(flow, picture, monkeypatch)["z0"] == "rounded"
    assert how_coded(flow, torch.zeros_like(picture)[:, :, :4, :4], monkeypatch)["z0"] == "by rate"


def test_noise_is_the_same_whatever_torch_is_told() -> None:
    plain = _noise((1, 1, 1400, 1400))
    assert plain.isfinite().all() and plain.mean().abs() < 0.01 and (plain.std() - 1).abs() < 0.01
    kept = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(plain, _noise((1, 1, 1400, 1400)))
    finally:
        torch.set_default_dtype(kept)


def test_a_model_that_is_not_finite(picture: Tensor) -> None:
    for model in (fixed(), gaussian()):
        next(model.levels[0].parameters()).data.fill_(math.nan)
        with pytest.raises(CodecError, match="not finite: it is damaged"):
            Codec(model).compress(picture)


def codec_input(codec: Codec, x: Tensor) -> Tensor:
    """Padded."""
    found = selfvae.infer(codec.model, x, "y0")["y0"]
    assert found.shape[2:] == codec.padded(*x.shape[2:])
    return found


@pytest.mark.parametrize("prior", ["normal", "mog", "mog-local", "flow", "flow-residual"])
@pytest.mark.parametrize("name", ["vae", "selfvae-3"])
def test_bits_back_costs_the_bound(name: str, prior: str, picture: Tensor) -> None:
    """An archive is as long as the ELBO says, to 1%: the latents' bits come back."""
    model = gaussian(name, prior)
    codec = Codec(model)
    images = [picture[:, :, i % 8 : i % 8 + 16, i // 8 * 4 : i // 8 * 4 + 16] for i in range(32)]
    data = pack(codec, [(str(i), x.contiguous()) for i, x in enumerate(images)], verify=False)
    index = 21 + int.from_bytes(data[13:17], "little")
    ideal = 32 * mean_bits(model, torch.cat(images), 16)
    assert 8 * (len(data) - index) == pytest.approx(ideal, rel=0.01, abs=200)


@pytest.mark.parametrize("grid", [1.0, 2.0**-7])
def test_a_flow_of_whole_numbers_is_one_to_one(grid: float) -> None:
    model = gaussian().double()
    level, rng = model.levels[-1], np.random.default_rng(0)
    prior = level.prior(model.blank(2, 32, 32), None)
    v = torch.from_numpy(rng.integers(-500, 500, prior.shape))
    words = rng.integers(1, 2**31, 4000).astype(np.uint32)
    stack, notes = ANSCoder(words), SideInformation()
    with torch.no_grad():
        noise = prior.flow.walk(v, _Integers(prior, grid, v.numel(), stack, notes).there)
        exact = prior.flow(v.double() * grid)
        assert (noise - exact[0] / grid).abs().max() < (100 if grid == 1 else 40)  # rounded ten times
        spent = 32 * (len(words) - len(stack.words()))
        assert spent == pytest.approx(exact[1].sum().item() / math.log(2), rel=0.1, abs=100)
        again = SideInformation(notes.tobytes())
        back = prior.flow.walk_back(noise, _Integers(prior, grid, v.numel(), stack, again).back)
    assert torch.equal(back, v) and np.array_equal(stack.words(), words)


def test_a_latent_is_drawn_as_its_posterior_says() -> None:
    """Popping from random words is drawing; giving back restores these words."""
    mean = torch.linspace(-100, 100, 40_000).double().view(1, 1, 200, 200)
    q = DiagonalNormal(mean, torch.full_like(mean, -math.log(16)))  # a scale of 1/4
    words = np.random.default_rng(0).integers(1, 2**31, 40_000).astype(np.uint32)
    stack, notes = ANSCoder(words), SideInformation()
    latent = Gaussian.draw(q, stack, notes)
    t = 4 * (latent.z - mean)
    assert latent.drawn and t.mean().abs() < 0.02 and (t.std() - 1).abs() < 0.02 and t.abs().max() < 6.1
    Gaussian.give_back(q, stack, SideInformation(notes.tobytes()), latent)
    assert np.array_equal(stack.words(), words)
    with pytest.raises(InsufficientBits):
        Gaussian.draw(q, ANSCoder(words[-100:]), SideInformation())


@settings(max_examples=60, deadline=None)
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
    codec = _CODECS[which]
    assert torch.equal(codec.decompress(codec.compress(x, verify=False)), x)


_CODECS = {"halve": Codec(fixed()), "gaussian": Codec(gaussian())}


def test_tiles_do_not_matter_much(codec: Codec, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tile is another format, but the length stays: the margin covers the networks' reach."""
    whole = codec.compress(picture)
    monkeypatch.setattr("selfvae.codec.progressive._TILE", 5)
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


# --- the same on every machine ------------------------------------------------------------------------


class Noisy:
    """Adds noise to what every network computes, inside the block."""

    def __init__(self, codec: Codec, size: float) -> None:
        self.codec, self.size = codec, size

    def __enter__(self) -> None:
        def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
            return output + self.size * (2 * torch.rand_like(output) - 1)

        nets = [net for level in self.codec.model.levels for net in (level.encoder, level.decoder) if net]
        for level in self.codec.model.levels[:-1]:
            nets += [level.prior_net] if level.has_latent else []
        nets += [m.net for m in self.codec.model.modules() if isinstance(m, Coupling)]
        self.hooks = [net.register_forward_hook(add) for net in nets]

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


_PLAIN_CPU = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}

# a mean moves by half of 255 levels for an unanchored output of one, in steps of 1/32: no parameter by more
STEPS = 127.5 * 32


@pytest.mark.parametrize("margin", [float64.MARGIN, 0.01])
def test_noise_below_the_margin_changes_nothing(
    picture: Tensor, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the true margin, and with one so wide that thousands of values are noted."""
    monkeypatch.setattr(float64, "MARGIN", margin)
    codec = Codec(fixed())
    data = codec.compress(picture)
    noted = sum(part.notes for part in read_header(data).parts)
    assert noted > 500 or margin == float64.MARGIN
    for seed in range(3):
        torch.manual_seed(seed)
        with Noisy(codec, 0.9 * margin / STEPS):
            assert torch.equal(codec.decompress(data), picture)
    with Noisy(codec, 0.01), pytest.raises(CodecError, match="does not come back as it was"):
        codec.decompress(data)


@pytest.mark.parametrize("margin", [float64.MARGIN, 0.01])
def test_noise_in_the_networks_of_latents(
    picture: Tensor, margin: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float64, "MARGIN", margin)
    for model in (
        gaussian(),
        gaussian("selfvae-3", "mog-local"),
        gaussian(posterior="uniform", prior="logistic"),
    ):
        codec = Codec(model)
        data, album = codec.compress(picture), [(str(i), picture) for i in range(4)]
        archive = pack(codec, album)
        for seed in range(2):
            torch.manual_seed(seed)
            with Noisy(codec, 0.1 * margin / STEPS):  # latents that are computed move with it
                assert torch.equal(codec.decompress(data), picture)
                assert all(torch.equal(x, picture) for _, x in Archive(codec, archive))
        with Noisy(codec, 0.1), pytest.raises(CodecError):
            codec.decompress(data)


def snapped(x: Tensor, latents: str = "none") -> np.ndarray:
    """All values that are rounded for x, by a model of the usual width, in grid steps."""
    seen: list[np.ndarray] = []
    plain = SideInformation.quantize

    def keep(self: SideInformation, value: np.ndarray, at: int | None = None) -> np.ndarray:
        seen.append(np.broadcast_to(value, value.shape).ravel().copy())
        return plain(self, value, at)

    if latents == "none":
        codec = Codec(fixed(width=0.25, image_shape=(3, 32, 32)))
    else:
        codec = Codec(gaussian(width=0.1, image_shape=(3, 32, 32), backbone="dense"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SideInformation, "quantize", keep)
        codec.push(x, ANSCoder())
    return np.concatenate(seen)


@pytest.mark.parametrize("latents", ["none", "all"])
def test_the_margin_is_a_thousand_times_what_computers_differ_by(tmp_path: Path, latents: str) -> None:
    """1 and 2 threads, with and without oneDNN, and a process without the usual vector instructions."""
    x = golden_picture((3, 32, 32))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = snapped(x, latents)
        torch.set_num_threads(2)
        others = [snapped(x, latents)]
        with torch.backends.mkldnn.flags(enabled=False):
            others.append(snapped(x, latents))
    finally:
        torch.set_num_threads(threads)
    script = (
        "import sys; sys.path.insert(0, 'tests'); from test_codec import *; "
        "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'; "
        "np.save(sys.argv[1], snapped(golden_picture((3, 32, 32)), sys.argv[2]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "values.npy"), latents], env=_PLAIN_CPU,
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    others.append(np.load(tmp_path / "values.npy"))
    differences = [np.abs(one - other).max() for other in others]
    assert differences[-1] > 0  # else nothing was tried
    assert 1000 * max(differences) < float64.MARGIN


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_what_a_cpu_wrote_and_the_other_way(picture: Tensor) -> None:
    mixtures = (
        gaussian("vae", "mog-local"),
        gaussian("selfvae-3", "mog-local"),
        gaussian("selfvae-3", "normal"),
    )
    for model in (fixed(), gaussian(), gaussian("vae"), *mixtures):
        here, there = Codec(model), Codec(copy.deepcopy(model).cuda())
        for a, b in ((here, there), (there, here)):
            assert torch.equal(a.decompress(b.compress(picture)), picture)
            album = [(str(i), picture) for i in range(3)]
            assert all(torch.equal(x, picture) for _, x in Archive(a, pack(b, album)))


def _golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "checksums.json").read_text())


_RESIDUAL = {"width": 0.03, "backbone": "residual"}
_DENSE = {"width": 0.03, "depth": 0.4, "backbone": "dense", "inner_elu": True}

# name: model and picture's size; "wide" has more positions than are coded at once, and several tiles
GOLDEN_FILES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "colour": ({}, (3, 13, 9)),
    "grey": ({}, (1, 13, 9)),
    "one-pixel": ({}, (3, 1, 1)),
    "wide": ({}, (3, 100, 500)),
    "quincunx": ({"name": "selfvae-quincunx", "shared": True}, (3, 13, 9)),
    "means": ({"name": "selfvae", "transforms": ("mean2",), **_DENSE}, (3, 9, 9)),
    "greyscale": ({"name": "selfvae", "transforms": ("grey",), **_DENSE}, (3, 9, 9)),
    "bits": ({"name": "selfvae", "transforms": ("bits3",), **_DENSE}, (3, 9, 9)),
    "raw": ({"name": "srvae", **_DENSE}, (3, 9, 9)),
    "latents": (
        {"name": "selfvae", "latents": "all", "posterior": "uniform", "prior": "logistic", **_DENSE},
        (3, 9, 9),
    ),
    "flow": ({"name": "selfvae", "latents": "all", "prior": "flow", **_DENSE}, (3, 21, 30)),
    "flow-plain": ({"name": "vae", "latents": "all", "prior": "flow", **_DENSE}, (3, 1, 1)),
    "mixture": ({"name": "selfvae-3", "latents": "all", "prior": "mog-local", **_DENSE}, (3, 21, 30)),
    "mixture-whole": (
        {"name": "vae", "latents": "all", "prior": "mog", "prior_components": 10, **_DENSE}, (3, 15, 16),
    ),
    # written when their priors were called "flow" and "mog"
    "residual-flow": (
        {"name": "selfvae", "latents": "all", "prior": "flow-residual", **_RESIDUAL}, (3, 21, 30),
    ),
    "residual-flow-plain": (
        {"name": "vae", "latents": "all", "prior": "flow-residual", **_RESIDUAL}, (3, 1, 1),
    ),
    "residual-mixture": (
        {"name": "selfvae-3", "latents": "all", "prior": "mog-local", **_RESIDUAL}, (3, 21, 30),
    ),
}  # fmt: skip
VERSION_1 = {"colour", "grey", "one-pixel", "wide"}  # the others' models are later ones


def golden_codec(name: str) -> Codec:
    return Codec(fixed(**GOLDEN_FILES[name][0]))


def golden_picture(shape: tuple[int, int, int]) -> Tensor:
    """Ramps with a little noise, by counting."""
    channels, height, width = shape
    i = torch.arange(channels * height * width).view(1, *shape)
    return ((i % width) + (i // width % height) * 2 + i * 7919 % 17).remainder(256).byte()


@pytest.mark.parametrize("name", list(GOLDEN_FILES))
@pytest.mark.parametrize("version", [1, 2])
def test_golden_files(version: int, name: str) -> None:
    file = GOLDEN / f"{version}/{name}.svae"
    if version == 1 and name not in VERSION_1:
        assert not file.exists()
        return
    assert read_header(file.read_bytes()).version == version
    x = golden_codec(name).decompress(file.read_bytes())
    assert [list(x.shape), zlib.crc32(x.numpy().tobytes())] == _golden()[name]


def golden_album(n: int) -> list[tuple[str, Tensor]]:
    return [(f"{i}.png", golden_picture((3, 4, 5 + i // 500)).roll(i, 3)) for i in range(n)]


@pytest.mark.parametrize(
    ("version", "file", "model", "n"),
    [
        (1, "all", "colour", 600),
        (2, "all", "colour", 600),
        (2, "drawn", "flow", 10),
        (2, "residual-drawn", "residual-flow", 10),
    ],
)
def test_golden_archives(version: int, file: str, model: str, n: int) -> None:
    archive = Archive(golden_codec(model), (GOLDEN / f"{version}/{file}.svaes").read_bytes())
    sums = [[name, zlib.crc32(x.numpy().tobytes())] for name, x in archive]
    assert sums == _golden()["archive"][:n] and len(sums) == n


def test_golden_files_with_other_instructions() -> None:
    """Another process whose vector instructions are switched off."""
    script = (
        "import sys, zlib; sys.path.insert(0, 'tests'); import torch; from test_codec import *; "
        "assert torch.backends.cpu.get_cpu_capability() == 'DEFAULT'; "
        "names = ['colour', 'latents', 'flow', 'flow-plain', 'mixture', 'mixture-whole', 'quincunx']; "
        "[test_golden_files(2, name) for name in names]; test_golden_archives(2, 'drawn', 'flow', 10); "
        "print('ok')"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        env=_PLAIN_CPU,
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert out.stdout.strip() == "ok", out.stderr


# --- damage -------------------------------------------------------------------------------------------


def _mutations(data: bytes) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    for _ in range(1200):  # flipped bits, one to three
        changed = bytearray(data)
        for at in rng.integers(0, 8 * len(data), rng.integers(1, 4)):
            changed[at // 8] ^= 1 << at % 8
        yield "flip", bytes(changed)
    for _ in range(400):
        yield "cut", data[: rng.integers(0, len(data))]
    for _ in range(200):  # a byte lost, doubled, replaced in the header
        at = int(rng.integers(0, 80))
        yield "lost", data[:at] + data[at + 1 :]
        yield "doubled", data[:at] + data[at : at + 1] + data[at:]
        yield "replaced", data[:at] + bytes([rng.integers(256)]) + data[at + 1 :]


@pytest.mark.parametrize("which", ["halve", "gaussian"])
def test_2000_damaged_files(which: str, picture: Tensor) -> None:
    codec = _CODECS[which]
    data = codec.compress(picture)
    refused = count = 0
    for kind, damaged in _mutations(data):
        if damaged == data:
            continue
        count += 1
        for partial in (False, True):
            try:
                x = codec.decompress(damaged, partial=partial)
            except CodecError as error:
                refused += not partial
                assert str(error)
            else:
                assert partial and kind == "cut" and x.shape == picture.shape, kind
    assert refused == count and count >= 2000


@pytest.mark.parametrize(
    ("name", "prior"),
    [("vae", "flow"), ("selfvae", "flow"), ("selfvae-3", "mog-local"), ("selfvae", "normal")],
)
def test_forged_latents(name: str, prior: str, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that was made up, with all checksums right: a picture or a message, nothing else."""
    codec = Codec(gaussian(name, prior))
    data = codec.compress(picture[:, :, :8, :8])
    header, rng = read_header(data), np.random.default_rng(0)
    monkeypatch.setattr("selfvae.codec.progressive._sum", lambda value: 0)
    parts = tuple(Part(part.name, part.notes, part.words, 0) for part in header.parts)
    for i in range(60):
        payload = bytearray(data[header.size :])
        if i % 3 == 0:
            payload = bytearray(rng.bytes(len(payload)))
        elif i % 3 == 1:
            at = int(rng.integers(len(payload)))
            payload[at : at + 16] = b"\xff" * len(payload[at : at + 16])
        else:
            payload[int(rng.integers(len(payload)))] ^= 1 << int(rng.integers(8))
        forged = Header(**{**header.__dict__, "parts": parts}).to_bytes(bytes(payload)) + bytes(payload)
        with contextlib.suppress(CodecError):
            assert codec.decompress(forged).shape == (1, 3, 8, 8)


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
    notes = varint(2**62)
    parts = (Part("y4", len(notes), 0, 0), *(Part("y0", 0, 0, 0) for _ in header.parts[1:]))
    forged = Header(header.fingerprint, 3, 256, 24, 32, parts).to_bytes(notes) + notes
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
    at = header.size + header.parts[0].notes
    payload = data[header.size : at] + bytes(4) + data[at + 4 :]
    for damaged in (header.to_bytes(payload) + payload, (data[: header.size] + payload)[:-1]):
        with pytest.raises(CodecError, match="begins with zeros"):
            codec.decompress(damaged, partial=True)


def test_too_large_and_too_many(codec: Codec, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 - 1)
    with pytest.raises(ValueError, match="24 x 32 pixels are more than 767"):
        codec.compress(picture)
    with pytest.raises(ValueError, match="at most 64 components"):
        Codec(fixed(components=65))
    with pytest.raises(ValueError, match="no config"):
        Codec(selfvae.SelfVAE(fixed().levels))


def test_the_coder_s_words_stay_what_they_are() -> None:
    """The format depends on how the package rescales probabilities."""
    p = (np.arange(20_000, dtype=np.int64) * 104729) % ((1 << 24) - 1) + 1
    encoder = ANSCoder()
    encoder.bits(p, np.arange(20_000) * 7919 % 16_777_259 < p)
    encoder.push()
    assert zlib.crc32(encoder.words().astype("<u4").tobytes()) == _golden()["words"]
    assert uniform_words() == _golden()["uniform"]


def uniform_words() -> int:
    stack, i = ANSCoder(), np.arange(20_000, dtype=np.int64)
    sizes = np.array([2, 3, 13, 17, 75, 223_635, 1 << 18])[i % 7]
    stack.uniform(sizes, i * 7919 % sizes)
    stack.push()
    words = stack.words()
    assert np.array_equal(ANSCoder(words).uniform(sizes), i * 7919 % sizes)
    return zlib.crc32(words.astype("<u4").tobytes())


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
    with pytest.raises(ValueError, match="levels 0 to 7"):
        Codec(fixed(num_values=8)).compress(picture)


def test_fingerprints() -> None:
    model, other = fixed(), fixed()
    assert fingerprint(model) == fingerprint(other) == fingerprint(fixed().double())
    next(other.parameters()).data[0] += 1e-3
    assert fingerprint(other) != fingerprint(model)
    assert fingerprint(model).hex() == _golden()["fingerprint"]


# --- archives -----------------------------------------------------------------------------------------


def _album(picture: Tensor) -> list[tuple[str, Tensor]]:
    """Ten pictures: some alike in size, some grey, one of a pixel."""
    album = [(f"deep/{i}.png", (picture.int() + i).clamp(max=255).byte()) for i in range(6)]
    album.insert(2, ("grey.png", picture[:, :1]))
    album += [("small.jpg", picture[:, :, :5, :7]), ("one.png", picture[:, :, :1, :1])]
    return [*album, ("grey small.png", picture[:, :1, :5, :7])]


@pytest.mark.parametrize("block", [1, 3, 64])
def test_archives(codec: Codec, picture: Tensor, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    album = _album(picture)
    data = pack(codec, album, block=block)
    archive = Archive(codec, data)
    assert len(archive) == 10 and [entry.name for entry in archive.entries] == [name for name, _ in album]
    for (name, x), (found, back) in zip(album, archive, strict=True):
        assert name == found and torch.equal(x, back)
    decoded = 0
    monkeypatch.setattr(codec, "pop", lambda *args, **how: (_count(), Codec.pop(codec, *args, **how))[1])

    def _count() -> None:
        nonlocal decoded
        decoded += 1

    assert torch.equal(archive["grey.png"], album[2][1]) and torch.equal(archive[9], album[9][1])
    assert decoded == {1: 2, 3: 3, 64: 8}[block]  # groups of one size, no further than needed
    with pytest.raises(KeyError, match="no picture 'x'"):
        archive["x"]
    with pytest.raises(IndexError, match="holds 10 pictures"):
        archive[10]


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


def test_an_archive_is_as_long_as_the_scores(codec: Codec, picture: Tensor) -> None:
    album = [(str(i), (picture.int() + i).clamp(max=255).byte()) for i in range(40)]
    model = fixed()
    ideal = sum(bits(model, x) for _, x in album)
    data = pack(codec, album, verify=False)
    index = 21 + int.from_bytes(data[13:17], "little")
    assert 8 * (len(data) - index) == pytest.approx(ideal, rel=0.003, abs=200)
    assert index < 40 * 12


def test_damaged_archives(codec: Codec, picture: Tensor) -> None:
    data, album = pack(codec, _album(picture), block=4, verify=False), _album(picture)
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        at = int(rng.integers(len(data)))
        changed[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(CodecError):
            list(Archive(codec, bytes(changed)))
        with pytest.raises(CodecError):
            list(Archive(codec, data[:at]))
    # one damaged block leaves the others
    changed = bytearray(data)
    changed[-1] ^= 1
    assert torch.equal(Archive(codec, bytes(changed))[0], album[0][1])
    for wrong in (b"", b"SVAE" + data[4:], data[:4] + b"\x03" + data[5:], data + b"x"):
        with pytest.raises(CodecError):
            Archive(codec, wrong)
    with pytest.raises(CodecError, match="another model"):
        Archive(Codec(fixed(components=2)), data)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pictures": [["../../etc/x", 1, 1, 3, 0]]}, "path inside the archive"),
        ({"pictures": [["/x", 1, 1, 3, 0]]}, "path inside the archive"),
        ({"pictures": [["x", 2**20, 2**20, 3, 0]]}, "are more than"),
        ({"pictures": [["x", 0, 1, 3, 0]]}, "makes no sense"),
        ({"pictures": [["x", 1]]}, "makes no sense"),
        ({"pictures": 3}, "makes no sense"),
        ({"pictures": []}, "do not hold its pictures"),
        ({"blocks": [[1, -5, 0], [0, 5, 0]]}, "do not hold|bytes long"),
        ({"levels": 8}, "does not fit the model"),
        ({"levels": math.inf}, "makes no sense"),
        ({"pictures": [["x", 24, 32, 4, 0]]}, "does not fit the model"),
        ({"pictures": [["C:/x", 24, 32, 3, 0]]}, "path inside the archive"),
        ({"pictures": [["a/./b", 24, 32, 3, 0]]}, "path inside the archive"),
        ({"pictures": [["x", 24, 32, 3, 0], ["x", 24, 32, 3, 0]]}, "name of its own"),
    ],
)
def test_hostile_indices(codec: Codec, picture: Tensor, changes: dict[str, Any], words: str) -> None:
    data = pack(codec, [("x", picture)], verify=False)
    size = int.from_bytes(data[13:17], "little")
    index = json.loads(zlib.decompress(data[21 : 21 + size]))
    for text in (json.dumps({**index, **changes}), "[" * 200_000):
        packed = zlib.compress(text.encode())
        crc = zlib.crc32(packed, zlib.crc32(data[:13]))
        head = len(packed).to_bytes(4, "little") + crc.to_bytes(4, "little")
        with pytest.raises(CodecError, match=words if text[0] == "{" else "makes no sense"):
            Archive(codec, data[:13] + head + packed + data[21 + size :])


def test_what_cannot_be_packed(codec: Codec, picture: Tensor) -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        pack(codec, [("a", picture), ("a", picture)])
    with pytest.raises(ValueError, match="path inside"):
        pack(codec, [("../a", picture)])
    with pytest.raises(ValueError, match="at least 1"):
        pack(codec, [("a", picture)], block=0)
    assert len(Archive(codec, pack(codec, []))) == 0


def test_archive_commands(picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selfvae.save(fixed(), tmp_path / "run")
    run = ["--model", str(tmp_path / "run")]
    for name, x in _album(picture):
        if name != "small.jpg":
            target = tmp_path / "in" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            selfvae.data.pictures.write(x[0], target)
    file = tmp_path / "all.svaes"
    assert main(["pack", str(tmp_path / "in"), str(file), *run]) == 0
    assert f"9 pictures in {file}: {file.stat().st_size} bytes" in capsys.readouterr().out
    assert main(["unpack", str(file), str(tmp_path / "out"), *run]) == 0
    before, after = (
        {f.relative_to(root).as_posix(): f for root in [tmp_path / where] for f in root.rglob("*.png")}
        for where in ("in", "out")
    )
    assert before.keys() == after.keys() and len(before) == 9
    for name, one in before.items():
        a, b = Image.open(one), Image.open(after[name])
        assert a.mode == b.mode and a.tobytes() == b.tobytes()
    assert main(["unpack", str(file), str(tmp_path / "one"), "--only", "deep/3.png", *run]) == 0
    assert [f.name for f in (tmp_path / "one").rglob("*.png")] == ["3.png"]
    assert main(["unpack", str(file), str(tmp_path / "one"), "--only", "x", *run]) == 2
    assert main(["info", str(file)]) == 2
    names = ["a.jpg", "a.gif", "a.jpg.png"]
    x = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    file.write_bytes(pack(Codec(fixed()), [(name, x) for name in names]))
    assert main(["unpack", str(file), str(tmp_path / "clash"), *run]) == 2
    assert "would become" in capsys.readouterr().err and not (tmp_path / "clash").exists()
    assert main(["unpack", str(file), str(tmp_path / "b"), "--only", "a.gif", *run]) == 0
    assert main(["pack", str(tmp_path / "in"), str(tmp_path / "a.zip"), *run]) == 2
    assert main(["pack", str(tmp_path / "in" / "one.png"), str(file), *run]) == 2


# --- Pillow and the command line ------------------------------------------------------------------------


def test_pillow(codec: Codec, picture: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_codecs", {})
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    with pytest.raises(CodecError, match="which model"):
        image.save(tmp_path / "x.svae")
    use(fixed())
    image.save(tmp_path / "x.svae")
    image.convert("L").save(tmp_path / "grey.svae")
    opened = Image.open(tmp_path / "x.svae")
    assert (opened.format, opened.mode, opened.size) == ("SVAE", "RGB", image.size)
    assert opened.tobytes() == image.tobytes()
    assert Image.open(tmp_path / "grey.svae").tobytes() == image.convert("L").tobytes()
    with pytest.raises(OSError, match="cannot write mode RGBA"):
        image.convert("RGBA").save(tmp_path / "alpha.svae")
    data = (tmp_path / "x.svae").read_bytes()
    with pytest.raises(CodecError, match="cut short"):
        Image.open(io.BytesIO(data[:-9])).load()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert Image.open(io.BytesIO(data[:-9])).size == image.size
    Image.open(io.BytesIO(data[:-9])).load()
    plugin._codecs.clear()
    with pytest.raises(CodecError, match="needs the model"):
        Image.open(tmp_path / "x.svae").load()


def test_commands(picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selfvae.save(fixed(), tmp_path / "run")
    run = ["--model", str(tmp_path / "run")]
    pictures = tmp_path / "in"
    (pictures / "deep").mkdir(parents=True)
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    image.save(pictures / "a.png")
    image.convert("L").save(pictures / "deep" / "b.png")
    packed, back = tmp_path / "packed", tmp_path / "back"
    assert main(["compress", str(pictures), str(packed), *run]) == 0
    assert main(["decompress", str(packed), str(back), *run]) == 0
    for name in ("a.png", "deep/b.png"):
        one, two = Image.open(pictures / name), Image.open(back / name)
        assert one.mode == two.mode and one.tobytes() == two.tobytes()
    file = packed / "a.svae"
    capsys.readouterr()
    assert main(["info", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    parts = [value for key, value in told.items() if key[0] == "y"]
    assert told["header_bytes"] + sum(parts) == told["bytes"] == file.stat().st_size and len(parts) == 5
    assert main(["decompress", str(file), str(tmp_path / "y2.png"), "--upto", "y2", *run]) == 0
    assert Image.open(tmp_path / "y2.png").size == (16, 12)
    short = tmp_path / "short.svae"
    short.write_bytes(file.read_bytes()[:-200])
    assert main(["info", str(short)]) == 0
    assert "missing_bytes" in capsys.readouterr().out
    assert main(["decompress", str(short), str(tmp_path / "s.png"), *run]) == 2
    assert "--partial" in capsys.readouterr().err and not (tmp_path / "s.png").exists()
    assert main(["decompress", str(short), str(tmp_path / "s.png"), "--partial", *run]) == 0
    # what would lose something is refused
    image.putalpha(100)
    image.save(pictures / "alpha.png")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(pictures / "deep.png")
    (pictures / "deep.ppm").write_bytes(b"P6 1 1 65535\n" + bytes(6))
    (pictures / "ten.ppm").write_bytes(b"P6 1 1 1023\n" + bytes(6))
    (pictures / "bomb.pgm").write_bytes(b"P5 20000 20000 255\n")
    (pictures / "short.pgm").write_bytes(b"P5 100 100 255\n")
    image.convert("CMYK").save(pictures / "cmyk.tif")
    image.convert("P").save(pictures / "two.gif", save_all=True, append_images=[image.rotate(90)])
    for name, words in (
        ("alpha.png", "alpha channel"), ("deep.png", "than 8 bits"), ("deep.ppm", "than 8 bits"),
        ("ten.ppm", "than 8 bits"), ("bomb.pgm", "cannot be read"), ("short.pgm", "cannot be read"),
        ("cmyk.tif", "neither grey nor RGB"), ("two.gif", "holds 2 pictures"),
    ):  # fmt: skip
        assert main(["compress", str(pictures / name), str(tmp_path / "x.svae"), *run]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "x.svae").exists()
    assert main(["compress", str(pictures / "a.png"), str(tmp_path / "x.png"), *run]) == 2
    assert "ends in .svae" in capsys.readouterr().err


def test_an_index_that_could_not_be_read_is_not_written(
    codec: Codec, picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfvae.codec import archive

    monkeypatch.setattr(archive, "_INDEX", 200)
    with pytest.raises(ValueError, match="too many for one archive"):
        pack(codec, [("a" * 200, picture)])
    with pytest.raises(ValueError, match=r"^b.png: expected one picture"):
        pack(codec, [("b.png", picture[:, :2])])


def test_a_format_that_cannot_hold_a_picture_is_left_out(
    codec: Codec, picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfvae.codec import bench

    def file(image: Image.Image, format: str, options: dict[str, Any]) -> bytes:
        if format == "WEBP":
            raise ValueError("too large")
        return whole(image, format, options)

    whole = bench._file
    monkeypatch.setattr(bench, "_file", file)
    with pytest.warns(UserWarning, match="WebP is left out: too large"):
        result = bench.bench(codec, [picture, picture], prefixes=False)
    assert {"PNG", "selfvae"} <= set(result["lossless"]) and "WebP" not in result["lossless"]
