"""Commands that measure."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from selfvae.cli.common import load_images, load_model, sampling, show
from selfvae.cli.flags import Run, SamplingFlags, Split, positive
from selfvae.cli.names import check_model
from selfvae.cli.progress import note, progress
from selfvae.nn.precision import Resolved
from selfvae.reports.settings import Settings

if TYPE_CHECKING:
    import torch

    from selfvae.data.batches import Images
    from selfvae.metrics.fid import Network
    from selfvae.model import SelfVAE

_ALTERED = ("noise", "constant", "inverted", "rotated")  # made from the test images


def evaluate(
    model: Run,
    data: str = "photos",
    split: Split = "test",
    iwae_samples: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    precision: Resolved = "32-true",
    seed: int = 0,
    devices: int = 1,
    json: bool = False,
) -> None:
    """Evaluate likelihood: the ELBO in bits/dim, its terms for every level, and optionally IWAE bounds.

    re_y0 is the reconstruction term of y0 (the image), kl_z0 the KL divergence of its latent, and so on up
    the levels; in nats per image and in bits/dim, means over images.

    Args:
        model: folder that selfvae train wrote, or a bundled model.
        data: data set, as for train; images must have the model's number of channels.
        split: train, validation or test images.
        iwae_samples: samples of the latents per image for the importance-weighted bounds (IWAE, and TMC,
            which combines the samples of all levels); 0: ELBO only.
        limit: number of images, the first of the split; by default all.
        batch_size: images per batch.
        precision: numbers that the networks compute in; bf16-mixed is faster where the processor has it.
            Likelihoods stay in float32.
        seed: random seed.
        devices: number of GPUs or processes that share the images.
        json: print one JSON object only.
    """
    net = load_model(model, devices)
    import torch

    from selfvae.metrics import likelihood

    images = load_images(net, data, split)
    torch.manual_seed(seed)
    result = likelihood.evaluate(
        net, images, iwae_samples=iwae_samples, limit=limit, batch_size=batch_size, precision=precision
    )
    result = {"data": Path(data).name, "split": split, **result}
    show(result if json else _by_level(net, result), json)


def _by_level(net: SelfVAE, result: dict[str, object]) -> dict[str, object]:
    """The terms under the names of their variables; without the KL of levels that have no latent."""
    out: dict[str, object] = {}
    for key, value in result.items():
        term, _, unit = key.partition("_")
        if not isinstance(value, list):
            out[key] = value
            continue
        for k, number in enumerate(value):
            if term == "re" or net.levels[k].has_latent:
                out[f"{term}_{'y' if term == 're' else 'z'}{k}_{unit}"] = number
    return out


def evaluate_enhance(
    model: Run,
    data: str = "photos",
    split: Split = "test",
    level: int = 1,
    draws: int = 8,
    limit: int | None = None,
    batch_size: int = 32,
    whole: bool = False,
    scale: int | None = None,
    on_luma: bool = False,
    border: int = 0,
    perceptual: bool = False,
    devices: int = 1,
    json: bool = False,
    drawing: SamplingFlags = SamplingFlags(),  # noqa: B008 (frozen)
) -> None:
    """Evaluate enhancement from y[LEVEL]: PSNR (dB), SSIM, consistency and diversity.

    For the mean of the distribution, single draws, the average of the draws, and plain methods without a
    model (e.g. bicubic interpolation).

    Args:
        model: folder that selfvae train wrote, or a bundled model.
        data: data set, as for train; images must have the model's number of channels.
        split: train, validation or test images.
        level: which of the images that the model computes is given: 1 for y1, ... .
        draws: enhancements of each image, at least 2; 0: none.
        limit: number of images, the first of the split; by default all.
        batch_size: images per batch.
        whole: DATA is a folder of pictures of any size, all of which are evaluated whole.
        scale: factor by which a model that enlarges does so, 2, 4, 8, ...: it is applied to its own result.
        on_luma: compute PSNR and SSIM of the luma Y, as publications on super-resolution do.
        border: pixels on each side that PSNR and SSIM leave out; in publications as many as the factor.
        perceptual: also compute SSIMULACRA 2 (needs selfvae[bench]).
        devices: number of GPUs or processes that share the images.
        json: print one JSON object only.
    """
    net = load_model(model, devices)
    from selfvae.cli.files import pictures_in, read_picture
    from selfvae.data import pictures
    from selfvae.metrics import enhancement

    options: dict[str, Any] = {
        "draws": draws, "scale": scale, "on_luma": on_luma, "border": border, "perceptual": perceptual,
        **sampling(drawing, net),
    }  # fmt: skip
    if whole:
        files = progress(pictures_in(Path(data))[:limit], "enhancing pictures")
        each = (pictures.to_spec(read_picture(file, False), net.spec) for file in files)
        result = enhancement.evaluate_whole(net, each, level, **options)
    else:
        result = enhancement.evaluate_enhancement(
            net, load_images(net, data, split), level, limit=limit, batch_size=batch_size, **options
        )
    show({"data": Path(data).name, "split": "all" if whole else split, **result}, json)


def fid(
    model: Run,
    data: str = "photos",
    split: Split = "test",
    n: int = 10_000,
    features: str = "inception",
    batch_size: int = 100,
    devices: int = 1,
    json: bool = False,
    drawing: SamplingFlags = SamplingFlags(),  # noqa: B008 (frozen)
) -> None:
    """Evaluate generated images: Fréchet distance (FID), kernel distance (KID), precision and recall.

    Args:
        model: folder that selfvae train wrote, or a bundled model.
        data: data set of real images, as for train.
        split: train, validation or test images; all of them are used.
        n: number of images to generate; the papers generate 10,000 to compare with test images and 50,000
            with training images.
        features: inception, or MODULE:NAME for a network of your own from images uint8 (B, 3, H, W) to
            features (B, D).
        batch_size: images per batch.
        devices: number of GPUs or processes that share the images.
        json: print one JSON object only.
    """
    net = load_model(model, devices)
    from selfvae.metrics.fid import evaluate_samples

    network = _network(features, net.device)
    images = load_images(net, data, split)
    result = evaluate_samples(
        net, images, network, n, batch_size=batch_size, track=progress, **sampling(drawing, net)
    )
    show({"data": Path(data).name, "split": split, **result}, json)


def _network(features: str, device: torch.device) -> Network:
    """The feature network of that name; one's own may lie in the working folder."""
    from selfvae.metrics.fid import load_network

    sys.path.append(os.getcwd())
    return load_network(features, device)


