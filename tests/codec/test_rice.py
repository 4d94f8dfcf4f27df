"""The code of few whole numbers: it comes back, is short, and damage is noticed."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfvae.codec import CodecError
from selfvae.codec.rice import RiceReader, rice_bits, to_bytes


@given(st.lists(st.integers(-5000, 5000)), st.lists(st.integers(-9, 9)), st.integers(0, 99))
def test_numbers_come_back(one: list[int], two: list[int], mean: int) -> None:
    reader = RiceReader(to_bytes(rice_bits(one, mean) + rice_bits(two, 1)))
    assert reader.take(len(one), mean, 5000) == one
    assert reader.take(len(two), 1, 9) == two
    reader.end()


@pytest.mark.parametrize("size", [3, 40, 2000])
def test_the_code_is_short(size: int) -> None:
    """Of two-sided exponential numbers, which have log2(2 e size) bits of entropy each."""
    draw = random.Random(size)
    values = [round(draw.expovariate(1 / size)) * draw.choice((-1, 1)) for _ in range(3000)]
    assert len(rice_bits(values, 40)) / len(values) < math.log2(2 * math.e * size) + 0.15


@given(st.binary(max_size=40), st.integers(0, 60))
def test_any_bytes_are_numbers_or_refused(data: bytes, n: int) -> None:
    reader = RiceReader(data)
    try:
        values = reader.take(n, 40, 1000)
        reader.end()
    except CodecError:
        return
    assert all(abs(v) <= 1000 for v in values)
    assert to_bytes(rice_bits(values, 40)) == data


def test_damage_is_noticed() -> None:
    data = to_bytes(rice_bits(range(-20, 20), 40))
    with pytest.raises(CodecError, match="cannot be read"):
        RiceReader(data[:-2]).take(40, 40, 20)
    with pytest.raises(CodecError, match="cannot be read"):
        RiceReader(data).take(40, 40, 19)
    reader = RiceReader(data + b"\1")
    reader.take(40, 40, 20)
    with pytest.raises(CodecError, match="bits follow"):
        reader.end()
