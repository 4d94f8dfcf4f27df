"""Coding of a latent z as integers.

- `Rounded`: the posterior is a `UnitUniform`. The integer nearest to its mean is coded, at the KL.
- `Gaussian`: the posterior is normal. A latent is *drawn* from it with bits popped from the stack; the
  decoder, which knows the posterior once it has the image, pushes them back, so that the net length is the
  KL ("bits-back coding", Hinton and van Camp 1993; Townsend et al. 2019). The order of pops and pushes that
  needs few initial bits is that of Bit-Swap (Kingma et al. 2019).

  Where the stack holds too few bits, as for the finest latent of the first picture in a file, the latent is
  *rate-optimised*: each channel is quantized with its own step, to the multiples that minimise the bits of
  the latent plus those of the image. The multiples are dithered, and a channel that carries too little
  information is replaced by fixed noise: a decoder trained with noisy latents needs it (z = 0 costs a fifth
  to a third more).

With a flow as the prior, a latent is coded in the flow's base space. The flow maps integers one to one; the
remainders of its divisions go to the stack (iFlow, Zhang et al. 2021). For this, a latent that is not drawn
is *rounded* to a coarse grid, and its further digits are filled up from the stack; if that holds too few
bits, or if the flow is autoregressive, the latent is rate-optimised in the base space.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selfvae.codec.ans import ANSCoder
from selfvae.codec.container import CodecError
from selfvae.codec.float64.decisions import code
from selfvae.codec.float64.quantization import NOT_FINITE, SideInformation, ratios, values, weights
from selfvae.codec.tables import SHARES, Ints
from selfvae.distributions.latents import (
    DiagonalNormal,
    GaussianMixture,
    LocalGaussianMixture,
    NoisyLogistic,
    UnitUniform,
)
from selfvae.distributions.priors import FlowDistribution, LatentDistribution
from selfvae.nn.flows import Coupling, RealNVP

__all__ = [
    "FINE",
    "Coding",
    "Gaussian",
    "InsufficientBits",
    "Latent",
    "Mode",
    "Rounded",
    "fixed_noise_sample",
]

# all of these are part of the format
_VALUES = 256  # integers of a latent that is rate-optimised, or whose posterior is uniform
# steps of rate-optimised channels, in standard deviations of the prior; 0 stands for fixed noise
_STEPS = (*(2.0 ** (j / 2 - 4) for j in range(13)), 0.0)
_NOWHERE = 256.0  # the step used for fixed noise, whose integers are all 0 and cost nothing
_GRIDS = 8  # steps of 2^0, 2^-1, ... for latents that are drawn or rounded
_MANY = 1 << 15  # integers of a latent that is drawn or rounded
_WIDTH = 6  # standard deviations from its mean within which a latent is drawn
_FAR = float(1 << 20)  # the largest shift of a flow, in grid steps
_WILD = 1 << 44  # the largest product in a flow: later ones might exceed 64 bits
_AT_ONCE = 64  # values that a flow maps at once
_LATER = 1 << 40  # number of the posterior's first value in the side information: decoded later

# steps that the encoder tries in turn for drawing, in standard deviations of the posterior (of which a
# tenth may be smaller), until the stack holds enough bits
FINE = (0.25, 0.5, 1.0)


class Mode(enum.Enum):
    """How the integers of a latent are chosen."""

    DRAWN = "drawn"  # from the posterior, on a grid
    RATE_OPTIMISED = "rate-optimised"  # multiples of standard deviations of the prior
    ROUNDED = "rounded"  # to the nearest point of a grid


class Coding(NamedTuple):
    """How a latent is coded: the mode, and the grid of its values, whose step is 2^-grid.

    Rate-optimised latents have a step per channel instead; their grid is 0.
    """

    mode: Mode
    grid: int = 0

    @property
    def step(self) -> float:
        """The grid's step."""
        return 2.0**-self.grid

    def to_int(self) -> int:
        """Return the number in the file: 0..7 drawn, 8 rate-optimised, 9..16 rounded."""
        first = {Mode.DRAWN: 0, Mode.RATE_OPTIMISED: _GRIDS, Mode.ROUNDED: _GRIDS + 1}
        return first[self.mode] + self.grid

    @classmethod
    def from_int(cls, number: int) -> Coding:
        """Invert `to_int`."""
        if number < _GRIDS:
            return cls(Mode.DRAWN, number)
        return cls(Mode.ROUNDED, number - _GRIDS - 1) if number > _GRIDS else cls(Mode.RATE_OPTIMISED)


