"""Mixtures in whole numbers: their tables, the length of what is coded, and damaged streams."""

from __future__ import annotations

import contextlib
import zlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfvae import compiled
from selfvae.codec import CodecError, symbols
from selfvae.codec.symbols import Mixture, SlotDecoder, SlotEncoder, Tables, tables
from selfvae.distributions.pixels import COEFFICIENT, LOGIT, MEAN, SCALE, PixelMixture, param_count
from selfvae.transforms import ImageSpec, Support

SLOTS = 1 << 24


class Drawn(NamedTuple):
    """Random parameters of n positions: steps of the grids, estimates, bounds, values within, a mask."""

    tables: Tables
    rows: np.ndarray
    prediction: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    values: np.ndarray
    coded: np.ndarray

    def code(self, coder: SlotEncoder | SlotDecoder, values: np.ndarray) -> np.ndarray:
        """Code all channels; values (n, C) are read or filled in."""
        mixture = mixture_of(self, values)
        for c in range(self.tables.channels):
            mixture.begin(c)
            coder.code(mixture, *(np.ascontiguousarray(a[:, c]) for a in (self.lo, self.hi, self.coded)))
        values[:] = mixture.values.T
        return values

    def encode(self) -> bytes:
        encoder = SlotEncoder()
        self.code(encoder, self.values.copy())
        return encoder.finish(crc(self.values))

    def decode(self, data: bytes) -> np.ndarray:
        decoder = SlotDecoder(data)
        # where nothing is coded both sides know the value
        values = self.code(decoder, np.where(self.coded, 0, self.values).astype(np.int16))
        decoder.finish(crc(values))
        return values


def mixture_of(d: Drawn, values: np.ndarray) -> Mixture:
    planes = values.T.astype(np.int64, order="C")
    return Mixture(
        np.ascontiguousarray(d.rows.T), 0, np.ascontiguousarray(d.prediction.T), planes, d.tables
    )


def crc(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data) & 0x7FFFFFFF


def drawn(
    seed: int, n: int, channels: int, components: int, num_values: int, options: tuple[bool, bool],
    wild: float = 1.0,
) -> Drawn:  # fmt: skip
    """Parameters anywhere on their grids; wild: a factor on logits, means and coefficients."""
    rng, top = np.random.default_rng(seed), num_values - 1
    t = tables(num_values, channels, components, *options)
    pairs, grids = channels * (channels - 1) // 2, (LOGIT, MEAN, SCALE, COEFFICIENT)
    counts = [components * k for k in (1, channels, channels, pairs)]
    rows = np.concatenate(
        [
            rng.integers(-int(most * w), int(most * w) + 1, (n, k))
            for (_, most), k, w in zip(grids, counts, (wild, wild, 1.0, wild), strict=True)
        ],
        1,
    ).astype(np.int16)
    # extremes are where whole numbers could overflow
    rows[rng.random(rows.shape) < 0.1 * (wild == 1)] = -255
    prediction = rng.integers(0, (top << t.bits) + 1, (n, channels))
    ends = rng.integers(0, num_values, (2, n, channels))
    ends[1] = np.where(rng.random((n, channels)) < 0.2, ends[0], ends[1])
    lo, hi = ends.min(0), ends.max(0)
    whole = rng.random((n, channels)) < 0.4
    lo, hi = np.where(whole, 0, lo), np.where(whole, top, hi)
    values = rng.integers(lo, hi + 1).astype(np.int16)
    return Drawn(t, rows, prediction, lo, hi, values, rng.random((n, channels)) < 0.8)


