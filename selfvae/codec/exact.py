"""Integer networks as the codec evaluates them: fast, and checked against a known answer.

An `ExactNetwork` computes the same numbers as the decoder that it is made of (`nn.integer`): scales are
folded into the weights, so that all numbers are whole, and what lies between two convolutions is one
compiled loop. x86 processors convolve bytes, two to five times as fast as float32; for older ones (AVX2
without VNNI) the channels are put into an order in which this is exact. The decoder itself remains the
definition, and is used on GPUs and where nothing is compiled.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfvae.compiled import compiled, is_fast, wide_vectors
from selfvae.nn.integer import EXACT, FRACTION, LINES, IntegerActivation, IntegerConv
from selfvae.nn.networks import Constant, Decoder, Shared

__all__ = ["ExactNetwork", "Steps", "exact_arithmetic"]

Steps = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
_Slices = tuple[slice, ...]
_UNIT = 1 << FRACTION
_BYTE = 255
_PAIR = 128  # largest sum of two weights whose products with bytes can be added in 16 bits
_MULTIPLE = 8  # of channels, for which kernels are fast
_CACHED = 3 << 13  # positions that are convolved at a time
_TALL = 12  # rows of these, at least
_BLOCK = 64  # positions whose outputs are transposed together
_SHAPES = 32  # of inputs, for which weights are kept in the processor's layout
_LONGEST = 1.5  # times as many channels, at most, are worth being convolved as bytes


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
    sums: Any, out: Any, stream: Any, lines: Any, unit: Any, top: Any, zero: Any, adds: bool
) -> None:
    """Compute activations from sums in units of 2^-8; all flat, sums float32, out float32 or uint8.

    adds: add the rounded sums to `stream` first, and take what is there then. Activations are whole
    multiples of a step, at most `top` of them; out is that multiple plus `zero`. lines (4, 2): slopes and
    offsets, in steps; unit: 2^-8, in steps.
    """
    wide_vectors()
    (s0, t0), (s1, t1), (s2, t2), (s3, t3) = lines[0], lines[1], lines[2], lines[3]
    if adds:
        for i in range(len(sums)):
            x = np.rint(sums[i]) + stream[i]
            stream[i] = x
            value = max(max(x * unit, x * s0 + t0), max(x * s1 + t1, max(x * s2 + t2, x * s3 + t3)))
            out[i] = np.rint(min(value, top)) + zero
    else:
        for i in range(len(sums)):
            x = np.rint(sums[i])
            value = max(max(x * unit, x * s0 + t0), max(x * s1 + t1, max(x * s2 + t2, x * s3 + t3)))
            out[i] = np.rint(min(value, top)) + zero


@compiled
def _activate_twice(
    sums: Any, out: Any, stream: Any, one: Any, unit: Any, top: Any, two: Any, next_unit: Any,
    next_top: Any, zero: Any,
) -> None:  # fmt: skip
    """Store the activations of sums in `stream`, in units of 2^-8, and compute the next ones of these.

    As `_activate` does with lines `one` and then `two`.
    """
    wide_vectors()
    (s0, t0), (s1, t1), (s2, t2), (s3, t3) = one[0], one[1], one[2], one[3]
    (a0, b0), (a1, b1), (a2, b2), (a3, b3) = two[0], two[1], two[2], two[3]
    step = np.float32(1) / unit
    for i in range(len(sums)):
        x = np.rint(sums[i])
        value = max(max(x * unit, x * s0 + t0), max(x * s1 + t1, max(x * s2 + t2, x * s3 + t3)))
        x = np.rint(min(value, top)) * step
        stream[i] = x
        value = max(max(x * next_unit, x * a0 + b0), max(x * a1 + b1, max(x * a2 + b2, x * a3 + b3)))
        out[i] = np.rint(min(value, next_top)) + zero


@compiled
def _finish(sums: Any, limits: Any, out: Any, start: int) -> None:
    """Round sums (n, P) and limit their absolute values, to columns of out int16 (P, N) from `start` on."""
    wide_vectors()
    block = np.empty((_BLOCK, len(out)), np.int16)
    for first in range(0, len(sums), _BLOCK):
        count = min(_BLOCK, len(sums) - first)
        for k in range(count):
            own, rounded = sums[first + k], block[k]
            for p in range(len(out)):
                rounded[p] = np.int16(min(max(np.rint(own[p]), -limits[p]), limits[p]))
        for p in range(len(out)):
            row = out[p, start + first : start + first + count]
            for k in range(count):
                row[k] = block[k, p]


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
        self._unit = np.float32(1 / (self.step * _UNIT))
        self._lines = np.array([*lines, *[lines[-1]] * (4 - len(lines))], np.float32) * self._unit
        self._top, self.zero = np.float32(highest / self.step), round(-lowest / self.step)
        self.in_bytes = False

    def image(self, shape: tuple[int, int, int, int], margin: int) -> _Image:
        """Return an image (B, h, w, C) for activations, 0 in the margin."""
        b, h, w, channels = shape
        kind: type = np.uint8 if self.in_bytes else np.float32
        array: Floats | Bytes = np.empty((b, h + 2 * margin, w, channels), kind)
        array[:, :margin] = array[:, h + margin :] = self.zero if self.in_bytes else 0
        return _Image(array, margin)

    def __call__(self, sums: Floats, out: Floats | Bytes, stream: Floats | None = None) -> Floats | Bytes:
        """Write the activations of sums to out, contiguous, and return it; of sums plus `stream` if given.

        That sum is then stored in `stream`.
        """
        adds = stream is not None
        kept = np.empty(0, np.float32) if stream is None else stream.reshape(-1)
        zero = np.float32(self.zero if self.in_bytes else 0)
        _activate(sums.reshape(-1), out.reshape(-1), kept, self._lines, self._unit, self._top, zero, adds)
        return out

    def then(self, following: _Activation, sums: Floats, out: Floats | Bytes, stream: Floats) -> None:
        """Write activations of sums to `stream`, in units of 2^-8, and following ones of these to out."""
        zero = np.float32(following.zero if following.in_bytes else 0)
        _activate_twice(
            sums.reshape(-1), out.reshape(-1), stream.reshape(-1), self._lines, self._unit, self._top,
            following._lines, following._unit, following._top, zero,
        )  # fmt: skip


class _Kernel(NamedTuple):
    """The weights of an integer convolution, its channels in some order.

    Attributes:
        whole: In units of 1 / scale: float32 (O, I, k, k).
        scale: A power of two per output channel: (O,).
        bias: (O,).
        padding: Zeros on each side.
    """

    whole: Tensor
    scale: Tensor
    bias: Tensor
    padding: int

    @classmethod
    def of(cls, conv: IntegerConv, outputs: Tensor | None = None, inputs: Tensor | None = None) -> _Kernel:
        """Take a convolution's weights.

        Args:
            conv: The convolution.
            outputs, inputs: Orders of channels. -1 stands for a channel of zeros; of a channel that appears
                twice, each appearance has half of the weights.
        """
        weight, bias = conv.weight(), conv.rounded_bias()
        scale = conv.weight_scale(weight)
        whole, scale = weight * scale, scale.view(-1)
        if inputs is not None:
            half = torch.trunc(whole / 2)
            before = (inputs[:, None] == inputs).tril(-1).any(1)
            twice = (inputs[:, None] == inputs).sum(1) == 2
            whole, half = (F.pad(w, (0, 0, 0, 0, 0, 1))[:, inputs] for w in (whole, half))
            whole = torch.where((before & twice).view(-1, 1, 1), half, whole - half * twice.view(-1, 1, 1))
        if outputs is not None:
            whole = F.pad(whole, (0, 0, 0, 0, 0, 0, 0, 1))[outputs]
            scale, bias = F.pad(scale, (0, 1), value=1.0)[outputs], F.pad(bias, (0, 1))[outputs]
        return cls(whole, scale, bias, conv.padding)


class _Convolution:
    """A convolution whose sums are whole multiples of a unit that is folded into its weights.

    Args:
        kernel: Its weights.
        step: Of its input.
        unit: 1 / unit of the sums, per output channel (or one for all).
    """

    in_bytes = False

    def __init__(self, kernel: _Kernel, step: float, unit: Tensor | float) -> None:
        scale = torch.as_tensor(unit, dtype=torch.float32).view(-1)
        weight = kernel.whole * (scale * step / kernel.scale).view(-1, 1, 1, 1)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias, self.padding = kernel.bias * scale, kernel.padding

    def __call__(self, x: Floats, margin: int = 0) -> Floats:
        """Map (B, h, w, C) to (B, h, w, C'), not rounded; x has rows beyond h, up to the padding."""
        padding = self.padding - margin, self.padding
        out = F.conv2d(torch.from_numpy(x).permute(0, 3, 1, 2), self.weight, self.bias, padding=padding)
        return out.permute(0, 2, 3, 1).contiguous().numpy()


class _ByteConvolution:
    """The same of an activation's bytes, by instructions that multiply bytes and add in 32 bits.

    Args:
        kernel: Its weights.
        act: The activation.
        unit: As for `_Convolution`.
    """

    in_bytes = True

    def __init__(self, kernel: _Kernel, act: _Activation, unit: Tensor | float) -> None:
        unit = torch.as_tensor(unit, dtype=torch.float32).view(-1)
        self._whole = whole = kernel.whole.to(torch.int8)
        self._scales = unit * act.step / kernel.scale
        self._bias, self._zero = kernel.bias * unit, act.zero
        if not kernel.padding:  # without a border of zeros the bias can stand for them
            self._bias = self._bias - whole.sum((1, 2, 3)) * self._zero * self._scales
            self._zero = 0
        self.padding, self._zeros = kernel.padding, torch.zeros(len(whole), dtype=torch.int32)
        self._pack = functools.lru_cache(_SHAPES)(self._pack_for)
        largest = _BYTE * whole.abs().sum((1, 2, 3)) * self._scales + self._bias.abs()
        self._fits = bool((largest < EXACT * self._scales.clamp(max=1)).all())  # the bias is whole
        self._act, self._channels = act, whole.shape[1]

    def equals(self, other: _Convolution) -> bool:
        """Return whether the largest sums are right: older instructions add two products in 16 bits."""
        x = np.full((1, 9, 9, self._channels), _BYTE, np.uint8)
        return self._fits and np.array_equal(self(x), other(x.astype(np.float32) - self._act.zero))

    def _pack_for(self, shape: torch.Size, padding: tuple[int, int]) -> Tensor:
        """Return the weights in the layout for inputs (B, C, h, w) of a shape: another is slow."""
        packed: Tensor = torch.ops.onednn.qconv_prepack(
            self._whole, self._scales, 1.0, self._zero, [1, 1], padding, [1, 1], 1, shape
        )
        return packed

    def __call__(self, x: Bytes, margin: int = 0) -> Floats:
        """Map (B, h, w, C) to (B, h, w, C'), not rounded; x has rows beyond h, up to the padding."""
        image, padding = torch.from_numpy(x).permute(0, 3, 1, 2), (self.padding - margin, self.padding)
        out: Tensor = torch.ops.onednn.qconv2d_pointwise(
            image, 1.0, self._zero, self._pack(image.shape, padding), self._scales, self._zeros, self._bias,
            [1, 1], padding, [1, 1], 1, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return out.permute(0, 2, 3, 1).contiguous().numpy()


def _has_bytes() -> bool:
    """Return whether convolutions of bytes are worth a trial on this machine."""
    return platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


def _convolution(kernel: _Kernel, act: _Activation, unit: Tensor | float) -> Any:
    """Return a convolution of an activation: of bytes if that is exact on this machine."""
    floats = _Convolution(kernel, act.step, unit)
    if not _has_bytes():
        return floats
    found = _ByteConvolution(kernel, act, unit)
    act.in_bytes = found.equals(floats)
    return found if act.in_bytes else floats


def _paired(convs: Sequence[IntegerConv]) -> Tensor:
    """Return an order of the input channels in which convolutions of bytes are exact with AVX2, too.

    Its instructions multiply bytes, and add the products of two neighbouring channels in 16 bits. So
    neighbours must be channels whose weights together never exceed 128. Of three channels that find no such
    neighbour one appears twice, with half of its weights each, beside the other two. The neighbour of the
    others is a channel of zeros. See `_Kernel.of`.
    """
    kernels = [_Kernel.of(conv).whole.permute(0, 2, 3, 1).flatten(0, 2) for conv in convs]
    weights = torch.cat([half for kernel in kernels for half in (kernel, -kernel)]).clamp(min=0)
    n = weights.shape[1]

    def suits(first: Tensor) -> npt.NDArray[np.bool_]:
        largest = torch.stack([(first[:, a : a + 1] + weights).amax(0) for a in range(n)])
        return largest.fill_diagonal_(_PAIR + 1).numpy() <= _PAIR

    whole, halves = suits(weights), suits(torch.ceil(weights / 2))
    order: list[int] = []
    left, alone = list(range(n)), []
    while left:  # first those that suit the fewest others (Karp & Sipser 1981)
        choices = {a: [b for b in left if whole[a, b]] for a in left}
        a = min(left, key=lambda c: (len(choices[c]) or n, c))
        b = min(choices[a], key=lambda c: len(choices[c]), default=-1)
        if b < 0:
            alone.append(a)
        else:
            order += a, b
        left = [c for c in left if c not in (a, b)]
    while alone:
        choices = {a: [b for b in alone if halves[a, b]] for a in alone}
        a = max(alone, key=lambda c: len(choices[c]))
        used = [a, *choices[a][:2]]
        order += [a, used[1], a, used[2]] if len(used) == 3 else [a, -1]
        alone = [c for c in alone if c not in (used if len(used) == 3 else [a])]
    return torch.tensor(order + [-1] * (-len(order) % _MULTIPLE))


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
        if not self._assemble(inner) and _has_bytes():
            layers = cast("Any", inner.joint)[2].layers
            stream = _paired([*(layer[1] for layer in layers), head])
            orders = [stream, *(_paired([layer[3]]) for layer in layers)]
            longest = _LONGEST * len(layers[0][1].bias)
            if any(len(order) > longest for order in orders) or not self._assemble(inner, orders):
                self._assemble(inner)

    def _assemble(self, inner: Decoder, orders: Sequence[Tensor | None] | None = None) -> bool:
        """Prepare the convolutions and activations.

        Args:
            inner: The decoder.
            orders: Of the channels of the residual stream, and of those inside each layer.

        Returns:
            Whether all convolutions are of bytes, but for the first one.
        """
        stem, first, block, last = cast("Any", inner.joint)
        stream, *within = orders or [None] * (1 + len(block.layers))
        acts = [_Activation(layer[0]) for layer in block.layers] + [_Activation(last)]
        self._stem, self._first = _Convolution(_Kernel.of(stem, stream), 1.0, 1.0), _Activation(first)
        self._stem.bias *= _UNIT  # its input is in units of 2^-8 already
        self._layers = []
        for act, layer, order in zip(acts, block.layers, within, strict=False):
            inside = _Activation(layer[2])
            wide = _convolution(_Kernel.of(layer[1], order, stream), act, _UNIT)
            narrow = _convolution(_Kernel.of(layer[3], stream, order), inside, _UNIT)
            self._layers.append((act, wide, inside, narrow))
        head: Any = inner.head
        self._last = acts[-1]
        self._head = _convolution(_Kernel.of(head, None, stream), self._last, head.scale)
        return self._head.in_bytes and all(c.in_bytes for layer in self._layers for c in layer[1::2])

    @torch.no_grad()
    def __call__(self, context: Tensor) -> Steps:
        """Compute the outputs.

        Args:
            context: Float32 (B, C, h, w), see `Level.context`.

        Returns:
            In steps of their grids, int16 (P, B, h, w).
        """
        if isinstance(self._decoder, Constant) or context.is_cuda or not is_fast():
            with exact_arithmetic():
                out = self._decoder(context, None) * self._scale
            return np.ascontiguousarray(out.transpose(0, 1).cpu().numpy().astype(np.int16))
        if isinstance(self._decoder, Shared):
            context = self._decoder.with_planes(context)
        x = np.rint(context.permute(0, 2, 3, 1).numpy() * np.float32(_UNIT)).clip(-_UNIT, _UNIT)
        (b, h, w, _), width = x.shape, len(self._stem.bias)
        tiles, by_rows = _tiles(b, h, w)
        # what each convolution after the first one reads
        acts = [*(layer[0] for layer in self._layers), self._last]
        convs = [*(layer[1] for layer in self._layers), self._head]
        images = [
            partial(act.image, (b, h, w, width), conv.padding if by_rows else 0)
            for act, conv in zip(acts, convs, strict=True)
        ]
        seen = _Image.of(x, self._stem.padding if by_rows else 0)
        stream, image = np.empty((b, h, w, width), np.float32), images[0]()
        for tile in tiles:
            sums = self._stem(seen.around(tile), seen.margin)
            self._first.then(acts[0], sums, image.inside(tile), stream[tile])
        for (_, wide, middle, narrow), act, new in zip(self._layers, acts[1:], images[1:], strict=True):
            found = new()
            for tile in tiles:
                sums = wide(image.around(tile), image.margin)
                out = np.empty(sums.shape, np.uint8 if middle.in_bytes else np.float32)
                act(narrow(middle(sums, out)), found.inside(tile), stream[tile])
            image = found
        steps, start = np.empty((self.params, b * h * w), np.int16), 0
        for tile in tiles:
            sums = self._head(image.around(tile), image.margin).reshape(-1, self.params)
            _finish(sums, self._limits, steps, start)
            start += len(sums)
        return steps.reshape(-1, b, h, w)


class _Image(NamedTuple):
    """Inputs of a convolution, which are read tile by tile.

    Attributes:
        array: (B, m + h + m, w, C), with zeros above and below.
        margin: m; 0 where tiles are whole images: the convolution adds the zeros.
    """

    array: Floats | Bytes
    margin: int

    @classmethod
    def of(cls, x: Floats, margin: int) -> _Image:
        """Add zeros to x (B, h, w, C)."""
        return cls(np.pad(x, ((0, 0), (margin, margin), (0, 0), (0, 0))), margin)

    def inside(self, tile: _Slices) -> Any:
        """Return the tile."""
        images, rows = tile
        return self.array[images, rows.start + self.margin : rows.stop + self.margin]

    def around(self, tile: _Slices) -> Any:
        """Return the tile and the rows of the margin on both sides."""
        images, rows = tile
        return self.array[images, rows.start : rows.stop + 2 * self.margin]


def _tiles(b: int, h: int, w: int) -> tuple[list[_Slices], bool]:
    """Divide images (B, h, w, C) into tiles whose sums stay in a processor's cache.

    Returns:
        Slices of images and of rows; and whether tiles are rows of one image, rather than whole images.
    """
    rows = max(_TALL, _CACHED // w)
    if rows >= h:
        n = max(1, _CACHED // (h * w))
        return [(slice(i, i + n), slice(0, h)) for i in range(0, b, n)], False
    starts = [(i, a) for i in range(b) for a in range(0, h, rows)]
    return [(slice(i, i + 1), slice(a, min(h, a + rows))) for i, a in starts], True
