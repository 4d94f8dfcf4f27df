"""The integer tables: close to the functions that they stand for, and the same on every machine."""

import json
import zlib

import numpy as np
import torch
from codec_models import GOLDEN, golden_tables

from selfvae.codec import (
    tables,
)
from selfvae.codec.float64 import quantization
from selfvae.codec.float64.quantization import SideInformation
from selfvae.codec.tables import ONE, Channel, cumulative


def test_the_logistics_table() -> None:
    """Against float64's own, at means and scales from one end to the other."""
    inverse = tables.inverse_table()
    assert inverse[-tables.FLATTEST] == 1 << 20 and (np.diff(inverse) >= 0).all()
    mean = np.array([[-5000, 0, 16, 4080, 4081, 9000]] * len(inverse))
    steps = np.arange(len(inverse))[:, None] + np.zeros_like(mean)
    for edge in (1, 100, 128, 255):
        found = cumulative(np.full(6, 32 * edge - 16), Channel(mean, inverse[steps], 5)) / 2.0**ONE
        t = (edge - 0.5 - mean / 32) * (inverse[steps] / 2**20)
        assert np.abs(found - 1 / (1 + np.exp(-np.clip(t, -40, 40)))).max() < 1e-4
    means = np.arange(-3000, 3000)[:, None]
    fine = cumulative(np.full(1, 200), Channel(means, np.full_like(means, inverse[100]), 5))
    assert (np.diff(fine[:, 0]) <= 0).all()  # ever less below an edge as the mean goes up


def test_the_normal_s_table() -> None:
    tail, slope = tables._tail_table("normal")
    exact = 2.0**ONE * torch.special.ndtr(-torch.arange(len(tail)).double() / 64).numpy()
    assert np.abs(tail - exact).max() <= 1 and tail[-1] == slope[-1] == 0


def test_the_ratios_table() -> None:
    nats = np.linspace(-5, 5, 1001)
    found = quantization.ratios(nats, SideInformation(), 0) / 2.0**tables.SHARES
    assert np.abs(np.log(found) - nats.clip(-4, 4)).max() < 1 / 128
    assert tables.ratio_table().min() >= 2 and tables.ratio_table().max() < 1 << 18


def test_tables_are_the_same_everywhere() -> None:
    """Golden checksums: another value would make other machines' files unreadable."""
    assert [zlib.crc32(t.astype("<i8").tobytes()) for t in golden_tables()] == json.loads(
        (GOLDEN / "tables.json").read_text()
    )
