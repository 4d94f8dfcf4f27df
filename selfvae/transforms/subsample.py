"""Subsampling: some pixels are kept unchanged, and a level models the others.

Coding pixels level by level, each interpolated from those kept, is the interlacing of FLIF (Sneyers and
Wuille 2016). Learnt interpolation with one network shared over all scales is due to LLICTI (Kamisli 2022).
"""

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
    """The kept phases of each block are pixels of y; the other phases are unrestricted."""

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
        """Return, for each entry, the first kept pixel of its block: uint8 (B, G, C, h, w)."""
        first = self.d.stack_kept(self.y)[:, None, : len(self.order)]
        return first.expand(-1, self.groups, -1, -1, -1)


class Subsampling(Transform):
    """Keep some pixels of each block unchanged; a level models the others.

    `kept` lists the phases of a block, row by row, that are kept. The level's network works on a grid of
    one position per block.
    """

    kept: tuple[int, ...] = (0,)

    def weights(self, spec: ImageSpec) -> int:
        """Return the number of weights per block that `support` takes from the level's network."""
        return 0

    def stack_kept(self, y: Tensor) -> Tensor:
        """Lay out y (B, C, h, w) on the grid of blocks, kept phases as channels: (B, n C, H, W)."""
        return y

    def support(self, y: Tensor, spec: ImageSpec, weights: Tensor | None = None) -> Support:
        """Return the support, as `Transform.support`.

        Args:
            y: The kept pixels, (B, c, h, w).
            spec: Of x.
            weights: Of the corrections in `Support.refine`: (B, `weights(spec)`, H, W), any real numbers.
                None: no correction.
        """
        return _SubsamplingSupport(y, spec, self)


class Subsample(Subsampling):
    """Keep the first of every `rows` rows and the first of every `cols` columns.

    Args:
        rows: Rows per kept row.
        cols: Columns per kept column; None: the same as rows.
        staggered: Every second row of x lies half a column to the right, as in the output of
            `Checkerboard`; only the estimate depends on it.
    """

    def __init__(self, rows: int = 2, cols: int | None = None, *, staggered: bool = False) -> None:
        super().__init__()
        self.scale = (rows, rows if cols is None else cols)
        if min(self.scale) < 1 or self.scale == (1, 1):
            raise ValueError(f"subsampling must drop some rows or columns; got {self.scale}")
        if staggered and self.scale != (2, 1):
            raise ValueError(f"staggered needs the scale (2, 1); got {self.scale}")
        self.staggered = staggered

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        self.size(*x.shape[2:])
        n, m = self.scale
        return x[:, :, ::n, ::m].contiguous()

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """Interpolate linearly between kept pixels; the last row and column are repeated."""
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
    """Two groups: the upper right pixels of the blocks, then the lower left ones, whose diagonal
    neighbours are of the first group."""

    def __init__(self, y: Tensor, spec: ImageSpec, d: Subsampling, weights: Tensor | None) -> None:
        super().__init__(y, spec, d)
        self.weights = None if weights is None else torch.tanh(at_least_float32(weights))

    def refine(self, estimate: Tensor, v: Tensor) -> Tensor:
        """Add the weighted residuals of the four diagonal neighbours to the second group's estimate."""
        if self.weights is None:
            return estimate
        return torch.stack([estimate[:, 0], self._second(estimate, v)], 1)

    def refine_group(self, estimate: Tensor, v: Tensor, group: int) -> Tensor:
        return self._second(estimate, v) if group and self.weights is not None else estimate[:, group]

    def _second(self, estimate: Tensor, v: Tensor) -> Tensor:
        assert self.weights is not None
        first, second = estimate.unbind(1)
        h, w = first.shape[2:]
        residual = F.pad(v[:, 0] - first, (1, 0, 0, 1))  # 0 beyond the image's borders
        for i, weight in enumerate(self.weights.chunk(4, 1)):
            top, left = i // 2, i % 2
            second = second + weight * residual[:, :, top : top + h, left : left + w]
        return second


class Checkerboard(Subsampling):
    """Keep the pixels of one colour of a checkerboard: columns 2c + r % 2 of row r.

    y is half as wide as x. All four neighbours of a dropped pixel are kept, so dropped pixels carry little
    information about each other. Followed by `Subsample(2, 1, staggered=True)`, it keeps every second row
    and column: two steps of the quincunx lattice.
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
        """Estimate a dropped pixel by the mean of its four neighbours."""
        even, odd = at_least_float32(y).unflatten(2, (-1, 2)).unbind(3)
        left = torch.cat([odd[..., :1], odd[..., :-1]], 3)
        right = torch.cat([even[..., 1:], even[..., -1:]], 3)
        above = torch.cat([odd[:, :, :1], odd[:, :, :-1]], 2)
        below = torch.cat([even[:, :, 1:], even[:, :, -1:]], 2)
        upper = torch.stack([even, (even + right + above + odd) / 4], 4).flatten(3)
        lower = torch.stack([(left + odd + even + below) / 4, odd], 4).flatten(3)
        return torch.stack([upper, lower], 3).flatten(2, 3)
