"""The bounds: against enumeration, against exact likelihoods, and against each other."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import selfvae
from selfvae.data.batches import Images
from selfvae.metrics.bounds import estimate_bounds, iwae
from selfvae.metrics.likelihood import evaluate
from selfvae.model import SelfVAE

TINY = {"size": "tiny", "width": 0.06, "components": 2}


def build(name: str, images: Tensor, **overrides: object) -> SelfVAE:
    """A model whose posteriors and conditional priors vary, so that there is something to sum over."""
    model = selfvae.build(name, image_shape=tuple(images.shape[1:]), **{**TINY, **overrides})  # type: ignore[arg-type]
    model.initialise(images)
    for level in model.levels:
        if level.has_latent:
            torch.nn.init.normal_(level.encoder.head.direction, std=2.0)
    return model


def by_enumeration(model: SelfVAE, x: Tensor, draws: int) -> Tensor:
    """The mean weight over all combinations of the draws that `iwae` makes, one walk for each."""
    ys = model.pyramid(x)
    posteriors = model.posteriors(ys)
    wide = {name: q.repeat(draws) for name, q in posteriors.items()}
    seen: dict[str, Tensor] = {}

    def watch(name: str, p: object) -> Tensor:  # draws in the walk's own order
        if name[0] == "y":
            return ys[int(name[1:])].repeat(draws, 1, 1, 1)
        seen[name] = wide[name].sample()
        return seen[name]

    model.walk(watch, ys[-1].repeat(draws, 1, 1, 1)[:, :0])
    weights = []
    for chosen in itertools.product(range(draws), repeat=len(seen)):
        total = torch.zeros((), dtype=torch.float64)

        def add(name: str, p, chosen=chosen) -> Tensor:  # type: ignore[no-untyped-def]
            nonlocal total
            if name[0] == "y":
                value = ys[int(name[1:])]
                total = total + p.log_prob(value)[0].double()
                return value
            i = chosen[list(seen).index(name)]
            z = seen[name][i : i + 1]
            total = total + (p.log_prob(z) - posteriors[name].log_prob(z))[0].double()
            return z

        model.walk(add, ys[-1][:, :0])
        weights.append(total)
    return torch.logsumexp(torch.stack(weights), 0) - math.log(len(weights))


@pytest.mark.parametrize(
    ("name", "latents", "draws"),
    [
        ("vae-normal", "all", 4),
        ("srvae", "all", 5),
        ("selfvae-grey", "all", 4),
        ("selfvae-mean-3lvl", "all", 3),
        ("selfvae-3lvl", "top", 4),
    ],
)
@torch.no_grad()
def test_all_pairs_against_enumeration(name: str, latents: str, draws: int, images: Tensor) -> None:
    """K = 0, 1, 2; also where a level between has no latent."""
    model = build(name, images, latents=latents)
    for x in images.split(1)[:2]:
        torch.manual_seed(1)
        expected = by_enumeration(model, x, draws)
        torch.manual_seed(1)
        bound = iwae(model, x, draws, tmc=True, batch=draws)
        assert bound.dtype == torch.float64
        assert torch.allclose(bound, expected[None], rtol=0, atol=2e-3)


@pytest.mark.slow
def test_pairs_are_above_in_the_mean(images: Tensor) -> None:
    model = build("srvae", images[:2])
    torch.manual_seed(0)
    many = images[:2].repeat(60, 1, 1, 1)  # one call costs less than 60
    plain, tmc = (iwae(model, many, 8, tmc=pairs, batch=960).view(60, 2) for pairs in (False, True))
    spread = (plain.std(0) + tmc.std(0)) / 60**0.5
    assert bool((tmc.mean(0) > plain.mean(0) - 2 * spread).all())
    assert tmc.mean() > plain.mean()


def test_one_latent_has_no_pairs(images: Tensor) -> None:
    model = build("vae-normal", images)
    torch.manual_seed(0)
    plain = iwae(model, images, 5)
    torch.manual_seed(0)
    assert torch.equal(plain, iwae(model, images, 5, tmc=True))


@pytest.mark.parametrize("tmc", [False, True])
def test_any_chunks_and_the_same_number_of_passes(tmc: bool, images: Tensor) -> None:
    """Encoders once an image, decoders once a draw, however they are batched."""
    model = build("srvae", images)
    seen = {"encoder": 0, "decoder": 0}
    level = model.levels[0]
    for part in seen:

        def count(module, inputs, out, part=part) -> None:  # type: ignore[no-untyped-def]
            seen[part] += out.shape[0]

        getattr(level, part).register_forward_hook(count)
    for batch in (1, 7, 12, 100):
        seen.update(encoder=0, decoder=0)
        bound = iwae(model, images, 6, tmc=tmc, batch=batch)
        assert bound.shape == (4,) and bound.isfinite().all()
        assert seen == {"encoder": 4, "decoder": 24}
    with pytest.raises(ValueError, match="at least 1; got 0 and 64"):
        iwae(model, images, 0)


# --- the whole bound on images so small that everything can be enumerated -------------------------------


def toy(consistent: bool, levels: int = 3) -> SelfVAE:
    """2 x 2 pixels of 3 levels, y their rounded mean; latents of one number a position."""
    torch.manual_seed(4)
    model = selfvae.build(
        "selfvae", "tiny", (1, 4, 4), num_values=levels, latents="none", components=2, width=0.06,
        consistent=consistent, transforms=("mean2", "mean2"), residual_mean=False,
    )  # fmt: skip
    x = torch.randint(0, levels, (64, 1, 4, 4), dtype=torch.uint8)
    model.initialise(x)
    for p in model.parameters():  # far from plain
        p.data.add_(0.3 * torch.randn_like(p))
    return model


def all_images(levels: int, side: int) -> Tensor:
    values = torch.cartesian_prod(*[torch.arange(levels, dtype=torch.uint8)] * side**2)
    return values.view(-1, 1, side, side)


def below(model: SelfVAE, x: Tensor, exact: Tensor) -> None:
    """The expected ELBO is at most ln p(x), image by image.

    With 2,000 draws, the distance to ln p(x), 0.005 to 0.4 nats, and the 0.02 nats allowed are together
    more than five standard errors for every image.
    """
    elbo = model(x.repeat(2000, 1, 1, 1)).elbo.view(2000, -1).double()
    error = elbo.std(0) / 2000**0.5
    assert bool((exact + 0.02 - elbo.mean(0) > 5 * error).all()) and elbo.mean() < exact.mean()


@pytest.mark.parametrize("consistent", [True, False])
@torch.no_grad()
def test_probabilities_over_all_images(consistent: bool) -> None:
    """2 x 2 images of 3 levels: p(x, d(x)) sums to 1 with the consistent likelihood, to less without.

    What is missing is the mass of the pairs (x, y) where y is not d(x).
    """
    model = toy(consistent)
    model = SelfVAE(list(model.levels)[1:])  # 2 x 2 -> 1 x 1
    x = all_images(3, 2)
    total = torch.exp(model(x).elbo.double()).sum().item()
    if consistent:
        assert total == pytest.approx(1, abs=1e-5)
        return
    y = torch.arange(3, dtype=torch.uint8).view(-1, 1, 1, 1).repeat_interleave(len(x), 0)
    pairs = [x.repeat(3, 1, 1, 1), y]
    p = torch.exp(model.score(pairs, {}).elbo.double())
    fits = (model.pyramid(pairs[0])[1] == y).flatten()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert total == pytest.approx(p[fits].sum().item(), abs=1e-5) and total < 0.9


@pytest.mark.slow
@torch.no_grad()
def test_the_bound_with_a_latent_against_numerical_integration() -> None:
    """ln p(x) by a fine sum over z is above every bound, and the bounds come close; all p(x) sum to 1."""
    torch.manual_seed(1)
    model = selfvae.build(
        "vae-normal", "tiny", (1, 4, 4), num_values=2, latent_channels=1, components=2, width=0.06,
    )  # fmt: skip
    x = torch.randint(0, 2, (16, 1, 4, 4), dtype=torch.uint8)
    model.initialise(x)
    level = model.levels[0]
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    tops = all_images(2, 2)  # 2 x 2 pixels share one latent number
    assert level.multiple == 2
    z = torch.linspace(-6, 6, 2001).view(-1, 1, 1, 1)
    blank = torch.zeros(len(z), 0, 2, 2, dtype=torch.uint8)
    prior = level.prior(blank, None).log_prob(z).double()
    p = level.likelihood(blank, z)
    exact = torch.stack(
        [
            torch.logsumexp(prior + p.log_prob(image[None].expand(len(z), -1, -1, -1)).double(), 0)
            for image in tops
        ]
    ) + math.log(12 / 2000)
    assert torch.exp(exact).sum().item() == pytest.approx(1, abs=1e-4)
    bound = iwae(model, tops, 20_000, batch=1000)
    below(model, tops, exact)
    assert torch.allclose(bound, exact, atol=0.05)


def test_bounds_from_the_same_draws(images: Tensor) -> None:
    model = build("selfvae-mean-3lvl", images)
    torch.manual_seed(0)
    found = estimate_bounds(model, images, 6)
    torch.manual_seed(0)
    assert torch.equal(found.iwae, iwae(model, images, 6))
    torch.manual_seed(0)
    assert torch.equal(found.tmc, iwae(model, images, 6, tmc=True))
    assert bool((found.elbo < found.iwae).all())
    exact = estimate_bounds(build("selfvae-halve", images), images, 6)
    assert torch.equal(exact.elbo, exact.iwae) and torch.equal(exact.elbo, exact.tmc)


def test_scores_of_a_data_set(images: Tensor) -> None:
    model = build("selfvae-mean-3lvl", images)
    scores = evaluate(model, Images(images.numpy()), iwae_samples=4, batch_size=3)
    assert scores["elbo_bits_per_dim"] > scores["iwae_bits_per_dim"]
    for kind in ("re", "kl"):
        assert scores[f"{kind}_bits_per_dim"] == pytest.approx(
            [nats / math.log(2) / 768 for nats in scores[f"{kind}_nats"]]
        )
    total = sum(scores["re_bits_per_dim"]) + sum(scores["kl_bits_per_dim"])
    assert scores["bits_per_dim"] == pytest.approx(total, rel=1e-5)
    assert scores["tmc_bits_per_dim_stderr"] > 0


def test_lower_precision_changes_scores_little(images: Tensor) -> None:
    model = build("selfvae-halve", images)  # exact: no draws that could differ
    full, low = (evaluate(model, Images(images.numpy()), precision=p) for p in ("32-true", "bf16-mixed"))
    assert 0 < abs(full["bits_per_dim"] - low["bits_per_dim"]) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("consistent", [True, False])
@torch.no_grad()
def test_the_whole_bound_of_two_levels(consistent: bool) -> None:
    """All 256 images of 2 x 4 pixels and 2 levels, y the means of pairs; three latents, integrated."""
    torch.manual_seed(2)
    model = selfvae.build(
        "selfvae", "tiny", (1, 4, 8), num_values=2, transforms=("mean1x2",), prior="normal",
        latent_channels=1, components=2, width=0.06, consistent=consistent, residual_mean=False,
    )  # fmt: skip
    model.initialise(torch.randint(0, 2, (16, 1, 4, 8), dtype=torch.uint8))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    top, bottom = model.levels[1], model.levels[0]
    assert top.latent_shape(2, 2) == (1, 1, 1) and bottom.latent_shape(2, 4) == (1, 1, 2)
    x = torch.cartesian_prod(*[torch.arange(2, dtype=torch.uint8)] * 8).view(-1, 1, 2, 4)
    y = model.pyramid(x)[1]

    u = torch.linspace(-6, 6, 31)
    blank = torch.zeros(31, 0, 2, 2, dtype=torch.uint8)
    z1 = u.view(-1, 1, 1, 1)
    log_u = top.prior(blank, None).log_prob(z1).double() + math.log(12 / 30)
    grid = torch.linspace(-8, 8, 41)
    z0 = torch.cartesian_prod(grid, grid).view(-1, 1, 1, 2)
    exact = torch.empty(256, dtype=torch.float64)
    for small in y.unique(dim=0):
        which = (y == small).flatten(1).all(1).nonzero()[:, 0]
        log_y = log_u + top.likelihood(blank, z1).log_prob(small.expand(31, 1, 2, 2)).double()
        inner = bottom.prior(small.expand(31, 1, 2, 2), z1)
        mean, log_var = inner.mean.flatten(1), inner.log_var.flatten(1)
        squares = (z0.flatten(1)[:, None] - mean).square() * (-log_var).exp()
        normal = -0.5 * (squares + log_var + math.log(2 * math.pi)).sum(2).double()
        log_z = torch.logsumexp(log_y + normal + 2 * math.log(16 / 40), 1)  # (z0): p(z0, y)
        p = bottom.likelihood(small.expand(len(z0), 1, 2, 2), z0)
        for i in which:
            exact[i] = torch.logsumexp(log_z + p.log_prob(x[i].expand(len(z0), 1, 2, 4)).double(), 0)
    total = exact.exp().sum().item()
    if consistent:
        assert total == pytest.approx(1, abs=1e-3)
    else:
        assert total < 0.97
    some = x[::51]
    for tmc in (False, True):
        found = iwae(model, some, 400 if tmc else 4000, tmc=tmc, batch=400)
        assert torch.allclose(found, exact[::51], atol=0.05)
    below(model, some, exact[::51])


@pytest.mark.parametrize("tmc", [False, True])
def test_levels_without_a_latent_are_decoded_once_per_image(tmc: bool, images: Tensor) -> None:
    """Their likelihood is the same for every draw."""
    model = build("selfvae-3lvl", images, latents="top")
    seen = [0] * len(model.levels)
    for k, level in enumerate(model.levels):

        def count(module, inputs, out, k=k) -> None:  # type: ignore[no-untyped-def]
            seen[k] += out.shape[0]

        level.decoder.register_forward_hook(count)
    for batch in (1, 7, 100):
        seen[:] = [0] * len(seen)
        assert iwae(model, images, 6, tmc=tmc, batch=batch).isfinite().all()
        assert seen == [4] * (len(seen) - 1) + [24]
