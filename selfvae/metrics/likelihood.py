"""Likelihood scores of a model on images: the bounds and their terms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from selfvae.data.batches import Images, ranges
from selfvae.distributed import distributed_map
from selfvae.metrics.bounds import Bounds, estimate_bounds
from selfvae.model import SelfVAE
from selfvae.nn.precision import Resolved, autocast
from selfvae.terms import Terms, bits_per_dim, gather

__all__ = ["batches", "check_values", "evaluate", "summary"]


def check_values(model: SelfVAE, images: Images) -> None:
    """Raise ValueError if images hold values above the model's largest one."""
    if model.spec.num_values == 256:
        return
    top = max(int(images.take(batch).max()) for batch in ranges(len(images), 1024))
    if top > model.spec.max_value:
        raise ValueError(
            f"the images hold values up to {top}; the model has {model.spec.num_values} levels "
            f"(0 to {model.spec.max_value}): build it with num_values=256, or reduce the images"
        )


def batches(model: SelfVAE, images: Images, limit: int | None, batch_size: int) -> tuple[int, list[range]]:
    """The images to score.

    Args:
        model: that scores them.
        images: of a split; see `sources.load` for their order.
        limit: the first this many; None: all.
        batch_size: images per batch.

    Returns:
        Their number, and their positions batch by batch.

    Raises:
        ValueError: if there are none, or they hold values that the model does not have.
    """
    n = len(images) if limit is None else min(limit, len(images))
    if n < 1 or batch_size < 1:
        raise ValueError(f"limit and batch_size must be at least 1; got {n} and {batch_size}")
    check_values(model, images)
    return n, ranges(n, batch_size)


def summary(nats: dict[str, Tensor], dims: int) -> dict[str, float]:
    """Means over images and their standard errors, in bits/dim.

    Args:
        nats: bounds of ln p(x), (B,) nats, by name.
        dims: dimensions of an image, C * H * W.

    Returns:
        For each name the mean, and as NAME_stderr its standard error.
    """
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
    iwae_samples: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    precision: Resolved = "32-true",
    levels: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Score images: mean bounds of the likelihood. Several processes share the work.

    Args:
        model: initialised or loaded.
        images: of a split.
        iwae_samples: draws per image of the importance-weighted bounds; 0: leave them out.
        limit: score the first this many images of the split, whose order is random wherever they could
            come class by class (see `sources.load`); None: all.
        batch_size: images per batch, and images times draws per pass of the decoders.
        precision: of the networks; see `nn.precision`.
        levels: those whose terms count, see `SelfVAE.score`; None: all.

    Returns:
        Means over images: bits_per_dim (of the ELBO at one draw), elbo_nats, re_nats, kl_nats,
        re_bits_per_dim and kl_bits_per_dim (lists over levels), and "images", their number. With
        iwae_samples also iwae_bits_per_dim, tmc_bits_per_dim (all combinations of the levels' draws) and,
        from the same draws, elbo_bits_per_dim. Bounds have a standard error over images, NAME_stderr.

    Raises:
        ValueError: if the images do not fit the model, or there are none.
    """
    n, parts = batches(model, images, limit, batch_size)

    def score(batch: range) -> tuple[Terms, Bounds | None]:
        x = images.take(batch).to(model.device)
        with autocast(model.device, precision):
            return model(x, levels=levels).cpu(), estimate_bounds(
                model, x, iwae_samples, batch=batch_size
            ).cpu() if iwae_samples else None

    terms, found = zip(*distributed_map(score, parts), strict=True)
    dims = math.prod(images.shape[1:])
    elbo = torch.cat([t.elbo for t in terms])
    out: dict[str, Any] = {"images": n, **summary({"bits_per_dim": elbo}, dims)}
    out["elbo_nats"] = elbo.double().mean().item()
    for kind, values in zip(("re", "kl"), gather(terms), strict=True):
        means = values.mean(1)
        out[f"{kind}_nats"] = means.tolist()
        out[f"{kind}_bits_per_dim"] = bits_per_dim(means, dims).tolist()
    if iwae_samples:
        out["iwae_draws"] = iwae_samples
        out |= summary(
            {
                f"{kind}_bits_per_dim": torch.cat([getattr(b, kind) for b in found])
                for kind in Bounds._fields
            },
            dims,
        )
    return out
