"""Building blocks of the networks: weight-normalised convolutions, dense and residual blocks, resizing.

Every block maps (B, C, h, w) to (B, out_channels, h, w) (or a resized h, w) and is fully convolutional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = [
    "ACTIVATIONS",
    "BACKBONES",
    "Block",
    "ChannelAttention",
    "Conv",
    "DenseBlock",
    "DenseStep",
    "Down",
    "ResidualBlock",
    "ResidualLayer",
    "Up",
    "checkpoint_activations",
    "data_dependent_init",
]


class _WeightNorm(torch.autograd.Function):
    """gain * v / (|v| + 1e-8), with fewer passes over v in the backward pass than autograd would make.

    Autograd would go through v once per operation, twelve times in all, which took 7% of a training step of
    the papers' models on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, direction: Tensor, gain: Tensor, others: list[int]) -> Tensor:
        """Normalise a direction over all its dimensions but one, `others`, that of the gain."""
        norm = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
        scale = gain.view_as(norm) / (norm + 1e-8)
        ctx.save_for_backward(direction, norm, scale)
        ctx.others = others
        return direction * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of direction and gain."""
        direction, norm, scale = ctx.saved_tensors
        # d / d gain; a direction of length 0 has no gradient through its length
        slope = (grad * direction).sum(ctx.others, keepdim=True) / (norm + 1e-8)
        along = slope * scale / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return torch.addcmul(grad * scale, direction, along, value=-1), slope.flatten(), None


class Conv(nn.Module):
    """A weight-normalised convolution, w = gain * v / |v|, with data-dependent initialisation.

    Inside `data_dependent_init` the first forward pass sets gain and bias so that each output channel has
    mean 0 and standard deviation `init_scale` on that batch; the buffer `initialised` records it. In `eval`
    mode, without gradients and in a single process, w is computed once and cached until a parameter changes
    by an operation that autograd counts (not in place through `.data`).

    Args:
        in_channels: Of the input (B, in_channels, h, w).
        out_channels: Of the output.
        kernel: Height and width of the kernel, odd.
        stride: The output has 1 / stride of the input's height and width.
        transposed: Transposed convolution: `stride` times the height and width instead.
        init_scale: Standard deviation of the output after the initialisation.
        groups: Of channels that are convolved separately; not with `transposed`.

    Source: Salimans & Kingma 2016, section 3.
    """

    initialised: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        transposed: bool = False,
        init_scale: float = 1.0,
        groups: int = 1,
    ) -> None:
        super().__init__()
        shape = (in_channels, out_channels) if transposed else (out_channels, in_channels // groups)
        self.direction = nn.Parameter(torch.randn(*shape, kernel, kernel) * 0.05)
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("initialised", torch.tensor(False))
        self.stride, self.transposed, self.init_scale = stride, transposed, init_scale
        self.groups = groups
        self.padding = (kernel - 1) // 2
        self.initialising = False
        self._kept: tuple[Tensor, Tensor, Any, Tensor] | None = None

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the normalised kernel, in the parameters' dtype or the given one."""
        dtype = dtype or self.direction.dtype
        v, g = self.direction, self.gain
        learning = self.training or torch.is_grad_enabled()
        # a traced module cannot cache, and FSDP changes parameters without counting
        uncounted = v.is_inference() or torch.compiler.is_compiling() or dist.is_initialized()
        if learning or uncounted:
            return self._normalised().to(dtype)
        state = dtype, v._version, v.data_ptr(), g._version, g.data_ptr()
        kept = self._kept
        if kept is None or kept[0] is not v or kept[1] is not g or kept[2] != state:
            self._kept = kept = v, g, state, self._normalised().to(dtype)
        return kept[3]

    def train(self, mode: bool = True) -> Conv:
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # to another device, dtype or layout
        self._kept = None
        return super()._apply(*args, **kwargs)

    def _normalised(self) -> Tensor:
        others = [i for i in range(4) if i != (1 if self.transposed else 0)]
        out: Tensor = _WeightNorm.apply(self._directions(), self.gain, others)
        return out

    def _directions(self) -> Tensor:
        return self.direction

    def _apply_weight(self, x: Tensor) -> Tensor:
        weight = self.weight(autocast_dtype(self.bias))
        if self.transposed:
            return F.conv_transpose2d(
                x, weight, self.bias, self.stride, self.padding,
                output_padding=self.stride + 2 * self.padding - self.direction.shape[-1],
            )  # fmt: skip
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.initialising:
            self._initialise(x)
        return self._apply_weight(x)

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        out = self._apply_weight(x).float()
        # a constant channel (one pixel, say) has no spread to normalise
        std, mean = torch.std_mean(out, dim=(0, 2, 3), correction=0)
        scale = torch.where(std > 1e-6, self.init_scale / std.clamp(min=1e-6), self.init_scale)
        self.gain.mul_(scale)
        self.bias.copy_((self.bias - mean) * scale)
        self.initialised.fill_(True)
        self.initialising = False

    def extra_repr(self) -> str:
        i, o = self.direction.shape[:2] if self.transposed else self.direction.shape[1::-1]
        kind = ", transposed" if self.transposed else ""
        return f"{i}, {o}, kernel={self.direction.shape[-1]}, stride={self.stride}{kind}"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which `torch.autocast` computes a convolution of x; None where it is off."""
    kind = x.device.type
    active = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if active else None


@contextmanager
def data_dependent_init(module: nn.Module) -> Iterator[None]:
    """Initialise all layers that need data on the module's next forward pass, unless they have been."""
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "initialising")]
    layers = [layer for layer in layers if not bool(layer.initialised)]
    for layer in layers:
        layer.initialising = True
    try:
        yield
    finally:
        for layer in layers:
            layer.initialising = False


