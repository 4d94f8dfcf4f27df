"""Corrections of a level's mixtures that the encoder fits to a picture and sends with it.

A level's pixels become known step by step; a step is one channel of one group. Before a value is coded, the
mean m of its mixture and its spread (the mean distance of a value from m, about) are known. What the value
then differs from m is its miss. Two corrections make the mixture fit the picture:

- means are shifted by a weighted sum of features: misses of earlier steps, and of neighbours of the same
  step; differences of known pixels near by from m or, for channels that are known here, from these;
- scales are multiplied by a factor that depends on how large the misses near by are, compared with their
  spreads.

The weights of each step minimise the squared misses, divided by the squared spreads (ridge regression); the
factors minimise the bits. Both are sent in whole numbers, and applied in whole numbers.

Source: docs/codec.md. Least squares fitted to a picture go back to Tsai et al. 1986 and MRP (Matsuda et al.
2005), the correction of scales by neighbouring errors to CALIC (Wu and Memon 1997).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from selfvae.codec.container import CodecError
from selfvae.codec.symbols import (
    CONTEXTS,
    FACTORS,
    NO_FACTOR,
    WEIGHT_BITS,
    Corrected,
    Ints,
    Mixture,
    Params,
    Tables,
    cost,
    find_contexts,
)
from selfvae.compiled import compiled

__all__ = ["Adaptation", "Collector", "Neighbours"]

_NEAR = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
_CROSS = _NEAR[:5]
_BEFORE = ((0, -1), (-1, 0), (-1, -1), (-1, 1))  # known in the same step, as in `symbols`
_CAUSAL = len(_BEFORE)
_AT_LEAST = 38  # what sums of misses and spreads begin with, in steps of the means; part of the format
_FINE = 3  # fractional bits of a grey level in the regression
_HEAVIEST = 1 << 14  # the weight of a position whose spread is 1/8 grey level
_RIDGE, _PRIOR = 1e-5, 2e6  # of the diagonal: relative to it, and absolute
_LARGEST = 2**15 - 1  # of a weight, in steps
_TRIED = 3  # scales are also tried this many factors higher and lower
_REGRESSED = 2  # every second position, on average, takes part in the regression
_SAMPLE = 3  # every third of these decides about the factors

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Adaptation:
    """The corrections of one level's steps.

    Attributes:
        weights: Of each step, those of the causal neighbours first: in steps of 2^-10, int64.
        factors: Of each step, the number of the factor of each context: int64 (`CONTEXTS`,).
    """

    weights: tuple[Ints, ...]
    factors: tuple[Ints, ...]

    def to_bytes(self) -> bytes:
        """Return the corrections, packed."""
        weights = np.concatenate(self.weights).astype("<i2")
        zigzag = ((weights << 1) ^ (weights >> 15)).astype("<u2").view(np.uint8).reshape(-1, 2)
        factors = np.concatenate(self.factors).astype(np.uint8)
        return zlib.compress(zigzag.T.tobytes() + factors.tobytes(), 9)

    @classmethod
    def from_bytes(cls, data: bytes, counts: Sequence[int]) -> Adaptation:
        """Return the corrections in what `to_bytes` returned.

        Args:
            data: The bytes.
            counts: The number of weights of each step.

        Raises:
            CodecError: The data are damaged.
        """
        n, tables = sum(counts), len(counts) * CONTEXTS
        try:
            unpacker = zlib.decompressobj()
            raw = unpacker.decompress(data, 2 * n + tables + 1)
        except zlib.error:
            raw = b""
        if len(raw) != 2 * n + tables or not unpacker.eof:
            raise CodecError("the file is damaged: the corrections of a level cannot be read")
        zigzag = np.frombuffer(raw[: 2 * n], np.uint8).reshape(2, n).astype(np.int64)
        zigzag = zigzag[0] | zigzag[1] << 8
        weights = (zigzag >> 1) ^ -(zigzag & 1)
        factors = np.frombuffer(raw[2 * n :], np.uint8).astype(np.int64)
        if factors.max() >= len(FACTORS):
            raise CodecError("the file is damaged: a correction of a level makes no sense")
        ends = np.cumsum(counts)[:-1]
        return cls(tuple(np.split(weights, ends)), tuple(factors.reshape(-1, CONTEXTS)))


class _Feature(NamedTuple):
    """A known image near a position, and what is subtracted from it; None: the mixture's mean."""

    image: Ints
    minus: Ints | None


