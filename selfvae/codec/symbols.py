"""Entropy coding of mixtures in whole numbers, one symbol at a time: asymmetric numeral systems (rANS).

A value v of a mixture occupies the slots C(v) .. C(v + 1) - 1 of 2^24, where C is the mixture's
distribution function, from integer tables, plus v, so that every value has a slot. The encoder computes
both ends, the decoder searches for v. The coder's state is a number from 2^31 to 2^63, which grows and
shrinks by words of 32 bits. It begins at 2^31 plus a checksum of 31 bits of the values: a decoder that ends
elsewhere knows that the stream is damaged.

The loops are compiled (see `compiled`); without a compiler the same code runs, slowly, and gives the same
bytes. All numbers stay below 2^63.

Source: Duda 2013; Salimans et al. 2017 (PixelCNN++), section 2.1, for the mixture.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from selfvae.codec import container
from selfvae.codec.container import CodecError
from selfvae.compiled import compiled, wide_vectors
from selfvae.distributions import pixels

__all__ = [
    "CONTEXTS",
    "FACTORS",
    "NO_FACTOR",
    "TOGETHER",
    "WEIGHT_BITS",
    "Bools",
    "Corrected",
    "Ints",
    "Mixture",
    "Params",
    "SlotDecoder",
    "SlotEncoder",
    "Tables",
    "cost",
    "find_contexts",
    "tables",
]

Ints = npt.NDArray[np.int64]
Params = npt.NDArray[np.int16]
Bools = npt.NDArray[np.bool_]

_SLOTS = 24  # bits of the number of slots
_WEIGHT = 16  # bits of the sum of the components' weights
_MASS = 30  # bits of a probability in the tables
_ARGUMENT, _STEPS = 18, 6  # fractional bits of a logistic's argument, and of the table's
_INVERSE = 26  # fractional bits of an inverse scale
_COEFFICIENT = 14  # fractional bits of a coefficient
_REACH = 20  # fractional bits of the width of a step of a mean
_MEAN = 15  # bits of the range of means, that is, steps of 1/128 grey level for 256 values
_FAR, _MASK = 1408, 2047  # where the tail ends, in steps of the table, and a mask of its indices
WEIGHT_BITS = 10  # fractional bits of the weights of corrections
CONTEXTS = 16  # of the factors by which corrections multiply scales: 8 ratios times 2 spreads
FACTORS = tuple(i / 10 for i in range(-7, 9))  # their logarithms
NO_FACTOR = FACTORS.index(0)
_FACTOR = 14  # fractional bits of a factor
_RATIO = 8  # fractional bits of the ratios' borders
_WIDE = 256  # the spread, in steps of the means of 256 values, from which the second contexts count
_LOWEST = 1 << 31  # the lowest state of the coder
_FARTHEST = 1 << 24  # the largest absolute value of a mean
TOGETHER = 64  # positions in a block, which are computed side by side


class Tables(NamedTuple):
    """What the loops need to know of a mixture: numbers and integer tables, part of the format.

    Attributes:
        array: All numbers and tables, in sections that constants name: int64.
        bits: Of the width of a grey level in steps of the means.
        top: The largest value.
        channels: Of a pixel.
        components: Of the mixture.
    """

    array: Ints
    bits: int
    top: int
    channels: int
    components: int

    def add_weighted(self, estimates: Ints, outputs: Params, misses: Ints) -> Ints:
        """Return estimates plus what the four neighbours missed, times coefficients that a network gives.

        Args:
            estimates: (C, B, h, w).
            outputs: The network's, which stand for coefficients of the misses on the left, at the place
                itself, below left and below, of all channels each: (4 C, B, h, w).
            misses: With one more column on the left and one more row below: (C, B, h + 1, w + 1).
        """
        found = estimates.copy()
        _add_weighted(found, outputs, misses, self.array)
        return found


def _softplus(x: Decimal) -> Decimal:
    return (1 + x.exp()).ln()


def _tanh(x: Decimal) -> Decimal:
    up, down = x.exp(), (-x).exp()
    return (up - down) / (up + down)


def _whole(values: Iterable[Decimal]) -> list[int]:
    """Evaluate to 50 digits and round."""
    with localcontext(Context(prec=50)):
        return [int(value.to_integral_value()) for value in values]


def _logistic() -> tuple[Ints, Ints]:
    """Tabulate the tail of a logistic, and how much it falls from each entry to the next one."""
    with localcontext(Context(prec=60)):
        step, power, tail = (Decimal(1) / 2**_STEPS).exp(), Decimal(1), []
        for _ in range(_FAR + 1):
            tail.append(int((2**_MASS / (1 + power)).to_integral_value()))
            power *= step
    table = np.array(tail + [0] * (_MASK - _FAR))
    return table, np.where(np.arange(_MASK + 1) < _FAR, table - np.roll(table, -1), 0)


_TAIL, _FALL = _logistic()  # as constants of the compiled code, which can be looked up side by side


@functools.cache
def _curves() -> tuple[list[int], list[int]]:
    """Tabulate weights of components, and coefficients."""
    logit_bits, (coefficient_bits, most) = pixels.LOGIT[0], pixels.COEFFICIENT
    span = (Decimal(i) / 2**coefficient_bits for i in range(-most, most + 1))
    return (
        _whole(2**_MASS * (-Decimal(i) / 2**logit_bits).exp() for i in range(256)),
        _whole(2**_COEFFICIENT * _tanh(c) for c in span),
    )


@functools.cache
def _inverse_scales(start: float, half: Fraction) -> list[int]:
    """Tabulate the inverse scales that outputs stand for, given half the largest value."""
    floor, top = Decimal(pixels.LOG_SCALE_FLOOR), Decimal(pixels.LOG_SCALE_TOP)
    scale_bits, scale_steps = pixels.SCALE

    def inverse(i: int) -> Decimal:
        scale = Decimal(i) / 2**scale_bits + Decimal(start)
        log_scale = min(floor + _softplus(scale - floor), top)
        return (-log_scale).exp() * 2**_INVERSE * half.denominator / half.numerator

    return _whole(map(inverse, range(-scale_steps, scale_steps + 2)))


@functools.cache
def tables(num_values: int, channels: int, components: int, residual_mean: bool, residual: bool) -> Tables:
    """Tabulate by decimal arithmetic, never by the platform's mathematical functions.

    Args:
        num_values: Values per channel.
        channels: Of a pixel.
        components: Of the mixture.
        residual_mean: Whether an estimate is added to the means (`PixelMixture.prediction`).
        residual: Whether coefficients act on residuals.
    """
    start, reach = pixels.LOG_SCALE_START, pixels.REACH
    if residual_mean:
        start, reach = pixels.LOG_SCALE_START_RESIDUAL, pixels.REACH_RESIDUAL
    half, bits = Fraction(num_values - 1, 2), _MEAN - (num_values - 1).bit_length()
    array = np.zeros(_END, np.int64)
    step = round(Fraction(str(reach)) * half * 2 ** (bits + _REACH) / 2 ** pixels.MEAN[0])
    array[:6] = bits, num_values - 1, residual, channels, components, step
    weights, coefficients = _curves()
    sections = (_WEIGHTS, weights), (_COEFFICIENTS, coefficients)
    for at, values in (*sections, (_INVERSES, _inverse_scales(start, half))):
        array[at : at + len(values)] = values
    # where (i + 1/2) / 1024 of a logistic's mass lies, and scales; only the speed depends on these
    share = (np.arange(1024) + 0.5) / 1024
    array[_SCALES:_END] = (1 << (bits + _INVERSE)) // np.maximum(array[_INVERSES:_COEFFICIENTS], 1)
    array[_LOGIT:_WEIGHTS] = np.round(np.log(share / (1 - share)) * 2**_ARGUMENT)
    return Tables(array, bits, num_values - 1, channels, components)


# In the loops t is `Tables.array`, whose entries and sections these constants name; i is the number of a
# position; c is scratch space for one position, int64 (8, M), whose rows the last constants name. Few
# arrays are passed from function to function, and no parts of arrays: both would cost more than what is
# computed.

_BITS, _TOP, _RESIDUAL, _CHANNELS, _COMPONENTS, _STEP = range(6)
_LOGIT, _WEIGHTS, _INVERSES, _COEFFICIENTS, _SCALES, _END = 8, 1032, 1288, 1800, 3848, 4360
_MEANS, _INV, _UNDER, _INSIDE, _BELOW, _ABOVE, _PARTS, _OLD = range(8)

# Where all values are known, blocks of positions are computed side by side, by vector instructions. The
# compiler uses these only if it can see that no store changes what is loaded next: s is scratch space for a
# block, one flat array whose rows begin at these constants. A block may begin anywhere; arrays have
# `TOGETHER` entries more than there are positions, so that the last block need not be shorter.

(
    _LOW, _CENTRE, _MOVED, _WIDE_BY, _NARROW_BY, _UNDER_ROW, _OVER_ROW, _PART, _TOTAL, _SHIFT, _RATE, _LEFT,
    _MOST, _WHICH, _CODED, _SPREAD, _SHIFTED, _MISSED, _EXPECTED, _CONTEXT, _NUMBER, _DIGITS, _MEAN_ROW,
    _SCRATCH,
) = range(0, 24 * TOGETHER, TOGETHER)  # fmt: skip


@compiled
def _mass(middle: int, mean: int, inverse: int, t: Any) -> int:
    """Return 2^30 times a logistic's mass below `middle`, in steps of the means."""
    return _mass_at(((middle - mean) * inverse) >> (t[_BITS] + _INVERSE - _ARGUMENT))


