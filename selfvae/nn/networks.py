"""The networks of a level, from tensors to raw parameters of distributions: docs/spec.md, Networks.

The last convolution of each network is initialised small, so that training starts from wide distributions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvae.nn.integer import FRACTION, IntegerActivation, IntegerConv, grid_scale, round_to
from selfvae.nn.layers import ACTIVATIONS, Block, Conv, DenseBlock, Down, ResidualBlock, Up

__all__ = ["HEAD_SCALE", "Branch", "Constant", "Decoder", "Encoder", "PriorNet", "Shared", "SubPixel"]

HEAD_SCALE = 0.1  # standard deviation of a network's outputs after the initialisation


def _fit(h: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize features to a size by the nearest neighbour, unless they have it, as is usual."""
    return h if tuple(h.shape[2:]) == size else F.interpolate(h, size, mode="nearest")


@dataclass(frozen=True)
class Branch:
    """The structure of a stack of blocks.

    Args:
        growth: Channels that each step of a dense block adds, or the channels of residual blocks.
        steps: Steps per block.
        blocks: Number of blocks.
        resize: "down" or "up" halves or doubles height and width after each block, and doubles or halves
            the growth of dense blocks; "flat" keeps the resolution.
        last: Add a block at the last resolution.
        stem: Channels of a first convolution; 0: none.
        out: Channels of a convolution at the end; 0: none.
        kernel: Kernel size of that convolution.
        backbone: A name in `BACKBONES`.
        inner_elu: Of dense blocks, see `DenseBlock`.
        activation: Of residual blocks, a name in `ACTIVATIONS`.
        kernels: Kernel sizes of the stem and of each residual layer.
        depthwise: Of residual blocks, see `ResidualLayer`.
        integer: Compute in whole numbers; flat residual blocks with a stem only.
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
    integer: bool = False

    def build(self, channels: int) -> Stack:
        """Build the stack for an input with the given number of channels."""
        return Stack(self, channels)

    def block(self, channels: int, growth: int) -> Block:
        """Build one block for an input with the given number of channels."""
        if self.backbone == "dense":
            return DenseBlock(channels, growth, self.steps, self.inner_elu)
        conv = IntegerConv if self.integer else Conv
        return ResidualBlock(channels, growth, self.steps, self.kernels[1], self.act, self.depthwise, conv)

    def act(self) -> nn.Module:
        """Build one activation of residual blocks."""
        return IntegerActivation(self.activation) if self.integer else ACTIVATIONS[self.activation]()


class Stack(nn.Sequential):
    """The modules of a `Branch`; `out_channels` is the number of its output channels."""

    def __init__(self, branch: Branch, channels: int) -> None:
        modules: list[nn.Module] = []
        growth, dense = branch.growth, branch.backbone == "dense"
        if branch.stem:
            kernel = branch.kernels[0]
            if branch.integer:
                modules.append(IntegerConv(channels, branch.stem, kernel, round_input=True))
            else:
                modules.append(Conv(channels, branch.stem, kernel))
            modules.append(branch.act())
            channels = branch.stem
        for i in range(branch.blocks + branch.last):
            block = branch.block(channels, growth)
            modules.append(block)
            channels = block.out_channels
            if not dense:
                modules.append(branch.act())
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
    """Maps an image y[k], (B, C, H, W) in [-1, 1], to parameters of q(z | y[k]), (B, 2 * latent, h, w).

    Args:
        channels: C.
        latent: Channels of z.
        branch: The network's structure; it determines `stride`, the pixels per position of z.
        kernel: Kernel size of the last convolution.
    """

    def __init__(self, channels: int, latent: int, branch: Branch, kernel: int = 1) -> None:
        super().__init__()
        self.body = branch.build(channels)
        self.head = Conv(self.body.out_channels, 2 * latent, kernel, init_scale=HEAD_SCALE)
        self.latent = latent
        self.stride = 2**branch.blocks if branch.resize == "down" else 1

    def forward(self, y: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(y))
        return out


class PriorNet(nn.Module):
    """Maps y_up and z_up to parameters of p(z | y_up, z_up), (B, 2 * latent, h, w).

    Args:
        channels: Of y_up, (B, channels, H, W) in [-1, 1].
        latent_up: Channels of z_up; 0: there is none.
        latent: Channels of z.
        y: Structure of the branch of y_up; an ELU follows it if it ends with a convolution.
        z: Structure of the branch of z_up.
        joint: Structure of the network after both are concatenated.
        ratio: Height and width of z divided by those of y_up.
        kernel: Kernel size of the last convolution.
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
        self.head = Conv(self.joint.out_channels, 2 * latent, kernel, init_scale=HEAD_SCALE)

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        size = round(y.shape[2] * self.ratio[0]), round(y.shape[3] * self.ratio[1])
        h = self.y_branch(y)
        h = _fit(F.elu(h) if self.elu else h, size)
        if self.z_branch is not None:
            h = torch.cat([h, _fit(self.z_branch(z), size)], 1)
        out: Tensor = self.head(self.joint(h))
        return out


