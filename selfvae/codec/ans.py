"""The entropy coder: asymmetric numeral systems (ANS) for values with quantized distributions.

A value is coded as a sequence of binary decisions, its highest bit first. Each decision needs one more
value of every component's distribution function; its probability is a multiple of 2^-24.

The stack is 32-bit words below a state of 64 bits, as in the AnsCoder of the package constriction, which
wrote the first files. A False of probability q takes 1 + floor(q (2^24 - 2)) of 2^24 numbers, a True the
others, so that neither is impossible.

Source: Duda 2013; Bamler 2022.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from selfvae.codec.container import CodecError
from selfvae.codec.tables import ONE, Bools, Channel, Ints, Words, cumulative
from selfvae.compiled import compiled

__all__ = ["MAX_COMPONENTS", "ANSCoder", "code"]

_PRECISION = 24  # bits of a decision's probability
_ONE = 1 << _PRECISION
_HALF = (1 << 32) - 1  # the lower half of the coder's state
_WEIGHT = 20  # bits of a component's weight
_INSIDE = 26  # bits of a probability within an interval
_CHUNK = 1 << 14  # positions coded at once, to fit the processor's cache; part of the format
MAX_COMPONENTS = 64  # so that sums over components stay below 2^63

Steps = npt.NDArray[np.int32]


@compiled
def _push(words: Words, state: Ints, uniform: bool, parameters: Steps, values: Steps) -> None:
    """Push values to a stack, the last one first.

    Each takes the share `width` of the 2^24 numbers from `start` on. The state, below 2^64, is two halves
    of 32 bits, so that no product or sum exceeds 2^63.

    Args:
        words: The stack below the state, with room for a word per value; changed.
        state: Number of words in use, upper and lower half of the state; changed.
        uniform: Whether values are uniform on 0..parameter-1; else decisions, the parameter being 2^24
            times the probability of 1.
        parameters: (n,).
        values: (n,).
    """
    used, high, low = np.int64(state[0]), np.int64(state[1]), np.int64(state[2])
    for i in range(len(values) - 1, -1, -1):
        value, parameter = np.int64(values[i]), np.int64(parameters[i])
        if uniform:
            width = _ONE // parameter
            start = value * width
            if value == parameter - 1:
                width = _ONE - start
        else:
            start = np.int64(0)
            width = 1 + ((_ONE - parameter) * (_ONE - 2) >> _PRECISION)
            if value:
                start, width = width, _ONE - width
        if high >> 32 - _PRECISION >= width:
            words[used] = low
            used += 1
            high, low = np.int64(0), high
        upper, rest = high // width, high % width
        rest = rest << 32 | low
        lower, rest = rest // width, rest % width
        high = upper << _PRECISION | lower >> 32 - _PRECISION
        low = (lower << _PRECISION & _HALF) | (start + rest)
    state[0], state[1], state[2] = used, high, low


@compiled
def _pop(words: Words, state: Ints, uniform: bool, parameters: Steps, values: Steps) -> None:
    """Pop values from a stack into an array, the first one first; arguments as for `_push`."""
    used, high, low = np.int64(state[0]), np.int64(state[1]), np.int64(state[2])
    for i in range(len(values)):
        parameter, at = np.int64(parameters[i]), low & _ONE - 1
        if uniform:
            width = _ONE // parameter
            value = min(at // width, parameter - 1)
            start = value * width
            if value == parameter - 1:
                width = _ONE - start
        else:
            value = start = np.int64(0)
            width = 1 + ((_ONE - parameter) * (_ONE - 2) >> _PRECISION)
            if at >= width:
                value, start, width = np.int64(1), width, _ONE - width
        values[i] = value
        lower = (high << 32 - _PRECISION & _HALF | low >> _PRECISION) * width + at - start
        high, low = (high >> _PRECISION) * width + (lower >> 32), lower & _HALF
        if high == 0 and used:
            used -= 1
            high, low = low, np.int64(words[used])
    state[0], state[1], state[2] = used, high, low


class ANSCoder:
    """A stack of coded decisions and numbers: the last one pushed is the first one popped.

    Known values are queued until `push` puts them on the stack in reverse, so that they are popped in the
    order in which they were queued. The queue takes about 90 bytes per pixel of an image.

    Args:
        words: The stack, its top last, as `words()` returns it; None: empty.

    Raises:
        CodecError: The words are not the output of a coder.
    """

    def __init__(self, words: Words | None = None) -> None:
        if words is None:
            words = np.zeros(0, np.uint32)
        if len(words) and not words[-1]:
            raise CodecError("the file is damaged: no code begins with zeros")
        self._words = words.astype(np.uint32)  # a copy; those beyond `left()` are free
        low, high = (*words[-2:].tolist(), 0, 0)[:2]
        self._state = np.array([max(len(words) - 2, 0), high, low], np.int64)
        self._queue: list[tuple[bool, Steps, Ints | Bools]] = []
        self.low = 0  # the smallest value of `left` since it was last set

    def copy(self) -> ANSCoder:
        """Return another stack with the same words; the queue must be empty."""
        other = ANSCoder()
        other.become(self)
        return other

    def become(self, other: ANSCoder) -> None:
        """Take the words of another stack, and empty the queue."""
        self._words, self._state = other._words[: other.left()].copy(), other._state.copy()
        self.low = other.low
        self._queue.clear()

    def bits(self, p: Ints, known: Bools | None = None) -> Bools:
        """Code decisions.

        Args:
            p: 2^24 times the probabilities of True, 1 to 2^24 - 1: (n,).
            known: The decisions, (n,), to be queued; None: pop them.

        Returns:
            The decisions, (n,).
        """
        if known is None:
            return self._popped(False, p).astype(bool)
        self._queue.append((False, p.astype(np.int32), known))
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
            return self._popped(True, sizes).astype(np.int64)
        self._queue.append((True, sizes.astype(np.int32), known))
        return known

    def _popped(self, uniform: bool, parameters: Ints) -> Steps:
        values = np.zeros(len(parameters), np.int32)
        _pop(self._words, self._state, uniform, parameters.astype(np.int32), values)
        self.low = min(self.low, self.left())
        return values

    def push(self) -> None:
        """Put the queue on the stack."""
        room = self.left() + sum(len(values) for _, _, values in self._queue)
        if room > len(self._words):  # twice as much, so that many small pushes cost few copies
            self._words = np.append(self._words, np.zeros(2 * room - len(self._words), np.uint32))
        for uniform, parameters, values in reversed(self._queue):
            _push(self._words, self._state, uniform, parameters, values.astype(np.int32))
        self._queue.clear()

    def left(self) -> int:
        """Return the number of words below the coder's state."""
        return int(self._state[0])

    def words(self) -> Words:
        """Return the stack, its top last."""
        used, high, low = self._state.tolist()
        top = [low, high] if high else [low] if low else []
        return np.append(self._words[:used], np.array(top, np.uint32))


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
