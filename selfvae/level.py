"""A level of the hierarchy: the distribution of y[k] given y[k+1] = d(y[k]), with a latent z[k]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfvae.distributions.autoregressive import AutoregressiveMixture
from selfvae.distributions.latents import DiagonalNormal, NoisyLogistic, UnitUniform
from selfvae.distributions.pixels import PixelMixture, to_unit
from selfvae.distributions.priors import LatentDistribution
from selfvae.nn.autoregressive import AutoregressiveDecoder
from selfvae.transforms import ImageSpec, Null, Subsampling, Support, Transform
from selfvae.transforms.base import BlockSupport, scale_slice

__all__ = ["Level", "Posterior"]

Interior = tuple[slice, slice]
Posterior = DiagonalNormal | UnitUniform


class Level(nn.Module):
    """The distributions q(z | y), p(z | y_up, z_up) and p(y | y_up, z) for images y of one spec.

    Args:
        spec: Of y.
        transform: d, with y_up = d(y). At the top it is `Null`: y_up contains only the size.
        decoder: Network (context, z) -> pixel parameters at y's resolution. Where the transform keeps
            pixels (`Subsampling`), it has one position per block and models only the dropped pixels.
        encoder: Network of q(z | y); None for a level without a latent.
        prior: Network of p(z | y_up, z_up); None for a level without a latent.
        consistent: Truncate the likelihood to the images with d(y) = y_up, if d has a support.
        residual_mean: Add the transform's estimate of y to the means of all components.
        rounded: The posterior is a `UnitUniform` and the conditional prior a `NoisyLogistic`; else both
            are Gaussian.
        coefficients: How earlier channels shift later ones (see `PixelMixture`).
        subpixel: The decoder sees y_up itself, and estimates of y are `Transform.interpolate`'s.

    Raises:
        ValueError: Only one of encoder and prior is given.
    """

    def __init__(
        self,
        spec: ImageSpec,
        transform: Transform,
        decoder: nn.Module,
        encoder: nn.Module | None = None,
        prior: nn.Module | None = None,
        *,
        consistent: bool = True,
        residual_mean: bool = False,
        rounded: bool = False,
        coefficients: Literal["raw", "residual"] = "raw",
        subpixel: bool = False,
    ) -> None:
        super().__init__()
        if (encoder is None) != (prior is None):
            raise ValueError("a latent needs both an encoder and a prior; got one of them")
        self.spec, self.transform = spec, transform
        self.encoder, self.prior_net, self.decoder = encoder, prior, decoder
        self.consistent = consistent and transform.restricts(spec)
        self.residual_mean, self.coefficients = residual_mean, coefficients
        self.rounded, self.subpixel = rounded, subpixel

    @property
    def has_latent(self) -> bool:
        """Whether the level has a latent."""
        return self.encoder is not None

    @property
    def multiple(self) -> int:
        """The number of pixels by which the latent's networks need y's height and width to be divisible."""
        if not self.has_latent:
            return 1
        encoder: Any = self.encoder
        prior: Any = self.prior_net
        return prior.multiple if isinstance(self.transform, Null) else encoder.stride

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return channels, height and width of z for y of that height and width, in pixels."""
        encoder: Any = self.encoder
        return encoder.latent, height // encoder.stride, width // encoder.stride

    @property
    def keeps(self) -> Subsampling | None:
        """The transform, if y_up contains pixels of y, so that the level models only the others."""
        return self.transform if self.consistent and isinstance(self.transform, Subsampling) else None

    @property
    def dtype(self) -> torch.dtype:
        """The networks' dtype."""
        return next(self.decoder.parameters()).dtype

    def context(self, y_up: Tensor) -> Tensor:
        """Return the decoder's view of y_up: (B, C', h, w) in [-1, 1], without channels at the top."""
        if y_up.shape[1] == 0:
            return y_up.to(self.dtype)
        if self.keeps:
            y_up = self.keeps.stack_kept(y_up)
        elif self.subpixel:
            return to_unit(y_up, self.transform.output_spec(self.spec).num_values, self.dtype)
        else:
            y_up = self.transform.estimate(y_up.to(self.dtype), self.spec)
        return to_unit(y_up, self.spec.num_values, self.dtype)

    def estimate(self, y_up: Tensor) -> Tensor:
        """Return the transform's estimate of y, in the networks' dtype, from y_up uint8 (B, c, h, w)."""
        transform = self.transform
        return (transform.interpolate if self.subpixel else transform.estimate)(
            y_up.to(self.dtype), self.spec
        )

    def encode(self, y: Tensor) -> Tensor:
        """Return the parameters of q(z | y), for `q`, given y uint8 (B, C, H, W)."""
        assert self.encoder is not None
        params: Tensor = self.encoder(to_unit(y, self.spec.num_values, self.dtype))
        return params

    @property
    def q(self) -> Callable[[Tensor], Posterior]:
        """The constructor of q(z | y) from its parameters."""
        return UnitUniform.from_params if self.rounded else DiagonalNormal.from_params

    def posterior(self, y: Tensor) -> Posterior:
        """Return q(z | y) for y uint8 (B, C, H, W)."""
        return self.q(self.encode(y))

    def prior(self, y_up: Tensor, z_up: Tensor | None) -> LatentDistribution:
        """Return p(z | y_up, z_up), given y_up uint8 (B, c, h, w) and the next level's latent."""
        assert self.prior_net is not None
        if y_up.shape[1] == 0:
            top: LatentDistribution = self.prior_net(y_up.to(self.dtype), z_up)
            return top
        up = self.transform.output_spec(self.spec)
        params = self.prior_net(to_unit(y_up, up.num_values, self.dtype), z_up)
        return NoisyLogistic.from_params(params) if self.rounded else DiagonalNormal.from_params(params)

    @property
    def autoregressive(self) -> bool:
        """Whether pixels depend on those before them."""
        return isinstance(self.decoder, AutoregressiveDecoder)

    def likelihood(
        self, y_up: Tensor, z: Tensor | None, interior: Interior | None = None
    ) -> PixelMixture | AutoregressiveMixture:
        """Return p(y | y_up, z).

        Args:
            y_up: uint8 (B, c, h, w).
            z: The latent; None for a level without one.
            interior: Rows and columns of y_up: return the distribution of that part of y only.
        """
        params = self.decoder(self.context(y_up), z)
        if isinstance(self.decoder, AutoregressiveDecoder):
            return self._autoregressive(self.decoder, params, y_up, interior)
        guess = self.estimate(y_up) if self.residual_mean else None
        if interior is not None:
            rows, cols = self.transform.scale
            high, wide = self.keeps.block if self.keeps else (1, 1)
            params = params[..., scale_slice(interior[0], rows, high), scale_slice(interior[1], cols, wide)]
            if guess is not None:
                guess = guess[..., scale_slice(interior[0], rows, 1), scale_slice(interior[1], cols, 1)]
            y_up = y_up[..., interior[0], interior[1]]
        if self.keeps:
            weights = self.keeps.weights(self.spec) if self.residual_mean else 0
            own = params.shape[1] - weights
            support = self.keeps.support(y_up, self.spec, params[:, own:] if weights else None)
            params = params[:, :own].unflatten(1, (support.groups, own // support.groups))
        else:
            support = (self.transform.support if self.consistent else Support)(y_up, self.spec)
            params = support.space_to_depth(params)
        prediction = None if guess is None else support.split(guess)
        return PixelMixture(
            params, support, self.spec, prediction=prediction, coefficients=self.coefficients
        )

    def _autoregressive(
        self, decoder: AutoregressiveDecoder, features: Tensor, y_up: Tensor, interior: Interior | None
    ) -> AutoregressiveMixture:
        guess = self.estimate(y_up)
        if interior is not None:
            rows, cols = self.transform.scale
            y_up = y_up[..., interior[0], interior[1]]
            guess = guess[..., scale_slice(interior[0], rows, 1), scale_slice(interior[1], cols, 1)]
            high, wide = self.transform.block
            features = features[
                ..., scale_slice(interior[0], rows, high), scale_slice(interior[1], cols, wide)
            ]
        support = (self.transform.support if self.consistent else Support)(y_up, self.spec)
        if decoder.radius == 0 and self.subpixel and isinstance(support, BlockSupport):
            support.alternate()
        return AutoregressiveMixture(
            features,
            decoder,
            support,
            self.spec,
            estimate=support.split(guess),
            residual_mean=self.residual_mean,
            coefficients=self.coefficients,
        )
