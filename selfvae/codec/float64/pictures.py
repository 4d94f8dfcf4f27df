"""Coding of single pictures by networks in float64: all variables into one file and back, one by one.

Each image is coded given the coarser one. What the networks compute is rounded to integers; where machines
might round differently, the file has side information (see `quantization`).
"""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selfvae.codec import container
from selfvae.codec.ans import ANSCoder
from selfvae.codec.container import CHANGED, PADDED, CodecError, Header, Part
from selfvae.codec.float64.decisions import MAX_COMPONENTS, code
from selfvae.codec.float64.latents import (
    FINE,
    Gaussian,
    InsufficientBits,
    Latent,
    Rounded,
    fixed_noise_sample,
)
from selfvae.codec.float64.quantization import QuantizedMixture, SideInformation
from selfvae.codec.tables import Words
from selfvae.distributions.autoregressive import AutoregressiveMixture
from selfvae.distributions.latents import DiagonalNormal, UnitUniform
from selfvae.distributions.pixels import PixelMixture
from selfvae.distributions.priors import AutoregressivePrior
from selfvae.hub import fingerprint
from selfvae.level import Level, Posterior
from selfvae.model import SelfVAE
from selfvae.nn.autoregressive import Wave
from selfvae.operations import SamplingOptions, complete, infer, variables
from selfvae.progress import Track, no_progress
from selfvae.tiling import Tile, split, tiled
from selfvae.transforms.base import round_up, scale_slice

__all__ = ["Float64Codec"]

# rows and columns of y_up in a tile that the networks see at once, and in a margin; part of the format
_TILE, _MARGIN = 192, 16


@dataclass
class _Known:
    """The variables known so far, by level: padded, on the CPU.

    Attributes:
        images: uint8 (B, C, H, W) each.
        latents: Only of levels that have one.
        posteriors: Computed from the images, on the model's device.
    """

    images: dict[int, Tensor]
    latents: dict[int, Latent] = field(default_factory=dict)
    posteriors: dict[int, Posterior] = field(default_factory=dict)

    def value(self, name: str) -> Tensor | Latent:
        """Return the image or latent of that name."""
        return (self.images if name[0] == "y" else self.latents)[level_of(name)]

    def add(self, name: str, value: Tensor | Latent) -> None:
        """Add the image or latent of that name."""
        if isinstance(value, Latent):
            self.latents[level_of(name)] = value
        else:
            self.images[level_of(name)] = value


def level_of(name: str) -> int:
    """Return the level of a variable, e.g. 2 for "y2"."""
    return int(name[1:])


def _sum(value: Tensor | Latent) -> int:
    """Return the checksum of an image's pixels, or of a latent's integers."""
    return zlib.crc32((value.numbers if isinstance(value, Latent) else value.numpy()).tobytes())


def _tensor(value: Tensor | Latent) -> Tensor:
    return value.z if isinstance(value, Latent) else value


def _flat(entries: Tensor) -> npt.NDArray[Any]:
    flat: npt.NDArray[Any] = entries.reshape(-1).cpu().numpy()
    return flat


