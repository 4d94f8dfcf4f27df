"""Latents: bits-back coding, rate-optimised latents, integer flows."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from codec_models import fixed, gaussian, mean_bits
from torch import Tensor

import selfvae
from selfvae.codec import (
    Archive,
    Codec,
    pack,
    read_header,
)
from selfvae.codec.ans import ANSCoder
from selfvae.codec.float64.latents import Coding, Gaussian, InsufficientBits, Mode, _Integers, _noise
from selfvae.codec.float64.quantization import SideInformation
from selfvae.distributions.latents import DiagonalNormal
from selfvae.operations import variables

pytestmark = pytest.mark.slow  # formats 1 and 2, which change no more; the golden files hold them
_PRIORS = ("normal", "mog-local", "flow", "flow-residual")


@pytest.mark.parametrize("name", ["vae", "selfvae", "selfvae-mean-3lvl"])
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
    for (_, a), (_, b) in zip(album, Archive(codec, pack(codec, album, verify=False)), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr("selfvae.codec.float64.pictures._TILE", 8)
    monkeypatch.setattr("selfvae.codec.float64.pictures._MARGIN", 3)
    assert torch.equal(codec.decompress(codec.compress(x, verify=False)), x)


def codec_input(codec: Codec, x: Tensor) -> Tensor:
    """Padded."""
    found = selfvae.infer(codec.model, x, "y0")["y0"]
    assert found.shape[2:] == codec.padded(*x.shape[2:])
    return found


@pytest.mark.parametrize("prior", _PRIORS)
@pytest.mark.parametrize("name", ["vae", "selfvae", "selfvae-mean-3lvl"])
def test_gaussian_latents(name: str, prior: str, picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single files near the bound, exact prefixes, cut files, albums of plain and other pictures, tiles."""
    model = gaussian(name, prior)
    x, codec = picture[:, :, :21, :30], Codec(model)
    data = codec.compress(x)  # decodes it and compares
    header = read_header(data)
    assert [part.name for part in header.parts] == variables(model)
    assert 8 * (len(data) - header.size) < 1.06 * mean_bits(model, codec_input(codec, x)) + 100
    images = {f"y{k}": codec.decompress(data, f"y{k}") for k in range(1, len(model.levels))}
    for key, found in images.items():
        y = selfvae.infer(model, x, key)[key]
        assert torch.equal(found, y[:, :, : found.shape[2], : found.shape[3]])
    for i, part in enumerate(header.parts[1:], 1):
        cut = data[: header.size + sum(p.size for p in header.parts[:i])]
        assert codec.decompress(cut, partial=True).shape == x.shape, part.name
        held = [p.name for p in header.parts[:i] if p.name[0] == "y"]
        if held:  # coarser images are held by shorter prefixes
            found = codec.decompress(cut, held[-1], partial=True)
            assert torch.equal(found, images[held[-1]])
    assert name == "vae" or header.parts[-1].words > 20  # the last part has some of its own
    black = torch.zeros_like(x)
    album = [("a", x), ("b", x.flip(3)), ("c", x[:, :, :3]), *((str(i), black) for i in range(5))]
    for (_, a), (_, b) in zip(album, Archive(codec, pack(codec, album, verify=False)), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr("selfvae.codec.float64.pictures._TILE", 8)
    monkeypatch.setattr("selfvae.codec.float64.pictures._MARGIN", 3)
    assert torch.equal(codec.decompress(codec.compress(x, verify=False)), x)


def how_coded(codec: Codec, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """How the latents of a picture are coded: "drawn", "rounded" or "rate-optimised"."""
    modes: list[str] = []
    plain = Gaussian.code

    def code(prior: Any, shape: Any, stack: Any, side: Any, known: Any) -> Any:
        modes.append(known.coding.mode.value)
        return plain(prior, shape, stack, side, known)

    with monkeypatch.context() as patch:
        patch.setattr(Gaussian, "code", code)
        codec.push(x, ANSCoder())
    latents = [name for name in reversed(codec.names) if name[0] == "z"]
    return dict(zip(latents, modes[-len(latents) :], strict=True))  # of the last attempt


def test_codings_and_their_numbers_in_the_file() -> None:
    numbers = {Coding.from_int(i): i for i in range(17)}
    assert len(numbers) == 17 and all(coding.to_int() == i for coding, i in numbers.items())
    assert numbers[Coding(Mode.DRAWN, 7)] == 7 and numbers[Coding(Mode.ROUNDED, 0)] == 9
    assert numbers[Coding(Mode.RATE_OPTIMISED)] == 8 and Coding(Mode.ROUNDED, 3).step == 1 / 8


def test_which_latents_are_drawn(picture: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a picture's own bits suffice for; plain pictures take coarser grids, or none."""
    codec = Codec(gaussian("selfvae", "normal"))
    rich = how_coded(codec, picture, monkeypatch)
    assert rich == {"z0": "rate-optimised", "z1": "drawn"}
    draw = Gaussian.draw
    for dry, expected in (
        (1.0, "drawn"),
        (2.0, "rate-optimised"),
    ):  # as if the stack were too small for steps below
        seen = []

        def tried(q: Any, stack: Any, side: Any, fine: float, dry: float = dry, seen: Any = seen) -> Any:
            seen.append(fine)
            if fine < dry:
                raise InsufficientBits
            return draw(q, stack, side, fine)

        with monkeypatch.context() as patch:
            patch.setattr(Gaussian, "draw", tried)
            found = how_coded(codec, picture, monkeypatch)
        assert found["z1"] == expected and seen == 2 * [0.25, 0.5, 1.0]
    flow = Codec(gaussian("vae", "flow"))
    assert how_coded(flow, picture, monkeypatch)["z0"] == "rounded"
    assert how_coded(flow, torch.zeros_like(picture)[:, :, :4, :4], monkeypatch)["z0"] == "rate-optimised"


def test_noise_is_the_same_whatever_torch_is_told() -> None:
    plain = _noise((1, 1, 1400, 1400))
    assert plain.isfinite().all() and plain.mean().abs() < 0.01 and (plain.std() - 1).abs() < 0.01
    kept = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(plain, _noise((1, 1, 1400, 1400)))
    finally:
        torch.set_default_dtype(kept)


@pytest.mark.parametrize(
    ("name", "prior"),
    [
        *(("vae", prior) for prior in ("mog", *_PRIORS)),
        ("selfvae-mean-3lvl", "mog"),
        *(("selfvae-mean-3lvl", prior) for prior in _PRIORS),
    ],
)
def test_bits_back_costs_the_bound(name: str, prior: str, picture: Tensor) -> None:
    """An archive is as long as the ELBO says, to 1%: the latents' bits come back."""
    model = gaussian(name, prior)
    codec = Codec(model)
    images = [picture[:, :, i % 8 : i % 8 + 16, i // 8 * 4 : i // 8 * 4 + 16] for i in range(32)]
    data = pack(codec, [(str(i), x.contiguous()) for i, x in enumerate(images)], verify=False)
    index = 21 + int.from_bytes(data[13:17], "little")
    ideal = 32 * mean_bits(model, torch.cat(images))
    assert 8 * (len(data) - index) == pytest.approx(ideal, rel=0.01, abs=200)


@pytest.mark.parametrize("grid", [1.0, 2.0**-7])
def test_a_flow_of_whole_numbers_is_one_to_one(grid: float) -> None:
    model = gaussian().double()
    level, rng = model.levels[-1], np.random.default_rng(0)
    prior = level.prior(model.blank(2, 32, 32), None)
    v = torch.from_numpy(rng.integers(-500, 500, prior.shape))
    words = rng.integers(1, 2**31, 4000).astype(np.uint32)
    stack, side = ANSCoder(words), SideInformation()
    with torch.no_grad():
        noise = prior.flow.walk(v, _Integers(prior.flow, prior.device, grid, v.numel(), stack, side).there)
        exact = prior.flow(v.double() * grid)
        assert (noise - exact[0] / grid).abs().max() < (100 if grid == 1 else 40)  # rounded ten times
        spent = 32 * (len(words) - len(stack.words()))
        assert spent == pytest.approx(exact[1].sum().item() / math.log(2), rel=0.1, abs=100)
        again = SideInformation(side.tobytes())
        back = prior.flow.walk_back(
            noise, _Integers(prior.flow, prior.device, grid, v.numel(), stack, again).back
        )
    assert torch.equal(back, v) and np.array_equal(stack.words(), words)


def test_a_latent_is_drawn_as_its_posterior_says() -> None:
    """Popping from random words is drawing; giving back restores these words."""
    mean = torch.linspace(-100, 100, 40_000).double().view(1, 1, 200, 200)
    q = DiagonalNormal(mean, torch.full_like(mean, -math.log(16)))  # a scale of 1/4
    words = np.random.default_rng(0).integers(1, 2**31, 40_000).astype(np.uint32)
    stack, side = ANSCoder(words), SideInformation()
    latent = Gaussian.draw(q, stack, side)
    t = 4 * (latent.z - mean)
    assert latent.drawn and t.mean().abs() < 0.02 and (t.std() - 1).abs() < 0.02 and t.abs().max() < 6.1
    Gaussian.give_back(q, stack, SideInformation(side.tobytes()), latent)
    assert np.array_equal(stack.words(), words)
    with pytest.raises(InsufficientBits):
        Gaussian.draw(q, ANSCoder(words[-100:]), SideInformation())
