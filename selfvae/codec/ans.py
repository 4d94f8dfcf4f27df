"""Values and an entropy coder: whole numbers in, bits out, and back.

A value is coded as the binary decisions that lead to it, the highest bit first; each needs one more value
of the distribution function for every component. The decisions' probabilities are whole multiples of 2^-24.
The coder (asymmetric numeral systems, from the package constriction) rescales them a little, in float64
products that are exact and so the same everywhere; the tests hold its words to a checksum.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from selfvae.codec.container import CodecError
from selfvae.codec.tables import ONE, Channel, Ints, cumulative

__all__ = ["MOST", "ANSCoder", "code"]

_PRECISION = 24  # bits of a decision's probability
_WEIGHT = 20  # bits of a component's weight
_INSIDE = 26  # bits of a probability inside an interval
_CHUNK = 1 << 14  # positions at a time: what fits a processor's cache; part of the format
MOST = 64  # components, so that sums over them stay below 2^63


def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise ImportError(
            "compression needs the package constriction: pip install constriction (where no build of it "
            "exists, pip needs Rust)"
        ) from None
    return constriction.stream


class ANSCoder:
    """A stack of decisions and numbers: what is pushed last is popped first.

    Known ones wait until `push` puts them on the stack, the last first: they are popped in the order in
    which they were given. Waiting takes about 90 bytes a pixel of an image.

    words: uint32, the top last, as `words()` gives them; None: empty.
    """

    def __init__(self, words: np.ndarray | None = None) -> None:
        if words is not None and len(words) and not words[-1]:
            raise CodecError("the file is damaged: no code begins with zeros")
        stream = _constriction()
        self._ans = stream.stack.AnsCoder() if words is None else stream.stack.AnsCoder(words)
        self._bernoulli = stream.model.Bernoulli(perfect=False)
        self._uniform = stream.model.Uniform()
        self._waiting: list[tuple[np.ndarray, Any, np.ndarray]] = []
        self.low = 0  # what `left` was at the least, since it was set

    def copy(self) -> ANSCoder:
        """Another stack with the same words; nothing may wait."""
        other = ANSCoder()
        other.become(self)
        return other

    def become(self, other: ANSCoder) -> None:
        """Take another one's words; nothing may wait."""
        self._ans, self.low = other._ans.clone(), other.low
        self._waiting.clear()

    def bits(self, p: Ints, known: np.ndarray | None = None) -> np.ndarray:
        """Decisions bool (n,) whose probabilities of being true are p / 2^24; popped unless `known`."""
        if known is None:
            return self._pop(self._bernoulli, p / 2.0**_PRECISION).astype(bool)
        self._waiting.append((known, self._bernoulli, p.astype(np.int32)))
        return known

    def uniform(self, sizes: Ints, known: Ints | None = None) -> Ints:
        """Numbers (n,), each of 0 to its size - 1, all alike likely; popped unless `known`.

        A size is 2 to 2^18: the probabilities are multiples of 2^-24.
        """
        if known is None:
            return self._pop(self._uniform, sizes.astype(np.int32)).astype(np.int64)
        self._waiting.append((known, self._uniform, sizes.astype(np.int32)))
        return known

    def _pop(self, family: Any, parameters: np.ndarray) -> np.ndarray:
        popped: np.ndarray = self._ans.decode(family, parameters)
        self.low = min(self.low, self.left())
        return popped

    def push(self) -> None:
        """Put all that waits on the stack."""
        for known, family, p in reversed(self._waiting):
            if family is self._bernoulli:
                p = p / 2.0**_PRECISION
            self._ans.encode_reverse(known.astype(np.int32), family, p)
        self._waiting.clear()

    def left(self) -> int:
        """The words below the state."""
        return int(self._ans.pos()[0])

    def words(self) -> np.ndarray:
        """The stack, uint32, its top last."""
        words: np.ndarray = self._ans.get_compressed()
        return words


def _length(n: Ints) -> Ints:
    """Bits of whole numbers 0 <= n < 2^63."""
    out = np.zeros_like(n)
    for step in (32, 16, 8, 4, 2, 1):
        large = n >= np.int64(1) << step
        out += np.where(large, step, 0)
        n = np.where(large, n >> step, n)
    return out + n


