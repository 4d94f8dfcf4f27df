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
    **how: Unpack[SamplingOptions],
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
    n, work = batches(model, images, limit, batch_size)
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

    parts = distributed_map(score, work)
    return {
        "images": n, "given": f"y{k}", "draws": draws,
        **{name: torch.cat([part[name] for part in parts]).mean().item() for name in sorted(parts[0])},
    }  # fmt: skip
