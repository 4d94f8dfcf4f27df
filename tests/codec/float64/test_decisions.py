"""Values as binary decisions: they come back, at the length of their likelihood."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from selfvae.codec import tables
from selfvae.codec.ans import ANSCoder
from selfvae.codec.float64.decisions import _length, code
from selfvae.codec.float64.quantization import QuantizedMixture, SideInformation
from selfvae.codec.tables import Channel
from selfvae.distributions.pixels import PixelMixture, param_count
from selfvae.transforms import ImageSpec, Support


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


def through(p: PixelMixture, v: Tensor | None, coder: ANSCoder, side: SideInformation) -> Tensor:
    grid, found = (
        QuantizedMixture(p, 0, side),
        torch.zeros(1, 1, 3, 1, p.logits.shape[-1], dtype=torch.long),
    )
    weights = grid.weights()
    for c in range(3):
        known = None if v is None else v[0, 0, c, 0].numpy()
        values, weights = code(coder, weights, grid.channel(found), p.spec.num_values, None, known)
        found[0, 0, c, 0] = torch.from_numpy(values)
    return found


@pytest.mark.parametrize(
    ("levels", "components"),
    [(256, 10), (256, 1), (2, 3), pytest.param(32, 64, marks=pytest.mark.slow), (8, 2)],
)
def test_code_length_is_the_likelihood(levels: int, components: int) -> None:
    p = mixture(levels, components, 20_000, spread=1.0)
    torch.manual_seed(0)
    x = p.sample()
    encoder, side = ANSCoder(), SideInformation()
    v = x[:, None].long()
    assert torch.equal(through(p, v, encoder, side), v)
    encoder.push()
    words = encoder.words()
    ideal = -p.log_prob(x).item() / math.log(2)
    assert 32 * len(words) == pytest.approx(ideal, rel=2e-3, abs=100)
    decoder = ANSCoder(words)
    assert torch.equal(through(p, None, decoder, SideInformation(side.tobytes())), v)
    assert decoder.left() == 0


def test_values_far_from_every_mean_come_back() -> None:
    p = mixture(256, 2, 600, spread=30.0)  # sharp, far apart, some beyond the range
    for v in (torch.zeros(1, 1, 3, 1, 600).long(), torch.full((1, 1, 3, 1, 600), 255)):
        encoder, side = ANSCoder(), SideInformation()
        through(p, v, encoder, side)
        encoder.push()
        assert torch.equal(through(p, None, ANSCoder(encoder.words()), SideInformation(side.tobytes())), v)


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