def ood(
    model: Run,
    data: str = "photos",
    ood_data: tuple[str, ...] = _ALTERED,
    limit: int | None = 1000,
    batch_size: int = 32,
    seed: int = 0,
    devices: int = 1,
    json: bool = False,
) -> None:
    """Evaluate out-of-distribution detection: AUROC of every score per image, for every other data set.

    Args:
        model: folder that selfvae train wrote, or a bundled model.
        data: in-distribution data set, as for train; its test images are used.
        ood_data: out-of-distribution data sets: noise, constant, inverted, rotated (made from the test
            images), or any data as for train.
        limit: number of test images of each data set, the first ones.
        batch_size: images per batch.
        seed: random seed of the latents and of noise.
        devices: number of GPUs or processes that share the images.
        json: print one JSON object only.
    """
    if not ood_data:
        raise ValueError(f"--ood-data takes at least one of {', '.join(_ALTERED)}, or a data set")
    net = load_model(model, devices)
    from selfvae.metrics.ood import evaluate_ood

    inside, outside = load_images(net, data), _outside(net, ood_data)
    result = evaluate_ood(net, inside, outside, limit=limit, batch_size=batch_size, seed=seed)
    if json:
        show(result, json)
        return
    print(f"AUROC, {result.pop('images')} images each")
    names = list(next(iter(result.values())))
    print(" " * 24 + "".join(f"{name:>10}" for name in names))
    for other, values in result.items():
        print(f"{other[-24:]:<24}" + "".join(f"{values[name]:>10.3f}" for name in names))


def _outside(net: SelfVAE, names: Iterable[str]) -> dict[str, Images | None]:
    """Out-of-distribution images by name; None for those that are made from the test images."""
    return {name: None if name in _ALTERED else load_images(net, name) for name in names}


def benchmark(
    model: Run,
    counts: tuple[int, ...] = (1, 20, 100),
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Measure the time to generate and to reconstruct batches of images: medians, in seconds.

    Args:
        model: folder that selfvae train wrote, or a bundled model.
        counts: batch sizes, in images.
        repeats: timed runs of each, after one that is not counted.
        json: print one JSON object only.
    """
    positive("counts", min(counts, default=0))
    positive("repeats", repeats)
    net = load_model(model)
    from selfvae.metrics.timing import measure_speed

    show(measure_speed(net, counts, repeats), json)


def report(
    models: Annotated[Positional[tuple[Path, ...]], arg(metavar="MODEL")],
    data: str = "photos",
    out: Path = Path("report"),
    ood_data: tuple[str, ...] = _ALTERED,
    features: str | None = None,
    devices: int = 1,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
) -> None:
    """Compute all scores of trained models: OUT/report.md and OUT/report.html. Resumes if interrupted.

    Args:
        models: folders that selfvae train wrote.
        data: data set, as for train; its test images are used.
        out: folder for the report and its parts.
        ood_data: out-of-distribution data sets, as for ood.
        features: features for the sample quality, as for fid: inception, or MODULE:NAME; by default sample
            quality is left out.
        devices: number of GPUs or processes that share the work.
    """
    if not models:
        raise ValueError("a report needs at least one folder with a model")
    for model in models:
        check_model(model)
    first = load_model(models[0], devices)
    from selfvae.reports.report import write_report

    images = load_images(first, data)
    path = write_report(
        models, images, Path(data).name, out, settings, outside=_outside(first, ood_data),
        device=first.device,
        features=None if features is None else (features, _network(features, first.device)),
        command="selfvae " + " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:]),
        progress=note,
    )  # fmt: skip
    print(f"See {path}")
