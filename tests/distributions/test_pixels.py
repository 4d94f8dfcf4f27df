import itertools
import math
import zlib

import pytest
import torch

from selfvae.distributions.pixels import PixelMixture, param_count, to_unit
from selfvae.presets import transform
from selfvae.transforms import ImageSpec, Null, Support

CASES = ["blank", "mean2", "mean1x2", "mean3", "bits1", "bits3", "grey", "columns", "rows", "subsample2"]


def make(
    name: str, channels: int = 3, levels: int = 256, scale: float = 2.0, seed: int = 0, **options: object
) -> tuple[PixelMixture, torch.Tensor]:
    """A mixture of random parameters given d(x) of a random x, and that x."""
    torch.manual_seed(seed)
    size = 6 if name != "mean3" else 9
    x = torch.randint(0, levels, (3, channels, size, size), dtype=torch.uint8)
    d = Null() if name == "blank" else transform(name)
    spec = ImageSpec(channels, levels)
    support = d.support(d(x), spec)
    b, g, _, h, w = support.split(x).shape
    if options.pop("residual_mean", False):
        options["prediction"] = support.split(d.estimate(d(x), spec))
    params = scale * torch.randn(b, g, param_count(channels, 4), h, w)
    return PixelMixture(params, support, spec, **options), x  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("name", CASES)
