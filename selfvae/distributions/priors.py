"""Priors of the top latent, p(u): modules whose forward returns a distribution.

Their context is an image without channels, from which they take only the size. (The conditional priors of
the other levels are networks, `nn.networks.PriorNet`.)
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
from selfvae.nn.flows import AutoregressiveFlow, RealNVP, dense_network, residual_network
from selfvae.transforms import at_least_float32

__all__ = [
    "TOP_PRIORS",
    "AutoregressivePrior",
    "FlowDistribution",
    "FlowPrior",
    "LatentDistribution",
    "LocalMixturePrior",
    "LogisticPrior",
    "MixturePrior",
    "NormalPrior",
    "ResidualFlowPrior",
]


_LEAST_VAR = math.exp(-7)  # of a component of `MixturePrior`
_PSEUDO = 3.0  # posteriors that the common variance counts for when a mixture is fitted
_FITTED = 1024  # posteriors at a time


class LatentDistribution(Protocol):
    """The distribution of a latent z (B, C, h, w), as a prior returns it."""

    def log_prob(self, z: Tensor) -> Tensor: ...
    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor: ...
    def mode(self) -> Tensor: ...


class _TopPrior(nn.Module):
    """A prior of a latent with one position per `stride` x `stride` pixels of the top image.

    The image's height and width must be divisible by `multiple`.
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
    """A learnt mixture of diagonal Gaussians over the whole latent, with equal weights.

    Args:
        latent: Channels.
        stride: Pixels per position.
        size: Height and width of the latent. An image of any other size raises a ValueError.
        components: Number of Gaussians.

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
        return self._mixture(shape[0])

    def _mixture(self, count: int) -> GaussianMixture:
        return GaussianMixture(self.means, torch.log(F.softplus(self.raw_vars) + _LEAST_VAR), count)

    @torch.no_grad()
    def fit(self, mean: Tensor, var: Tensor, rounds: int = 10) -> None:
        """Fit the mixture to normal posteriors, by expectation maximisation from random ones of them.

        Args:
            mean, var: of the posteriors, (N, C, h, w).
            rounds: of the iteration.
        """
        n = len(self.means)
        first = torch.randperm(len(mean), device=mean.device).repeat(-(-n // len(mean)))[:n]
        equal = var.mean(0).expand_as(self.means)
        self._set(mean[first], equal)
        for i in range(rounds):
            # sums over posteriors, by component: of weights, means and squares
            total = mean.new_zeros(n, 1), torch.zeros_like(self.means), torch.zeros_like(self.means)
            mixture = self._mixture(1)
            for m, v in zip(mean.split(_FITTED), var.split(_FITTED), strict=True):
                weights = torch.softmax(mixture.component_log_probs(m, v), 1).T.to(m.dtype)
                for sums, values in zip(total, (torch.ones_like(m[:, 0, 0, :1]), m, m**2 + v), strict=True):
                    sums += (weights @ values.flatten(1)).view_as(sums)
            size = total[0].view(-1, 1, 1, 1)
            means = torch.where(size > 0.5, total[1] / size, self.means)
            spread = (total[2] - 2 * means * total[1] + means**2 * size).clamp(min=0)
            # few posteriors do not tell a variance: that within all components counts like some more
            common = spread.sum(0) / len(mean)
            own = (spread + _PSEUDO * common) / (size + _PSEUDO)
            self._set(means, own if i >= rounds // 2 else equal)  # equal ones divide more evenly

    def _set(self, means: Tensor, var: Tensor) -> None:
        self.means.copy_(means)
        var = (var - _LEAST_VAR).clamp(min=1e-6)
        self.raw_vars.copy_(var + torch.log(-torch.expm1(-var)))  # inverts softplus


class LocalMixturePrior(_TopPrior):
    """A learnt mixture of diagonal Gaussians over the channels of each position, for any size."""

    def __init__(self, latent: int, stride: int, components: int = 10) -> None:
        super().__init__(latent, stride)
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, latent))
        self.raw_log_vars = nn.Parameter(torch.zeros(components, latent))

    def forward(self, y: Tensor, z: Tensor | None) -> LatentDistribution:
        b, _, h, w = self.shape(y)
        return LocalGaussianMixture(self.logits, self.means, soft_limit(self.raw_log_vars), (b, h, w))


class LogisticPrior(_TopPrior):
    """A learnt logistic per channel, for latents whose posterior is a `UnitUniform`."""

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
    """The distribution of z = flow.inverse(noise) for Gaussian noise; log_prob is in nats, (B,).

    Args:
        flow: maps latents (B, C, h, w) to noise of that shape, and returns ln |det| (B,) with it.
        shape: (B, C, h, w).
        like: a tensor of the dtype and on the device of the draws.
    """

    def __init__(
        self, flow: RealNVP | AutoregressiveFlow, shape: tuple[int, int, int, int], like: Tensor
    ) -> None:
        self.flow, self.shape, self.device, self.dtype = flow, shape, like.device, like.dtype

    def log_prob(self, z: Tensor) -> Tensor:
        noise, log_det = self.flow(at_least_float32(z))
        zeros = torch.zeros_like(noise)
        return DiagonalNormal(zeros, zeros).log_prob(noise) + log_det

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.shape, dtype=self.dtype, device=self.device, generator=generator)
        return self.flow.inverse(temperature * noise)

    def mode(self) -> Tensor:
        """Return z of the noise's mode, which is in general not the mode of z's density."""
        return self.flow.inverse(torch.zeros(self.shape, dtype=self.dtype, device=self.device))


class _FlowPrior(_TopPrior):
    def __init__(self, latent: int, stride: int, flow: RealNVP | AutoregressiveFlow) -> None:
        super().__init__(latent, stride)
        self.flow, self.multiple = flow, flow.multiple * stride

    def forward(self, y: Tensor, z: Tensor | None) -> LatentDistribution:
        return FlowDistribution(self.flow, self.shape(y), y)


class FlowPrior(_FlowPrior):
    """RealNVP with dense blocks in its couplings, as published."""

    def __init__(
        self, latent: int, stride: int, growth: int = 64, steps: int = 5, inner_elu: bool = True
    ) -> None:
        network = partial(dense_network, growth=growth, steps=steps, inner_elu=inner_elu)
        super().__init__(latent, stride, RealNVP(latent, network, halves=True))


class ResidualFlowPrior(_FlowPrior):
    """RealNVP with residual networks in its couplings."""

    def __init__(self, latent: int, stride: int, hidden: int = 64, blocks: int = 5) -> None:
        network = partial(residual_network, hidden=hidden, blocks=blocks)
        super().__init__(latent, stride, RealNVP(latent, network, halves=False))


class AutoregressivePrior(_FlowPrior):
    """A flow by which each position of the latent depends on those before it."""

    def __init__(self, latent: int, stride: int, width: int = 128, steps: int = 2) -> None:
        super().__init__(latent, stride, AutoregressiveFlow(latent, width, steps))


TOP_PRIORS: dict[str, type[_TopPrior]] = {
    "normal": NormalPrior,
    "mog": MixturePrior,
    "mog-local": LocalMixturePrior,
    "flow": FlowPrior,
    "flow-residual": ResidualFlowPrior,
    "flow-autoregressive": AutoregressivePrior,
    "logistic": LogisticPrior,
}
