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
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selfvae.level import Level, Posterior
from selfvae.nn.layers import data_dependent_init
from selfvae.terms import Terms
from selfvae.transforms import ImageSpec, Null

__all__ = ["SelfVAE"]

Provider = Callable[[str, Any], Tensor]


class SelfVAE(nn.Module):
    """A self-supervised VAE with levels 0 (the image) to K (the top, whose transform is `Null`).

    `model(x)` gives the `Terms` of the bound for x uint8 (B, C, H, W). `config` is what
    `presets.build` made the model from, kept for saving.
    """

    def __init__(self, levels: Iterable[Level], config: Any = None) -> None:
        super().__init__()
        self.levels: Any = nn.ModuleList(levels)
        if not len(self.levels) or not isinstance(self.levels[-1].transform, Null):
            raise ValueError("a model has at least one level, and the top level's transform is Blank()")
        self.config = config

    @property
    def spec(self) -> ImageSpec:
        """The spec of x."""
        spec: ImageSpec = self.levels[0].spec
        return spec

    @property
    def has_latents(self) -> bool:
        """Whether any level has a latent; without one every score is exact."""
        return any(level.has_latent for level in self.levels)

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """[x, y_1, ..., y_K], uint8."""
        self.spec.check(x)
        ys = [x]
        for level in self.levels[:-1]:
            ys.append(level.transform(ys[-1]))
        return ys

    def blank(self, n: int, height: int, width: int) -> Tensor:
        """What the walk starts from for n images x of that size (pixels): no channels, y_K's size."""
        for level in self.levels:
            height, width = level.transform.size(height, width)
        return torch.empty(n, 0, height, width, dtype=torch.uint8, device=self.device)

    def scale(self, k: int) -> tuple[int, int]:
        """Rows and columns of x for one of y_k."""
        scales = [level.transform.scale for level in self.levels[:k]]
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
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks."""
        return next(self.parameters()).dtype

    def walk(self, provider: Provider, blank: Tensor) -> Tensor:
        """From the top to the image: pick(name, distribution) says where each variable comes from.

        Names are "z0".."zK" and "y0".."yK"; returns what was picked for y0 = x.
        """
        y, z = blank, None
        for k in reversed(range(len(self.levels))):
            level: Level = self.levels[k]
            if level.has_latent:
                z = provider(f"z{k}", level.prior(y, z))
            y = provider(f"y{k}", level.likelihood(y, z if level.has_latent else None))
        return y

    def posteriors(self, ys: list[Tensor]) -> dict[str, Posterior]:
        """q(z_k | y_k) of every level with a latent, by name."""
        return {
            f"z{k}": level.posterior(y)
            for k, (level, y) in enumerate(zip(self.levels, ys, strict=True))
            if level.has_latent
        }

    def score(self, ys: list[Tensor], posteriors: dict[str, Posterior]) -> Terms:
        """The terms of the bound for the pyramid ys at one draw from the posteriors."""
        zero = torch.zeros(ys[0].shape[0], device=ys[0].device)
        re, kl = [zero] * len(ys), [zero] * len(ys)

        def provider(name: str, p: Any) -> Tensor:
            k = int(name[1:])
            if name[0] == "y":
                re[k] = -p.log_prob(ys[k])
                return ys[k]
            q = posteriors[name]
            z = q.sample()
            kl[k] = q.log_prob(z) - p.log_prob(z)
            return z

        self.walk(provider, ys[-1][:, :0])
        return Terms(tuple(re), tuple(kl))

    def forward(self, x: Tensor) -> Terms:
        """The terms of the bound for x uint8 (B, C, H, W), per image, at one draw of the latents."""
        ys = self.pyramid(x)
        return self.score(ys, self.posteriors(ys))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Data-dependent initialisation on a batch x; layers that had theirs are left alone."""
        with data_dependent_init(self):
            self(x)