def test_probabilities_sum_to_one(name: str, scale: float) -> None:
    p, x = make(name, scale=scale)
    v = p.support.split(x).long()
    for group, channel in itertools.product(range(v.shape[1]), range(v.shape[2])):
        table = p.log_pmf(v, group, channel)
        assert table.shape[-1] == 256
        assert not table.isnan().any()
        assert (table.exp().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("mean", [-300.0, -1.5, -1.0, 0.0, 0.123, 1.0, 40.0])
@pytest.mark.parametrize("log_scale", [-60.0, -7.0, -3.0, 0.0, 5.0, 60.0])
@pytest.mark.parametrize("name", ["blank", "mean2", "bits3"])
def test_sum_to_one_at_extreme_parameters(name: str, mean: float, log_scale: float) -> None:
    x = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    d = Null() if name == "blank" else transform(name)
    support = d.support(d(x), ImageSpec(1))
    v = support.split(x).long()
    params = torch.zeros(2, v.shape[1], 3, *v.shape[3:])
    params[:, :, 1], params[:, :, 2] = mean, log_scale
    p = PixelMixture(params, support, ImageSpec(1))
    for group in range(v.shape[1]):
        assert (p.log_pmf(v, group, 0).exp().sum(-1) - 1).abs().max() < 1e-5
    assert not p.log_prob(x).isnan().any()


@pytest.mark.parametrize("levels", [2, 3, 8, 256])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_channels_and_levels(channels: int, levels: int) -> None:
    p, x = make("blank", channels, levels)
    v = p.support.split(x).long()
    steps = [p.log_pmf(v, 0, c).gather(-1, v[:, 0, c, ..., None]) for c in range(channels)]
    chain = torch.stack(steps).sum((0, 2, 3, 4))
    assert torch.allclose(chain, p.log_prob(x), atol=1e-3)
    assert p.sample().max().item() < levels


@pytest.mark.parametrize("residual_mean", [False, True])
@pytest.mark.parametrize("coefficients", ["raw", "residual"])
@pytest.mark.parametrize("name", CASES)
def test_log_prob_is_the_chain_rule_of_log_pmf(name: str, coefficients: str, residual_mean: bool) -> None:
    p, x = make(name, coefficients=coefficients, residual_mean=residual_mean)
    v = p.support.split(x).long()
    total = torch.zeros(len(x))
    for group, channel in itertools.product(range(v.shape[1]), range(v.shape[2])):
        blind = v.clone()  # the table may look at earlier entries only
        blind[:, group, channel:] = 3
        blind[:, group + 1 :] = 3
        table = p.log_pmf(blind, group, channel)
        total += table.gather(-1, v[:, group, channel, ..., None]).flatten(1).sum(1)
    assert torch.allclose(total, p.log_prob(x), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("name", CASES)
def test_samples_and_modes_are_possible(name: str, scale: float) -> None:
    p, _ = make(name, scale=scale)
    for drawn in (p.sample(), p.sample(0.3), p.mode(), p.sample(0.0)):
        assert drawn.dtype == torch.uint8
        assert bool(p.support.allows(drawn).all())
        assert bool(p.log_prob(drawn).isfinite().all())


# CRC-32 of samples at three temperatures, with and without prediction and residual coefficients
SAMPLES = {
    "blank": 2762353064, "mean2": 2834593345, "mean1x2": 3173544126, "mean3": 2561272681,
    "bits1": 704832919, "bits3": 2699182265, "grey": 3404808002, "columns": 676232402, "rows": 482282902,
    "subsample2": 75390286, "checkerboard": 1087789314, "staggered": 3071267603,
}  # fmt: skip


@pytest.mark.parametrize("name", list(SAMPLES))
def test_the_same_seed_draws_the_same_samples(name: str) -> None:
    """As a version drew them that computed all groups at each step."""
    crc = 0
    for coefficients in ("raw", "residual"):
        for residual_mean in (False, True):
            p, _ = make(name, scale=1.0, coefficients=coefficients, residual_mean=residual_mean)
            for temperature in (1.0, 0.5, 0.0):
                torch.manual_seed(1)
                crc = zlib.crc32(p.sample(temperature).numpy().tobytes(), crc)
    assert crc == SAMPLES[name]


def test_samples_follow_the_probabilities() -> None:
    """The frequencies of 20,000 draws of a truncated sub-pixel are those of the table."""
    torch.manual_seed(0)
    n, d = 20_000, transform("bits3")
    y = torch.full((n, 1, 1, 1), 3, dtype=torch.uint8)
    params = torch.tensor([0.3, -0.2, -0.3, 0.1, -3.0, -2.0]).view(1, 1, 6, 1, 1).expand(n, -1, -1, -1, -1)
    p, one = (PixelMixture(params[:m], d.support(y[:m], ImageSpec(1)), ImageSpec(1)) for m in (n, 1))
    drawn = p.sample().flatten().long()
    expected = one.log_pmf(torch.zeros(1, 1, 1, 1, 1, dtype=torch.long), 0, 0)[0, 0, 0].exp()
    seen = torch.bincount(drawn, minlength=256) / n
    assert (seen - expected).abs().max() < 4 * math.sqrt(0.25 / n)


def test_agrees_with_the_difference_of_sigmoids_in_float64() -> None:
    p, x = make("blank", channels=1, scale=1.0)
    v = p.support.split(x)
    mean, inv = p.offsets[:, :, 0].double(), p.inverse_scales[:, :, 0].double()
    value = v[:, :, 0, None].double()
    high = torch.where(value >= 255, 1.0, torch.sigmoid((value + 0.5 - mean) * inv))
    low = torch.where(value <= 0, 0.0, torch.sigmoid((value - 0.5 - mean) * inv))
    expected = torch.log((p.logits.double().exp() * (high - low)).sum(2)).flatten(1).sum(1)
    assert torch.allclose(p.log_prob(x).double(), expected, rtol=1e-5)


def test_what_y_tells_costs_nothing() -> None:
    """Of a white image's grey version hardly anything is open; kept pixels are not modelled at all."""
    x = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    d = transform("grey")
    white = 255 - x
    params = 5 * torch.randn(1, 1, param_count(3, 4), 4, 4)
    p = PixelMixture(params, d.support(d(white), ImageSpec(3)), ImageSpec(3))
    v = p.support.split(white).long()
    assert p.log_pmf(v, 0, 1)[..., :254].eq(-torch.inf).all()  # red is 254 or 255
    p, x = make("columns")
    assert p.offsets.shape[1] == 1 and p.offsets.shape[-1] == x.shape[-1] // 2  # no kept pixel is modelled


def test_a_value_alone_in_its_interval_is_certain() -> None:
    d = transform("mean1x2")
    x = torch.full((1, 1, 1, 2), 255, dtype=torch.uint8)
    p = PixelMixture(50 * torch.randn(1, 2, 3, 1, 1), d.support(d(x), ImageSpec(1)), ImageSpec(1))
    v = p.support.split(x).long()
    lo, hi = p.support.bounds(v)
    assert (lo == hi).flatten().tolist() == [False, False]  # 254 and 255 round up to 255
    v[:, 0] = 254
    assert p.log_pmf(v, 1, 0).flatten()[255].item() == 0.0


def test_impossible_images_have_no_mass() -> None:
    for name in ("mean2", "grey", "columns", "bits3"):
        p, x = make(name)
        x[:, :, 0, 0] ^= 128
        assert (p.log_prob(x) == -torch.inf).all()


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite(name: str, scale: float) -> None:
    p, x = make(name)
    params = (
        scale * torch.randn(*p.offsets.shape[:2], param_count(3, 4), *p.offsets.shape[4:])
    ).requires_grad_()
    PixelMixture(params, p.support, p.spec, coefficients="residual").log_prob(x).sum().backward()
    assert params.grad is not None and params.grad.isfinite().all()


def test_wrong_number_of_parameters() -> None:
    support = Support(torch.zeros(1, 0, 2, 2), ImageSpec(3))
    with pytest.raises(ValueError, match="multiple of 10 channels for 3-channel pixels; got 11"):
        PixelMixture(torch.zeros(1, 1, 11, 2, 2), support, ImageSpec(3))


def test_to_unit() -> None:
    assert to_unit(torch.tensor([0, 7], dtype=torch.uint8), 8).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("coefficients", ["raw", "residual"])
@pytest.mark.parametrize("name", CASES)
def test_the_mean_of_the_first_entries_is_that_of_their_probabilities(name: str, coefficients: str) -> None:
    p, _ = make(name, coefficients=coefficients, residual_mean=True, scale=1.0)
    found = p.support.split(p.mean()).long()
    values = torch.arange(256.0)
    expected = (p.log_pmf(torch.zeros_like(found), 0, 0).exp() * values).sum(-1)
    error = (found[:, 0, 0] - expected).abs()
    assert error.quantile(0.95) < 1 and error.mean() < 0.5  # rounded; far tails are approximate
    assert p.support.allows(p.mean()).all()


@pytest.mark.parametrize("name", ["blank", "mean2", "bits3", "checkerboard", "columns"])
def test_the_mean_is_near_that_of_many_draws(name: str) -> None:
    p, x = make(name, coefficients="residual", residual_mean=True, scale=0.3)
    draws = torch.stack([p.sample() for _ in range(400)]).float()
    error = (p.mean().float() - draws.mean(0)).abs()
    # the error of 400 draws, rounding, and that the mean of an image is no image
    assert (error < 5 * draws.std(0) / 20 + 1.5).float().mean() > 0.98
    assert (p.mean() - x).shape == x.shape
    spread = (draws - p.mean()).square().mean()
    assert spread < (draws - p.mode()).square().mean() * 1.001


@pytest.mark.parametrize("name", ["blank", "mean2", "grey"])
def test_the_expectation_is_the_mean_where_all_is_possible(name: str) -> None:
    """Away from the ends of the intervals; and it can be learnt from."""
    p, x = make(name, coefficients="residual", residual_mean=True, scale=0.05)
    d = Null() if name == "blank" else transform(name)
    narrow = torch.randint(100, 150, x.shape, dtype=torch.uint8)
    support = d.support(d(narrow), p.spec)
    guess = support.split(d.estimate(d(narrow), p.spec))
    params = (0.05 * torch.randn(3, *p.support.split(x).shape[1:2], 40, *guess.shape[3:])).requires_grad_()
    p = PixelMixture(params, support, p.spec, prediction=guess, coefficients="residual")
    found = p.expectation()
    assert found.shape == x.shape
    if name != "grey":  # whose values are bounded much more narrowly
        assert (found - p.mean()).abs().quantile(0.9) < 1
    found.square().mean().backward()
    assert params.grad is not None and bool((params.grad[:, :, :16] != 0).any())
    with pytest.raises(ValueError, match="residual"):
        make(name)[0].expectation()


def test_expectations_are_integrals() -> None:
    from selfvae.distributions.pixels import Logistics

    mean = torch.tensor([-40.0, 3.0, 100.0, 130.0, 400.0])[:, None].double()
    scale = torch.tensor([0.3, 2.0, 30.0]).double()
    for lo, hi in ((96, 127), (0, 63), (192, 255), (0, 255)):
        own = Logistics(mean.expand(5, 3), 1 / scale.expand(5, 3), 255)
        found = own.expectation(torch.tensor(lo), torch.tensor(hi))
        values = torch.arange(lo, hi + 1).double()
        at = (values - mean[..., None]) / scale[:, None]
        half = 0.5 / scale[:, None]
        ends = torch.sigmoid(at - half), torch.sigmoid(at + half)
        if lo == 0:
            ends[0][..., 0] = 0
        if hi == 255:
            ends[1][..., -1] = 1
        mass = (ends[1] - ends[0]).sum(-1)
        expected = ((ends[1] - ends[0]) * values).sum(-1) / mass
        seen = mass > 2e-2
        assert torch.allclose(found[seen], expected[seen], atol=0.3)  # bins of width 1
        assert ((found >= lo) & (found <= hi)).all() and not found.isnan().any()
