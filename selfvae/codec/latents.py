"""How a latent z is written: as whole numbers.

- `Rounded`: the posterior is a `UnitUniform`; its nearest whole number is coded, which costs the KL.
- `Gaussian`: a value is drawn from the posterior with bits that are on the stack already, and the decoder,
  which can tell the posterior once it has the image, puts them back: the cost is the KL ("bits-back").
  Sources: Hinton and van Camp 1993; Townsend et al. 2019; for the order of pops and pushes, which lets few
  bits suffice, Kingma et al. 2019 (Bit-Swap).

  Where the stack holds too little, as for the finest latent of a file's first picture, the latent is chosen
  *by rate*: every channel gets a step, and of its multiples those are taken that cost least, their own bits
  and the image's. The multiples are shifted as if by chance, and a channel that tells too little is noise:
  a decoder that was trained with noise is at a loss without it (z = 0 costs a fifth to a third more).

The flow prior is coded through its base space: it maps whole numbers one to one, dividing with a remainder
that goes to the stack (Zhang et al. 2021, iFlow). By rate a latent is rounded to a coarse grid, the rest of
its digits filled up from the stack; where that holds too little, steps are taken in the base space itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfvae.codec.ans import ANSCoder, code
from selfvae.codec.container import CodecError
from selfvae.codec.float64 import NOT_FINITE, SideInformation, ratios, values, weights
from selfvae.codec.tables import SHARES, Ints
from selfvae.distributions.latents import (
    DiagonalNormal,
    GaussianMixture,
    LocalGaussianMixture,
    NoisyLogistic,
    UnitUniform,
)
from selfvae.distributions.priors import FlowDistribution
from selfvae.nn.flows import Coupling

__all__ = ["FINE", "Gaussian", "InsufficientBits", "Latent", "Rounded", "fixed_noise_sample"]

# all of these are part of the format
_LEVELS = 256  # whole numbers of a latent that is rounded or chosen by rate
# by rate, in standard deviations of the prior; 0 stands for noise that is always the same
_STEPS = (*(2.0 ** (j / 2 - 4) for j in range(13)), 0.0)
_NOWHERE = 256.0  # the step of noise, whose numbers are all 0 and cost nothing
_GRIDS = tuple(2.0**-j for j in range(8))  # of a latent that is drawn
# kinds: drawn on a grid, by rate in multiples of standard deviations of the prior, rounded to a grid
_BY_RATE, _ROUNDED = len(_GRIDS), len(_GRIDS) + 1
_KINDS = _ROUNDED + len(_GRIDS)
_MANY = 1 << 15  # whole numbers of a latent that is drawn
_WIDTH = 6  # deviations from its mean, at most, that a latent is drawn
_FAR = float(1 << 20)  # steps of the grid that a flow may shift by
_WILD = 1 << 44  # a flow's products, at most: the next ones might not fit 64 bits
_AT_ONCE = 64  # values that a flow maps
_LATER = 1 << 40  # numbers of a posterior's values in the notes: the decoder meets them later

# the encoder's choice: a grid's step, in deviations of the posterior (a tenth of the latent may be
# narrower); the first that the stack has enough for
FINE = (0.25, 0.5, 1.0)


class InsufficientBits(Exception):  # noqa: N818 (no error: the caller has another way)
    """The stack holds too little to draw a latent, or a flow takes it out of what can be coded."""


class Latent(NamedTuple):
    """A latent as it is coded, and as the networks see it, float64 (B, C, h, w), both on the CPU."""

    numbers: np.ndarray  # int8 or int16
    z: Tensor
    kind: int

    @property
    def drawn(self) -> bool:
        """Whether the posterior's bits are to be given back."""
        return self.kind < _BY_RATE