_CODINGS = 2 * _GRIDS + 1


class InsufficientBits(Exception):  # noqa: N818 (not an error: the caller has an alternative)
    """The stack holds too few bits to draw a latent, or a flow maps it beyond the coded range."""


class Latent(NamedTuple):
    """A latent as coded and as the networks see it, both on the CPU.

    Attributes:
        numbers: The integers; for a rate-optimised latent preceded by the channels' steps.
        z: float64 (B, C, h, w).
        coding: How the integers were chosen.
    """

    numbers: npt.NDArray[np.int8] | npt.NDArray[np.int16]
    z: Tensor
    coding: Coding

    @property
    def drawn(self) -> bool:
        """Whether the posterior's bits must be pushed back."""
        return self.coding.mode is Mode.DRAWN


Normal = DiagonalNormal | GaussianMixture | LocalGaussianMixture


class _Normals(NamedTuple):
    """Mixtures of M Gaussians, on the CPU, float64.

    Attributes:
        log_weights: (M,), nats.
        mean: (M, B, C, h, w).
        log2_scale: (M, B, C, h, w).
        whole: Whether a whole latent is from one component; else each position, with all channels, is.
    """

    log_weights: Tensor
    mean: Tensor
    log2_scale: Tensor
    whole: bool = False

    @classmethod
    def of(cls, p: Normal) -> _Normals:
        """Convert a distribution."""
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
        """Return the distribution of (z - shift) / step."""
        octaves = torch.as_tensor(step, dtype=torch.float64).log2()
        return self._replace(mean=(self.mean - shift) / step, log2_scale=self.log2_scale - octaves)

    def component(self, which: Ints) -> _Normals:
        """Return one Gaussian per image, given the components' numbers (B,)."""
        images, at = torch.arange(len(which)), torch.from_numpy(which)
        return _Normals(torch.zeros(1), self.mean[at, images][None], self.log2_scale[at, images][None])

    def nearest(self, numbers: Ints) -> Ints:
        """Return, per image, the component of the highest density at (B, C, h, w): (B,)."""
        v, nats = torch.from_numpy(numbers).double(), []
        for mean, log2_scale in zip(self.mean, self.log2_scale, strict=True):
            square = ((v - mean) / torch.exp2(log2_scale)) ** 2
            nats.append((0.5 * square + log2_scale * math.log(2)).flatten(1).sum(1))
        return torch.stack(nats).argmin(0).numpy()

    def code(
        self,
        num_values: int,
        stack: ANSCoder,
        side: SideInformation,
        known: npt.NDArray[np.integer] | None,
        *,
        drawn: bool = False,
    ) -> Ints:
        """Code integers (B, C, h, w) of -num_values / 2 on.

        Args:
            num_values: Number of integers.
            stack: Where to queue known integers or pop unknown ones.
            side: Records or applies the rounding.
            known: The integers, to be queued; None: pop them.
            drawn: Pop or push a posterior's integers: none in the far tails, where the tables end and the
                distribution would become uniform, and with numbers of their own in the side information.
        """
        given = None if known is None else known.astype(np.int64)
        if self.whole and len(self.mean) > 1:
            # only one component is used: the others add next to nothing to the density of a whole latent
            many = np.full(self.mean.shape[1], len(self.mean))
            which = stack.uniform(many, None if given is None else self.nearest(given))
            return self.component(which).code(num_values, stack, side, known)
        shape, n = self.mean.shape[1:], self.mean[0, :, 0].numel()
        if len(self.mean) == 1:  # all channels at once
            flat = None if given is None else given.reshape(-1) + num_values // 2
            channel = values(
                self.mean.reshape(1, -1).numpy(), self.log2_scale.reshape(1, -1).numpy(), num_values,
                "normal", side, _LATER if drawn else None,
            )  # fmt: skip
            bounds = channel.within(_WIDTH, num_values) if drawn else None
            found, _ = code(stack, np.full_like(channel.mean, 1 << 20), channel, num_values, bounds, flat)
            return found.reshape(shape) - num_values // 2
        w = weights(self.log_weights.numpy()[:, None].repeat(n, 1), side)
        out = np.zeros(shape, np.int64)
        for c in range(shape[1]):
            mean, log2_scale = (x[:, :, c].flatten(1).numpy() for x in (self.mean, self.log2_scale))
            channel = values(mean, log2_scale, num_values, "normal", side)
            flat = None if given is None else given[:, c].reshape(-1) + num_values // 2
            found, w = code(stack, w, channel, num_values, None, flat)
            out[:, c] = found.reshape(out[:, c].shape) - num_values // 2
        return out


