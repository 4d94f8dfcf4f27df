import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import selfvae
from selfvae import hub
from selfvae.distributions.latents import DiagonalNormal
from selfvae.level import Level
from selfvae.metrics.bounds import iwae
from selfvae.model import SelfVAE, describe, spread_levels
from selfvae.operations import complete, enhance, generate, reconstruct
from selfvae.presets import PRESETS, configure
from selfvae.terms import Terms, bits_per_dim
from selfvae.transforms import ImageSpec, Null

TINY = {"size": "tiny", "width": 0.06, "components": 2}


def build(name: str, images: torch.Tensor, **overrides: object) -> SelfVAE:
    model = selfvae.build(name, image_shape=tuple(images.shape[1:]), **{**TINY, **overrides})  # type: ignore[arg-type]
    model.initialise(images)
    return model


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_scores_learns_and_samples(name: str, images: torch.Tensor) -> None:
    model = build(name, images)
    terms = model(images)
    levels = len(model.levels)
    assert isinstance(terms, Terms) and len(terms.re) == len(terms.kl) == levels
    assert terms.elbo.shape == (4,) and terms.elbo.isfinite().all()
    assert torch.allclose(-terms.elbo, sum(terms.re) + sum(terms.kl))
    terms.elbo.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    drawn = generate(model, 3, 16, 16, seed=1)
    assert drawn.shape == (3, 3, 16, 16) and drawn.dtype == torch.uint8
    assert torch.equal(drawn, generate(model, 3, 16, 16, seed=1))


@pytest.mark.parametrize("name", list(PRESETS))
def test_all_given_returns_the_image(name: str, images: torch.Tensor) -> None:
    model = build(name, images)
    ys = model.pyramid(images)
    given = {f"y{k}": y for k, y in enumerate(ys)}
    assert torch.equal(complete(model, given, (4, 16, 16))["y0"], images)
    assert torch.equal(reconstruct(model, images, {"y0"}), images)


@pytest.mark.parametrize(
    "name",
    ["selfvae", "selfvae-mean-3lvl", "selfvae-grey", "selfvae-bits", "selfvae-halve", "selfvae-quincunx"],
)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_enhancements_agree_with_what_was_given(
    name: str, temperature: float, images: torch.Tensor
) -> None:
    model = build(name, images)
    for k in range(1, len(model.levels)):
        y = model.pyramid(images)[k]
        x = enhance(model, y, k, temperature=temperature, seed=0)
        assert torch.equal(model.pyramid(x)[k], y)


@pytest.mark.parametrize("latents", ["all", "top", "none"])
@pytest.mark.parametrize("name", ["selfvae-halve", "selfvae-quincunx", "selfvae-mean-3lvl", "srvae"])
def test_latents_are_optional(name: str, latents: str, images: torch.Tensor) -> None:
    model = build(name, images, latents=latents)
    have = [level.has_latent for level in model.levels]
    assert have == [latents == "all" or (latents == "top" and k == len(have) - 1) for k in range(len(have))]
    terms = model(images)
    for has, kl in zip(have, terms.kl, strict=True):
        assert (kl != 0).tolist() == [has] * len(images)
    generate(model, 2, 16, 16)


def test_a_shared_decoder_is_one(images: torch.Tensor, tmp_path: Path) -> None:
    """The levels of one transform share their weights, not their codes; so do copies, and files."""
    alone, model = (build("selfvae-quincunx", images, shared=shared) for shared in (False, True))
    count = {m: sum(p.numel() for p in m.parameters()) for m in (alone, model)}
    assert count[model] < 0.6 * count[alone]
    hub.save(model, tmp_path)
    for net in (model, copy.deepcopy(model), hub.load(tmp_path)):
        first, second, third, *_ = (level.decoder for level in net.levels)
        assert first.decoder is third.decoder and first.decoder is not second.decoder
        assert first.code is not third.code
        assert torch.equal(net(images).elbo, model(images).elbo)
    with torch.no_grad():
        before = model.score(model.pyramid(images), {}).re
        model.levels[2].decoder.code.add_(1.0)
        after = model.score(model.pyramid(images), {}).re
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [k == 2 for k in range(len(changed))]
    with pytest.raises(ValueError, match="shared=true needs latents=none"):
        build("selfvae", images, shared=True)
    broken = load_file(tmp_path / "model.safetensors")
    broken.pop("levels.0.decoder.decoder.head.gain")
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="Missing key"):
        hub.load(tmp_path)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_channels(channels: int) -> None:
    x = torch.randint(0, 256, (2, channels, 8, 12), dtype=torch.uint8)
    model = build("selfvae", x, prior="mog")
    assert generate(model, 2, 8, 12).shape == x.shape
    assert model(x).elbo.isfinite().all()


