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

import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from selfvae.codec.container import CodecError
from selfvae.codec.rice import RiceReader, rice_bits, to_bytes
from selfvae.codec.symbols import (
    CONTEXTS,
    FACTORS,
    NO_FACTOR,
    TOGETHER,
    WEIGHT_BITS,
    Corrected,
    Ints,
    Mixture,
    Params,
    Tables,
    cost,
    find_contexts,
)
from selfvae.compiled import compiled, wide_vectors

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
_RICE = b"\x01"  # what corrections in a Rice code begin with; in zlib's format they begin with 0x78
_WEIGHT, _FACTOR = 40, 2  # means that the code begins with
_TRIED = 3  # scales are also tried this many factors higher and lower
_REGRESSED = 3  # every third row, on average, takes part in the regression
_FEW = 1 << 13  # positions of a band all of whose rows do
_SAMPLE = 2  # every second of these decides about the factors
_CHUNK = 1024  # positions at a time, which the fastest cache holds
_BLOCK = 48  # features at a time in a product of matrices

Floats = npt.NDArray[np.float64]
T = TypeVar("T", bound=np.generic)


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
        weights, factors = (np.concatenate(part).tolist() for part in (self.weights, self.factors))
        bits = rice_bits(weights, _WEIGHT) + rice_bits([f - NO_FACTOR for f in factors], _FACTOR)
        return _RICE + to_bytes(bits)

    @classmethod
    def from_bytes(cls, data: bytes, counts: Sequence[int]) -> Adaptation:
        """Return the corrections in what `to_bytes` returned, or earlier versions of it.

        Args:
            data: The bytes.
            counts: The number of weights of each step.

        Raises:
            CodecError: The data are damaged.
        """
        if data.startswith(_RICE):
            reader = RiceReader(data[len(_RICE) :])
            weights = np.array(reader.take(sum(counts), _WEIGHT, _LARGEST), np.int64)
            numbers = reader.take(len(counts) * CONTEXTS, _FACTOR, len(FACTORS))
            factors = NO_FACTOR + np.array(numbers, np.int64)
            reader.end()
        else:
            weights, factors = _unpack_zlib(data, sum(counts), len(counts) * CONTEXTS)
        if not (factors.min() >= 0 and factors.max() < len(FACTORS)):
            raise CodecError("the file is damaged: a correction of a level makes no sense")
        ends = np.cumsum(counts)[:-1]
        return cls(tuple(np.split(weights, ends)), tuple(factors.reshape(-1, CONTEXTS)))


def _unpack_zlib(data: bytes, n: int, contexts: int) -> tuple[Ints, Ints]:
    """Return n weights and a factor per context from how the first files of format 3 hold them."""
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(data, 2 * n + contexts + 1)
    except zlib.error:
        raw = b""
    if len(raw) != 2 * n + contexts or not unpacker.eof:
        raise CodecError("the file is damaged: the corrections of a level cannot be read")
    zigzag = np.frombuffer(raw[: 2 * n], np.uint8).reshape(2, n).astype(np.int64)
    zigzag = zigzag[0] | zigzag[1] << 8
    return (zigzag >> 1) ^ -(zigzag & 1), np.frombuffer(raw[2 * n :], np.uint8).astype(np.int64)


class _Feature(NamedTuple):
    """An image at a place near a position, minus another one at the position; numbers of images."""

    image: int
    down: int
    right: int
    minus: int


# the images of `Neighbours`: zeros, means of mixtures, kept pixels, and each step's values and misses
_ZEROS, _MEANS, _KEPT = range(3)


@functools.cache
def _features(kept: int, channels: int, step: int) -> list[_Feature]:
    """Return the features of a step, the causal neighbours first."""
    group = step // channels
    values = [_KEPT + kept * channels + 2 * s for s in range(step + 1)]
    known = [*values[group * channels : step], _MEANS]
    found = [_Feature(values[step] + 1, *place, _ZEROS) for place in _BEFORE]
    for s in range(step):
        found += [_Feature(values[s] + 1, *place, _ZEROS) for place in _CROSS]
    for i in range(kept):
        for j, minus in enumerate(known):
            found += [_Feature(_KEPT + i * channels + j, *place, minus) for place in _NEAR]
    for g in range(group):
        for j, minus in enumerate(known):
            found += [_Feature(values[g * channels + j], *place, minus) for place in _CROSS]
    return found


