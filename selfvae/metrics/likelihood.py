"""Likelihood scores of a model on images: the bounds and their terms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from selfvae.data.batches import Images, ranges
from selfvae.distributed import distributed_map
from selfvae.metrics.bounds import Bounds, bounds
from selfvae.model import SelfVAE
from selfvae.nn.precision import Resolved, autocast
from selfvae.terms import Terms, bits_per_dim, gather

__all__ = ["batches", "check_values", "evaluate", "summary"]


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


def batches(model: SelfVAE, images: Images, limit: int | None, batch_size: int) -> tuple[int, list[range]]:
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
    iwae_samples: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    precision: Resolved = "32-true",
) -> dict[str, Any]:
    """Mean scores over the first `limit` images (all if None).

    Returns, as means over images: bits_per_dim (of the ELBO, one draw an image), elbo_nats, re and kl
    (lists over levels, in nats and in bits/dim), images; with iw > 0 the bounds of so many draws an image:
    iwae_bits_per_dim, tmc_bits_per_dim (all combinations of the levels' draws) and, from the same draws,
    elbo_bits_per_dim. Every bits_per_dim comes with its standard error over images. With precision
    "bf16-mixed" the networks compute in bfloat16 (see `precision`). Several processes share the work.
    """
    n, parts = batches(model, images, limit, batch_size)

    def score(batch: range) -> tuple[Terms, Bounds | None]:
        x = images.take(batch).to(model.device)
        with autocast(model.device, precision):
            return model(x).cpu(), bounds(
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