class _Normals(NamedTuple):
    """Mixtures of M Gaussians, all of a position's channels from one component: (M,), (M, B, C, h, w).

    On the CPU, float64. whole: all of a latent is from one component.
    """

    log_weights: Tensor
    mean: Tensor
    log2_scale: Tensor
    whole: bool = False

    @classmethod
    def of(cls, p: DiagonalNormal | GaussianMixture | LocalGaussianMixture) -> _Normals:
        if isinstance(p, DiagonalNormal):
            mean, log_var = (x.double().cpu()[None] for x in (p.mean, p.log_var))
            return cls(torch.zeros(1), mean, log_var / math.log(4))
        if isinstance(p, GaussianMixture):
            mean, log_var = (
                x.double().cpu()[:, None].expand(-1, p.count, -1, -1, -1) for x in (p.means, p.log_vars)
            )
            return cls(p.logits.double().cpu(), mean, log_var / math.log(4), whole=True)
        b, h, w = p.shape
        mean, log_var = (
            x.double().cpu()[:, None, :, None, None].expand(-1, b, -1, h, w) for x in (p.means, p.log_vars)
        )
        return cls(torch.log_softmax(p.logits.double().cpu(), 0), mean, log_var / math.log(4))

    def scaled(self, shift: Tensor | float, step: Tensor | float) -> _Normals:
        """Of (z - shift) / step."""
        octaves = torch.as_tensor(step, dtype=torch.float64).log2()
        return self._replace(mean=(self.mean - shift) / step, log2_scale=self.log2_scale - octaves)

    def component(self, which: Ints) -> _Normals:
        """One Gaussian an image, the components' numbers (B,)."""
        images, at = torch.arange(len(which)), torch.from_numpy(which)
        return _Normals(torch.zeros(1), self.mean[at, images][None], self.log2_scale[at, images][None])

    def nearest(self, numbers: Ints) -> Ints:
        """The component that is densest at (B, C, h, w), image by image: (B,)."""
        v, nats = torch.from_numpy(numbers).double(), []
        for mean, log2_scale in zip(self.mean, self.log2_scale, strict=True):
            square = ((v - mean) / torch.exp2(log2_scale)) ** 2
            nats.append((0.5 * square + log2_scale * math.log(2)).flatten(1).sum(1))
        return torch.stack(nats).argmin(0).numpy()

    def code(
        self,
        num_values: int,
        stack: ANSCoder,
        notes: SideInformation,
        known: np.ndarray | None,
        *,
        drawn: bool = False,
    ) -> Ints:
        """Whole numbers (B, C, h, w), -num_values / 2 and on; `known` are pushed, else they are popped.

        drawn: as by a posterior: none far out, where the tables end and all would be alike likely; its
            values have other numbers in the notes.
        """
        known = None if known is None else known.astype(np.int64)
        if self.whole and len(self.mean) > 1:
            # the densest component is chosen: the others' densities add next to nothing to a whole latent's
            many = np.full(self.mean.shape[1], len(self.mean))
            which = stack.uniform(many, None if known is None else self.nearest(known))
            return self.component(which).code(num_values, stack, notes, known)
        shape, n = self.mean.shape[1:], self.mean[0, :, 0].numel()
        if len(self.mean) == 1:  # all channels at once
            flat = None if known is None else known.reshape(-1) + num_values // 2
            channel = values(
                self.mean.reshape(1, -1).numpy(), self.log2_scale.reshape(1, -1).numpy(), num_values,
                "normal", notes, _LATER if drawn else None,
            )  # fmt: skip
            bounds = channel.within(_WIDTH, num_values) if drawn else None
            found, _ = code(stack, np.full_like(channel.mean, 1 << 20), channel, num_values, bounds, flat)
            return found.reshape(shape) - num_values // 2
        w = weights(self.log_weights.numpy()[:, None].repeat(n, 1), notes)
        out = np.zeros(shape, np.int64)
        for c in range(shape[1]):
            mean, log2_scale = (x[:, :, c].flatten(1).numpy() for x in (self.mean, self.log2_scale))
            channel = values(mean, log2_scale, num_values, "normal", notes)
            flat = None if known is None else known[:, c].reshape(-1) + num_values // 2
            found, w = code(stack, w, channel, num_values, None, flat)
            out[:, c] = found.reshape(out[:, c].shape) - num_values // 2
        return out


