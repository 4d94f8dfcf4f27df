"""Invertible maps between latents and Gaussian noise, with their log-determinants: RealNVP, autoregressive.

Source: Dinh et al. 2016, sections 3.1 to 3.6 (without batch normalisation: weight norm instead);
Papamakarios et al. 2017 (MAF), section 3; Chen et al. 2017 (VLAE), section 3.2, for its use as a prior.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfvae.nn.autoregressive import GroupNet, waves
from selfvae.nn.layers import Conv, DenseBlock, ResidualBlock

__all__ = [
    "AffineAutoregression",
    "AutoregressiveFlow",
    "Coupling",
    "Network",
    "RealNVP",
    "dense_network",
    "residual_network",
    "squeeze",
    "unsqueeze",
]


def squeeze(z: Tensor) -> Tensor:
    """Move each 2 x 2 block to the channels: (B, C, h, w) -> (B, 4C, h/2, w/2)."""
    return nn.functional.pixel_unshuffle(z, 2)


def unsqueeze(z: Tensor) -> Tensor:
    """The inverse of `squeeze`."""
    return nn.functional.pixel_shuffle(z, 2)


Network = Callable[[int, int], nn.Module]  # input and output channels -> the network of a coupling


def dense_network(
    channels: int, out: int, growth: int = 64, steps: int = 5, inner_elu: bool = True
) -> nn.Module:
    """Return the papers' network of a coupling: a dense block and a 3x3 convolution."""
    block = DenseBlock(channels, growth, steps, inner_elu)
    return nn.Sequential(block, Conv(block.out_channels, out, init_scale=0.1))


def residual_network(channels: int, out: int, hidden: int = 64, blocks: int = 5) -> nn.Module:
    """Return the network of `flow-residual`: residual layers between two 3x3 convolutions."""
    body = ResidualBlock(hidden, hidden, blocks)
    return nn.Sequential(Conv(channels, hidden), body, nn.ELU(), Conv(hidden, out, init_scale=0.1))


