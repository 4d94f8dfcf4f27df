"""Distributions of latents: each has log_prob(z) -> (B,) nats and sample(temperature, generator) -> z.

A generator must be on the parameters' device; None stands for torch's global random state.
"""

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
    """Limit values smoothly to (-limit, limit), with slope 1 at 0, so that gradients do not vanish."""
    return limit * torch.tanh(raw / limit)


def randn_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw normal numbers of x's shape; the same ones for every memory layout of x."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


class DiagonalNormal:
    """N(mean, diag(exp(log_var))) over latents (B, C, h, w).

    >>> DiagonalNormal(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).mode().item()
    0.0
    """

    def __init__(self, mean: Tensor, log_var: Tensor) -> None:
        self.mean, self.log_var = at_least_float32(mean), at_least_float32(log_var)

    @classmethod
    def from_params(cls, params: Tensor) -> DiagonalNormal:
        """Convert a network's output (B, 2C, h, w): means, then log-variances, limited to (-7, 7)."""
        mean, raw = at_least_float32(params).chunk(2, 1)
        return cls(mean, soft_limit(raw))

    def log_prob(self, z: Tensor) -> Tensor:
        """Return ln N(z), nats (B,)."""
        square = (z - self.mean) ** 2 * torch.exp(-self.log_var)
        return -0.5 * (square + self.log_var + _LOG_2PI).flatten(1).sum(1)

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw z (B, C, h, w), reparameterised; temperature multiplies the standard deviation."""
        noise = randn_like(self.mean, generator)
        return self.mean + temperature * torch.exp(0.5 * self.log_var) * noise

    def mode(self) -> Tensor:
        """Return the mean (B, C, h, w)."""
        return self.mean

    def repeat(self, n: int) -> DiagonalNormal:
        """Repeat the batch n times, copies outermost: B -> n * B."""
        return DiagonalNormal(self.mean.repeat(n, 1, 1, 1), self.log_var.repeat(n, 1, 1, 1))


class UnitUniform:
    """The uniform distribution of width 1 around a mean, over latents (B, C, h, w).

    With a `NoisyLogistic` prior, the KL is the cost of coding an integer, so that no bits-back coding is
    needed. The mode is the integer nearest to the mean, which is the one that is coded.

    Source: Balle et al. 2017.
    """

    def __init__(self, mean: Tensor) -> None:
        self.mean = at_least_float32(mean)

    @classmethod
    def from_params(cls, params: Tensor) -> UnitUniform:
        """Convert a network's output (B, 2C, h, w): means; the second half is not used."""
        return cls(params.chunk(2, 1)[0])

    def log_prob(self, z: Tensor) -> Tensor:
        """Return ln of the density, nats (B,): 0 inside, -inf outside."""
        # with a tolerance for the rounding of draws
        inside = ((z - self.mean).abs() <= 0.5 + 1e-4).flatten(1).all(1)
        return torch.where(inside, 0.0, -torch.inf)

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw z (B, C, h, w), reparameterised; temperature multiplies the width, 0 gives the mean."""
        return self.mean + temperature * (rand_like(self.mean, generator) - 0.5)

    def mode(self) -> Tensor:
        """Return the integer nearest to the mean, within -128..127: (B, C, h, w)."""
        return torch.floor(self.mean + 0.5).clamp(-128, 127)

    def repeat(self, n: int) -> UnitUniform:
        """Repeat the batch n times, copies outermost: B -> n * B."""
        return UnitUniform(self.mean.repeat(n, 1, 1, 1))


class NoisyLogistic:
    """A logistic plus uniform noise of width 1, over latents (B, C, h, w): the prior for `UnitUniform`.

    Its density at an integer is the probability that the logistic is rounded to it.

    Source: Balle et al. 2018.
    """

    def __init__(self, mean: Tensor, log_scale: Tensor) -> None:
        self.mean, self.log_scale = at_least_float32(mean), at_least_float32(log_scale)

    @classmethod
    def from_params(cls, params: Tensor) -> NoisyLogistic:
        """Convert a network's output (B, 2C, h, w): means, then log-scales, limited to (-7, 7)."""
        mean, raw = params.chunk(2, 1)
        return cls(mean, soft_limit(raw))

    def log_prob(self, z: Tensor) -> Tensor:
        """Return ln of the density, nats (B,)."""
        inverse = torch.exp(-self.log_scale)
        upper, lower = (z - self.mean + 0.5) * inverse, (z - self.mean - 0.5) * inverse
        each = F.logsigmoid(upper) + F.logsigmoid(-lower) + log1mexp(inverse)
        return each.flatten(1).sum(1)

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw integers within -128..127, as float (B, C, h, w); temperature multiplies the scale."""
        u = rand_like(self.mean, generator).clamp(1e-6, 1 - 1e-6)
        z = self.mean + temperature * torch.exp(self.log_scale) * torch.logit(u)
        return torch.floor(z + 0.5).clamp(-128, 127)

    def mode(self) -> Tensor:
        """Return the integer nearest to the mean, within -128..127: (B, C, h, w)."""
        return torch.floor(self.mean + 0.5).clamp(-128, 127)


class GaussianMixture:
    """A mixture of M diagonal Gaussians of equal weight over whole latents (B, C, h, w).

    Args:
        means: (M, C, h, w); latents have only this size.
        log_vars: (M, C, h, w).
        count: B.
    """

    def __init__(self, means: Tensor, log_vars: Tensor, count: int) -> None:
        self.means, self.log_vars, self.count = means, log_vars, count

    @property
    def logits(self) -> Tensor:
        """ln of the components' weights, up to a constant (M,)."""
        return self.means.new_zeros(len(self.means))

    def component_log_probs(self, mean: Tensor, var: Tensor | None = None) -> Tensor:
        """Return the expectation of ln of each component's density over independent normal latents.

        Args:
            mean, var: of the latents, (B, C, h, w); without a variance the density is that at the mean.

        Returns:
            float64 (B, M), nats.
        """
        # matrix products, which need no tensor (B, M, C, h, w); in float64 because of cancellation
        v, means, log_vars = (t.flatten(1).double() for t in (mean, self.means, self.log_vars))
        precision = torch.exp(-log_vars)
        second = v**2 if var is None else v**2 + var.flatten(1).double()
        square = second @ precision.T - 2 * v @ (means * precision).T + (means**2 * precision).sum(1)
        return -0.5 * (square + (log_vars + _LOG_2PI).sum(1))

    def log_prob(self, z: Tensor) -> Tensor:
        """Return ln p(z), nats (B,)."""
        out = torch.logsumexp(self.component_log_probs(z), 1) - math.log(len(self.means))
        return out.to(at_least_float32(z).dtype)

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw z (B, C, h, w); temperature multiplies the standard deviations."""
        device = self.means.device
        which = torch.randint(len(self.means), (self.count,), device=device, generator=generator)
        mean = self.means[which]
        return mean + temperature * torch.exp(0.5 * self.log_vars[which]) * randn_like(mean, generator)

    def mode(self) -> Tensor:
        """Return the mean of the component with the highest peak density: (B, C, h, w)."""
        best = self.log_vars.flatten(1).sum(1).argmin()
        return self.means[best].expand(self.count, -1, -1, -1).contiguous()


class LocalGaussianMixture:
    """A mixture of M diagonal Gaussians over the C channels, at each position of (B, C, h, w).

    All positions share the parameters, so that latents may have any size.

    Args:
        logits: ln of the weights, up to a constant: (M,).
        means: (M, C).
        log_vars: (M, C).
        shape: B, h, w.
    """

    def __init__(
        self, logits: Tensor, means: Tensor, log_vars: Tensor, shape: tuple[int, int, int]
    ) -> None:
        self.logits, self.means, self.log_vars = logits, means, log_vars
        self.shape = shape  # B, h, w

    def log_prob(self, z: Tensor) -> Tensor:
        """Return ln p(z), nats (B,)."""
        z = at_least_float32(z)[:, None]  # B, 1, C, h, w
        mean, log_var = self.means[None, :, :, None, None], self.log_vars[None, :, :, None, None]
        square = (z - mean) ** 2 * torch.exp(-log_var)
        each = -0.5 * (square + log_var + _LOG_2PI).sum(2)
        weight = torch.log_softmax(self.logits, 0)[None, :, None, None]
        return torch.logsumexp(weight + each, 1).flatten(1).sum(1)

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw z (B, C, h, w); temperature multiplies the standard deviations."""
        b, h, w = self.shape
        pick = torch.multinomial(torch.softmax(self.logits, 0), b * h * w, True, generator=generator)
        mean, std = self.means[pick], torch.exp(0.5 * self.log_vars[pick])
        z = mean + temperature * std * randn_like(mean, generator)
        return z.view(b, h, w, -1).permute(0, 3, 1, 2).contiguous()

    def mode(self) -> Tensor:
        """Return the mean of the most likely component at each position: (B, C, h, w)."""
        b, h, w = self.shape
        return self.means[self.logits.argmax()].view(1, -1, 1, 1).expand(b, -1, h, w).contiguous()
