"""Networks of whole numbers, which compute the same on every machine.

All numbers are multiples of powers of two, few enough bits wide to be exact in float32:

- a weight is n 2^-e with |n| <= 127, with one e per output channel;
- an activation is one of 256 multiples of 2^-j, with one j per layer;
- inputs, biases and the sums of a convolution are rounded to multiples of 2^-8, the outputs of a network
  to the grids of the parameters of a likelihood.

A convolution adds products of whole numbers. As long as the sum of their absolute values stays below 2^24
(`check_exact`), float32 holds every partial sum exactly: the result depends neither on the order of
summation, nor on instruction set, threads, batch size or memory layout. All other operations are products
with powers of two or small whole numbers, rounding half to even, minimum and maximum, which IEEE 754
defines exactly. Convolutions in TF32 with wider numbers, bfloat16, Winograd's or Fourier transforms are not
exact: `codec.chains` checks a known answer before it uses a network.

Training computes forward exactly as here, and backward as if nothing were rounded (the straight-through
estimator), with precision bf16-mixed in bfloat16; the steps 2^-j are learnt.

Source: Balle et al. 2019, "Integer networks for data compression with latent-variable models"; Bengio et
al. 2013, section 4 (straight-through); Esser et al. 2020, equation 3 (the gradient of a step), here of its
logarithm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvae.nn.layers import Conv, ResidualLayer

__all__ = [
    "EXACT",
    "FRACTION",
    "LINES",
    "IntegerActivation",
    "IntegerConv",
    "check_exact",
    "choose_steps",
    "freeze",
    "grid_scale",
    "round_to",
]

FRACTION = 8  # bits after the binary point of inputs, biases and sums
# lines (slope, 2^8 offset) whose maximum with the identity is the activation; that of ELU is within 0.021
LINES: dict[str, tuple[tuple[float, int], ...]] = {
    "elu": ((0.625, -15), (0.25, -98), (0.0625, -190), (0.0, -256)),
    "hard_elu": ((0.0, -256),),
    "clipped_relu": ((0.0, 0),),
}
_LARGEST = 127  # absolute value of a weight, in steps
_VALUES = 256  # of an activation
_SLOPES = 5  # the largest numerator of a slope
EXACT = 2**24  # float32 holds all whole numbers up to here
_SHIFTS = 24  # the largest absolute value of e
_STEPS = 3, 7  # the range of an activation's j


def _powers() -> Tensor:
    """Return 2^e for e from -24 to 24. (torch.pow need not be exact.)"""
    return torch.tensor([2.0**e for e in range(-_SHIFTS, _SHIFTS + 1)])


def grid_scale(bits: Tensor) -> Tensor:
    """Return 2^bits, for whole numbers of at most 24."""
    return _powers().take(bits + _SHIFTS)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        return torch.round(x * scale).div_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def round_to(x: Tensor, scale: Tensor) -> Tensor:
    """Round to multiples of 1 / scale, half to even; the gradient with respect to x is 1.

    Args:
        x: Float, any shape.
        scale: Powers of two that broadcast with x.
    """
    out: Tensor = _Round.apply(x, scale)
    return out


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, padding: int, groups: int) -> Tensor:
    return F.conv2d(x, weight, bias, padding=padding, groups=groups)


class _ExactConv(torch.autograd.Function):
    """A convolution in float32, which is exact, with gradients in bfloat16, which need not be.

    bfloat16 holds activations and weights of 8 bits: only the gradient of the output is rounded, and the
    input of a first layer, which has 9.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: int, groups: int) -> Tensor:
        ctx.save_for_backward(x.bfloat16(), weight.bfloat16())
        ctx.padding, ctx.groups = [padding] * 2, groups
        return _convolve(x, weight, bias, padding, groups)

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad,), (x, weight), needed = grads, ctx.saved_tensors, ctx.needs_input_grad
        found = torch.ops.aten.convolution_backward(
            grad.bfloat16(), x, weight, None, [1, 1], ctx.padding, [1, 1], False, [0, 0], ctx.groups,
            [*needed[:2], False],
        )  # fmt: skip
        by_input, by_weight = (None if g is None else g.to(grad.dtype) for g in found[:2])
        return by_input, by_weight, grad.sum((0, 2, 3)) if needed[2] else None, None, None


