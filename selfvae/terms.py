"""The bound: its terms per image, and the importance-weighted version of it. SPEC section 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Terms", "bits_per_dim", "gather"]


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """Code length in nats, any shape -> bits per dimension of x, the same shape."""
    return nats / (math.log(2) * dims)


class Terms(NamedTuple):
    """The terms of the bound, per image (B,), in nats.

    re[k] = -ln p(y[k] | y[k+1], z[k]) and kl[k] = ln q(z[k] | y[k]) - ln p(z[k] | y[k+1], z[k+1]) at one
    draw of the latents, k = 0 (the image) to K; kl[k] is 0 for a level without a latent.
    """

    re: tuple[Tensor, ...]
    kl: tuple[Tensor, ...]

    @property
    def elbo(self) -> Tensor:
        """The one-draw estimate of the bound: nats (B,)."""
        total = self.re[0]
        for term in (*self.re[1:], *self.kl):
            total = total + term
        return -total

    def cpu(self) -> Terms:
        """The same on the CPU."""
        return Terms(*(tuple(term.cpu() for term in kind) for kind in self))

    def bits_per_dim(self, dims: int) -> Tensor:
        """-elbo in bits per dimension (B,); `dims` counts those of x only: C * H * W."""
        return bits_per_dim(-self.elbo, dims)


def gather(terms: Sequence[Terms]) -> tuple[Tensor, Tensor]:
    """re and kl of several batches together: float64 (levels, images) each, nats."""
    re, kl = (torch.cat([torch.stack(kind) for kind in kinds], 1) for kinds in zip(*terms, strict=True))
    return re.double(), kl.double()
