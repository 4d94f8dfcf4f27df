"""Subsampling: some pixels are kept as they are, and a level models the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfvae.transforms.base import (
    BlockSupport,
    ImageSpec,
    Support,
    Transform,
    at_least_float32,
    check_image,
)

__all__ = ["Checkerboard", "Subsample", "Subsampling"]


class _SubsamplingSupport(BlockSupport):
    """Some phases of every block are y itself; the others are free."""

    restricts = True

    def __init__(self, y: Tensor, spec: ImageSpec, d: Subsampling) -> None:
        super().__init__(y, spec, d.block)
        self.d = d
        self.free = [i for i in range(self.groups) if i not in d.kept]
        self.groups = len(self.free)

    def space_to_depth(self, x: Tensor) -> Tensor:
        every = super().space_to_depth(x).unbind(1)
        return torch.stack([every[i] for i in self.free], 1)

    def depth_to_space(self, v: Tensor) -> Tensor:
        y = self.d.stack_kept(self.y)
        b, c, h, w = y.shape
        kept = y.view(b, -1, c // len(self.d.kept), h, w).to(v.dtype)
        every = torch.cat([kept, v], 1).unbind(1)
        place = dict(zip((*self.d.kept, *self.free), every, strict=True))
        return super().depth_to_space(torch.stack([place[i] for i in range(len(place))], 1))

    def allows(self, x: Tensor) -> Tensor:
        return (self.d(x) == self.y).flatten(1).all(1)

    def nearest(self) -> Tensor:
        """For every entry the first kept pixel of its block: uint8 (B, G, C, h, w)."""
        first = self.d.stack_kept(self.y)[:, None, : len(self.order)]
        return first.expand(-1, self.groups, -1, -1, -1)


class Subsampling(Transform):
    """Keep some pixels of every block as they are; the others are what a level models.

    `kept` are the phases of a block (row by row) that are kept. A level's network works on a grid with one
    position a block.
    """

    kept: tuple[int, ...] = (0,)

    def weights(self, spec: ImageSpec) -> int:
        """How many numbers a block `support` takes from a level's network, to correct guesses by."""
        return 0

    def stack_kept(self, y: Tensor) -> Tensor:
        """y (B, C, h, w) on the grid of blocks, kept phases as further channels: (B, n C, H, W)."""
        return y

    def support(self, y: Tensor, spec: ImageSpec, weights: Tensor | None = None) -> Support:
        """As `Transform.support`; weights (B, `weights(spec)`, H, W), any real numbers."""
        return _SubsamplingSupport(y, spec, self)


class Subsample(Subsampling):
    """Keep the first of every `rows` rows and of every `cols` columns.

    staggered: every second row of x lies half a column to the right, as `Checkerboard` leaves them; for a
    better estimate.
    """

    def __init__(self, rows: int = 2, cols: int | None = None, *, staggered: bool = False) -> None:
        super().__init__()
        self.scale = (rows, rows if cols is None else cols)
        if min(self.scale) < 1 or self.scale == (1, 1):
            raise ValueError(f"at least every second row or column is dropped; got {self.scale}")
        if staggered and self.scale != (2, 1):
            raise ValueError(f"staggered goes with every second row, (2, 1); got {self.scale}")
        self.staggered = staggered

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        self.size(*x.shape[2:])
        n, m = self.scale
        return x[:, :, ::n, ::m].contiguous()

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """Linear interpolation between the kept pixels; past the last one it is repeated."""
        out = at_least_float32(y)
        if self.staggered:
            rows = out + torch.cat([out[:, :, 1:], out[:, :, -1:]], 2)
            between = (rows + torch.cat([rows[..., 1:], rows[..., -1:]], 3)) / 4
            return torch.stack([out, between], 3).flatten(2, 3)
        for dim, n in zip((2, 3), self.scale, strict=True):
            after = torch.cat([out.narrow(dim, 1, out.shape[dim] - 1), out.narrow(dim, -1, 1)], dim)
            steps = [out + (after - out) * (i / n) for i in range(n)]
            out = torch.stack(steps, dim + 1).flatten(dim, dim + 1)
        return out

    def extra_repr(self) -> str:
        return f"{self.scale[0]}, {self.scale[1]}" + (", staggered" if self.staggered else "")


class _CheckerboardSupport(_SubsamplingSupport):
    """Of every block the upper right pixel, then the lower left one, between four of those."""

    def __init__(self, y: Tensor, spec: ImageSpec, d: Subsampling, weights: Tensor | None) -> None:
        super().__init__(y, spec, d)
        self.weights = None if weights is None else torch.tanh(at_least_float32(weights))

    def refine(self, estimate: Tensor, v: Tensor) -> Tensor:
        """The second guess is moved by what the four at its corners missed theirs by, times weights."""
        if self.weights is None:
            return estimate
        first, second = estimate.unbind(1)
        h, w = first.shape[2:]
        missed = F.pad(v[:, 0] - first, (1, 0, 0, 1))  # beyond the picture nothing is missed
        for i, weight in enumerate(self.weights.chunk(4, 1)):
            top, left = i // 2, i % 2
            second = second + weight * missed[:, :, top : top + h, left : left + w]
        return torch.stack([first, second], 1)


class Checkerboard(Subsampling):
    """Keep every second pixel, as on a checkerboard: of row r the columns 2c + r % 2.

    y is half as wide. Each dropped pixel has its four neighbours in y, so that dropped pixels tell each
    other little; `Subsample(2, 1, staggered=True)` after it leaves every second row and column.
    """

    scale = (1, 2)
    kept = (0, 3)

    @property
    def block(self) -> tuple[int, int]:
        return (2, 2)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        self.size(*x.shape[2:])
        return torch.stack([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], 3).flatten(2, 3)

    def stack_kept(self, y: Tensor) -> Tensor:
        return torch.cat([y[:, :, ::2], y[:, :, 1::2]], 1)

    def weights(self, spec: ImageSpec) -> int:
        return 4 * spec.channels

    def support(self, y: Tensor, spec: ImageSpec, weights: Tensor | None = None) -> Support:
        return _CheckerboardSupport(y, spec, self, weights)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """A dropped pixel is the mean of its neighbours above, below, left and right."""
        even, odd = at_least_float32(y).unflatten(2, (-1, 2)).unbind(3)
        left = torch.cat([odd[..., :1], odd[..., :-1]], 3)
        right = torch.cat([even[..., 1:], even[..., -1:]], 3)
        above = torch.cat([odd[:, :, :1], odd[:, :, :-1]], 2)
        below = torch.cat([even[:, :, 1:], even[:, :, -1:]], 2)
        upper = torch.stack([even, (even + right + above + odd) / 4], 4).flatten(3)
        lower = torch.stack([(left + odd + even + below) / 4, odd], 4).flatten(3)
        return torch.stack([upper, lower], 3).flatten(2, 3)
