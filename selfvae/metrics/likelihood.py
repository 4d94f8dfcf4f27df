"""Scores of a model on images: the bounds and their terms, enhancement; and its speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfvae.data.sources import Images, ranges
from selfvae.distributed import spread
from selfvae.metrics.bounds import Bounds, bounds
from selfvae.model import SelfVAE
from selfvae.nn.precision import Resolved, autocast
from selfvae.operations import Drawing, check_computed, enhance, generate, infer, reconstruct
from selfvae.terms import Terms, bits_per_dim, gather
from selfvae.transforms import Chain, ImageSpec, MeanDownscale, Transform

__all__ = [
    "baseline_enhancement",
    "check_values",
    "evaluate",
    "evaluate_enhancement",
    "psnr",
    "ssim",
    "summary",
    "timing",
]


def check_values(model: SelfVAE, images: Images) -> None:
    """Raise ValueError if images hold values that the model gives no probability to."""
    if model.spec.num_values == 256:
        return
    top = max(int(images.take(batch).max()) for batch in ranges(len(images), 1024))
    if top > model.spec.max_value:
        raise ValueError(
            f"the images hold values up to {top}; the model has {model.spec.num_values} levels "
            f"(0 to {model.spec.max_value}): build it with levels=256, or reduce the images"
        )


def _batches(model: SelfVAE, images: Images, limit: int | None, batch_size: int) -> tuple[int, list[range]]:
    """The number of images to score, and their indices batch by batch; all checked."""
    n = len(images) if limit is None else min(limit, len(images))
    if n < 1 or batch_size < 1:
        raise ValueError(f"limit and batch_size must be at least 1; got {n} and {batch_size}")
    check_values(model, images)
    return n, ranges(n, batch_size)


def summary(nats: dict[str, Tensor], dims: int) -> dict[str, float]:
    """Means and standard errors over images, in bits/dim, of bounds of ln p(x), nats (B,), by name."""
    out = {}
    for name, values in nats.items():
        bits = bits_per_dim(-values.double(), dims)
        out[name] = bits.mean().item()
        out[f"{name}_stderr"] = (
            bits.std(correction=1).item() / math.sqrt(len(bits)) if len(bits) > 1 else 0.0
        )
    return out


@torch.no_grad()
def evaluate(
    model: SelfVAE,
    images: Images,
    *,
    iw: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    precision: Resolved = "32-true",
) -> dict[str, Any]:
    """Mean scores over the first `limit` images (all if None).

    Returns, as means over images: bits_per_dim (of the ELBO, one draw an image), elbo_nats, re and kl
    (lists over levels, in nats and in bits/dim), images; with iw > 0 the bounds of so many draws an image:
    iwae_bits_per_dim, pairs_bits_per_dim (all combinations of the levels' draws) and, from the same draws,
    elbo_bits_per_dim. Every bits_per_dim comes with its standard error over images. With precision
    "bf16-mixed" the networks compute in bfloat16 (see `precision`). Several processes share the work.
    """
    n, batches = _batches(model, images, limit, batch_size)

    def score(batch: range) -> tuple[Terms, Bounds | None]:
        x = images.take(batch).to(model.device)
        with autocast(model, precision):
            return model(x).cpu(), bounds(model, x, iw, batch=batch_size).cpu() if iw else None

    terms, found = zip(*spread(score, batches), strict=True)
    dims = math.prod(images.shape[1:])
    elbo = torch.cat([t.elbo for t in terms])
    out: dict[str, Any] = {"images": n, **summary({"bits_per_dim": elbo}, dims)}
    out["elbo_nats"] = elbo.double().mean().item()
    for kind, values in zip(("re", "kl"), gather(terms), strict=True):
        means = values.mean(1)
        out[f"{kind}_nats"] = means.tolist()
        out[f"{kind}_bits_per_dim"] = bits_per_dim(means, dims).tolist()
    if iw:
        out["iwae_draws"] = iw
        out |= summary(
            {
                f"{kind}_bits_per_dim": torch.cat([getattr(b, kind) for b in found])
                for kind in Bounds._fields
            },
            dims,
        )
    return out


# --- enhancement --------------------------------------------------------------------------------------


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images (B, C, H, W) on the scale 0..255: dB (B,), 100 at most."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=255**2 * 1e-10))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images on the scale 0..255 (B, C, H, W), mean over channels: (B,).

    Gaussian window of standard deviation 1.5, 11 x 11. Source: Wang et al. 2004.
    """
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs images of 11 x 11 pixels or more; got {a.shape[2]} x {a.shape[3]}")
    from skimage.metrics import structural_similarity

    pairs = zip(a.double().cpu().numpy(), b.double().cpu().numpy(), strict=True)
    values = [
        structural_similarity(
            p, q, data_range=255, channel_axis=0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for p, q in pairs
    ]  # fmt: skip
    return torch.from_numpy(np.array(values))


def baseline_enhancement(model: SelfVAE, y: Tensor, k: int = 1) -> Tensor:
    """What one would show without a model, given y[k] (B, c, h, w): uint8 (B, C, H, W).

    The transforms' own guesses: bicubic upscaling (from every n-th pixel: linear interpolation), the grey
    image in every channel, the middle of each step of a bit depth, the blurred image as it is.
    """
    for level in reversed(model.levels[:k]):
        guess = _guess(level.transform, y, level.spec)
        y = guess.round().clamp(0, level.spec.max_value).to(torch.uint8)
    return y


def _guess(d: Transform, y: Tensor, spec: ImageSpec) -> Tensor:
    if isinstance(d, Chain):
        for step, taken in reversed(d.steps(spec)):
            y = _guess(step, y, taken)
        return y.float()
    if isinstance(d, MeanDownscale):  # its own guess, the models' anchor, is bilinear
        return F.interpolate(
            y.float(), scale_factor=tuple(map(float, d.scale)), mode="bicubic", align_corners=False
        )
    return d.estimate(y, spec)


@torch.no_grad()
def evaluate_enhancement(
    model: SelfVAE,
    images: Images,
    k: int = 1,
    *,
    draws: int = 8,
    limit: int | None = None,
    batch_size: int = 32,
    **how: Unpack[Drawing],
) -> dict[str, Any]:
    """How near the images drawn given y[k] alone come to x, and how they differ among themselves.

    For single draws, for the mean of `draws` of them and for `baseline_enhancement`: PSNR (dB) and SSIM
    against x, means over images, and the consistency error, the mean distance of d(result) to y[k] in
    levels of y[k]. diversity_rmse: the root mean square distance between two draws, in grey levels, mean
    over pairs and images. All on the scale 0..255. Images are cropped to a size that the model's networks
    divide.
    """
    check_computed(model, k)
    if draws < 2:
        raise ValueError(f"draws must be at least 2, to tell how they differ; got {draws}")
    n, batches = _batches(model, images, limit, batch_size)
    seed, unit = how.get("seed"), 255 / model.spec.max_value
    height, width = (size - size % m for size, m in zip(images.shape[2:], model.multiples[0], strict=True))

    def compare(kind: str, x: Tensor, result: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Scores of results (on x's scale, float or uint8) against x."""
        back = result.round().to(torch.uint8)
        for level in model.levels[:k]:
            back = level.transform(back)
        return {
            f"psnr_{kind}": psnr(result * unit, x * unit),
            f"ssim_{kind}": ssim(result * unit, x * unit),
            f"consistency_error_{kind}": (back.double() - y.double()).abs().flatten(1).mean(1),
        }

    def score(batch: range) -> dict[str, Tensor]:
        x = images.take(batch)[:, :, :height, :width].to(model.device)
        y = infer(model, x, f"y{k}")[f"y{k}"]
        results = []
        for draw in range(draws):
            if seed is not None:
                how["seed"] = seed + batch.start * draws + draw
            results.append(enhance(model, y, k, **how))
        stack = torch.stack(results).double()
        each = [compare("draw", x, result, y) for result in results]
        apart = [
            (stack[i] - stack[j]).square().flatten(1).mean(1).sqrt()
            for i in range(draws) for j in range(i)
        ]  # fmt: skip
        scores = {
            **{name: torch.stack([scores[name] for scores in each]).mean(0) for name in each[0]},
            **compare("mean", x, stack.mean(0), y),
            **compare("plain", x, baseline_enhancement(model, y, k), y),
            "diversity_rmse": torch.stack(apart).mean(0) * unit,
        }
        return {name: values.cpu() for name, values in scores.items()}

    parts = spread(score, batches)
    return {
        "images": n, "given": f"y{k}", "draws": draws,
        **{name: torch.cat([part[name] for part in parts]).mean().item() for name in sorted(parts[0])},
    }  # fmt: skip


# --- time -----------------------------------------------------------------------------------------------


def timing(
    model: SelfVAE, counts: Sequence[int] = (1, 20, 100), repeats: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Seconds to generate so many images at once, and to reconstruct them: medians of `repeats`.

    Images are of the size that the model was built for; a first run of each is not counted. The models
    of the papers' tables are timed this way (generation of 1, 20 and 100 images).
    """
    if repeats < 1 or min(counts) < 1:
        raise ValueError(f"counts and repeats must be at least 1; got {counts} and {repeats}")
    out: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }
    for n in counts:
        x = generate(model, n, seed=seed)
        tasks = {"generate": lambda n=n: generate(model, n, seed=seed)}
        if model.has_latents:
            tasks["reconstruct"] = lambda x=x: reconstruct(model, x, seed=seed)
        for name, task in tasks.items():
            out[f"{name}_{n}_seconds"] = _median_seconds(task, repeats, model.device)
    return out


def _median_seconds(task: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
