"""The networks of a level: tensors in, raw distribution parameters out. SPEC section 4.

A `Branch` is a stack of backbone blocks; an encoder shrinks, a decoder enlarges, a flat one keeps the
resolution. The last convolution of each network starts small, so that the distributions start plain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvae.nn.layers import BACKBONES, Conv, Down, Up

__all__ = ["Branch", "Constant", "Decoder", "Encoder", "PriorNet", "Shared"]

_HEAD_SCALE = 0.1


def _fit(h: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring features to a size by the nearest neighbour; almost always they have it already."""
    return h if tuple(h.shape[2:]) == size else F.interpolate(h, size, mode="nearest")


@dataclass(frozen=True)
class Branch:
    """A stack: `blocks` blocks of `steps` layers with `growth` channels (for "residual": their width).

    resize "down" or "up" follows each block by a halving or doubling; "flat" keeps the resolution.
    `stem` is the number of channels that the input is brought to.
    """

    growth: int
    steps: int
    blocks: int
    resize: Literal["flat", "down", "up"] = "flat"
    stem: int = 32
    backbone: str = "dense"

    def build(self, channels: int) -> Stack:
        """The stack for an input of that many channels."""
        return Stack(self, channels)


class Stack(nn.Sequential):
    """The modules of a `Branch`; `out_channels` tells what comes out."""

    def __init__(self, branch: Branch, channels: int) -> None:
        block = BACKBONES[branch.backbone]
        modules: list[nn.Module] = []
        if branch.stem:
            modules += [Conv(channels, branch.stem), nn.ELU()]
            channels = branch.stem
        for _ in range(branch.blocks):
            core = block(channels, branch.growth, branch.steps)
            modules.append(core)
            channels = core.out_channels
            if branch.backbone == "residual":
                modules.append(nn.ELU())
            if branch.resize != "flat":
                resize = (Down if branch.resize == "down" else Up)(channels)
                modules.append(resize)
                channels = resize.out_channels
        super().__init__(*modules)
        self.out_channels = channels


class Encoder(nn.Module):
    """The image y[k] (B, C, H, W) in [-1, 1] -> parameters of q(z | y[k]), (B, 2 * latent, h, w).

    `stride` is the number of pixels, in height and width, for one position of z; `latent` its channels.
    """

    def __init__(self, channels: int, latent: int, branch: Branch) -> None:
        super().__init__()
        self.body = branch.build(channels)
        self.head = Conv(self.body.out_channels, 2 * latent, init_scale=_HEAD_SCALE)
        self.latent = latent
        self.stride = 2**branch.blocks if branch.resize == "down" else 1

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(y))
        return out


class PriorNet(nn.Module):
    """Context image and the latent above -> parameters of p(z | y_up, z_up), (B, 2 * latent, h, w).

    `ratio` is z's height and width divided by the context image's.
    """

    def __init__(
        self,
        channels: int,
        latent_up: int,
        latent: int,
        y: Branch,
        z: Branch,
        joint: Branch,
        ratio: tuple[float, float],
    ) -> None:
        super().__init__()
        self.ratio = ratio
        self.y_branch = y.build(channels)
        self.z_branch = z.build(latent_up) if latent_up else None
        width = self.y_branch.out_channels + (self.z_branch.out_channels if self.z_branch else 0)
        self.joint = joint.build(width)
        self.head = Conv(self.joint.out_channels, 2 * latent, init_scale=_HEAD_SCALE)

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        size = round(y.shape[2] * self.ratio[0]), round(y.shape[3] * self.ratio[1])
        h = _fit(self.y_branch(y), size)
        if self.z_branch is not None:
            h = torch.cat([h, _fit(self.z_branch(z), size)], 1)
        out: Tensor = self.head(self.joint(h))
        return out


class Decoder(nn.Module):
    """Context image (may have no channels) and latent (may be None) -> pixel parameters (B, P, h, w)."""

    def __init__(
        self, channels: int, latent: int, params: int, z: Branch | None, joint: Branch | None
    ) -> None:
        super().__init__()
        self.z_branch = z.build(latent) if z and latent else None
        width = channels + (self.z_branch.out_channels if self.z_branch else 0)
        self.joint = joint.build(width) if joint else None
        width = self.joint.out_channels if self.joint else width
        self.head = Conv(width, params, init_scale=_HEAD_SCALE)

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        h = y
        if self.z_branch is not None:
            size = y.shape[2], y.shape[3]
            h = _fit(self.z_branch(z), size)
            h = torch.cat([h, y.to(h.dtype)], 1)  # else one float32 input makes all of it float32
        if self.joint is not None:
            h = self.joint(h)
        out: Tensor = self.head(h)
        return out


class Shared(nn.Module):
    """A decoder that several levels share; `code`, learnt constant planes, tells it which one it serves.

    The decoder takes `PLANES` channels more than the context image has.
    """

    PLANES = 4

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.code = nn.Parameter(torch.zeros(self.PLANES))

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        b, _, h, w = y.shape
        planes = self.code.to(y.dtype).view(1, -1, 1, 1).expand(b, -1, h, w)
        out: Tensor = self.decoder(torch.cat([y, planes], 1), z)
        return out


class Constant(nn.Module):
    """The same learnt parameters at every position: a decoder with neither context nor latent."""

    def __init__(self, params: int) -> None:
        super().__init__()
        self.params = nn.Parameter(_HEAD_SCALE * torch.randn(params))

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        b, _, h, w = y.shape
        return self.params.view(1, -1, 1, 1).expand(b, -1, h, w)