def counts_of(d: Drawn) -> list[list[np.ndarray]]:
    """The slots of every value lo..hi, for each channel and position, given the values before it."""
    m, found = mixture_of(d, d.values), []
    for channel in range(d.tables.channels):
        m.begin(channel)
        c, own = np.zeros((8, d.tables.components), np.int64), []
        for i in range(len(d.rows)):
            a, b = int(d.lo[i, channel]), int(d.hi[i, channel])
            symbols._load(m.parts, i, c)
            symbols._limit(a, b, c, d.tables.array)
            edges = [
                symbols._slots(v, a, b, m.weights, i, c, symbols._PARTS, d.tables.array)
                for v in range(a, b + 2)
            ]
            own.append(np.diff(edges))
            assert edges[0] == 0 and edges[-1] == SLOTS
            if a < b:
                value = int(d.values[i, channel])
                symbols._slots(value, a, b, m.weights, i, c, symbols._BELOW, d.tables.array)
                symbols._slots(value + 1, a, b, m.weights, i, c, symbols._ABOVE, d.tables.array)
                symbols._observe(m.weights, i, c)
                assert m.weights[:, i].sum() == 1 << 16 and m.weights[:, i].min() >= 0
        found.append(own)
    return found


def test_blocks_and_single_positions_give_the_same_weights() -> None:
    """What the fit computes side by side, the coder computes position by position."""
    for seed in range(12):
        d = drawn(seed, 150, 3, 5, 256, (bool(seed % 2), True), wild=(1.0, 0.2)[seed % 3 > 0])
        d.lo[:], d.hi[:] = 0, 255
        one, two = mixture_of(d, d.values), mixture_of(d, d.values)
        for c in range(3):
            coded = np.ascontiguousarray(d.coded[:, c])
            one.begin(c)
            two.begin(c)
            one.learn(coded)
            lo, hi = np.zeros(150, np.int64), np.full(150, 255)
            SlotEncoder().code(two, lo, hi, coded)
            assert np.array_equal(one.parts[..., :150], two.parts[..., :150])
            assert np.array_equal(one.weights[:, :150], two.weights[:, :150])
        assert (one.weights[:, :150].sum(0) == 1 << 16).all()


