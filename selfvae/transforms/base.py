"""The deterministic maps y[k+1] = d_k(y[k]), and the set of y[k] that each y[k+1] leaves possible.

A transform takes and returns uint8 images (B, C, H, W) and runs batched on the images' device. Its output
is the same, byte for byte, on every device and for every batch size: it uses integer arithmetic, or float64
sums of integers below 2**53, which are exact in any order of summation.

A level models y[k] given y[k+1] through a `Support`: the values of y[k] in coding order, group by group and
channel by channel, with the interval of values that are possible for each entry (docs/spec.md,
Consistency).
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
    "round_up",
    "scale_slice",
]


@dataclass(frozen=True)
class ImageSpec:
    """The number of channels of an image, and of values per channel: these are 0..num_values-1."""

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
        """Check that x is uint8 (B, C, H, W), not empty, and of this spec.

        Raises:
            TypeError: x is not uint8.
            ValueError: The shape or a value is wrong.
        """
        check_image(x, self.channels, name)
        if not x.numel():
            raise ValueError(f"{name} must hold at least one image and pixel; got {tuple(x.shape)}")
        if self.num_values < 256 and (most := int(x.max())) > self.max_value:
            raise ValueError(
                f"{name} must hold values of 0 to {self.max_value}; got {most}: "
                "reduce it with pictures.to_spec"
            )


def check_image(x: Tensor, channels: int | None = None, name: str = "x") -> None:
    """Check that x is uint8 (B, C, H, W) with the given number of channels.

    Raises:
        TypeError: x is not uint8.
        ValueError: The shape is wrong.
    """
    c = "C" if channels is None else channels
    if x.dtype != torch.uint8 or x.ndim != 4 or (channels is not None and x.shape[1] != channels):
        kind = TypeError if x.dtype != torch.uint8 else ValueError
        hint = ": convert with data.to_uint8" if x.dtype != torch.uint8 else ""
        got = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        raise kind(f"{name} must be uint8 (B, {c}, H, W); got {got}{hint}")


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in the precision of likelihoods: float64 stays, every other dtype becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def round_up(size: tuple[int, int], multiple: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest height and width of at least `size` that the multiples divide.

    >>> round_up((5, 8), (2, 4))
    (6, 8)
    """
    return -(-size[0] // multiple[0]) * multiple[0], -(-size[1] // multiple[1]) * multiple[1]


def scale_slice(part: slice, size: int, units: int) -> slice:
    """Convert a slice in units, of which there are `units`, to one in the `size` pixels that they span.

    >>> scale_slice(slice(1, 3), 8, 4)
    slice(2, 6, None)
    """
    return slice(part.start * size // units, part.stop * size // units)


class Support:
    """The set of images x with d(x) = y, in coding order.

    `split` lays out x as entries v of shape (B, G, C, h, w): G groups (the phases of a block), coded one
    after the other, of C channels, coded in `order`. Pixels that y contains are left out. `merge` is the
    inverse of `split`. `bounds` returns the interval of possible values of each entry; it depends only on
    the entries coded before, so that it serves both scoring, where all entries are known, and sampling,
    where they are filled in one after the other.

    This class is the support of a transform that restricts nothing.
    """

    groups = 1
    restricts = False  # whether some x are impossible
    truncates = False  # whether `bounds` are narrower than 0..num_values-1

    def __init__(self, y: Tensor, spec: ImageSpec) -> None:
        self.y = y
        self.max_value = spec.max_value
        self.order: tuple[int, ...] = tuple(range(spec.channels))

    def space_to_depth(self, x: Tensor) -> Tensor:
        """Lay out (B, C, H, W) as (B, G, C, h, w), with any number of channels, in their order."""
        return x[:, None]

    def depth_to_space(self, v: Tensor) -> Tensor:
        """Invert `space_to_depth`: (B, G, C, h, w) -> (B, C, H, W)."""
        return v[:, 0]

    def split(self, x: Tensor) -> Tensor:
        """Lay out x (B, C, H, W), of any dtype, as entries (B, G, C, h, w) in coding order."""
        return self._permute(self.space_to_depth(x), self.order)

    def merge(self, v: Tensor) -> Tensor:
        """Put entries v (B, G, C, h, w) in coding order together to x (B, C, H, W)."""
        inverse = tuple(self.order.index(c) for c in range(len(self.order)))
        return self.depth_to_space(self._permute(v, inverse))

    @staticmethod
    def _permute(v: Tensor, order: tuple[int, ...]) -> Tensor:
        if order == tuple(range(len(order))):
            return v
        return torch.stack([v[:, :, c] for c in order], 2)

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest possible value of each entry, inclusive.

        Args:
            v: Entries, int64 (B, G, C, h, w). The bounds of an entry depend only on earlier ones.

        Returns:
            (lo, hi), both int64 of v's shape.
        """
        return torch.zeros_like(v), torch.full_like(v, self.max_value)

    def step_bounds(self, v: Tensor, group: int, channel: int) -> tuple[Tensor, Tensor]:
        """Return `bounds` of one group and channel only: int64 (B, h, w) each. Sampling calls this."""
        if not self.truncates:
            own = v[:, group, channel]
            return torch.zeros_like(own), torch.full_like(own, self.max_value)
        lo, hi = self.bounds(v)
        return lo[:, group, channel], hi[:, group, channel]

    def refine(self, estimate: Tensor, v: Tensor) -> Tensor:
        """Correct an estimate of the entries by the true values of earlier groups.

        Args:
            estimate: Float (B, G, C, h, w).
            v: Entries, int64 of that shape. The correction of a group depends only on earlier groups.

        Returns:
            The corrected estimate, float (B, G, C, h, w).
        """
        return estimate

    def refine_group(self, estimate: Tensor, v: Tensor, group: int) -> Tensor:
        """Return `refine` of one group only: float (B, C, h, w). Sampling calls this."""
        return self.refine(estimate, v)[:, group]

    def nearest(self) -> Tensor:
        """Return, for each entry, a nearby pixel of y: uint8 (B, G, C, h, w). Subsampling only."""
        raise TypeError(f"{type(self).__name__} keeps no pixels of the image")

    def allows(self, x: Tensor) -> Tensor:
        """Return whether d(x) = y for each image x (B, C, H, W): bool (B,)."""
        v = self.split(x).long()
        lo, hi = self.bounds(v)
        return ((lo <= v) & (v <= hi)).flatten(1).all(1)


class Transform(nn.Module):
    """A deterministic map d without parameters: uint8 (B, C, H, W) -> uint8 (B, c, h, w).

    `support(y, spec)` describes the images x with d(x) = y. A transform that does not define one restricts
    nothing: the likelihood is then not truncated.
    """

    scale: tuple[int, int] = (1, 1)  # rows and columns of x per row and column of y

    @property
    def exact_estimate(self) -> bool:
        """Whether `estimate` gives the same numbers on every machine, as files of integer models need."""
        return True

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block: the height and width of x must be multiples of these."""
        return self.scale

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("use a concrete transform")

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        """Return the spec of d(x) for x of the given spec."""
        return x

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        """Return the set of images x of the given spec with d(x) = y, for y (B, c, h, w)."""
        return Support(y, spec)

    def restricts(self, spec: ImageSpec) -> bool:
        """Whether y leaves less than everything open of x, whose spec is given: see `support`."""
        rows, cols = (n // scale for n, scale in zip(self.block, self.scale, strict=True))
        y = torch.zeros(1, self.output_spec(spec).channels, rows, cols, dtype=torch.uint8)
        return self.support(y, spec).restricts

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """Estimate x from y without a network, e.g. by interpolation.

        Returns:
            (B, C, H, W), values on x's scale of 0..num_values-1; float64 if y is, else float32.
        """
        return at_least_float32(y)

    def interpolate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """Estimate x from y without a network, as well as is known how; arguments and result as there."""
        return self.estimate(y, spec)

    def size(self, h: int, w: int) -> tuple[int, int]:
        """Return height and width of d(x), in pixels, for x of height h and width w.

        Raises:
            ValueError: x is not made of whole blocks.
        """
        rows, cols = self.block
        if h % rows or w % cols:
            raise ValueError(
                f"{self} needs a height divisible by {rows} and a width divisible by {cols}; "
                f"got {h} x {w}: pad or crop the image"
            )
        return h // self.scale[0], w // self.scale[1]


class Null(Transform):
    """Discard everything except the size: d(x) has no channels. Its output is the top level's context."""

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        return x[:, :0]

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        return ImageSpec(0, x.num_values)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        b, _, h, w = y.shape
        return at_least_float32(y).new_full((b, spec.channels, h, w), spec.max_value / 2)


class BlockSupport(Support):
    """A support whose groups are the phases of n x m blocks, row by row (a space-to-depth layout)."""

    def __init__(self, y: Tensor, spec: ImageSpec, scale: tuple[int, int]) -> None:
        super().__init__(y, spec)
        self.scale = scale
        self.groups = scale[0] * scale[1]
        self.phases = list(range(self.groups))  # in coding order

    def alternate(self) -> None:
        """Let phases of one colour of a checkerboard precede the others, as (0, 0), (1, 1), (0, 1), (1, 0).

        Each phase of the second colour then lies between known pixels on all four sides.
        """
        self.phases.sort(key=lambda i: (i // self.scale[1] + i % self.scale[1]) % 2)

    def space_to_depth(self, x: Tensor) -> Tensor:
        (n, m), (b, c, h, w) = self.scale, x.shape
        x = x.reshape(b, c, h // n, n, w // m, m)
        v = x.permute(0, 3, 5, 1, 2, 4).reshape(b, n * m, c, h // n, w // m)
        return v if self.phases == list(range(n * m)) else v[:, self.phases]

    def depth_to_space(self, v: Tensor) -> Tensor:
        (n, m), (b, _, c, h, w) = self.scale, v.shape
        if self.phases != list(range(n * m)):
            v = v[:, [self.phases.index(i) for i in range(n * m)]]
        v = v.reshape(b, n, m, c, h, w).permute(0, 3, 4, 1, 5, 2)
        return v.reshape(b, c, h * n, w * m)


def full_range(transform: Transform, x: ImageSpec) -> ImageSpec:
    """Return x if it has 256 values per channel: the outputs of `transform` would exceed fewer.

    Raises:
        ValueError: x has fewer values.
    """
    if x.num_values != 256:
        raise ValueError(
            f"{transform} takes images of 256 values per channel; got {x.num_values}: "
            "put it before a bit depth"
        )
    return x


class Chain(Transform):
    """The composition of several transforms, first to last. Its support restricts nothing."""

    def __init__(self, *transforms: Transform) -> None:
        super().__init__()
        if not transforms:
            raise ValueError("a chain needs at least one transform; got none")
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
    def exact_estimate(self) -> bool:
        return all(t.exact_estimate for t in self._steps())

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
        """Return the transforms, each with the spec of its input, for x of the given spec."""
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

    def interpolate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        out = y
        for transform, taken in reversed(self.steps(spec)):
            out = transform.interpolate(out, taken)
        return out