@compiled
def _mass_at(x: int) -> int:
    """Return 2^30 times a logistic's mass below an argument, in units of 2^-18."""
    far = min(abs(x), _FAR << (_ARGUMENT - _STEPS))
    i = (far >> (_ARGUMENT - _STEPS)) & _MASK  # tells the compiler that i is not negative
    rest = far & ((1 << (_ARGUMENT - _STEPS)) - 1)
    tail = _TAIL[i] - ((_FALL[i] * rest) >> (_ARGUMENT - _STEPS))
    return tail if x < 0 else (1 << _MASS) - tail


@compiled
def _edge(edge: int, mean: int, inverse: int, t: Any) -> int:
    """Return 2^30 times a logistic's mass below the value `edge`."""
    if edge <= 0:
        return 0
    if edge > t[_TOP]:
        return 1 << _MASS
    return _mass((edge << t[_BITS]) - (1 << (t[_BITS] - 1)), mean, inverse, t)


@compiled
def _slots(edge: int, lo: int, hi: int, weights: Any, i: int, c: Any, to: int, t: Any) -> int:
    """Return the number of slots below the value `edge` of lo..hi + 1; components' masses go to c[to]."""
    total, n = 0, hi + 1 - lo
    if n > t[_TOP]:
        if edge <= 0 or edge > t[_TOP]:
            for m in range(t[_COMPONENTS]):
                c[to, m] = 0 if edge <= 0 else 1 << _MASS
            return 0 if edge <= 0 else 1 << _SLOTS
        middle = (edge << t[_BITS]) - (1 << (t[_BITS] - 1))
        for m in range(t[_COMPONENTS]):
            part = _mass(middle, c[_MEANS, m], c[_INV, m], t)
            c[to, m] = part
            total += weights[m, i] * part
    else:
        for m in range(t[_COMPONENTS]):
            if c[_INSIDE, m] > 0:
                part = _edge(edge, c[_MEANS, m], c[_INV, m], t) - c[_UNDER, m]
                part = (part << _MASS) // c[_INSIDE, m]
            else:  # in the far tail, without mass in the tables: uniform
                part = ((edge - lo) << _MASS) // n
            c[to, m] = part
            total += weights[m, i] * part
    return (((total >> _WEIGHT) * ((1 << _SLOTS) - n)) >> _MASS) + edge - lo


