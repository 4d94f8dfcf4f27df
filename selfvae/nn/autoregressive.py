"""Networks whose outputs depend on the pixels before, in earlier groups and in a pixel's own.

Within its own group a pixel sees those before it by a masked convolution. Only that first layer looks
around; 1x1 layers follow. So the parameters of one pixel need a window of its neighbours and no other
computation again, which keeps sampling and decoding short. A network that sees earlier groups only computes
all positions at once, and all of its layers look around.

Source: van den Oord et al. 2016 (PixelCNN), section 3.1, mask A; Zhang et al. 2021 (NeLLoC), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from selfvae.nn.layers import Conv, ResidualLayer
from selfvae.nn.networks import HEAD_SCALE

__all__ = ["AutoregressiveDecoder", "GroupNet", "MaskedConv", "Wave", "waves"]

Wave = tuple[Tensor, Tensor]  # rows and columns, int64 (n,) both


def waves(height: int, width: int, radius: int, device: torch.device | None = None) -> list[Wave]:
    """Divide a grid into waves: a position's window, `radius` to all sides, holds earlier waves only.

    A window of radius 0 is empty, and the grid one wave.

    >>> [list(zip(*(x.tolist() for x in wave))) for wave in waves(2, 3, 1)]
    [[(0, 0)], [(0, 1)], [(0, 2), (1, 0)], [(1, 1)], [(1, 2)]]
    """
    rows = torch.arange(height, device=device)[:, None]
    number = (rows * (radius + 1) + torch.arange(width, device=device)) * (radius > 0)
    out = [torch.nonzero(number == t, as_tuple=True) for t in range(int(number.max()) + 1)]
    return [(found[0], found[1]) for found in out if len(found[0])]


class MaskedConv(Conv):
    """A convolution that sees only the rows above and, in the same row, the pixels to the left."""

    mask: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel)
        mask = torch.zeros(kernel, kernel)
        mask[: self.padding] = 1
        mask[self.padding, : self.padding] = 1
        self.register_buffer("mask", mask, persistent=False)

    def _directions(self) -> Tensor:
        return self.direction * self.mask

    def at(self, x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Return the outputs at some positions only: (B, out_channels, n).

        Args:
            x: The input with `padding` rows of zeros above and columns of zeros on both sides.
            rows, cols: The positions, int64 (n,).
        """
        seen = self.mask.flatten().nonzero()[:, 0]
        across, kernel = x.shape[3], self.mask.shape[0]
        offsets = seen // kernel * across + seen % kernel
        patches = x.flatten(2)[:, :, (rows * across + cols)[:, None] + offsets]  # B, C, n, taps
        weight = self.weight().flatten(2)[:, :, seen]
        return torch.einsum("bcnt,oct->bon", patches, weight) + self.bias[:, None]


class GroupNet(nn.Module):
    """The parameters of one group's pixels from features, earlier groups and earlier pixels of the group.

    With a kernel of 1 a pixel sees no other one of its group; the layers are then 3x3.

    Args:
        channels: C of the pixels.
        before: Number of earlier groups.
        width: F, channels of the features and the layers.
        params: Parameters per pixel.
        kernel: Of the masked convolution; 1: there is none.
        steps: Number of residual layers.
    """

    def __init__(
        self, channels: int, before: int, width: int, params: int, kernel: int, steps: int
    ) -> None:
        super().__init__()
        self.own = MaskedConv(channels, width, kernel) if kernel > 1 else None
        self.radius = kernel // 2
        self.earlier = Conv(channels * before, width) if before else None
        around, layers = (0, steps) if self.own else (steps, 0)
        self.around = nn.Sequential(*(ResidualLayer(width) for _ in range(around)))
        self.layers = nn.Sequential(
            *(ResidualLayer(width, 1) for _ in range(layers)),
            nn.ELU(),
            Conv(width, params, 1, init_scale=HEAD_SCALE),
        )

    def begin(self, features: Tensor, earlier: Tensor) -> Tensor:
        """Return what is known before the group's first pixel: (B, F, h, w).

        Args:
            features: (B, F, h, w).
            earlier: Entries of earlier groups, (B, before * C, h, w).
        """
        out: Tensor = self.around(features if self.earlier is None else features + self.earlier(earlier))
        return out

    def forward(self, features: Tensor, own: Tensor, earlier: Tensor) -> Tensor:
        """Return parameters (B, P, h, w) at all positions, given the group's entries own (B, C, h, w)."""
        base = self.begin(features, earlier)
        out: Tensor = self.layers(base if self.own is None else base + self.own(own))
        return out

    def at(self, base: Tensor, own: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """Return parameters at some positions: (B, P, n).

        Args:
            base: `begin` at the positions, (B, F, n).
            own: The group's entries as far as they are known, padded as for `MaskedConv.at`.
            rows, cols: The positions, int64 (n,).
        """
        seen = base if self.own is None else base + self.own.at(own, rows, cols)
        out: Tensor = self.layers(seen[:, :, None])
        return out[:, :, 0]


class AutoregressiveDecoder(nn.Module):
    """A decoder to features, and the networks of the groups.

    Args:
        decoder: Maps a context image and a latent to (B, G * F, h, w).
        groups: A network for each of the G groups.
    """

    def __init__(self, decoder: nn.Module, groups: Sequence[GroupNet]) -> None:
        super().__init__()
        self.decoder = decoder
        self.groups: Sequence[GroupNet] = nn.ModuleList(groups)  # type: ignore[assignment]
        self.radius = groups[0].radius

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        out: Tensor = self.decoder(y, z)
        return out
