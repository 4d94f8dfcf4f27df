"""Distributions of the latents: each has log_prob(z) -> (B,) nats and sample(temperature) -> z."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvae.distributions.pixels import log1mexp, rand_like
from selfvae.transforms import at_least_float32

__all__ = [
    "DiagonalNormal",
    "GaussianMixture",
    "LocalGaussianMixture",
    "NoisyLogistic",
    "UnitUniform",
    "soft_limit",
]

_LOG_2PI = math.log(2 * math.pi)


def soft_limit(raw: Tensor, limit: float = 7.0) -> Tensor:
    """Squash to (-limit, limit) with slope 1 at 0, so that no gradient ever vanishes at once."""
    return limit * torch.tanh(raw / limit)


def randn_like(x: Tensor) -> Tensor:
    """Normal numbers of x's shape, the same at the same places whatever x's memory layout."""
    return torch.randn_like(x, memory_format=torch.contiguous_format)


class DiagonalNormal:
    """N(mean, diag(exp(log_var))) over latents (B, C, h, w).

    >>> DiagonalNormal(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).mode().item()
    0.0
    """

    def __init__(self, mean: Tensor, log_var: Tensor) -> None:
        self.mean, self.log_var = at_least_float32(mean), at_least_float32(log_var)

    @classmethod
    def from_params(cls, params: Tensor) -> DiagonalNormal:
        """From a network's output (B, 2C, h, w): means, then raw log-variances, limited to [-7, 7]."""
        mean, raw = at_least_float32(params).chunk(2, 1)
        return cls(mean, soft_limit(raw))

    def log_prob(self, z: Tensor) -> Tensor:
        """ln N(z), nats (B,)."""
        square = (z - self.mean) ** 2 * torch.exp(-self.log_var)
        return -0.5 * (square + self.log_var + _LOG_2PI).flatten(1).sum(1)

    def sample(self, temperature: float = 1.0) -> Tensor:
        """A reparameterised draw (B, C, h, w); temperature scales the standard deviation."""
        noise = randn_like(self.mean)
        return self.mean + temperature * torch.exp(0.5 * self.log_var) * noise

    def mode(self) -> Tensor:
        """The mean (B, C, h, w)."""
        return self.mean

    def repeat(self, n: int) -> DiagonalNormal:
        """The same distribution for n copies of every image: batch B -> n * B, copies outermost."""
        return DiagonalNormal(self.mean.repeat(n, 1, 1, 1), self.log_var.repeat(n, 1, 1, 1))


class UnitUniform:
    """The uniform distribution of width 1 around a mean, over latents (B, C, h, w).

    With a `NoisyLogistic` prior the KL of a draw is what a whole number costs to code: such a latent
    needs no bits-back. The mode is the nearest whole number, which is what gets coded. Source: Balle et al.
    2017.
    """

    def __init__(self, mean: Tensor) -> None:
        self.mean = at_least_float32(mean)

    @classmethod
    def from_params(cls, params: Tensor) -> UnitUniform:
        """From a network's output (B, 2C, h, w): means; the other half is not used."""
        return cls(params.chunk(2, 1)[0])

    def log_prob(self, z: Tensor) -> Tensor:
        """ln of the density, nats (B,): 0 inside, -inf outside."""
        # wider than the box by what rounding takes off a draw
        inside = ((z - self.mean).abs() <= 0.5 + 1e-4).flatten(1).all(1)
        return torch.where(inside, 0.0, -torch.inf)

    def sample(self, temperature: float = 1.0) -> Tensor:
        """A reparameterised draw (B, C, h, w); temperature scales the box, 0 is its mean."""
        return self.mean + temperature * (rand_like(self.mean) - 0.5)

    def mode(self) -> Tensor:
        """The whole number nearest to the mean (B, C, h, w), among the 256 that can be coded."""
        return torch.floor(self.mean + 0.5).clamp(-128, 127)

    def repeat(self, n: int) -> UnitUniform:
        """The same distribution for n copies of every image: batch B -> n * B, copies outermost."""
        return UnitUniform(self.mean.repeat(n, 1, 1, 1))


