"""The entropy coder: values come back, at the length of their likelihood."""

import math
import zlib

import numpy as np
import pytest
import torch
from codec_models import golden_checksums, uniform_words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfvae import compiled
from selfvae.codec import (
    CodecError,
    float64,
    tables,
)
from selfvae.codec.ans import ANSCoder, _length, code
from selfvae.codec.container import varint
from selfvae.codec.float64 import SideInformation
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
        float64.QuantizedMixture(p, 0, side),
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


def test_rounding_near_a_border_follows_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.array([0.2, 0.5, 1.5 - 1e-9, -0.5 + 1e-9, 7.4999, 1e6 + 0.5])
    side = SideInformation()
    whole = side.quantize(values)
    assert whole.tolist() == [0, 1, 1, 0, 7, 1000001]
    for shift in (-1e-7, 1e-7):
        assert SideInformation(side.tobytes()).quantize(values + shift).tolist() == whole.tolist()
    assert SideInformation(b"").quantize(values - 1e-7).tolist() != whole.tolist()
    plain = SideInformation()
    plain.quantize(np.array([0.2, 0.3]))
    assert plain.tobytes() == b""
    again = SideInformation(side.tobytes() + varint(2 * 90))
    again.quantize(values)
    with pytest.raises(CodecError, match="corrects a value that does not exist"):
        again.check_used()
    with pytest.raises(CodecError, match="corrects a value twice"):
        SideInformation(varint(4) + varint(0))
    with pytest.raises(CodecError, match="corrects a value that needs no correction"):
        SideInformation(varint(0)).quantize(values)  # the first
    with pytest.raises(CodecError, match="not finite"):
        plain.quantize(np.array([np.nan]))


def test_the_coder_s_words_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format depends on how probabilities become shares of 2^24 numbers; compiled or not."""
    for plain in (False, True):
        monkeypatch.setattr(compiled, "PLAIN", plain)
        p = (np.arange(20_000, dtype=np.int64) * 104729) % ((1 << 24) - 1) + 1
        known = np.arange(20_000) * 7919 % 16_777_259 < p
        encoder = ANSCoder()
        encoder.bits(p, known)
        encoder.push()
        assert zlib.crc32(encoder.words().astype("<u4").tobytes()) == golden_checksums()["words"]
        assert uniform_words() == golden_checksums()["uniform"]
        assert np.array_equal(ANSCoder(encoder.words()).bits(p), known)


class Oracle:
    """The stack of the package constriction, which wrote the first files."""

    def __init__(self, words: np.ndarray | None = None) -> None:
        stream = pytest.importorskip("constriction", reason="compares with constriction").stream
        self.ans = stream.stack.AnsCoder() if words is None else stream.stack.AnsCoder(words)
        self.families = {"bits": stream.model.Bernoulli(perfect=False), "uniform": stream.model.Uniform()}

    def parameters(self, kind: str, n: np.ndarray) -> np.ndarray:
        return n / 2.0**24 if kind == "bits" else n.astype(np.int32)

    def push(self, kind: str, n: np.ndarray, known: np.ndarray) -> None:
        self.ans.encode_reverse(known.astype(np.int32), self.families[kind], self.parameters(kind, n))

    def pop(self, kind: str, n: np.ndarray) -> np.ndarray:
        return self.ans.decode(self.families[kind], self.parameters(kind, n))


def random_step(rng: np.random.Generator) -> tuple[str, np.ndarray, np.ndarray]:
    """Decisions or numbers: their kind, the parameters (n,), and values (n,); some are very unlikely."""
    n, extreme = rng.integers(0, 40), rng.random() < 0.3
    if rng.random() < 0.6:
        one = 1 << 24
        p = rng.choice([1, 2, one // 2, one - 2, one - 1], n) if extreme else rng.integers(1, one, n)
        return "bits", p, rng.random(n) < (0.5 if extreme else p / one)
    sizes = (
        rng.choice([2, 3, 1 << 17, (1 << 18) - 1, 1 << 18], n) if extreme else rng.integers(2, 1 << 18, n)
    )
    return "uniform", sizes, rng.choice([0, 1], n) * (sizes - 1) if extreme else rng.integers(0, sizes)


@pytest.mark.parametrize("plain", [False, True])
@given(st.integers(0, 2**32), st.lists(st.integers(0, 2**32 - 1), max_size=5), st.lists(st.booleans()))
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip
def test_words_are_those_of_constriction(
    plain: bool, monkeypatch: pytest.MonkeyPatch, seed: int, start: list[int], pushes: list[bool]
) -> None:
    """Pushes and pops in any order, from an empty stack, or from words that no coder has written."""
    monkeypatch.setattr(compiled, "PLAIN", plain)
    rng = np.random.default_rng(seed)
    words = np.array(start, np.uint32)
    if len(words) and not words[-1]:
        words[-1] = 1
    ours, theirs = ANSCoder(words), Oracle(words)
    for push in pushes:
        kind, n, known = random_step(rng)
        if push:
            getattr(ours, kind)(n, known)
            ours.push()
            theirs.push(kind, n, known)
        else:
            assert np.array_equal(getattr(ours, kind)(n), theirs.pop(kind, n))
        assert ours.left() == theirs.ans.pos()[0]
        assert np.array_equal(ours.words(), theirs.ans.get_compressed())


def test_a_queue_is_pushed_as_a_whole_and_popped_in_its_order() -> None:
    rng = np.random.default_rng(0)
    stack, steps = ANSCoder(), [random_step(rng) for _ in range(50)]
    for kind, n, known in steps:
        getattr(stack, kind)(n, known)
    assert stack.left() == 0 and not len(stack.words())
    stack.push()
    assert stack.left() + 2 == len(stack.words())
    copy, before = stack.copy(), stack.words()
    for kind, n, known in steps:
        assert np.array_equal(getattr(stack, kind)(n), known)
    assert np.array_equal(copy.words(), before) and stack.low == 0
    stack.become(copy)
    assert np.array_equal(stack.words(), before)


def test_empty_and_damaged_stacks() -> None:
    empty = ANSCoder()
    assert not len(empty.words()) and empty.left() == 0
    assert not empty.bits(np.full(9, 1 << 23)).any() and not empty.uniform(np.full(9, 5)).any()
    assert not len(empty.words())
    assert not len(ANSCoder(np.zeros(0, np.uint32)).words())
    with pytest.raises(CodecError, match="no code begins with zeros"):
        ANSCoder(np.array([1, 2, 0], np.uint32))
    for words in ([5], [0, 5], [2**32 - 1] * 3):
        start = np.array(words, np.uint32)
        start.flags.writeable = False
        stack = ANSCoder(start)
        assert stack.words().tolist() == words
        stack.bits(np.full(500, 1))  # more than the words hold
        assert stack.left() == 0 and start.tolist() == words