@pytest.mark.parametrize("name", ["selfvae", "selfvae-mean-3lvl", "srvae", "selfvae-halve"])
def test_all_pixels_of_a_block_at_once(name: str, images: torch.Tensor, tmp_path: Path) -> None:
    options = {"latents": "none", "backbone": "residual", "coefficients": "residual"}
    model = build(name, images, subpixel=True, **options)
    # pixels that are kept need no other decoder
    assert [level.subpixel for level in model.levels[:-1]] == [name != "selfvae-halve"] * (
        len(model.levels) - 1
    )
    terms = model(images, errors=True)
    assert len(terms.errors) == len(model.levels) - 1 and terms.errors[0].shape == (len(images),)
    sum(error.mean() for error in terms.errors).backward()  # type: ignore[union-attr]
    ys = model.pyramid(images)
    for k, level in enumerate(model.levels[:-1]):
        x = enhance(model, ys[k + 1], k + 1, decode="mean", seed=0)
        assert not level.consistent or torch.equal(level.transform(model.pyramid(x)[k]), ys[k + 1])
    selfvae.save(model, tmp_path)
    again = selfvae.load(tmp_path)
    assert torch.equal(again(images).elbo, model.eval()(images).elbo)
    with pytest.raises(ValueError, match="subpixel=true needs latents=none"):
        configure(name, subpixel=True, latents="all")


def test_other_sizes_than_built_for(images: torch.Tensor) -> None:
    model = build("selfvae", images)
    wide = images.repeat(1, 1, 2, 3)
    assert model(wide).elbo.isfinite().all()
    assert generate(model, 1, 32, 48).shape == (1, 3, 32, 48)
    with pytest.raises(ValueError, match="divisible by 2"):
        model(images[:, :, :15])


def test_a_plain_vae_written_by_hand(images: torch.Tensor) -> None:
    """K = 0 with a normal prior is -ln p(x|z) + KL, as one writes it."""
    model = build("vae-normal", images)
    level: Level = model.levels[0]
    torch.manual_seed(3)
    terms = model(images)
    torch.manual_seed(3)
    assert level.encoder is not None
    mean, raw = level.encoder(images.float() / 127.5 - 1).chunk(2, 1)
    log_var = 7 * torch.tanh(raw / 7)
    z = mean + torch.exp(log_var / 2) * torch.randn(mean.shape)
    q = torch.distributions.Normal(mean, torch.exp(log_var / 2)).log_prob(z).sum((1, 2, 3))
    p = torch.distributions.Normal(0, 1).log_prob(z).sum((1, 2, 3))
    likelihood = level.likelihood(images[:, :0], z).log_prob(images)
    assert torch.allclose(terms.kl[0], q - p, rtol=1e-4, atol=1e-3)
    assert torch.allclose(terms.elbo, likelihood - (q - p), rtol=1e-4)


class _LinearGaussian(Level):
    """x = W z + noise, with the exact posterior: the bound is ln p(x) at every draw."""

    def __init__(self, weight: torch.Tensor, noise: float) -> None:
        super().__init__(
            ImageSpec(1), Null(), torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()
        )
        self.weight, self.noise = torch.nn.Parameter(weight), noise

    def prior(self, y_up, z_up):  # type: ignore[no-untyped-def]
        zeros = torch.zeros(y_up.shape[0], self.weight.shape[1], 1, 1)
        return DiagonalNormal(zeros, zeros)

    def likelihood(self, y_up, z):  # type: ignore[no-untyped-def]
        mean = (z.flatten(1) @ self.weight.T)[:, :, None, None]
        return DiagonalNormal(mean, torch.full_like(mean, math.log(self.noise**2)))


def test_the_bound_of_a_linear_gaussian_model_is_exact() -> None:
    weight, noise = torch.linalg.qr(torch.randn(5, 2)).Q * torch.tensor([2.0, 0.5]), 0.3
    model = SelfVAE([_LinearGaussian(weight, noise)])
    x = torch.randn(6, 5)
    # orthogonal columns: the posterior is diagonal
    precision = 1 + weight.square().sum(0) / noise**2
    mean = (x @ weight) / noise**2 / precision
    q = DiagonalNormal(mean[:, :, None, None], -torch.log(precision).expand(6, 2)[:, :, None, None])
    covariance = weight @ weight.T + noise**2 * torch.eye(5)
    exact = torch.distributions.MultivariateNormal(torch.zeros(5), covariance).log_prob(x)
    terms = model.score([x[:, :, None, None]], {"z0": q})
    assert torch.allclose(terms.elbo, exact, atol=1e-3)
    wrong = DiagonalNormal(q.mean + 0.3, q.log_var)
    assert (model.score([x[:, :, None, None]], {"z0": wrong}).elbo.mean() < exact.mean() - 0.01).item()