class Decoder(nn.Module):
    """Maps a context image and a latent to parameters of the pixels' distribution, (B, params, h, w).

    Args:
        channels: Of the context image; may be 0.
        latent: Channels of z; 0: there is none.
        params: Parameters per position (see `distributions.pixels.param_count`).
        z: Structure of the branch of z.
        joint: Structure of the network after z and the context are concatenated; None: none.
        kernel: Kernel size of the last convolution.
        grid: Of the outputs, see `IntegerConv`; None unless the joint network is one of whole numbers.
        head_scale: Standard deviation of the outputs after the initialisation.
    """

    def __init__(
        self,
        channels: int,
        latent: int,
        params: int,
        z: Branch | None,
        joint: Branch | None,
        kernel: int = 3,
        grid: tuple[Tensor, Tensor] | None = None,
        head_scale: float = HEAD_SCALE,
    ) -> None:
        super().__init__()
        self.z_branch = z.build(latent) if z and latent else None
        width = channels + (self.z_branch.out_channels if self.z_branch else 0)
        self.joint = joint.build(width) if joint else None
        width = self.joint.out_channels if self.joint else width
        if grid is None:
            self.head = Conv(width, params, kernel, init_scale=head_scale)
        else:
            self.head = IntegerConv(width, params, kernel, init_scale=head_scale, grid=grid)

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


class SubPixel(nn.Module):
    """A decoder on the grid of the smaller image, whose outputs are those of all pixels of a block.

    Args:
        decoder: Maps (B, C, h, w) to (B, rows * cols * params, h, w).
        scale: Rows and columns of a block; the result is (B, params, h * rows, w * cols).

    Source: Shi et al. 2016 (ESPCN), section 3.2.
    """

    def __init__(self, decoder: Decoder, scale: tuple[int, int]) -> None:
        super().__init__()
        self.decoder, self.scale = decoder, scale

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        out = self.decoder(y, z)
        (b, _, h, w), (rows, cols) = out.shape, self.scale
        out = out.view(b, -1, rows, cols, h, w).permute(0, 1, 4, 2, 5, 3)
        return out.reshape(b, -1, h * rows, w * cols)


class Shared(nn.Module):
    """One level's use of a decoder that several levels share.

    The decoder gets `PLANES` more channels than the context image has: constants, learnt for the level.
    """

    PLANES = 4

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.code = nn.Parameter(torch.zeros(self.PLANES))

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the constants of an integer network by the rounded ones."""
        self.code.copy_(round_to(self.code, torch.tensor(2.0**FRACTION)).clamp(-1, 1))

    def with_planes(self, y: Tensor) -> Tensor:
        """Return the context image with the constants as further channels."""
        b, _, h, w = y.shape
        planes = self.code.to(y.dtype).view(1, -1, 1, 1).expand(b, -1, h, w)
        return torch.cat([y, planes], 1)

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        out: Tensor = self.decoder(self.with_planes(y), z)
        return out


class Constant(nn.Module):
    """A decoder without context and latent: the same learnt parameters at all positions.

    Args:
        params: Their number.
        grid: To which they are rounded, see `IntegerConv`; None: they are not.
    """

    scale: Tensor | None
    limit: Tensor | None

    def __init__(self, params: int, grid: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.params = nn.Parameter(HEAD_SCALE * torch.randn(params))
        scale = limit = None
        if grid is not None:
            scale = grid_scale(grid[0])
            limit = grid[1] / scale
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("limit", limit, persistent=False)

    def rounded(self) -> Tensor:
        """Return the parameters on their grid: (params,)."""
        if self.scale is None or self.limit is None:
            return self.params
        return torch.maximum(torch.minimum(round_to(self.params, self.scale), self.limit), -self.limit)

    def forward(self, y: Tensor, z: Tensor | None) -> Tensor:
        b, _, h, w = y.shape
        return self.rounded().view(1, -1, 1, 1).expand(b, -1, h, w)

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the parameters by the rounded ones."""
        self.params.copy_(self.rounded())