class IntegerConv(Conv):
    """A convolution whose weights are n 2^-e, |n| <= 127, and whose output is rounded.

    Its parameters are those of `Conv`; what `Conv` computes from them as the kernel is rounded, per output
    channel with the largest e that the largest absolute value allows. Rounding a rounded kernel again
    changes nothing, however inaccurately its norm is computed, so that `freeze` fixes it for all machines.

    Args:
        in_channels, out_channels, kernel, groups, init_scale: As for `Conv`.
        round_input: Round the input to multiples of 2^-8 and limit it to [-1, 1].
        grid: The fractional bits of each output channel and its largest absolute value in steps, int64
            (out_channels,) both; None: 8 bits without a limit.
    """

    scale: Tensor
    limit: Tensor | None
    powers: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        *,
        groups: int = 1,
        init_scale: float = 1.0,
        round_input: bool = False,
        grid: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, init_scale=init_scale, groups=groups)
        bits, steps = grid or (torch.full((out_channels,), FRACTION), None)
        scale = grid_scale(bits).view(-1, 1, 1)
        limit = None if steps is None else steps.view(-1, 1, 1) / scale
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("limit", limit, persistent=False)
        self.register_buffer("powers", _powers(), persistent=False)
        self.round_input = round_input

    def weight_scale(self, weight: Tensor) -> Tensor:
        """Return 2^e of each output channel for weights that are not rounded: (out_channels, 1, 1, 1)."""
        # the largest e with n = largest 2^e < 127.5, by comparisons, which ONNX has too
        largest = weight.detach().abs().amax((1, 2, 3)).float().view(-1, 1)
        fits = (largest < (_LARGEST + 0.5) / self.powers.float()).sum(1)
        at = torch.where(largest.view(-1) > 0, (fits - 1).clamp(min=0), _SHIFTS + 7)
        return self.powers.index_select(0, at).view(-1, 1, 1, 1)

    def _normalised(self) -> Tensor:
        weight = super()._normalised()
        return round_to(weight, self.weight_scale(weight))

    def rounded_bias(self) -> Tensor:
        """Return the bias on the grid of the output."""
        return round_to(self.bias, self.scale.view(-1))

    def _apply_weight(self, x: Tensor) -> Tensor:
        mixed = torch.is_autocast_enabled(x.device.type) and torch.is_grad_enabled()
        convolve = _ExactConv.apply if mixed else _convolve
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.bias.dtype)
            if self.round_input:
                x = round_to(x, self.powers[_SHIFTS + FRACTION]).clamp(-1, 1)
            out = convolve(x, self.weight(), self.rounded_bias(), self.padding, self.groups)
            out = round_to(out, self.scale)
            return out if self.limit is None else torch.maximum(torch.minimum(out, self.limit), -self.limit)

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the parameters by the rounded ones.

        The direction keeps about its length, on which the size of training steps depends.
        """
        weight = self._normalised()
        # an exact sum and the root that IEEE 754 defines: the same everywhere, as the fingerprint must be
        norms = weight.double().square().sum((1, 2, 3)).sqrt()
        longer = self.direction.double().norm() / norms.norm().clamp(min=1e-30)
        self.direction.copy_(weight * 2.0 ** float(torch.log2(longer).round().clamp(0, 10)))
        self.gain.copy_(norms)
        self.bias.copy_(self.rounded_bias())


class _Activate(torch.autograd.Function):
    """The maximum of lines, rounded to multiples of a step and limited."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, log_step: Tensor, name: str) -> Tensor:
        *lines, (_, lowest) = LINES[name]
        value = x.clamp(min=lowest / 2**FRACTION)
        for slope, offset in lines:
            start = torch.full((), offset / 2**FRACTION, dtype=x.dtype, device=x.device)
            torch.maximum(value, torch.add(start, x, alpha=slope), out=value)
        top = (_VALUES - 1) * step + lowest / 2**FRACTION
        out = (value / step).round_().mul_(step)
        torch.minimum(out, top, out=out)
        ctx.save_for_backward(value, out, step, top)
        ctx.name = name
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (grad,), (value, out, step, top) = grads, ctx.saved_tensors
        lowest, inside = LINES[ctx.name][-1][1] / 2**FRACTION, grad * (value < top)
        # of the output by the logarithm of the step: its error, and beyond the top the number of steps
        error = (out - value).mul_(inside).sum() + (_VALUES - 1) * step * (grad.sum() - inside.sum())
        by_step = error * (math.log(2) / math.sqrt(_VALUES * grad.numel()))
        # the derivative of ELU is ELU + 1 below 0
        slope = (value + 1).clamp_(max=1) if ctx.name == "elu" else value > lowest
        return inside * slope, None, by_step, None