CASES = st.tuples(
    st.integers(0, 2**32 - 1), st.just(6), st.sampled_from([1, 3, 4]), st.sampled_from([1, 2, 5, 10]),
    st.sampled_from([2, 3, 13, 128, 129, 256]), st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(CASES)
def test_every_value_has_slots_and_all_add_to_2_to_the_24(case: Any) -> None:
    for own in counts_of(drawn(*case)):
        for counts in own:
            assert counts.min() >= 1 and counts.sum() == SLOTS


@settings(max_examples=25, deadline=None)
@given(CASES)
def test_round_trips_with_masks_and_bounds(case: Any) -> None:
    d = drawn(*case)
    data = d.encode()
    assert np.array_equal(d.decode(data), d.values)
    changed = bytearray(data)
    changed[case[0] % len(data)] ^= 1 << case[0] % 7
    with contextlib.suppress(CodecError):
        assert np.array_equal(d.decode(bytes(changed)), d.values)


@pytest.mark.parametrize("truncated", [False, True])
def test_plain_python_writes_and_reads_the_same(truncated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    d = drawn(1, 40, 3, 4, 256, (True, truncated))
    fast = d.encode()
    monkeypatch.setattr(compiled, "PLAIN", True)
    assert d.encode() == fast
    assert np.array_equal(d.decode(fast), d.values)


class _Bounded(Support):
    """Intervals that are given."""

    restricts = truncates = True

    def __init__(self, lo: Tensor, hi: Tensor, spec: ImageSpec) -> None:
        super().__init__(lo, spec)
        self.lo, self.hi = lo, hi

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.lo, self.hi


def _entries(x: np.ndarray) -> Tensor:
    """(n, C) -> (1, 1, C, 1, n)."""
    return torch.from_numpy(np.ascontiguousarray(x.T))[None, None, :, None]


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("options", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize(("num_values", "channels"), [(256, 3), (256, 1), (100, 3), (3, 3)])
def test_probabilities_are_those_of_the_float_mixture(
    num_values: int, channels: int, options: tuple[bool, bool], truncated: bool
) -> None:
    """What values drawn from the float mixture cost, on average, beyond its entropy."""
    n, components = 120, 4
    d = drawn(5, n, channels, components, num_values, options, wild=0.005)
    # intervals such as transforms leave: around where the mixture has its mass. Components may be far wider
    # than these, but not narrow and beyond them: the tables end there
    rng, top = np.random.default_rng(0), num_values - 1
    width = rng.integers(4, num_values // 4 + 8, (2, n, channels))
    scales = slice((1 + channels) * components, (1 + 2 * channels) * components)
    d.rows[:, scales] = d.rows[:, scales].clip(-40 if truncated else -255)
    centre = d.prediction >> d.tables.bits if options[0] else np.full((n, channels), num_values // 2)
    lo, hi = (centre - width[0], centre + width[1]) if truncated else (centre - top, centre + top)
    d = d._replace(lo=lo.clip(0, top), hi=hi.clip(0, top))
    bits = np.repeat(
        [bits for bits, _ in (LOGIT, MEAN, SCALE, COEFFICIENT)],
        [components * k for k in (1, channels, channels, channels * (channels - 1) // 2)],
    )
    assert d.rows.shape[1] == param_count(channels, components) == len(bits)
    params = torch.from_numpy((d.rows / 2.0**bits).T.copy())[None, None, :, None]
    spec, lo, hi = ImageSpec(channels, num_values), _entries(d.lo), _entries(d.hi)
    support = _Bounded(lo, hi, spec) if truncated else Support(lo, spec)
    guess = _entries(d.prediction / 2.0**d.tables.bits) if options[0] else None
    if not options[0]:
        d.prediction[:] = (num_values - 1) << (d.tables.bits - 1)
    mixture = PixelMixture(
        params, support, spec, prediction=guess, coefficients="residual" if options[1] else "raw"
    )
    v = _entries(d.values).long()
    generator, pmfs = torch.Generator().manual_seed(0), []
    for channel in range(channels):  # values as they come from the mixture
        pmf = mixture.log_pmf(v, 0, channel)[0, 0].exp()
        v[0, 0, channel, 0] = torch.multinomial(pmf, 1, generator=generator)[:, 0]
        pmfs.append(pmf.numpy())
    d = d._replace(values=v[0, 0, :, 0].T.numpy().astype(np.int16))
    entropy = excess = 0.0
    for channel, own in enumerate(counts_of(d)):
        for i, counts in enumerate(own):
            p = pmfs[channel][i, d.lo[i, channel] : d.hi[i, channel] + 1].clip(1e-30)
            assert p.sum() == pytest.approx(1, abs=1e-4)
            entropy -= float((p * np.log2(p)).sum())
            excess += float((p * np.log2(p * SLOTS / counts)).sum())
    assert entropy > 100 and -1e-3 < excess < 0.002 * entropy


def test_the_coded_length_is_the_sum_of_the_values_own() -> None:
    d = drawn(2, 1500, 3, 5, 256, (True, True), wild=0.02)
    d = d._replace(coded=np.ones_like(d.coded))
    total = 0.0
    for channel, own in enumerate(counts_of(d)):
        at = d.values[:, channel] - d.lo[:, channel]
        total -= sum(float(np.log2(counts[k] / SLOTS)) for counts, k in zip(own, at, strict=True))
    # the first state is worth 31 bits, the last one takes 64
    assert 8 * len(d.encode()) == pytest.approx(total + 48, abs=40)


def test_damaged_streams_end_in_errors() -> None:
    """Each is refused; none that is decoded takes other values for the true ones."""
    d, rng = drawn(3, 60, 3, 3, 256, (True, True)), np.random.default_rng(0)
    data, refused = d.encode(), 0
    for i in range(400):
        if i % 4 == 0:
            damaged = data[: rng.integers(len(data))]
        elif i % 4 == 1:  # any words after any state
            damaged = data[:7] + bytes([rng.integers(1, 64)]) + rng.bytes(4 * int(rng.integers(200)))
        elif i % 4 == 2:
            damaged = data + rng.bytes(4)
        else:
            changed = bytearray(data)
            changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            damaged = bytes(changed)
        with pytest.raises(CodecError):
            d.decode(damaged)
        refused += 1
    assert refused == 400
    for wrong in (b"", data[:7], bytes(8), b"\xff" * 8, data[:9]):
        with pytest.raises(CodecError, match="no output of a coder"):
            SlotDecoder(wrong)


def test_what_random_words_decode_to_is_within_bounds() -> None:
    """The loops end, and write nowhere else, whatever the words are: plain Python would raise an error."""
    rng = np.random.default_rng(0)
    for seed in range(60):
        d = drawn(seed, 30, 3, 3, (256, 7, 2)[seed % 3], (bool(seed % 2), True))
        decoder = SlotDecoder(b"\x00" * 3 + rng.bytes(4) + b"\x01" + rng.bytes(4 * 300))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiled, "PLAIN", seed % 10 == 0)
            values = d.code(decoder, np.where(d.coded, 0, d.values).astype(np.int16))
        assert (np.where(d.coded, d.lo, values) <= values).all()
        assert (values <= np.where(d.coded, d.hi, values)).all()


def test_no_arithmetic_overflows() -> None:
    """Plain Python without bounds on integers against 64-bit integers, at the ends of all grids."""
    for num_values in (2, 256):
        t = tables(num_values, 3, 2, False, False)
        for rows in (-1, 1):
            d = drawn(0, 8, 3, 2, num_values, (False, False))
            d.rows[:, :] = rows * 255
            d.rows[:, 2:8] = rows * np.array([1, -1] * 3) * (2**15 - 1)
            d = d._replace(tables=t, coded=np.ones_like(d.coded))
            exact = [[[int(n) for n in own] for own in channel] for channel in counts_of_plain(d)]
            assert exact == [[own.tolist() for own in channel] for channel in counts_of(d)]


class _Whole:
    """An array of Python's integers, indexed as the loops index arrays."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array.astype(object)
        self.shape = array.shape

    def __getitem__(self, at: Any) -> Any:
        return self.array[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self.array[at] = value

    def __len__(self) -> int:
        return len(self.array)


def counts_of_plain(d: Drawn) -> list[list[np.ndarray]]:
    """`counts_of` in Python's integers, which never overflow."""
    t, s = _Whole(d.tables.array), _Whole(symbols._scratch())
    outputs, prediction, values = _Whole(d.rows.T), _Whole(d.prediction.T), _Whole(d.values.T)
    n, channels, components = len(d.rows), d.tables.channels, d.tables.components
    room = n + symbols.TOGETHER
    means, weights = _Whole(np.zeros((channels, components, room))), _Whole(np.zeros((components, room)))
    parts = _Whole(np.zeros((2, components, room)))
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "PLAIN", True)
        for name in ("_TAIL", "_FALL"):
            patch.setattr(symbols, name, getattr(symbols, name).tolist())
        symbols._start(outputs, 0, weights, t, s)
        for channel in range(channels):
            c, own = _Whole(np.zeros((8, components))), []
            symbols._components(outputs, 0, channel, prediction, values, means, t, s, parts)
            for i in range(n):
                a, b = int(d.lo[i, channel]), int(d.hi[i, channel])
                symbols._load(parts, i, c)
                symbols._limit(a, b, c, t)
                edges = [symbols._slots(v, a, b, weights, i, c, symbols._PARTS, t) for v in range(a, b + 2)]
                own.append(np.diff(np.array(edges, object)))
                if a < b:
                    value = values[channel, i]
                    symbols._slots(value, a, b, weights, i, c, symbols._BELOW, t)
                    symbols._slots(value + 1, a, b, weights, i, c, symbols._ABOVE, t)
                    symbols._observe(weights, i, c)
            found.append(own)
    return found