@compiled
def _interval(value: int, lo: int, hi: int, weights: Any, i: int, c: Any, t: Any) -> tuple[int, int]:
    """Return the first slot of a value of lo..hi and the number of its slots; masses go to c as above.

    Both edges in one loop, which is faster than `_slots` twice.
    """
    n = hi + 1 - lo
    if n <= t[_TOP]:
        first = _slots(value, lo, hi, weights, i, c, _BELOW, t)
        return first, _slots(value + 1, lo, hi, weights, i, c, _ABOVE, t) - first
    below, above, unit = 0, 0, 1 << t[_BITS]
    middle = (value << t[_BITS]) - (unit >> 1)
    for m in range(t[_COMPONENTS]):
        mean, inverse, weight = c[_MEANS, m], c[_INV, m], weights[m, i]
        under = _mass(middle, mean, inverse, t) if value > 0 else 0
        over = _mass(middle + unit, mean, inverse, t) if value < t[_TOP] else 1 << _MASS
        c[_BELOW, m], c[_ABOVE, m] = under, over
        below += weight * under
        above += weight * over
    return _ends(value, below, above, t)


@compiled
def _ends(value: int, below: int, above: int, t: Any) -> tuple[int, int]:
    """Return the first slot of a value and the number of its slots, given the masses at its edges."""
    shared = (1 << _SLOTS) - 1 - t[_TOP]
    first = ((below >> _WEIGHT) * shared) >> _MASS
    return first + value, (((above >> _WEIGHT) * shared) >> _MASS) + 1 - first


@compiled
def _masses(first: int, parts: Any, weights: Any, t: Any, s: Any, inside: Any) -> None:
    """Compute the masses of a block of mixtures at both edges of values.

    As `_interval` does for one position. Means are moved and scales multiplied, as by `_correct`.

    Args:
        first: The first position of the block.
        parts, weights: See `Mixture`.
        t: Of the tables.
        s: Has the lower edge of each value, in steps of the means (`_LOW`); a mean m becomes `_MOVED` +
            `_WIDE_BY` * (m - `_CENTRE`), and inverse scales are multiplied by `_NARROW_BY`; factors are in
            units of 2^-14. Receives the sums of weighted masses, in `_UNDER_ROW` and `_OVER_ROW`.
        inside: Receives the components' weighted masses of the value: (M, `TOGETHER`).
    """
    wide_vectors()
    unit, end, shift = 1 << t[_BITS], t[_TOP] << t[_BITS], t[_BITS] + _INVERSE - _ARGUMENT
    for k in range(TOGETHER):
        s[_UNDER_ROW + k] = s[_OVER_ROW + k] = 0
    for m in range(len(inside)):
        means, inverses = parts[0, m, first : first + TOGETHER], parts[1, m, first : first + TOGETHER]
        own, found = weights[m, first : first + TOGETHER], inside[m]
        for k in range(TOGETHER):
            mean = s[_MOVED + k] + (((means[k] - s[_CENTRE + k]) * s[_WIDE_BY + k]) >> _FACTOR)
            mean = min(max(mean, -_FARTHEST), _FARTHEST)
            inverse = max((inverses[k] * s[_NARROW_BY + k]) >> _FACTOR, 1)
            lowest = s[_LOW + k]
            under = _mass_at(((lowest - mean) * inverse) >> shift)
            over = _mass_at(((lowest + unit - mean) * inverse) >> shift)
            under = under if lowest > 0 else 0
            over = over if lowest + unit < end else 1 << _MASS
            s[_UNDER_ROW + k] += own[k] * under
            s[_OVER_ROW + k] += own[k] * over
            s[_PART + k] = own[k] * (over - under)
        for k in range(TOGETHER):
            found[k] = s[_PART + k]


