"""Scores of a model on images: the bound, its terms, and the importance-weighted bound."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from selfvae.data import Images
from selfvae.model import SelfVAE
from selfvae.objective import bits_per_dim

__all__ = ["check_levels", "evaluate", "iwae"]


@torch.no_grad()
def iwae(model: SelfVAE, x: Tensor, draws: int = 64, chunk: int = 8) -> Tensor:
    """ln (1/S) sum_s p(x, y, z_s) / q(z_s | x): nats (B,), a lower bound of ln p(x) per image.

    The encoders run once; `chunk` of the S = `draws` draws pass the decoders at a time.
    Source: Burda et al. 2015, section 3.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1; got {draws}")
    ys = model.pyramid(x)
    posteriors = model.posteriors(ys)
    if not posteriors:  # nothing is drawn: the score is exact
        return model.score(ys, posteriors).elbo
    log_weights = []
    for start in range(0, draws, chunk):
        n = min(chunk, draws - start)
        many = [y.repeat(n, 1, 1, 1) for y in ys]
        terms = model.score(many, {name: q.repeat(n) for name, q in posteriors.items()})
        log_weights.append(terms.elbo.view(n, -1))
    return torch.logsumexp(torch.cat(log_weights), 0) - math.log(draws)


def check_levels(model: SelfVAE, images: Images) -> None:
    """Raise ValueError if images hold values that the model gives no probability to."""
    top = int(images.take(range(min(64, len(images)))).max())
    if top >= model.format.levels:
        raise ValueError(
            f"the images hold values up to {top}; the model has {model.format.levels} levels "
            f"(0 to {model.format.top}): build it with levels=256, or reduce the images"
        )


@torch.no_grad()
def evaluate(
    model: SelfVAE,
    images: Images,
    *,
    iw: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Mean scores over the first `limit` images (all if None).

    Returns bits_per_dim (of the ELBO, one draw an image), its standard error over images, elbo_nats, re
    and kl (lists over levels, nats), images, and with iw > 0 iwae_bits_per_dim and iwae_draws.
    """
    n = len(images) if limit is None else min(limit, len(images))
    if n < 1 or batch_size < 1:
        raise ValueError(f"limit and batch_size must be at least 1; got {n} and {batch_size}")
    check_levels(model, images)
    parts: dict[str, list[Tensor]] = {"elbo": [], "iwae": []}
    re: list[Tensor] = []
    kl: list[Tensor] = []
    for start in range(0, n, batch_size):
        x = images.take(range(start, min(n, start + batch_size))).to(model.device)
        terms = model(x)
        parts["elbo"].append(terms.elbo)
        re.append(torch.stack(terms.re))
        kl.append(torch.stack(terms.kl))
        if iw:
            parts["iwae"].append(iwae(model, x, iw))
    dims = math.prod(images.shape[1:])
    bits = bits_per_dim(-torch.cat(parts["elbo"]).cpu().double(), dims)
    out: dict[str, Any] = {
        "images": n,
        "bits_per_dim": bits.mean().item(),
        "bits_per_dim_stderr": bits.std(correction=1).item() / math.sqrt(n) if n > 1 else 0.0,
        "elbo_nats": torch.cat(parts["elbo"]).cpu().double().mean().item(),
        "re_nats": torch.cat(re, 1).cpu().double().mean(1).tolist(),
        "kl_nats": torch.cat(kl, 1).cpu().double().mean(1).tolist(),
    }
    if iw:
        bound = torch.cat(parts["iwae"]).cpu().double()
        out["iwae_draws"] = iw
        out["iwae_bits_per_dim"] = bits_per_dim(-bound, dims).mean().item()
    return out
