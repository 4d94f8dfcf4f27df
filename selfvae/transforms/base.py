"""The deterministic maps d_k that compute y[k+1] = d(y[k]), and what each still allows y[k] to be.

Every transform takes and returns uint8 images (B, C, H, W), runs batched on the image's own device and
gives the same bytes on every device and for every batch size: it uses integer arithmetic, or float64
products of integers below 2**53, which are exact in any order of summation.

A level models y[k] given y[k+1] through a `Support`: the same numbers in coding order, group after
group and channel after channel, with the interval of values that each entry can still take.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BicubicDownscale",
    "BitDepth",
    "Chain",
    "Checkerboard",
    "GaussianBlur",
    "Greyscale",
    "ImageSpec",
    "MeanDownscale",
    "Null",
    "Sketch",
    "Subsample",
    "Subsampling",
    "Support",
    "Transform",
    "at_least_float32",
    "check_image",
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
            raise ValueError(f"an image has 2 to 256 levels a channel; got {self.num_values}")

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

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("use a concrete transform")

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        """The spec of d(x) for x of the given spec."""
        return x

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        """What y (B, c, h, w) leaves open of x, whose spec is given."""
        return Support(y, spec)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """A plain guess at x from y alone: (B, C, H, W) on x's scale of 0..num_values-1.

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


# --- downscaling -----------------------------------------------------------------------------------


class _Blocks(Support):
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