class IntegerActivation(nn.Module):
    """An activation of `LINES`, rounded to one of 256 multiples of 2^-j from its lowest value upwards.

    The parameter `log_step` is learnt; j is -log_step rounded, 3 to 7. Data-dependent initialisation
    chooses the j of the smallest squared error.

    Args:
        name: A name in `LINES`.
    """

    initialised: Tensor
    powers: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.log_step = nn.Parameter(torch.tensor(-5.0))
        self.register_buffer("initialised", torch.tensor(False))
        self.register_buffer("powers", _powers(), persistent=False)
        self.initialising = False

    @property
    def step(self) -> Tensor:
        """2^-j, a scalar."""
        j = torch.round(self.log_step.detach()).clamp(-_STEPS[1], -_STEPS[0])
        # not by an index, which would be copied to the CPU
        return self.powers.index_select(0, (j + _SHIFTS).long().view(1))[0].to(self.log_step.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.initialising:
            self._initialise(x)
        out: Tensor = _Activate.apply(x, self.step, self.log_step, self.name)
        return out

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        finest = self.powers[_SHIFTS - FRACTION]
        exact = _Activate.apply(x, finest, self.log_step, self.name)
        wide = torch.maximum(exact, x)  # the finest steps end early
        errors = {}
        for j in range(_STEPS[0], _STEPS[1] + 1):
            out = _Activate.apply(x, self.powers[_SHIFTS - j], self.log_step, self.name)
            errors[j] = float((out - wide).square().mean())
        self.log_step.fill_(-min(errors, key=errors.__getitem__))
        self.initialised.fill_(True)
        self.initialising = False

    def bounds(self) -> tuple[float, float]:
        """Return the lowest and the highest value."""
        lowest = LINES[self.name][-1][1] / 2**FRACTION
        return lowest, (_VALUES - 1) * float(self.step) + lowest

    @torch.no_grad()
    def freeze(self) -> None:
        """Replace the parameter by the rounded one."""
        self.log_step.copy_(torch.log2(self.step.double()).round())

    def extra_repr(self) -> str:
        return self.name


def check_exact(decoder: nn.Module) -> None:
    """Check that float32 holds every partial sum of an integer network exactly, whatever its input.

    Args:
        decoder: A `networks.Decoder` of integer layers, whose order in `modules()` is the order of
            computation.

    Raises:
        ValueError: A sum may exceed 2^24 steps; the message names the layer.
    """
    largest, step, stream = 1.0, 2.0**-FRACTION, 0.0  # of the input; of the residual stream

    def check(name: str, steps: float) -> None:
        if not steps < EXACT:
            raise ValueError(
                f"{name}: a sum may reach {steps:.3g} steps, and float32 is exact up to {EXACT:.3g}: "
                "use fewer channels, or smaller weights (train with weight decay)"
            )

    inner = [layer[1] for layer in decoder.modules() if isinstance(layer, ResidualLayer)]
    for name, layer in decoder.named_modules():
        if isinstance(layer, IntegerActivation):
            largest, step = max(map(abs, layer.bounds())), float(layer.step)
        elif isinstance(layer, IntegerConv):
            weight, bias = layer.weight().detach().double(), layer.rounded_bias().detach().double().abs()
            sums = weight.abs().sum((1, 2, 3)) * largest + bias
            # products are multiples of the first, biases of the second
            finest = torch.maximum(layer.weight_scale(weight).view(-1) / step, layer.scale.view(-1))
            check(name, float((sums * finest).max()))
            out = float(sums.max())
            if any(layer is one for one in inner):
                check(name, _SLOPES * out * 2**FRACTION)
            else:
                stream += out + 2.0**-FRACTION
                check(name, _SLOPES * stream * 2**FRACTION)


@torch.no_grad()
def choose_steps(model: nn.Module, loss: Callable[[], float]) -> float:
    """Choose the steps of all activations by the loss, each in turn, until no neighbouring step is better.

    The step of the smallest squared error, with which an activation begins, can cost much more likelihood
    than another, and training hardly leaves it.

    Args:
        model: Initialised; changed in place.
        loss: Computes, on the same data each time, what shall be small.

    Returns:
        The loss with the chosen steps.
    """
    activations = [layer for layer in model.modules() if isinstance(layer, IntegerActivation)]
    best, unchanged = loss(), 0
    for layer in itertools.cycle(activations):
        kept = float(layer.log_step)
        for other in (kept - 1, kept + 1):
            layer.log_step.fill_(other)
            found = loss() if -_STEPS[1] <= other <= -_STEPS[0] else math.inf
            if found < best:
                best, kept, unchanged = found, other, 0
        layer.log_step.fill_(kept)
        unchanged += 1
        if unchanged > len(activations):
            break
    return best


def freeze(model: nn.Module) -> None:
    """Replace the parameters of all integer layers by the rounded ones; doing it again changes nothing."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "freeze")]
    for layer in layers:
        layer.freeze()
