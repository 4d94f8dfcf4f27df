"""How good enhanced images are: PSNR, SSIM, consistency with y, diversity."""

from __future__ import annotations

from typing import Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfvae.data.batches import Images
from selfvae.distributed import distributed_map
from selfvae.metrics.likelihood import batches
from selfvae.model import SelfVAE
from selfvae.operations import SamplingOptions, check_computed, enhance, infer
from selfvae.transforms import Chain, ImageSpec, MeanDownscale, Transform

__all__ = ["baseline_enhancement", "evaluate_enhancement", "psnr", "ssim"]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of two sets of images.

    Args:
        a, b: (B, C, H, W), any dtype, on the scale 0..255.

    Returns:
        float64 (B,), dB, at most 100.
    """
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=255**2 * 1e-10))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of two sets of images, with a Gaussian window of 11 x 11 and sigma 1.5.

    Args:
        a, b: (B, C, H, W), any dtype, on the scale 0..255; at least 11 x 11 pixels.

    Returns:
        float64 (B,), means over channels.

    Raises:
        ValueError: if the images are smaller.

    Source: Wang et al. 2004.
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
    """Enhance images without a model, by the transforms' own estimates.

    These are bicubic upscaling (linear interpolation from every n-th pixel), the grey image in every
    channel, the middle of each step of a bit depth, the blurred image as it is.

    Args:
        model: whose transforms are inverted.
        y: y[k], uint8 (B, c, h, w).
        k: its level.

    Returns:
        uint8 (B, C, H, W).
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
    if isinstance(d, MeanDownscale):  # its own estimate, the models' residual mean, is bilinear
        return F.interpolate(
            y.float(), scale_factor=tuple(map(float, d.scale)), mode="bicubic", align_corners=False
        )
    return d.estimate(y, spec)


def _compare(model: SelfVAE, k: int, kind: str, x: Tensor, result: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Scores of results (on x's scale, float or uint8) against x and y = y[k], (B,) each, by name."""
    unit, back = 255 / model.spec.max_value, result.round().to(torch.uint8)
    for level in model.levels[:k]:
        back = level.transform(back)
    return {
        f"psnr_{kind}": psnr(result * unit, x * unit),
        f"ssim_{kind}": ssim(result * unit, x * unit),
        f"consistency_error_{kind}": (back.double() - y.double()).abs().flatten(1).mean(1),
    }


@torch.no_grad()
def evaluate_enhancement(
    model: SelfVAE,
    images: Images,
    k: int = 1,
    *,
    draws: int = 8,
    limit: int | None = None,
    batch_size: int = 32,
    **how: Unpack[SamplingOptions],
) -> dict[str, Any]:
    """Compare images drawn given only y[k] with the images x that y[k] was computed from.

    Several processes share the work. Images are cropped to multiples that the model's networks need.

    Args:
        model: with at least k + 1 levels.
        images: of a split.
        k: level of the given image.
        draws: per image, at least 2.
        limit: the first this many images of the split (see `sources.load` for their order); None: all.
        batch_size: images per batch.
        **how: see `SamplingOptions`.

    Returns:
        Means over images, for single draws (NAME_draw), the mean of all draws (NAME_mean) and
        `baseline_enhancement` (NAME_plain): psnr (dB) and ssim against x, and consistency_error, the mean
        distance of d(result) to y[k] in values of y[k]. diversity_rmse: the root mean square distance
        between two draws, mean over pairs and images. All but the consistency error on the scale 0..255.

    Raises:
        ValueError: if an argument is out of range, or the images do not fit.
    """
    check_computed(model, k)
    if draws < 2:
        raise ValueError(f"draws must be at least 2, to tell how they differ; got {draws}")
    n, work = batches(model, images, limit, batch_size)
    seed, unit = how.get("seed"), 255 / model.spec.max_value
    height, width = (size - size % m for size, m in zip(images.shape[2:], model.multiples[0], strict=True))

    def score(batch: range) -> dict[str, Tensor]:
        x = images.take(batch)[:, :, :height, :width].to(model.device)
        y = infer(model, x, f"y{k}")[f"y{k}"]
        results = []
        for draw in range(draws):
            if seed is not None:
                how["seed"] = seed + batch.start * draws + draw
            results.append(enhance(model, y, k, **how))
        stack = torch.stack(results).double()
        each = [_compare(model, k, "draw", x, result, y) for result in results]
        apart = [
            (stack[i] - stack[j]).square().flatten(1).mean(1).sqrt()
            for i in range(draws) for j in range(i)
        ]  # fmt: skip
        scores = {
            **{name: torch.stack([scores[name] for scores in each]).mean(0) for name in each[0]},
            **_compare(model, k, "mean", x, stack.mean(0), y),
            **_compare(model, k, "plain", x, baseline_enhancement(model, y, k), y),
            "diversity_rmse": torch.stack(apart).mean(0) * unit,
        }
        return {name: values.cpu() for name, values in scores.items()}

    parts = distributed_map(score, work)
    return {
        "images": n, "given": f"y{k}", "draws": draws,
        **{name: torch.cat([part[name] for part in parts]).mean().item() for name in sorted(parts[0])},
    }  # fmt: skip
