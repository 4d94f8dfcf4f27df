"""Importance-weighted bounds of ln p(x), per image: from S draws, or from all S^(K+1) pairs of them.

The posteriors of the levels are independent given x, so any draw of one level goes with any draw of the
others. A weight is a product along the hierarchy,

    w = prod_k  p(y_k | y_{k+1}, z_k) / q(z_k | y_k)  *  prod_k  p(z_k | y_{k+1}, z_{k+1}),

nodes times edges of a chain. `iwae` averages the S weights of draws that came together; with `tmc` it
sums over all combinations, level by level, as a hidden Markov model's forward pass does, with edge matrices
S x S that are matrix products. Both averages are unbiased for p(x), so their logarithms are lower bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfvae.distributions.latents import DiagonalNormal
from selfvae.level import Posterior
from selfvae.model import SelfVAE

__all__ = ["Bounds", "bounds", "iwae"]


@dataclass
class _Node:
    """The draws of one latent, in chunks of draws: (n, B) nats, and (n, B, D) where edges are needed."""

    log_weight: list[Tensor] = field(default_factory=list)  # ln p(y | ., z) - ln q(z | y)
    log_prior: list[Tensor] = field(default_factory=list)  # ln p(z | the draw above that came with it)
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
        """The same on the CPU."""
        return Bounds(*(bound.cpu() for bound in self))


def iwae(model: SelfVAE, x: Tensor, draws: int = 64, *, tmc: bool = False, batch: int = 64) -> Tensor:
    """ln (1/S) sum_s p(x, y, z_s) / q(z_s | x): nats (B,), a lower bound of ln p(x) per image.

    Arguments:
        x: uint8 (B, C, H, W).
        draws: S.
        tmc: sum over all combinations of the draws of the levels, at the price of the same S passes.
            The same as without for a model of one latent, or with a uniform posterior; tighter, in
            expectation, for more.
        batch: images times draws that pass the decoders at a time: bounds the memory.

    The encoders run once an image, the decoders once a draw. Exact for a model without latents.
    Sources: Burda et al. 2015, section 3; Aitchison 2019 (Tensor Monte Carlo).
    """
    found = bounds(model, x, draws, tmc=tmc, batch=batch)
    return found.tmc if tmc else found.iwae


@torch.no_grad()
def bounds(model: SelfVAE, x: Tensor, draws: int = 64, *, tmc: bool = True, batch: int = 64) -> Bounds:
    """All bounds at once, from the same draws; arguments as for `iwae` (without `tmc`: as `iwae`)."""
    if draws < 1 or batch < 1:
        raise ValueError(f"draws and batch must be at least 1; got {draws} and {batch}")
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
        known = _draw(model, ys, posteriors, nodes, min(chunk, draws - start), tmc)
    weights = [torch.cat(node.log_weight) for node in nodes.values()]
    priors = [torch.cat(node.log_prior) for node in nodes.values()]
    together = torch.stack([*weights, *priors]).sum(0)
    combined = weights[0] + priors[0]
    for node, weight in zip([*nodes.values()][1:], weights[1:], strict=True) if tmc else ():
        # (B, S_i, S_j): for every draw i here the sum over the draws j above
        combined = torch.logsumexp(node.edges() + combined.T[:, None], 2).T + weight
    mean = torch.logsumexp(together, 0) - math.log(draws)
    every = torch.logsumexp(combined, 0) - len(nodes) * math.log(draws)
    return Bounds(known + together.mean(0), known + mean, known + (every if tmc else mean))


def _draw(
    model: SelfVAE,
    ys: list[Tensor],
    posteriors: dict[str, Posterior],
    nodes: dict[str, _Node],
    n: int,
    tmc: bool,
) -> Tensor:
    """Add n draws to the nodes; returns ln p of the images that no latent explains, (B,) nats."""
    top, b = next(iter(nodes)), ys[0].shape[0]
    many = [y.repeat(n, 1, 1, 1) for y in ys]
    wide = {name: q.repeat(n) for name, q in posteriors.items()}
    known = torch.zeros(b, dtype=torch.float64, device=ys[0].device)

    def provider(name: str, p: Any) -> Tensor:
        if name[0] == "y":
            y = many[int(name[1:])]
            score = p.log_prob(y).view(n, b).double()
            if "z" + name[1:] in nodes:
                nodes["z" + name[1:]].log_weight[-1] += score
            else:
                known.add_(score[0])
            return y
        node, z = nodes[name], wide[name].sample()
        node.log_weight.append(-wide[name].log_prob(z).view(n, b).double())
        node.log_prior.append(p.log_prob(z).view(n, b).double())
        if tmc and name != top:
            for values, kept in ((z, node.z), (p.mean, node.mean), (p.log_var, node.log_var)):
                kept.append(values.reshape(n, b, -1))
        return z

    model.walk(provider, many[-1][:, :0])
    return known
