"""Whole numbers in place of what networks compute: the same on every machine.

A network's float64 outputs differ between machines in their last digits. Every parameter of a likelihood is
therefore rounded to a grid, and where a value lies so close to the border between two grid points
(`MARGIN`) that another machine might round it otherwise, the encoder notes which one it took. From these
whole numbers on there is only integer arithmetic; the tables of the logistic function and of exponentials
are computed exactly, by decimal arithmetic, never by the platform's mathematics.

How fine the grids are is a trade: the loss against unrounded parameters is about 1e-3 bits a sub-pixel.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from typing import NamedTuple

import numpy as np
import torch

from selfvae.codec.container import CodecError, Reader, varint
from selfvae.distributions import RoundedLogistic
from selfvae.pixels import PixelMixture

__all__ = ["MARGIN", "Channel", "Lattice", "Notes", "cumulative", "latent", "weights"]

Ints = np.ndarray  # int64

MARGIN = 2.0**-20  # of a grid step
_NEAR = 0.05  # how far from a border, at most, a value is that a note is believed about

MEAN = 13  # bits: steps of 1/8192 of the range, 1/32 of 256 levels
COEFFICIENT = 8  # bits
_WEIGHT, _LEAST = 8, -128  # steps a nat of a log-weight; the least one that counts
_SCALE, _FLATTEST, _SHARPEST = 8, -18 * 8, 4 * 8  # steps an octave of a scale; log2 of its inverse
_REACH = 1 << 20  # what a mean may be at most, in steps
_INVERSE = 20  # bits of an inverse scale
_ARGUMENT, _TABLE, _FAR = 12, 6, 32  # bits of the logistic's argument; bits of its table's; where it ends
ONE = 36  # bits of a probability in the tables


def _exactly(fill: str, n: int) -> Ints:
    """Whole numbers from an expression in Decimals, rounded: the same everywhere."""
    with localcontext(Context(prec=50)):
        return np.array([int(_TABLES[fill](Decimal(i)).to_integral_value()) for i in range(n)], np.int64)


_TABLES = {
    "weight": lambda i: (-i / _WEIGHT).exp() * 2**20,
    "inverse": lambda i: Decimal(2) ** ((i + _FLATTEST) / _SCALE) * 2**_INVERSE,
    "tail": lambda i: 2**ONE / (1 + (i / 2**_TABLE).exp()),
}


@functools.cache
def _weight_table() -> Ints:
    return _exactly("weight", 1 - _LEAST)


@functools.cache
def _inverse_table() -> Ints:
    return _exactly("inverse", _SHARPEST - _FLATTEST + 1)


@functools.cache
def _tail_table() -> tuple[Ints, Ints]:
    """2^36 sigmoid(-t) at steps of 1/64, and the differences between neighbours."""
    tail = _exactly("tail", (_FAR << _TABLE) + 1)
    tail[-1] = 0
    return tail, np.append(np.diff(tail), 0)


def level_bits(levels: int) -> int:
    """Bits of a level's width, in the steps of the means."""
    return MEAN - (levels - 1).bit_length()


def cumulative(point: Ints, mean: Ints, inverse: Ints) -> Ints:
    """2^36 times the logistic's distribution function.

    point: (n,), and mean: (M, n), in 1/8192 of the range. inverse: (M, n), of the scale in 1/256 of the
    range, times 2^20.
    """
    tail, slope = _tail_table()
    t = ((point[None] - mean) * inverse) >> (MEAN - 8 + _INVERSE - _ARGUMENT)
    far = np.minimum(np.abs(t), _FAR << _ARGUMENT)
    i, rest = far >> (_ARGUMENT - _TABLE), far & ((1 << _ARGUMENT - _TABLE) - 1)
    lower = tail[i] + ((slope[i] * rest) >> (_ARGUMENT - _TABLE))
    return np.where(t < 0, lower, (1 << ONE) - lower)