class Neighbours:
    """What is known near the positions of a band, step by step. Numbers are in steps of the means.

    Args:
        kept: The pixels that the level keeps, (n, C, h, w) with n kept pixels per block.
        bits: A grey level has 2^bits steps.
    """

    def __init__(self, kept: Params, bits: int) -> None:
        self.channels, self.h, self.w = kept.shape[1:]
        self.bits = bits
        # repeated beyond the borders
        self._kept = np.pad(kept.astype(np.int64) << bits, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
        self._values: list[Ints] = []
        # 0 beyond the borders
        self._misses: list[Ints] = []
        self._spreads: list[Ints] = []

    @staticmethod
    def counts(kept: int, groups: int, channels: int) -> list[int]:
        """Return the number of features of each step, with the causal neighbours."""
        return [
            _CAUSAL + len(_CROSS) * (g * channels + c + g * (c + 1)) + len(_NEAR) * kept * (c + 1)
            for g in range(groups)
            for c in range(channels)
        ]

    def _features(self) -> Iterator[_Feature]:
        """Yield the features of the next step, without the causal neighbours."""
        g, c = divmod(len(self._values), self.channels)
        for miss in self._misses:
            for place in _CROSS:
                yield _Feature(self._at(miss, place), _ZERO)
        here = [self._at(self._values[g * self.channels + j], (0, 0)) for j in range(c)]
        minus = [*here, None]
        for kept in self._kept:
            for j in range(c + 1):
                for place in _NEAR:
                    yield _Feature(self._at(kept[j], place), minus[j])
        for group in range(g):
            for j in range(c + 1):
                for place in _CROSS:
                    yield _Feature(self._at(self._values[group * self.channels + j], place), minus[j])

    def _at(self, x: Ints, place: tuple[int, int]) -> Ints:
        down, right = place
        return x[1 + down : 1 + down + self.h, 1 + right : 1 + right + self.w]

    def _whole(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return x.reshape(self.h, self.w)

    def features(self, mean: Ints, misses: Ints, which: Ints) -> Ints:
        """Return the features of the next step at some positions.

        Args:
            mean: Of each position's mixture, (h w,).
            misses: Of the step itself, (h w,).
            which: Numbers of the positions, (k,).

        Returns:
            (N, k), the causal neighbours first.
        """
        m, own = self._whole(mean), np.pad(self._whole(misses), 1)
        features = [_Feature(self._at(own, place), _ZERO) for place in _BEFORE]
        features += self._features()
        out = np.empty((len(features), len(which)), np.int64)
        for row, f in zip(out, features, strict=True):
            np.take(f.image - (m if f.minus is None else f.minus), which, out=row)
        return out

    def energy(self) -> tuple[Ints, Ints]:
        """Return the sums of absolute misses and of spreads of earlier steps near by: (h w,) each."""
        sums = np.full((2, self.h, self.w), _AT_LEAST, np.int64)
        for miss, spread in zip(self._misses, self._spreads, strict=True):
            size = np.abs(miss)
            for place in _CROSS:
                sums[0] += self._at(size, place)
                sums[1] += self._at(spread, place)
        return sums[0].reshape(-1), sums[1].reshape(-1)

    def correct(self, moments: Ints, weights: Ints, factors: Ints) -> Corrected:
        """Return what corrects the mixtures of the next step.

        Args:
            moments: Means and spreads, (h w, 2).
            weights: Of the step's features.
            factors: Of its contexts.
        """
        m, total = self._whole(moments[:, 0]), np.zeros((self.h, self.w), np.int64)
        for weight, f in zip(weights[_CAUSAL:], self._features(), strict=True):
            if weight:
                total += weight * (f.image - (m if f.minus is None else f.minus))
        own = np.stack([moments[:, 0], moments[:, 1], total.reshape(-1), *self.energy()], 1)
        seen = np.zeros((2, self.h + 1, self.w + 2), np.int64)
        seen[1, 1:, 1:-1] = self._whole(moments[:, 1])
        fit = np.concatenate([[self.w], weights[:_CAUSAL], factors])
        return Corrected(np.ascontiguousarray(own), seen.reshape(2, -1), fit)

    def add(self, values: Params, moments: Ints) -> Ints:
        """Add a step: its values, (h w,), and the moments; return the misses, (h w,)."""
        own = self._whole(values).astype(np.int64) << self.bits
        misses = own - self._whole(moments[:, 0])
        self._values.append(np.pad(own, 1, mode="edge"))
        self._misses.append(np.pad(misses, 1))
        self._spreads.append(np.pad(self._whole(moments[:, 1]), 1))
        return misses.reshape(-1)


class _Sample(NamedTuple):
    """Some positions of a step: what `cost` takes, features (N, k), and numbers of contexts."""

    tables: Tables
    parts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.int32]
    values: Params
    moments: Ints
    features: npt.NDArray[np.int32]
    contexts: Ints

    def bits(self, shifts: Ints, factors: Ints) -> Ints:
        """Return what the values cost, in units of 2^-16 bits: (k,)."""
        return cost(self.parts, self.weights, self.values, self.moments, shifts, factors, self.tables)

    def shifts(self, weights: Ints) -> Ints:
        """Return by how much weights shift the means: (k,)."""
        return (weights @ self.features.astype(np.int64) + _HALF) >> WEIGHT_BITS


class Collector:
    """Fits the corrections of a level to some of its bands.

    All sums are of whole numbers below 2^53, so that they do not depend on the machine.

    Args:
        counts: The number of features of each step.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._squares = [np.zeros((n, n)) for n in counts]
        self._products = [np.zeros(n) for n in counts]
        self._samples: list[list[_Sample]] = [[] for _ in counts]

    def add(self, near: Neighbours, s: int, mixture: Mixture) -> None:
        """Add step s of a band, a channel of a mixture; add the step to `near` too."""
        moments = mixture.moments()
        values = np.ascontiguousarray(mixture.values[:, mixture.channel])
        misses = (values.astype(np.int64) << near.bits) - moments[:, 0]
        which = _some(len(values), _REGRESSED)
        features, coarse = near.features(moments[:, 0], misses, which), near.bits - _FINE
        rough = torch.from_numpy((features >> coarse).astype(np.float64))
        spread = np.maximum(moments[which, 1] >> coarse, 1)
        weighted = rough * torch.from_numpy(np.maximum(_HEAVIEST // spread**2, 1))
        self._squares[s] += (weighted @ rough.T).numpy()
        self._products[s] += (weighted @ torch.from_numpy(misses[which] >> coarse).double()).numpy()
        some = _some(len(which), _SAMPLE)
        features, which = features[:, some], which[some]
        seen = near.correct(moments, np.zeros(len(features), np.int64), _PLAIN)
        seen.seen[0].reshape(near.h + 1, near.w + 2)[1:, 1:-1] = misses.reshape(near.h, near.w)
        contexts = find_contexts(seen.own, seen.seen, near.w)
        sample = _Sample(
            mixture.tables, mixture.parts[which].astype(np.int32), mixture.weights[which].astype(np.int32),
            values[which], moments[which], features.astype(np.int32), contexts[which],
        )  # fmt: skip
        self._samples[s].append(sample)
        near.add(values, moments)

    def join(self, other: Collector) -> None:
        """Add what another one collected."""
        for mine, more in ((self._squares, other._squares), (self._products, other._products)):
            for own, further in zip(mine, more, strict=True):
                own += further
        for samples, others in zip(self._samples, other._samples, strict=True):
            samples += others

    def solve(self) -> tuple[Adaptation, float]:
        """Return the corrections, and how many bits they save at the positions seen, about."""
        weights, factors, saved = [], [], 0.0
        for squares, products, samples in zip(self._squares, self._products, self._samples, strict=True):
            own = _solve(squares, products)
            table, gain = _factors(samples, own)
            weights.append(own)
            factors.append(table)
            saved += gain * _REGRESSED * _SAMPLE / 2**16
        return Adaptation(tuple(weights), tuple(factors)), saved


def _some(n: int, part: int) -> Ints:
    """Return the numbers of about n / part positions, irregularly spread: a grid might follow columns."""
    return np.flatnonzero((np.arange(n) * 2654435761 >> 16) % part == 0)


def _solve(squares: Floats, products: Floats) -> Ints:
    """Return the weights of a ridge regression, in steps of 2^-10: (N,)."""
    a = squares.copy()
    a[np.diag_indices(len(a))] *= 1 + _RIDGE
    a[np.diag_indices(len(a))] += _PRIOR
    _cholesky(a)
    found = products.copy()
    _substitute(a, found)
    return np.rint(found * 2**WEIGHT_BITS).clip(-_LARGEST, _LARGEST).astype(np.int64)


def _factors(samples: list[_Sample], weights: Ints) -> tuple[Ints, int]:
    """Return the factors of a step, and how much its corrections save at its samples."""
    sums, before = np.zeros((3, CONTEXTS), np.int64), 0
    tried = NO_FACTOR - _TRIED, NO_FACTOR, NO_FACTOR + _TRIED
    shifts = [sample.shifts(weights) for sample in samples]
    for sample, shift in zip(samples, shifts, strict=True):
        none = np.full(len(shift), NO_FACTOR)
        before += int(sample.bits(0 * shift, none).sum())
        for total, factor in zip(sums, tried, strict=True):
            np.add.at(total, sample.contexts, sample.bits(shift, none - NO_FACTOR + factor))
    # the lowest point of a parabola through the three, nearer to the middle where there are few values
    bend = np.maximum(sums[0] - 2 * sums[1] + sums[2], 0) + (1 << 16)
    best = _TRIED * ((sums[0] - sums[2]) / (2 * bend)).clip(-2, 2)
    table = (np.rint(best).astype(np.int64) + NO_FACTOR).clip(0, len(FACTORS) - 1)
    after = sum(
        int(sample.bits(shift, table[sample.contexts]).sum())
        for sample, shift in zip(samples, shifts, strict=True)
    )
    return table, before - after


# Loops of float64 without vector instructions for sums: each operation is one of IEEE 754, in this order


@compiled
def _cholesky(a: Any) -> None:
    """Replace the lower triangle of a positive definite matrix by its Cholesky factor."""
    for j in range(len(a)):
        for k in range(j):
            a[j, j] -= a[j, k] * a[j, k]
        a[j, j] = math.sqrt(a[j, j])
        for i in range(j + 1, len(a)):
            for k in range(j):
                a[i, j] -= a[i, k] * a[j, k]
            a[i, j] /= a[j, j]


@compiled
def _substitute(a: Any, x: Any) -> None:
    """Solve for a right side, given the Cholesky factor, in place."""
    for i in range(len(x)):
        for k in range(i):
            x[i] -= a[i, k] * x[k]
        x[i] /= a[i, i]
    for j in range(len(x)):
        i = len(x) - 1 - j
        for k in range(i + 1, len(x)):
            x[i] -= a[k, i] * x[k]
        x[i] /= a[i, i]


_ZERO = np.zeros((1, 1), np.int64)
_PLAIN = np.full(CONTEXTS, NO_FACTOR)
_HALF = 1 << (WEIGHT_BITS - 1)
