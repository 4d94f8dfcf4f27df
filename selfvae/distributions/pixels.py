"""The likelihood of pixels: a mixture of discretized logistics, truncated to the possible values.

Entries are in coding order, (B, G, C, h, w): G groups of C channels (see `transforms.Support`). Each group
and position has a mixture of M components. A component is one logistic per channel, whose mean is shifted
by the earlier channels of the same position. Means and scales are in grey levels, so that differences
between a value and a mean are exact where they matter; the networks see values in [-1, 1].

Source: docs/spec.md, sections Likelihood and Consistency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvae.transforms import ImageSpec, Support, at_least_float32

__all__ = ["PixelMixture", "log1mexp", "param_count", "param_grid", "rand_like", "to_unit"]

LOG_SCALE_FLOOR = -7.0  # on the [-1, 1] scale: a bin can hold at most 0.973 of the mass
LOG_SCALE_TOP = 7.0  # flatter logistics do not differ
# log-scale for a network output of zero, and change of a mean per unit of output: residuals around a
# prediction are small
LOG_SCALE_START, LOG_SCALE_START_RESIDUAL = -1.5, -3.5
REACH, REACH_RESIDUAL = 1.0, 0.1

# grids of integer networks: fractional bits, and the largest absolute value in steps
LOGIT, MEAN, SCALE, COEFFICIENT = (3, 255), (9, 2**15 - 1), (4, 255), (8, 1023)


def rand_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw uniform numbers of x's shape; the same ones for every memory layout of x.

    Args:
        x: Gives shape, dtype and device.
        generator: On x's device; None: torch's global random state.
    """
    return torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def to_unit(x: Tensor, num_values: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale values 0..num_values-1, uint8 or float, to [-1, 1], the networks' range."""
    return x.to(dtype) * (2.0 / (num_values - 1)) - 1.0


def param_count(channels: int, components: int) -> int:
    """Return the number of parameters per pixel.

    Each component has a weight, C means, C scales and C(C-1)/2 coefficients.

    >>> param_count(3, 10)
    100
    """
    return components * (1 + 2 * channels + channels * (channels - 1) // 2)


def param_grid(channels: int, components: int, groups: int, params: int) -> tuple[Tensor, Tensor]:
    """Return the grids to which integer networks round the parameters.

    Args:
        channels: Of the pixels.
        components: Of the mixture.
        groups: Number of groups.
        params: Number of outputs; those beyond the groups' parameters are weights (see `Support.refine`).

    Returns:
        Fractional bits and the largest absolute value in steps, int64 (params,) both.
    """
    pairs = channels * (channels - 1) // 2
    counts = [components, components * channels, components * channels, components * pairs]
    order = [LOGIT, MEAN, SCALE, COEFFICIENT]
    own = [grid for grid, n in zip(order, counts, strict=True) for _ in range(n)] * groups
    grids = torch.tensor(own + [COEFFICIENT] * (params - len(own)))
    return grids[:, 0], grids[:, 1]


def log1mexp(d: Tensor) -> Tensor:
    """Return ln(1 - e^-d) for d > 0; 0 at infinity."""
    return torch.log(-torch.expm1(-d))


def _log_sigmoid_ratio(t: Tensor, e: Tensor) -> Tensor:
    """Return ln sigmoid(t) - ln sigmoid(t + e) for e >= 0, without cancellation for any t."""
    linear = torch.maximum(t.clamp(max=0.0), -e)
    return linear - torch.log1p(torch.exp(-t.abs())) + torch.log1p(torch.exp(-(t + e).abs()))


@dataclass(frozen=True)
class _Components:
    """Means and inverse scales (B, G, C, M, h, w), and coefficients (B, G, C(C-1)/2, M, h, w)."""

    means: Tensor
    inverse_scales: Tensor
    coefs: Tensor


@dataclass(frozen=True)
class Logistics:
    """Logistics of one channel, one per entry: means in grey levels and inverse scales, of one shape."""

    mean: Tensor
    inverse_scale: Tensor
    max_value: int

    def log_mass(self, v: Tensor, bounds: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return ln P(v), nats, for v that broadcasts with the means.

        With bin edges a < b, P = sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a-b)); the bins
        of the lowest and highest values extend to infinity. Under truncation each factor is divided by
        that of the interval.

        Args:
            v: Values.
            bounds: The interval (lo, hi) of each entry, inclusive; None: not truncated.
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

    def expectation(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Return the means of values that lie in lo..hi, inclusive; in a far tail the nearest value.

        With clamp(x) = min(max(x, lo), hi) and bin edges a and b, the integral of clamp(x) f(x) from a to b
        is hi F(b) - lo F(a) minus that of F from lo to hi, which is a difference of softplus functions.
        """
        inv, lo, hi = self.inverse_scale, lo.to(self.mean.dtype), hi.to(self.mean.dtype)
        below = torch.where(lo <= 0, 0.0, torch.sigmoid((lo - 0.5 - self.mean) * inv))
        above = torch.where(hi >= self.max_value, 1.0, torch.sigmoid((hi + 0.5 - self.mean) * inv))
        area = (F.softplus((hi - self.mean) * inv) - F.softplus((lo - self.mean) * inv)) / inv
        mass = above - below
        inside = (hi * above - lo * below - area) / mass.clamp(min=1e-2)
        at = torch.where(mass > 1e-2, inside, self.mean)
        return torch.maximum(torch.minimum(at, hi), lo)

    def sample(
        self, bounds: tuple[Tensor, Tensor], temperature: float, generator: torch.Generator | None
    ) -> Tensor:
        """Draw a value within the bounds by the inverse distribution function in the log domain: int64."""
        lo, hi = (edge.to(self.mean.dtype) for edge in bounds)
        inv = self.inverse_scale / max(temperature, 1e-6)
        # mirrored so that the interval lies in the lower tail, where ln sigmoid is precise
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
    """p(x | y, z): mixtures of discretized logistics over the entries of x that y does not determine.

    Args:
        params: A network's output (B, G, P, h, w) with P = `param_count`.
        support: Lays out x as entries and bounds their values.
        spec: Of x.
        prediction: An estimate of the entries, (B, G, C, h, w), in grey levels, added to the means of all
            components; the support refines it as entries become known.
        coefficients: "raw", as in PixelCNN++: they multiply the values of earlier channels; "residual":
            the differences of these values from the component's means.

    Raises:
        ValueError: The number of parameters fits no number of components.

    Source: Salimans et al. 2017 (PixelCNN++), section 2.1; for the truncation docs/spec.md, section
    Consistency.
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
            self.offsets = (means * REACH + 1.0) * half
            scales = scales + LOG_SCALE_START
        else:
            self.offsets = means * (REACH_RESIDUAL * half)
            scales = scales + LOG_SCALE_START_RESIDUAL
        log_scale = LOG_SCALE_FLOOR + F.softplus(scales - LOG_SCALE_FLOOR)
        self.inverse_scales = torch.exp(-log_scale.clamp(max=LOG_SCALE_TOP)) / half
        self.coefs = torch.tanh(coefs)

    def _bounds(self, v: Tensor) -> tuple[Tensor, Tensor] | None:
        return self.support.bounds(v) if self.support.truncates else None

    def means(self, v: Tensor) -> Tensor:
        """Return the components' means before the shift by earlier channels: (B, G, C, M, h, w).

        Args:
            v: Entries, int64 (B, G, C, h, w), in coding order.
        """
        if self.prediction is None:
            return self.offsets
        return self.offsets + self.support.refine(self.prediction, v)[:, :, :, None]

    def group_means(self, v: Tensor, group: int) -> Tensor:
        """Return `means` of one group only: (B, C, M, h, w), given the entries of earlier groups."""
        if self.prediction is None:
            return self.offsets[:, group]
        refined = self.support.refine_group(self.prediction, v, group)
        return self.offsets[:, group] + refined[:, :, None]

    def _components(self, v: Tensor) -> _Components:
        return _Components(self.means(v), self.inverse_scales, self.coefs)

    def _channel(self, c: int, v: Tensor, p: _Components) -> Logistics:
        """Return the logistics of channel c, (B, G, M, h, w), given the entries v before it."""
        mean, first = p.means[:, :, c], c * (c - 1) // 2
        for j in range(c):
            known = v[:, :, j, None].to(mean.dtype)
            if self.coefficients == "residual":
                known = known - p.means[:, :, j]
            else:
                known = known - self.spec.max_value / 2  # PixelCNN++ works on [-1, 1]
            mean = mean + p.coefs[:, :, first + j] * known
        return Logistics(mean, p.inverse_scales[:, :, c], self.spec.max_value)

    def _component_masses(self, v: Tensor, channels: int) -> Tensor:
        """Return ln of each component's weight times the mass of its first channels: (B, G, M, h, w)."""
        bounds, components = self._bounds(v), self._components(v)
        out = self.logits
        for c in range(channels):
            at = None if bounds is None else (bounds[0][:, :, c, None], bounds[1][:, :, c, None])
            value = v[:, :, c, None].to(out.dtype)
            out = out + self._channel(c, v, components).log_mass(value, at)
        return out

    def log_prob(self, x: Tensor) -> Tensor:
        """Return ln p(x), nats (B,), of images x uint8 (B, C, H, W); -inf where d(x) is not y."""
        v = self.support.split(x).long()
        out = torch.logsumexp(self._component_masses(v, v.shape[2]), 2).flatten(1).sum(1)
        if self.support.restricts:
            out = torch.where(self.support.allows(x), out, -torch.inf)
        return out

    def log_pmf(self, v: Tensor, group: int, channel: int) -> Tensor:
        """Return ln P of each possible value of one group and channel, given the entries before it.

        By the chain rule, the sum over all groups and channels at the true values is `log_prob`.

        Args:
            v: Entries, int64 (B, G, C, h, w); only those before the group and channel matter.
            group: Number of the group.
            channel: Number of the channel in coding order.

        Returns:
            (B, h, w, num_values), nats; -inf outside the interval.
        """
        one = slice(group, group + 1)
        weight = torch.log_softmax(self._component_masses(v, channel)[:, group], 1)  # B, M, h, w
        logistics = self._channel(channel, v, self._components(v))
        mean, inverse_scale = logistics.mean[:, one, ..., None], logistics.inverse_scale[:, one, ..., None]
        logistics = Logistics(mean, inverse_scale, self.spec.max_value)
        values = torch.arange(self.spec.num_values, device=v.device, dtype=weight.dtype)
        bounds = self._bounds(v)
        if bounds is None:
            at = None
            outside = None
        else:
            lo, hi = (edge[:, one, channel, None, :, :, None] for edge in bounds)
            at = (lo, hi)
            outside = (values < lo) | (values > hi)
            values = values.clamp(lo, hi)
        table = weight[:, None, :, :, :, None] + logistics.log_mass(values, at)
        table = torch.logsumexp(table, 2)
        if outside is not None:
            table = table.masked_fill(outside[:, :, 0], -torch.inf)
        return table[:, 0]

    def _fill(
        self, component: Tensor, temperature: float | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Fill in the entries in coding order.

        Args:
            component: Number of the component of each group and position, int64 (B, G, h, w).
            temperature: Of the logistics; None: take their means, rounded.
            generator: On the parameters' device; None: torch's global random state.

        Returns:
            Images, uint8 (B, C, H, W).
        """
        b, groups, channels, _, h, w = self.offsets.shape
        v = torch.zeros(b, groups, channels, h, w, dtype=torch.long, device=self.offsets.device)
        for group in range(groups):
            chosen = self._chosen(group, component, v)
            for channel in range(channels):
                lo, hi = self.support.step_bounds(v, group, channel)
                both = self._channel(channel, v[:, group : group + 1], chosen)
                own = Logistics(both.mean[:, 0, 0], both.inverse_scale[:, 0, 0], self.spec.max_value)
                if temperature is None:
                    value = torch.round(own.mean.clamp(0, self.spec.max_value)).long().clamp(lo, hi)
                else:
                    value = own.sample((lo, hi), temperature, generator)
                v[:, group, channel] = value
        return self.support.merge(v).to(torch.uint8)

    def _chosen(self, group: int, component: Tensor, v: Tensor) -> _Components:
        """Return one component per position of a group, given the entries v of earlier groups."""
        one = slice(group, group + 1)
        at = component[:, one, None, None]

        def select(x: Tensor) -> Tensor:
            return x[:, one].gather(3, at.expand(-1, -1, x.shape[2], -1, -1, -1))

        means = select(self.offsets)
        if self.prediction is not None:
            means = means + self.support.refine_group(self.prediction, v, group)[:, None, :, None]
        return _Components(means, select(self.inverse_scales), select(self.coefs))

    @torch.no_grad()
    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, uint8 (B, C, H, W): components first, then groups and channels in coding order.

        Args:
            temperature: Multiplies the logistics' scales and divides the components' log-weights; 0 is
                `mode`.
            generator: On the parameters' device; None: torch's global random state.
        """
        if temperature <= 0:
            return self.mode()
        noise = -torch.log(-torch.log(rand_like(self.logits, generator).clamp(1e-9, 1 - 1e-7)))
        return self._fill((self.logits / temperature + noise).argmax(2), temperature, generator)

    @torch.no_grad()
    def mode(self) -> Tensor:
        """Return the mean of the most likely component, rounded to a possible value: uint8 (B, C, H, W)."""
        return self._fill(self.logits.argmax(2), None)

    def expectation(self) -> Tensor:
        """Return the mean without regard to what is possible: float (B, C, H, W), differentiable.

        Raises:
            ValueError: Coefficients act on values, not on residuals (these are 0 in the mean).
        """
        if self.coefficients != "residual":
            raise ValueError("the expectation needs coefficients='residual'; got 'raw'")
        offsets = (self.logits.exp()[:, :, None] * self.offsets).sum(3)
        if self.prediction is None:
            return self.support.merge(offsets)
        found: list[Tensor] = []
        for group in range(offsets.shape[1]):
            # entries from this group on change nothing
            known = torch.stack([*found, *offsets[:, group:].detach().unbind(1)], 1)
            found.append(self.support.refine_group(self.prediction, known, group) + offsets[:, group])
        return self.support.merge(torch.stack(found, 1))

    @torch.no_grad()
    def mean(self) -> Tensor:
        """Return the mean, rounded to possible values: uint8 (B, C, H, W).

        Groups and channels follow each other in coding order: where values are restricted, the mean of each
        component is that of the interval which the values before leave possible.
        """
        b, groups, channels, _, h, w = self.offsets.shape
        weights, half = self.logits.exp(), self.spec.max_value / 2
        v = torch.zeros(b, groups, channels, h, w, dtype=torch.long, device=self.offsets.device)
        expected = self.offsets.new_zeros(v.shape)
        for group in range(groups):
            means = self.offsets[:, group]
            if self.prediction is not None:
                means = means + self.support.refine_group(self.prediction, expected, group)[:, :, None]
            for c in range(channels):
                mean = means[:, c]
                if self.coefficients == "raw":  # residuals, in contrast, are 0 in the mean
                    for j in range(c):
                        coefficient = self.coefs[:, group, c * (c - 1) // 2 + j]
                        mean = mean + coefficient * (expected[:, group, j, None] - half)
                lo, hi = self.support.step_bounds(v, group, c)
                own = Logistics(mean, self.inverse_scales[:, group, c], self.spec.max_value)
                expected[:, group, c] = (weights[:, group] * own.expectation(lo[:, None], hi[:, None])).sum(
                    1
                )
                v[:, group, c] = expected[:, group, c].round().long().clamp(lo, hi)
        return self.support.merge(v).to(torch.uint8)