class Rounded:
    """Latents with a `UnitUniform` posterior and a `NoisyLogistic` prior, as whole numbers."""

    @staticmethod
    def choose(posterior: UnitUniform) -> Latent:
        z = posterior.mode().double().cpu()
        return Latent(z.numpy().astype(np.int8), z, _ROUNDED)

    @staticmethod
    def code(prior: NoisyLogistic, stack: ANSCoder, notes: SideInformation, known: Latent | None) -> Latent:
        mean, octaves = prior.mean.flatten(), prior.log_scale.flatten() / math.log(2)
        channel = values(
            mean.double().cpu().numpy()[None],
            octaves.double().cpu().numpy()[None],
            _LEVELS,
            "logistic",
            notes,
        )
        flat = None if known is None else known.numbers.reshape(-1).astype(np.int64) + _LEVELS // 2
        found, _ = code(stack, np.full_like(channel.mean, 1 << 20), channel, _LEVELS, None, flat)
        numbers = (found - _LEVELS // 2).astype(np.int8).reshape(prior.mean.shape)
        return Latent(numbers, torch.from_numpy(numbers).double(), _ROUNDED)


class _Base(NamedTuple):
    """Where a prior is about the standard normal: the way there and back, and what it is there."""

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    normals: Callable[[Tensor], _Normals]

    @classmethod
    def of(cls, prior: Any) -> _Base:
        if isinstance(prior, FlowDistribution):
            return cls(
                lambda z: prior.flow(z)[0], lambda e: prior.flow.inverse(e.to(prior.device)), _standard
            )
        if isinstance(prior, DiagonalNormal):
            mean, scale = prior.mean.double(), torch.exp(0.5 * prior.log_var.double())
            return cls(lambda z: (z - mean) / scale, lambda e: mean + scale * e.to(scale.device), _standard)
        shares = torch.softmax(prior.logits, 0).view(-1, *[1] * (prior.means.dim() - 1))
        mean = (shares * prior.means).sum(0)
        width = (shares * (torch.exp(prior.log_vars) + (prior.means - mean) ** 2)).sum(0).sqrt()
        if isinstance(prior, LocalGaussianMixture):
            mean, width = mean[:, None, None], width[:, None, None]
        own = _Normals.of(prior).scaled(mean.cpu(), width.cpu())
        return cls(
            lambda z: (z - mean) / width, lambda e: mean + width * e.to(width.device), lambda like: own
        )


def _standard(like: Tensor) -> _Normals:
    zeros = torch.zeros(1, *like.shape, dtype=torch.float64)
    return _Normals(torch.zeros(1), zeros, zeros)


class Gaussian:
    """Latents with a Gaussian posterior: drawn on a grid, or chosen by rate."""

    @staticmethod
    def draw(
        posterior: DiagonalNormal, stack: ANSCoder, notes: SideInformation, fine: float = FINE[0]
    ) -> Latent:
        """Pop a latent by its posterior, from the grid's range at most.

        Raises Dry if the stack does not hold enough, and spoils it.
        """
        kind = _kind(fine * _deviation(posterior, 0.1))
        grid = _Normals.of(posterior).scaled(0.0, _GRIDS[kind])
        numbers = grid.code(_MANY, stack, notes, None, drawn=True)
        if stack.left() == 0:
            raise InsufficientBits
        return _on_grid(numbers, kind)

    @staticmethod
    def give_back(
        posterior: DiagonalNormal, stack: ANSCoder, notes: SideInformation, known: Latent
    ) -> None:
        """Push what drawing a latent popped."""
        grid = _Normals.of(posterior).scaled(0.0, _GRIDS[known.kind])
        grid.code(_MANY, stack, notes, known.numbers, drawn=True)
        stack.push()

    @staticmethod
    def choose(prior: Any, posterior: DiagonalNormal, plain: bool) -> Latent:
        """By rate; `plain` in a way that takes nothing from the stack."""
        if isinstance(prior, FlowDistribution) and not plain:
            kind = _kind(math.sqrt(12) * _deviation(posterior, 0.5))  # where bits and errors balance
            numbers = torch.round(posterior.mean / _GRIDS[kind]).clamp(-_MANY // 2, _MANY // 2 - 1)
            return _on_grid(numbers.long().cpu().numpy(), _ROUNDED + kind)
        base = _Base.of(prior)
        mean, beside = base.to(posterior.mean), base.to(posterior.mean + torch.exp(0.5 * posterior.log_var))
        return _by_rate(base, *_cheapest(mean.cpu(), (beside - mean).cpu() ** 2))

    @staticmethod
    def code(
        prior: Callable[[bool], Any],
        shape: tuple[int, int, int, int],
        stack: ANSCoder,
        notes: SideInformation,
        known: Latent | None,
    ) -> Latent:
        """Push a `known` latent, or pop it. Raises Dry as `draw` does, and leaves the stack in between.

        prior: p(z | y_up, z_up), given whether z is drawn. If it is not, it was chosen before z_up was
            known, and the prior must be told another draw of z_up (`fixed_noise_sample`).
        """
        kind = _pop_kind(stack) if known is None else known.kind
        p = prior(kind < _BY_RATE)
        if kind == _BY_RATE:
            return _code_by_rate(p, shape, stack, notes, known)
        if isinstance(p, FlowDistribution):
            return _code_by_flow(p, shape, stack, notes, known, kind)
        if known is not None:
            _push_kind(stack, known)
        own = None if known is None else known.numbers
        found = _Normals.of(p).scaled(0.0, _grid(kind)).code(_MANY, stack, notes, own)
        return _on_grid(found, kind) if known is None else known


def _pop_kind(stack: ANSCoder) -> int:
    return int(stack.uniform(np.array([_KINDS]))[0])


def _push_kind(stack: ANSCoder, known: Latent) -> None:
    stack.uniform(np.array([_KINDS]), np.array([known.kind]))


def _deviation(posterior: DiagonalNormal, share: float) -> float:
    """The posterior's standard deviation, below which is a share of the latent."""
    log_var = posterior.log_var.flatten()
    if not (log_var.isfinite().all() and posterior.mean.isfinite().all()):
        raise CodecError(NOT_FINITE)
    return math.exp(0.5 * log_var.kthvalue(max(1, int(share * log_var.numel()))).values.item())


def _kind(step: float) -> int:
    """The grid next to a step."""
    return min(max(round(-math.log2(step)), 0), len(_GRIDS) - 1)


def _grid(kind: int) -> float:
    return _GRIDS[kind if kind < _BY_RATE else kind - _ROUNDED]


def _on_grid(numbers: Ints, kind: int) -> Latent:
    return Latent(numbers.astype(np.int16), _grid(kind) * torch.from_numpy(numbers).double(), kind)


def _code_by_rate(
    prior: Any,
    shape: tuple[int, int, int, int],
    stack: ANSCoder,
    notes: SideInformation,
    known: Latent | None,
) -> Latent:
    if known is not None:
        _push_kind(stack, known)
    n = shape[0] * shape[1]
    kinds = _code_kinds(n, stack, None if known is None else known.numbers[:n])
    base, own = _Base.of(prior), None if known is None else known.numbers[n:].reshape(shape)
    step = _steps(kinds.reshape(shape[:2]))
    shift = step * _dither(shape)
    step = torch.where(step > 0, step, _NOWHERE)
    grid = base.normals(torch.zeros(shape)).scaled(shift, step)
    found = grid.code(_LEVELS, stack, notes, own)
    return _by_rate(base, kinds.reshape(shape[:2]), found) if known is None else known


def _code_kinds(n: int, stack: ANSCoder, known: np.ndarray | None) -> Ints:
    """Which step each channel has: half of them, about, are noise."""
    noise = stack.bits(np.full(n, 1 << 23), None if known is None else known == len(_STEPS) - 1)
    kinds, others = np.full(n, len(_STEPS) - 1), np.full(n - noise.sum(), len(_STEPS) - 1)
    kinds[~noise] = stack.uniform(others, None if known is None else known[~noise])
    return kinds


def _by_rate(base: _Base, kinds: Ints, found: Ints) -> Latent:
    z = base.back(_values(kinds, torch.from_numpy(found))).double().cpu()
    return Latent(np.concatenate([kinds.reshape(-1), found.reshape(-1)]).astype(np.int8), z, _BY_RATE)


def _steps(kinds: Ints) -> Tensor:
    """(B, C) -> (B, C, 1, 1)."""
    return torch.tensor(_STEPS, dtype=torch.float64)[torch.from_numpy(kinds).long()][:, :, None, None]


def _code_by_flow(
    prior: FlowDistribution,
    shape: tuple[int, int, int, int],
    stack: ANSCoder,
    notes: SideInformation,
    known: Latent | None,
    kind: int,
) -> Latent:
    # a coarse grid is filled up to a fine one: the flow rounds at every step
    fill = 0 if kind < _BY_RATE else len(_GRIDS) - 1 - (kind - _ROUNDED)
    couple = _Integers(prior, _grid(kind) / 2**fill, math.prod(shape), stack, notes)
    low, noise = np.full(math.prod(shape), 1 << fill), None
    if known is not None:
        v = known.numbers.astype(np.int64) << fill
        if fill:
            v += stack.uniform(low).reshape(shape)
        noise = prior.flow.walk(torch.from_numpy(v), couple.there).numpy()
        if np.abs(noise).max() >= _MANY // 2 or stack.left() == 0:
            raise InsufficientBits
        _push_kind(stack, known)
    found = _standard(torch.zeros(shape)).scaled(0.0, couple.grid).code(_MANY, stack, notes, noise)
    if known is not None:
        return known
    v = prior.flow.walk_back(torch.from_numpy(found), couple.back).numpy()
    if fill:
        stack.uniform(low, (v & (1 << fill) - 1).reshape(-1))
        stack.push()
    return _on_grid(v >> fill, kind)


def _dither(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Numbers between -1/2 and 1/2 like random ones, the same for every picture and machine."""
    i = torch.arange(1, math.prod(shape[1:]) + 1).view(1, *shape[1:])
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 0x1B56C4E9)):
        i = (i ^ i >> shift) * factor & (1 << 31) - 1
    return (i.double() + 0.5) / (1 << 31) - 0.5


def _noise(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A draw of the standard normal, always the same; float64."""
    return torch.special.ndtri(_dither(shape) + 0.5)


def fixed_noise_sample(q: DiagonalNormal) -> Tensor:
    """A draw, always with the same noise."""
    return q.mean + torch.exp(0.5 * q.log_var) * _noise(q.mean.shape).to(q.mean.device)


def _values(kinds: Ints, numbers: Tensor) -> Tensor:
    """What numbers (B, C, h, w) stand for: shifted multiples of their channel's step, or noise."""
    shift = _dither(numbers.shape)
    step = _steps(kinds)
    return torch.where(step > 0, step * (numbers + shift), _noise(numbers.shape))


def _cheapest(mean: Tensor, variance: Tensor) -> tuple[Ints, Ints]:
    """Steps (B, C) and numbers (B, C, h, w) for a posterior, where the prior is the standard normal."""
    precision = (1 / variance - 1).clamp(min=0)  # of what the image alone says
    told = torch.where(precision > 1e-6, mean / variance / precision.clamp(min=1e-6), 0.0)
    shift = _dither(mean.shape)
    kinds, numbers = torch.full(mean.shape[:2], len(_STEPS) - 1), torch.zeros_like(mean)
    least = 0.5 * (precision * (_noise(mean.shape) - told) ** 2).sum((2, 3))
    for kind, step in enumerate(_STEPS[:-1]):
        nearest = torch.round(mean / step - shift)
        cost, found = torch.full_like(mean, math.inf), torch.zeros_like(mean)
        for i in (nearest, nearest - nearest.sign()):
            i = i.clamp(-_LEVELS // 2 + 1, _LEVELS // 2 - 2)
            e = step * (i + shift)
            own = _nats(e, step) + 0.5 * precision * (e - told) ** 2
            found, cost = torch.where(own < cost, i, found), torch.minimum(own, cost)
        total = cost.sum((2, 3))
        better = total < least
        least, kinds = torch.where(better, total, least), torch.where(better, kind, kinds)
        numbers = torch.where(better[:, :, None, None], found, numbers)
    return kinds.numpy(), numbers.numpy().astype(np.int64)


def _nats(e: Tensor, step: float) -> Tensor:
    """-ln of the standard normal's mass between e - step / 2 and e + step / 2."""
    near, far = (torch.special.log_ndtr(-(e.abs() + side * step / 2)) for side in (-1, 1))
    return -(near + torch.log1p(-torch.exp(far - near)))


class _Integers:
    """A flow's couplings as one-to-one maps of whole numbers: v -> v * ratio / 2^12 + shift.

    What the ratio's numerator multiplies is filled up from the stack, what its denominator divides leaves
    a remainder for it: the bits that this costs or yields are the log-determinant.
    """

    def __init__(
        self, prior: FlowDistribution, grid: float, n: int, stack: ANSCoder, notes: SideInformation
    ) -> None:
        flow, self.grid = prior.flow, grid
        couplings = [*flow.checker, *flow.channel, *flow.final]
        first = notes.reserve(2 * n * len(couplings))  # they come in reverse in the decoder
        self.at = {coupling: first + 2 * n * i for i, coupling in enumerate(couplings)}
        self.n, self.device, self.stack, self.notes = n, prior.device, stack, notes

    def _parameters(self, coupling: Coupling, v: Tensor) -> tuple[Tensor, Ints, Ints]:
        """Which values change, their ratios and shifts."""
        moved = ~coupling.mask(v).expand(v.shape)
        log_scale, shift = (
            x.cpu()[moved].numpy() for x in coupling.affine(v.double().to(self.device) * self.grid)
        )
        at = self.at[coupling]
        ratio = ratios(log_scale, self.notes, at)
        return moved, ratio, self.notes.quantize(np.clip(shift / self.grid, -_FAR, _FAR), at + self.n)

    def there(self, coupling: Coupling, v: Tensor) -> Tensor:
        moved, ratio, shift = self._parameters(coupling, v)
        values = v[moved].numpy()
        for some in _batches(len(values)):
            filled = values[some] * ratio[some] + self.stack.uniform(ratio[some])
            if self.stack.left() == 0 or np.abs(filled).max() > _WILD:
                raise InsufficientBits
            values[some] = filled >> SHARES
            rest = filled & (1 << SHARES) - 1
            self.stack.uniform(np.full_like(rest, 1 << SHARES), rest)
            self.stack.push()
        return v.masked_scatter(moved, torch.from_numpy(values + shift))

    def back(self, coupling: Coupling, v: Tensor) -> Tensor:
        moved, ratio, shift = self._parameters(coupling, v)
        values = v[moved].numpy() - shift
        for some in reversed(_batches(len(values))):
            rest = self.stack.uniform(np.full_like(ratio[some], 1 << SHARES))
            values[some], filled = np.divmod((values[some] << SHARES) + rest, ratio[some])
            self.stack.uniform(ratio[some], filled)
            self.stack.push()
        return v.masked_scatter(moved, torch.from_numpy(values))


def _batches(n: int) -> list[slice]:
    """So many at a time, so that what is popped is soon pushed again."""
    return [slice(i, i + _AT_ONCE) for i in range(0, n, _AT_ONCE)]
