"""The codec compared with PNG, WebP, JPEG XL and JPEG 2000, its prefixes with JPEG, WebP and AVIF."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfvae.codec.picture import read_header
from selfvae.codec.progressive import Codec
from selfvae.data.pictures import LOSSLESS, Options, encode, encode_lossless, from_image, to_image
from selfvae.files import write_atomic
from selfvae.metrics.enhancement import psnr
from selfvae.progress import Track, no_progress

__all__ = ["LOSSLESS", "LOSSY", "compare_formats", "lossless_sizes", "markdown", "plot"]

LOSSY: dict[str, tuple[str, Callable[[int], Options]]] = {
    "JPEG": ("JPEG", lambda q: {"quality": q, "optimize": True}),
    "WebP": ("WEBP", lambda q: {"lossless": False, "quality": q, "method": 6}),
    "AVIF": ("AVIF", lambda q: {"quality": q}),
}
_QUALITIES = (10, 25, 40, 60, 75, 85, 92, 97)
_OURS = "selfvae"
_Point = tuple[float, float, float | None]  # bits per sub-pixel, PSNR in dB, MS-SSIM


def _known(formats: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Return the formats that this installation of Pillow can write."""
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401 (registers JPEG XL)
    Image.init()
    return {name: how for name, how in formats.items() if how[0] in Image.SAVE}


def _tensor(data: bytes, mode: str) -> Tensor:
    return from_image(Image.open(io.BytesIO(data)).convert(mode))


def _images(data: bytes) -> list[tuple[str, int]]:
    """The images that prefixes of a file give before its end, and these prefixes' bytes."""
    return [(name, end) for name, end in read_header(data).ends()[:-1] if name[0] == "y"]


def lossless_sizes(image: Image.Image) -> dict[str, int]:
    """Bytes of a picture in every lossless format that Pillow can write here and that can hold it."""
    sizes = {}
    for name in _known(LOSSLESS):
        with contextlib.suppress(OSError, ValueError):  # e.g. no side of a WebP file has over 16383 pixels
            sizes[name] = len(encode_lossless(image, name))
    return sizes


def _ms_ssim(a: Tensor, b: Tensor) -> float | None:
    """Multi-scale structural similarity (Wang et al. 2003); None for a picture too small for 5 scales."""
    if min(a.shape[2:]) <= 160:
        return None
    try:
        from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as measure
    except ImportError:
        return None
    return float(measure(a.float(), b.float(), data_range=255.0))


def compare_formats(
    codec: Codec,
    pictures: Sequence[Tensor],
    *,
    prefixes: bool = True,
    track: Track = no_progress,
) -> dict[str, Any]:
    """Measure sizes and speeds. Each lossless file is decoded and compared with its picture.

    Args:
        codec: Of the model to measure.
        pictures: uint8 (1, C, H, W) each, C = 1 or 3.
        prefixes: Measure lossy formats and the prefixes of the codec's files as well. Which levels end in a
            prefix depends on a picture's size; a file whose pixels are stored as WebP has none.
        track: Receives the pictures and the name of the activity, and yields the pictures.

    Returns:
        {"pictures", "subpixels", "lossless": {name: {bytes, bits_per_subpixel, encode_mb_s, decode_mb_s}},
        "lossy": {name: [{setting, bits_per_subpixel, psnr, ms_ssim}]}}: sums of bytes, means of the other
        quantities; MB are of raw pixels. "selfvae" in "lossy" are the prefixes of its files, part by part.

    Raises:
        ValueError: There are no pictures.
        RuntimeError: A decoded picture differs from the original.
    """
    if not pictures:
        raise ValueError("at least one picture is needed")
    race = _Race(codec, prefixes)
    for x in track(pictures, "pictures"):
        race.lossless_formats(x)
        race.lossy_formats(x)
    return {"pictures": len(pictures), **race.result(sum(x.numel() for x in pictures))}


