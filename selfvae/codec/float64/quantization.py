"""Quantization of the networks' float64 outputs, such that every machine obtains the same integers.

Float64 outputs differ between machines in their last digits. Each parameter of a likelihood is therefore
rounded to a grid, and where it lies within `MARGIN` of the border between two grid points, so that another
machine might round it differently, the encoder records its choice as side information. All further
arithmetic is on integers, with tables that are computed exactly (see `tables`).

The grids cost about 1e-3 bits per sub-pixel compared with unrounded parameters. The margin is empirical:
networks computed in integers (Balle et al. 2019) would need none.
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
    Floats,
    Ints,
    Shape,
    inverse_table,
    level_bits,
    ratio_table,
    weight_table,
)
from selfvae.distributions.pixels import PixelMixture

__all__ = ["MARGIN", "NOT_FINITE", "QuantizedMixture", "SideInformation", "ratios", "values", "weights"]

MARGIN = 2.0**-20  # grid steps from a border within which the rounding is recorded
NOT_FINITE = "the model computes a parameter that is not finite: it is damaged"
_NEAR = 0.05  # grid steps from a border within which the decoder accepts a recorded rounding


class SideInformation:
    """The rounding of values near a border: recorded by the encoder, applied by the decoder.

    Values are numbered across all calls of `quantize`. An entry is a varint: twice the distance to the
    number of the previous entry, plus 1 if the value was rounded up.

    Args:
        data: What an encoder recorded; None: record.

    Raises:
        CodecError: The data are damaged.
    """

    def __init__(self, data: bytes | None = None) -> None:
        self._seen = self._used = 0
        self._entries: list[tuple[int, bool]] = []
        self._reads = data is not None
        if data is not None:
            reader, at = Reader(data, "the side information of a part"), 0
            while reader.at < len(data):
                gap, up = divmod(reader.varint(), 2)
                if self._entries and not gap:
                    raise CodecError("the file is damaged: it corrects a value twice")
                at += gap
                self._entries.append((at, bool(up)))

    def reserve(self, n: int) -> int:
        """Reserve numbers for n values that are quantized later, in any order; return the first one."""
        self._seen += n
        return self._seen - n

    def quantize(self, value: Floats, at: int | None = None) -> Ints:
        """Round values half up, as the encoder did.

        Args:
            value: In grid steps, any shape.
            at: The number of the first value, if reserved; None: the next one.

        Returns:
            Integers of that shape.

        Raises:
            CodecError: A value is not finite, or the side information does not fit it.
        """
        if not np.isfinite(value).all():
            raise CodecError(NOT_FINITE)
        shifted = value + 0.5
        low = np.floor(shifted)
        whole = low.astype(np.int64)
        flat, start = whole.reshape(-1), self.reserve(value.size) if at is None else at
        if not self._reads:
            rest = (shifted - low).reshape(-1)
            near = np.flatnonzero((rest < MARGIN) | (rest > 1 - MARGIN))
            self._entries += [(start + int(i), bool(rest[i] < MARGIN)) for i in near]
            return whole
        values, first = shifted.reshape(-1), bisect.bisect_left(self._entries, (start, False))
        last = bisect.bisect_left(self._entries, (start + flat.size, False))
        self._used += last - first
        for place, up in self._entries[first:last]:
            border = round(float(values[place - start]))
            if abs(values[place - start] - border) > _NEAR:
                raise CodecError(
                    "the file corrects a value that needs no correction: it is damaged, or the model "
                    "computes different values on this machine"
                )
            flat[place - start] = border if up else border - 1
        return whole

    def tobytes(self) -> bytes:
        """Encode the entries; empty if there are none."""
        entries = sorted(self._entries)
        ends = [0, *(at for at, _ in entries)]
        return b"".join(varint(2 * (at - last) + up) for (at, up), last in zip(entries, ends, strict=False))

    def check_used(self) -> None:
        """Check that each entry was applied to a value.

        Raises:
            CodecError: An entry was not.
        """
        if self._reads and self._used < len(self._entries):
            raise CodecError("the file is damaged: it corrects a value that does not exist")


def weights(log_weights: Floats, side: SideInformation) -> Ints:
    """Quantize components' weights, given by their logarithms (M, n), nats: integers up to 2^20."""
    steps = (log_weights - log_weights.max(0)) * WEIGHT
    return weight_table()[-side.quantize(np.maximum(steps, LEAST))]


