"""Conversion of a data set to YCoCg-R with one byte per value, to measure the effect on a model.

    python -m benchmarks.ycocg CIFAR10 OUT        # folders with train.npy, test.npy
    python -m benchmarks.equal_compute recipes/ingredients/quincunx.yaml --data OUT --out ...

The lifting steps are taken modulo 256, so that the map is a bijection of pixels and bits/dim can be
compared directly. Co and Cg, which have 9 bits in YCoCg-R, wrap around for the most saturated colours; the
script prints how often.

Source: Malvar, Sullivan and Srinivasan 2008, Lifting-based reversible color transformations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro
from tyro.conf import Positional


def _half(c: np.ndarray) -> np.ndarray:
    """Return half of a difference that is stored modulo 256 with an offset of 128, rounded down."""
    return (c.astype(np.int16) - 128) >> 1


def to_ycocg(x: np.ndarray) -> np.ndarray:
    """Convert uint8 (N, 3, H, W) from RGB to Y, Co + 128, Cg + 128, modulo 256."""
    r, g, b = x.astype(np.int16).swapaxes(0, 1)
    co = (r - b + 128) & 255
    t = (b + _half(co)) & 255
    cg = (g - t + 128) & 255
    y = (t + _half(cg)) & 255
    return np.stack([y, co, cg], 1).astype(np.uint8)


def to_rgb(x: np.ndarray) -> np.ndarray:
    """Invert `to_ycocg`."""
    y, co, cg = x.astype(np.int16).swapaxes(0, 1)
    t = (y - _half(cg)) & 255
    g = (cg - 128 + t) & 255
    b = (t - _half(co)) & 255
    r = (b + co - 128) & 255
    return np.stack([r, g, b], 1).astype(np.uint8)


def main(data: Positional[Path], out: Positional[Path]) -> None:
    """Convert.

    Args:
        data: folder with train.npy and test.npy, RGB.
        out: folder for the same in YCoCg-R.
    """
    out.mkdir(parents=True)
    for file in sorted(data.glob("*.npy")):
        x = np.load(file)
        found = to_ycocg(x)
        if not np.array_equal(to_rgb(found), x):
            raise RuntimeError(f"{file}: the conversion is not invertible")
        np.save(out / file.name, found)
        r, b = x[:, 0].astype(np.int16), x[:, 2].astype(np.int16)
        print(f"{file.name}: Co wraps around in {np.mean(np.abs(r - b) > 127):.2%} of the pixels")


if __name__ == "__main__":
    tyro.cli(main)
