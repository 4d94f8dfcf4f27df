"""Whole numbers in place of what networks compute: the same on every machine.

A network's float64 outputs differ between machines in their last digits. Every parameter of a likelihood is
therefore rounded to a grid, and where a value lies so close to the border between two grid points
(`MARGIN`) that another machine might round it otherwise, the encoder notes which one it took. From these
whole numbers on there is only integer arithmetic; the tables of the logistic function and of exponentials
are computed exactly, by decimal arithmetic, never by the platform's mathematics.

How fine the grids are is a trade: the loss against unrounded parameters is about 1e-3 bits a sub-pixel.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from typing import Literal, NamedTuple

import numpy as np
import torch

from selfvae.codec.container import CodecError, Reader, varint
from selfvae.distributions.pixels import PixelMixture

__all__ = [
    "MARGIN",
    "NOT_FINITE",
    "Channel",
    "QuantizedMixture",
    "SideInformation",
    "cumulative",
    "ratios",
    "values",
    "weights",
]

Ints = np.ndarray  # int64
Shape = Literal["logistic", "normal"]

MARGIN = 2.0**-20  # of a grid step
NOT_FINITE = "the model computes a parameter that is not finite: it is damaged"
_NEAR = 0.05  # how far from a border, at most, a value is that a note is believed about

MEAN = 13  # bits: steps of 1/8192 of the range, 1/32 of 256 levels
COEFFICIENT = 8  # bits
_WEIGHT, _LEAST = 8, -128  # steps a nat of a log-weight; the least one that counts
_SCALE, _FLATTEST, _SHARPEST = 8, -18 * 8, 4 * 8  # steps an octave of a scale; log2 of its inverse
_REACH = 1 << 20  # what a mean may be at most, in steps
_INVERSE = 20  # bits of an inverse scale
_UNIT = 5  # bits: a scale of 1 in steps of the means
_ARGUMENT, _TABLE, _FAR = 12, 6, 32  # bits of a distribution's argument; bits of its table's; where it ends
SHARES = 12  # bits of a flow's ratio of 1
_RATIO, _STEEPEST = 256, 4 * 256  # steps a nat of a flow's ratio; the most of these
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
    "weight": lambda i: (-i / _WEIGHT).exp() * 2**20,
    "inverse": lambda i: Decimal(2) ** ((i + _FLATTEST) / _SCALE) * 2**_INVERSE,
    "logistic": lambda i: 2**ONE / (1 + (i / 2**_TABLE).exp()),
    "normal": lambda i: 2**ONE * _normal_tail(i / 2**_TABLE),
    "ratio": lambda i: ((i - _STEEPEST) / _RATIO).exp() * 2**SHARES,
}


@functools.cache
def _weight_table() -> Ints:
    return _exactly("weight", 1 - _LEAST)


@functools.cache
def _inverse_table() -> Ints:
    return _exactly("inverse", _SHARPEST - _FLATTEST + 1)


@functools.cache
def _tail_table(shape: Shape) -> tuple[Ints, Ints]:
    """2^36 times the mass beyond t, at steps of 1/64, and its differences."""
    tail = np.zeros((_FAR << _TABLE) + 1, np.int64)
    reach = len(tail) - 1 if shape == "logistic" else 8 << _TABLE  # beyond, less than 2^-36 is left
    tail[:reach] = _exactly(shape, reach)
    return tail, np.append(np.diff(tail), 0)


@functools.cache
def _ratio_table() -> Ints:
    return _exactly("ratio", 2 * _STEEPEST + 1)


def level_bits(num_values: int) -> int:
    """Bits of a level's width, in the steps of the means."""
    return MEAN - (num_values - 1).bit_length()


def cumulative(point: Ints, channel: Channel) -> Ints:
    """2^36 times the distribution functions at a point (n,), in the unit of the means: (M, n)."""
    tail, slope = _tail_table(channel.shape)
    t = ((point[None] - channel.mean) * channel.inverse) >> (_UNIT + _INVERSE - _ARGUMENT)
    far = np.minimum(np.abs(t), _FAR << _ARGUMENT)
    i, rest = far >> (_ARGUMENT - _TABLE), far & ((1 << _ARGUMENT - _TABLE) - 1)
    lower = tail[i] + ((slope[i] * rest) >> (_ARGUMENT - _TABLE))
    return np.where(t < 0, lower, (1 << ONE) - lower)


class SideInformation:
    """How values near a border were rounded: written by the encoder, obeyed by the decoder.

    The values of all `quantize`s are counted; a note is the distance to the last one, and whether up.
    """

    def __init__(self, data: bytes | None = None) -> None:
        self._seen = self._used = 0
        self._notes: list[tuple[int, bool]] = []
        self._reads = data is not None
        if data is not None:
            reader, at = Reader(data, "the notes of a part"), 0
            while reader.at < len(data):
                gap, up = divmod(reader.varint(), 2)
                if self._notes and not gap:
                    raise CodecError("the file is damaged: it corrects a value twice")
                at += gap
                self._notes.append((at, bool(up)))

    def reserve(self, n: int) -> int:
        """Count n values that come later, in any order; returns the number of the first."""
        self._seen += n
        return self._seen - n

    def quantize(self, value: np.ndarray, at: int | None = None) -> Ints:
        """Round values, float64 of any shape, in grid steps; half up. at: their number, if reserved."""
        if not np.isfinite(value).all():
            raise CodecError(NOT_FINITE)
        shifted = value + 0.5
        low = np.floor(shifted)
        whole = low.astype(np.int64)
        flat, start = whole.reshape(-1), self.reserve(value.size) if at is None else at
        if not self._reads:
            rest = (shifted - low).reshape(-1)
            near = np.flatnonzero((rest < MARGIN) | (rest > 1 - MARGIN))
            self._notes += [(start + int(i), bool(rest[i] < MARGIN)) for i in near]
            return whole
        values, first = shifted.reshape(-1), bisect.bisect_left(self._notes, (start, False))
        last = bisect.bisect_left(self._notes, (start + flat.size, False))
        self._used += last - first
        for place, up in self._notes[first:last]:
            border = round(float(values[place - start]))
            if abs(values[place - start] - border) > _NEAR:
                raise CodecError(
                    "the file corrects a value that needs none: it is damaged, or the model "
                    "computes something else here"
                )
            flat[place - start] = border if up else border - 1
        return whole

    def tobytes(self) -> bytes:
        """What the encoder noted; empty if nothing."""
        noted = sorted(self._notes)
        ends = [0, *(at for at, _ in noted)]
        return b"".join(varint(2 * (at - last) + up) for (at, up), last in zip(noted, ends, strict=False))

    def check_used(self) -> None:
        """Raise CodecError if notes are left that no value needed."""
        if self._reads and self._used < len(self._notes):
            raise CodecError("the file is damaged: it corrects a value that does not exist")