class _MeanSupport(_Blocks):
    """The block's sum is known up to rounding: a phase may take what the later ones can still complete."""

    restricts = truncates = True

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        n = self.groups
        total = n * self.y.long()[:, None]
        left = torch.arange(n - 1, -1, -1, device=v.device).view(1, n, 1, 1, 1) * self.max_value
        known = v.cumsum(1) - v
        lo = (total - n // 2 - known - left).clamp(min=0)
        hi = (total + (n + 1) // 2 - 1 - known).clamp(max=self.max_value)
        return lo, hi

    def refine(self, estimate: Tensor, v: Tensor) -> Tensor:
        """What the sum still holds beyond the guesses is shared evenly among the phases to come: the
        conditional mean of equal, independent Gaussians given their sum."""
        n = self.groups
        left = torch.arange(n, 0, -1, device=v.device).view(1, n, 1, 1, 1)
        rest = n * self.y.long()[:, None] - (v.cumsum(1) - v)
        guessed = estimate.flip(1).cumsum(1).flip(1)
        return estimate + (rest - guessed) / left


class MeanDownscale(Transform):
    """The mean of every block of `rows` x `cols` pixels, rounded half up.

    >>> MeanDownscale(2, 2)(torch.tensor([[[[1, 2], [2, 1]]]], dtype=torch.uint8)).item()
    2
    """

    def __init__(self, rows: int = 2, cols: int | None = None) -> None:
        super().__init__()
        self.scale = (rows, rows if cols is None else cols)
        if min(self.scale) < 1 or self.scale == (1, 1):
            raise ValueError(f"a block has at least 2 pixels; got {self.scale[0]} x {self.scale[1]}")

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        (b, c, h, w), (n, m) = x.shape, self.scale
        self.size(h, w)
        total = x.reshape(b, c, h // n, n, w // m, m).int().sum((3, 5))
        return ((total + n * m // 2) // (n * m)).to(torch.uint8)

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        return _MeanSupport(y, spec, self.scale)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        size = (y.shape[2] * self.scale[0], y.shape[3] * self.scale[1])
        return F.interpolate(at_least_float32(y), size, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        return f"{self.scale[0]}, {self.scale[1]}"


class _SubsamplingSupport(_Blocks):
    """Some phases of every block are y itself; the others are free."""

    restricts = True

    def __init__(self, y: Tensor, spec: ImageSpec, d: Subsampling) -> None:
        super().__init__(y, spec, d.block)
        self.d = d
        self.free = [i for i in range(self.groups) if i not in d.kept]
        self.groups = len(self.free)

    def space_to_depth(self, x: Tensor) -> Tensor:
        return super().space_to_depth(x)[:, self.free]

    def depth_to_space(self, v: Tensor) -> Tensor:
        y = self.d.stack_kept(self.y)
        b, c, h, w = y.shape
        kept = y.view(b, -1, c // len(self.d.kept), h, w).to(v.dtype)
        every = torch.cat([kept, v], 1).unbind(1)
        place = dict(zip((*self.d.kept, *self.free), every, strict=True))
        return super().depth_to_space(torch.stack([place[i] for i in range(len(place))], 1))

    def allows(self, x: Tensor) -> Tensor:
        return (self.d(x) == self.y).flatten(1).all(1)

    def nearest(self) -> Tensor:
        """For every entry the first kept pixel of its block: uint8 (B, G, C, h, w)."""
        first = self.d.stack_kept(self.y)[:, None, : len(self.order)]
        return first.expand(-1, self.groups, -1, -1, -1)


class Subsampling(Transform):
    """Keep some pixels of every block as they are; the others are what a level models.

    `kept` are the phases of a block (row by row) that are kept. A level's network works on a grid with one
    position a block.
    """

    kept: tuple[int, ...] = (0,)

    def weights(self, spec: ImageSpec) -> int:
        """How many numbers a block `support` takes from a level's network, to correct guesses by."""
        return 0

    def stack_kept(self, y: Tensor) -> Tensor:
        """y (B, C, h, w) on the grid of blocks, kept phases as further channels: (B, n C, H, W)."""
        return y

    def support(self, y: Tensor, spec: ImageSpec, weights: Tensor | None = None) -> Support:
        """As `Transform.support`; weights (B, `weights(spec)`, H, W), any real numbers."""
        return _SubsamplingSupport(y, spec, self)


class Subsample(Subsampling):
    """Keep the first of every `rows` rows and of every `cols` columns.

    staggered: every second row of x lies half a column to the right, as `Checkerboard` leaves them; for a
    better estimate.
    """

    def __init__(self, rows: int = 2, cols: int | None = None, *, staggered: bool = False) -> None:
        super().__init__()
        self.scale = (rows, rows if cols is None else cols)
        if min(self.scale) < 1 or self.scale == (1, 1):
            raise ValueError(f"at least every second row or column is dropped; got {self.scale}")
        if staggered and self.scale != (2, 1):
            raise ValueError(f"staggered goes with every second row, (2, 1); got {self.scale}")
        self.staggered = staggered

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        self.size(*x.shape[2:])
        n, m = self.scale
        return x[:, :, ::n, ::m].contiguous()

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """Linear interpolation between the kept pixels; past the last one it is repeated."""
        out = at_least_float32(y)
        if self.staggered:
            rows = out + torch.cat([out[:, :, 1:], out[:, :, -1:]], 2)
            between = (rows + torch.cat([rows[..., 1:], rows[..., -1:]], 3)) / 4
            return torch.stack([out, between], 3).flatten(2, 3)
        for dim, n in zip((2, 3), self.scale, strict=True):
            after = torch.cat([out.narrow(dim, 1, out.shape[dim] - 1), out.narrow(dim, -1, 1)], dim)
            steps = [out + (after - out) * (i / n) for i in range(n)]
            out = torch.stack(steps, dim + 1).flatten(dim, dim + 1)
        return out

    def extra_repr(self) -> str:
        return f"{self.scale[0]}, {self.scale[1]}" + (", staggered" if self.staggered else "")


class _CheckerboardSupport(_SubsamplingSupport):
    """Of every block the upper right pixel, then the lower left one, between four of those."""

    def __init__(self, y: Tensor, spec: ImageSpec, d: Subsampling, weights: Tensor | None) -> None:
        super().__init__(y, spec, d)
        self.weights = None if weights is None else torch.tanh(at_least_float32(weights))

    def refine(self, estimate: Tensor, v: Tensor) -> Tensor:
        """The second guess is moved by what the four at its corners missed theirs by, times weights."""
        if self.weights is None:
            return estimate
        first, second = estimate.unbind(1)
        h, w = first.shape[2:]
        missed = F.pad(v[:, 0] - first, (1, 0, 0, 1))  # beyond the picture nothing is missed
        for i, weight in enumerate(self.weights.chunk(4, 1)):
            top, left = i // 2, i % 2
            second = second + weight * missed[:, :, top : top + h, left : left + w]
        return torch.stack([first, second], 1)


class Checkerboard(Subsampling):
    """Keep every second pixel, as on a checkerboard: of row r the columns 2c + r % 2.

    y is half as wide. Each dropped pixel has its four neighbours in y, so that dropped pixels tell each
    other little; `Subsample(2, 1, staggered=True)` after it leaves every second row and column.
    """

    scale = (1, 2)
    kept = (0, 3)

    @property
    def block(self) -> tuple[int, int]:
        return (2, 2)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        self.size(*x.shape[2:])
        return torch.stack([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], 3).flatten(2, 3)

    def stack_kept(self, y: Tensor) -> Tensor:
        return torch.cat([y[:, :, ::2], y[:, :, 1::2]], 1)

    def weights(self, spec: ImageSpec) -> int:
        return 4 * spec.channels

    def support(self, y: Tensor, spec: ImageSpec, weights: Tensor | None = None) -> Support:
        return _CheckerboardSupport(y, spec, self, weights)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        """A dropped pixel is the mean of its neighbours above, below, left and right."""
        even, odd = at_least_float32(y).unflatten(2, (-1, 2)).unbind(3)
        left = torch.cat([odd[..., :1], odd[..., :-1]], 3)
        right = torch.cat([even[..., 1:], even[..., -1:]], 3)
        above = torch.cat([odd[:, :, :1], odd[:, :, :-1]], 2)
        below = torch.cat([even[:, :, 1:], even[:, :, -1:]], 2)
        upper = torch.stack([even, (even + right + above + odd) / 4], 4).flatten(3)
        lower = torch.stack([(left + odd + even + below) / 4, odd], 4).flatten(3)
        return torch.stack([upper, lower], 3).flatten(2, 3)


_BITS = 22  # of the fixed-point filter weights: 2**22 * 255 * taps stays far below float64's 2**53


def _filter(x: Tensor, weights: Tensor) -> Tensor:
    """Integer filter along the last axis: float64 x (..., n), fixed-point weights (m, n) -> (..., m)."""
    out = torch.floor((x @ weights.T + 2 ** (_BITS - 1)) / 2**_BITS)
    return out.clamp(0, 255)


def _separable(x: Tensor, weights: Callable[[int], Tensor]) -> Tensor:
    """Filter the columns, then the rows; each pass rounds half up to a uint8 value."""
    h, w = x.shape[2:]
    across = _filter(x.double(), weights(w).to(x.device, non_blocking=True))
    down = _filter(across.transpose(2, 3), weights(h).to(x.device, non_blocking=True))
    return down.transpose(2, 3).to(torch.uint8).contiguous()


def _full_range(transform: Transform, x: ImageSpec) -> ImageSpec:
    """The spec, if it has all 256 levels: the transform's results would leave a smaller range."""
    if x.num_values != 256:
        raise ValueError(f"{transform} takes 256 levels; got {x.num_values}: put it before bit depths")
    return x


def _fixed_point(rows: list[dict[int, float]], n: int) -> Tensor:
    """Rows of {index: weight} -> normalised fixed-point weights, float64 (len(rows), n)."""
    out = torch.zeros(len(rows), n, dtype=torch.float64)
    for i, row in enumerate(rows):
        total = math.fsum(row.values())
        for j, weight in row.items():
            out[i, j] = math.floor(weight / total * 2**_BITS + 0.5)
    return out


def _cubic(t: float, a: float = -0.5) -> float:
    t = abs(t)
    if t < 1:
        return ((a + 2) * t - (a + 3)) * t * t + 1
    return (((t - 5) * t + 8) * t - 4) * a if t < 2 else 0.0


@functools.lru_cache(maxsize=8)  # 8 n^2 / factor bytes each
def _bicubic_weights(factor: int, n: int) -> Tensor:
    rows = []
    for i in range(n // factor):
        centre, reach = (i + 0.5) * factor, 2.0 * factor
        first, last = max(0, int(centre - reach + 0.5)), min(n, int(centre + reach + 0.5))
        rows.append({j: _cubic((j + 0.5 - centre) / factor) for j in range(first, last)})
    return _fixed_point(rows, n)


class BicubicDownscale(Transform):
    """Antialiased bicubic downscaling by an integer factor (Keys' kernel, a = -1/2).

    The arithmetic is Pillow's (`Image.resize(..., BICUBIC)`): 22-bit weights, the columns first, each
    pass rounded to uint8. The bytes are the same.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 2:
            raise ValueError(f"factor must be at least 2; got {factor}")
        self.scale = (factor, factor)

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        return _full_range(self, x)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        self.size(*x.shape[2:])
        return _separable(x, functools.partial(_bicubic_weights, self.scale[0]))

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        size = (y.shape[2] * self.scale[0], y.shape[3] * self.scale[1])
        out = F.interpolate(at_least_float32(y), size, mode="bicubic", align_corners=False)
        return out.clamp(0, spec.max_value)

    def extra_repr(self) -> str:
        return f"{self.scale[0]}"


# --- fewer levels, less colour, less detail ---------------------------------------------------------


class _BitSupport(Support):
    restricts = truncates = True

    def __init__(self, y: Tensor, spec: ImageSpec, shift: int) -> None:
        super().__init__(y, spec)
        self.shift = shift

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        lo = self.y.long()[:, None] << self.shift
        return lo, lo + ((1 << self.shift) - 1)


class BitDepth(Transform):
    """Keep the `bits` high bits of every 8-bit value: x >> (8 - bits), an image of 2**bits levels."""

    def __init__(self, bits: int = 3) -> None:
        super().__init__()
        if not 1 <= bits <= 7:
            raise ValueError(f"bits must be 1 to 7; got {bits}")
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        return x >> (8 - self.bits)

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        return ImageSpec(_full_range(self, x).channels, 1 << self.bits)

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        return _BitSupport(y, spec, 8 - self.bits)

    def estimate(self, y: Tensor, spec: ImageSpec) -> Tensor:
        step = 1 << (8 - self.bits)
        return at_least_float32(y) * step + (step - 1) / 2

    def extra_repr(self) -> str:
        return f"{self.bits}"


_LUMA = (299, 587, 114)  # thousandths of red, green, blue (ITU-R BT.601)


def _luma(x: Tensor) -> Tensor:
    red, green, blue = x.long().unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]


class _GreySupport(Support):
    """Blue, then red, then green: the last one, of the largest weight, has at most 2 values left."""

    restricts = truncates = True

    def __init__(self, y: Tensor, spec: ImageSpec) -> None:
        super().__init__(y, spec)
        self.order = (2, 0, 1)

    def bounds(self, v: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.tensor([_LUMA[c] for c in self.order], device=v.device).view(1, 1, 3, 1, 1)
        # luma rounds half up, so the weighted sum lies in [rest, rest + 999] less what is known
        spent = (weight * v).cumsum(2) - weight * v
        rest = 1000 * self.y.long()[:, None] - 500 - spent
        later = self.max_value * (weight.flip(2).cumsum(2).flip(2) - weight)
        lo = -((later - rest) // weight)  # ceil((rest - later) / weight)
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


@functools.lru_cache(maxsize=8)
def _blur_weights(sigma: float, n: int) -> Tensor:
    reach, rows = math.ceil(3 * sigma), []
    kernel = {d: math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)}
    for i in range(n):
        row: dict[int, float] = {}
        for d, weight in kernel.items():
            j = min(max(i + d, 0), n - 1)
            row[j] = row.get(j, 0.0) + weight
        rows.append(row)
    return _fixed_point(rows, n)


class GaussianBlur(Transform):
    """Gaussian blur of standard deviation `sigma` pixels, cut at 3 sigma, edge pixels repeated."""

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"sigma must be positive (pixels); got {sigma}")
        self.sigma = sigma

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        return _full_range(self, x)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        return _separable(x, functools.partial(_blur_weights, self.sigma))

    def extra_repr(self) -> str:
        return f"{self.sigma}"


class Sketch(Greyscale):
    """A pencil sketch: the grey image dodged by its blurred inverse.

    grey * 255 // (255 - blur(255 - grey)), clipped to 255; white where the divisor is 0.
    """

    def __init__(self, sigma: float = 2.0) -> None:
        super().__init__()
        self.blur = GaussianBlur(sigma)

    def forward(self, x: Tensor) -> Tensor:
        grey = super().forward(x)
        divisor = 255 - self.blur(255 - grey).int()
        dodged = grey.int() * 255 // divisor.clamp(min=1)
        return torch.where(divisor == 0, 255, dodged.clamp(max=255)).to(torch.uint8)

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        return super().output_spec(_full_range(self, x))

    def support(self, y: Tensor, spec: ImageSpec) -> Support:
        return Support(y, spec)


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