@pytest.mark.parametrize("name", ["vae-normal", "srvae", "selfvae-mean-3lvl"])
def test_iwae_grows_with_the_draws(name: str, images: torch.Tensor) -> None:
    side = 16 if name == "selfvae-mean-3lvl" else 8
    x = images[:2, :, :side, :side]
    model = build(name, x)
    for level in model.levels:  # posteriors as far from the truth as the prior, so that there is a gap
        torch.nn.init.normal_(level.encoder.head.direction, std=2.0)
    torch.manual_seed(0)
    with torch.no_grad():
        elbo = model(x.repeat(60, 1, 1, 1)).elbo
        ten = iwae(model, x.repeat(12, 1, 1, 1), 10, batch=240)
        fifty = iwae(model, x.repeat(4, 1, 1, 1), 50, batch=200)
    assert elbo.mean() < ten.mean() < fifty.mean()
    assert iwae(model, x, 1).shape == (2,)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        iwae(model, x, 0)


def test_iwae_is_the_mean_weight_per_image(images: torch.Tensor) -> None:
    """Against a plain loop over images and draws."""
    model = build("srvae", images)
    torch.manual_seed(5)
    rows = []
    for x in images.split(1):
        ys = model.pyramid(x)
        posteriors = model.posteriors(ys)
        rows.append(torch.stack([model.score(ys, posteriors).elbo[0] for _ in range(6)]))
    weights = torch.stack(rows, 1).double()
    torch.manual_seed(5)
    bound = iwae(model, images, 6, batch=1)
    largest = weights.max(0).values
    mean = torch.exp(weights - largest).mean(0)
    assert torch.allclose(bound, torch.log(mean) + largest, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["dense", "residual"])
def test_draws_do_not_depend_on_the_memory_layout(images: torch.Tensor, backbone: str) -> None:
    model = build("srvae", images, backbone=backbone)
    torch.manual_seed(3)
    plain, sample = model(images).elbo, selfvae.generate(model, 2, seed=1)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.manual_seed(3)
    assert torch.allclose(model(images.to(memory_format=torch.channels_last)).elbo, plain, rtol=1e-4)
    other = selfvae.generate(model, 2, seed=1)
    assert (other != sample).float().mean() < 0.01  # roundings apart


def test_a_chain_without_latents_is_exact(images: torch.Tensor) -> None:
    model = build("selfvae-halve", images)
    assert torch.equal(model(images).elbo, model(images).elbo)
    assert torch.equal(iwae(model, images, 64), model(images).elbo)
    assert [tuple(y.shape[2:]) for y in model.pyramid(images)] == [
        (16, 16),
        (16, 8),
        (8, 8),
        (8, 4),
        (4, 4),
    ]


def test_terms_in_bits() -> None:
    terms = Terms((torch.tensor([6.0]), torch.tensor([1.0])), (torch.tensor([1.0]), torch.tensor([0.0])))
    assert terms.bits_per_dim(8).item() == pytest.approx(1 / math.log(2))
    assert bits_per_dim(torch.tensor(math.log(2)), 1).item() == pytest.approx(1.0)


def _millions(name: str, size: str, side: int, **options: object) -> float:
    with torch.device("meta"):
        model = selfvae.build(name, size, (3, side, side), **options)
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [("vae", 64, 40), ("selfvae-sketch", 64, 50), ("selfvae-3lvl", 64, 50), ("vae-normal", 32, 22.86)],
)
def test_the_papers_totals(name: str, side: int, expected: float) -> None:
    """Where the papers give totals only; the parts of `vae` and `srvae` are in test_networks.py."""
    assert _millions(name, "paper", side) == pytest.approx(expected, rel=0.05)


def test_a_mixture_has_two_numbers_for_each_of_the_latent_and_component() -> None:
    without = _millions("vae-normal", "paper", 32)
    assert _millions("vae-mog", "paper", 32) - without == pytest.approx(2 * 1000 * 1024 / 1e6)
    ten = _millions("vae-mog", "paper", 32, prior_components=10)
    assert ten - without == pytest.approx(2 * 10 * 1024 / 1e6)


@pytest.mark.parametrize("name", list(PRESETS))
def test_sizes(name: str) -> None:
    assert _millions(name, "tiny", 32) < 0.5
    # vae-normal is vae without its prior
    assert name == "vae-normal" or 3.5 < _millions(name, "small", 32) < 6


def test_a_mixture_over_the_whole_latent_has_one_size(images: torch.Tensor) -> None:
    model = build("vae-mog", images)
    assert generate(model, 2, 16, 16).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="must have 16 x 16 pixels; got 32 x 16"):
        generate(model, 2, 32, 16)
    with pytest.raises(ValueError, match="must have 16 x 16 pixels; got 16 x 32"):
        model(images.repeat(1, 1, 1, 2))


