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
from dataclasses import dataclass

import numpy as np
import torch

from selfvae.codec.container import CodecError, Reader, varint
from selfvae.codec.tables import (
    COEFFICIENT,
    FLATTEST,
    LEAST,
    RATIO,
    REACH,
    SCALE,
    SHARPEST,
    STEEPEST,
    UNIT,
    WEIGHT,
    Channel,
    Ints,
    Shape,
    inverse_table,
    level_bits,
    ratio_table,
    weight_table,
)
from selfvae.distributions.pixels import PixelMixture

__all__ = ["MARGIN", "NOT_FINITE", "QuantizedMixture", "SideInformation", "ratios", "values", "weights"]

MARGIN = 2.0**-20  # of a grid step
NOT_FINITE = "the model computes a parameter that is not finite: it is damaged"
_NEAR = 0.05  # how far from a border, at most, a value is that a note is believed about


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


def weights(log_weights: np.ndarray, notes: SideInformation) -> Ints:
    """The components' weights, up to 2^20, from their logarithms, float64 (M, n) nats."""
    steps = (log_weights - log_weights.max(0)) * WEIGHT
    return weight_table()[-notes.quantize(np.maximum(steps, LEAST))]


def _rows(x: torch.Tensor) -> np.ndarray:
    """(B, M, h, w) -> (M, n)."""
    return x.transpose(0, 1).flatten(1).double().cpu().numpy()


def _inverse(octaves: np.ndarray, notes: SideInformation, at: int | None = None) -> Ints:
    """Inverse scales from their logarithms to the base 2."""
    steps = notes.quantize(np.clip(octaves * SCALE, FLATTEST, SHARPEST), at)
    return inverse_table()[steps - FLATTEST]


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
    mean = notes.quantize(np.clip((mean + num_values // 2) * (1 << UNIT), -REACH, REACH), at)
    return Channel(mean, _inverse(-log2_scale, notes, None if at is None else at + mean.size), UNIT, shape)


def ratios(log_ratio: np.ndarray, notes: SideInformation, at: int) -> Ints:
    """2^12 times a ratio, from its logarithm, nats: (n,)."""
    steps = notes.quantize(np.clip(log_ratio * RATIO, -STEEPEST, STEEPEST), at)
    return ratio_table()[steps + STEEPEST]


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
        mean = notes.quantize(np.clip(mean, -REACH, REACH))
        self.means.append(mean)
        for j in range(c):
            coefficient = notes.quantize(
                _rows(mixture.coefs[:, self.group, c * (c - 1) // 2 + j]) * (1 << COEFFICIENT)
            )
            middle = mixture.spec.max_value << self.bits - 1
            centre = middle if mixture.coefficients == "raw" else self.means[j]
            known = (self.values[j] << self.bits)[None] - centre
            mean = mean + ((coefficient * known + (1 << COEFFICIENT - 1)) >> COEFFICIENT)
        octaves = np.log2(_rows(mixture.inverse_scales[:, self.group, c])) - (self.bits - UNIT)
        return Channel(np.clip(mean, -REACH, REACH), _inverse(octaves, notes), self.bits)
