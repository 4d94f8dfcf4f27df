"""Demonstrations: the bundled models on two photographs, or the training of two small models."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfvae import hub
from selfvae.codec import Codec, read_header
from selfvae.codec.bench import lossless_sizes
from selfvae.data import sources
from selfvae.data.batches import Images
from selfvae.data.crops import photo
from selfvae.data.pictures import to_image, write
from selfvae.data.sheets import grid, magnify, save_figure
from selfvae.files import write_atomic
from selfvae.metrics.baselines import lossless_bits_per_dim
from selfvae.metrics.enhancement import baseline_enhancement, psnr
from selfvae.metrics.likelihood import evaluate
from selfvae.model import SelfVAE
from selfvae.operations import enhance, generate, interpolate, reconstruct
from selfvae.presets import configure
from selfvae.training.config import TrainConfig
from selfvae.training.loop import train
from selfvae.transforms import MeanDownscale

__all__ = ["run_demo", "train_demo"]

_EMOJI = "emoji-v3"


def run_demo(
    out: str | Path, fast: bool = False, seed: int = 0, report: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Compress two photographs that no model saw, read one file in part, enlarge both; draw emoji.

    The photographs are inside scikit-image; they are halved first, which hides their traces of JPEG. Writes
    figure.png, result.json and each photograph as .png and .svae.

    Args:
        out: Folder for the files.
        fast: Use a quarter of each photograph.
        seed: Of the random draws.
        report: Is given a line of text at each step.

    Returns:
        The content of result.json: bytes of each photograph's file in each format, bits per sub-pixel over
        both, PSNR of the enlargements in dB, seconds.
    """
    began, out = time.monotonic(), Path(out)
    codec, x2 = Codec(hub.load(hub.PHOTOS)), hub.load("photos-x2-v1")
    photos = {name: torch.from_numpy(photo(name, 2))[None] for name in ("coffee", "chelsea")}
    if fast:
        photos = {k: x[..., : x.shape[2] // 2, : x.shape[3] // 2].contiguous() for k, x in photos.items()}
    sizes: dict[str, dict[str, int]] = {}
    rows: list[tuple[str, Tensor]] = []
    scores: dict[str, dict[str, float]] = {}
    for name, x in photos.items():
        report(f"{name}, {x.shape[3]} x {x.shape[2]} pixels (halved): compressing, decoding and comparing")
        file = codec.compress(x)
        write_atomic(out / f"{name}.svae", file)
        write(x[0], out / f"{name}.png")
        sizes[name] = {hub.PHOTOS: len(file), **lossless_sizes(to_image(x[0]))}
        report(f"  {_comparison(sizes[name])}")
        if not rows:
            rows.append(_progressive(codec, file, name))
        row, scores[name] = _enlarged(x2, x, name)
        rows.append(row)
    report("emoji: drawing some")
    emoji = hub.load(_EMOJI)
    drawn = generate(emoji, 16 if fast else 64, 64, 64, temperature=0.8, seed=seed)
    sheets = torch.stack([grid(part, columns=4) for part in drawn.split(16)])
    rows.append((f"unconditional samples of {_EMOJI}, temperature 0.8", sheets))
    between = interpolate(emoji, drawn[:8:2], drawn[1:8:2], steps=8, temperature=0, seed=seed)
    sheets = torch.stack([grid(frames, columns=4) for frames in between])
    rows.append(("the first eight in pairs, from one to the other along u in eight steps", sheets))
    save_figure(rows, out / "figure.png")
    subpixels = sum(x.numel() for x in photos.values())
    formats = set.intersection(*map(set, sizes.values()))
    result: dict[str, Any] = {
        "bytes": sizes,
        "bits_per_subpixel": {
            format: round(8 * sum(of[format] for of in sizes.values()) / subpixels, 4)
            for format in next(iter(sizes.values())) if format in formats
        },
        "psnr": scores,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    write_atomic(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


def _comparison(sizes: dict[str, int]) -> str:
    """Return the sizes of a picture in words."""
    own, png = sizes[hub.PHOTOS], sizes["PNG"]
    others = ", ".join(f"{name} {n / 1000:.1f} kB" for name, n in sizes.items() if name != hub.PHOTOS)
    missing = "" if "JPEG XL" in sizes else "; JPEG XL: pip install pillow-jxl-plugin"
    return f"{own / 1000:.1f} kB, {1 - own / png:.0%} less than PNG ({others}{missing})"


def _progressive(codec: Codec, file: bytes, name: str) -> tuple[str, Tensor]:
    """Return a row of the figure: a file read from its start, up to four images."""
    ends = [(part, end) for part, end in read_header(file).ends() if part[0] == "y"][::-2][::-1][-4:]
    images = [codec.decompress(file, part) for part, _ in ends]
    whole = images[-1].shape[2]
    images = [magnify(y, -(-whole // y.shape[2])) for y in images]
    height, width = (min(y.shape[i] for y in images) for i in (2, 3))
    shares = ", ".join(f"{end / len(file):.1%}" for _, end in ends)
    title = f"one file, {name}.svae ({len(file) / 1000:.1f} kB), read from its start: {shares} of its bytes"
    return title, torch.cat([y[..., :height, :width] for y in images])


def _enlarged(x2: SelfVAE, x: Tensor, name: str) -> tuple[tuple[str, Tensor], dict[str, float]]:
    """Return a row of the figure, and PSNR in dB: a photograph, its 2 x 2 means, these enlarged."""
    x = x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
    y = MeanDownscale(2)(x)
    enlarged = {
        "bicubic interpolation": baseline_enhancement(x2, y),
        "photos-x2-v1": enhance(x2, y, temperature=0, decode="mean"),
    }
    scores = {kind: round(psnr(image, x).item(), 2) for kind, image in enlarged.items()}
    told = ", ".join(f"enlarged by {kind} ({value:.1f} dB)" for kind, value in scores.items())
    images = torch.cat([x, magnify(y, 2), *enlarged.values()])
    return (f"{name}: the photograph, its 2 x 2 means, {told}", images), scores


# a chain, which reaches the best likelihood in the time given, and a model with latents
_CHAIN: dict[str, Any] = {"name": "selfvae-halve", "size": "small", "width": 0.25, "depth": 0.5}
_LATENT: dict[str, Any] = {
    "name": "selfvae", "size": "tiny", "width": 0.25, "backbone": "residual"
}  # fmt: skip
_SECONDS, _FAST_SECONDS = (105.0, 75.0), (18.0, 12.0)  # of training, each


def train_demo(out: str | Path, fast: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train two small models, score them and draw samples.

    Writes figure.png, result.json and both models.

    Args:
        out: Folder for the files.
        fast: Train for half a minute instead of three minutes.
        seed: Of the training and the draws.

    Returns:
        The content of result.json: bits/dim (ELBO) of the chain and of the latent model on held-out crops,
        of PNG and WebP on the same crops, parameters, seconds.

    Raises:
        FileExistsError: A model's folder exists already.
    """
    began, out = time.monotonic(), Path(out)
    for options in (_CHAIN, _LATENT):
        folder = out / options["name"]
        if folder.exists():
            raise FileExistsError(f"{folder} exists: remove it, or give another folder with --out")
    photos = sources.load("photos", 32)
    models: list[SelfVAE] = []
    scores: list[dict[str, Any]] = []
    test = photos.test.take(range(128 if fast else 512))
    for options, seconds in zip((_CHAIN, _LATENT), _FAST_SECONDS if fast else _SECONDS, strict=True):
        folder = out / options["name"]
        config = TrainConfig(
            steps=1_000_000, max_seconds=seconds, schedule="cosine", lr=0.004, min_lr=0.0002,
            warmup=50, ema=0.99, translate=0, log_every=10, eval_every=1_000_000,
            checkpoint_every=1_000_000, eval_images=64, seed=seed,
        )  # fmt: skip
        model = train(configure(**options), photos, folder, config)
        models.append(model)
        scores.append(evaluate(model, Images(test.numpy()), iwae_samples=0))
    result = {
        "model": _CHAIN["name"],
        "bits_per_dim": round(scores[0]["bits_per_dim"], 4),
        "png_bits_per_dim": round(lossless_bits_per_dim(test, "PNG"), 4),
        "webp_bits_per_dim": round(lossless_bits_per_dim(test, "WebP"), 4),
        "crops": len(test),
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "latent_model": _LATENT["name"],
        "latent_bits_per_dim": round(scores[1]["bits_per_dim"], 4),
        "latent_parameters": sum(p.numel() for p in models[1].parameters()),
    }
    save_figure(_trained_rows(models[0], models[1], test[_spread(len(test))], seed), out / "figure.png")
    result["seconds"] = round(time.monotonic() - began, 1)
    write_atomic(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


def _spread(n: int, count: int = 10) -> Tensor:
    return torch.linspace(0, n - 1, count).long()


def _trained_rows(chain: SelfVAE, latent: SelfVAE, x: Tensor, seed: int) -> list[tuple[str, Tensor]]:
    """Return the figure's rows: title and images, uint8 (B, 3, h, w)."""
    halved, mean = chain.pyramid(x)[2], latent.pyramid(x)[1]
    n, _, h, w = x.shape
    # after short training, samples at temperature 1 are dominated by pixel noise
    calm: dict[str, Any] = {"temperature": 0.3, "seed": seed}
    return [
        ("held-out photographs, 32 x 32", x),
        ("every second row and column", halved),
        ("sampled given these (selfvae-halve, temperature 0.3)", enhance(chain, halved, 2, **calm)),
        ("2 x 2 means", mean),
        ("enhanced from these only (selfvae, temperature 0.3)", enhance(latent, mean, 1, **calm)),
        ("reconstructed from the latents only (selfvae, temperature 0.3)", reconstruct(latent, x, **calm)),
        ("unconditional samples (selfvae-halve)", generate(chain, n, h, w, seed=seed)),
        ("unconditional samples (selfvae, temperature 0.3)", generate(latent, n, h, w, **calm)),
    ]