def _rows(x: torch.Tensor) -> Floats:
    """Lay out (B, M, h, w) as (M, n)."""
    return x.transpose(0, 1).flatten(1).double().cpu().numpy()


def _inverse(octaves: Floats, side: SideInformation, at: int | None = None) -> Ints:
    """Quantize inverse scales, given by their logarithms to base 2."""
    steps = side.quantize(np.clip(octaves * SCALE, FLATTEST, SHARPEST), at)
    return inverse_table()[steps - FLATTEST]


def values(
    mean: Floats,
    log2_scale: Floats,
    num_values: int,
    shape: Shape,
    side: SideInformation,
    at: int | None = None,
) -> Channel:
    """Quantize distributions of integers from -num_values / 2 on, which are coded as 0..num_values-1.

    Args:
        mean: (M, n).
        log2_scale: (M, n).
        num_values: Number of integers.
        shape: Of the distributions.
        side: Records or applies the rounding.
        at: Number of the first value in the side information; None: the next one.
    """
    steps = side.quantize(np.clip((mean + num_values // 2) * (1 << UNIT), -REACH, REACH), at)
    return Channel(steps, _inverse(-log2_scale, side, None if at is None else at + steps.size), UNIT, shape)


def ratios(log_ratio: Floats, side: SideInformation, at: int) -> Ints:
    """Quantize ratios, given by their logarithms (n,), nats: 2^12 times the ratios."""
    steps = side.quantize(np.clip(log_ratio * RATIO, -STEEPEST, STEEPEST), at)
    return ratio_table()[steps + STEEPEST]


@dataclass
class QuantizedMixture:
    """The quantized parameters of one group of a mixture, channel by channel as values become known."""

    mixture: PixelMixture
    group: int
    side: SideInformation

    def __post_init__(self) -> None:
        self.means: list[Ints] = []  # of the channels so far, before the shift by earlier channels
        self.values: list[Ints] = []
        self.bits = level_bits(self.mixture.spec.num_values)

    def weights(self) -> Ints:
        """Return the components' weights before any channel is known: (M, n)."""
        return weights(_rows(self.mixture.logits[:, self.group]), self.side)

    def channel(self, v: torch.Tensor) -> Channel:
        """Return the next channel's logistics, given the entries v (B, G, C, h, w) before it."""
        mixture, c, side = self.mixture, len(self.means), self.side
        if c:
            self.values.append(_rows(v[:, self.group, c - 1, None])[0].astype(np.int64))
        exact = _rows(mixture.group_means(v, self.group)[:, c]) * (1 << self.bits)
        mean = side.quantize(np.clip(exact, -REACH, REACH))
        self.means.append(mean)
        for j in range(c):
            coefficient = side.quantize(
                _rows(mixture.coefs[:, self.group, c * (c - 1) // 2 + j]) * (1 << COEFFICIENT)
            )
            middle = mixture.spec.max_value << self.bits - 1
            centre = middle if mixture.coefficients == "raw" else self.means[j]
            known = (self.values[j] << self.bits)[None] - centre
            mean = mean + ((coefficient * known + (1 << COEFFICIENT - 1)) >> COEFFICIENT)
        octaves = np.log2(_rows(mixture.inverse_scales[:, self.group, c])) - (self.bits - UNIT)
        return Channel(np.clip(mean, -REACH, REACH), _inverse(octaves, side), self.bits)
