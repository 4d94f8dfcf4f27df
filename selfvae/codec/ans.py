"""The entropy coder: a stack of binary decisions and uniform numbers, by asymmetric numeral systems (ANS).

The stack is 32-bit words below a state of 64 bits, as in the AnsCoder of the package constriction, which
wrote the first files. A False of probability q takes 1 + floor(q (2^24 - 2)) of 2^24 numbers, a True the
others, so that neither is impossible.

Source: Duda 2013; Bamler 2022.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from selfvae.codec.container import CodecError
from selfvae.codec.tables import Bools, Ints, Words
from selfvae.compiled import compiled

__all__ = ["PRECISION", "ANSCoder"]

PRECISION = 24  # bits of a decision's probability
_ONE = 1 << PRECISION
_HALF = (1 << 32) - 1  # the lower half of the coder's state

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
            width = 1 + ((_ONE - parameter) * (_ONE - 2) >> PRECISION)
            if value:
                start, width = width, _ONE - width
        if high >> 32 - PRECISION >= width:
            words[used] = low
            used += 1
            high, low = np.int64(0), high
        upper, rest = high // width, high % width
        rest = rest << 32 | low
        lower, rest = rest // width, rest % width
        high = upper << PRECISION | lower >> 32 - PRECISION
        low = (lower << PRECISION & _HALF) | (start + rest)
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
            width = 1 + ((_ONE - parameter) * (_ONE - 2) >> PRECISION)
            if at >= width:
                value, start, width = np.int64(1), width, _ONE - width
        values[i] = value
        lower = (high << 32 - PRECISION & _HALF | low >> PRECISION) * width + at - start
        high, low = (high >> PRECISION) * width + (lower >> 32), lower & _HALF
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
