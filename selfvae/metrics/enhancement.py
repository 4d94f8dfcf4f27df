"""How good enhanced images are: PSNR, SSIM, SSIMULACRA 2, consistency with y, diversity."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfvae.data.batches import Images
from selfvae.distributed import distributed_map
from selfvae.metrics.likelihood import batches
from selfvae.model import SelfVAE
from selfvae.operations import SamplingOptions, check_computed, enhance, times_applied
from selfvae.transforms import BicubicDownscale, Chain, ImageSpec, MeanDownscale, Transform

__all__ = [
    "baseline_enhancement",
    "evaluate_enhancement",
    "evaluate_whole",
    "luma",
    "psnr",
    "ssim",
    "ssimulacra2",
]


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of two sets of images.

    Args:
        a, b: (B, C, H, W), any dtype, on the scale 0..255.

    Returns:
        float64 (B,), dB, at most 100.
    """
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=255**2 * 1e-10))


def luma(x: Tensor) -> Tensor:
    """Return the luma Y of RGB images (B, 3, H, W) on the scale 0..255: float64 (B, 1, H, W), 16 to 235.

    Source: ITU-R BT.601, as publications on super-resolution use it.
    """
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=x.device) / 255
    return 16 + (x.double() * weights.view(3, 1, 1)).sum(1, keepdim=True)


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


def ssimulacra2(a: Tensor, b: Tensor) -> Tensor:
    """Perceptual similarity of two sets of images: SSIMULACRA 2.

    Args:
        a, b: (B, C, H, W), any dtype, on the scale 0..255, grey or RGB; at least 8 x 8 pixels. Values are
            rounded.

    Returns:
        float64 (B,), at most 100: 90 visually lossless, 70 high, 50 medium, 30 low quality.

    Raises:
        ImportError: if the package is missing.
        ValueError: if the images are smaller.

    Source: the measure of the JPEG XL project (libjxl), by the package ssimulacra2.
    """
    if min(a.shape[2:]) < 8:
        raise ValueError(f"SSIMULACRA 2 needs images of 8 x 8 pixels; got {a.shape[2]} x {a.shape[3]}")
    try:
        from ssimulacra2 import compute_ssimulacra2
    except ImportError:
        raise ImportError("SSIMULACRA 2 needs its package: pip install 'selfvae[bench]'") from None

    def file(image: Tensor) -> io.BytesIO:
        out = io.BytesIO()
        pixels = image.double().round().clamp(0, 255).byte().expand(3, -1, -1)
        Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(out, "bmp")
        return out

    return torch.tensor(
        [compute_ssimulacra2(file(q), file(p)) for p, q in zip(a, b, strict=True)], dtype=torch.float64
    )


def baseline_enhancement(model: SelfVAE, y: Tensor, k: int = 1, enlarging: str = "bicubic") -> Tensor:
    """Enhance images without a model, by well-known means.

    These are interpolation by Pillow's filters (linear interpolation from every n-th pixel), the grey image
    in every channel, the middle of each step of a bit depth, the blurred image as it is.

    Args:
        model: whose transforms are inverted.
        y: y[k], uint8 (B, c, h, w).
        k: its level.
        enlarging: the filter of means and of bicubic downscaling: "bicubic" or "lanczos".

    Returns:
        uint8 (B, C, H, W).
    """
    for level in reversed(model.levels[:k]):
        guess = _guess(level.transform, y, level.spec, enlarging)
        y = guess.round().clamp(0, level.spec.max_value).to(torch.uint8)
    return y


def _guess(d: Transform, y: Tensor, spec: ImageSpec, enlarging: str) -> Tensor:
    if isinstance(d, Chain):
        for step, taken in reversed(d.steps(spec)):
            y = _guess(step, y, taken, enlarging)
        return y.float()
    if isinstance(d, MeanDownscale | BicubicDownscale):
        return _enlarge(y, d.scale, Image.Resampling[enlarging.upper()])
    return d.estimate(y, spec)


def _enlarge(y: Tensor, scale: tuple[int, int], filter: Image.Resampling) -> Tensor:
    """Interpolate images of any dtype, in float32, to `scale` times their height and width."""
    size = y.shape[3] * scale[1], y.shape[2] * scale[0]
    channels = y.flatten(0, 1).float().cpu().numpy()
    found = [np.asarray(Image.fromarray(channel).resize(size, filter)) for channel in channels]
    return torch.from_numpy(np.stack(found)).to(y.device).unflatten(0, y.shape[:2])


def _reductions(model: SelfVAE, k: int, times: int) -> list[Transform]:
    """What computes the given image from x: the model's transforms, or one that reduces as often."""
    own = [level.transform for level in model.levels[:k]]
    if times == 1:
        return own
    if len(own) == 1 and isinstance(own[0], MeanDownscale | BicubicDownscale):
        return [type(own[0])(own[0].scale[0] ** times)]
    raise ValueError("only models of one mean or bicubic reduction are evaluated at a power of its scale")


def _reduced(x: Tensor, reductions: Iterable[Transform]) -> Tensor:
    for reduction in reductions:
        x = reduction(x)
    return x


