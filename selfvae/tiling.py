"""Pictures larger than memory allows: the same model, its networks run in overlapping tiles.

Every variable is still drawn once for the whole picture, coarsest first, and the next level sees the whole
result. Only the inputs of a network are cut into tiles, each with a margin of context whose results are
dropped. So neighbouring tiles condition on the same latents and images, and no blending of separately
drawn pictures is needed. Networks with a limited receptive field (residual blocks) give the same results as
on the whole picture; the channel attention of dense blocks averages over a tile instead of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selfvae.distributions.priors import LatentDistribution
from selfvae.level import Level, Posterior
from selfvae.model import SelfVAE
from selfvae.progress import Track, no_progress
from selfvae.transforms import Null
from selfvae.transforms.base import scale_slice

__all__ = ["WHOLE", "Tile", "split", "tiled", "tiled_if_large"]

_SIDE = 192  # pixels of a tile's side
WHOLE = (2 * _SIDE) ** 2  # pixels, of all pictures drawn together, that are worked on without tiles


class Tile(NamedTuple):
    """Rows or columns in units: what is computed (outer) and which part of it is kept (interior)."""

    outer: slice
    interior: slice

    @property
    def inner(self) -> slice:
        """The interior, counted from the start of the outer part."""
        return slice(self.interior.start - self.outer.start, self.interior.stop - self.outer.start)


def split(length: int, tile: int, margin: int) -> Iterator[Tile]:
    """Tiles of at most `tile` units that cover a length, with a margin on both sides where there is one."""
    for start in range(0, length, tile):
        stop = min(length, start + tile)
        yield Tile(slice(max(0, start - margin), min(length, stop + margin)), slice(start, stop))


class _Map:
    """Cuts maps over one grid of units: a map has the same number of its pixels in each unit."""

    def __init__(self, units: tuple[int, int]) -> None:
        self.units = units

    def cut(self, x: Tensor, rows: slice, cols: slice) -> Tensor:
        """The part of x (B, C, h, w) in those units; a view."""
        h, w = x.shape[2:]
        return x[:, :, scale_slice(rows, h, self.units[0]), scale_slice(cols, w, self.units[1])]


class _TiledDistribution:
    """A distribution over a whole picture whose parameters are computed tile by tile, when drawn."""

    def __init__(
        self, level: TiledLevel, name: str, part: Callable[..., Any], inputs: list[Tensor]
    ) -> None:
        self.level, self.name, self.part, self.inputs = level, name, part, inputs

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """A draw of the whole (B, C, h, w)."""
        return self.level.assemble(
            self.name, lambda p: p.sample(temperature, generator), self.part, self.inputs
        )

    def mode(self) -> Tensor:
        """The mode of the whole (B, C, h, w)."""
        return self.level.assemble(self.name, lambda p: p.mode(), self.part, self.inputs)

    def mean(self) -> Tensor:
        """The mean of the whole (B, C, h, w), of an image."""
        return self.level.assemble(self.name, lambda p: p.mean(), self.part, self.inputs)

    def log_prob(self, z: Tensor) -> Tensor:
        """Raise: a tile's margin would be counted twice."""
        raise ValueError("a tiled model draws, and does not score: take the model that it was made of")


class TiledLevel(nn.Module):
    """A level whose networks see tiles of `tile` pixels of y and `margin` pixels of context around."""

    def __init__(
        self, level: Level, k: int, unit: tuple[int, int], tile: int, margin: int, track: Track
    ) -> None:
        super().__init__()
        self.level, self.k, self.unit, self.track = level, k, unit, track
        self.tile = tuple(max(1, tile // n) for n in unit)
        self.margin = tuple(-(-margin // n) for n in unit)
        self.spec, self.transform = level.spec, level.transform
        self.has_latent, self.multiple, self.consistent = level.has_latent, level.multiple, level.consistent
        self.latent_shape = level.latent_shape

    def assemble(
        self, name: str, draw: Callable[[Any], Tensor], part: Callable[..., Any], inputs: list[Tensor]
    ) -> Tensor:
        """draw(part(*tiles of the inputs)) of every tile, put together."""
        h, w = inputs[0].shape[2:]
        rows, cols = (1, 1) if name == "q" else self.transform.scale
        units = h * rows // self.unit[0], w * cols // self.unit[1]
        grid = _Map(units)
        tiles = [
            (r, c)
            for r in split(units[0], self.tile[0], self.margin[0])
            for c in split(units[1], self.tile[1], self.margin[1])
        ]
        out: Tensor | None = None
        for r, c in self.track(tiles, f"{name}{self.k}"):
            drawn = draw(part(*(grid.cut(x, r.outer, c.outer) for x in inputs)))
            high = r.outer.stop - r.outer.start, c.outer.stop - c.outer.start
            if out is None:
                size = [n * u // t for n, u, t in zip(drawn.shape[2:], units, high, strict=True)]
                out = drawn.new_empty(*drawn.shape[:2], *size)
            inner = _Map(high).cut(drawn, r.inner, c.inner)
            grid.cut(out, r.interior, c.interior).copy_(inner)
        assert out is not None
        return out

    def posterior(self, y: Tensor) -> Posterior:
        """q(z | y), as `Level.posterior`."""
        return self.level.q(self.assemble("q", lambda params: params, self.level.encode, [y]))

    def prior(self, y_up: Tensor, z_up: Tensor | None) -> LatentDistribution:
        """p(z | y_up, z_up), as `Level.prior`; the top one is small and stays whole."""
        if isinstance(self.transform, Null):
            return self.level.prior(y_up, z_up)
        if z_up is None:
            return _TiledDistribution(self, "z", lambda y: self.level.prior(y, None), [y_up])
        return _TiledDistribution(self, "z", self.level.prior, [y_up, z_up])

    def likelihood(self, y_up: Tensor, z: Tensor | None) -> _TiledDistribution:
        """p(y | y_up, z), as `Level.likelihood`."""
        if z is None:
            return _TiledDistribution(self, "y", lambda y: self.level.likelihood(y, None), [y_up])
        return _TiledDistribution(self, "y", self.level.likelihood, [y_up, z])


def tiled(model: SelfVAE, tile: int = _SIDE, margin: int = 32, track: Track = no_progress) -> SelfVAE:
    """Make a model that draws pictures of any size in bounded memory.

    All functions of `selfvae.operations` take it. For one seed it draws other pictures than the model
    itself, since random numbers are used in another order.

    Args:
        model: made by `build` or `load`; its networks are shared, not copied.
        tile: height and width of a tile at every level, in pixels.
        margin: pixels of context on each side of a tile, computed and dropped.
        track: track(tiles, name) wraps the loop over the tiles of the variable `name`, e.g. "y0".

    Returns:
        A model that draws, but does not score, compress or train.

    Raises:
        ValueError: if tile is below 1 or margin below 0.
    """
    if tile < 1 or margin < 0:
        raise ValueError(f"tile must be at least 1 pixel and margin at least 0; got {tile} and {margin}")
    units = model.multiples
    levels = [TiledLevel(level, k, units[k], tile, margin, track) for k, level in enumerate(model.levels)]
    return SelfVAE(levels, model.config)  # type: ignore[arg-type]  # it has all that drawing needs


def tiled_if_large(model: SelfVAE, pixels: int, track: Track = no_progress) -> SelfVAE:
    """The model itself for pictures of at most `WHOLE` pixels, `tiled` for larger ones.

    Args:
        pixels: height times width, summed over the pictures that are drawn together.
        track: as for `tiled`.
    """
    return model if pixels <= WHOLE else tiled(model, track=track)
