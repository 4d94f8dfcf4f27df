"""Corrections that the encoder fits to a picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from codec_models import INTEGER, integer_codec
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import selfvae
from selfvae import compiled
from selfvae.codec import Codec, CodecError, adaptation, read_header, symbols
from selfvae.codec.adaptation import Adaptation, Collector, Neighbours
from selfvae.codec.chains import ChainCodec
from selfvae.codec.symbols import CONTEXTS, FACTORS, NO_FACTOR, TOGETHER, SlotEncoder
from selfvae.data.crops import photo


def picture(height: int = 200, width: int = 260) -> Tensor:
    """A part of a photograph whose channels are more alike than in most, uint8 (1, 3, H, W)."""
    x = torch.from_numpy(photo("coffee", 1)[None, :, :height, :width].copy())
    return torch.cat([x[:, :1], (x[:, :1] // 4 * 3 + x[:, 1:] // 4)], 1)


def chain(which: str = "quincunx") -> ChainCodec:
    found = integer_codec(which).chain
    assert found is not None
    return found


def size_of(parts: list[tuple[int, bytes]]) -> int:
    return sum(len(data) for _, data in parts)


def test_corrections_save_bytes_and_come_back() -> None:
    codec = Codec(selfvae.load("photos-v2"))
    x = picture()
    assert codec.chain is not None
    fit = codec.chain.fit(x)
    plain, corrected = codec.chain.encode(x), codec.chain.encode(x, fit)
    assert len(fit.data) + size_of(corrected) < 0.99 * size_of(plain)
    size = x.shape[2], x.shape[3]
    back = codec.chain.decode([data for _, data in corrected], size, corrections=fit.data)
    assert torch.equal(back[0][:, :, : size[0], : size[1]], x)
    data = codec.compress(x)
    assert read_header(data).ends()[0][0] == "corrections"
    assert torch.equal(codec.decompress(data), x)
    assert torch.equal(codec.decompress(data, "y2"), x[:, :, ::2, ::2])


def test_what_is_saved_is_about_what_was_estimated() -> None:
    codec, x = Codec(selfvae.load("photos-v2")).chain, picture()
    assert codec is not None
    fit, saved = codec.fit(x), 0.0
    for k in fit.adaptations:
        collectors = [
            codec._collect(k, strip, strip, fit.images, (x.shape[2], x.shape[3]))[1]
            for strip in codec._grid(k, (x.shape[2], x.shape[3])).strips(1)
        ]
        assert len(collectors) == 1
        saved += collectors[0].solve()[1]
    found = 8 * (size_of(codec.encode(x)) - size_of(codec.encode(x, fit)))
    assert 0.8 * found < saved < 1.4 * found


@pytest.mark.parametrize("which", INTEGER)
def test_any_weights_come_back(which: str) -> None:
    """Weights and factors that fit nothing; pictures that are padded; several bands."""
    codec, rng = chain(which), np.random.default_rng(0)
    channels = codec.model.spec.channels
    for size in ((9, 11), (64, 77), (150, 300)):
        x = torch.from_numpy(rng.integers(0, codec.model.spec.num_values, (1, channels, *size), np.uint8))
        fit = codec.fit(x)
        made = {
            k: Adaptation(
                tuple(rng.integers(-3000, 3000, n) for n in coder.counts()),
                tuple(rng.integers(0, len(FACTORS), CONTEXTS) for _ in coder.counts()),
            )
            for k, coder in enumerate(codec._levels[: codec.joined(size)])
            if coder.adapts
        }
        data = b""
        for k in reversed(range(codec.joined(size))):
            own = made[k].to_bytes() if k in made else b""
            data += symbols.container.varint(len(own)) + own
        parts = codec.encode(x, fit._replace(adaptations=made), verify=True)
        again = codec.decode([part for _, part in parts], size, corrections=data if made else b"")
        assert torch.equal(again[0][:, :, : size[0], : size[1]], x)


def test_the_same_bytes_for_any_number_of_threads_and_in_plain_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec, x = chain(), picture(130, 260)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        fit = codec.fit(x)
        found.append((fit.data, codec.encode(x, fit)))
    torch.set_num_threads(1)
    assert fit.data and found[0] == found[1] == found[2]
    small = x[:, :, :48, :64]
    fast = codec.fit(small)
    monkeypatch.setattr(compiled, "PLAIN", True)
    slow = codec.fit(small)
    assert slow.data == fast.data and codec.encode(small, slow) == codec.encode(small, fast)


def test_features_of_a_step_depend_on_earlier_steps_only() -> None:
    """Each step's corrections, with all later pixels changed."""
    rng = np.random.default_rng(1)
    kept, values = rng.integers(0, 256, (2, 3, 6, 7)), rng.integers(0, 256, (6, 42))
    moments = np.zeros((6, 2, 42 + TOGETHER), np.int64)
    moments[:, 0, :42] = rng.integers(0, 255 << 7, (6, 42))
    moments[:, 1, :42] = rng.integers(20, 999, (6, 42))
    counts = Neighbours.counts(2, 2, 3)
    one, two = Neighbours(kept, 2, 7), Neighbours(kept, 2, 7)
    for s, n in enumerate(counts):
        weights, factors = rng.integers(-999, 999, n), rng.integers(0, 16, CONTEXTS)
        a, b = (near.correct(moments[s], weights, factors) for near in (one, two))
        assert all(np.array_equal(i, j) for i, j in zip(a, b, strict=True))
        misses = one.add(values[s], moments[s])
        assert np.array_equal(misses, (values[s] << 7) - moments[s, 0, :42])
        two.add(values[s], moments[s])
        if s == 2:
            first, second = (one._images[adaptation._KEPT + 2 * 3 + 2 * i] for i in (0, 1))
            assert not np.array_equal(first, second)
    # what the regression sees is what the coder adds
    near, rows = Neighbours(kept, 2, 7), np.arange(6)
    for s, n in enumerate(counts):
        weights = rng.integers(-999, 999, n)
        corrected = near.correct(moments[s], weights, np.full(CONTEXTS, NO_FACTOR))
        own = near.add(values[s], moments[s])
        features = near.features(rows)
        assert len(features) == n
        assert np.array_equal(corrected.own[2, :42], weights[4:] @ features[4:])
        near.seen(corrected.seen[0])[:] = own.reshape(6, 7)
        before = corrected.seen[0, :63].reshape(7, 9)
        assert np.array_equal(features[0].reshape(6, 7), before[1:, :-2])  # left
        assert np.array_equal(features[1].reshape(6, 7), before[:-1, 1:-1])  # above