class Coupling(nn.Module):
    """Affine coupling: one half of z passes unchanged, and scales and shifts the other.

    `forward` maps z to (noise, ln |det d noise / d z|), of shapes (B, C, h, w) and (B,); `inverse` maps
    noise to z.

    Args:
        channels: C.
        mask: Which half passes: every second position, or the first half of the channels.
        flip: Exchange the halves.
        network: Makes the network from its numbers of input and output channels.
        halves: With a mask of channels, the input of the network is only the C / 2 channels that pass; else
            it is all channels, the others set to zero.
    """

    def __init__(
        self,
        channels: int,
        mask: Literal["checkerboard", "channel"],
        flip: bool,
        network: Network,
        halves: bool = True,
    ) -> None:
        super().__init__()
        self.mask_kind, self.flip = mask, flip
        self.halves = halves and mask == "channel"
        seen = channels // 2 if self.halves else channels
        self.net = network(seen, 2 * seen)
        self.scale = nn.Parameter(torch.ones(seen, 1, 1))

    def mask(self, z: Tensor) -> Tensor:
        """Return True where z passes unchanged: bool, of a shape that broadcasts to z's."""
        if self.mask_kind == "checkerboard":
            rows = torch.arange(z.shape[2], device=z.device)[:, None]
            cols = torch.arange(z.shape[3], device=z.device)
            return ((rows + cols) % 2 == int(self.flip))[None, None]
        half = torch.arange(z.shape[1], device=z.device) < z.shape[1] // 2
        return (half != self.flip).view(1, -1, 1, 1)

    def affine(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the scales, and the shifts: (B, C, h, w) each, 0 where z passes."""
        if self.halves:
            stays = z.chunk(2, 1)[int(self.flip)]
            log_scale, shift = self.net(stays).to(z.dtype).chunk(2, 1)
            return self._moved(self.scale * torch.tanh(log_scale)), self._moved(shift)
        kept = self.mask(z).to(z.dtype)
        log_scale, shift = self.net(z * kept).to(z.dtype).chunk(2, 1)
        return self.scale * torch.tanh(log_scale) * (1 - kept), shift * (1 - kept)

    def _moved(self, half: Tensor) -> Tensor:
        """Fill up the half of the channels that changes with zeros for the other: (B, C, h, w)."""
        zeros = torch.zeros_like(half)
        return torch.cat([half, zeros] if self.flip else [zeros, half], 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.affine(z)
        return z * torch.exp(log_scale) + shift, log_scale.flatten(1).sum(1)

    def inverse(self, noise: Tensor) -> Tensor:
        log_scale, shift = self.affine(noise)
        return (noise - shift) * torch.exp(-log_scale)


Step = Callable[[Coupling, Tensor], Tensor]


class RealNVP(nn.Module):
    """RealNVP with two scales, for z (B, C, h, w) of even height and width.

    3 checkerboard couplings; squeeze; 3 channel couplings; half of the channels are finished, the other
    half passes 4 more checkerboard couplings.

    Args:
        channels: C.
        network: As in `Coupling`.
        halves: As in `Coupling`.
    """

    multiple = 2  # of the height and width of z, for the squeeze

    def __init__(self, channels: int, network: Network = dense_network, halves: bool = True) -> None:
        super().__init__()

        def couplings(c: int, mask: Literal["checkerboard", "channel"], n: int) -> nn.ModuleList:
            return nn.ModuleList(Coupling(c, mask, i % 2 == 1, network, halves) for i in range(n))

        self.checker: Any = couplings(channels, "checkerboard", 3)
        self.channel: Any = couplings(4 * channels, "channel", 3)
        self.final: Any = couplings(2 * channels, "checkerboard", 4)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of z, (B, C, h, w), and ln |det d noise / d z| in nats, (B,)."""
        total = torch.zeros(z.shape[0], device=z.device, dtype=z.dtype)

        def step(coupling: Coupling, z: Tensor) -> Tensor:
            nonlocal total
            z, log_det = coupling(z)
            total = total + log_det
            return z

        return self.walk(z, step), total

    def inverse(self, noise: Tensor) -> Tensor:
        """Return z of noise, both (B, C, h, w)."""
        return self.walk_back(noise, lambda coupling, z: coupling.inverse(z))

    def walk(self, z: Tensor, step: Step) -> Tensor:
        """Apply step(coupling, z) for one coupling after the other, from z to noise, both (B, C, h, w)."""
        if z.shape[2] % 2 or z.shape[3] % 2:
            raise ValueError(
                f"the RealNVP prior needs latents of even height and width; got {tuple(z.shape[2:])}: "
                "change the image size or use prior='mog-local'"
            )
        for coupling in self.checker:
            z = step(coupling, z)
        z = squeeze(z)
        for coupling in self.channel:
            z = step(coupling, z)
        # split so that each position of the 2 x 2 blocks keeps half of its channels
        done, z = z[:, ::2], z[:, 1::2]
        for coupling in self.final:
            z = step(coupling, z)
        return unsqueeze(torch.stack([done, z], 2).flatten(1, 2))

    def walk_back(self, noise: Tensor, step: Step) -> Tensor:
        """Apply step(coupling, z) for the couplings in reverse order, from noise to z."""
        z = squeeze(noise)
        done, z = z[:, ::2], z[:, 1::2]
        for coupling in reversed(self.final):
            z = step(coupling, z)
        z = torch.stack([done, z], 2).flatten(1, 2)
        for coupling in reversed(self.channel):
            z = step(coupling, z)
        z = unsqueeze(z)
        for coupling in reversed(self.checker):
            z = step(coupling, z)
        return z


class AffineAutoregression(nn.Module):
    """An affine map of each position, from the positions before it; maps as `Coupling` does.

    The channels are in four parts, one after the other. Within a part a position sees those above it and to
    its left in a window of 15 x 15, and all earlier parts.

    Args:
        channels: C; there is only one part if 4 does not divide it.
        width: Channels of the networks.
        steps: Number of residual layers of each network.
    """

    WINDOW = 15
    LIMIT = 5.0  # of the logarithms of the scales

    def __init__(self, channels: int, width: int, steps: int) -> None:
        super().__init__()
        self.parts = 1 if channels % 4 else 4
        size = channels // self.parts
        self.place = Conv(1, width, self.WINDOW)
        self.nets: Any = nn.ModuleList(
            GroupNet(size, g, width, 2 * size, self.WINDOW, steps) for g in range(self.parts)
        )

    def _places(self, z: Tensor) -> Tensor:
        """Return features (1, width, h, w) of where a position is: an image of ones shows its margins."""
        out: Tensor = self.place(torch.ones(1, 1, *z.shape[2:], dtype=z.dtype, device=z.device))
        return out

    def _affine(self, params: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shifts, and the logarithms of the scales."""
        shift, raw = params.to(like.dtype).chunk(2, 1)
        return shift, self.LIMIT * torch.tanh(raw / self.LIMIT)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        places, parts = self._places(z), z.chunk(self.parts, 1)
        noise, total = [], torch.zeros(z.shape[0], device=z.device, dtype=z.dtype)
        for g, (net, part) in enumerate(zip(self.nets, parts, strict=True)):
            shift, log_scale = self._affine(net(places, part, z[:, : g * part.shape[1]]), z)
            noise.append((part - shift) * torch.exp(-log_scale))
            total = total - log_scale.flatten(1).sum(1)
        return torch.cat(noise, 1), total

    def inverse(self, noise: Tensor) -> Tensor:
        places, out = self._places(noise), noise[:, :0]
        height, width = noise.shape[2:]
        for net, part in zip(self.nets, noise.chunk(self.parts, 1), strict=True):
            base, margin = net.begin(places, out), net.radius
            known = nn.functional.pad(torch.zeros_like(part), (margin, margin, margin, 0))
            inner = known[:, :, margin:, margin : margin + width]
            for rows, cols in waves(height, width, margin, noise.device):
                at = (..., rows, cols)
                shift, log_scale = self._affine(net.at(base[at], known, rows, cols), noise)
                inner[at] = part[at] * torch.exp(log_scale) + shift
            out = torch.cat([out, inner], 1)
        return out


class AutoregressiveFlow(nn.Module):
    """Two autoregressions, the second in the reverse order of rows, columns and channels.

    Args:
        channels, width, steps: As in `AffineAutoregression`.
    """

    multiple = 1  # of the height and width of z

    def __init__(self, channels: int, width: int, steps: int) -> None:
        super().__init__()
        self.maps: Any = nn.ModuleList(AffineAutoregression(channels, width, steps) for _ in range(2))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of z, (B, C, h, w), and ln |det d noise / d z| in nats, (B,)."""
        first, second = self.maps
        z, log_det = first(z)
        noise, other = second(z.flip(1, 2, 3))
        return noise, log_det + other

    def inverse(self, noise: Tensor) -> Tensor:
        """Return z of noise, both (B, C, h, w)."""
        first, second = self.maps
        out: Tensor = first.inverse(second.inverse(noise).flip(1, 2, 3))
        return out