class Neighbours:
    """What is known near the positions of a band, step by step. Numbers are in steps of the means.

    Args:
        kept: The pixels that the level keeps, (n, C, h, w) with n kept pixels per block.
        groups: Of pixels that it does not keep.
        bits: A grey level has 2^bits steps.
    """

    def __init__(self, kept: Params, groups: int, bits: int) -> None:
        n, channels, self.h, self.w = kept.shape
        self.bits, self._kept, self._channels, self._step = bits, n, channels, 0
        # all with a border: of zeros, but pixels are repeated
        self._images = np.zeros((_KEPT + (n + 2 * groups) * channels, self.h + 2, self.w + 2), np.int32)
        known = kept.reshape(-1, self.h, self.w).astype(np.int32) << bits
        self._images[_KEPT : _KEPT + n * channels] = np.pad(known, ((0, 0), (1, 1), (1, 1)), mode="edge")
        # sums over earlier steps: of absolute misses and of spreads
        self._energy = np.zeros((2, self.h + 2, self.w + 2), np.int64)

    @staticmethod
    def counts(kept: int, groups: int, channels: int) -> list[int]:
        """Return the number of features of each step, with the causal neighbours."""
        return [len(_features(kept, channels, s)) for s in range(groups * channels)]

    def _whole(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return x[: self.h * self.w].reshape(self.h, self.w)

    def take(self, rows: Ints, x: npt.NDArray[T], room: int = 0) -> npt.NDArray[T]:
        """Return some rows (k,) of x (..., h w or more), and zeros behind them: (..., k w + room)."""
        out = np.empty((*x.shape[:-1], len(rows) * self.w + room), x.dtype)
        out[..., len(rows) * self.w :] = 0
        for i, row in enumerate(rows):
            out[..., i * self.w : (i + 1) * self.w] = x[..., row * self.w : (row + 1) * self.w]
        return out

    def _places(self, features: list[_Feature]) -> tuple[npt.NDArray[np.int32], Ints]:
        """Return the images, flat, and each feature's image, distance and image to subtract: (N, 3)."""
        table = [(f.image, f.down * (self.w + 2) + f.right, f.minus) for f in features]
        return self._images.reshape(len(self._images), -1), np.array(table, np.int64).reshape(-1, 3)

    def correct(self, moments: Ints, weights: Ints, factors: Ints) -> Corrected:
        """Return what corrects the mixtures of the next step.

        Args:
            moments: Means and spreads, (2, h w + `TOGETHER`).
            weights: Of the step's features.
            factors: Of its contexts.
        """
        inside = slice(1, -1)
        self._images[_MEANS, inside, inside] = self._whole(moments[0])
        total = np.zeros((self.h + 2, self.w + 2), np.int64)
        features = _features(self._kept, self._channels, self._step)[_CAUSAL:]
        _add_weighted(*self._places(features), weights[_CAUSAL:], self.w + 3, total.reshape(-1))
        own = np.zeros((5, self.h * self.w + TOGETHER), np.int64)
        own[:2] = moments
        _fill_own(total, self._energy, own)
        seen = np.zeros((2, (self.h + 1) * (self.w + 2) + TOGETHER), np.int64)
        self.seen(seen[1])[:] = self._whole(moments[1])
        fit = np.concatenate([[self.w], weights[:_CAUSAL], factors])
        return Corrected(own, seen, fit)

    def seen(self, row: Ints) -> Ints:
        """Return the positions in a row of `Corrected.seen`, (h, w)."""
        return row[:-TOGETHER].reshape(self.h + 1, self.w + 2)[1:, 1:-1]

    def add(self, values: Ints, moments: Ints) -> Ints:
        """Add the step that was corrected last: its values, (h w,); return the misses, (h w,)."""
        at = _KEPT + self._kept * self._channels + 2 * self._step
        misses = np.empty(self.h * self.w, np.int64)
        _add_step(values, moments, self.bits, self._images[at], self._images[at + 1], self._energy, misses)
        image = self._images[at]
        image[0], image[-1] = image[1], image[-2]
        image[:, 0], image[:, -1] = image[:, 1], image[:, -2]
        self._step += 1
        return misses

    def features(self, rows: Ints) -> npt.NDArray[np.int32]:
        """Return the features of the step that was added last in some rows.

        Args:
            rows: Numbers of the rows, (k,).

        Returns:
            (N, k w), the causal neighbours first.
        """
        images, table = self._places(_features(self._kept, self._channels, self._step - 1))
        out = np.empty((len(table), len(rows) * self.w), np.int32)
        _take(images, table, rows, out)
        return out


class _Sample(NamedTuple):
    """Some positions of a step: what `cost` takes, features (N, k), and numbers of contexts."""

    tables: Tables
    parts: Ints
    weights: Ints
    values: Ints
    moments: Ints
    features: npt.NDArray[np.int32]
    contexts: Ints

    def bits(self, shifts: Ints, factors: Ints) -> Ints:
        """Return what the values cost, in units of 2^-16 bits: (k,)."""
        return cost(self.parts, self.weights, self.values, self.moments, shifts, factors, self.tables)

    def shifts(self, weights: Ints) -> Ints:
        """Return by how much weights shift the means: (k,)."""
        total = np.full(self.features.shape[1], _HALF)
        _add_products(self.features, weights, total)
        return total >> WEIGHT_BITS


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
        self._positions = [0 for _ in counts]

    def add(self, near: Neighbours, s: int, mixture: Mixture) -> None:
        """Add step s of a band, a channel of a mixture; add the step to `near` too."""
        moments = mixture.moments()
        values = mixture.known
        seen = near.correct(moments, np.zeros(len(self._products[s]), np.int64), _PLAIN)
        misses = near.add(values, moments)
        rows = _some(near.h, _REGRESSED if len(values) > _FEW else 1)
        features = near.features(rows)
        missed, spreads = near.take(rows, misses), near.take(rows, moments[1])
        _regress(features, missed, spreads, near.bits - _FINE, self._squares[s], self._products[s])
        near.seen(seen.seen[0])[:] = misses.reshape(near.h, near.w)
        contexts = find_contexts(seen.own, seen.seen, near.w, len(values))
        some = _some(len(rows), _SAMPLE)
        take = functools.partial(near.take, rows[some])
        sample = _Sample(
            mixture.tables, take(mixture.parts, TOGETHER), take(mixture.weights, TOGETHER), take(values),
            take(moments), near.take(some, features), take(contexts),
        )  # fmt: skip
        self._samples[s].append(sample)
        self._positions[s] += len(values)

    def join(self, other: Collector) -> None:
        """Add what another one collected."""
        for mine, more in ((self._squares, other._squares), (self._products, other._products)):
            for own, further in zip(mine, more, strict=True):
                own += further
        for s, others in enumerate(other._samples):
            self._samples[s] += others
            self._positions[s] += other._positions[s]

    def solve(self) -> tuple[Adaptation, float]:
        """Return the corrections, and how many bits they save at the positions seen, about."""
        weights, factors, saved = [], [], 0.0
        sums = zip(self._squares, self._products, self._samples, self._positions, strict=True)
        for squares, products, samples, positions in sums:
            own = _solve(squares, products)
            table, gain = _factors(samples, own)
            weights.append(own)
            factors.append(table)
            saved += gain * positions / sum(len(sample.values) for sample in samples) / 2**16
        return Adaptation(tuple(weights), tuple(factors)), saved


@compiled
def _add_step(
    values: Any, moments: Any, bits: int, image: Any, missed: Any, energy: Any, misses: Any
) -> None:
    """Fill the images of a step's values and misses within their borders, and add to the sums of both."""
    w = image.shape[1] - 2
    for row in range(image.shape[0] - 2):
        here = slice(row * w, (row + 1) * w)
        value, mean, spread, miss = values[here], moments[0, here], moments[1, here], misses[here]
        pixels, beside = image[row + 1], missed[row + 1]
        total, spreads = energy[0, row + 1], energy[1, row + 1]
        for col in range(w):
            pixels[col + 1] = value[col] << bits
            miss[col] = (value[col] << bits) - mean[col]
        for col in range(w):
            beside[col + 1] = miss[col]
            total[col + 1] += abs(miss[col])
            spreads[col + 1] += spread[col]


@compiled
def _add_weighted(images: Any, table: Any, weights: Any, first: int, out: Any) -> None:
    """Add the features in a table times their weights to out, but for its first and last positions."""
    for start in range(first, len(out) - first, _CHUNK):
        stop = min(start + _CHUNK, len(out) - first)
        total = out[start:stop]
        for f in range(len(table)):
            if weights[f] == 0:
                continue
            image = images[table[f, 0], start + table[f, 1] : stop + table[f, 1]]
            minus = images[table[f, 2], start:stop]
            for i in range(len(total)):
                total[i] += weights[f] * (image[i] - minus[i])


@compiled
def _fill_own(total: Any, energy: Any, own: Any) -> None:
    """Fill the other rows of `Corrected.own` from weighted sums and sums of misses, both with a border."""
    w = total.shape[1] - 2
    for row in range(total.shape[0] - 2):
        for col in range(w):
            own[2, row * w + col] = total[row + 1, col + 1]
        for j in range(2):
            above, here, below = energy[j, row], energy[j, row + 1], energy[j, row + 2]
            for col in range(w):
                near = here[col] + here[col + 1] + here[col + 2]
                own[3 + j, row * w + col] = _AT_LEAST + near + above[col + 1] + below[col + 1]


@compiled
def _weigh(features: Any, spreads: Any, first: int, coarse: int, rough: Any, weighted: Any) -> None:
    """Compute some positions' features, in steps 2^coarse times as wide, and these times weights.

    Args:
        features: (N, k).
        spreads: (k,); those of the positions become their weights.
        first: The first of the positions.
        coarse: A number of bits.
        rough, weighted: Receive the features of the positions, and the weighted ones: (N, n or more).
    """
    wide_vectors()
    weight = spreads[first : first + rough.shape[1]]
    n = len(weight)
    for i in range(n):
        spread = max(weight[i] >> coarse, 1)
        weight[i] = max(_HEAVIEST // (spread * spread), 1)
    for f in range(len(features)):
        feature, plain, heavy = features[f, first : first + n], rough[f], weighted[f]
        for i in range(n):
            plain[i] = feature[i] >> coarse
        for i in range(n):
            heavy[i] = plain[i] * weight[i]


@compiled
def _add_products(features: Any, weights: Any, out: Any) -> None:
    """Add features (N, k) times weights (N,) to out (k,)."""
    wide_vectors()
    for f in range(len(weights)):
        feature, weight = features[f], weights[f]
        for i in range(len(out)):
            out[i] += weight * feature[i]


@compiled
def _take(images: Any, table: Any, rows: Any, out: Any) -> None:
    """Compute the features in a table in some rows, into out (N, k w)."""
    w = out.shape[1] // len(rows)
    for f in range(len(table)):
        for j in range(len(rows)):
            first = (rows[j] + 1) * (w + 2) + 1
            at = first + table[f, 1]
            image, minus = images[table[f, 0], at : at + w], images[table[f, 2], first : first + w]
            found = out[f, j * w : (j + 1) * w]
            for i in range(w):
                found[i] = image[i] - minus[i]


def _some(n: int, part: int) -> Ints:
    """Return the numbers of about n / part rows, irregularly spread: a grid might follow stripes."""
    return np.flatnonzero((np.arange(n) * 2654435761 >> 16) % part == 0)


def _regress(
    features: npt.NDArray[np.int32],
    misses: Ints,
    spreads: Ints,
    coarse: int,
    squares: Floats,
    products: Floats,
) -> None:
    """Add the sums of a regression, in steps 2^coarse times as wide as those of what is given.

    Args:
        features: (N, k).
        misses, spreads: (k,); the spreads are overwritten.
        coarse: A number of bits.
        squares: Receives the products of two features, (N, N), on and below the diagonal.
        products: Receives the products of a feature and the miss, (N,).
    """
    missed = torch.from_numpy(misses >> coarse).double()
    sums, own = torch.from_numpy(squares), torch.from_numpy(products)
    rough, weighted = np.empty((2, len(features), _CHUNK))
    for first in range(0, len(misses), _CHUNK):
        n = min(_CHUNK, len(misses) - first)
        _weigh(features, spreads, first, coarse, rough, weighted)
        a, b = torch.from_numpy(weighted[:, :n]), torch.from_numpy(rough[:, :n])
        for j in range(0, len(features), _BLOCK):  # leaves out most of what lies above the diagonal
            sums[j:, j : j + _BLOCK].addmm_(a[j:], b[j : j + _BLOCK].T)
        own.addmv_(a, missed[first : first + n])


def _solve(squares: Floats, products: Floats) -> Ints:
    """Return the weights of a ridge regression, in steps of 2^-10: (N,)."""
    a = squares.copy()
    a[np.diag_indices(len(a))] *= 1 + _RIDGE
    a[np.diag_indices(len(a))] += _PRIOR
    _cholesky(a)
    found = products.copy()
    _substitute(a, found)
    return np.rint(found * 2**WEIGHT_BITS).clip(-_LARGEST, _LARGEST).astype(np.int64)


def _factors(samples: list[_Sample], weights: Ints) -> tuple[Ints, float]:
    """Return the factors of a step, and how much its corrections save at its samples, about."""
    sums, before = np.zeros((3, CONTEXTS), np.int64), 0
    tried = NO_FACTOR - _TRIED, NO_FACTOR, NO_FACTOR + _TRIED
    for sample in samples:
        shift = sample.shifts(weights)
        none = np.full(len(shift), NO_FACTOR)
        before += int(sample.bits(0 * shift, none).sum())
        for total, factor in zip(sums, tried, strict=True):
            np.add.at(total, sample.contexts, sample.bits(shift, none - NO_FACTOR + factor))
    # the lowest point of a parabola through the three, nearer to the middle where there are few values
    slope, bend = (sums[2] - sums[0]) / 2, np.maximum(sums[0] - 2 * sums[1] + sums[2], 0) + (1 << 16)
    best = _TRIED * (-slope / bend).clip(-2, 2)
    table = (np.rint(best).astype(np.int64) + NO_FACTOR).clip(0, len(FACTORS) - 1)
    x = (table - NO_FACTOR) / _TRIED
    return table, float(before - (sums[1] + slope * x + bend * x**2 / 2).sum())


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


_PLAIN = np.full(CONTEXTS, NO_FACTOR)
_HALF = 1 << (WEIGHT_BITS - 1)
