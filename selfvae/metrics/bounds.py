"""Importance-weighted bounds of ln p(x), per image: from S draws, or from all S^(K+1) pairs of them.

The posteriors of the levels are independent given x, so any draw of one level goes with any draw of the
others. A weight is a product along the hierarchy,

    w = prod_k  p(y_k | y_{k+1}, z_k) / q(z_k | y_k)  *  prod_k  p(z_k | y_{k+1}, z_{k+1}),

nodes times edges of a chain. `iwae` averages the S weights of draws that were made together; with `tmc` it
sums over all combinations, level by level, as a hidden Markov model's forward pass does, with edge matrices
S x S that are matrix products. Both averages are unbiased for p(x), so their logarithms are lower bounds.
A level without a latent has the same likelihood for every draw, and is decoded once per image.
See docs/spec.md, section Bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from selfvae.distributions.latents import DiagonalNormal
from selfvae.level import Posterior
from selfvae.model import SelfVAE

__all__ = ["Bounds", "estimate_bounds", "iwae"]


@dataclass
class _Node:
    """The draws of one latent, in chunks of draws: (n, B) nats, and (n, B, D) where edges are needed."""

    log_weight: list[Tensor] = field(default_factory=list)  # ln p(y | ., z) - ln q(z | y)
    log_prior: list[Tensor] = field(default_factory=list)  # ln p(z | the draw above made with it)
    z: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)  # of p(z | each draw above)
    log_var: list[Tensor] = field(default_factory=list)

    def edges(self) -> Tensor:
        """ln p(z_i | draw j above), float64 (B, S_i, S_j)."""
        # (z - m)^2 is multiplied out into matrix products: float64 outlasts the cancellation
        parts = (torch.cat(part).transpose(0, 1).double() for part in (self.z, self.mean, self.log_var))
        z, mean, log_var = parts
        precision = torch.exp(-log_var)
        constant = (mean.square() * precision + log_var + math.log(2 * math.pi)).sum(2)
        square = z.square() @ precision.mT - 2 * z @ (mean * precision).mT
        return -0.5 * (square + constant[:, None])


class Bounds(NamedTuple):
    """Lower bounds of ln p(x) from the same draws: float64 nats (B,), in expectation in this order."""

    elbo: Tensor  # the mean of S log-weights
    iwae: Tensor  # the logarithm of the mean of S weights
    tmc: Tensor  # the logarithm of the mean of all combinations' weights

    def cpu(self) -> Bounds:
        """The same bounds on the CPU."""
        return Bounds(*(bound.cpu() for bound in self))


def iwae(model: SelfVAE, x: Tensor, draws: int = 64, *, tmc: bool = False, batch: int = 64) -> Tensor:
    """Importance-weighted lower bound of ln p(x): ln (1/S) sum_s p(x, y, z_s) / q(z_s | x).

    The encoders run once per image, a level's decoder once per draw where the level has a latent and once
    per image where it has none. Exact for a model without latents.

    Args:
        model: any; draws come from torch's global random state.
        x: uint8 (B, C, H, W).
        draws: S.
        tmc: sum over all combinations of the levels' draws, for the same S passes. Tighter in expectation
            where several levels have latents; the same as without for one, or for uniform posteriors.
        batch: images times draws that pass the decoders at a time: bounds the memory.

    Returns:
        float64 (B,), nats.

    Raises:
        TypeError, ValueError: if x is not of the model's spec, or draws or batch is below 1.

    Sources: Burda et al. 2015, section 3; Aitchison 2019 (Tensor Monte Carlo).
    """
    found = estimate_bounds(model, x, draws, tmc=tmc, batch=batch)
    return found.tmc if tmc else found.iwae


@torch.no_grad()
def estimate_bounds(
    model: SelfVAE, x: Tensor, draws: int = 64, *, tmc: bool = True, batch: int = 64
) -> Bounds:
    """All bounds at once, from the same draws; arguments as for `iwae` (without `tmc`: as `iwae`)."""
    if draws < 1 or batch < 1:
        raise ValueError(f"draws and batch must be at least 1; got {draws} and {batch}")
    model.warn_uninitialised()
    together = max(1, batch // draws) if model.has_latents else batch
    parts = [_bounds(model, part, draws, tmc, batch) for part in x.split(together)]
    return Bounds(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _bounds(model: SelfVAE, x: Tensor, draws: int, tmc: bool, batch: int) -> Bounds:
    ys = model.pyramid(x)
    posteriors = model.posteriors(ys)
    if not posteriors:  # nothing is drawn: the score is exact
        return Bounds(*[model.score(ys, posteriors).elbo.double()] * 3)
    chunk = max(1, batch // x.shape[0])
    tmc = tmc and all(isinstance(q, DiagonalNormal) for q in posteriors.values())
    nodes = {name: _Node() for name in sorted(posteriors, key=lambda name: -int(name[1:]))}
    for start in range(0, draws, chunk):
        _draw(model, ys, posteriors, nodes, min(chunk, draws - start), tmc)
    weights = [torch.cat(node.log_weight) for node in nodes.values()]
    together = torch.stack([*weights, *(torch.cat(node.log_prior) for node in nodes.values())]).sum(0)
    mean = torch.logsumexp(together, 0) - math.log(draws)
    every = _all_combinations(list(nodes.values()), weights) if tmc else mean
    exact = _without_latents(model, ys)
    return Bounds(exact + together.mean(0), exact + mean, exact + every)


def _all_combinations(nodes: list[_Node], weights: list[Tensor]) -> Tensor:
    """ln of the mean weight of all combinations of draws, nats (B,); nodes and weights from the top."""
    combined = weights[0] + torch.cat(nodes[0].log_prior)
    for node, weight in zip(nodes[1:], weights[1:], strict=True):
        # (B, S_i, S_j): for every draw i here the sum over the draws j above
        combined = torch.logsumexp(node.edges() + combined.T[:, None], 2).T + weight
    return torch.logsumexp(combined, 0) - len(nodes) * math.log(len(combined))


def _without_latents(model: SelfVAE, ys: list[Tensor]) -> Tensor:
    """ln p of the images that no latent explains, given those above: float64 (B,), nats."""
    above = [*ys[1:], ys[-1][:, :0]]
    total = torch.zeros(ys[0].shape[0], dtype=torch.float64, device=ys[0].device)
    for level, y, y_up in zip(model.levels, ys, above, strict=True):
        if not level.has_latent:
            total += level.likelihood(y_up, None).log_prob(y).double()
    return total


def _draw(
    model: SelfVAE,
    ys: list[Tensor],
    posteriors: dict[str, Posterior],
    nodes: dict[str, _Node],
    n: int,
    tmc: bool,
) -> None:
    """Add n draws to the nodes: the walk down the levels that have a latent, all draws as one batch."""
    b, z, top = ys[0].shape[0], None, next(iter(nodes.values()))
    for name, node in nodes.items():
        k = int(name[1:])
        level, y = model.levels[k], ys[k].repeat(n, 1, 1, 1)
        y_up = ys[k + 1].repeat(n, 1, 1, 1) if k + 1 < len(ys) else y[:, :0]
        prior, posterior = level.prior(y_up, z), posteriors[name].repeat(n)
        z = posterior.sample()
        if tmc and isinstance(prior, DiagonalNormal) and node is not top:
            for values, kept in ((z, node.z), (prior.mean, node.mean), (prior.log_var, node.log_var)):
                kept.append(values.reshape(n, b, -1))
        weight = level.likelihood(y_up, z).log_prob(y).double() - posterior.log_prob(z).double()
        node.log_weight.append(weight.view(n, b))
        node.log_prior.append(prior.log_prob(z).view(n, b).double())
