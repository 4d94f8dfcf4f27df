"""The entropy coder: the words of its stack, beside those of constriction."""

import zlib

import numpy as np
import pytest
from codec_models import golden_checksums, uniform_words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfvae import compiled
from selfvae.codec import CodecError
from selfvae.codec.ans import ANSCoder


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