def _scaled(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """Divide a size, rounding up."""
    rows, cols = round_up(size, scale)
    return rows // scale[0], cols // scale[1]


def _tiles(level: Level, height: int, width: int) -> list[tuple[Tile, Tile]]:
    """Divide an image y_up into tiles of whole blocks, and of whole positions of the latent."""
    units = [
        math.lcm(s, b, level.multiple) // s
        for s, b in zip(level.transform.scale, level.transform.block, strict=True)
    ]
    tile = [max(_TILE // unit * unit, unit) for unit in units]
    margin = round_up((_MARGIN, _MARGIN), (units[0], units[1]))
    return [(r, c) for r in split(height, tile[0], margin[0]) for c in split(width, tile[1], margin[1])]


def _pixels(x: Tensor, rows: slice, cols: slice, height: int, width: int) -> tuple[slice, slice]:
    """Convert slices of an image of that height and width to slices of x, which covers the same area."""
    return scale_slice(rows, x.shape[2], height), scale_slice(cols, x.shape[3], width)


def _cut(x: Tensor, rows: slice, cols: slice, height: int, width: int) -> Tensor:
    return x[(..., *_pixels(x, rows, cols, height, width))]


def _mask(y: Tensor, inside: tuple[int, int] | None) -> Tensor:
    """Return whether each pixel of y is in the first rows and columns, bool of y's shape."""
    mask = torch.zeros_like(y, dtype=torch.bool)
    rows, cols = inside or y.shape[2:]
    mask[:, :, :rows, :cols] = True
    return mask


def _trimmed(level: Level, y_up: Tensor, y: Tensor, inside: tuple[int, int]) -> Tensor:
    """Return y with dropped pixels beyond the picture's borders as the decoder fills them in."""
    support = level.transform.support(y_up, level.spec)
    return support.merge(torch.where(support.split(_mask(y, inside)), support.split(y), support.nearest()))


class Written(NamedTuple):
    """A coded variable.

    Attributes:
        side: Its side information.
        start: Number of words at the bottom of the stack that are not part of it or of later variables.
        crc: Its checksum.
    """

    side: bytes
    start: int
    crc: int


def _draws(names: Sequence[str]) -> dict[str, str]:
    """Return, for variables before whose coding bits-back draws a latent, the name of that latent.

    Variables are coded in reverse, and latents are drawn as late as possible, so that few initial bits are
    needed: {"y0": "z0", "z0": "z1", "z1": "z2"} (Bit-Swap, Kingma et al. 2019).
    """
    out: dict[str, str] = {}
    for name in reversed(names):
        k = level_of(name)
        latent = f"z{k}" if name[0] == "y" else f"z{k + 1}"
        if latent in names and latent not in out.values():
            out[name] = latent
    return out


class Float64Codec:
    """Coding by networks in float64: formats 1 and 2; for the meaning of the arguments, see `Codec`.

    For a model without latents, e.g. a halving chain, the length of a file is the negative log-likelihood;
    for one with latents it is near the ELBO (see `latents`). The model is copied. Images are coded in
    tiles, latents as a whole.

    Args:
        model: Any model that `build` or `load` returns.

    Raises:
        ValueError: The model has too many components, or no config.
    """

    def __init__(self, model: SelfVAE) -> None:
        if model.config is not None and model.config.components > MAX_COMPONENTS:
            raise ValueError(
                f"at most {MAX_COMPONENTS} components can be coded; got {model.config.components}"
            )
        self.fingerprint = fingerprint(model)
        plain = copy.deepcopy(model).eval().requires_grad_(False)
        self._drawing = tiled(plain, _TILE, _MARGIN)  # the missing parts of a file need no float64
        self.model = copy.deepcopy(plain).double()
        self.names = variables(model)
        self.gaussian = model.has_latents and not any(level.rounded for level in model.levels)
        self._draws = _draws(self.names) if self.gaussian else {}

    @torch.no_grad()
    def compress(self, x: Tensor, track: Track = no_progress) -> bytes:
        """Compress a picture that fits the model: uint8 (1, C, H, W)."""
        stack = ANSCoder()
        written = self.push(x, stack, track)
        whole = stack.words()
        starts = [len(whole), *(written[name].start for name in self.names)]
        words = [whole[b:a][::-1] for a, b in itertools.pairwise(starts)]
        side = [written[name].side for name in self.names]
        parts = tuple(
            Part(name, len(recorded), len(own), written[name].crc)
            for name, recorded, own in zip(self.names, side, words, strict=True)
        )
        num_values = self.model.spec.num_values
        header = Header(self.fingerprint, x.shape[1], num_values, x.shape[2], x.shape[3], parts)
        return container.write(header, side, words)

    @torch.no_grad()
    def decompress(
        self,
        data: bytes,
        upto: str,
        partial: bool = False,
        track: Track = no_progress,
        **how: Unpack[SamplingOptions],
    ) -> Tensor:
        """Decompress a file whose header fits the model, up to an image that it holds.

        Raises:
            CodecError: The file is damaged or truncated.
        """
        header, parts = container.read(data, partial)
        if not parts:
            raise CodecError("the file is cut short before the end of its coarsest part")
        names = [part.name for part in header.parts]
        size = header.height, header.width
        found = self._decode(header, parts[: names.index(upto) + 1], track)
        if upto not in found:
            how = {"decode": "mean", **how}
            found |= complete(
                self._drawing,
                {n: v.z.float() if isinstance(v, Latent) else v for n, v in found.items()},
                (1, *size),
                **how,
            )
        rows, cols = _scaled(size, self.model.scale(level_of(upto)))
        out = _tensor(found[upto])[:, :, :rows, :cols].cpu()
        return out[:, : header.channels] if header.channels < out.shape[1] else out

    def _decode(
        self, header: Header, parts: list[tuple[bytes, Words]], track: Track
    ) -> dict[str, Tensor | Latent]:
        """Decode the first parts: values by name, padded."""
        words = np.concatenate([words for _, words in parts])[::-1]
        stack = ANSCoder(np.ascontiguousarray(words))
        left, values = len(words), dict[str, Tensor | Latent]()
        size, padded = (header.height, header.width), header.version <= PADDED
        found = self._variables(1, size, stack, [n for n, _ in parts], track, padded)
        for (name, value), part, (_, own) in zip(found, header.parts, parts, strict=False):
            left -= len(own)
            whole = self.gaussian or name == "y0" or stack.left() == left
            if _sum(value) != part.crc or not whole:
                raise CodecError(f"{name} {CHANGED}")
            values[name] = value
        return values

    def push(self, x: Tensor, stack: ANSCoder, track: Track = no_progress) -> dict[str, Written]:
        """Push pictures of one size to a stack.

        Gaussian latents are drawn with bits that the stack holds, if these suffice.

        Args:
            x: uint8 (B, C, H, W).
            stack: May hold other pictures.
            track: As for `compress`.

        Returns:
            The coded variables by name.
        """
        before = stack.copy()
        try:
            return self._push(x, stack, track, draw=True)
        except InsufficientBits:
            stack.become(before)
            return self._push(x, stack, track, draw=False)

    def _push(self, x: Tensor, stack: ANSCoder, track: Track, draw: bool) -> dict[str, Written]:
        size = x.shape[2], x.shape[3]
        known = self._infer(x.expand(-1, self.model.spec.channels, -1, -1), size)
        written: dict[str, Written] = {}
        for name in reversed(self.names):  # a stack: the last one decoded is the first one coded
            stack.low, side = stack.left(), SideInformation()
            if name in self._draws:
                k = level_of(self._draws[name])
                known.latents[k], side = self._draw(k, known, stack, draw)
            value = known.value(name)
            self._code(name, known, size, stack, side, track, value)
            stack.push()
            written[name] = Written(side.tobytes(), stack.low, _sum(value))
        least = stack.left()
        for name in self.names:
            least = min(least, written[name].start)
            written[name] = written[name]._replace(start=least)
        return written

    def _infer(self, x: Tensor, size: tuple[int, int]) -> _Known:
        """Compute the images that are coded, and latents that need no bits from the stack."""
        levels = self.model.levels
        values = infer(self.model, x, [f"y{k}" for k in range(len(levels))])
        known = _Known({k: values[f"y{k}"].cpu() for k in range(len(levels))})
        for k in reversed(range(len(levels))):
            inside = self._inside(k, size)
            if inside is not None:
                known.images[k] = _trimmed(levels[k], known.images[k + 1], known.images[k], inside)
        for k, level in enumerate(levels):
            if level.rounded and level.has_latent:
                posterior = self._posterior(k, known)
                assert isinstance(posterior, UnitUniform)
                known.latents[k] = Rounded.choose(posterior)
        return known

    def _draw(self, k: int, known: _Known, stack: ANSCoder, draw: bool) -> tuple[Latent, SideInformation]:
        """Choose a Gaussian latent: draw it if the stack holds enough bits.

        Returns:
            The latent, and the side information of the draw.
        """
        posterior, before = self._gaussian_posterior(k, known), stack.copy()
        draw = draw and not isinstance(self.model.levels[k].prior_net, AutoregressivePrior)  # no integers
        for fine in FINE if draw else ():
            side = SideInformation()
            try:
                return Gaussian.draw(posterior, stack, side, fine), side
            except InsufficientBits:
                stack.become(before)
        prior = self._prior(k, known, drawn=False)
        return Gaussian.choose(prior, posterior, rate_optimised=not draw), SideInformation()

    def pop(
        self, n: int, size: tuple[int, int], stack: ANSCoder, side: list[bytes], *, padded: bool = False
    ) -> Tensor:
        """Pop pictures of one size from a stack.

        Args:
            n: Number of pictures.
            size: Their height and width, in pixels.
            stack: As `push` left it.
            side: Side information of each variable, in coding order.
            padded: Whether the padding beyond the pictures' borders was coded as well (format 1).

        Returns:
            uint8 (n, C, H, W).
        """
        *_, (_, x) = self._variables(n, size, stack, side, no_progress, padded)
        return _tensor(x)[:, :, : size[0], : size[1]]

    def _variables(
        self,
        n: int,
        size: tuple[int, int],
        stack: ANSCoder,
        side: list[bytes],
        track: Track,
        padded: bool,
    ) -> Iterator[tuple[str, Tensor | Latent]]:
        """Decode variables in coding order, as many as there are entries of side information.

        Yields:
            The name and the value, padded.
        """
        whole = round_up(size, self.model.multiples[0])
        known = _Known({len(self.model.levels): self.model.blank(n, *whole).cpu()})
        coded = whole if padded else size
        for name, data in zip(self.names, side, strict=False):
            found = SideInformation(data)
            value = self._code(name, known, coded, stack, found, track)
            known.add(name, value)
            if name in self._draws:
                k = level_of(self._draws[name])
                if known.latents[k].drawn:
                    Gaussian.give_back(self._gaussian_posterior(k, known), stack, found, known.latents[k])
            found.check_used()
            yield name, value

    def _above(self, k: int, known: _Known) -> Tensor:
        """Return the image above a level, on the model's device."""
        y = known.images[k + 1] if k + 1 in known.images else known.images[k][:, :0]
        return y.to(self.model.device)

    def _prior(self, k: int, known: _Known, drawn: bool = True) -> Any:
        """Return p(z[k] | y[k+1], z[k+1]).

        A latent that is not drawn was chosen before z[k+1] was known: a draw with fixed noise takes the
        place of z[k+1].
        """
        z_up = None
        if f"z{k + 1}" in self.names:
            if drawn:
                z_up = known.latents[k + 1].z
            else:
                z_up = fixed_noise_sample(self._gaussian_posterior(k + 1, known))
            z_up = z_up.to(self.model.device)
        return self.model.levels[k].prior(self._above(k, known), z_up)

    def _posterior(self, k: int, known: _Known) -> Posterior:
        """Return q(z[k] | y[k]), which is computed only once."""
        if k not in known.posteriors:
            known.posteriors[k] = self.model.levels[k].posterior(known.images[k].to(self.model.device))
        return known.posteriors[k]

    def _gaussian_posterior(self, k: int, known: _Known) -> DiagonalNormal:
        posterior = self._posterior(k, known)
        assert isinstance(posterior, DiagonalNormal)
        return posterior

    def _code(
        self,
        name: str,
        known: _Known,
        size: tuple[int, int],
        stack: ANSCoder,
        side: SideInformation,
        track: Track,
        value: Tensor | Latent | None = None,
    ) -> Tensor | Latent:
        """Queue a variable's value, or pop it if that is None, given the variables before it."""
        k = level_of(name)
        level, y_up = self.model.levels[k], self._above(k, known)
        if name[0] == "y":
            assert not isinstance(value, Latent)
            z = known.latents[k].z if level.has_latent else None
            return self._image(level, y_up, z, self._inside(k, size), stack, side, track, name, value)
        assert not isinstance(value, Tensor)
        if not self.gaussian:
            return Rounded.code(self._prior(k, known), stack, side, value)
        rows, cols = level.transform.scale
        shape = y_up.shape[0], *level.latent_shape(y_up.shape[2] * rows, y_up.shape[3] * cols)
        return Gaussian.code(lambda drawn: self._prior(k, known, drawn), shape, stack, side, value)

    def _image(
        self,
        level: Level,
        y_up: Tensor,
        z: Tensor | None,
        inside: tuple[int, int] | None,
        stack: ANSCoder,
        side: SideInformation,
        track: Track,
        name: str,
        known: Tensor | None,
    ) -> Tensor:
        """Code y given y_up and z, tile by tile; of y only the rows and columns `inside`, if given."""
        n, _, height, width = y_up.shape
        scale, device = level.transform.scale, self.model.device
        y = torch.zeros(n, level.spec.channels, height * scale[0], width * scale[1], dtype=torch.uint8)
        coded = _mask(y, inside)
        for r, c in track(_tiles(level, height, width), name):
            part = None if z is None else _cut(z, r.outer, c.outer, height, width).to(device)
            context = y_up[..., r.outer, c.outer].to(device)
            mixture = level.likelihood(context, part, (r.inner, c.inner))
            interior = (slice(None), slice(None), *_pixels(y, r.interior, c.interior, height, width))
            given = None if known is None else known[interior]
            y[interior] = self._mixture(mixture, stack, side, coded[interior], given)
        return y

    def _mixture(
        self,
        mixture: PixelMixture | AutoregressiveMixture,
        stack: ANSCoder,
        side: SideInformation,
        coded: Tensor,
        known: Tensor | None,
    ) -> Tensor:
        """Code the pixels of a mixture where `coded` is true; return all of them, uint8."""
        support, device = mixture.support, self.model.device
        mask = support.split(coded.to(device))
        v = torch.zeros(mask.shape, dtype=torch.long, device=device)
        if not mask.all():
            v = torch.where(mask, v, support.nearest().long())
        entries = None if known is None else support.split(known.to(device)).long()
        if isinstance(mixture, PixelMixture):
            self._entries(mixture, stack, side, mask, v, entries)
        else:

            def code_wave(part: PixelMixture, group: int, wave: Wave) -> Tensor:
                def at(x: Tensor) -> Tensor:
                    return x[:, group][(..., *wave)][:, None, :, None]

                own = at(v)
                self._entries(part, stack, side, at(mask), own, None if entries is None else at(entries))
                return own[:, 0]

            mixture.fill(v, code_wave)
        return support.merge(v).to(torch.uint8).cpu()

    def _entries(
        self,
        mixture: PixelMixture,
        stack: ANSCoder,
        side: SideInformation,
        mask: Tensor,
        v: Tensor,
        entries: Tensor | None,
    ) -> None:
        """Code the entries of a mixture where the mask is true, into v: (B, G, C, h, w), all three."""
        support, whole = mixture.support, bool(mask.all())
        for group in range(v.shape[1]):
            quantized = QuantizedMixture(mixture, group, side)
            weights = quantized.weights()
            for channel in range(v.shape[2]):
                logistics = quantized.channel(v)
                bounds = support.step_bounds(v, group, channel) if support.truncates else None
                here = slice(None) if whole else _flat(mask[:, group, channel])
                found = _flat(v[:, group, channel]).copy()
                found[here], weights[:, here] = code(
                    stack, weights[:, here], logistics.part(here), mixture.spec.num_values,
                    None if bounds is None else (_flat(bounds[0])[here], _flat(bounds[1])[here]),
                    None if entries is None else _flat(entries[:, group, channel])[here],
                )  # fmt: skip
                own = v[:, group, channel]
                own.copy_(torch.from_numpy(found).view(own.shape))

    def _inside(self, k: int, size: tuple[int, int]) -> tuple[int, int] | None:
        """Return the rows and columns of y[k] within a picture of that size; None if all of y[k] is coded.

        Beyond the picture's borders, a level that models dropped pixels codes nothing: any values would do.
        """
        if not all(level.keeps for level in self.model.levels[: k + 1]):
            return None
        return _scaled(size, self.model.scale(k))
