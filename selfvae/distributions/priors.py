"""Priors p(z[k] | y_up, z_up): modules whose forward returns a distribution.

The top level's context is blank (an image without channels that only tells the size), and its priors
look at nothing else; the conditional prior looks at the image and the latent above.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvae.distributions.latents import (
    DiagonalNormal,
    GaussianMixture,
    LocalGaussianMixture,
    NoisyLogistic,
    soft_limit,
)
from selfvae.nn.flows import Network, RealNVP, dense_network, residual_network
from selfvae.transforms import at_least_float32

__all__ = [
    "TOP_PRIORS",
    "FlowDistribution",
    "FlowPrior",
    "LatentDistribution",
    "LocalMixturePrior",
    "LogisticPrior",
    "MixturePrior",
    "NormalPrior",
    "ResidualFlowPrior",
]


class LatentDistribution(Protocol):
    """What a prior returns."""

    def log_prob(self, z: Tensor) -> Tensor: ...
    def sample(self, temperature: float = 1.0) -> Tensor: ...
    def mode(self) -> Tensor: ...


class _TopPrior(nn.Module):
    """`stride` pixels of the top image, in height and width, share one position of the latent.

    `multiple` is what the image's height and width must be divisible by.
    """

    def __init__(self, latent: int, stride: int) -> None:
        super().__init__()
        self.latent, self.stride, self.multiple = latent, stride, stride

    def shape(self, y: Tensor) -> tuple[int, int, int, int]:
        b, _, h, w = y.shape
        if h % self.multiple or w % self.multiple:
            raise ValueError(
                f"the top image's height and width must be divisible by {self.multiple}; got {h} x {w}: "
                "pad or crop the image"
            )
        return b, self.latent, h // self.stride, w // self.stride


class NormalPrior(_TopPrior):
    """The standard normal."""

    def forward(self, y: Tensor, z: Tensor | None) -> LatentDistribution:
        zeros = torch.zeros(self.shape(y), dtype=y.dtype, device=y.device)
        return DiagonalNormal(zeros, zeros)


class MixturePrior(_TopPrior):
    """A learnt mixture of diagonal Gaussians of equal weight over the whole latent, of one size.

    size: height and width of the latent; images of any other size are a ValueError.

    Source: Gatopoulos & Tomczak 2020, table 7.1 of the thesis.
    """

    def __init__(self, latent: int, stride: int, size: tuple[int, int], components: int = 1000) -> None:
        super().__init__(latent, stride)
        self.means = nn.Parameter(torch.randn(components, latent, *size))
        # variances of 1: softplus(ln(e - 1)) = 1
        self.raw_vars = nn.Parameter(torch.full((components, latent, *size), math.log(math.e - 1)))

    def forward(self, y: Tensor, z: Tensor | None) -> LatentDistribution:
        shape, own = self.shape(y), self.means.shape[1:]
        if shape[1:] != own:
            raise ValueError(
                f"the mixture prior is over latents of {own[1]} x {own[2]}, so the top image must have "
                f"{own[1] * self.stride} x {own[2] * self.stride} pixels; got {y.shape[2]} x {y.shape[3]}: "
                "use prior='mog-local' or 'flow' for other sizes"
            )
        log_vars = torch.log(F.softplus(self.raw_vars) + math.exp(-7))
        return GaussianMixture(self.means, log_vars, shape[0])


class LocalMixturePrior(_TopPrior):
    """A learnt mixture of diagonal Gaussians over the channels of every position; for any size."""

    def __init__(self, latent: int, stride: int, components: int = 10) -> None:
        super().__init__(latent, stride)
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, latent))
        self.raw_log_vars = nn.Parameter(torch.zeros(components, latent))

    def forward(self, y: Tensor, z: Tensor | None) -> LatentDistribution:
        b, _, h, w = self.shape(y)
        return LocalGaussianMixture(self.logits, self.means, soft_limit(self.raw_log_vars), (b, h, w))


class LogisticPrior(_TopPrior):
    """A learnt logistic for every channel, for latents whose posterior is a `UnitUniform`."""

    def __init__(self, latent: int, stride: int) -> None:
        super().__init__(latent, stride)
        self.mean = nn.Parameter(torch.zeros(latent))
        self.raw_log_scale = nn.Parameter(torch.zeros(latent))

    def forward(self, y: Tensor, z: Tensor | None) -> LatentDistribution:
        shape = self.shape(y)
        mean, log_scale = (
            p.view(1, -1, 1, 1).expand(shape) for p in (self.mean, soft_limit(self.raw_log_scale))
        )
        return NoisyLogistic(mean, log_scale)


class FlowDistribution:
    """What a flow makes of Gaussian noise."""

    def __init__(self, flow: RealNVP, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.flow, self.shape, self.device, self.dtype = flow, shape, like.device, like.dtype

    def log_prob(self, z: Tensor) -> Tensor:
        noise, log_det = self.flow(at_least_float32(z))
        zeros = torch.zeros_like(noise)
        return DiagonalNormal(zeros, zeros).log_prob(noise) + log_det

    def sample(self, temperature: float = 1.0) -> Tensor:
        return self.flow.inverse(
            temperature * torch.randn(self.shape, dtype=self.dtype, device=self.device)
        )

    def mode(self) -> Tensor:
        """The image of the noise's mode, not in general the density's."""
        return self.flow.inverse(torch.zeros(self.shape, dtype=self.dtype, device=self.device))


class _FlowPrior(_TopPrior):
    def __init__(self, latent: int, stride: int, network: Network, halves: bool) -> None:
        super().__init__(latent, stride)
        self.flow = RealNVP(latent, network, halves)
        self.multiple = 2 * stride  # its squeeze needs latents of even height and width

    def forward(self, y: Tensor, z: Tensor | None) -> LatentDistribution:
        return FlowDistribution(self.flow, self.shape(y), y)


class FlowPrior(_FlowPrior):
    """RealNVP over Gaussian noise; the networks of its couplings are dense blocks (the papers')."""

    def __init__(
        self, latent: int, stride: int, growth: int = 64, steps: int = 5, inner_elu: bool = True
    ) -> None:
        network = partial(dense_network, growth=growth, steps=steps, inner_elu=inner_elu)
        super().__init__(latent, stride, network, halves=True)


class ResidualFlowPrior(_FlowPrior):
    """RealNVP over Gaussian noise; the networks of its couplings are residual."""

    def __init__(self, latent: int, stride: int, hidden: int = 64, blocks: int = 5) -> None:
        network = partial(residual_network, hidden=hidden, blocks=blocks)
        super().__init__(latent, stride, network, halves=False)


TOP_PRIORS: dict[str, type[_TopPrior]] = {
    "normal": NormalPrior,
    "mog": MixturePrior,
    "mog-local": LocalMixturePrior,
    "flow": FlowPrior,
    "flow-residual": ResidualFlowPrior,
    "logistic": LogisticPrior,
}
