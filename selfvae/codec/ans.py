"""The entropy coder: asymmetric numeral systems (ANS) for values with quantized distributions.

A value is coded as a sequence of binary decisions, its highest bit first. Each decision needs one more
value of every component's distribution function; its probability is a multiple of 2^-24. The ANS coder of
the package constriction rescales these probabilities slightly, in float64 products that are exact and hence
the same on every machine; the tests compare its output with a checksum.

Source: Duda 2013.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from selfvae.codec.container import CodecError
from selfvae.codec.tables import ONE, Bools, Channel, Floats, Ints, Words, cumulative

__all__ = ["MAX_COMPONENTS", "ANSCoder", "code"]

_PRECISION = 24  # bits of a decision's probability
_WEIGHT = 20  # bits of a component's weight
_INSIDE = 26  # bits of a probability within an interval
_CHUNK = 1 << 14  # positions coded at once, to fit the processor's cache; part of the format
MAX_COMPONENTS = 64  # so that sums over components stay below 2^63


def _constriction() -> Any:  # the package has no types
    try:
        import constriction
    except ImportError:
        raise ImportError(
            "compression needs the package constriction: pip install constriction (on platforms without a "
            "prebuilt package, this needs a Rust compiler)"
        ) from None
    return constriction.stream


class ANSCoder:
    """A stack of coded decisions and numbers: the last one pushed is the first one popped.

    Known values are queued until `push` puts them on the stack in reverse, so that they are popped in the
    order in which they were queued. The queue takes about 90 bytes per pixel of an image.

    Args:
        words: The stack, its top last, as `words()` returns it; None: empty.

    Raises:
        CodecError: The words are not the output of a coder.
        ImportError: The package constriction is missing.
    """

    def __init__(self, words: Words | None = None) -> None:
        if words is not None and len(words) and not words[-1]:
            raise CodecError("the file is damaged: no code begins with zeros")
        stream = _constriction()
        self._ans = stream.stack.AnsCoder() if words is None else stream.stack.AnsCoder(words)
        self._bernoulli = stream.model.Bernoulli(perfect=False)
        self._uniform = stream.model.Uniform()
        self._queue: list[tuple[Ints | Bools, Any, npt.NDArray[np.int32]]] = []
        self.low = 0  # the smallest value of `left` since it was last set

    def copy(self) -> ANSCoder:
        """Return another stack with the same words; the queue must be empty."""
        other = ANSCoder()
        other.become(self)
        return other

    def become(self, other: ANSCoder) -> None:
        """Take the words of another stack, and empty the queue."""
        self._ans, self.low = other._ans.clone(), other.low
        self._queue.clear()

    def bits(self, p: Ints, known: Bools | None = None) -> Bools:
        """Code decisions.

        Args:
            p: 2^24 times the probabilities of True, (n,).
            known: The decisions, (n,), to be queued; None: pop them.

        Returns:
            The decisions, (n,).
        """
        if known is None:
            return self._pop(self._bernoulli, p / 2.0**_PRECISION).astype(bool)
        self._queue.append((known, self._bernoulli, p.astype(np.int32)))
        return known

    def uniform(self, sizes: Ints, known: Ints | None = None) -> Ints:
        """Code uniformly distributed numbers.

        Args:
            sizes: A number lies in 0..size-1; sizes are 2 to 2^18: (n,).
            known: The numbers, (n,), to be queued; None: pop them.

        Returns:
            The numbers, (n,).
        """
        if known is None:
            return self._pop(self._uniform, sizes.astype(np.int32)).astype(np.int64)
        self._queue.append((known, self._uniform, sizes.astype(np.int32)))
        return known

    def _pop(self, family: Any, parameters: Floats | npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        popped: npt.NDArray[np.int32] = self._ans.decode(family, parameters)
        self.low = min(self.low, self.left())
        return popped

    def push(self) -> None:
        """Put the queue on the stack."""
        for known, family, p in reversed(self._queue):
            parameters = p / 2.0**_PRECISION if family is self._bernoulli else p
            self._ans.encode_reverse(known.astype(np.int32), family, parameters)
        self._queue.clear()

    def left(self) -> int:
        """Return the number of words below the coder's state."""
        return int(self._ans.pos()[0])

    def words(self) -> Words:
        """Return the stack, its top last."""
        words: Words = self._ans.get_compressed()
        return words


def _length(n: Ints) -> Ints:
    """Return the bit lengths of integers 0 <= n < 2^63."""
    out = np.zeros_like(n)
    for step in (32, 16, 8, 4, 2, 1):
        large = n >= np.int64(1) << step
        out += np.where(large, step, 0)
        n = np.where(large, n >> step, n)
    return out + n


def _probability(true: Ints, false: Ints) -> Ints:
    """Return 2^24 true / (true + false), never 0 or 2^24; half of it where both are 0."""
    both = true + false
    shift = np.maximum(_length(both) - 38, 0)
    ratio = ((true >> shift) << _PRECISION) // np.maximum(both >> shift, 1)
    ratio = np.where(both == 0, 1 << _PRECISION - 1, ratio)
    return np.clip(ratio, 1, (1 << _PRECISION) - 1)


class _Cumulative:
    """The components' distribution functions, truncated to an interval if one is given."""

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
        # an interval in the far tail, without mass in the tables: uniform
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
    """Code one channel at n positions.

    Args:
        stack: Where to queue known values or pop unknown ones.
        weights: Of the M components, integers up to 2^20: (M, n).
        channel: The components' distributions.
        num_values: Values lie in 0..num_values-1.
        bounds: The smallest and the largest possible value at each position, (n,); None: all are possible.
        known: The values, (n,), to be queued; None: pop them.

    Returns:
        The values, (n,), and the components' weights given these, (M, n).
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
    a, b = function.low, function.high  # the value lies in a..b-1
    below, above = function(a), function(b)
    node = np.zeros(n, np.int64)  # the value's high bits
    for bit in reversed(range((num_values - 1).bit_length())):
        middle = np.clip(node + (1 << bit), a, b)
        at_middle = function(middle)
        p = _probability((weights * (above - at_middle)).sum(0), (weights * (at_middle - below)).sum(0))
        right = middle <= a
        open_ = (a < middle) & (middle < b)  # elsewhere the interval leaves no choice
        right[open_] = stack.bits(p[open_], None if known is None else known[open_] >= middle[open_])
        a, b = np.where(right, middle, a), np.where(right, b, middle)
        below, above = np.where(right, at_middle, below), np.where(right, above, at_middle)
        node = np.where(right, node + (1 << bit), node)
    posterior = weights * (above - below)
    most = posterior.max(0)
    shift = _length(most) - _WEIGHT
    posterior = np.where(shift > 0, posterior >> np.maximum(shift, 0), posterior << np.maximum(-shift, 0))
    return node, np.where(most > 0, posterior, weights)
