"""SelfVAE: a hierarchy of levels and the one walk down it.

| symbol | code | |
|---|---|---|
| x, y_0 | `pyramid[0]` | the image, uint8 (B, C, H, W) |
| y_k, k = 1..K | `pyramid[k]` | its deterministic representations, y_k = d_k(y_{k-1}) |
| z_k | `"z0"`, `"z1"`, ... | the latent that explains y_k given y_{k+1}; z_K is the papers' u |
| d_k | `levels[k-1].transform` | |
| q(z_k given y_k) | `levels[k].posterior` | |
| p(z_k given y_{k+1}, z_{k+1}) | `levels[k].prior` | |
| p(y_k given y_{k+1}, z_k) | `levels[k].likelihood` | |
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from selfvae.distributions.autoregressive import AutoregressiveMixture
from selfvae.distributions.pixels import PixelMixture
from selfvae.distributions.priors import LatentDistribution
from selfvae.level import Level, Posterior
from selfvae.nn.layers import data_dependent_init
from selfvae.terms import Terms
from selfvae.transforms import ImageSpec, Null

__all__ = ["Distribution", "SelfVAE", "describe", "spread_levels"]

Distribution = LatentDistribution | PixelMixture | AutoregressiveMixture
Provider = Callable[[str, Distribution], Tensor]


class _Levels(nn.ModuleList):
    """A list of levels, typed."""

    @overload
    def __getitem__(self, index: slice) -> _Levels: ...
    @overload
    def __getitem__(self, index: int) -> Level: ...
    def __getitem__(self, index: int | slice) -> Level | _Levels:
        return cast("Level | _Levels", super().__getitem__(index))

    def __iter__(self) -> Iterator[Level]:
        return cast("Iterator[Level]", super().__iter__())

    def __reversed__(self) -> Iterator[Level]:
        return (self[k] for k in reversed(range(len(self))))


class SelfVAE(nn.Module):
    """A self-supervised VAE with levels 0 (the image) to K (the top, whose transform is `Null`).

    `model(x)` gives the `Terms` of the bound for x uint8 (B, C, H, W). A new model must be initialised on
    a batch first, by `initialise`; training and `load` take care of that.

    Args:
        levels: from the image to the top.
        config: the `ModelConfig` that `build` made the model from, kept for saving; None: made by hand.

    Raises:
        ValueError: if there is no level, or the top one's transform is not `Null`.
    """

    def __init__(self, levels: Iterable[Level], config: Any = None) -> None:
        super().__init__()
        self.levels = _Levels(levels)
        if not len(self.levels) or not isinstance(self.levels[-1].transform, Null):
            raise ValueError("a model has at least one level, and the top level's transform is Null()")
        self.config = config
        self.answer: str | None = None  # see `hub.known_answer`; kept from the model's folder
        self._ready = False  # whether initialisation was looked for

    @property
    def spec(self) -> ImageSpec:
        """The spec of x."""
        return self.levels[0].spec

    @property
    def has_latents(self) -> bool:
        """Whether any level has a latent; without one every score is exact."""
        return any(level.has_latent for level in self.levels)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Compute all representations of images.

        Args:
            x: uint8 (B, C, H, W); height and width must be multiples of `multiples[0]` for the networks.

        Returns:
            [x, y_1, ..., y_K], uint8.

        Raises:
            TypeError, ValueError: if x is not of the model's spec or size.
        """
        self.spec.check(x)
        ys = [x]
        for level in self.levels[:-1]:
            ys.append(level.transform(ys[-1]))
        return ys

    def blank(self, n: int, height: int, width: int) -> Tensor:
        """What the walk starts from for n images x of a height and width in pixels.

        Returns:
            uint8 (n, 0, h, w), of y_K's size, without channels.
        """
        for level in self.levels:
            height, width = level.transform.size(height, width)
        return torch.empty(n, 0, height, width, dtype=torch.uint8, device=self.device)

    def scale(self, k: int) -> tuple[int, int]:
        """How many rows and columns of x correspond to one of y_k."""
        scales = [level.transform.scale for level in list(self.levels)[:k]]
        return math.prod(s[0] for s in scales), math.prod(s[1] for s in scales)

    @property
    def multiples(self) -> list[tuple[int, int]]:
        """What the height and width of each y_k must be divisible by, for all levels, in pixels."""
        rows, cols = 1, 1
        for level in reversed(self.levels):
            (n, m), (high, wide) = level.transform.scale, level.transform.block
            rows = math.lcm(level.multiple, high, n * rows)
            cols = math.lcm(level.multiple, wide, m * cols)
        scales = [self.scale(k) for k in range(len(self.levels))]
        return [(rows // n, cols // m) for n, m in scales]

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks."""
        return next(self.parameters()).dtype

    def walk(self, provider: Provider, above: Tensor, levels: tuple[int, int] | None = None) -> Tensor:
        """Go through the variables of the levels, from the top to the image.

        Args:
            provider: provider(name, distribution) gives the value of each variable, e.g. a draw; names are
                "z0".."zK" and "y0".."yK".
            above: the image above the first level of the walk; above the top, see `blank`.
            levels: of a model of at most one latent, the finest and the coarsest level of the walk; None:
                all.

        Returns:
            The value of the last image, e.g. of y0 = x, (B, C, H, W).
        """
        y, z = above, None
        finest, coarsest = levels or (0, len(self.levels) - 1)
        for k in range(coarsest, finest - 1, -1):
            level = self.levels[k]
            if level.has_latent:
                z = provider(f"z{k}", level.prior(y, z))
            y = provider(f"y{k}", level.likelihood(y, z if level.has_latent else None))
        return y

    def posteriors(self, ys: list[Tensor], levels: tuple[int, int] | None = None) -> dict[str, Posterior]:
        """q(z_k | y_k) of every level with a latent, by name ("z0", ...), for a `pyramid`.

        levels: as in `walk`; those of the others are left out.
        """
        finest, coarsest = levels or (0, len(ys) - 1)
        return {
            f"z{k}": level.posterior(y)
            for k, (level, y) in enumerate(zip(self.levels, ys, strict=True))
            if level.has_latent and finest <= k <= coarsest
        }

    def score(
        self,
        ys: list[Tensor],
        posteriors: dict[str, Posterior],
        errors: bool = False,
        levels: tuple[int, int] | None = None,
    ) -> Terms:
        """The terms of the bound at one draw from the posteriors.

        Args:
            ys: of `pyramid`.
            posteriors: of `posteriors`, or others of the same shapes.
            errors: fill in `Terms.errors` too.
            levels: as in `walk`; the terms of the others are 0.

        Returns:
            (B,) nats each; draws come from torch's global random state.
        """
        zero = torch.zeros(ys[0].shape[0], device=ys[0].device)
        re, kl, missed = [zero] * len(ys), [zero] * len(ys), [zero] * (len(ys) - 1)

        def provider(name: str, p: Distribution) -> Tensor:
            k = int(name[1:])
            if name[0] == "y":
                re[k] = -p.log_prob(ys[k])
                if errors and isinstance(p, AutoregressiveMixture):
                    raise ValueError("errors need pixels without order: this model is autoregressive")
                if errors and k < len(missed) and isinstance(p, PixelMixture):
                    missed[k] = (p.expectation() - ys[k]).abs().flatten(1).mean(1)
                return ys[k]
            q = posteriors[name]
            z = q.sample()
            kl[k] = q.log_prob(z) - p.log_prob(z)
            return z

        above = [*ys[1:], ys[-1][:, :0]][levels[1] if levels else -1]
        self.walk(provider, above, levels)
        return Terms(tuple(re), tuple(kl), tuple(missed) if errors else ())

    def forward(self, x: Tensor, errors: bool = False, levels: tuple[int, int] | None = None) -> Terms:
        """The terms of the bound, per image, at one draw of the latents.

        Args:
            x: uint8 (B, C, H, W).
            errors: fill in `Terms.errors` too; needs coefficients="residual".
            levels: as in `score`.

        Returns:
            (B,) nats each; draws come from torch's global random state.

        Raises:
            TypeError, ValueError: if x is not of the model's spec or size.

        Warns:
            UserWarning: once, if the model was neither initialised nor loaded.
        """
        self.warn_uninitialised()
        ys = self.pyramid(x)
        return self.score(ys, self.posteriors(ys, levels), errors, levels)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Scale the layers to data: data-dependent initialisation (docs/spec.md, section Networks).

        Layers that were initialised before, or loaded, are left as they are.

        Args:
            x: a batch as for training, uint8 (B, C, H, W).
        """
        self._ready = True
        with data_dependent_init(self):
            self(x)

    def warn_uninitialised(self) -> None:
        """Warn, once, if some layer has neither been initialised on data nor loaded."""
        if self._ready or torch.compiler.is_compiling():
            return
        self._ready = True  # looked for once: reading the buffers waits for the device
        if any(name.endswith("initialised") and not value for name, value in self.named_buffers()):
            warnings.warn(
                "this model is not initialised, so its scores mean nothing: call model.initialise(x) with "
                "a batch x of images, train it, or load a trained one",
                stacklevel=3,
            )


def spread_levels(model: SelfVAE, n: int, first: int = 0) -> list[int]:
    """At most n of the levels `first` to K, evenly spread, both ends among them: e.g. [0, 2, 4]."""
    top = len(model.levels) - 1
    return torch.linspace(first, top, max(0, min(top + 1 - first, n))).round().int().tolist()


def describe(model: SelfVAE) -> list[str]:
    """A line of words for each level, from the image to the top.

    It tells the level's channels and values, its latent, what computes the next image, and whether draws
    of the level agree with that image exactly (`Level.consistent`).
    """
    lines = []
    for k, level in enumerate(model.levels):
        channels = "1 channel" if level.spec.channels == 1 else f"{level.spec.channels} channels"
        line = f"y{k}: {channels} of {level.spec.num_values} values"
        if level.has_latent:
            line += f", latent z{k}"
        if level.autoregressive:
            line += ", group after group" if level.decoder.radius == 0 else ", pixel after pixel"
        if isinstance(level.transform, Null):
            lines.append(f"{line}; the top")
            continue
        if level.consistent:
            kind = f"draws agree with y{k + 1} exactly"
        elif level.transform.restricts(level.spec):
            kind = f"draws need not agree with y{k + 1} (consistent=False)"
        else:
            kind = f"draws need not agree with y{k + 1} (this transform has no exact likelihood)"
        lines.append(f"{line}; y{k + 1} by {level.transform}, {kind}")
    return lines
