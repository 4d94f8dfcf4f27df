"""One level of the hierarchy: it explains the image y[k] given y[k+1] = d(y[k]) with a latent z[k]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfvae.distributions import DiagonalNormal, RoundedLogistic, UniformBox
from selfvae.pixels import PixelMixture, to_unit
from selfvae.priors import LatentDistribution
from selfvae.transforms import Blank, Format, Keep, Support, Transform

__all__ = ["Level", "Posterior"]

Core = tuple[slice, slice]
Posterior = DiagonalNormal | UniformBox


class Level(nn.Module):
    """q(z | y), p(z | y_up, z_up) and p(y | y_up, z) for images y of one format.

    Arguments:
        format: channels and levels of y.
        transform: d, with y_up = d(y). At the top it is `Blank`: y_up tells the size and nothing else.
        decoder: network (context, z) -> pixel parameters, at y's resolution, or one position a block where
            the transform keeps pixels (`Keep`): then only the dropped ones are modelled.
        encoder, prior: networks of the latent; both None for a level without one.
        consistent: truncate the likelihood to the images with d(y) = y_up, where d tells them.
        anchored: add d's plain estimate of y to every component's mean.
        rounded: the latent's posterior is a `UniformBox`, its conditional prior a `RoundedLogistic`; else
            both are Gaussian.
        coefficients: how earlier channels shift later ones (see `PixelMixture`).
    """

    def __init__(
        self,
        format: Format,
        transform: Transform,
        decoder: nn.Module,
        encoder: nn.Module | None = None,
        prior: nn.Module | None = None,
        *,
        consistent: bool = True,
        anchored: bool = False,
        rounded: bool = False,
        coefficients: Literal["raw", "residual"] = "raw",
    ) -> None:
        super().__init__()
        if (encoder is None) != (prior is None):
            raise ValueError("a latent needs both an encoder and a prior; got one of them")
        self.format, self.transform = format, transform
        self.encoder, self.prior_net, self.decoder = encoder, prior, decoder
        self.consistent, self.anchored, self.coefficients = consistent, anchored, coefficients
        self.rounded = rounded

    @property
    def has_latent(self) -> bool:
        return self.encoder is not None

    @property
    def multiple(self) -> int:
        """What the height and width of y must be divisible by for the latent's networks, in pixels."""
        if not self.has_latent:
            return 1
        encoder: Any = self.encoder
        prior: Any = self.prior_net
        return prior.multiple if isinstance(self.transform, Blank) else encoder.stride

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of z for y of a height and width in pixels."""
        encoder: Any = self.encoder
        return encoder.latent, height // encoder.stride, width // encoder.stride

    @property
    def keeps(self) -> Keep | None:
        """The transform, if y_up keeps pixels of y, so that the level models the others, block by block."""
        return self.transform if self.consistent and isinstance(self.transform, Keep) else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks."""
        return next(self.decoder.parameters()).dtype

    def context(self, y_up: Tensor) -> Tensor:
        """What the decoder sees of y_up: (B, C', h, w) in [-1, 1]; no channels at the top."""
        if y_up.shape[1] == 0:
            return y_up.to(self.dtype)
        if self.keeps:
            y_up = self.keeps.fold(y_up)
        else:
            y_up = self.transform.estimate(y_up.to(self.dtype), self.format)
        return to_unit(y_up, self.format.levels, self.dtype)

    def encode(self, y: Tensor) -> Tensor:
        """Parameters of q(z | y) for y uint8 (B, C, H, W), as `q` takes them."""
        assert self.encoder is not None
        params: Tensor = self.encoder(to_unit(y, self.format.levels, self.dtype))
        return params

    @property
    def q(self) -> Callable[[Tensor], Posterior]:
        """q(z | y) from its parameters."""
        return UniformBox.from_params if self.rounded else DiagonalNormal.from_params

    def posterior(self, y: Tensor) -> Posterior:
        """q(z | y) for y uint8 (B, C, H, W)."""
        return self.q(self.encode(y))

    def prior(self, y_up: Tensor, z_up: Tensor | None) -> LatentDistribution:
        """p(z | y_up, z_up)."""
        assert self.prior_net is not None
        if y_up.shape[1] == 0:
            top: LatentDistribution = self.prior_net(y_up.to(self.dtype), z_up)
            return top
        up = self.transform.format(self.format)
        params = self.prior_net(to_unit(y_up, up.levels, self.dtype), z_up)
        return RoundedLogistic.from_params(params) if self.rounded else DiagonalNormal.from_params(params)

    def likelihood(self, y_up: Tensor, z: Tensor | None, core: Core | None = None) -> PixelMixture:
        """p(y | y_up, z); with `core`, rows and columns of y_up, of y's part there alone."""
        params = self.decoder(self.context(y_up), z)
        guess = self.transform.estimate(y_up.to(self.dtype), self.format) if self.anchored else None
        if core is not None:
            rows, cols = self.transform.scale
            high, wide = self.keeps.block if self.keeps else (1, 1)
            params = params[..., _times(core[0], rows, high), _times(core[1], cols, wide)]
            if guess is not None:
                guess = guess[..., _times(core[0], rows), _times(core[1], cols)]
            y_up = y_up[..., core[0], core[1]]
        if self.keeps:
            weights = self.keeps.weights(self.format) if self.anchored else 0
            own = params.shape[1] - weights
            support = self.keeps.support(y_up, self.format, params[:, own:] if weights else None)
            params = params[:, :own].unflatten(1, (support.groups, own // support.groups))
        else:
            support = (self.transform.support if self.consistent else Support)(y_up, self.format)
            params = support.phases(params)
        anchor = None if guess is None else support.split(guess)
        return PixelMixture(params, support, self.format, anchor=anchor, coefficients=self.coefficients)


def _times(part: slice, n: int, over: int = 1) -> slice:
    return slice(part.start * n // over, part.stop * n // over)