def test_the_flow_prior_goes_with_the_backbone() -> None:
    def prior(name: str, **options: object) -> str:
        return configure(name, "tiny", **options).prior  # type: ignore[arg-type]

    assert prior("selfvae") == prior("selfvae", backbone="dense") == "flow"
    assert prior("selfvae", backbone="residual") == prior("selfvae-halve") == "flow-residual"
    assert prior("selfvae", backbone="residual", prior="flow") == "flow"
    assert prior("vae-mog", backbone="residual") == "mog"


def test_errors(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="did you mean 'selfvae-grey'"):
        selfvae.build("selfvae-gray")
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        selfvae.build("vae", "huge")
    with pytest.raises(ValueError, match="unknown model option 'widht'"):
        selfvae.build("vae", widht=2)
    with pytest.raises(ValueError, match="prior must be one of"):
        selfvae.build("vae", prior="flat")
    with pytest.raises(ValueError, match="go together; got posterior=uniform, prior=flow"):
        selfvae.build("vae", posterior="uniform")
    with pytest.raises(ValueError, match="image_shape must be"):
        selfvae.build("vae", image_shape=(5, 32, 32))
    model = build("selfvae", images)
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\); got uint8 \(4, 1, 16, 16\)"):
        model(images[:, :1])
    with pytest.raises(ValueError, match="unknown variable 'w'"):
        complete(model, {"w": images}, (4, 16, 16))
    with pytest.raises(ValueError, match="level must be 1 to 1 .* got 5"):
        enhance(model, images, 5)
    with pytest.raises(ValueError, match="y0 must be for 4 images; got 2"):
        complete(model, {"y0": images[:2]}, (4, 16, 16))
    with pytest.raises(ValueError, match="transform is Null"):
        SelfVAE([])


def test_a_new_model_warns_once(images: torch.Tensor, tmp_path: Path) -> None:
    """Its scores mean nothing before it is initialised, trained or loaded."""
    for score in (lambda m: m(images), lambda m: iwae(m, images, 2)):
        model = selfvae.build("srvae", image_shape=(3, 16, 16), **TINY)  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match=r"model\.initialise\(x\)"):
            score(model)
        with warnings.catch_warnings(action="error"):
            score(model)
    with warnings.catch_warnings(action="error"):
        build("srvae", images)(images)
        model = selfvae.build("srvae", image_shape=(3, 16, 16), **TINY)  # type: ignore[arg-type]
        model.initialise(images)
        selfvae.save(model, tmp_path)
        selfvae.load(tmp_path)(images)


@pytest.mark.parametrize(
    ("transforms", "consistent"),
    [
        (("mean2", "bicubic2"), [True, False]),
        (("grey", "mean2"), [True, True]),
        (("grey+mean2", "rows"), [False, True]),
        (("blur", "sketch"), [False, False]),
        (("bits3",), [True]),
    ],
)
def test_levels_tell_whether_they_are_consistent(
    transforms: tuple[str, ...], consistent: list[bool], images: torch.Tensor
) -> None:
    """Asked for or not, only transforms with a support of their own restrict the likelihood."""
    how = {**TINY, "image_shape": (3, 16, 16), "transforms": transforms, "prior": "mog"}
    model, free = (selfvae.build("selfvae", **how, consistent=c) for c in (True, False))  # type: ignore[arg-type]
    assert [level.consistent for level in model.levels] == [*consistent, False]
    assert not any(level.consistent for level in free.levels)
    lines = describe(model)
    assert ["exactly" in line for line in lines] == [*consistent, False]
    assert lines[0].startswith("y0: 3 channels of 256 values, latent z0; y1 by ")
    assert lines[-1].endswith("the top") and not any("\n" in line for line in lines)
    for line, level in zip(lines, model.levels[:-1], strict=False):
        assert ("no exact likelihood" in line) == (not level.consistent)
    assert all("consistent=False" in line or "no exact" in line for line in describe(free)[:-1])
    model.initialise(images)
    y = model.pyramid(images)[1]
    agrees = torch.equal(model.levels[0].transform(enhance(model, y, seed=0)), y)
    assert agrees == consistent[0]


def test_spread_levels(images: torch.Tensor) -> None:
    model = build("selfvae-quincunx", images)
    top = len(model.levels) - 1
    assert top > 4
    assert spread_levels(model, 99) == list(range(top + 1))
    assert spread_levels(model, 99, first=1) == list(range(1, top + 1))
    few = spread_levels(model, 3)
    assert few[0] == 0 and few[-1] == top and len(few) == 3
    assert spread_levels(build("vae", images), 3, first=1) == []
