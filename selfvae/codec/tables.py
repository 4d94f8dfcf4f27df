"""Distribution functions as integer tables, the same on every machine.

The tables are computed by decimal arithmetic, never by the platform's mathematical functions. Integer
tables for learnt compression are due to Balle et al. 2019, who compute the networks in integers as well.
"""

from __future__ import annotations

import functools
from decimal import Context, Decimal, localcontext
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["ONE", "Bools", "Channel", "Floats", "Ints", "Shape", "Words", "cumulative"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint32]

Shape = Literal["logistic", "normal"]
# all of these are part of the format
MEAN = 13  # bits of the range of means: steps of 1/32 grey level for 256 values
COEFFICIENT = 8  # fractional bits of a coefficient
WEIGHT, LEAST = 8, -128  # steps per nat of a log-weight; the smallest log-weight, in steps
SCALE, FLATTEST, SHARPEST = 8, -18 * 8, 4 * 8  # steps per octave of an inverse scale; its range, in steps
REACH = 1 << 20  # the largest absolute value of a mean, in steps
_INVERSE = 20  # fractional bits of an inverse scale
UNIT = 5  # bits of a scale of 1, in steps of the means
# fractional bits of a distribution's argument; of the table's argument; end of the table
_ARGUMENT, _TABLE, _FAR = 12, 6, 32
SHARES = 12  # fractional bits of a flow's ratio
RATIO, STEEPEST = 256, 4 * 256  # steps per nat of a flow's log-ratio; the largest one, in steps
ONE = 36  # fractional bits of a probability in the tables


def _exactly(fill: str, n: int) -> Ints:
    """Tabulate an expression in Decimals at 0..n-1, rounded to integers."""
    with localcontext(Context(prec=50)):
        return np.array([int(_TABLES[fill](Decimal(i)).to_integral_value()) for i in range(n)], np.int64)


def _normal_tail(t: Decimal) -> Decimal:
    """Return the standard normal's mass beyond t >= 0, by the series of its distribution function."""
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
    """Return 2^20 exp(-i / 8)."""
    return _exactly("weight", 1 - LEAST)


@functools.cache
def inverse_table() -> Ints:
    """Return 2^20 times the inverse scales, from the flattest to the sharpest."""
    return _exactly("inverse", SHARPEST - FLATTEST + 1)


@functools.cache
def _tail_table(shape: Shape) -> tuple[Ints, Ints]:
    """Return 2^36 times the mass beyond t, in steps of 1/64 of t, and its differences."""
    tail = np.zeros((_FAR << _TABLE) + 1, np.int64)
    reach = len(tail) - 1 if shape == "logistic" else 8 << _TABLE  # less than 2^-36 lies beyond
    tail[:reach] = _exactly(shape, reach)
    return tail, np.append(np.diff(tail), 0)


@functools.cache
def ratio_table() -> Ints:
    """Return 2^12 exp(i / 256 - 4)."""
    return _exactly("ratio", 2 * STEEPEST + 1)


def level_bits(num_values: int) -> int:
    """Return the bits of a grey level's width, in steps of the means."""
    return MEAN - (num_values - 1).bit_length()


def cumulative(point: Ints, channel: Channel) -> Ints:
    """Return 2^36 times the distribution functions at points (n,), in steps of the means: (M, n)."""
    tail, slope = _tail_table(channel.shape)
    t = ((point[None] - channel.mean) * channel.inverse) >> (UNIT + _INVERSE - _ARGUMENT)
    far = np.minimum(np.abs(t), _FAR << _ARGUMENT)
    i, rest = far >> (_ARGUMENT - _TABLE), far & ((1 << _ARGUMENT - _TABLE) - 1)
    lower = tail[i] + ((slope[i] * rest) >> (_ARGUMENT - _TABLE))
    return np.where(t < 0, lower, (1 << ONE) - lower)


class Channel(NamedTuple):
    """Quantized distributions of n values, with M components each.

    Attributes:
        mean: In steps, (M, n).
        inverse: 2^20 times the inverse scales, in units of 32 steps of the means: (M, n).
        bits: Of the width of a value, in steps of the means.
        shape: Of the components.
    """

    mean: Ints
    inverse: Ints
    bits: int
    shape: Shape = "logistic"

    def within(self, width: int, num_values: int) -> tuple[Ints, Ints]:
        """Return the smallest and largest values within `width` scales of the first component's mean."""
        reach = (width << UNIT + _INVERSE) // self.inverse[0]
        low, high = ((self.mean[0] + way) >> self.bits for way in (-reach, reach + (1 << self.bits)))
        return np.clip(low, 0, num_values - 1), np.clip(high, 0, num_values - 1)

    def part(self, at: slice | Bools) -> Channel:
        """Return the distributions of some of the values."""
        return self._replace(mean=self.mean[:, at], inverse=self.inverse[:, at])