class Channel(NamedTuple):
    """What n values are distributed as, one component or several."""

    mean: Ints  # (M, n)
    inverse: Ints  # (M, n), of the scale in 32 units of the means, times 2^20
    bits: int  # of a value's width, in units of the means
    shape: Shape = "logistic"

    def within(self, width: int, num_values: int) -> tuple[Ints, Ints]:
        """The least and largest values that lie so many scales around the mean of one component."""
        reach = (width << _UNIT + _INVERSE) // self.inverse[0]
        low, high = ((self.mean[0] + side) >> self.bits for side in (-reach, reach + (1 << self.bits)))
        return np.clip(low, 0, num_values - 1), np.clip(high, 0, num_values - 1)

    def part(self, at: slice | np.ndarray) -> Channel:
        """Some of the values."""
        return self._replace(mean=self.mean[:, at], inverse=self.inverse[:, at])


def weights(log_weights: np.ndarray, notes: SideInformation) -> Ints:
    """The components' weights, up to 2^20, from their logarithms, float64 (M, n) nats."""
    steps = (log_weights - log_weights.max(0)) * _WEIGHT
    return _weight_table()[-notes.quantize(np.maximum(steps, _LEAST))]


def _rows(x: torch.Tensor) -> np.ndarray:
    """(B, M, h, w) -> (M, n)."""
    return x.transpose(0, 1).flatten(1).double().cpu().numpy()


def _inverse(octaves: np.ndarray, notes: SideInformation, at: int | None = None) -> Ints:
    """Inverse scales from their logarithms to the base 2."""
    steps = notes.quantize(np.clip(octaves * _SCALE, _FLATTEST, _SHARPEST), at)
    return _inverse_table()[steps - _FLATTEST]


def values(
    mean: np.ndarray,
    log2_scale: np.ndarray,
    num_values: int,
    shape: Shape,
    notes: SideInformation,
    at: int | None = None,
) -> Channel:
    """Integers 0 to num_values - 1 that stand for -num_values / 2 and up: their means and scales (M, n).

    at: their number in the notes, if it is not the next.
    """
    mean = notes.quantize(np.clip((mean + num_values // 2) * (1 << _UNIT), -_REACH, _REACH), at)
    return Channel(mean, _inverse(-log2_scale, notes, None if at is None else at + mean.size), _UNIT, shape)


def ratios(log_ratio: np.ndarray, notes: SideInformation, at: int) -> Ints:
    """2^12 times a ratio, from its logarithm, nats: (n,)."""
    steps = notes.quantize(np.clip(log_ratio * _RATIO, -_STEEPEST, _STEEPEST), at)
    return _ratio_table()[steps + _STEEPEST]


@dataclass
class QuantizedMixture:
    """The whole numbers of one group of a mixture: channel after channel, as values become known."""

    mixture: PixelMixture
    group: int
    notes: SideInformation

    def __post_init__(self) -> None:
        self.means: list[Ints] = []  # of the channels so far, before their coefficients
        self.values: list[Ints] = []
        self.bits = level_bits(self.mixture.spec.num_values)

    def weights(self) -> Ints:
        """The components' weights before any channel is known: (M, n)."""
        return weights(_rows(self.mixture.logits[:, self.group]), self.notes)

    def channel(self, v: torch.Tensor) -> Channel:
        """The next channel's logistics, given the entries v (B, G, C, h, w) before it."""
        mixture, c, notes = self.mixture, len(self.means), self.notes
        if c:
            self.values.append(_rows(v[:, self.group, c - 1, None])[0].astype(np.int64))
        mean = _rows(mixture.means(v)[:, self.group, c]) * (1 << self.bits)
        mean = notes.quantize(np.clip(mean, -_REACH, _REACH))
        self.means.append(mean)
        for j in range(c):
            coefficient = notes.quantize(
                _rows(mixture.coefs[:, self.group, c * (c - 1) // 2 + j]) * (1 << COEFFICIENT)
            )
            middle = mixture.spec.max_value << self.bits - 1
            centre = middle if mixture.coefficients == "raw" else self.means[j]
            known = (self.values[j] << self.bits)[None] - centre
            mean = mean + ((coefficient * known + (1 << COEFFICIENT - 1)) >> COEFFICIENT)
        octaves = np.log2(_rows(mixture.inverse_scales[:, self.group, c])) - (self.bits - _UNIT)
        return Channel(np.clip(mean, -_REACH, _REACH), _inverse(octaves, notes), self.bits)
