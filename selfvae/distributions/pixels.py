"""The likelihood of pixels: a mixture of discretized logistics, truncated to what y still allows.

Entries are in coding order, (B, G, C, h, w): G groups of C channels (see `transforms.Support`). Every
group and position has its own mixture of M components; a component is one logistic per channel, whose
mean is shifted by the earlier channels of the same position. Internally one level is the unit, so that
differences between a value and a mean are exact where they matter; the networks see [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvae.transforms import ImageSpec, Support, at_least_float32

__all__ = ["PixelMixture", "log1mexp", "param_count", "rand_like", "to_unit"]

_LOG_SCALE_FLOOR = -7.0  # on the [-1, 1] scale: a bin may hold 0.973 of the mass
_LOG_SCALE_TOP = 7.0  # beyond it a logistic is flat for every purpose
# what a network's zero output stands for, and how far an output of one moves a mean: around an anchor
# the residuals are small
_LOG_SCALE_START, _LOG_SCALE_START_RESIDUAL = -1.5, -3.5
_REACH, _REACH_RESIDUAL = 1.0, 0.1


def rand_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform numbers of x's shape, the same at the same places whatever x's memory layout.

    generator: on x's device; None: torch's global random state.
    """
    return torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def to_unit(x: Tensor, num_values: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values 0..num_values-1 (uint8 or float) -> [-1, 1], what the networks see."""
    return x.to(dtype) * (2.0 / (num_values - 1)) - 1.0


def param_count(channels: int, components: int) -> int:
    """Parameters a pixel: for every component a weight, C means, C scales, C(C-1)/2 coefficients."""
    return components * (1 + 2 * channels + channels * (channels - 1) // 2)


def log1mexp(d: Tensor) -> Tensor:
    """ln(1 - e^-d) for d > 0; 0 at infinity."""
    return torch.log(-torch.expm1(-d))


def _log_sigmoid_ratio(t: Tensor, e: Tensor) -> Tensor:
    """ln sigmoid(t) - ln sigmoid(t + e) for e >= 0, without cancellation wherever t lies."""
    linear = torch.maximum(t.clamp(max=0.0), -e)
    return linear - torch.log1p(torch.exp(-t.abs())) + torch.log1p(torch.exp(-(t + e).abs()))


@dataclass(frozen=True)
class _Logistics:
    """The components of one channel: means in levels, inverse scales (1/levels); (B, G, M, h, w)."""

    mean: Tensor
    inverse_scale: Tensor
    max_value: int

    def log_mass(self, v: Tensor, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
        """ln P(v), nats, for v that broadcasts with mean; truncated to bounds = (lo, hi) if given.

        With bin edges a < b, P = sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a-b)); the
        lowest and the highest level reach to infinity. Each factor is divided by the interval's.
        """
        inv, top, inf = self.inverse_scale, self.max_value, torch.inf
        at_bottom, at_top = v <= 0, v >= top
        offset = v - self.mean  # exact where v is near the mean
        b = torch.where(at_top, inf, (offset + 0.5) * inv)
        minus_a = torch.where(at_bottom, inf, (0.5 - offset) * inv)
        width = torch.where(at_top | at_bottom, inf, inv)
        if bounds is None:
            return F.logsigmoid(b) + F.logsigmoid(minus_a) + log1mexp(width)
        lo, hi = (edge.to(self.mean.dtype) for edge in bounds)
        above = torch.where(hi >= top, inf, (hi - v) * inv)
        below = torch.where(lo <= 0, inf, (v - lo) * inv)
        full = torch.where((hi >= top) | (lo <= 0), inf, (hi - lo + 1) * inv)
        above = torch.where(at_top, 0.0, above)
        below = torch.where(at_bottom, 0.0, below)
        ratio = _log_sigmoid_ratio(b, above) + _log_sigmoid_ratio(minus_a, below)
        return ratio + log1mexp(width) - log1mexp(full)

    def sample(
        self, bounds: tuple[Tensor, Tensor], temperature: float, generator: torch.Generator | None
    ) -> Tensor:
        """A value in the bounds, by the inverse distribution function in the log domain; int64."""
        lo, hi = (edge.to(self.mean.dtype) for edge in bounds)
        inv = self.inverse_scale / max(temperature, 1e-6)
        # mirrored so that the interval lies in the lower tail, where ln sigmoid keeps its digits
        flip = torch.where((lo + hi) / 2 > self.mean, -1.0, 1.0)
        low = torch.where(lo <= 0, -torch.inf, (lo - 0.5 - self.mean) * inv)
        high = torch.where(hi >= self.max_value, torch.inf, (hi + 0.5 - self.mean) * inv)
        low, high = torch.where(flip < 0, -high, low), torch.where(flip < 0, -low, high)
        u = rand_like(self.mean, generator).clamp(1e-7, 1 - 1e-7)
        log_u = torch.logaddexp(
            F.logsigmoid(low) + torch.log1p(-u), F.logsigmoid(high) + torch.log(u)
        ).clamp(max=-1e-7)
        value = self.mean + flip * (log_u - log1mexp(-log_u)) / inv
        return torch.round(value).clamp(lo, hi).long()


class PixelMixture:
    """p(x | y, z): discretized logistic mixtures over the entries that y leaves open.

    `params` is a network's output (B, G, P, h, w) with P = `param_count`; `support` lays out x and gives
    the intervals; `prediction` (B, G, C, h, w), in pixel values, refined by the support as entries become
    known, is added to every component's mean. Coefficients act on the earlier channels' values ("raw", in
    PixelCNN++) or on their distance from the component's own mean ("residual").

    Source: Salimans et al. 2017 (PixelCNN++), section 2.1; docs/spec.md, section
    Consistency, for the truncation.
    """

    def __init__(
        self,
        params: Tensor,
        support: Support,
        spec: ImageSpec,
        *,
        prediction: Tensor | None = None,
        coefficients: Literal["raw", "residual"] = "raw",
    ) -> None:
        c = spec.channels
        b, g, p, h, w = params.shape
        m = p // param_count(c, 1)
        if p != param_count(c, m) or m < 1:
            raise ValueError(
                f"params must have a multiple of {param_count(c, 1)} channels for {c}-channel "
                f"pixels; got {p}"
            )
        self.support, self.spec = support, spec
        self.coefficients = coefficients
        logits, means, scales, coefs = (
            at_least_float32(params).view(b, g, p // m, m, h, w).split([1, c, c, c * (c - 1) // 2], 2)
        )
        half = spec.max_value / 2
        self.logits = torch.log_softmax(logits[:, :, 0], 2)  # B, G, M, h, w
        self.prediction = prediction
        if prediction is None:
            self.offsets = (means * _REACH + 1.0) * half
            scales = scales + _LOG_SCALE_START
        else:
            self.offsets = means * (_REACH_RESIDUAL * half)
            scales = scales + _LOG_SCALE_START_RESIDUAL
        log_scale = _LOG_SCALE_FLOOR + F.softplus(scales - _LOG_SCALE_FLOOR)
        self.inverse_scales = torch.exp(-log_scale.clamp(max=_LOG_SCALE_TOP)) / half
        self.coefs = torch.tanh(coefs)

    def _bounds(self, v: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.support.bounds(v) if self.support.truncates else None

    def means(self, v: Tensor) -> Tensor:
        """The components' means before the channels' coefficients: (B, G, C, M, h, w), levels."""
        if self.prediction is None:
            return self.offsets
        return self.offsets + self.support.refine(self.prediction, v)[:, :, :, None]

    def _channel(self, c: int, v: Tensor, means: Tensor) -> _Logistics:
        """The logistics of channel c given `means` and the entries v of the channels before it."""
        mean, first = means[:, :, c], c * (c - 1) // 2
        for j in range(c):
            known = v[:, :, j, None].to(mean.dtype)
            if self.coefficients == "residual":
                known = known - means[:, :, j]
            else:
                known = known - self.spec.max_value / 2  # PixelCNN++ works on [-1, 1]
            mean = mean + self.coefs[:, :, first + j] * known
        return _Logistics(mean, self.inverse_scales[:, :, c], self.spec.max_value)

    def _component_masses(self, v: Tensor, channels: int) -> Tensor:
        """ln of every component's weight times its mass of the first channels: (B, G, M, h, w)."""
        bounds, means = self._bounds(v), self.means(v)
        out = self.logits
        for c in range(channels):
            at = None if bounds is None else (bounds[0][:, :, c, None], bounds[1][:, :, c, None])
            value = v[:, :, c, None].to(out.dtype)
            out = out + self._channel(c, v, means).log_mass(value, at)
        return out

    def log_prob(self, x: Tensor) -> Tensor:
        """ln p(x), nats (B,), of images x uint8 (B, C, H, W); -inf where y rules x out."""
        v = self.support.split(x).long()
        out = torch.logsumexp(self._component_masses(v, v.shape[2]), 2).flatten(1).sum(1)
        if self.support.restricts:
            out = torch.where(self.support.allows(x), out, -torch.inf)
        return out

    def log_pmf(self, v: Tensor, group: int, channel: int) -> Tensor:
        """ln P of every level at one step of the coding order, given the entries before it.

        v: int64 (B, G, C, h, w); only earlier groups and channels are looked at. Returns
        (B, h, w, levels) nats, -inf outside the interval. By the chain rule the steps sum to `log_prob`.
        """
        one = slice(group, group + 1)
        weight = torch.log_softmax(self._component_masses(v, channel)[:, group], 1)  # B, M, h, w
        logistics = self._channel(channel, v, self.means(v))
        logistics = _Logistics(
            logistics.mean[:, one, ..., None], logistics.inverse_scale[:, one, ..., None],
            self.spec.max_value,
        )  # fmt: skip
        levels = torch.arange(self.spec.num_values, device=v.device, dtype=weight.dtype)
        bounds = self._bounds(v)
        if bounds is None:
            at = None
            outside = None
        else:
            lo, hi = (edge[:, one, channel, None, :, :, None] for edge in bounds)
            at = (lo, hi)
            outside = (levels < lo) | (levels > hi)
            levels = levels.clamp(lo, hi)
        table = weight[:, None, :, :, :, None] + logistics.log_mass(levels, at)
        table = torch.logsumexp(table, 2)
        if outside is not None:
            table = table.masked_fill(outside[:, :, 0], -torch.inf)
        return table[:, 0]

    def _fill(
        self,
        pick_component: Tensor,
        temperature: float | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Go through the coding order with one component per position; None takes its mean."""
        b, g, c, _, h, w = self.offsets.shape
        v = torch.zeros(b, g, c, h, w, dtype=torch.long, device=self.offsets.device)
        pick = pick_component[:, :, None]
        for group in range(g):
            for channel in range(c):
                lo, hi = self.support.bounds(v)
                lo, hi = lo[:, group, channel], hi[:, group, channel]
                every = self._channel(channel, v, self.means(v))
                one = _Logistics(
                    every.mean.gather(2, pick)[:, group, 0],
                    every.inverse_scale.gather(2, pick)[:, group, 0],
                    self.spec.max_value,
                )
                if temperature is None:
                    value = torch.round(one.mean.clamp(0, self.spec.max_value)).long().clamp(lo, hi)
                else:
                    value = one.sample((lo, hi), temperature, generator)
                v[:, group, channel] = value
        return self.support.merge(v).to(torch.uint8)

    @torch.no_grad()
    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """A draw, uint8 (B, C, H, W): the component, then channel after channel, phase after phase.

        temperature scales the logistics and sharpens the choice of component; 0 is `mode`.
        generator: on the parameters' device; None: torch's global random state.
        """
        if temperature <= 0:
            return self.mode()
        noise = -torch.log(-torch.log(rand_like(self.logits, generator).clamp(1e-9, 1 - 1e-7)))
        return self._fill((self.logits / temperature + noise).argmax(2), temperature, generator)

    @torch.no_grad()
    def mode(self) -> Tensor:
        """The most likely component's mean, rounded to a possible level: uint8 (B, C, H, W)."""
        return self._fill(self.logits.argmax(2), None)
