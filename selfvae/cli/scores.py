"""Commands that measure."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import OmitArgPrefixes, Positional, arg

from selfvae import distributed
from selfvae.cli.common import (
    SAMPLING,
    Run,
    Sampling,
    SamplingFlags,
    load_images,
    load_model,
    positive,
    progress,
    show,
)
from selfvae.data.batches import Images
from selfvae.metrics import fid as samples
from selfvae.metrics import likelihood as scoring
from selfvae.metrics import ood as outliers
from selfvae.metrics.enhancement import evaluate_enhancement
from selfvae.metrics.timing import measure_speed
from selfvae.model import SelfVAE
from selfvae.nn.precision import Resolved
from selfvae.reports import report as whole


def evaluate(
    model: Run,
    data: str = "photos",
    split: Literal["train", "validation", "test"] = "test",
    iw: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    enhance: bool = False,
    level: int = 1,
    draws: int = 8,
    precision: Resolved = "32-true",
    devices: int = 1,
    json: bool = False,
    drawing: Sampling = SAMPLING,
) -> None:
    """Score a trained model: bits/dim of the ELBO, every term in nats and, with --iw, the IWAE bound.

    With --enhance instead: PSNR (dB), SSIM, consistency and diversity of images drawn given y alone.

    Args:
        model: folder that training wrote.
        data: as for train; images must have the model's number of channels.
        split: which images.
        iw: draws an image of the importance-weighted bounds (IWAE, and all pairs of draws); 0: none.
        limit: score the first so many images.
        batch_size: images at a time.
        enhance: score enhancement from y[LEVEL] instead of likelihood.
        level: which computed image is given.
        draws: enhancements of each image.
        precision: of the networks; bf16-mixed is faster where the processor has it. Likelihoods stay in
            float32.
        devices: GPUs or processes that share the images.
        json: print one JSON object and nothing else.
    """
    net = load_model(model, devices)
    images = load_images(net, data, split)
    if enhance:
        result = evaluate_enhancement(
            net, images, level, draws=draws, limit=limit, batch_size=batch_size, **drawing.how(net)
        )
    else:
        if (drawing, level, draws) != (SamplingFlags(seed=drawing.seed), 1, 8):
            raise ValueError("--level, --draws, --temperature and --decode go with --enhance")
        torch.manual_seed(drawing.seed)
        result = scoring.evaluate(
            net, images, iwae_samples=iw, limit=limit, batch_size=batch_size, precision=precision
        )
    show(result, json)


def ood(
    model: Run,
    data: str = "photos",
    out_sets: tuple[str, ...] = ("noise", "constant", "inverted", "rotated"),
    limit: int | None = 1000,
    batch_size: int = 32,
    seed: int = 0,
    devices: int = 1,
    json: bool = False,
) -> None:
    """Out-of-distribution detection: AUROC of every score per image, for every out-set.

    Args:
        model: folder that training wrote.
        data: the in-set, as for train; its test images.
        out_sets: noise, constant, inverted, rotated (made from the in-set), or any data as for train.
        limit: the first so many images of each.
        batch_size: images at a time.
        seed: of the latents and the random sets.
        devices: GPUs or processes that share the images.
        json: print one JSON object and nothing else.
    """
    if not out_sets:
        raise ValueError(f"--out-sets takes at least one of {', '.join(outliers.ALTERED)}, or data")
    net = load_model(model, devices)
    inside = load_images(net, data)
    outside = _outside(net, out_sets)
    result = outliers.evaluate_ood(net, inside, outside, limit=limit, batch_size=batch_size, seed=seed)
    if json:
        show(result, json)
        return
    print(f"AUROC, {result.pop('images')} images each")
    names = list(next(iter(result.values())))
    print(" " * 24 + "".join(f"{name:>10}" for name in names))
    for out_set, values in result.items():
        print(f"{out_set[-24:]:<24}" + "".join(f"{values[name]:>10.3f}" for name in names))


def _outside(net: SelfVAE, out_sets: Iterable[str]) -> dict[str, Images | None]:
    """Out-sets by name; None for those that are made from the in-set."""
    return {name: None if name in outliers.ALTERED else load_images(net, name) for name in out_sets}


def quality(
    model: Run,
    data: str = "photos",
    split: Literal["train", "validation", "test"] = "test",
    n: int = 10_000,
    features: str = "inception",
    batch_size: int = 100,
    devices: int = 1,
    json: bool = False,
    drawing: Sampling = SAMPLING,
) -> None:
    """Quality of samples: Frechet distance (FID), kernel distance (KID), precision and recall.

    Args:
        model: folder that training wrote.
        data: as for train: the real images.
        split: which of them; all are used.
        n: images to generate; the papers take 10,000 against test and 50,000 against train.
        features: inception, or MODULE:NAME, a network from images uint8 (B, 3, H, W) to (B, D).
        batch_size: images at a time.
        devices: GPUs or processes that share the images.
        json: print one JSON object and nothing else.
    """
    net = load_model(model, devices)
    network = _network(features, net.device)
    images = load_images(net, data, split)
    result = samples.evaluate_samples(
        net, images, network, n, batch_size=batch_size, track=progress, **drawing.how(net)
    )
    show(result, json)


def _network(features: str, device: torch.device) -> samples.Network:
    """The feature network of that name, a user's own among them."""
    sys.path.append(os.getcwd())  # where it may lie
    return samples.load_network(features, device)


def timing(
    model: Run,
    counts: tuple[int, ...] = (1, 20, 100),
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Seconds to generate and to reconstruct so many images at once, medians.

    Args:
        model: folder that training wrote.
        counts: numbers of images.
        repeats: timed runs of each, after one that is not counted.
        json: print one JSON object and nothing else.
    """
    positive("counts", min(counts, default=0))
    positive("repeats", repeats)
    show(measure_speed(load_model(model), counts, repeats), json)


def report(
    models: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR")],
    data: str = "photos",
    out: Path = Path("report"),
    out_sets: tuple[str, ...] = tuple(outliers.ALTERED),
    features: str | None = None,
    devices: int = 1,
    settings: Annotated[whole.Settings, OmitArgPrefixes] = whole.Settings(),  # noqa: B008 (frozen)
) -> None:
    """All scores of trained models in one report: OUT/report.md and OUT/report.html; goes on if ended.

    Args:
        models: folders that training wrote.
        data: as for train; its test images.
        out: folder of the report and of its parts.
        out_sets: as for ood.
        features: as for quality (inception, or MODULE:NAME); by default sample quality is left out.
        devices: GPUs or processes that share the work.
    """
    if not models:
        raise ValueError("a report needs at least one folder with a model")
    first = load_model(models[0], devices)
    images = load_images(first, data)
    path = whole.write_report(
        models, images, Path(data).name, out, settings, outside=_outside(first, out_sets),
        device=first.device,
        features=None if features is None else (features, _network(features, first.device)),
        command="selfvae " + " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:]),
        progress=lambda text: print(text, file=sys.stderr) if not distributed.rank() else None,
    )  # fmt: skip
    print(f"See {path}")
