"""Dense blocks without their copies.

Written down layer by layer, a dense block copies all that came before twice a layer, into a concatenation
and through the gates of the channel attention, and training keeps the copies. Here the features of a block
lie in one buffer, each written once and unscaled. The gates are factors per image and channel, known from
the features' means alone; they are multiplied into the next layer's 1x1 weights, and into the features
once, at the end. The result is the same but for rounding, and so are the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["dense"]

_EACH = 8  # weights of a layer


def dense(x: Tensor, layers: Sequence[Sequence[Tensor]]) -> Tensor:
    """A dense block: x (B, C, h, w) -> (B, C + steps * G, h, w), in channels-last order.

    layers: for each the weight and the bias of its 1x1 convolution (4G, c), of its 3x3 convolution
        (G, 4G, 3, 3), which it is computed in, and of the two linear maps of its gates, (c', c + G) and
        (c + G, c'), in float32 or float64.
    """
    weights = [weight for layer in layers for weight in layer]
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _Dense.apply(x.to(weights[0].dtype), torch.is_grad_enabled(), *weights)
    return out


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, train: bool, *weights: Tensor) -> Tensor:
        b, channels, *size = x.shape
        layers = _layers(weights)
        growth, exact = len(layers[0][2]), torch.promote_types(x.dtype, torch.float32)
        features = x.new_empty(b, size[0] * size[1], channels + growth * len(layers))
        features[..., :channels] = _rows(x)
        means = features[..., :channels].mean(1, dtype=exact)
        gates = [torch.ones_like(means)]
        narrow = []
        for w1, b1, w2, b2, *gate in layers:
            c = means.shape[1]
            h = torch.baddbmm(b1, features[..., :c], _gated(w1, gates[-1]).mT)
            narrow.append(F.elu_(h))
            new = _rows(F.elu_(F.conv2d(_image(h, size), w2, b2, padding=1)))
            features[..., c : c + growth] = new
            means = torch.cat([means, new.mean(1, dtype=exact)], 1)
            gates.append(_gates(gates[-1], means, *gate))
        if train:
            ctx.save_for_backward(features, means, *gates, *narrow, *weights)
            ctx.size = size
        return _image(features * gates[-1][:, None].to(x.dtype), size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out: Tensor) -> Any:
        features, means, *rest = ctx.saved_tensors
        steps = (len(rest) - 1) // (2 + _EACH)
        weights = rest[2 * steps + 1 :]
        gates, narrow, layers = rest[: steps + 1], rest[steps + 1 : 2 * steps + 1], _layers(weights)
        growth, n = len(layers[0][2]), features.shape[1]
        out = _rows(out)
        d_gates = (out * features).sum(1, dtype=means.dtype)
        d_features = out * gates[-1][:, None].to(out.dtype)
        d_means = torch.zeros_like(means)
        d_weights: list[Tensor] = []
        for i in reversed(range(steps)):
            w1, _, w2, _, *gate = layers[i]
            c, h = gates[i].shape[1], narrow[i]
            with torch.enable_grad():  # some thousand numbers
                inputs = [t.detach().requires_grad_() for t in (gates[i], means[:, : c + growth], *gate)]
                d_gates, d_part, *d_gate = torch.autograd.grad(_gates(*inputs), inputs, d_gates)
            d_means[:, : c + growth] += d_part

            new = features[..., c : c + growth]
            d_new = d_features[..., c : c + growth] + (d_means[:, None, c : c + growth] / n).to(new.dtype)
            d_h, d_w2, d_b2 = torch.ops.aten.convolution_backward(
                _image(_before_elu(d_new, new), ctx.size), _image(h, ctx.size), w2,
                [growth], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True],
            )  # fmt: skip
            d_h = _before_elu(_rows(d_h), h)
            d_features[..., :c] += d_h @ _gated(w1, gates[i])
            d_gated = (d_h.mT @ features[..., :c]).to(means.dtype)
            d_gates = d_gates + (d_gated * w1).sum(1)
            d_w1 = (d_gated * gates[i][:, None]).sum(0).to(w1.dtype)
            d_weights[:0] = [d_w1, d_h.sum((0, 1)), d_w2, d_b2, *d_gate]
        c = gates[0].shape[1]
        d_x = d_features[..., :c] + (d_means[:, None, :c] / n).to(features.dtype)
        return _image(d_x, ctx.size), None, *d_weights


def _layers(weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [weights[i : i + _EACH] for i in range(0, len(weights), _EACH)]


def _gates(gates: Tensor, means: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """A layer's gates (B, c + G), times those before it, from the means of the unscaled features."""
    gates = F.pad(gates, (0, means.shape[1] - gates.shape[1]), value=1.0)
    hidden = F.elu(F.linear(gates * means, w1, b1))
    return gates * torch.sigmoid(F.linear(hidden, w2, b2))


def _gated(w1: Tensor, gates: Tensor) -> Tensor:
    """The 1x1 weights (4G, c) for unscaled features: (B, 4G, c)."""
    return (w1 * gates[:, None]).to(w1.dtype)


def _before_elu(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient before an ELU, whose result is known."""
    found: Tensor = torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, True, out)
    return found


def _rows(image: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C), a view of an image in channels-last order."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _image(rows: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `_rows`, in channels-last order."""
    return rows.unflatten(1, size).permute(0, 3, 1, 2)
