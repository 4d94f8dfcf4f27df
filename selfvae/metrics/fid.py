"""Quality of samples: Frechet and kernel distances, precision and recall, on any network's features.

The features are those of the Inception network of Heusel et al. 2017 (2048 numbers per image), where the
package torch-fidelity can fetch it, or of any network: a callable from images uint8 (B, 3, H, W) to (B, D).
The papers' protocol: sampled uint8 images, not means; as many generated as real ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from selfvae.data.batches import Images, ranges
from selfvae.data.pictures import show
from selfvae.distributed import distributed_map
from selfvae.model import SelfVAE
from selfvae.operations import SamplingOptions, generate
from selfvae.progress import Track, no_progress

__all__ = [
    "evaluate_samples",
    "features",
    "frechet_distance",
    "kernel_distance",
    "load_network",
    "precision_recall",
]

Network = Callable[[Tensor], Tensor]


def load_network(name: str, device: torch.device | str = "cpu") -> Network:
    """Load a feature network.

    Args:
        name: "inception", or MODULE:NAME of a callable or of a class that is called without arguments.
        device: where it runs.

    Raises:
        ImportError, OSError: if it cannot be imported or fetched; the message says what to do.
        ValueError: if it is no callable.
    """
    if name == "inception":
        return _inception(device)
    module, given, attribute = name.partition(":")
    if not given:
        raise ValueError(f"features must be inception or MODULE:NAME; got {name!r}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"no features at {name}: {error}") from None
    network: Network = found() if isinstance(found, type) else found
    if not callable(network):
        raise ValueError(
            f"features must be a function of images, or a class of them; {name} is {network!r}"
        )
    if isinstance(network, torch.nn.Module):
        network = network.eval().to(device)
    return network


def _inception(device: torch.device | str) -> Network:
    other = "or give --features MODULE:NAME, a network of your own"
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # it imports torchvision, which may fail in ways of its own
        raise ImportError(
            f"the Inception network comes with the package torch-fidelity, which could not be imported "
            f"({error}): pip install 'selfvae[quality]', {other}"
        ) from None
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except OSError as error:
        raise OSError(
            f"the Inception weights could not be fetched ({error}): check the network, {other}"
        ) from None
    return lambda x: network(x)[0]


@torch.no_grad()
def features(network: Network, images: Tensor) -> Tensor:
    """Features of images.

    Args:
        network: from uint8 (B, 3, H, W) to (B, D).
        images: uint8 (B, C, H, W); grey ones are repeated to three channels, alpha is left out.

    Returns:
        float64 (B, D), on the CPU.

    Raises:
        ValueError: if the network returns another shape.
    """
    rgb = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    out = network(rgb)
    if out.ndim != 2 or out.shape[0] != images.shape[0]:
        got = f"{tuple(out.shape)} for {len(images)} images"
        raise ValueError(f"a feature network must return (B, D); got {got}")
    return out.double().cpu()


def _check(real: Tensor, drawn: Tensor, least: int, why: str) -> None:
    if real.ndim != 2 or drawn.ndim != 2 or real.shape[1] != drawn.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D); got {tuple(real.shape)} and {tuple(drawn.shape)}"
        )
    _check_numbers(len(real), len(drawn), least, why)


def _check_numbers(real: int, drawn: int, least: int, why: str) -> None:
    if min(real, drawn) < least:
        raise ValueError(f"{why} needs at least {least} images on both sides; got {real} and {drawn}")


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """Frechet distance of two sets of features taken as Gaussians (FID, with Inception features).

    |m - n|^2 + tr(S + T - 2 (S T)^(1/2)) for means m, n and covariances S, T.

    Args:
        real, drawn: (N, D) and (M, D); N and M above D, else the covariances do not have full rank.

    Raises:
        ValueError: if there are fewer, or the shapes do not fit.

    Source: Heusel et al. 2017.
    """
    _check(real, drawn, real.shape[-1] + 1, f"a covariance of {real.shape[-1]} features")
    real, drawn = real.double(), drawn.double()
    shift = (real.mean(0) - drawn.mean(0)).square().sum()
    s, t = torch.atleast_2d(torch.cov(real.T)), torch.atleast_2d(torch.cov(drawn.T))
    # the eigenvalues of S T are those of the symmetric S^(1/2) T S^(1/2), which keeps them real
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    return float(shift + s.trace() + t.trace() - 2 * cross)


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    std: float


def kernel_distance(
    real: Tensor, drawn: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy with the kernel (a.b / D + 1)^3, over random subsets.

    Args:
        real, drawn: features (N, D) and (M, D).
        subsets: number of subsets.
        size: features per subset, or N or M where these are less.
        seed: of the subsets.

    Raises:
        ValueError: if there are fewer than 2 features, or the shapes do not fit.

    Source: Binkowski et al. 2018 (KID).
    """
    _check(real, drawn, 2, "the kernel distance")
    n = min(size, len(real), len(drawn))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        x = real[torch.randperm(len(real), generator=generator)[:n]].double()
        y = drawn[torch.randperm(len(drawn), generator=generator)[:n]].double()
        xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
        found.append(within - 2 * xy.mean())
    values = torch.stack(found)
    return KernelDistance(values.mean().item(), values.std(correction=0).item())


