"""Transforms of grey values and colours: bit depth, greyscale, pencil sketch."""

from __future__ import annotations

import torch
from torch import Tensor

from selfvae.transforms.base import (
    ImageSpec,
    Support,
    Transform,
    at_least_float32,
    check_image,
    full_range,
)
from selfvae.transforms.blur import GaussianBlur

__all__ = ["BitDepth", "Greyscale", "Sketch"]


class _BitSupport(Support):
    """The high bits are known."""

    restricts = truncates = True

    def __init__(self, y: Tensor, spec: ImageSpec, shift: int) -> None:
        super().__init__(y, spec)
        self.shift = shift

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        lo = self.y.long()[:, None] << self.shift
        return lo, lo + ((1 << self.shift) - 1)

    def step_bounds(self, v: Tensor, group: int, channel: int) -> tuple[Tensor, Tensor]:
        lo = self.y[:, channel].long() << self.shift
        return lo, lo + ((1 << self.shift) - 1)


class BitDepth(Transform):
    """Keep the `bits` high bits of each 8-bit value: x >> (8 - bits), of 2**bits values."""

    def __init__(self, bits: int = 3) -> None:
        super().__init__()
        if not 1 <= bits <= 7:
            raise ValueError(f"bits must be 1 to 7; got {bits}")
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        return x >> (8 - self.bits)

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        return ImageSpec(full_range(self, x).channels, 1 << self.bits)

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        return _BitSupport(y, spec, 8 - self.bits)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        step = 1 << (8 - self.bits)
        return at_least_float32(y) * step + (step - 1) / 2

    def extra_repr(self) -> str:
        return f"{self.bits}"


_LUMA = (299, 587, 114)  # weights of red, green and blue in thousandths (ITU-R BT.601)


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.long().unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


class _GreySupport(Support):
    """Blue, then red, then green: the largest weight comes last and leaves at most 2 values."""

    restricts = truncates = True

    def __init__(self, y: Tensor, spec: ImageSpec) -> None:
        super().__init__(y, spec)
        self.order = (2, 0, 1)

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.tensor([_LUMA[c] for c in self.order], device=v.device).view(1, 1, 3, 1, 1)
        known = (weight * v).cumsum(2) - weight * v
        later = weight.flip(2).cumsum(2).flip(2) - weight
        return self._interval(self.y.long()[:, None], known, weight, later)

    def step_bounds(self, v: Tensor, group: int, channel: int) -> tuple[Tensor, Tensor]:
        weight = [_LUMA[c] for c in self.order]
        known = torch.zeros_like(v[:, 0, 0])
        for c in range(channel):
            known = known + weight[c] * v[:, 0, c]
        return self._interval(self.y[:, 0].long(), known, weight[channel], sum(weight[channel + 1 :]))

    def _interval(
        self, y: Tensor, known: Tensor, weight: Tensor | int, later: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """The interval of a channel of that weight, given the sum so far and the weight still to come."""
        # luma is rounded half up: the rest of the weighted sum lies in [rest, rest + 999]
        rest = 1000 * y - 500 - known
        lo = -((self.max_value * later - rest) // weight)  # ceil((rest - max_value * later) / weight)
        hi = (rest + 999) // weight
        return lo.clamp(min=0), hi.clamp(max=self.max_value)


class Greyscale(Transform):
    """Integer luma of an RGB image: (299 r + 587 g + 114 b + 500) // 1000 (ITU-R BT.601 weights)."""

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, 3)
        return ((_luma(x) + 500) // 1000).to(torch.uint8)

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        if x.channels != 3:
            raise ValueError(f"{type(self).__name__} takes 3 channels (RGB); got {x.channels}")
        return ImageSpec(1, x.num_values)

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        return _GreySupport(y, spec)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        return at_least_float32(y).expand(-1, spec.channels, -1, -1)


class Sketch(Greyscale):
    """A pencil sketch: the greyscale image divided by its blurred version ("colour dodge").

    min(255, grey * 255 // (255 - blur(255 - grey))); 255 where the divisor is 0.
    """

    def __init__(self, sigma: float = 2.0) -> None:
        super().__init__()
        self.blur = GaussianBlur(sigma)

    def extra_repr(self) -> str:
        return f"{self.blur.sigma}"

    def forward(self, x: Tensor) -> Tensor:
        grey = super().forward(x)
        divisor = 255 - self.blur(255 - grey).int()
        dodged = grey.int() * 255 // divisor.clamp(min=1)
        return torch.where(divisor == 0, 255, dodged.clamp(max=255)).to(torch.uint8)

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        return super().output_spec(full_range(self, x))

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        return Support(y, spec)