class _Race:
    """The formats that can be measured here, and what was measured so far."""

    def __init__(self, codec: Codec, prefixes: bool) -> None:
        self.codec, self.prefixes = codec, prefixes
        self.lossless, self.lossy = _known(LOSSLESS), _known(LOSSY) if prefixes else {}
        self.totals: dict[str, dict[str, float]] = {}
        self.curves: dict[str, dict[str, list[_Point]]] = {}

    def lossless_formats(self, x: Tensor) -> None:
        """Encode and decode a picture in each lossless format; leave out a format that cannot hold it."""
        data, *seconds = self._through(
            x, lambda: self.codec.compress(x, verify=False), self.codec.decompress
        )
        self._count(_OURS, len(data), *seconds)
        if self.prefixes:
            for setting, cut in _images(data):
                shown = self.codec.decompress(data[:cut], partial=True)
                self._add(_OURS, setting, cut, x, shown)
        image = to_image(x[0])
        for name in list(self.lossless):
            try:
                data, *seconds = self._through(
                    x, partial(encode_lossless, image, name), partial(_tensor, mode=image.mode)
                )
            except (OSError, ValueError) as error:  # e.g. no side of a WebP file has over 16383 pixels
                warnings.warn(f"{name} is left out: {error}", stacklevel=3)
                del self.lossless[name]
                self.totals.pop(name, None)
                continue
            self._count(name, len(data), *seconds)

    def lossy_formats(self, x: Tensor) -> None:
        """Encode a picture in each lossy format at several qualities."""
        image = to_image(x[0])
        for name, (format, options_at) in self.lossy.items():
            for quality in _QUALITIES:
                data = encode(image, format, **options_at(quality))
                self._add(name, f"quality {quality}", len(data), x, _tensor(data, image.mode))

    def result(self, subpixels: int) -> dict[str, Any]:
        """Return sums and means over the pictures, as `bench` does."""
        lossless = {
            name: {
                "bytes": int(total["bytes"]),
                "bits_per_subpixel": 8 * total["bytes"] / subpixels,
                "encode_mb_s": subpixels / 1e6 / total["encode"],
                "decode_mb_s": subpixels / 1e6 / total["decode"],
            }
            for name, total in self.totals.items()
        }
        lossy = {
            name: [{"setting": setting, **_mean(points)} for setting, points in settings.items()]
            for name, settings in self.curves.items()
        }
        return {"subpixels": subpixels, "lossless": lossless, "lossy": lossy}

    @staticmethod
    def _through(
        x: Tensor, to_bytes: Callable[[], bytes], to_pixels: Callable[[bytes], Tensor]
    ) -> tuple[bytes, float, float]:
        """Return a picture's file, and the seconds of encoding and decoding."""
        began = time.perf_counter()
        data = to_bytes()
        encoded = time.perf_counter()
        back = to_pixels(data)
        decoded = time.perf_counter()
        if not torch.equal(back, x):
            raise RuntimeError("a decoded picture differs from the original")
        return data, encoded - began, decoded - encoded

    def _count(self, name: str, length: int, encode: float, decode: float) -> None:
        total = self.totals.setdefault(name, dict.fromkeys(("bytes", "encode", "decode"), 0.0))
        for key, value in zip(total, (length, encode, decode), strict=True):
            total[key] += value

    def _add(self, name: str, setting: str, length: int, x: Tensor, shown: Tensor) -> None:
        point = (8 * length / x.numel(), min(100.0, psnr(shown, x).item()), _ms_ssim(shown, x))
        self.curves.setdefault(name, {}).setdefault(setting, []).append(point)


def _mean(points: list[_Point]) -> dict[str, float | None]:
    rates, decibels, similar = zip(*points, strict=True)
    known = [s for s in similar if s is not None]
    return {
        "bits_per_subpixel": float(np.mean(rates)),
        "psnr": float(np.mean(decibels)),
        "ms_ssim": float(np.mean(known)) if known else None,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""
    lines = [
        "| lossless | bytes | bits per sub-pixel | encode, MB/s | decode, MB/s |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(result["lossless"].items(), key=lambda item: item[1]["bytes"]):
        lines.append(
            f"| {name} | {row['bytes']:,} | {row['bits_per_subpixel']:.3f} | {row['encode_mb_s']:.3g} | "
            f"{row['decode_mb_s']:.3g} |"
        )
    if result["lossy"]:
        lines += [
            "",
            "| prefix or quality | bits per sub-pixel | PSNR, dB | MS-SSIM |",
            "|---|---|---|---|",
        ]
    for name, rows in result["lossy"].items():
        for row in rows:
            similar = "" if row["ms_ssim"] is None else f"{row['ms_ssim']:.4f}"
            rate = f"{row['bits_per_subpixel']:.3f}"
            lines.append(f"| {name}, {row['setting']} | {rate} | {row['psnr']:.2f} | {similar} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw sizes as bars, and PSNR and MS-SSIM against bits per sub-pixel.

    Args:
        result: What `bench` returned.
        path: Of the PNG file.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'selfvae[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = [
        (name, rows, key)
        for key in ("psnr", "ms_ssim")
        for name, rows in result["lossy"].items()
        if all(row[key] is not None for row in rows)
    ]
    kinds = [key for key in ("psnr", "ms_ssim") if any(curve[2] == key for curve in curves)]
    figure, axes = plt.subplots(1, 1 + len(kinds), figsize=(5 * (1 + len(kinds)), 4), squeeze=False)
    rows = sorted(result["lossless"].items(), key=lambda item: item[1]["bytes"])
    bars = axes[0][0].barh(
        [name for name, _ in rows], [row["bits_per_subpixel"] for _, row in rows],
        color=["tab:red" if name == _OURS else "tab:grey" for name, _ in rows],
    )  # fmt: skip
    axes[0][0].bar_label(bars, fmt="%.3f", padding=3)
    axes[0][0].margins(x=0.15)
    axes[0][0].set(xlabel="bits per sub-pixel", title=f"lossless, {result['pictures']} pictures")
    for kind, axis in zip(kinds, axes[0][1:], strict=True):
        for name, points, key in curves:
            if key == kind:
                label, color = ("selfvae, prefixes", "tab:red") if name == _OURS else (name, None)
                rates = [p["bits_per_subpixel"] for p in points]
                axis.plot(rates, [p[key] for p in points], marker="o", label=label, color=color)
        axis.set(xlabel="bits per sub-pixel", title={"psnr": "PSNR, dB", "ms_ssim": "MS-SSIM"}[kind])
        axis.set_xscale("log")
        axis.legend()
    figure.tight_layout()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    plt.close(figure)
    write_atomic(path, out.getvalue())
