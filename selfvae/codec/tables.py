"""Distribution functions as integer tables, computed exactly by decimal arithmetic: the same everywhere."""

from __future__ import annotations

import functools
from decimal import Context, Decimal, localcontext
from typing import Literal, NamedTuple

import numpy as np

__all__ = ["ONE", "Channel", "Ints", "Shape", "cumulative"]


Ints = np.ndarray  # int64


Shape = Literal["logistic", "normal"]
MEAN = 13  # bits: steps of 1/8192 of the range, 1/32 of 256 levels
COEFFICIENT = 8  # bits
WEIGHT, LEAST = 8, -128  # steps a nat of a log-weight; the least one that counts
SCALE, FLATTEST, SHARPEST = 8, -18 * 8, 4 * 8  # steps an octave of a scale; log2 of its inverse
REACH = 1 << 20  # what a mean may be at most, in steps
_INVERSE = 20  # bits of an inverse scale
UNIT = 5  # bits: a scale of 1 in steps of the means
_ARGUMENT, _TABLE, _FAR = 12, 6, 32  # bits of a distribution's argument; bits of its table's; where it ends
SHARES = 12  # bits of a flow's ratio of 1
RATIO, STEEPEST = 256, 4 * 256  # steps a nat of a flow's ratio; the most of these
ONE = 36  # bits of a probability in the tables


def _exactly(fill: str, n: int) -> Ints:
    """Whole numbers from an expression in Decimals, rounded: the same everywhere."""
    with localcontext(Context(prec=50)):
        return np.array([int(_TABLES[fill](Decimal(i)).to_integral_value()) for i in range(n)], np.int64)


def _normal_tail(t: Decimal) -> Decimal:
    """The standard normal's mass beyond t >= 0, by the series of its distribution function."""
    term = total = t
    for n in range(3, 300, 2):
        term *= t * t / n
        total += term
    density = (-t * t / 2).exp() / Decimal("2.50662827463100050241576528481104525300698674060994")
    return Decimal("0.5") - density * total


_TABLES = {
    "weight": lambda i: (-i / WEIGHT).exp() * 2**20,
    "inverse": lambda i: Decimal(2) ** ((i + FLATTEST) / SCALE) * 2**_INVERSE,
    "logistic": lambda i: 2**ONE / (1 + (i / 2**_TABLE).exp()),
    "normal": lambda i: 2**ONE * _normal_tail(i / 2**_TABLE),
    "ratio": lambda i: ((i - STEEPEST) / RATIO).exp() * 2**SHARES,
}


@functools.cache
def weight_table() -> Ints:
    return _exactly("weight", 1 - LEAST)


@functools.cache
def inverse_table() -> Ints:
    return _exactly("inverse", SHARPEST - FLATTEST + 1)


@functools.cache
def _tail_table(shape: Shape) -> tuple[Ints, Ints]:
    """2^36 times the mass beyond t, at steps of 1/64, and its differences."""
    tail = np.zeros((_FAR << _TABLE) + 1, np.int64)
    reach = len(tail) - 1 if shape == "logistic" else 8 << _TABLE  # beyond, less than 2^-36 is left
    tail[:reach] = _exactly(shape, reach)
    return tail, np.append(np.diff(tail), 0)


@functools.cache
def ratio_table() -> Ints:
    return _exactly("ratio", 2 * STEEPEST + 1)


def level_bits(num_values: int) -> int:
    """Bits of a level's width, in the steps of the means."""
    return MEAN - (num_values - 1).bit_length()


def cumulative(point: Ints, channel: Channel) -> Ints:
    """2^36 times the distribution functions at a point (n,), in the unit of the means: (M, n)."""
    tail, slope = _tail_table(channel.shape)
    t = ((point[None] - channel.mean) * channel.inverse) >> (UNIT + _INVERSE - _ARGUMENT)
    far = np.minimum(np.abs(t), _FAR << _ARGUMENT)
    i, rest = far >> (_ARGUMENT - _TABLE), far & ((1 << _ARGUMENT - _TABLE) - 1)
    lower = tail[i] + ((slope[i] * rest) >> (_ARGUMENT - _TABLE))
    return np.where(t < 0, lower, (1 << ONE) - lower)


class Channel(NamedTuple):
    """What n values are distributed as, one component or several."""

    mean: Ints  # (M, n)
    inverse: Ints  # (M, n), of the scale in 32 units of the means, times 2^20
    bits: int  # of a value's width, in units of the means
    shape: Shape = "logistic"

    def within(self, width: int, num_values: int) -> tuple[Ints, Ints]:
        """The least and largest values that lie so many scales around the mean of one component."""
        reach = (width << UNIT + _INVERSE) // self.inverse[0]
        low, high = ((self.mean[0] + side) >> self.bits for side in (-reach, reach + (1 << self.bits)))
        return np.clip(low, 0, num_values - 1), np.clip(high, 0, num_values - 1)

    def part(self, at: slice | np.ndarray) -> Channel:
        """Some of the values."""
        return self._replace(mean=self.mean[:, at], inverse=self.inverse[:, at])