def _probability(true: Ints, false: Ints) -> Ints:
    """true / (true + false) in units of 2^-24, never 0 or 1; 1/2 where both are 0."""
    both = true + false
    shift = np.maximum(_length(both) - 38, 0)
    ratio = ((true >> shift) << _PRECISION) // np.maximum(both >> shift, 1)
    ratio = np.where(both == 0, 1 << _PRECISION - 1, ratio)
    return np.clip(ratio, 1, (1 << _PRECISION) - 1)


class _Cumulative:
    """The components' distribution functions between two edges, outside of which there is nothing."""

    def __init__(self, channel: Channel, num_values: int, lo: Ints, hi: Ints | None) -> None:
        self.channel, self.num_values = channel, num_values
        self.low, self.high = lo, np.full_like(lo, num_values) if hi is None else hi + 1
        self.truncated = hi is not None
        if self.truncated:
            self.start = self._whole(self.low)
            self.mass = self._whole(self.high) - self.start

    def _whole(self, edge: Ints) -> Ints:
        bits = self.channel.bits
        inside = cumulative((edge << bits) - (1 << bits - 1), self.channel)
        return np.where(edge >= self.num_values, 1 << ONE, np.where(edge <= 0, 0, inside))

    def __call__(self, edge: Ints) -> Ints:
        if not self.truncated:
            return self._whole(edge)
        part = ((self._whole(edge) - self.start) << _INSIDE) // np.maximum(self.mass, 1)
        # an interval so far out that no mass is left in the tables: all of its values alike
        even = ((edge - self.low) << _INSIDE) // np.maximum(self.high - self.low, 1)
        return np.where(self.mass > 0, part, even)


def code(
    stack: ANSCoder,
    weights: Ints,
    channel: Channel,
    num_values: int,
    bounds: tuple[Ints, Ints] | None,
    known: Ints | None,
) -> tuple[Ints, Ints]:
    """Code a channel of n positions; returns their values (n,) and the weights given these (M, n).

    Arguments:
        weights: of the M components, whole numbers up to 2^20: (M, n).
        bounds: the least and the largest possible value of each position (n,); None: 0 and num_values - 1.
        known: the values, to be pushed; None: they are popped.
    """
    if not weights.shape[1]:
        return np.zeros(0, np.int64), weights
    found, after = [], []
    for start in range(0, weights.shape[1], _CHUNK):
        at = slice(start, start + _CHUNK)
        v, w = _chunk(
            stack, weights[:, at], channel.part(at), num_values,
            None if bounds is None else (bounds[0][at], bounds[1][at]),
            None if known is None else known[at],
        )  # fmt: skip
        found.append(v)
        after.append(w)
    return np.concatenate(found), np.concatenate(after, 1)


def _chunk(
    stack: ANSCoder,
    weights: Ints,
    channel: Channel,
    num_values: int,
    bounds: tuple[Ints, Ints] | None,
    known: Ints | None,
) -> tuple[Ints, Ints]:
    n = weights.shape[1]
    lo, hi = bounds or (np.zeros(n, np.int64), None)
    function = _Cumulative(channel, num_values, lo, hi)
    a, b = function.low, function.high  # the edges between which the value lies
    below, above = function(a), function(b)
    node = np.zeros(n, np.int64)  # the value's high bits
    for bit in reversed(range((num_values - 1).bit_length())):
        middle = np.clip(node + (1 << bit), a, b)
        at_middle = function(middle)
        p = _probability((weights * (above - at_middle)).sum(0), (weights * (at_middle - below)).sum(0))
        right = middle <= a
        open_ = (a < middle) & (middle < b)  # else the interval decides
        right[open_] = stack.bits(p[open_], None if known is None else known[open_] >= middle[open_])
        a, b = np.where(right, middle, a), np.where(right, b, middle)
        below, above = np.where(right, at_middle, below), np.where(right, above, at_middle)
        node = np.where(right, node + (1 << bit), node)
    posterior = weights * (above - below)
    most = posterior.max(0)
    shift = _length(most) - _WEIGHT
    posterior = np.where(shift > 0, posterior >> np.maximum(shift, 0), posterior << np.maximum(-shift, 0))
    return node, np.where(most > 0, posterior, weights)