class Notes:
    """How values near a border were rounded: written by the encoder, obeyed by the decoder.

    The values of all `snap`s are counted on; a note is the distance to the last one, and whether up.
    """

    def __init__(self, data: bytes | None = None) -> None:
        self._out: list[tuple[int, bool]] = []
        self._in: list[tuple[int, bool]] | None = None
        self._seen = 0
        if data is not None:
            reader, at = Reader(data, "the notes of a part"), 0
            self._in = []
            while reader.at < len(data):
                gap, up = divmod(reader.varint(), 2)
                at += gap
                self._in.append((at, bool(up)))
            self._in.reverse()  # the next one last

    def snap(self, value: np.ndarray) -> Ints:
        """Round values, float64 of any shape, in grid steps; half up."""
        if not np.isfinite(value).all():
            raise CodecError("the model computes a parameter that is not finite: it is damaged")
        shifted = value + 0.5
        low = np.floor(shifted)
        whole = low.astype(np.int64)
        flat, start = whole.reshape(-1), self._seen
        self._seen += flat.size
        if self._in is None:
            rest = (shifted - low).reshape(-1)
            near = np.flatnonzero((rest < MARGIN) | (rest > 1 - MARGIN))
            self._out += [(start + int(at), bool(rest[at] < MARGIN)) for at in near]
            return whole
        values = shifted.reshape(-1)
        while self._in and self._in[-1][0] < self._seen:
            at, up = self._in.pop()
            border = round(float(values[at - start]))
            if abs(values[at - start] - border) > _NEAR:
                raise CodecError(
                    "the file corrects a value that needs none: it is damaged, or the model "
                    "computes something else here"
                )
            flat[at - start] = border if up else border - 1
        return whole

    def tobytes(self) -> bytes:
        """What the encoder noted; empty if nothing."""
        ends = [0, *(at for at, _ in self._out)]
        return b"".join(
            varint(2 * (at - last) + up) for (at, up), last in zip(self._out, ends, strict=False)
        )

    def check_used(self) -> None:
        """Raise CodecError if notes are left that no value needed."""
        if self._in:
            raise CodecError("the file is damaged: it corrects a value that does not exist")


class Channel(NamedTuple):
    """One channel's logistics, (M, n) each: means and inverse scales as `cumulative` takes them."""

    mean: Ints
    inverse: Ints


def weights(log_weights: np.ndarray, notes: Notes) -> Ints:
    """The components' weights, up to 2^20, from their logarithms, float64 (M, n) nats."""
    steps = (log_weights - log_weights.max(0)) * _WEIGHT
    return _weight_table()[-notes.snap(np.maximum(steps, _LEAST))]


def _rows(x: torch.Tensor) -> np.ndarray:
    """(B, M, h, w) -> (M, n)."""
    return x.transpose(0, 1).flatten(1).double().cpu().numpy()


def _inverse(octaves: np.ndarray, notes: Notes) -> Ints:
    """Inverse scales from their logarithms to the base 2."""
    steps = notes.snap(np.clip(octaves * _SCALE, _FLATTEST, _SHARPEST))
    return _inverse_table()[steps - _FLATTEST]


def latent(p: RoundedLogistic, notes: Notes) -> Channel:
    """The logistics of a latent's whole numbers, -128 to 127 counted from 0; (1, n), n = B * C * h * w."""
    mean = p.mean.double().flatten().cpu().numpy()[None] + 128
    octaves = p.log_scale.double().flatten().cpu().numpy()[None] / -math.log(2)
    mean = notes.snap(np.clip(mean * (1 << level_bits(256)), -_REACH, _REACH))
    return Channel(mean, _inverse(octaves, notes))


@dataclass
class Lattice:
    """The whole numbers of one group of a mixture: channel after channel, as values become known."""

    mixture: PixelMixture
    group: int
    notes: Notes

    def __post_init__(self) -> None:
        self.means: list[Ints] = []  # of the channels so far, before their coefficients
        self.values: list[Ints] = []
        self.bits = level_bits(self.mixture.format.levels)

    def weights(self) -> Ints:
        """The components' weights before any channel is known: (M, n)."""
        return weights(_rows(self.mixture.logits[:, self.group]), self.notes)

    def channel(self, v: torch.Tensor) -> Channel:
        """The next channel's logistics, given the entries v (B, G, C, h, w) before it."""
        mixture, c, notes = self.mixture, len(self.means), self.notes
        if c:
            self.values.append(_rows(v[:, self.group, c - 1, None])[0].astype(np.int64))
        mean = _rows(mixture.means(v)[:, self.group, c]) * (1 << self.bits)
        mean = notes.snap(np.clip(mean, -_REACH, _REACH))
        self.means.append(mean)
        for j in range(c):
            coefficient = notes.snap(
                _rows(mixture.coefs[:, self.group, c * (c - 1) // 2 + j]) * (1 << COEFFICIENT)
            )
            middle = mixture.format.top << self.bits - 1
            centre = middle if mixture.coefficients == "raw" else self.means[j]
            known = (self.values[j] << self.bits)[None] - centre
            mean = mean + ((coefficient * known + (1 << COEFFICIENT - 1)) >> COEFFICIENT)
        octaves = np.log2(_rows(mixture.inverse_scales[:, self.group, c])) - (self.bits - (MEAN - 8))
        return Channel(np.clip(mean, -_REACH, _REACH), _inverse(octaves, notes))
