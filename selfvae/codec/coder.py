"""Values and an entropy coder: whole numbers in, bits out, and back.

A value is coded as the binary decisions that lead to it, the highest bit first; each needs one more value
of the distribution function for every component. The decisions' probabilities are whole multiples of 2^-24.
The coder (asymmetric numeral systems, from the package constriction) rescales them a little, in float64
products that are exact and so the same everywhere; the tests hold its words to a checksum.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from selfvae.codec.container import CodecError
from selfvae.codec.lattice import ONE, Channel, Ints, cumulative, level_bits

__all__ = ["MOST", "Decoder", "Encoder", "code"]

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


class Bits(Protocol):
    """Where decisions go to or come from."""

    def bits(self, p: Ints, known: np.ndarray | None) -> np.ndarray:
        """Decisions bool (n,) whose probabilities of being true are p / 2^24; `known` by an encoder."""
        ...


class Encoder:
    """A stack of decisions: what is pushed last is decoded first, `push` by `push`.

    Until a push the decisions wait: about 90 bytes a pixel of an image.
    """

    def __init__(self) -> None:
        stream = _constriction()
        self._ans, self._family = stream.stack.AnsCoder(), stream.model.Bernoulli(perfect=False)
        self._waiting: list[tuple[np.ndarray, Ints]] = []

    def bits(self, p: Ints, known: np.ndarray | None) -> np.ndarray:
        assert known is not None
        self._waiting.append((known, p.astype(np.int32)))
        return known

    def push(self) -> int:
        """Put all decisions since the last push on the stack; returns the words below the state."""
        for known, p in reversed(self._waiting):
            self._ans.encode_reverse(known.astype(np.int32), self._family, p / 2.0**_PRECISION)
        self._waiting.clear()
        return int(self._ans.pos()[0])

    def words(self) -> np.ndarray:
        """The stack, uint32, its top last."""
        words: np.ndarray = self._ans.get_compressed()
        return words


class Decoder:
    """Takes decisions from a stack of words, uint32, its top last."""

    def __init__(self, words: np.ndarray) -> None:
        if len(words) and not words[-1]:
            raise CodecError("the file is damaged: no code begins with zeros")
        stream = _constriction()
        self._ans, self._family = stream.stack.AnsCoder(words), stream.model.Bernoulli(perfect=False)

    def bits(self, p: Ints, known: np.ndarray | None) -> np.ndarray:
        decided: np.ndarray = self._ans.decode(self._family, p / 2.0**_PRECISION)
        return decided.astype(bool)

    def left(self) -> int:
        """The words below the state."""
        return int(self._ans.pos()[0])


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

    def __init__(self, channel: Channel, levels: int, lo: Ints, hi: Ints | None) -> None:
        self.channel, self.levels = channel, levels
        self.low, self.high = lo, np.full_like(lo, levels) if hi is None else hi + 1
        self.truncated = hi is not None
        if self.truncated:
            self.start = self._whole(self.low)
            self.mass = self._whole(self.high) - self.start

    def _whole(self, edge: Ints) -> Ints:
        bits = level_bits(self.levels)
        inside = cumulative((edge << bits) - (1 << bits - 1), *self.channel)
        return np.where(edge >= self.levels, 1 << ONE, np.where(edge <= 0, 0, inside))

    def __call__(self, edge: Ints) -> Ints:
        if not self.truncated:
            return self._whole(edge)
        part = ((self._whole(edge) - self.start) << _INSIDE) // np.maximum(self.mass, 1)
        # an interval so far out that no mass is left in the tables: all of its values alike
        even = ((edge - self.low) << _INSIDE) // np.maximum(self.high - self.low, 1)
        return np.where(self.mass > 0, part, even)


def code(
    coder: Bits,
    weights: Ints,
    channel: Channel,
    levels: int,
    bounds: tuple[Ints, Ints] | None,
    known: Ints | None,
) -> tuple[Ints, Ints]:
    """Code a channel of n positions; returns their values (n,) and the weights given these (M, n).

    Arguments:
        weights: of the M components, whole numbers up to 2^20: (M, n).
        bounds: the least and the largest possible value of each position (n,); None: 0 and levels - 1.
        known: the values, for an encoder.
    """
    found, after = [], []
    for start in range(0, weights.shape[1], _CHUNK):
        at = slice(start, start + _CHUNK)
        v, w = _chunk(
            coder, weights[:, at], Channel(*(x[:, at] for x in channel)), levels,
            None if bounds is None else (bounds[0][at], bounds[1][at]),
            None if known is None else known[at],
        )  # fmt: skip
        found.append(v)
        after.append(w)
    return np.concatenate(found), np.concatenate(after, 1)


def _chunk(
    coder: Bits,
    weights: Ints,
    channel: Channel,
    levels: int,
    bounds: tuple[Ints, Ints] | None,
    known: Ints | None,
) -> tuple[Ints, Ints]:
    n = weights.shape[1]
    lo, hi = bounds or (np.zeros(n, np.int64), None)
    function = _Cumulative(channel, levels, lo, hi)
    a, b = function.low, function.high  # the edges between which the value lies
    below, above = function(a), function(b)
    node = np.zeros(n, np.int64)  # the value's high bits
    for bit in reversed(range((levels - 1).bit_length())):
        middle = np.clip(node + (1 << bit), a, b)
        at_middle = function(middle)
        p = _probability((weights * (above - at_middle)).sum(0), (weights * (at_middle - below)).sum(0))
        right = middle <= a
        open_ = (a < middle) & (middle < b)  # else the interval decides
        right[open_] = coder.bits(p[open_], None if known is None else known[open_] >= middle[open_])
        a, b = np.where(right, middle, a), np.where(right, b, middle)
        below, above = np.where(right, at_middle, below), np.where(right, above, at_middle)
        node = np.where(right, node + (1 << bit), node)
    posterior = weights * (above - below)
    most = posterior.max(0)
    shift = _length(most) - _WEIGHT
    posterior = np.where(shift > 0, posterior >> np.maximum(shift, 0), posterior << np.maximum(-shift, 0))
    return node, np.where(most > 0, posterior, weights)
