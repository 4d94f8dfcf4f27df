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

from selfvae.nn.layers import ACTIVATIONS, Block, Conv, DenseBlock, Down, ResidualBlock, Up

__all__ = ["Branch", "Constant", "Decoder", "Encoder", "PriorNet", "Shared"]

_HEAD_SCALE = 0.1


def _fit(h: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring features to a size by the nearest neighbour; almost always they have it already."""
    return h if tuple(h.shape[2:]) == size else F.interpolate(h, size, mode="nearest")


@dataclass(frozen=True)
class Branch:
    """A stack: `blocks` blocks of `steps` steps with `growth` channels (for "residual": their width).

    Arguments:
        resize: "down" or "up": each block is followed by a halving or doubling of height and width; the
            growth of dense blocks doubles or halves with it. "flat" keeps the resolution.
        last: one more block at the last resolution.
        stem: channels that a first convolution brings the input to; 0: none.
        out, kernel: channels and size of a convolution at the end; out=0: none.
        backbone: of `BACKBONES`.
        inner_elu: of dense blocks, see there.
        activation, kernels, depthwise: of residual blocks; kernels of the stem and of each layer.
    """

    growth: int
    steps: int
    blocks: int
    resize: Literal["flat", "down", "up"] = "flat"
    last: bool = False
    stem: int = 0
    out: int = 0
    kernel: int = 1
    backbone: str = "dense"
    inner_elu: bool = True
    activation: str = "elu"
    kernels: tuple[int, int] = (3, 3)
    depthwise: bool = False

    def build(self, channels: int) -> Stack:
        """The stack for an input of that many channels."""
        return Stack(self, channels)

    def block(self, channels: int, growth: int) -> Block:
        """One block."""
        if self.backbone == "dense":
            return DenseBlock(channels, growth, self.steps, self.inner_elu)
        return ResidualBlock(channels, growth, self.steps, self.kernels[1], self.activation, self.depthwise)


class Stack(nn.Sequential):
    """The modules of a `Branch`; `out_channels` tells what comes out."""

    def __init__(self, branch: Branch, channels: int) -> None:
        modules: list[nn.Module] = []
        growth, dense = branch.growth, branch.backbone == "dense"
        if branch.stem:
            modules += [Conv(channels, branch.stem, branch.kernels[0]), ACTIVATIONS[branch.activation]()]
            channels = branch.stem
        for i in range(branch.blocks + branch.last):
            block = branch.block(channels, growth)
            modules.append(block)
            channels = block.out_channels
            if not dense:
                modules.append(ACTIVATIONS[branch.activation]())
            if branch.resize != "flat" and i < branch.blocks:
                resize = (Down if branch.resize == "down" else Up)(channels)
                modules.append(resize)
                channels = resize.out_channels
                if dense:
                    growth = 2 * growth if branch.resize == "down" else max(1, growth // 2)
        if branch.out:
            modules.append(Conv(channels, branch.out, branch.kernel))
            channels = branch.out
        super().__init__(*modules)
        self.out_channels = channels


class Encoder(nn.Module):
    """The image y[k] (B, C, H, W) in [-1, 1] -> parameters of q(z | y[k]), (B, 2 * latent, h, w).

    `stride` is the number of pixels, in height and width, for one position of z; `latent` its channels;
    `kernel` the size of the last convolution.
    """

    def __init__(self, channels: int, latent: int, branch: Branch, kernel: int = 1) -> None:
        super().__init__()
        self.body = branch.build(channels)
        self.head = Conv(self.body.out_channels, 2 * latent, kernel, init_scale=_HEAD_SCALE)
        self.latent = latent
        self.stride = 2**branch.blocks if branch.resize == "down" else 1

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(y))
        return out


class PriorNet(nn.Module):
    """Context image and the latent above -> parameters of p(z | y_up, z_up), (B, 2 * latent, h, w).

    `ratio` is z's height and width divided by the context image's; `kernel` the size of the last
    convolution. An ELU follows a context branch that ends with a convolution.
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
        kernel: int = 1,
    ) -> None:
        super().__init__()
        self.ratio, self.elu = ratio, bool(y.out)
        self.y_branch = y.build(channels)
        self.z_branch = z.build(latent_up) if latent_up else None
        width = self.y_branch.out_channels + (self.z_branch.out_channels if self.z_branch else 0)
        self.joint = joint.build(width)
        self.head = Conv(self.joint.out_channels, 2 * latent, kernel, init_scale=_HEAD_SCALE)

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        size = round(y.shape[2] * self.ratio[0]), round(y.shape[3] * self.ratio[1])
        h = self.y_branch(y)
        h = _fit(F.elu(h) if self.elu else h, size)
        if self.z_branch is not None:
            h = torch.cat([h, _fit(self.z_branch(z), size)], 1)
        out: Tensor = self.head(self.joint(h))
        return out


class Decoder(nn.Module):
    """Context image (may have no channels) and latent (may be None) -> pixel parameters (B, P, h, w).

    `kernel` is the size of the last convolution.
    """

    def __init__(
        self,
        channels: int,
        latent: int,
        params: int,
        z: Branch | None,
        joint: Branch | None,
        kernel: int = 3,
    ) -> None:
        super().__init__()
        self.z_branch = z.build(latent) if z and latent else None
        width = channels + (self.z_branch.out_channels if self.z_branch else 0)
        self.joint = joint.build(width) if joint else None
        width = self.joint.out_channels if self.joint else width
        self.head = Conv(width, params, kernel, init_scale=_HEAD_SCALE)

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
