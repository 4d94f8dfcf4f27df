"""Demonstrations: the bundled models on two photographs, or the training of two small models."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfvae import hub
from selfvae.codec import Codec
from selfvae.data import sources
from selfvae.data.batches import Images
from selfvae.data.crops import photo
from selfvae.data.sheets import save_figure
from selfvae.files import write_atomic
from selfvae.metrics.baselines import lossless_bits, lossless_bits_per_dim
from selfvae.metrics.enhancement import baseline_enhancement
from selfvae.metrics.likelihood import evaluate
from selfvae.model import SelfVAE
from selfvae.operations import enhance, generate, reconstruct
from selfvae.presets import configure
from selfvae.training.config import TrainConfig
from selfvae.training.loop import train
from selfvae.transforms import MeanDownscale

__all__ = ["demo", "train_demo"]


def demo(out: str | Path, fast: bool = False, seed: int = 0) -> dict[str, Any]:
    """Compress and enhance two photographs that are not in the training data, and generate images.

    Writes figure.png, result.json and the compressed photographs.

    Args:
        out: Folder for the files.
        fast: Use a quarter of each photograph.
        seed: Of the random draws.

    Returns:
        The content of result.json: bytes, bits/dim of the files and of PNG and WebP, seconds.
    """
    began, out = time.monotonic(), Path(out)
    codec = Codec(hub.load("photos-v0"))
    photos = {name: torch.from_numpy(photo(name, 2))[None] for name in ("chelsea", "coffee")}
    if fast:
        photos = {k: x[..., : x.shape[2] // 2, : x.shape[3] // 2].contiguous() for k, x in photos.items()}
    result: dict[str, Any] = {"subpixels": sum(x.numel() for x in photos.values()), "bytes": 0}
    for name, x in photos.items():
        file = codec.compress(x)  # decodes the file and compares
        write_atomic(out / f"{name}.svae", file)
        result["bytes"] += len(file)
    result["bits_per_dim"] = round(8 * result["bytes"] / result["subpixels"], 4)
    for format in ("PNG", "WebP"):
        bits = sum(lossless_bits(x, format).sum().item() for x in photos.values())
        result[f"{format.lower()}_bits_per_dim"] = round(bits / result["subpixels"], 4)
    save_figure(_rows(photos, seed), out / "figure.png", cell=128)
    result["seconds"] = round(time.monotonic() - began, 1)
    write_atomic(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    return result


def _rows(photos: dict[str, Tensor], seed: int) -> list[tuple[str, Tensor]]:
    """Return the figure's rows: title and images, uint8 (B, 3, h, w)."""
    x2, photo, cifar = (hub.load(f"selfvae-{name}") for name in ("photos-x2", "photos", "cifar10-small"))
    n, size = 8, 64
    random = torch.Generator().manual_seed(0)
    crops = []
    for i in range(n):
        x = list(photos.values())[i % len(photos)]
        top, left = (int(torch.randint(m - size + 1, (), generator=random)) for m in x.shape[2:])
        crops.append(x[..., top : top + size, left : left + size])
    x = torch.cat(crops)
    small, kept = MeanDownscale(2)(x), photo.pyramid(x)[2]
    return [
        ("photographs that are not in the training data, 64 x 64", x),
        ("2 x 2 means", small),
        ("enlarged by bicubic interpolation", baseline_enhancement(x2, small)),
        (
            "sampled given the means (photos-x2-v0, temperature 0.5)",
            enhance(x2, small, 1, temperature=0.5, seed=seed),
        ),
        ("every second row and column, the first bytes of a file of photos-v0", kept),
        ("most likely picture given these (photos-v0)", enhance(photo, kept, 2, decode="mode")),
        ("unconditional samples, 32 x 32 (cifar10-2m)", generate(cifar, n, seed=seed)),
    ]


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
