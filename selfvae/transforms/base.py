"""The deterministic maps d_k that compute y[k+1] = d(y[k]), and what each still allows y[k] to be.

Every transform takes and returns uint8 images (B, C, H, W), runs batched on the image's own device and
gives the same bytes on every device and for every batch size: it uses integer arithmetic, or float64
products of integers below 2**53, which are exact in any order of summation.

A level models y[k] given y[k+1] through a `Support`: the same numbers in coding order, group after
group and channel after channel, with the interval of values that each entry can still take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "BlockSupport",
    "Chain",
    "ImageSpec",
    "Null",
    "Support",
    "Transform",
    "at_least_float32",
    "check_image",
    "full_range",
]


@dataclass(frozen=True)
class ImageSpec:
    """What an image is: its number of channels and of grey levels (values are 0..num_values-1)."""

    channels: int
    num_values: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.channels <= 4:
            raise ValueError(f"an image has 1 to 4 channels; got {self.channels}")
        if not 2 <= self.num_values <= 256:
            raise ValueError(f"an image has 2 to 256 values per channel; got {self.num_values}")

    @property
    def max_value(self) -> int:
        """The largest value."""
        return self.num_values - 1

    def check(self, x: Tensor, name: str = "x") -> None:
        """Raise a `TypeError` or `ValueError` unless x is uint8 (B, C, H, W), not empty, of this spec."""
        check_image(x, self.channels, name)
        if not x.numel():
            raise ValueError(f"{name} must hold at least one image and pixel; got {tuple(x.shape)}")
        if self.num_values < 256 and (most := int(x.max())) > self.max_value:
            raise ValueError(
                f"{name} must hold values of 0 to {self.max_value}; got {most}: "
                "reduce it with pictures.to_spec"
            )


def check_image(x: Tensor, channels: int | None = None, name: str = "x") -> None:
    """Raise a `TypeError` or `ValueError` unless x is uint8 (B, C, H, W) with the given channels."""
    c = "C" if channels is None else channels
    if x.dtype != torch.uint8 or x.ndim != 4 or (channels is not None and x.shape[1] != channels):
        kind = TypeError if x.dtype != torch.uint8 else ValueError
        hint = ": convert with data.to_uint8" if x.dtype != torch.uint8 else ""
        got = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        raise kind(f"{name} must be uint8 (B, {c}, H, W); got {got}{hint}")


def at_least_float32(x: Tensor) -> Tensor:
    """float64 as it is, all else as float32: what likelihoods are computed in."""
    return x if x.dtype == torch.float64 else x.float()


class Support:
    """What y = d(x) leaves open of x, in coding order.

    `split` lays x out as entries v of shape (B, G, C, h, w): G groups (the phases of a block, coded one
    after the other) of C channels (coded in `order`); pixels that y already holds are left out. `merge`
    is its inverse. `bounds` gives each entry's interval of possible values, and looks only at entries
    coded earlier, so it serves scoring (all entries known) and sampling (filled step by step) alike.
    This class is the support of a transform that restricts nothing.
    """

    groups = 1
    restricts = False  # some x are ruled out
    truncates = False  # `bounds` are narrower than 0..num_values-1

    def __init__(self, y: Tensor, spec: ImageSpec) -> None:
        self.y = y
        self.max_value = spec.max_value
        self.order: tuple[int, ...] = tuple(range(spec.channels))

    def space_to_depth(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, G, C, h, w), channels untouched: also lays out a network's parameters."""
        return x[:, None]

    def depth_to_space(self, v: Tensor) -> Tensor:
        """(B, G, C, h, w) -> (B, C, H, W), the inverse of `space_to_depth`."""
        return v[:, 0]

    def split(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> entries v (B, G, C, h, w) in coding order, any dtype."""
        return self._permute(self.space_to_depth(x), self.order)

    def merge(self, v: Tensor) -> Tensor:
        """Entries v (B, G, C, h, w) in coding order -> x (B, C, H, W)."""
        inverse = tuple(self.order.index(c) for c in range(len(self.order)))
        return self.depth_to_space(self._permute(v, inverse))

    @staticmethod
    def _permute(v: Tensor, order: tuple[int, ...]) -> Tensor:
        if order == tuple(range(len(order))):
            return v
        return torch.stack([v[:, :, c] for c in order], 2)

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Entries v, int64 (B, G, C, h, w) -> inclusive (lo, hi), int64 of v's shape."""
        return torch.zeros_like(v), torch.full_like(v, self.max_value)

    def refine(self, estimate: Tensor, v: Tensor) -> Tensor:
        """A guess at the entries, float (B, G, C, h, w), corrected by what earlier entries of v tell."""
        return estimate

    def allows(self, x: Tensor) -> Tensor:
        """Whether x (B, C, H, W) maps to y: bool (B,)."""
        v = self.split(x).long()
        lo, hi = self.bounds(v)
        return ((lo <= v) & (v <= hi)).flatten(1).all(1)


class Transform(nn.Module):
    """A deterministic map d: uint8 (B, C, H, W) -> uint8 (B, c, h, w), without parameters.

    `support(y, spec)` tells what y = d(x) leaves open of an x of that spec. A transform without a
    support of its own leaves everything open: the likelihood is then the unrestricted one.
    """

    scale: tuple[int, int] = (1, 1)  # rows and columns of x for one of y

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of x that belong together: its height and width are multiples of these."""
        return self.scale

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("use a concrete transform")

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        """The spec of d(x) for x of the given spec."""
        return x

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        """What y (B, c, h, w) leaves open of x, whose spec is given."""
        return Support(y, spec)

    def restricts(self, spec: ImageSpec) -> bool:
        """Whether y leaves less than everything open of x, whose spec is given: see `support`."""
        rows, cols = (n // scale for n, scale in zip(self.block, self.scale, strict=True))
        y = torch.zeros(1, self.output_spec(spec).channels, rows, cols, dtype=torch.uint8)
        return self.support(y, spec).restricts

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """An estimate of x from y without a network: (B, C, H, W) on x's scale of 0..num_values-1.

        float64 for a y given in float64, float32 for any other.
        """
        return at_least_float32(y)

    def size(self, h: int, w: int) -> tuple[int, int]:
        """The height and width of d(x) for x of height h and width w, in pixels."""
        rows, cols = self.block
        if h % rows or w % cols:
            raise ValueError(
                f"{self} needs a height divisible by {rows} and a width divisible by {cols}; "
                f"got {h} x {w}: pad or crop the image"
            )
        return h // self.scale[0], w // self.scale[1]


class Null(Transform):
    """Forget everything but the size: d(x) has no channels. It is the context of the top level."""

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        return x[:, :0]

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        return ImageSpec(0, x.num_values)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        b, _, h, w = y.shape
        return at_least_float32(y).new_full((b, spec.channels, h, w), spec.max_value / 2)


class BlockSupport(Support):
    """A support whose groups are the phases of n x m blocks, row by row."""

    def __init__(self, y: Tensor, spec: ImageSpec, scale: tuple[int, int]) -> None:
        super().__init__(y, spec)
        self.scale = scale
        self.groups = scale[0] * scale[1]

    def space_to_depth(self, x: Tensor) -> Tensor:
        (n, m), (b, c, h, w) = self.scale, x.shape
        x = x.reshape(b, c, h // n, n, w // m, m)
        return x.permute(0, 3, 5, 1, 2, 4).reshape(b, n * m, c, h // n, w // m)

    def depth_to_space(self, v: Tensor) -> Tensor:
        (n, m), (b, _, c, h, w) = self.scale, v.shape
        v = v.reshape(b, n, m, c, h, w).permute(0, 3, 4, 1, 5, 2)
        return v.reshape(b, c, h * n, w * m)


def full_range(transform: Transform, x: ImageSpec) -> ImageSpec:
    """The spec, if it has all 256 levels: the transform's results would leave a smaller range."""
    if x.num_values != 256:
        raise ValueError(f"{transform} takes 256 levels; got {x.num_values}: put it before bit depths")
    return x


class Chain(Transform):
    """Several transforms, one after the other, taken as one. Its likelihood is the unrestricted one."""

    def __init__(self, *transforms: Transform) -> None:
        super().__init__()
        if not transforms:
            raise ValueError("a chain has at least one transform; got none")
        self.transforms = nn.ModuleList(transforms)
        self.scale = (
            math.prod(t.scale[0] for t in transforms),
            math.prod(t.scale[1] for t in transforms),
        )

    def __str__(self) -> str:
        return " then ".join(map(str, self._steps()))

    def _steps(self) -> list[Transform]:
        return [t for t in self.transforms if isinstance(t, Transform)]

    @property
    def block(self) -> tuple[int, int]:
        rows, cols, scale = 1, 1, (1, 1)
        for t in self._steps():
            rows, cols = math.lcm(rows, scale[0] * t.block[0]), math.lcm(cols, scale[1] * t.block[1])
            scale = (scale[0] * t.scale[0], scale[1] * t.scale[1])
        return rows, cols

    def forward(self, x: Tensor) -> Tensor:
        for transform in self._steps():
            x = transform(x)
        return x

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        for transform in self._steps():
            x = transform.output_spec(x)
        return x

    def steps(self, x: ImageSpec) -> list[tuple[Transform, ImageSpec]]:
        """The transforms, each with the spec of what it takes, for x of the given spec."""
        out = []
        for transform in self._steps():
            out.append((transform, x))
            x = transform.output_spec(x)
        return out

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        out = y
        for transform, taken in reversed(self.steps(spec)):
            out = transform.estimate(out, taken)
        return out
