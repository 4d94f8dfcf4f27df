"""Integer networks as the codec evaluates them: fast, and checked against a known answer.

An `ExactNetwork` computes the same numbers as the decoder that it is made of (`nn.integer`): scales are
folded into the weights, so that all numbers are whole, and what lies between two convolutions is one
compiled loop. The decoder itself remains the definition, and is used on GPUs and where nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvae.compiled import compiled, is_fast
from selfvae.nn.integer import FRACTION, LINES, IntegerActivation, IntegerConv
from selfvae.nn.networks import Constant, Decoder, Shared

__all__ = ["ExactNetwork", "Steps", "exact_arithmetic"]

Steps = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]
_UNIT = 1 << FRACTION


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
def _activate(sums: Any, stream: Any, lines: Any, scale: Any, top: Any, adds: bool, keeps: bool) -> None:
    """Replace sums by activations; both flat, float32, sums in units of 2^-8.

    adds: add `stream` to the rounded sums first; keeps: store the result in `stream`. lines (4, 2): slopes
    and offsets in units of 2^-8. Activations are whole multiples of 2^-8 / scale, at most `top` of them.
    """
    # without inner loops and branches, such that the compiler uses vector instructions
    (s0, t0), (s1, t1), (s2, t2), (s3, t3) = lines[0], lines[1], lines[2], lines[3]
    if adds:
        for i in range(len(sums)):
            x = np.rint(sums[i]) + stream[i]
            stream[i] = x
            value = max(max(x, x * s0 + t0), max(x * s1 + t1, max(x * s2 + t2, x * s3 + t3)))
            sums[i] = min(np.rint(value * scale), top)
    else:
        for i in range(len(sums)):
            x = np.rint(sums[i])
            if keeps:
                stream[i] = x
            value = max(max(x, x * s0 + t0), max(x * s1 + t1, max(x * s2 + t2, x * s3 + t3)))
            sums[i] = min(np.rint(value * scale), top)


@compiled
def _finish(sums: Any, limits: Any, out: Any) -> None:
    """Round sums (n, P) and limit their absolute values, to int16."""
    for i in range(sums.shape[0]):
        for p in range(sums.shape[1]):
            out[i, p] = int(min(max(np.rint(sums[i, p]), -limits[p]), limits[p]))


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


class _Activation:
    """An activation from sums in units of 2^-8 to whole multiples of its step."""

    def __init__(self, activation: IntegerActivation) -> None:
        self.step = float(activation.step)
        lines = LINES[activation.name]
        self._lines = np.array([*lines, *[lines[-1]] * (4 - len(lines))], np.float32)
        self._scale = np.float32(1 / (self.step * _UNIT))
        self._top = np.float32(activation.bounds()[1] / self.step)

    def __call__(self, sums: Floats, stream: Floats | None = None, *, adds: bool = False) -> None:
        """Replace sums; see `_activate`."""
        keeps = stream is not None
        kept = np.empty(0, np.float32) if stream is None else stream.reshape(-1)
        _activate(sums.reshape(-1), kept, self._lines, self._scale, self._top, adds, keeps)


class ExactNetwork:
    """The network of a level's decoder.

    Args:
        decoder: Of an integer model, frozen.

    Attributes:
        params: Number of its outputs per position.
        reach: Number of positions on every side that an output depends on.
        device: Where it computes.
    """

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
            wide, narrow = (
                _Convolution(layer[1], act.step, _UNIT),
                _Convolution(layer[3], inside.step, _UNIT),
            )
            self._layers.append((act, wide, inside, narrow))
        self._last = acts[-1]
        self._head = _Convolution(head, self._last.step, head.scale)

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
        self._first(x)
        x *= np.float32(self._first.step * _UNIT)
        stream = np.empty_like(x)
        for i, (act, wide, inside, narrow) in enumerate(self._layers):
            act(x, stream, adds=i > 0)
            x = wide(x)
            inside(x)
            x = narrow(x)
        self._last(x, stream, adds=True)
        x = self._head(x)
        out = np.empty(x.shape, np.int16)
        _finish(x.reshape(-1, x.shape[3]), self._limits, out.reshape(-1, x.shape[3]))
        return out