class NoisyLogistic:
    """A logistic plus uniform noise of width 1, over latents (B, C, h, w): the prior of a `UnitUniform`.

    Its density at a whole number is the probability that a logistic rounds to it.
    """

    def __init__(self, mean: Tensor, log_scale: Tensor) -> None:
        self.mean, self.log_scale = at_least_float32(mean), at_least_float32(log_scale)

    @classmethod
    def from_params(cls, params: Tensor) -> NoisyLogistic:
        """From a network's output (B, 2C, h, w): means, then raw log-scales, limited to [-7, 7]."""
        mean, raw = params.chunk(2, 1)
        return cls(mean, soft_limit(raw))

    def log_prob(self, z: Tensor) -> Tensor:
        """ln of the density, nats (B,)."""
        inverse = torch.exp(-self.log_scale)
        upper, lower = (z - self.mean + 0.5) * inverse, (z - self.mean - 0.5) * inverse
        each = F.logsigmoid(upper) + F.logsigmoid(-lower) + log1mexp(inverse)
        return each.flatten(1).sum(1)

    def sample(self, temperature: float = 1.0) -> Tensor:
        """A whole number, as float (B, C, h, w); temperature scales the logistic."""
        u = rand_like(self.mean).clamp(1e-6, 1 - 1e-6)
        z = self.mean + temperature * torch.exp(self.log_scale) * torch.logit(u)
        return torch.floor(z + 0.5).clamp(-128, 127)

    def mode(self) -> Tensor:
        """The whole number nearest to the mean (B, C, h, w)."""
        return torch.floor(self.mean + 0.5).clamp(-128, 127)


class GaussianMixture:
    """M diagonal Gaussians of equal weight over whole latents (B, C, h, w).

    `means` and `log_vars` are (M, C, h, w): the latent has this one size. `count` is B.
    """

    def __init__(self, means: Tensor, log_vars: Tensor, count: int) -> None:
        self.means, self.log_vars, self.count = means, log_vars, count

    @property
    def logits(self) -> Tensor:
        """ln of the components' weights, up to a constant (M,)."""
        return self.means.new_zeros(len(self.means))

    def log_prob(self, z: Tensor) -> Tensor:
        """ln p(z), nats (B,)."""
        # as matrix products, which need no (B, M, C, h, w); these cancel: in float64
        v, means, log_vars = (t.flatten(1).double() for t in (z, self.means, self.log_vars))
        precision = torch.exp(-log_vars)
        square = v**2 @ precision.T - 2 * v @ (means * precision).T + (means**2 * precision).sum(1)
        each = -0.5 * (square + (log_vars + _LOG_2PI).sum(1))
        out = torch.logsumexp(each, 1) - math.log(len(means))
        return out.to(at_least_float32(z).dtype)

    def sample(self, temperature: float = 1.0) -> Tensor:
        """A draw (B, C, h, w); temperature scales the standard deviations."""
        which = torch.randint(len(self.means), (self.count,), device=self.means.device)
        mean = self.means[which]
        return mean + temperature * torch.exp(0.5 * self.log_vars[which]) * randn_like(mean)

    def mode(self) -> Tensor:
        """The mean of the component that is densest at its own (B, C, h, w)."""
        best = self.log_vars.flatten(1).sum(1).argmin()
        return self.means[best].expand(self.count, -1, -1, -1).contiguous()


class LocalGaussianMixture:
    """At every position of (B, C, h, w), a mixture of M diagonal Gaussians over the C channels.

    `logits` (M,), `means` and `log_vars` (M, C) are shared by all positions, so any size is allowed.
    """

    def __init__(
        self, logits: Tensor, means: Tensor, log_vars: Tensor, shape: tuple[int, int, int]
    ) -> None:
        self.logits, self.means, self.log_vars = logits, means, log_vars
        self.shape = shape  # B, h, w

    def log_prob(self, z: Tensor) -> Tensor:
        """ln p(z), nats (B,)."""
        z = at_least_float32(z)[:, None]  # B, 1, C, h, w
        mean, log_var = self.means[None, :, :, None, None], self.log_vars[None, :, :, None, None]
        square = (z - mean) ** 2 * torch.exp(-log_var)
        each = -0.5 * (square + log_var + _LOG_2PI).sum(2)
        weight = torch.log_softmax(self.logits, 0)[None, :, None, None]
        return torch.logsumexp(weight + each, 1).flatten(1).sum(1)

    def sample(self, temperature: float = 1.0) -> Tensor:
        """A draw (B, C, h, w); temperature scales the standard deviations."""
        b, h, w = self.shape
        pick = torch.multinomial(torch.softmax(self.logits, 0), b * h * w, replacement=True)
        mean, std = self.means[pick], torch.exp(0.5 * self.log_vars[pick])
        z = mean + temperature * std * randn_like(mean)
        return z.view(b, h, w, -1).permute(0, 3, 1, 2).contiguous()

    def mode(self) -> Tensor:
        """The most likely component's mean at every position (B, C, h, w)."""
        b, h, w = self.shape
        return self.means[self.logits.argmax()].view(1, -1, 1, 1).expand(b, -1, h, w).contiguous()