class Rounded:
    """Coding of latents with a `UnitUniform` posterior and a `NoisyLogistic` prior."""

    @staticmethod
    def choose(posterior: UnitUniform) -> Latent:
        """Return the integers nearest to the posterior's mean."""
        z = posterior.mode().double().cpu()
        return Latent(z.numpy().astype(np.int8), z, Coding(Mode.ROUNDED))

    @staticmethod
    def code(prior: NoisyLogistic, stack: ANSCoder, side: SideInformation, known: Latent | None) -> Latent:
        """Queue a `known` latent, or pop it."""
        mean, octaves = prior.mean.flatten(), prior.log_scale.flatten() / math.log(2)
        channel = values(
            mean.double().cpu().numpy()[None],
            octaves.double().cpu().numpy()[None],
            _VALUES,
            "logistic",
            side,
        )
        flat = None if known is None else known.numbers.reshape(-1).astype(np.int64) + _VALUES // 2
        found, _ = code(stack, np.full_like(channel.mean, 1 << 20), channel, _VALUES, None, flat)
        numbers = (found - _VALUES // 2).astype(np.int8).reshape(prior.mean.shape)
        return Latent(numbers, torch.from_numpy(numbers).double(), Coding(Mode.ROUNDED))


class _Base(NamedTuple):
    """A space in which a prior is approximately the standard normal.

    Attributes:
        to: Maps a latent there.
        back: Maps it back.
        normals: The prior in that space, for latents like the argument.
    """

    to: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]
    normals: Callable[[Tensor], _Normals]

    @classmethod
    def of(cls, prior: FlowDistribution | Normal) -> _Base:
        """Return the base space of a flow; that of a Gaussian or a mixture is standardised."""
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
    """Return the standard normal for latents of that shape."""
    zeros = torch.zeros(1, *like.shape, dtype=torch.float64)
    return _Normals(torch.zeros(1), zeros, zeros)