class PrecisionRecall(NamedTuple):
    """Fractions of the drawn images near real ones, and of the real images near drawn ones."""

    precision: float
    recall: float


def precision_recall(real: Tensor, drawn: Tensor, k: int = 3, chunk: int = 1000) -> PrecisionRecall:
    """Fractions of the points of one set within a ball, to the k-th neighbour, around a point of the other.

    Args:
        real, drawn: features (N, D) and (M, D).
        k: from 1.
        chunk: points compared at a time: bounds the memory.

    Raises:
        ValueError: if there are k points or fewer, or the shapes do not fit.

    Source: Kynkaanniemi et al. 2019.
    """
    _check(real, drawn, k + 1, f"a {k}-th neighbour")
    return PrecisionRecall(_covered(drawn, real, k, chunk), _covered(real, drawn, k, chunk))


def _covered(points: Tensor, centres: Tensor, k: int, chunk: int) -> float:
    radii = torch.cat(
        [torch.cdist(part, centres).kthvalue(k + 1, 1).values for part in centres.split(chunk)]
    )  # the nearest is the point itself
    inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(chunk)]
    return torch.cat(inside).double().mean().item()


def report(real: Tensor, drawn: Tensor) -> dict[str, Any]:
    """All distances by name, for features (N, D) and (M, D)."""
    kid, pr = kernel_distance(real, drawn), precision_recall(real, drawn)
    return {
        "real_images": len(real),
        "drawn_images": len(drawn),
        "frechet_distance": frechet_distance(real, drawn),
        "kernel_distance": kid.mean,
        "kernel_distance_std": kid.std,
        "precision": pr.precision,
        "recall": pr.recall,
    }


def evaluate_samples(
    model: SelfVAE,
    images: Images,
    network: Network,
    n: int = 10_000,
    *,
    batch_size: int = 100,
    track: Track = no_progress,
    **how: Unpack[SamplingOptions],
) -> dict[str, Any]:
    """Compare drawn images with real ones: `report`. Several processes share the work.

    Args:
        model: initialised or loaded.
        images: real ones, all of which are used.
        network: gives the features.
        n: images to draw, of the real ones' size; the papers take 10,000 against test and 50,000 against
            train.
        batch_size: images per batch.
        track: shows progress over the batches.
        **how: see `SamplingOptions`; the seed is raised by the number of images before each batch.

    Returns:
        Distances, precision and recall by name.

    Raises:
        ValueError: if there are too few images for a covariance of the features.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1; got {n} and {batch_size}")

    seed = how.get("seed")

    def known(chunk: range) -> Tensor:
        return features(network, show(images.take(chunk).to(model.device), model.spec))

    size = known(range(1)).shape[1]
    _check_numbers(len(images), n, size + 1, f"a covariance of {size} features")  # before hours of drawing

    def drawn(chunk: range) -> Tensor:
        if seed is not None:
            how["seed"] = seed + chunk.start
        x = generate(model, len(chunk), *images.shape[2:], **how)
        return features(network, show(x, model.spec))

    real = distributed_map(known, ranges(len(images), batch_size), track, "real images")
    fake = distributed_map(drawn, ranges(n, batch_size), track, "generated images")
    return report(torch.cat(real), torch.cat(fake))
