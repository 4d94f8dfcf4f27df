"""Integer networks as the codec evaluates them: fast, and checked against a known answer.

An `ExactNetwork` computes the same numbers as the decoder that it is made of (`nn.integer`): scales are
folded into the weights, so that all numbers are whole, and what lies between two convolutions is one
compiled loop. Processors that multiply bytes exactly (x86 with VNNI or AMX) convolve bytes, four times as
fast as float32. The decoder itself remains the definition, and is used on GPUs and where nothing is
compiled.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvae.compiled import compiled, is_fast
from selfvae.nn.integer import EXACT, FRACTION, LINES, IntegerActivation, IntegerConv
from selfvae.nn.networks import Constant, Decoder, Shared

__all__ = ["ExactNetwork", "Steps", "exact_arithmetic"]

Steps = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_UNIT = 1 << FRACTION
_BYTE = 255


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Let GPU libraries compute float32 convolutions by products and sums only, and in float32 only."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@compiled
def _activate(
    sums: Any, out: Any, stream: Any, lines: Any, scale: Any, top: Any, zero: Any, adds: bool, keeps: bool
) -> None:
    """Compute activations from sums in units of 2^-8; all flat, sums float32, out float32 or uint8.

    adds: add `stream` to the rounded sums first; keeps: store the result in `stream`. lines (4, 2): slopes
    and offsets in units of 2^-8. Activations are whole multiples of 2^-8 / scale, at most `top` of them;
    out is that multiple plus `zero`.
    """
    # without inner loops and branches, such that the compiler uses vector instructions
    (s0, t0), (s1, t1), (s2, t2), (s3, t3) = lines[0], lines[1], lines[2], lines[3]
    if adds:
        for i in range(len(sums)):
            x = np.rint(sums[i]) + stream[i]
            stream[i] = x
            value = max(max(x, x * s0 + t0), max(x * s1 + t1, max(x * s2 + t2, x * s3 + t3)))
            out[i] = min(np.rint(value * scale), top) + zero
    else:
        for i in range(len(sums)):
            x = np.rint(sums[i])
            if keeps:
                stream[i] = x
            value = max(max(x, x * s0 + t0), max(x * s1 + t1, max(x * s2 + t2, x * s3 + t3)))
            out[i] = min(np.rint(value * scale), top) + zero


@compiled
def _finish(sums: Any, limits: Any, out: Any) -> None:
    """Round sums (n, P) and limit their absolute values, to int16."""
    for i in range(sums.shape[0]):
        for p in range(sums.shape[1]):
            out[i, p] = int(min(max(np.rint(sums[i, p]), -limits[p]), limits[p]))


class _Activation:
    """An activation from sums in units of 2^-8 to whole multiples of its step.

    Attributes:
        step: 2^-j.
        zero: What is added to the multiples to make them 0 to 255.
        in_bytes: Whether the output is uint8 with `zero` added, rather than float32 without.
    """

    def __init__(self, activation: IntegerActivation) -> None:
        self.step, (lowest, highest) = float(activation.step), activation.bounds()
        lines = LINES[activation.name]
        self._lines = np.array([*lines, *[lines[-1]] * (4 - len(lines))], np.float32)
        self._scale = np.float32(1 / (self.step * _UNIT))
        self._top, self.zero = np.float32(highest / self.step), round(-lowest / self.step)
        self.in_bytes = False

    def __call__(self, sums: Floats, stream: Floats | None = None, *, adds: bool = False) -> Floats | Bytes:
        """Return the activations of sums, which may be overwritten; see `_activate`."""
        keeps = stream is not None
        kept = np.empty(0, np.float32) if stream is None else stream.reshape(-1)
        out: Floats | Bytes = np.empty(sums.shape, np.uint8) if self.in_bytes else sums
        zero = np.float32(self.zero if self.in_bytes else 0)
        _activate(
            sums.reshape(-1), out.reshape(-1), kept, self._lines, self._scale, self._top, zero, adds, keeps
        )
        return out


class _Convolution:
    """A convolution whose sums are whole multiples of a unit that is folded into its weights.

    Args:
        conv: An integer convolution.
        step: Of its input.
        unit: 1 / unit of the sums, per output channel (or one for all).
    """

    def __init__(self, conv: IntegerConv, step: float, unit: Tensor | float) -> None:
        scale = torch.as_tensor(unit, dtype=torch.float32).view(-1)
        weight = conv.weight() * (scale * step).view(-1, 1, 1, 1)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias, self.padding = conv.rounded_bias() * scale, conv.padding

    def __call__(self, x: Floats) -> Floats:
        """Map (B, h, w, C) to (B, h, w, C'), not rounded."""
        out = F.conv2d(
            torch.from_numpy(x).permute(0, 3, 1, 2), self.weight, self.bias, padding=self.padding
        )
        return out.permute(0, 2, 3, 1).contiguous().numpy()


class _ByteConvolution:
    """The same of an activation's bytes, by instructions that multiply bytes and add in 32 bits.

    Args:
        conv: An integer convolution.
        act: The activation.
        unit: As for `_Convolution`.
    """

    def __init__(self, conv: IntegerConv, act: _Activation, unit: Tensor | float) -> None:
        weight, unit = conv.weight(), torch.as_tensor(unit, dtype=torch.float32).view(-1)
        scale = conv.weight_scale(weight)
        whole = (weight * scale).to(torch.int8)
        self._scales = unit * act.step / scale.view(-1)
        self._bias, self._zero = conv.rounded_bias() * unit, act.zero
        if not conv.padding:  # without a border of zeros the bias can stand for them
            self._bias = self._bias - whole.sum((1, 2, 3)) * self._zero * self._scales
            self._zero = 0
        self._padding, self._zeros = [conv.padding] * 2, torch.zeros(len(whole), dtype=torch.int32)
        self._packed = torch.ops.onednn.qconv_prepack(
            whole, self._scales, 1.0, self._zero, [1, 1], self._padding, [1, 1], 1
        )
        largest = _BYTE * whole.abs().sum((1, 2, 3)) * self._scales + self._bias.abs()
        self._fits = bool((largest < EXACT * self._scales.clamp(max=1)).all())  # the bias is whole
        self._act, self._channels = act, whole.shape[1]

    def equals(self, other: _Convolution) -> bool:
        """Return whether the largest sums are right: older instructions add two products in 16 bits."""
        x = np.full((1, 9, 9, self._channels), _BYTE, np.uint8)
        return self._fits and np.array_equal(self(x), other(x.astype(np.float32) - self._act.zero))

    def __call__(self, x: Bytes) -> Floats:
        """Map (B, h, w, C) to (B, h, w, C'), not rounded."""
        out: Tensor = torch.ops.onednn.qconv2d_pointwise(
            torch.from_numpy(x).permute(0, 3, 1, 2), 1.0, self._zero, self._packed, self._scales,
            self._zeros, self._bias, [1, 1], self._padding, [1, 1], 1, 1.0, 0, torch.float32, "none", [],
            "",
        )  # fmt: skip
        return out.permute(0, 2, 3, 1).contiguous().numpy()


def _convolution(conv: IntegerConv, act: _Activation, unit: Tensor | float) -> Any:
    """Return a convolution of an activation: of bytes if that is exact on this machine."""
    floats = _Convolution(conv, act.step, unit)
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return floats
    found = _ByteConvolution(conv, act, unit)
    act.in_bytes = found.equals(floats)
    return found if act.in_bytes else floats


class ExactNetwork:
    """The network of a level's decoder.

    Args:
        decoder: Of an integer model, frozen.

    Attributes:
        params: Number of its outputs per position.
        reach: Number of positions on every side that an output depends on.
        device: Where it computes.
    """

    @torch.no_grad()
    def __init__(self, decoder: nn.Module) -> None:
        assert isinstance(decoder, Decoder | Shared | Constant)
        self._decoder, self.reach = decoder, 0
        self.device = next(decoder.parameters()).device
        inner = decoder.decoder if isinstance(decoder, Shared) else decoder
        if isinstance(inner, Constant):
            assert inner.scale is not None
            self._scale, self.params = inner.scale.view(-1, 1, 1), len(inner.params)
            return
        head: Any = inner.head
        self._scale, self.params = head.scale, len(head.bias)
        self.reach = sum(m.padding for m in inner.modules() if isinstance(m, IntegerConv))
        if self.device.type != "cpu":
            return
        self._limits = (head.limit * head.scale).view(-1).cpu().numpy()
        stem, first, block, last = cast("Any", inner.joint)
        acts = [_Activation(layer[0]) for layer in block.layers] + [_Activation(last)]
        self._stem, self._first = _Convolution(stem, 1.0, 1.0), _Activation(first)
        self._stem.bias *= _UNIT  # its input is in units of 2^-8 already
        self._layers = []
        for act, layer in zip(acts, block.layers, strict=False):
            inside = _Activation(layer[2])
            wide, narrow = _convolution(layer[1], act, _UNIT), _convolution(layer[3], inside, _UNIT)
            self._layers.append((act, wide, inside, narrow))
        self._last = acts[-1]
        self._head = _convolution(head, self._last, head.scale)

    @torch.no_grad()
    def __call__(self, context: Tensor) -> Steps:
        """Compute the outputs.

        Args:
            context: Float32 (B, C, h, w), see `Level.context`.

        Returns:
            In steps of their grids, int16 (B, h, w, P).
        """
        if isinstance(self._decoder, Constant) or context.is_cuda or not is_fast():
            with exact_arithmetic():
                out = self._decoder(context, None) * self._scale
            return np.ascontiguousarray(out.permute(0, 2, 3, 1).cpu().numpy().astype(np.int16))
        if isinstance(self._decoder, Shared):
            context = self._decoder.with_planes(context)
        x = np.rint(context.permute(0, 2, 3, 1).numpy() * np.float32(_UNIT)).clip(-_UNIT, _UNIT)
        x = self._stem(np.ascontiguousarray(x))
        x = self._first(x) * np.float32(self._first.step * _UNIT)
        stream = np.empty_like(x)
        for i, (act, wide, inside, narrow) in enumerate(self._layers):
            x = narrow(inside(wide(act(x, stream, adds=i > 0))))
        x = self._head(self._last(x, stream, adds=True))
        out = np.empty(x.shape, np.int16)
        _finish(x.reshape(-1, x.shape[3]), self._limits, out.reshape(-1, x.shape[3]))
        return out