@compiled
def _components(
    outputs: Any,
    at: int,
    channel: int,
    prediction: Any,
    values: Any,
    means: Any,
    t: Any,
    s: Any,
    parts: Any,
) -> None:
    """Compute the means and the inverse scales of a channel's components, into parts (2, M, n).

    means (C, M, n): before coefficients act; those of the channel are filled in.
    """
    wide_vectors()
    n, channels, residual = t[_COMPONENTS], t[_CHANNELS], t[_RESIDUAL]
    at_mean, at_scale = at + (1 + channel) * n, at + (1 + channels + channel) * n
    at_pair = at + (1 + 2 * channels + channel * (channel - 1) // 2) * n
    step, bits, centre = t[_STEP], t[_BITS], t[_TOP] << (t[_BITS] - 1)
    for first in range(0, outputs.shape[1], TOGETHER):
        count = min(TOGETHER, outputs.shape[1] - first)
        guess = prediction[channel, first : first + count]
        for m in range(n):
            new = means[channel, m, first : first + TOGETHER]
            moved, inverses = parts[0, m, first : first + TOGETHER], parts[1, m, first : first + TOGETHER]
            for k in range(count):
                s[_LOW + k] = outputs[at_mean + m, first + k]
                inverses[k] = t[_INVERSES + ((255 + outputs[at_scale + m, first + k]) & 511)]
            for k in range(count):
                s[_MEAN_ROW + k] = guess[k] + ((s[_LOW + k] * step + (1 << (_REACH - 1))) >> _REACH)
            for k in range(TOGETHER):
                new[k] = s[_MEAN_ROW + k]
            for j in range(channel):
                value, before = values[j, first : first + count], means[j, m, first : first + TOGETHER]
                own = outputs[at_pair + j * n + m, first : first + count]
                for k in range(count):
                    s[_PART + k] = t[_COEFFICIENTS + ((1023 + own[k]) & 2047)]
                for k in range(count):
                    known = (value[k] << bits) - (before[k] if residual else centre)
                    s[_MEAN_ROW + k] += (s[_PART + k] * known + (1 << (_COEFFICIENT - 1))) >> _COEFFICIENT
            for k in range(TOGETHER):
                moved[k] = min(max(s[_MEAN_ROW + k], -_FARTHEST), _FARTHEST)


@compiled
def _add_weighted(found: Any, outputs: Any, misses: Any, t: Any) -> None:
    """Add weighted misses to estimates, each rounded; see `Tables.add_weighted`."""
    channels, pictures, height, width = found.shape
    for c in range(channels):
        for i in range(pictures):
            for row in range(height):
                for k in range(width):
                    for j in range(4):
                        at = _COEFFICIENTS + ((1023 + outputs[j * channels + c, i, row, k]) & 2047)
                        product = t[at] * misses[c, i, row + (j >> 1), k + (j & 1)]
                        found[c, i, row, k] += (product + (1 << (_COEFFICIENT - 1))) >> _COEFFICIENT


@compiled
def _load(parts: Any, i: int, c: Any) -> None:
    """Copy the components of a position to where the functions below look for them."""
    for m in range(parts.shape[1]):
        c[_MEANS, m], c[_INV, m] = parts[0, m, i], parts[1, m, i]


@compiled
def _limit(lo: int, hi: int, c: Any, t: Any) -> None:
    """Compute the components' masses below lo and of lo..hi, unless all values are possible."""
    if hi - lo < t[_TOP]:
        for m in range(t[_COMPONENTS]):
            c[_UNDER, m] = _edge(lo, c[_MEANS, m], c[_INV, m], t)
            c[_INSIDE, m] = _edge(hi + 1, c[_MEANS, m], c[_INV, m], t) - c[_UNDER, m]


def _exponentials(exponents: Iterable[float], bits: int) -> Ints:
    with localcontext(Context(prec=50)):
        return np.array([int((Decimal(str(x)).exp() * 2**bits).to_integral_value()) for x in exponents])


_HALF = 1 << (WEIGHT_BITS - 1)
_LOG2 = np.array([round(2**16 * math.log2(1 + (i + 0.5) / 256)) for i in range(256)])  # of a mantissa
_WIDER, _NARROWER = _exponentials(FACTORS, _FACTOR), _exponentials((-x for x in FACTORS), _FACTOR)
_BORDERS = np.array([128, 161, 203, 256, 323, 406, 512])  # of the ratios: 1/2 to 2 in steps of 2^(1/3)


@compiled
def _moments(outputs: Any, scales_at: int, parts: Any, weights: Any, t: Any, s: Any, own: Any) -> None:
    """Compute each mixture's mean and spread, in steps of the means, into own (2, n)."""
    wide_vectors()
    for first in range(0, outputs.shape[1], TOGETHER):
        count = min(TOGETHER, outputs.shape[1] - first)
        for k in range(TOGETHER):
            s[_TOTAL + k] = 1 << (_WEIGHT - 1)
            s[_SPREAD + k] = 0
        for m in range(t[_COMPONENTS]):
            means, weight = parts[0, m, first : first + TOGETHER], weights[m, first : first + TOGETHER]
            for k in range(TOGETHER):
                s[_TOTAL + k] += weight[k] * means[k]
        for k in range(TOGETHER):
            s[_CENTRE + k] = s[_TOTAL + k] >> _WEIGHT
        for m in range(t[_COMPONENTS]):
            means, weight = parts[0, m, first : first + TOGETHER], weights[m, first : first + TOGETHER]
            for k in range(count):
                s[_PART + k] = t[_SCALES + ((255 + outputs[scales_at + m, first + k]) & 511)]
            for k in range(TOGETHER):
                # values of a logistic are 1.39 scales from its mean, on average; in practice fewer
                distance = abs(means[k] - s[_CENTRE + k]) + ((s[_PART + k] * 307) >> 8)
                s[_SPREAD + k] += weight[k] * distance
        centres, spreads = own[0, first : first + TOGETHER], own[1, first : first + TOGETHER]
        for k in range(TOGETHER):
            centres[k] = s[_CENTRE + k]
        for k in range(TOGETHER):
            spreads[k] = (s[_SPREAD + k] >> _WEIGHT) + 19


@compiled
def _correct(i: int, own: Any, seen: Any, fit: Any, c: Any, t: Any) -> None:
    """Shift the means of a position and multiply its scales; see `Corrected`."""
    mean, left = own[0, i], _left(i, fit[0])
    above = left - fit[0] - 1
    shift = own[2, i] + fit[1] * seen[0, left] + fit[2] * seen[0, above]
    shift += fit[3] * seen[0, above - 1] + fit[4] * seen[0, above + 1]
    shift = _limited((shift + _HALF) >> WEIGHT_BITS, own[1, i])
    factor = fit[5 + _context(i, own, seen, fit[0])] & 15
    for m in range(t[_COMPONENTS]):
        moved = mean + shift + (((c[_MEANS, m] - mean) * _WIDER[factor]) >> _FACTOR)
        c[_MEANS, m] = min(max(moved, -_FARTHEST), _FARTHEST)
        c[_INV, m] = max((c[_INV, m] * _NARROWER[factor]) >> _FACTOR, 1)


@compiled
def _limited(shift: int, spread: int) -> int:
    """Limit a shift to 8 spreads."""
    return min(max(shift, -8 * spread), 8 * spread)


@compiled
def _left(i: int, columns: int) -> int:
    """Return where a position's left neighbour stands in `Corrected.seen`."""
    row = i // columns
    return (row + 1) * (columns + 2) + i - row * columns


@compiled
def _context(i: int, own: Any, seen: Any, columns: int) -> int:
    """Return the number of a position's context, by the misses and the spreads near by."""
    left = _left(i, columns)
    above = left - columns - 1
    missed = own[3, i] + abs(seen[0, left]) + abs(seen[0, above])
    missed += abs(seen[0, above - 1]) + abs(seen[0, above + 1])
    expected = own[4, i] + seen[1, left] + seen[1, above] + seen[1, above - 1] + seen[1, above + 1]
    context = 1 if own[1, i] >= _WIDE else 0
    for j in range(len(_BORDERS)):
        if (missed << _RATIO) >= _BORDERS[j] * expected:
            context += 2
    return context


@compiled
def _block_contexts(first: int, left: int, columns: int, own: Any, seen: Any, s: Any) -> None:
    """Find the contexts of a block of positions in a row, as `_context` does for one, into `_CONTEXT`.

    left: where the left neighbour of the first one stands in `Corrected.seen`.
    """
    wide_vectors()
    above = left - columns - 1
    spreads = own[1, first : first + TOGETHER]
    missed, expected = own[3, first : first + TOGETHER], own[4, first : first + TOGETHER]
    for k in range(TOGETHER):
        s[_MISSED + k] = missed[k] << _RATIO
        s[_EXPECTED + k] = expected[k]
        s[_CONTEXT + k] = 1 if spreads[k] >= _WIDE else 0
    for at in (left, above, above - 1, above + 1):
        missed, expected = seen[0, at : at + TOGETHER], seen[1, at : at + TOGETHER]
        for k in range(TOGETHER):
            s[_MISSED + k] += abs(missed[k]) << _RATIO
            s[_EXPECTED + k] += expected[k]
    for border in _BORDERS:
        for k in range(TOGETHER):
            s[_CONTEXT + k] += 2 if s[_MISSED + k] >= border * s[_EXPECTED + k] else 0


@compiled
def _find_contexts(own: Any, seen: Any, columns: int, s: Any, out: Any) -> None:
    """Find the context of each position, from misses that are known (see `Corrected`)."""
    for row in range(0, len(out), columns):
        for first in range(row, row + columns, TOGETHER):
            count = min(TOGETHER, row + columns - first)
            _block_contexts(first, _left(first, columns), columns, own, seen, s)
            for k in range(count):
                out[first + k] = s[_CONTEXT + k]


@compiled
def _try(
    parts: Any, weights: Any, values: Any, moments: Any, shifts: Any, factors: Any, t: Any, s: Any, out: Any
) -> None:
    """Compute what values cost with moved means and scales, in units of 2^-16 bits, into out (k,)."""
    inside = np.empty((len(weights), TOGETHER), np.int64)
    for first in range(0, len(out), TOGETHER):
        count = min(TOGETHER, len(out) - first)
        for k in range(count):
            i = first + k
            s[_LOW + k] = (values[i] << t[_BITS]) - (1 << (t[_BITS] - 1))
            s[_CENTRE + k] = moments[0, i]
            s[_MOVED + k] = moments[0, i] + _limited(shifts[i], moments[1, i])
            s[_WIDE_BY + k] = _WIDER[factors[i] & 15]
            s[_NARROW_BY + k] = _NARROWER[factors[i] & 15]
        _masses(first, parts, weights, t, s, inside)
        for k in range(count):
            s[_NUMBER + k] = _ends(values[first + k], s[_UNDER_ROW + k], s[_OVER_ROW + k], t)[1]
        _costs(s)
        for k in range(count):
            out[first + k] = s[_PART + k]


@compiled
def _costs(s: Any) -> None:
    """Compute the bits of values with `_NUMBER` slots each, in units of 2^-16, into `_PART`."""
    wide_vectors()
    for k in range(TOGETHER):
        s[_DIGITS + k] = 0
    for digits in range(1, _SLOTS + 1):
        for k in range(TOGETHER):
            s[_DIGITS + k] += 1 if s[_NUMBER + k] >> digits else 0
    for k in range(TOGETHER):
        mantissa = ((s[_NUMBER + k] << 8) >> s[_DIGITS + k]) & 255
        s[_PART + k] = ((_SLOTS - s[_DIGITS + k]) << 16) - _LOG2[mantissa]


@compiled
def _remember(i: int, value: int, own: Any, seen: Any, fit: Any, t: Any) -> None:
    """Note by how much a value missed its mixture's mean."""
    seen[0, _left(i, fit[0]) + 1] = (value << t[_BITS]) - own[0, i]


@compiled
def _share(weights: Any, i: int, total: int) -> None:
    """Scale the weights of a position, which add to `total` < 2^47, such that they add to 2^16."""
    shift = 16 if total >> 30 else 0
    factor = (1 << 46) // ((total >> shift) + 1)
    left, most = 1 << _WEIGHT, 0
    for m in range(len(weights)):
        weights[m, i] = ((weights[m, i] >> shift) * factor) >> 30
        left -= weights[m, i]
        if weights[m, i] > weights[most, i]:
            most = m
    weights[most, i] += left


@compiled
def _start(outputs: Any, at: int, weights: Any, t: Any, s: Any) -> None:
    """Compute the components' weights before any channel is known: (M, n)."""
    wide_vectors()
    inside = np.zeros((t[_COMPONENTS], TOGETHER), np.int64)
    for first in range(0, outputs.shape[1], TOGETHER):
        count = min(TOGETHER, outputs.shape[1] - first)
        for k in range(TOGETHER):
            s[_MOST + k] = -(1 << 15)
        for m in range(len(inside)):
            for k in range(count):
                s[_MOST + k] = max(s[_MOST + k], outputs[at + m, first + k])
        for m in range(len(inside)):
            part = inside[m]
            for k in range(count):
                part[k] = t[_WEIGHTS + (min(s[_MOST + k] - outputs[at + m, first + k], 255) & 255)]
        for k in range(TOGETHER):
            s[_CODED + k] = 1 if k < count else 0
        _update(first, inside, s, weights)


@compiled
def _observe(weights: Any, i: int, c: Any) -> None:
    """Update the weights of a position by Bayes' rule, unless all masses of the value are 0."""
    total = 0
    for m in range(len(weights)):
        c[_OLD, m] = weights[m, i] * (c[_ABOVE, m] - c[_BELOW, m])
        total += c[_OLD, m]
    if total > 0:
        for m in range(len(weights)):
            weights[m, i] = c[_OLD, m]
        _share(weights, i, total)


@compiled
def _update(first: int, inside: Any, s: Any, weights: Any) -> None:
    """Make a block's weights proportional to `inside` where `_CODED` is 1, as `_observe` does for one."""
    wide_vectors()
    for k in range(TOGETHER):
        s[_TOTAL + k] = 0
    for m in range(len(inside)):
        part = inside[m]
        for k in range(TOGETHER):
            s[_TOTAL + k] += part[k]
    for k in range(TOGETHER):
        s[_TOTAL + k] = s[_TOTAL + k] if s[_CODED + k] > 0 else 0
        s[_SHIFT + k] = 16 if s[_TOTAL + k] >> 30 else 0
        # as in `_share`: float64 rounds no quotient of these numbers up to a whole number
        s[_RATE + k] = np.int64(np.divide(2.0**46, (s[_TOTAL + k] >> s[_SHIFT + k]) + 1))
        s[_LEFT + k], s[_MOST + k], s[_WHICH + k] = 1 << _WEIGHT, -1, 0
    for m in range(len(inside)):
        part = inside[m]
        for k in range(TOGETHER):
            weight = ((part[k] >> s[_SHIFT + k]) * s[_RATE + k]) >> 30
            s[_PART + k] = weight
            s[_LEFT + k] -= weight
            s[_WHICH + k] = m if weight > s[_MOST + k] else s[_WHICH + k]
            s[_MOST + k] = max(weight, s[_MOST + k])
        for k in range(TOGETHER):
            part[k] = s[_PART + k]
    for m in range(len(inside)):
        part, own = inside[m], weights[m, first : first + TOGETHER]
        for k in range(TOGETHER):
            s[_PART + k] = part[k] + (s[_LEFT + k] if s[_WHICH + k] == m else 0)
        for k in range(TOGETHER):
            own[k] = s[_PART + k] if s[_TOTAL + k] > 0 else own[k]


@compiled
def _learn(parts: Any, values: Any, coded: Any, weights: Any, t: Any, s: Any) -> None:
    """Update the weights by the values (n,) of a channel, where these are coded."""
    inside = np.empty((len(weights), TOGETHER), np.int64)
    for k in range(TOGETHER):
        s[_CENTRE + k] = s[_MOVED + k] = 0
        s[_WIDE_BY + k] = s[_NARROW_BY + k] = 1 << _FACTOR
    for first in range(0, len(values), TOGETHER):
        count = min(TOGETHER, len(values) - first)
        for k in range(TOGETHER):
            s[_CODED + k] = 0
        for k in range(count):
            s[_LOW + k] = (values[first + k] << t[_BITS]) - (1 << (t[_BITS] - 1))
            s[_CODED + k] = coded[first + k]
        _masses(first, parts, weights, t, s, inside)
        _update(first, inside, s, weights)


@compiled
def _find_corrected(
    parts: Any, values: Any, coded: Any, last: bool, weights: Any, t: Any, own: Any, seen: Any, fit: Any,
    s: Any, slots: Any,
) -> int:  # fmt: skip
    """Find the slots of one channel's values with corrections, as `_find` does without."""
    inside, found, columns = np.empty((len(weights), TOGETHER), np.int64), 0, fit[0]
    for i in range(len(values)):
        _remember(i, values[i], own, seen, fit, t)
    for row in range(0, len(values), columns):
        for first in range(row, row + columns, TOGETHER):
            count, left = min(TOGETHER, row + columns - first), _left(first, columns)
            _block_contexts(first, left, columns, own, seen, s)
            _block_shifts(first, left, own, seen, fit, s)
            for k in range(TOGETHER):
                s[_CODED + k] = 0
            for k in range(count):
                factor = fit[5 + s[_CONTEXT + k]] & 15
                s[_WIDE_BY + k], s[_NARROW_BY + k] = _WIDER[factor], _NARROWER[factor]
                s[_LOW + k] = (values[first + k] << t[_BITS]) - (1 << (t[_BITS] - 1))
                s[_CODED + k] = coded[first + k]
            _masses(first, parts, weights, t, s, inside)
            for k in range(count):
                if s[_CODED + k] > 0:
                    under, over = s[_UNDER_ROW + k], s[_OVER_ROW + k]
                    slots[found, 0], slots[found, 1] = _ends(values[first + k], under, over, t)
                    found += 1
            if not last:
                _update(first, inside, s, weights)
    return found


@compiled
def _block_shifts(first: int, left: int, own: Any, seen: Any, fit: Any, s: Any) -> None:
    """Compute where corrections move the means of a block of positions in a row; see `_correct`."""
    wide_vectors()
    means, spreads = own[0, first : first + TOGETHER], own[1, first : first + TOGETHER]
    shifts, above = own[2, first : first + TOGETHER], left - fit[0] - 1
    for k in range(TOGETHER):
        s[_SHIFTED + k] = shifts[k] + _HALF
    for at, weight in ((left, fit[1]), (above, fit[2]), (above - 1, fit[3]), (above + 1, fit[4])):
        missed = seen[0, at : at + TOGETHER]
        for k in range(TOGETHER):
            s[_SHIFTED + k] += weight * missed[k]
    for k in range(TOGETHER):
        s[_CENTRE + k] = means[k]
        s[_MOVED + k] = means[k] + _limited(s[_SHIFTED + k] >> WEIGHT_BITS, spreads[k])


@compiled
def _find(
    parts: Any, values: Any, coded: Any, last: bool, lo: Any, hi: Any, weights: Any, t: Any, slots: Any
) -> int:
    """Find the slots of one channel's values: first and number, into slots (n, 2); return how many."""
    c, found = np.zeros((8, t[_COMPONENTS]), np.int64), 0
    for i in range(len(values)):
        a, b = lo[i], hi[i]
        if not coded[i] or a == b:
            continue
        _load(parts, i, c)
        _limit(a, b, c, t)
        slots[found, 0], slots[found, 1] = _interval(values[i], a, b, weights, i, c, t)
        found += 1
        if not last:
            _observe(weights, i, c)
    return found


@compiled
def _guess(slot: int, outputs: Any, at: int, weights: Any, i: int, c: Any, lo: int, hi: int, t: Any) -> int:
    """Return a value near which that slot probably lies: of the heaviest component's distribution."""
    best = 0
    for m in range(len(weights)):
        if weights[m, i] > weights[best, i]:
            best = m
    scale = t[_SCALES + ((255 + outputs[at + best, i]) & 511)]
    distance = (t[_LOGIT + (slot >> (_SLOTS - 10))] * scale) >> _ARGUMENT
    return min(max((c[_MEANS, best] + distance + (1 << (t[_BITS] - 1))) >> t[_BITS], lo), hi)


@compiled
def _keep(c: Any, source: int, to: int) -> None:
    for m in range(c.shape[1]):
        c[to, m] = c[source, m]


@compiled
def _decode(
    outputs: Any, scales_at: int, parts: Any, values: Any, coded: Any, last: bool, lo: Any, hi: Any,
    weights: Any, t: Any, own: Any, seen: Any, fit: Any, words: Any, state: Any,
) -> bool:  # fmt: skip
    """Decode one channel's values; state: of the coder, and the next word. Return whether words last."""
    c = np.zeros((8, t[_COMPONENTS]), np.int64)
    x, at_word = state[0], state[1]
    for i in range(len(values)):
        a, b = lo[i], hi[i]
        _load(parts, i, c)
        if len(fit):
            _correct(i, own, seen, fit, c, t)
        else:
            _limit(a, b, c, t)
        if not coded[i]:
            if len(fit):
                _remember(i, values[i], own, seen, fit, t)
            continue
        if a == b:
            values[i] = a
            continue
        slot = x & ((1 << _SLOTS) - 1)
        # find the value with first <= slot < end: in growing steps from a guess, then by interpolation
        value = _guess(slot, outputs, scales_at, weights, i, c, a, b, t)
        beyond = value + 1
        first = _slots(value, a, b, weights, i, c, _BELOW, t)
        end = _slots(beyond, a, b, weights, i, c, _ABOVE, t)
        while end <= slot:
            step = max((slot - end) * (beyond - value) // (end - first), 2 * (beyond - value) - 1)
            value, first = beyond, end
            _keep(c, _ABOVE, _BELOW)
            beyond = min(beyond + step, b + 1)
            end = _slots(beyond, a, b, weights, i, c, _ABOVE, t)
        while first > slot:
            step = max((first - slot) * (beyond - value) // (end - first), 2 * (beyond - value) - 1)
            beyond, end = value, first
            _keep(c, _BELOW, _ABOVE)
            value = max(value - step, a)
            first = _slots(value, a, b, weights, i, c, _BELOW, t)
        middle = (slot - first) * (beyond - value) // (end - first) + value
        while beyond - value > 1:
            middle = min(max(middle, value + 1), beyond - 1)
            edge = _slots(middle, a, b, weights, i, c, _PARTS, t)
            if edge <= slot:
                value, first = middle, edge
                _keep(c, _PARTS, _BELOW)
            else:
                beyond, end = middle, edge
                _keep(c, _PARTS, _ABOVE)
            middle = (value + beyond) >> 1
        values[i] = value
        if len(fit):
            _remember(i, value, own, seen, fit, t)
        x = (end - first) * (x >> _SLOTS) + slot - first
        if x < _LOWEST:
            if at_word >= len(words):
                return False
            x = (x << 32) | words[at_word]
            at_word += 1
        if not last:
            _observe(weights, i, c)
    state[0], state[1] = x, at_word
    return True


@compiled
def _push(slots: Any, state: int, words: Any) -> tuple[int, int]:
    """Code slots (n, 2), last to first; return the state, and how many words were filled in at the end."""
    x, used = state, 0
    for k in range(len(slots)):
        i = len(slots) - 1 - k
        first, number = slots[i, 0], slots[i, 1]
        if x >= number << (63 - _SLOTS):
            used += 1
            words[len(words) - used] = x & 0xFFFFFFFF
            x >>= 32
        x = ((x // number) << _SLOTS) + x % number + first
    return x, used


class SlotEncoder:
    """Collects the slots of values in the order in which they will be decoded."""

    def __init__(self) -> None:
        self._slots: list[Ints] = []

    def code(self, mixture: Mixture, lo: Ints, hi: Ints, coded: Bools, by: Corrected | None = None) -> None:
        """Add the values of the mixture's channel where `coded` is true."""
        m, t = mixture, mixture.tables.array
        slots = np.empty((len(m.known), 2), np.int64)
        if by is None:
            found = _find(m.parts, m.known, coded, m.is_last, lo, hi, m.weights, t, slots)
        else:  # then all values are possible
            found = _find_corrected(
                m.parts, m.known, coded, m.is_last, m.weights, t, *by, _scratch(), slots
            )
        self._slots.append(slots[:found])

    def finish(self, checksum: int) -> bytes:
        """Return the stream; the decoder finds the checksum, below 2^31, at its end."""
        slots = np.concatenate([np.empty((0, 2), np.int64), *self._slots])
        words = np.empty(len(slots), np.uint32)
        state, used = _push(slots, _LOWEST + checksum, words)
        return int(state).to_bytes(8, "little") + words[len(words) - used :].astype("<u4").tobytes()


class SlotDecoder:
    """Decodes values from a stream.

    Args:
        data: What `SlotEncoder.finish` returned.

    Raises:
        CodecError: The data are no stream.
    """

    def __init__(self, data: bytes) -> None:
        state = int.from_bytes(data[:8], "little")
        if len(data) < 8 or len(data) % 4 or not _LOWEST <= state < 1 << 63:
            raise CodecError("the file is damaged: a stream of it is no output of a coder")
        self._words = np.frombuffer(data, "<u4", offset=8).astype(np.uint32)
        self._state = np.array([state, 0], np.int64)

    def code(self, mixture: Mixture, lo: Ints, hi: Ints, coded: Bools, by: Corrected | None = None) -> None:
        """Decode the values of the mixture's channel where `coded` is true.

        Raises:
            CodecError: The stream ends too early.
        """
        m, by = mixture, by or _UNCORRECTED
        if not _decode(
            m.outputs, m.scales_at, m.parts, m.known, coded, m.is_last, lo, hi, m.weights, m.tables.array,
            *by, self._words, self._state,
        ):  # fmt: skip
            raise CodecError("the file is damaged: a stream of it ends too early")

    def finish(self, checksum: int) -> None:
        """Check that the stream ends here, with that checksum.

        Raises:
            CodecError: It does not.
        """
        if int(self._state[1]) != len(self._words) or int(self._state[0]) != _LOWEST + checksum:
            raise CodecError(container.CHANGED)


class Corrected(NamedTuple):
    """What corrects the mixtures of one channel at the positions of a band (see `adaptation`): int64.

    Attributes:
        own: Of each position its mean, its spread, 2^10 times the shift without causal neighbours, the sum
            of absolute misses of earlier steps near by, and of spreads: (5, n + `TOGETHER`), in steps of
            the means.
        seen: Misses, which are filled in, and spreads, with a column of zeros on both sides and a row of
            zeros above: (2, (rows + 1) (columns + 2) + `TOGETHER`).
        fit: Number of columns, weights of the neighbours left, above, above left and above right, in steps
            of 2^-10, and the number of the factor of each context: (5 + `CONTEXTS`,).
    """

    own: Ints
    seen: Ints
    fit: Ints


_UNCORRECTED = Corrected(np.zeros((5, 0), np.int64), np.zeros((2, 0), np.int64), np.zeros(0, np.int64))


class Mixture:
    """One group of a mixture at n positions, channel by channel as values become known.

    Args:
        outputs: Of the network, in steps of their grids: int16 (P, n).
        at: Where those of the group begin.
        prediction: Estimates of the values in steps of the means: int64 (C, n).
        values: int64 (C, n): the known values, or where to put decoded ones.
        tables: Of the mixture.

    Attributes:
        channel: Of which the following are.
        parts: Means of the components, in their steps, and inverse scales, in units of 2^-26 per grey
            level: int64 (2, M, n + `TOGETHER`).
        weights: Of the components, in units of 2^-16, given earlier channels: int64 (M, n + `TOGETHER`).
    """

    def __init__(self, outputs: Params, at: int, prediction: Ints, values: Ints, tables: Tables) -> None:
        self.outputs, self.at, self.tables = outputs, at, tables
        self.prediction, self.values, self.channel = prediction, values, 0
        components, n = tables.components, outputs.shape[1]
        self.parts = _with_room((2, components, n))
        self.weights = _with_room((components, n))
        self._means = _with_room((tables.channels, components, n))
        _start(outputs, at, self.weights, tables.array, _scratch())

    def begin(self, channel: int) -> None:
        """Compute the components of a channel: 0, 1, ..., each when the values before it are known."""
        self.channel = channel
        _components(
            self.outputs, self.at, channel, self.prediction, self.values, self._means, self.tables.array,
            _scratch(), self.parts,
        )  # fmt: skip

    @property
    def known(self) -> Ints:
        """The channel's values, (n,)."""
        return self.values[self.channel]

    @property
    def is_last(self) -> bool:
        """Whether no channel follows."""
        return self.channel + 1 == self.tables.channels

    @property
    def scales_at(self) -> int:
        """Where the outputs that stand for the channel's scales begin."""
        return self.at + (1 + self.tables.channels + self.channel) * self.tables.components

    def moments(self) -> Ints:
        """Return the mean and the spread of each mixture, in steps of the means: (2, n + `TOGETHER`)."""
        own = _with_room((2, len(self.known)))
        _moments(self.outputs, self.scales_at, self.parts, self.weights, self.tables.array, _scratch(), own)
        return own

    def learn(self, coded: Bools) -> None:
        """Update the weights by the channel's values where `coded` is true, as coding does."""
        if not self.is_last:
            _learn(self.parts, self.known, coded, self.weights, self.tables.array, _scratch())


def cost(
    parts: Ints, weights: Ints, values: Ints, moments: Ints, shifts: Ints, factors: Ints, tables: Tables
) -> Ints:
    """Return what k values would cost with corrections, in units of 2^-16 bits: (k,).

    Args:
        parts, weights: See `Mixture`: with room for `TOGETHER` more positions.
        values: (k,).
        moments: See `Mixture.moments`: (2, k) or more.
        shifts: Of the means, in their steps: (k,).
        factors: Numbers of the factors of the scales: (k,).
        tables: Of the mixture.
    """
    out = np.empty(len(values), np.int64)
    _try(parts, weights, values, moments, shifts, factors, tables.array, _scratch(), out)
    return out


def find_contexts(own: Ints, seen: Ints, columns: int, n: int) -> Ints:
    """Return the number of the context of each of n positions: (n,); other arguments as in `Corrected`."""
    out = np.empty(n, np.int64)
    _find_contexts(own, seen, columns, _scratch(), out)
    return out


def _scratch() -> Ints:
    """Return scratch space for a block."""
    return np.zeros(_SCRATCH, np.int64)


def _with_room(shape: tuple[int, ...]) -> Ints:
    """Return an array for blocks that begin anywhere in the last dimension, zero beyond it."""
    array = np.empty((*shape[:-1], shape[-1] + TOGETHER), np.int64)
    array[..., shape[-1] :] = 0
    return array
