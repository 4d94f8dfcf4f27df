"""The terms of the variational bound, per image. See docs/spec.md, section Bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Terms", "bits_per_dim", "gather"]


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """Convert nats to bits per dimension.

    Args:
        nats: code lengths of images, any shape.
        dims: dimensions of an image x, C * H * W.

    Returns:
        nats' shape.
    """
    return nats / (math.log(2) * dims)


class Terms(NamedTuple):
    """The terms of the bound at one draw of the latents, for levels k = 0 (the image) to K.

    Attributes:
        re: reconstruction errors, re[k] = -ln p(y[k] | y[k+1], z[k]): (B,) nats each.
        kl: kl[k] = ln q(z[k] | y[k]) - ln p(z[k] | y[k+1], z[k+1]), (B,) nats each, whose expectation is a
            Kullback-Leibler divergence; 0 for a level without a latent.
        errors: mean absolute differences of y[k] and its expectation, grey levels (B,) each, of all levels
            but the top; empty unless they were asked for.
    """

    re: tuple[Tensor, ...]
    kl: tuple[Tensor, ...]
    errors: tuple[Tensor, ...] = ()

    @property
    def elbo(self) -> Tensor:
        """The bound's estimate by this draw, -(sum of re and kl): (B,) nats."""
        total = self.re[0]
        for term in (*self.re[1:], *self.kl):
            total = total + term
        return -total

    def cpu(self) -> Terms:
        """The same terms on the CPU."""
        return Terms(*(tuple(term.cpu() for term in kind) for kind in self))

    def bits_per_dim(self, dims: int) -> Tensor:
        """-elbo in bits per dimension (B,); `dims` are those of x only, C * H * W."""
        return bits_per_dim(-self.elbo, dims)


def gather(terms: Sequence[Terms]) -> tuple[Tensor, Tensor]:
    """Join re and kl of several batches: float64 (levels, images) each, nats."""
    kinds = [term.re for term in terms], [term.kl for term in terms]
    re, kl = (torch.cat([torch.stack(one) for one in kind], 1) for kind in kinds)
    return re.double(), kl.double()
