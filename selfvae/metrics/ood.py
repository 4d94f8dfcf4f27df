"""Out-of-distribution detection: scores per image that should be high for images unlike the training set.

| score | nats per image |
|---|---|
| nll | -ln p(x), by the bound at one draw of the latents |
| re0, kl0, re1, ... | each level's terms of it |
| ratio | ln p(y) - ln p(x given y): how much the finest level costs beyond all that it is given |
| nll-png, nll-webp | nll minus the length of a PNG or WebP file: complexity-corrected |

Sources: Serra et al. 2020 (input complexity); Ren et al. 2019 and Schirrmeister et al. 2020 (ratios).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfvae.data.batches import Images
from selfvae.data.pictures import show
from selfvae.distributed import distributed_map
from selfvae.metrics.baselines import lossless_bits
from selfvae.metrics.likelihood import check_values
from selfvae.model import SelfVAE
from selfvae.operations import seeded
from selfvae.terms import gather

__all__ = ["ALTERED", "auroc", "evaluate_ood", "scores"]

# out-sets made from the in-set: x uint8 (B, C, H, W), the largest value, a generator -> images of x's shape
ALTERED: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "noise": lambda x, top, g: torch.randint(0, top + 1, x.shape, generator=g, dtype=torch.uint8),
    "constant": lambda x, top, g: torch.randint(
        0, top + 1, (*x.shape[:2], 1, 1), generator=g, dtype=torch.uint8
    ).expand_as(x),
    "inverted": lambda x, top, g: top - x,
    "rotated": lambda x, top, g: x.rot90(1, (2, 3)),
}


@torch.no_grad()
def scores(model: SelfVAE, x: Tensor, batch_size: int = 32) -> dict[str, Tensor]:
    """All scores of images; several processes share the work.

    Args:
        model: initialised or loaded; draws come from torch's global random state.
        x: uint8 (B, C, H, W).
        batch_size: images per batch.

    Returns:
        float64 (B,) nats each, by name; see the module.
    """
    re, kl = gather(distributed_map(lambda part: model(part.to(model.device)).cpu(), x.split(batch_size)))
    levels = re + kl
    out = {"nll": levels.sum(0)}
    for k, level in enumerate(model.levels):
        out[f"re{k}"] = re[k]
        if level.has_latent:
            out[f"kl{k}"] = kl[k]
    if len(levels) > 1:
        out["ratio"] = levels[0] - levels[1:].sum(0)
    for name, format in (("png", "PNG"), ("webp", "WebP")):
        if x.shape[1] in (1, 3):  # without alpha: it would be compressed in a way of its own
            length = lossless_bits(show(x, model.spec), format)
            out[f"nll-{name}"] = out["nll"] - length.double() * math.log(2)
    return out


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Area under the ROC curve: the probability that a score from outside is above one from inside.

    Ties count one half.

    Args:
        inside: scores of the in-set, (M,).
        outside: scores of the out-set, (N,).

    >>> auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    low, high = np.sort(inside.numpy()), outside.numpy()
    below, upto = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return float((below + upto).mean() / (2 * len(low)))


def evaluate_ood(
    model: SelfVAE,
    inside: Images,
    outside: dict[str, Images | None],
    *,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """AUROC of every score for every out-set. Several processes share the work.

    Args:
        model: initialised or loaded.
        inside: images of the in-set.
        outside: images of the out-sets, by name; None: made from the in-set, as the name in `ALTERED` says.
        limit: the first this many images of each set (see `sources.load` for their order); None: as many
            as the in-set has.
        batch_size: images per batch.
        seed: of the latents and of the sets that are random.

    Returns:
        {"images": n, out-set: {score: AUROC}}; 0.5 is chance, and below it the model finds the out-set
        more likely than the in-set.

    Raises:
        ValueError: if a set does not fit, is unknown, or has fewer than 2 images.
    """
    n = len(inside) if limit is None else min(limit, len(inside))
    if n < 2:
        raise ValueError(f"at least 2 images are needed; got {n}")
    check_values(model, inside)
    x = inside.take(range(n))
    others: dict[str, Tensor] = {}
    for name, images in outside.items():
        if images is None:
            if name not in ALTERED:
                raise ValueError(f"unknown out-set {name!r}: give images, or one of {', '.join(ALTERED)}")
            generator = torch.Generator().manual_seed(seed)
            other = ALTERED[name](x, model.spec.max_value, generator).contiguous()
        else:
            check_values(model, images)
            other = images.take(range(min(n, len(images))))
        if other.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"out-set {name!r} must hold images of {tuple(x.shape[1:])} as the in-set does; "
                f"got {tuple(other.shape[1:])}"
            )
        others[name] = other
    with seeded(model, seed):
        known = scores(model, x, batch_size)
        found = {name: scores(model, other, batch_size) for name, other in others.items()}
    return {
        "images": n,
        **{name: {s: auroc(known[s], strange[s]) for s in known} for name, strange in found.items()},
    }