class ChannelAttention(nn.Module):
    """Multiply each channel by a gate computed from the global means of all channels.

    Args:
        channels: Of the input (B, channels, h, w) and the output.
        inner_elu: Put an ELU between the gate's two 1x1 convolutions.

    Source: Zhang et al. 2018 (RCAN), section 3.3.
    """

    def __init__(self, channels: int, inner_elu: bool = True) -> None:
        super().__init__()
        hidden = max(1, channels // 8)
        between = nn.ELU(inplace=True) if inner_elu else nn.Identity()
        self.gate = nn.Sequential(
            Conv(channels, hidden, 1), between, Conv(hidden, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(x.mean((2, 3), keepdim=True))
        return x * gate


class DenseStep(nn.Sequential):
    """A 1x1 convolution to 4G channels and a 3x3 to G, concatenated to the input; ELU of the whole.

    Maps (B, C, h, w) to (B, C + G, h, w). `inner_elu` puts an ELU between the two convolutions.
    """

    def __init__(self, channels: int, growth: int, inner_elu: bool = True) -> None:
        between = nn.ELU(inplace=True) if inner_elu else nn.Identity()
        super().__init__(Conv(channels, 4 * growth, 1), between, Conv(4 * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        new = super().forward(x)
        # two layouts would be joined to a contiguous tensor, which each later convolution copies
        last = new.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        joined = torch.cat([x.to(new.dtype, memory_format=layout), new], 1)
        return F.elu_(joined)  # in place: training keeps the features after the ELU only


class DenseBlock(nn.Sequential):
    """Dense steps, each of which adds `growth` channels, and one channel attention at the end.

    Maps (B, channels, h, w) to (B, channels + steps * growth, h, w).

    Args:
        channels: Of the input.
        growth: Channels that a step adds.
        steps: Number of steps.
        inner_elu: As in `DenseStep` and `ChannelAttention`. The thesis has it ("ELUs are used everywhere"),
            the configuration published with the paper does not.

    Source: Gatopoulos & Tomczak 2020, figure 4; after Huang et al. 2016.
    """

    def __init__(self, channels: int, growth: int, steps: int, inner_elu: bool = True) -> None:
        wide = channels + steps * growth
        super().__init__(
            *(DenseStep(c, growth, inner_elu) for c in range(channels, wide, growth)),
            ChannelAttention(wide, inner_elu),
        )
        self.out_channels = wide


class ClippedReLU(nn.Module):
    """max(0, min(x, 127/32)): 128 steps of 1/32 represent it, for conversion to an integer network."""

    LIMIT = 127 / 32

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0.0, self.LIMIT)


class HardELU(nn.Module):
    """max(-1, min(x, 127/32)): like `ClippedReLU`, but negative values down to -1 pass, as in ELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-1.0, ClippedReLU.LIMIT)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU, "clipped_relu": ClippedReLU, "hard_elu": HardELU,
}  # fmt: skip


class ResidualLayer(nn.Sequential):
    """x + f(x), f: activation, k x k convolution, activation, 1x1 convolution; f starts near zero.

    With `depthwise` the k x k convolution is depthwise; a 1x1 convolution to twice the channels follows.
    """

    def __init__(
        self,
        channels: int,
        kernel: int = 3,
        act: Callable[[], nn.Module] = nn.ELU,
        depthwise: bool = False,
        conv: type[Conv] = Conv,
    ) -> None:
        if depthwise:
            first = [conv(channels, channels, kernel, groups=channels), conv(channels, 2 * channels, 1)]
        else:
            first = [conv(channels, channels, kernel)]
        wide = 2 * channels if depthwise else channels
        super().__init__(act(), *first, act(), conv(wide, channels, 1, init_scale=0.1))

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = super().forward(x)
        return x + change


class ResidualBlock(nn.Module):
    """`steps` residual layers with `growth` channels; starts as the identity (after a 1x1 convolution)."""

    def __init__(
        self,
        channels: int,
        growth: int,
        steps: int,
        kernel: int = 3,
        act: Callable[[], nn.Module] = nn.ELU,
        depthwise: bool = False,
        conv: type[Conv] = Conv,
    ) -> None:
        super().__init__()
        self.widen = nn.Identity() if channels == growth else conv(channels, growth, 1)
        layers = (ResidualLayer(growth, kernel, act, depthwise, conv) for _ in range(steps))
        self.layers = nn.Sequential(*layers)
        self.out_channels = growth

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(self.widen(x))
        return out


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute the activations inside dense blocks and residual layers in the backward pass."""
    for part in module.modules():
        if isinstance(part, (DenseBlock, ResidualLayer)):
            again = partial(checkpoint, part.forward, use_reentrant=False)
            part.forward = again  # type: ignore[method-assign]


Block = DenseBlock | ResidualBlock

BACKBONES: dict[str, type[Block]] = {"dense": DenseBlock, "residual": ResidualBlock}


class Down(nn.Sequential):
    """Halve height and width and double the channels: a strided 3x3 convolution and ELU."""

    def __init__(self, channels: int) -> None:
        super().__init__(Conv(channels, 2 * channels, stride=2), nn.ELU(inplace=True))
        self.out_channels = 2 * channels


class Up(nn.Sequential):
    """Double height and width and halve the channels: a transposed 3x3 convolution and ELU."""

    def __init__(self, channels: int) -> None:
        half = max(1, channels // 2)
        super().__init__(Conv(channels, half, stride=2, transposed=True), nn.ELU(inplace=True))
        self.out_channels = half