def _compare(
    reductions: list[Transform],
    unit: float,
    kind: str,
    x: Tensor,
    result: Tensor,
    y: Tensor,
    protocol: tuple[bool, int, bool],
) -> dict[str, Tensor]:
    """Scores of results (on x's scale, float or uint8) against x and the given y, (B,) each, by name."""
    back = _reduced(result.round().to(torch.uint8), reductions)
    on_luma, border, perceptual = protocol
    inside = slice(border, -border or None)
    a, b = (image[..., inside, inside].double() * unit for image in (result, x))
    scores = {f"ssimulacra2_{kind}": ssimulacra2(a, b)} if perceptual else {}
    if on_luma:
        a, b = luma(a), luma(b)
    return scores | {
        f"psnr_{kind}": psnr(a, b),
        f"ssim_{kind}": ssim(a, b),
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
    scale: int | None = None,
    on_luma: bool = False,
    border: int = 0,
    perceptual: bool = False,
    **how: Unpack[SamplingOptions],
) -> dict[str, Any]:
    """Compare images found given only y[k] with the images x that y[k] was computed from.

    Several processes share the work. Images are cropped to multiples that the model's networks need.

    Args:
        model: with at least k + 1 levels.
        images: of a split.
        k: level of the given image.
        draws: per image, at least 2; 0: none.
        limit: the first this many images of the split (see `sources.load` for their order); None: all.
        batch_size: images per batch.
        scale: of a model that enlarges: a power of its factor. It is applied to its own results, and given
            what the reduction by `scale` computes from x.
        on_luma: compute PSNR and SSIM of the luma of RGB images, as publications on super-resolution do.
        border: pixels on each side that PSNR and SSIM leave out, in publications as many as the factor.
        perceptual: also compute `ssimulacra2`, of all channels.
        **how: of the draws, see `SamplingOptions`.

    Returns:
        Means over images, for the mean of the distribution (NAME_mean), single draws (NAME_draw), the
        average of all draws (NAME_average), `baseline_enhancement` (NAME_plain), and with Lanczos' filter
        (NAME_lanczos) where the model enlarges: psnr (dB) and ssim against x, ssimulacra2 if it was asked
        for, and consistency_error, the mean distance of d(result) to y[k] in values of y[k].
        diversity_rmse: the root mean square distance between two draws, mean over pairs and images. All but
        the consistency error on the scale 0..255.

    Raises:
        ValueError: if an argument is out of range, or the images do not fit.
        ImportError: if `perceptual` lacks its package.
    """
    check_computed(model, k)
    if draws < 2 and draws:
        raise ValueError(f"draws must be at least 2, to tell how they differ, or 0; got {draws}")
    if border < 0:
        raise ValueError(f"border must be at least 0 pixels; got {border}")
    if on_luma and model.spec.channels != 3:
        raise ValueError(f"only RGB images have a luma; the model's have {model.spec.channels} channels")
    n, work = batches(model, images, limit, batch_size)
    seed, unit = how.get("seed"), 255 / model.spec.max_value
    protocol = on_luma, border, perceptual
    times = times_applied(model, k, scale)
    reductions = _reductions(model, k, times)
    factors = (n ** (times - 1) for n in model.scale(k))
    multiples = (m * n for m, n in zip(model.multiples[0], factors, strict=True))
    height, width = (size - size % m for size, m in zip(images.shape[2:], multiples, strict=True))
    enlarges = model.scale(k) != (1, 1)

    def plain(y: Tensor, enlarging: str) -> Tensor:
        if times == 1:
            return baseline_enhancement(model, y, k, enlarging)
        guess = _guess(reductions[0], y, model.spec, enlarging)
        return guess.round().clamp(0, model.spec.max_value).to(torch.uint8)

    def found(y: Tensor, **how: Unpack[SamplingOptions]) -> Tensor:
        for _ in range(times):
            y = enhance(model, y, k, **how)
        return y

    def score(batch: range) -> dict[str, Tensor]:
        x = images.take(batch)[:, :, :height, :width].to(model.device)
        y = _reduced(x, reductions)
        compare = functools.partial(_compare, reductions, unit, x=x, y=y, protocol=protocol)
        expected = found(y, temperature=0.0, decode="mean", seed=seed)
        scores = {
            **compare("mean", result=expected),
            **compare("plain", result=plain(y, "bicubic")),
        }
        if enlarges:
            scores |= compare("lanczos", result=plain(y, "lanczos"))
        results = []
        for draw in range(draws):
            if seed is not None:
                how["seed"] = seed + batch.start * draws + draw
            results.append(found(y, **how))
        if draws:
            stack = torch.stack(results).double()
            each = [compare("draw", result=result) for result in results]
            apart = [
                (stack[i] - stack[j]).square().flatten(1).mean(1).sqrt()
                for i in range(draws) for j in range(i)
            ]  # fmt: skip
            scores |= {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
            scores |= compare("average", result=stack.mean(0))
            scores["diversity_rmse"] = torch.stack(apart).mean(0) * unit
        return {name: values.cpu() for name, values in scores.items()}

    parts = distributed_map(score, work)
    return {
        "images": n, "given": f"y{k}", "draws": draws,
        **{name: torch.cat([part[name] for part in parts]).mean().item() for name in sorted(parts[0])},
    }  # fmt: skip


def evaluate_whole(
    model: SelfVAE, pictures: Iterable[Tensor], k: int = 1, **options: Any
) -> dict[str, Any]:
    """`evaluate_enhancement` of whole pictures of any size, one after the other.

    Args:
        model, k: As there.
        pictures: uint8 (1, C, H, W) each.
        **options: As there.

    Returns:
        As there; means over the pictures.

    Raises:
        ValueError: if there is no picture, or as there.
    """
    parts = [evaluate_enhancement(model, Images(x.numpy()), k, **options) for x in pictures]
    if not parts:
        raise ValueError("there are no pictures to evaluate")
    means = {name: sum(p[name] for p in parts) / len(parts) for name in parts[0] if "_" in name}
    return {**parts[0], "images": len(parts), **means}