class Gaussian:
    """Coding of latents with a Gaussian posterior: drawn, rounded or rate-optimised."""

    @staticmethod
    def draw(
        posterior: DiagonalNormal, stack: ANSCoder, side: SideInformation, fine: float = FINE[0]
    ) -> Latent:
        """Draw a latent by popping from the stack.

        Args:
            posterior: q(z | y).
            stack: Random bits, in effect.
            side: Records the rounding.
            fine: The grid's step in standard deviations of the posterior.

        Raises:
            InsufficientBits: The stack holds too few bits; its content is lost.
        """
        coding = Coding(Mode.DRAWN, _nearest_grid(fine * _deviation(posterior, 0.1)))
        grid = _Normals.of(posterior).scaled(0.0, coding.step)
        numbers = grid.code(_MANY, stack, side, None, drawn=True)
        if stack.left() == 0:
            raise InsufficientBits
        return _on_grid(numbers, coding)

    @staticmethod
    def give_back(posterior: DiagonalNormal, stack: ANSCoder, side: SideInformation, known: Latent) -> None:
        """Push the bits that drawing a latent popped."""
        grid = _Normals.of(posterior).scaled(0.0, known.coding.step)
        grid.code(_MANY, stack, side, known.numbers, drawn=True)
        stack.push()

    @staticmethod
    def choose(prior: FlowDistribution | Normal, posterior: DiagonalNormal, rate_optimised: bool) -> Latent:
        """Choose a latent without popping bits.

        Args:
            prior: p(z | y_up, z_up).
            posterior: q(z | y).
            rate_optimised: Whether it must be rate-optimised; else it is rounded if the prior is a flow,
                which takes bits from the stack when the latent is coded.
        """
        if isinstance(prior, FlowDistribution) and not rate_optimised:
            step = math.sqrt(12) * _deviation(posterior, 0.5)  # bits and errors balance
            coding = Coding(Mode.ROUNDED, _nearest_grid(step))
            numbers = torch.round(posterior.mean / coding.step).clamp(-_MANY // 2, _MANY // 2 - 1)
            return _on_grid(numbers.long().cpu().numpy(), coding)
        base = _Base.of(prior)
        mean, beside = base.to(posterior.mean), base.to(posterior.mean + torch.exp(0.5 * posterior.log_var))
        return _rate_optimised(base, *_cheapest(mean.cpu(), (beside - mean).cpu() ** 2))

    @staticmethod
    def code(
        prior: Callable[[bool], LatentDistribution],
        shape: tuple[int, int, int, int],
        stack: ANSCoder,
        side: SideInformation,
        known: Latent | None,
    ) -> Latent:
        """Queue a `known` latent, or pop it.

        Args:
            prior: Returns p(z | y_up, z_up), given whether z is drawn. A latent that is not drawn was
                chosen before z_up was known; its prior is conditioned on `fixed_noise_sample` of z_up.
            shape: Of z, (B, C, h, w).
            stack: Where to queue the latent or pop it.
            side: Records or applies the rounding.
            known: The latent; None: pop it.

        Raises:
            InsufficientBits: The stack holds too few bits for a flow; its content is lost.
        """
        coding = _pop_coding(stack) if known is None else known.coding
        p = prior(coding.mode is Mode.DRAWN)
        assert isinstance(p, FlowDistribution | Normal)
        if coding.mode is Mode.RATE_OPTIMISED:
            return _code_rate_optimised(p, shape, stack, side, known)
        if isinstance(p, FlowDistribution):
            return _code_by_flow(p, shape, stack, side, known, coding)
        if known is not None:
            _push_coding(stack, known)
        own = None if known is None else known.numbers
        found = _Normals.of(p).scaled(0.0, coding.step).code(_MANY, stack, side, own)
        return _on_grid(found, coding) if known is None else known


def _pop_coding(stack: ANSCoder) -> Coding:
    return Coding.from_int(int(stack.uniform(np.array([_CODINGS]))[0]))


def _push_coding(stack: ANSCoder, known: Latent) -> None:
    stack.uniform(np.array([_CODINGS]), np.array([known.coding.to_int()]))


def _deviation(posterior: DiagonalNormal, share: float) -> float:
    """Return the quantile of the posterior's standard deviations below which `share` of them lie.

    Raises:
        CodecError: The posterior is not finite.
    """
    log_var = posterior.log_var.flatten()
    if not (log_var.isfinite().all() and posterior.mean.isfinite().all()):
        raise CodecError(NOT_FINITE)
    return math.exp(0.5 * log_var.kthvalue(max(1, int(share * log_var.numel()))).values.item())


def _nearest_grid(step: float) -> int:
    """Return the number of the grid with the nearest step."""
    return min(max(round(-math.log2(step)), 0), _GRIDS - 1)


def _on_grid(numbers: Ints, coding: Coding) -> Latent:
    return Latent(numbers.astype(np.int16), coding.step * torch.from_numpy(numbers).double(), coding)


def _code_rate_optimised(
    prior: FlowDistribution | Normal,
    shape: tuple[int, int, int, int],
    stack: ANSCoder,
    side: SideInformation,
    known: Latent | None,
) -> Latent:
    if known is not None:
        _push_coding(stack, known)
    n = shape[0] * shape[1]
    choices = _code_steps(n, stack, None if known is None else known.numbers[:n])
    base, own = _Base.of(prior), None if known is None else known.numbers[n:].reshape(shape)
    step = _steps(choices.reshape(shape[:2]))
    shift = step * _dither(shape)
    step = torch.where(step > 0, step, _NOWHERE)
    grid = base.normals(torch.zeros(shape)).scaled(shift, step)
    found = grid.code(_VALUES, stack, side, own)
    return _rate_optimised(base, choices.reshape(shape[:2]), found) if known is None else known


def _code_steps(n: int, stack: ANSCoder, known: npt.NDArray[np.integer] | None) -> Ints:
    """Code the numbers of the channels' steps; about half of the channels are fixed noise."""
    numbers = None if known is None else known.astype(np.int64)
    noise = stack.bits(np.full(n, 1 << 23), None if numbers is None else numbers == len(_STEPS) - 1)
    choices, others = np.full(n, len(_STEPS) - 1), np.full(n - noise.sum(), len(_STEPS) - 1)
    choices[~noise] = stack.uniform(others, None if numbers is None else numbers[~noise])
    return choices


def _rate_optimised(base: _Base, choices: Ints, found: Ints) -> Latent:
    """Return the latent of the steps' numbers (B, C) and of integers (B, C, h, w)."""
    z = base.back(_dequantize(choices, torch.from_numpy(found))).double().cpu()
    numbers = np.concatenate([choices.reshape(-1), found.reshape(-1)]).astype(np.int8)
    return Latent(numbers, z, Coding(Mode.RATE_OPTIMISED))


def _steps(choices: Ints) -> Tensor:
    """Look up the steps: (B, C) -> (B, C, 1, 1)."""
    return torch.tensor(_STEPS, dtype=torch.float64)[torch.from_numpy(choices).long()][:, :, None, None]


def _code_by_flow(
    prior: FlowDistribution,
    shape: tuple[int, int, int, int],
    stack: ANSCoder,
    side: SideInformation,
    known: Latent | None,
    coding: Coding,
) -> Latent:
    flow = prior.flow
    if not isinstance(flow, RealNVP):  # only couplings are maps of integers
        raise CodecError("the file is damaged: its latent is coded as no model with this prior does")
    # the digits of a coarse grid are filled up to the finest one, since each coupling rounds
    fill = 0 if coding.mode is Mode.DRAWN else _GRIDS - 1 - coding.grid
    couple = _Integers(flow, prior.device, coding.step / 2**fill, math.prod(shape), stack, side)
    low, noise = np.full(math.prod(shape), 1 << fill), None
    if known is not None:
        v = known.numbers.astype(np.int64) << fill
        if fill:
            v += stack.uniform(low).reshape(shape)
        noise = flow.walk(torch.from_numpy(v), couple.there).numpy()
        if np.abs(noise).max() >= _MANY // 2 or stack.left() == 0:
            raise InsufficientBits
        _push_coding(stack, known)
    found = _standard(torch.zeros(shape)).scaled(0.0, couple.grid).code(_MANY, stack, side, noise)
    if known is not None:
        return known
    v = flow.walk_back(torch.from_numpy(found), couple.back).numpy()
    if fill:
        stack.uniform(low, (v & (1 << fill) - 1).reshape(-1))
        stack.push()
    return _on_grid(v >> fill, coding)


def _dither(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return pseudo-random numbers between -1/2 and 1/2, the same for every image and machine."""
    i = torch.arange(1, math.prod(shape[1:]) + 1).view(1, *shape[1:])
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 0x1B56C4E9)):
        i = (i ^ i >> shift) * factor & (1 << 31) - 1
    return (i.double() + 0.5) / (1 << 31) - 0.5


def _noise(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Return a fixed draw of the standard normal, float64."""
    return torch.special.ndtri(_dither(shape) + 0.5)


def fixed_noise_sample(q: DiagonalNormal) -> Tensor:
    """Return a draw of the posterior with fixed noise, so that encoder and decoder obtain the same."""
    return q.mean + torch.exp(0.5 * q.log_var) * _noise(q.mean.shape).to(q.mean.device)


def _dequantize(choices: Ints, numbers: Tensor) -> Tensor:
    """Return the values of integers (B, C, h, w): dithered multiples of the channel's step, or noise."""
    shift = _dither(numbers.shape)
    step = _steps(choices)
    return torch.where(step > 0, step * (numbers + shift), _noise(numbers.shape))


def _cheapest(mean: Tensor, variance: Tensor) -> tuple[Ints, Ints]:
    """Find the cheapest quantization of a latent whose prior is the standard normal.

    The cost is the latent's own bits plus the image's, whose log-likelihood as a function of the latent is
    taken as quadratic: the log-ratio of posterior and prior.

    Args:
        mean: Of the posterior, float64 (B, C, h, w).
        variance: Of the posterior.

    Returns:
        Numbers of the steps, (B, C), and integers, (B, C, h, w).
    """
    precision = (1 / variance - 1).clamp(min=0)  # of the likelihood
    peak = torch.where(precision > 1e-6, mean / variance / precision.clamp(min=1e-6), 0.0)
    shift = _dither(mean.shape)
    choices, numbers = torch.full(mean.shape[:2], len(_STEPS) - 1), torch.zeros_like(mean)
    least = 0.5 * (precision * (_noise(mean.shape) - peak) ** 2).sum((2, 3))
    for number, step in enumerate(_STEPS[:-1]):
        nearest = torch.round(mean / step - shift)
        cost, found = torch.full_like(mean, math.inf), torch.zeros_like(mean)
        for i in (nearest, nearest - nearest.sign()):
            i = i.clamp(-_VALUES // 2 + 1, _VALUES // 2 - 2)
            e = step * (i + shift)
            own = _nats(e, step) + 0.5 * precision * (e - peak) ** 2
            found, cost = torch.where(own < cost, i, found), torch.minimum(own, cost)
        total = cost.sum((2, 3))
        better = total < least
        least, choices = torch.where(better, total, least), torch.where(better, number, choices)
        numbers = torch.where(better[:, :, None, None], found, numbers)
    return choices.numpy(), numbers.numpy().astype(np.int64)


def _nats(e: Tensor, step: float) -> Tensor:
    """Return -ln of the standard normal's mass between e - step / 2 and e + step / 2."""
    near, far = (torch.special.log_ndtr(-(e.abs() + way * step / 2)) for way in (-1, 1))
    return -(near + torch.log1p(-torch.exp(far - near)))


class _Integers:
    """A flow's couplings as one-to-one maps of integers: v -> v * ratio / 2^12 + shift.

    The digits that the multiplication opens are popped from the stack, and the remainder of the division is
    pushed to it: the net number of bits is the log-determinant (iFlow, Zhang et al. 2021).

    Args:
        flow: Its couplings.
        device: Of the flow.
        grid: Step of the latent's grid.
        n: Number of values.
        stack: See above.
        side: Records or applies the rounding.
    """

    def __init__(
        self,
        flow: RealNVP,
        device: torch.device,
        grid: float,
        n: int,
        stack: ANSCoder,
        side: SideInformation,
    ) -> None:
        self.grid = grid
        couplings = [*flow.checker, *flow.channel, *flow.final]
        first = side.reserve(2 * n * len(couplings))  # the decoder quantizes them in reverse
        self.at = {coupling: first + 2 * n * i for i, coupling in enumerate(couplings)}
        self.n, self.device, self.stack, self.side = n, device, stack, side

    def _parameters(self, coupling: Coupling, v: Tensor) -> tuple[Tensor, Ints, Ints]:
        """Return the mask of the values that change, their ratios and their shifts."""
        moved = ~coupling.mask(v).expand(v.shape)
        log_scale, shift = (
            x.cpu()[moved].numpy() for x in coupling.affine(v.double().to(self.device) * self.grid)
        )
        at = self.at[coupling]
        ratio = ratios(log_scale, self.side, at)
        return moved, ratio, self.side.quantize(np.clip(shift / self.grid, -_FAR, _FAR), at + self.n)

    def there(self, coupling: Coupling, v: Tensor) -> Tensor:
        """Apply a coupling towards the base space.

        Raises:
            InsufficientBits: The stack holds too few bits, or a value becomes too large.
        """
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
        """Invert `there`."""
        moved, ratio, shift = self._parameters(coupling, v)
        values = v[moved].numpy() - shift
        for some in reversed(_batches(len(values))):
            rest = self.stack.uniform(np.full_like(ratio[some], 1 << SHARES))
            values[some], filled = np.divmod((values[some] << SHARES) + rest, ratio[some])
            self.stack.uniform(ratio[some], filled)
            self.stack.push()
        return v.masked_scatter(moved, torch.from_numpy(values))


def _batches(n: int) -> list[slice]:
    """Divide 0..n-1 into short slices, so that popped bits are soon pushed again."""
    return [slice(i, i + _AT_ONCE) for i in range(0, n, _AT_ONCE)]
