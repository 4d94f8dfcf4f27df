"""Pixels that depend on each other: the mixture of a level whose network also sees the pixels before.

The groups of a block follow each other as in `pixels.PixelMixture`, each over the whole image. Within a
group a pixel sees those above it, and those to its left, in a window of the grid, or none of them. Scoring
computes all positions at once. Sampling and decoding proceed in waves: positions of one wave lie on a
slanted line, see only earlier waves, and are computed together. Without windows a group is one wave.

Source: van den Oord et al. 2016 (PixelRNN, PixelCNN); a small window suffices for compression (Zhang et al.
2021, NeLLoC), with the same waves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from selfvae.distributions.pixels import REACH_RESIDUAL, PixelMixture
from selfvae.nn.autoregressive import AutoregressiveDecoder, Wave, waves
from selfvae.transforms import ImageSpec, Support

__all__ = ["AutoregressiveMixture"]


class _Positions(Support):
    """Some entries of one group as an image of one row, with the intervals that bound them."""

    def __init__(self, spec: ImageSpec, bounds: tuple[Tensor, Tensor], truncates: bool) -> None:
        super().__init__(bounds[0], spec)
        self.limits, self.truncates = bounds, truncates

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.limits


class AutoregressiveMixture:
    """p(x | y, z) as a product over groups and positions, each given those before it.

    It has the interface of `PixelMixture` as far as scores and draws need it.

    Args:
        features: The decoder's output for y and z, (B, G * F, h, w).
        decoder: Whose groups' networks turn features and earlier entries into parameters.
        support: Lays out x as entries and bounds their values.
        spec: Of x.
        estimate: An estimate of the entries in grey levels, (B, G, C, h, w): networks see entries as
            differences from it.
        residual_mean: Add the estimate to the means of all components.
        coefficients: As in `PixelMixture`.
    """

    def __init__(
        self,
        features: Tensor,
        decoder: AutoregressiveDecoder,
        support: Support,
        spec: ImageSpec,
        *,
        estimate: Tensor,
        residual_mean: bool,
        coefficients: Literal["raw", "residual"] = "raw",
    ) -> None:
        self.features = features.unflatten(1, (support.groups, -1))
        self.decoder, self.support, self.spec = decoder, support, spec
        self.estimate, self.residual_mean, self.coefficients = estimate, residual_mean, coefficients
        self._unit = REACH_RESIDUAL * spec.max_value / 2  # grey levels, as of the means' parameters

    def _residual(self, v: Tensor, estimate: Tensor) -> Tensor:
        """Return what networks see of entries v: (B, G, C, h, w), in the networks' dtype."""
        return ((v - estimate) / self._unit).to(self.features.dtype)

    def _mixture(self, params: Tensor, support: Support, estimate: Tensor) -> PixelMixture:
        prediction = estimate if self.residual_mean else None
        return PixelMixture(
            params, support, self.spec, prediction=prediction, coefficients=self.coefficients
        )

    def given(self, x: Tensor) -> PixelMixture:
        """Return the mixture whose parameters are computed from x, uint8 (B, C, H, W), at all positions."""
        v = self.support.split(x)
        seen = self._residual(v, self.support.refine(self.estimate, v.long()))
        params = [
            network(self.features[:, group], seen[:, group], seen[:, :group].flatten(1, 2))
            for group, network in enumerate(self.decoder.groups)
        ]
        return self._mixture(torch.stack(params, 1), self.support, self.estimate)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return ln p(x), nats (B,), of images x uint8 (B, C, H, W); -inf where d(x) is not y."""
        return self.given(x).log_prob(x)

    def fill(self, v: Tensor, draw: Callable[[PixelMixture, int, Wave], Tensor]) -> Tensor:
        """Determine all entries, wave by wave.

        Args:
            v: Entries, int64 (B, G, C, h, w), which are overwritten.
            draw: draw(mixture, group, (rows, cols)) gives the entries at these positions of a group, (B, C,
                1, n); the mixture has them as an image of one row.

        Returns:
            v.
        """
        b, groups, channels, h, w = v.shape
        radius = self.decoder.radius
        order = waves(h, w, radius, v.device)
        seen = torch.zeros(
            b, groups, channels, h + radius, w + 2 * radius, dtype=self.features.dtype, device=v.device
        )  # zero beyond the borders
        inner = seen[..., radius:, radius : radius + w]
        for group, network in enumerate(self.decoder.groups):
            estimate = self.support.refine_group(self.estimate, v, group)
            bounds = [self.support.step_bounds(v, group, c) for c in range(channels)]
            lo, hi = (torch.stack(edges, 1) for edges in zip(*bounds, strict=True))
            base = network.begin(self.features[:, group], inner[:, :group].flatten(1, 2))
            for rows, cols in order:
                at = (..., rows, cols)
                params = network.at(base[at], seen[:, group], rows, cols)[:, None, :, None]
                limits = lo[at][:, None, :, None], hi[at][:, None, :, None]
                support = _Positions(self.spec, limits, self.support.truncates)
                mixture = self._mixture(params, support, estimate[at][:, None, :, None])
                found = draw(mixture, group, (rows, cols))[:, :, 0].long()
                v[:, group][at] = found
                inner[:, group][at] = self._residual(found, estimate[at])
        return v

    def _draw(self, draw: Callable[[PixelMixture], Tensor]) -> Tensor:
        v = torch.zeros(self.estimate.shape, dtype=torch.long, device=self.estimate.device)
        self.fill(v, lambda mixture, group, wave: draw(mixture))
        return self.support.merge(v).to(torch.uint8)

    @torch.no_grad()
    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, uint8 (B, C, H, W); temperature as for `PixelMixture.sample`."""
        return self._draw(lambda mixture: mixture.sample(temperature, generator))

    @torch.no_grad()
    def mode(self) -> Tensor:
        """Return the most likely values, each given those before it: uint8 (B, C, H, W)."""
        return self._draw(lambda mixture: mixture.mode())

    @torch.no_grad()
    def mean(self) -> Tensor:
        """Return the means, rounded to possible values, each given the means before it: uint8."""
        return self._draw(lambda mixture: mixture.mean())