def test_the_regression_is_numpy_s() -> None:
    rng = np.random.default_rng(2)
    f = rng.integers(-50, 50, (7, 400)).astype(float)
    squares, products = f @ f.T, f @ rng.integers(-20, 20, 400)
    ridge = squares + np.diag(np.diag(squares) * adaptation._RIDGE + adaptation._PRIOR)
    expected = np.rint(np.linalg.solve(ridge, products) * 1024)
    assert np.array_equal(adaptation._solve(squares, products), expected)


def test_costs_are_those_of_the_coder() -> None:
    """Of mixtures without corrections: the lengths of streams."""
    codec, x = chain(), picture(64, 64)
    images = codec._images(x, (64, 64))
    coder, grid = codec._levels[0], codec._grid(0, (64, 64))
    outputs = coder.outputs(images[1], slice(0, grid.rows), grid)
    seen: list[float] = []

    class Keeps(Collector):
        def add(self, near: Neighbours, s: int, mixture: symbols.Mixture) -> None:
            values, moments = mixture.known, mixture.moments()
            none = np.zeros(len(values), np.int64)
            costs = symbols.cost(
                mixture.parts, mixture.weights, values, moments, none, none + NO_FACTOR, mixture.tables
            )
            seen.append(costs.sum() / 2**16)
            near.add(values, moments)

    encoder = SlotEncoder()
    coder.code(outputs, Keeps(coder.counts()), images[0], None)
    coder.code(outputs, encoder, images[0], None)
    assert sum(seen) == pytest.approx(8 * len(encoder.finish(0)), rel=0.002, abs=100)


def test_noise_is_not_corrected() -> None:
    codec = chain()
    x = torch.randint(
        0, 256, (1, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    fit, plain = codec.fit(x), size_of(codec.encode(x))
    assert len(fit.data) + size_of(codec.encode(x, fit)) <= plain + 64


@given(st.binary(max_size=60), st.integers(0, 3))
def test_damaged_corrections_are_refused(data: bytes, cut: int) -> None:
    codec, counts = chain(), Neighbours.counts(1, 1, 3)
    with pytest.raises(CodecError):
        Adaptation.from_bytes(data, counts)
    whole = Adaptation(
        tuple(np.arange(n) - n // 2 for n in counts),
        tuple(np.full(CONTEXTS, NO_FACTOR) for _ in counts),
    )
    packed = whole.to_bytes()
    again = Adaptation.from_bytes(packed, counts)
    for one, two in zip(whole.weights + whole.factors, again.weights + again.factors, strict=True):
        assert np.array_equal(one, two)
    with pytest.raises(CodecError):
        Adaptation.from_bytes(packed[: len(packed) - 1 - cut], counts)
    with pytest.raises(CodecError):
        Adaptation.from_bytes(packed, [*counts, 5])
    with pytest.raises(CodecError):
        codec.adaptations(b"\x01" + data, (130, 260))


def test_a_large_picture_is_fitted_at_some_of_its_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the outputs of networks do not fit into memory."""
    from selfvae.codec import chains

    codec, x = chain(), picture(260, 300)
    monkeypatch.setattr(chains, "_FITTED", 1)
    fit = codec.fit(x)
    assert (0, 0) not in fit.outputs and 0 in fit.adaptations
    parts = codec.encode(x, fit)
    back = codec.decode([data for _, data in parts], (260, 300), corrections=fit.data)
    assert torch.equal(back[0][:, :, :260, :300], x)


def test_integer_and_float_tables_agree() -> None:
    for i, x in enumerate(FACTORS):
        assert symbols._WIDER[i] == round(2**14 * math.exp(x))
        assert symbols._NARROWER[i] == round(2**14 * math.exp(-x))
    assert list(symbols._BORDERS) == [round(2 ** (8 + (i - 3) / 3)) for i in range(7)]
