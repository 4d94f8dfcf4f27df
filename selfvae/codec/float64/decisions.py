"""Values with quantized distributions, coded as binary decisions.

A value is coded as a sequence of decisions, its highest bit first. Each decision needs one more value of
every component's distribution function; its probability is a multiple of 2^-24.
"""

from __future__ import annotations

import numpy as np

from selfvae.codec.ans import PRECISION, ANSCoder
from selfvae.codec.tables import ONE, Channel, Ints, cumulative

__all__ = ["MAX_COMPONENTS", "code"]

_WEIGHT = 20  # bits of a component's weight
_INSIDE = 26  # bits of a probability within an interval
_CHUNK = 1 << 14  # positions coded at once, to fit the processor's cache; part of the format
MAX_COMPONENTS = 64  # so that sums over components stay below 2^63


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
    ratio = ((true >> shift) << PRECISION) // np.maximum(both >> shift, 1)
    ratio = np.where(both == 0, 1 << PRECISION - 1, ratio)
    return np.clip(ratio, 1, (1 << PRECISION) - 1)


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
