"""Single pictures: the variables of the walk, one after the other, into one file and back."""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from selfvae.codec import container
from selfvae.codec.ans import MOST, ANSCoder, code
from selfvae.codec.container import CHANGED, PADDED, CodecError, Header, Part, check_size
from selfvae.codec.float64 import QuantizedMixture, SideInformation
from selfvae.codec.latents import FINE, Gaussian, InsufficientBits, Latent, Rounded, fixed_noise_sample
from selfvae.hub import fingerprint
from selfvae.level import Level
from selfvae.model import SelfVAE, round_up
from selfvae.operations import SamplingOptions, complete, infer, variables
from selfvae.progress import Track, no_progress
from selfvae.tiling import split, tiled
from selfvae.transforms import check_image

__all__ = ["Codec"]

# part of the format: the networks see tiles of so many rows and columns of y_up, and a margin around
_TILE, _MARGIN = 192, 16

Value = Any  # an image uint8 (B, C, H, W), or a Latent; kept beside them, a posterior


def _sum(value: Value) -> int:
    """The checksum of an image's pixels, or of a latent's whole numbers."""
    whole = value.numbers if isinstance(value, Latent) else value.numpy()
    return zlib.crc32(whole.tobytes())


def _tensor(value: Value) -> Tensor:
    found: Tensor = value.z if isinstance(value, Latent) else value
    return found


def _part(of: slice, length: int, whole: int) -> slice:
    """A slice of something `whole` long, for something as wide and `length` long."""
    return slice(of.start * length // whole, of.stop * length // whole)


def _mask(y: Tensor, inside: tuple[int, int] | None) -> Tensor:
    """Which pixels of y are in its first rows and columns: bool, of y's shape."""
    mask = torch.zeros_like(y, dtype=torch.bool)
    rows, cols = inside or y.shape[2:]
    mask[:, :, :rows, :cols] = True
    return mask


def _trimmed(level: Level, y_up: Tensor, y: Tensor, inside: tuple[int, int]) -> Tensor:
    """y with what is dropped beyond the picture replaced by what the decoder puts there."""
    support: Any = level.transform.support(y_up, level.spec)
    return support.merge(torch.where(support.split(_mask(y, inside)), support.split(y), support.nearest()))


class Written(NamedTuple):
    """A variable on a stack."""

    notes: bytes
    start: int  # words below the state that neither it nor what was pushed later touched
    crc: int


def _draws(names: Sequence[str]) -> dict[str, str]:
    """Before which variables of the walk, coded in reverse, bits-back draws a latent, and which.

    As late as may be, so that few bits need be there at the start: {"y0": "z0", "z0": "z1", "z1": "z2"}.
    """
    out: dict[str, str] = {}
    for name in reversed(names):
        k = int(name[1:])
        latent = f"z{k}" if name[0] == "y" else f"z{k + 1}"
        if latent in names and latent not in out.values():
            out[name] = latent
    return out


class Codec:
    """Compresses pictures with a model, without loss: `compress` to bytes, `decompress` to the picture.

    A model without latents (e.g. a halving chain) codes at its likelihood, one with latents near its bound:
    see `latents` for how. It is copied in float64. A file can be read with the same weights alone. Images
    are computed in tiles, latents and what is drawn from them for the whole picture.
    """

    def __init__(self, model: SelfVAE) -> None:
        if model.config is not None and model.config.components > MOST:
            raise ValueError(f"at most {MOST} components can be coded; got {model.config.components}")
        self.fingerprint = fingerprint(model)
        plain = copy.deepcopy(model).eval().requires_grad_(False)
        self._drawing = tiled(plain, _TILE, _MARGIN)  # what is missing in a file may be computed in haste
        self.model = copy.deepcopy(plain).double()
        self.names = variables(model)
        self.gaussian = model.has_latents and not any(level.rounded for level in model.levels)
        self._draws = _draws(self.names) if self.gaussian else {}

    @torch.no_grad()
    def compress(self, x: Tensor, *, verify: bool = True, track: Track = no_progress) -> bytes:
        """The file of a picture.

        Arguments:
            x: uint8 (1, C, H, W), any size. One channel is taken as three equal ones by a model of three.
            verify: decode the file and compare.
            track: given a part's tiles and its name, hands them on: to show progress.

        Raises ValueError for a picture that does not fit the model; CodecError if the check fails.
        """
        self.check(x)
        stack = ANSCoder()
        written = self.push(x, stack, track)
        whole = stack.words()
        starts = [len(whole), *(written[name].start for name in self.names)]
        words = [whole[b:a][::-1] for a, b in itertools.pairwise(starts)]
        notes = [written[name].notes for name in self.names]
        parts = tuple(
            Part(name, len(noted), len(own), written[name].crc)
            for name, noted, own in zip(self.names, notes, words, strict=True)
        )
        levels = self.model.spec.num_values
        header = Header(self.fingerprint, x.shape[1], levels, x.shape[2], x.shape[3], parts)
        data = container.write(header, notes, words)
        if verify and not torch.equal(self.decompress(data, track=track), x.cpu()):
            raise CodecError("the picture came back changed: please report this, with the picture")
        return data

    @torch.no_grad()
    def decompress(
        self,
        data: bytes,
        upto: str = "y0",
        *,
        partial: bool = False,
        track: Track = no_progress,
        **how: Unpack[SamplingOptions],
    ) -> Tensor:
        """The picture in a file, uint8 (1, C, H, W), bit for bit.

        Arguments:
            data: the file.
            upto: "y1", ...: the computed image of that name, exactly, without decoding the rest.
            partial: take a file that was cut short; what is missing is drawn.
            how: how it is drawn, see `tasks.SamplingOptions`; by default the most likely picture.

        Raises CodecError that says what is wrong with the file, or that it is not of this model.
        """
        header, parts = container.read(data, partial)
        self._check_header(header)
        names = [part.name for part in header.parts]
        if upto not in names or upto[0] != "y":
            held = ", ".join(name for name in names if name[0] == "y")
            raise CodecError(f"the file holds {held}; got {upto!r}")
        if not parts:
            raise CodecError("the file is cut short before the end of its coarsest part")
        size = header.height, header.width
        found = self._decode(header, parts[: names.index(upto) + 1], track)
        if upto not in found:
            how = {"decode": "mode", **how}
            found |= complete(
                self._drawing,
                {n: v.z.float() if isinstance(v, Latent) else v for n, v in found.items()},
                (1, *size),
                **how,
            )
        rows, cols = self.model.scale(int(upto[1:]))
        out = _tensor(found[upto])[:, :, : -(-size[0] // rows), : -(-size[1] // cols)].cpu()
        return out[:, : header.channels] if header.channels < out.shape[1] else out

    def _decode(
        self, header: Header, parts: list[tuple[bytes, np.ndarray]], track: Track
    ) -> dict[str, Value]:
        """The first parts, by name, padded."""
        words = np.concatenate([words for _, words in parts])[::-1]
        stack = ANSCoder(np.ascontiguousarray(words))
        left, values = len(words), {}
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
        """Put pictures x, uint8 (B, C, H, W), on a stack, all levels of all of them.

        Gaussian latents are drawn with what the stack holds, as far as that goes.
        """
        before = stack.copy()
        try:
            return self._push(x, stack, track, draw=True)
        except InsufficientBits:
            stack.become(before)
            return self._push(x, stack, track, draw=False)

    def _push(self, x: Tensor, stack: ANSCoder, track: Track, draw: bool) -> dict[str, Written]:
        x = x.expand(-1, self.model.spec.channels, -1, -1)
        images = [name for name in self.names if name[0] == "y"]
        known: dict[str, Value] = {name: y.cpu() for name, y in infer(self.model, x, images).items()}
        size = x.shape[2], x.shape[3]
        for k in reversed(range(len(images))):
            inside = self._inside(k, size)
            if inside is not None:
                known[f"y{k}"] = _trimmed(self.model.levels[k], known[f"y{k + 1}"], known[f"y{k}"], inside)
        if self.model.has_latents and not self.gaussian:
            for name in self.names:
                if name[0] == "z":
                    known[name] = Rounded.choose(self._posterior(name, known))
        written: dict[str, Written] = {}
        for name in reversed(self.names):  # a stack: what is decoded last is coded first
            stack.low, notes = stack.left(), SideInformation()
            if name in self._draws:
                known[self._draws[name]], notes = self._draw(self._draws[name], known, stack, draw)
            self._code(name, known, size, stack, notes, track, known[name])
            stack.push()
            written[name] = Written(notes.tobytes(), stack.low, _sum(known[name]))
        least = stack.left()
        for name in self.names:
            least = min(least, written[name].start)
            written[name] = written[name]._replace(start=least)
        return written

    def _draw(
        self, name: str, known: dict[str, Value], stack: ANSCoder, draw: bool
    ) -> tuple[Latent, SideInformation]:
        """A Gaussian latent, drawn if that can be; and the notes of this."""
        posterior, before = self._posterior(name, known), stack.copy()
        for fine in FINE if draw else ():
            notes = SideInformation()
            try:
                return Gaussian.draw(posterior, stack, notes, fine), notes
            except InsufficientBits:
                stack.become(before)
        return Gaussian.choose(
            self._prior(name, known, drawn=False), posterior, not draw
        ), SideInformation()

    def pop(
        self, n: int, size: tuple[int, int], stack: ANSCoder, notes: list[bytes], *, padded: bool = False
    ) -> Tensor:
        """Take n pictures of a height and width off a stack: uint8 (n, C, H, W); notes as in the walk.

        padded: what lies beyond the pictures' borders was coded with them.
        """
        *_, (_, x) = self._variables(n, size, stack, notes, no_progress, padded)
        return _tensor(x)[:, :, : size[0], : size[1]]

    def _variables(
        self,
        n: int,
        size: tuple[int, int],
        stack: ANSCoder,
        notes: list[bytes],
        track: Track,
        padded: bool,
    ) -> Iterator[tuple[str, Value]]:
        """Names and values, padded, in the order of the walk, as far as there are notes."""
        known: dict[str, Value] = {
            f"y{len(self.model.levels)}": self.model.blank(n, *self.padded(*size)).cpu()
        }
        coded = self.padded(*size) if padded else size
        for name, noted in zip(self.names, notes, strict=False):
            found = SideInformation(noted)
            known[name] = self._code(name, known, coded, stack, found, track)
            latent = self._draws.get(name)
            if latent and known[latent].drawn:
                Gaussian.give_back(self._posterior(latent, known), stack, found, known[latent])
            found.check_used()
            yield name, known[name]

    def _above(self, name: str, known: dict[str, Value]) -> Tensor:
        """The image above a variable, on the model's device."""
        k = int(name[1:])
        y = known[f"y{k + 1}"] if f"y{k + 1}" in known else _tensor(known[f"y{k}"])[:, :0]
        return _tensor(y).to(self.model.device)

    def _prior(self, name: str, known: dict[str, Value], drawn: bool = True) -> Any:
        """p(z | y_up, z_up); if z was chosen before z_up was drawn, it is told another draw."""
        k = int(name[1:])
        above, z_up = f"z{k + 1}", None
        if above in self.names:
            z_up = _tensor(known[above]) if drawn else fixed_noise_sample(self._posterior(above, known))
            z_up = z_up.to(self.model.device)
        return self.model.levels[k].prior(self._above(name, known), z_up)

    def _posterior(self, name: str, known: dict[str, Value]) -> Any:
        """q(z | y), computed once for a picture."""
        k, key = int(name[1:]), f"q({name})"
        if key not in known:
            known[key] = self.model.levels[k].posterior(_tensor(known[f"y{k}"]).to(self.model.device))
        return known[key]

    def _code(
        self,
        name: str,
        known: dict[str, Value],
        size: tuple[int, int],
        stack: ANSCoder,
        notes: SideInformation,
        track: Track,
        value: Value | None = None,
    ) -> Value:
        """Push the value of a variable, or pop it if that is None, given those before it; returns it."""
        k = int(name[1:])
        level, y_up = self.model.levels[k], self._above(name, known)
        if name[0] == "y":
            z = _tensor(known[f"z{k}"]) if level.has_latent else None
            inside = self._inside(k, size)
            return self._image(level, y_up, z, inside, stack, notes, track, name, value)
        if not self.gaussian:
            return Rounded.code(self._prior(name, known), stack, notes, value)
        rows, cols = level.transform.scale
        shape = y_up.shape[0], *level.latent_shape(y_up.shape[2] * rows, y_up.shape[3] * cols)
        return Gaussian.code(lambda drawn: self._prior(name, known, drawn), shape, stack, notes, value)

    def _image(
        self,
        level: Level,
        y_up: Tensor,
        z: Tensor | None,
        inside: tuple[int, int] | None,
        stack: ANSCoder,
        notes: SideInformation,
        track: Track,
        name: str,
        known: Tensor | None,
    ) -> Tensor:
        """Code y given y_up and z, tile by tile; only the rows and columns `inside` if these are told."""
        n, _, height, width = y_up.shape
        scale = level.transform.scale
        # a tile holds whole blocks, and whole positions of the latent
        least = level.multiple if z is not None else 1
        units = [math.lcm(s, b, least) // s for s, b in zip(scale, level.transform.block, strict=True)]
        margin = round_up((_MARGIN, _MARGIN), (units[0], units[1]))
        y = torch.zeros(n, level.spec.channels, height * scale[0], width * scale[1], dtype=torch.uint8)
        coded = _mask(y, inside)
        tiles = [
            (r, c)
            for r in split(height, _TILE // units[0] * units[0] or units[0], margin[0])
            for c in split(width, _TILE // units[1] * units[1] or units[1], margin[1])
        ]
        for r, c in track(tiles, name):
            part = None
            if z is not None:
                rows, cols = (
                    _part(t.outer, m, size)
                    for t, m, size in zip((r, c), z.shape[2:], (height, width), strict=True)
                )
                part = z[..., rows, cols].to(self.model.device)
            mixture = level.likelihood(
                y_up[..., r.outer, c.outer].to(self.model.device), part, (r.inner, c.inner)
            )
            interior = (..., _part(r.interior, y.shape[2], height), _part(c.interior, y.shape[3], width))
            given = None if known is None else known[interior]
            y[interior] = self._mixture(mixture, stack, notes, coded[interior], given)
        return y

    def _mixture(
        self, mixture: Any, stack: ANSCoder, notes: SideInformation, coded: Tensor, known: Tensor | None
    ) -> Tensor:
        """Code the pixels that a mixture describes, where `coded` says so; returns them, uint8."""
        support = mixture.support
        b, groups, channels, _, h, w = mixture.offsets.shape
        v = torch.zeros(b, groups, channels, h, w, dtype=torch.long, device=self.model.device)
        mask, whole = support.split(coded.to(v.device)), bool(coded.all())
        if not whole:
            v = torch.where(mask, v, support.nearest().long())
        entries = None if known is None else support.split(known.to(v.device)).long()
        for group in range(groups):
            lattice = QuantizedMixture(mixture, group, notes)
            weights = lattice.weights()
            for channel in range(channels):

                def at(entries: Tensor, group: int = group, channel: int = channel) -> np.ndarray:
                    flat: np.ndarray = entries[:, group, channel].reshape(-1).cpu().numpy()
                    return flat

                logistics = lattice.channel(v)
                lo, hi = support.bounds(v) if support.truncates else (None, None)
                here = slice(None) if whole else at(mask)
                found = at(v).copy()
                found[here], weights[:, here] = code(
                    stack, weights[:, here], logistics.part(here), mixture.spec.num_values,
                    None if lo is None or hi is None else (at(lo)[here], at(hi)[here]),
                    None if entries is None else at(entries)[here],
                )  # fmt: skip
                v[:, group, channel] = torch.from_numpy(found).view(b, h, w)
        merged: Tensor = support.merge(v)
        return merged.to(torch.uint8).cpu()

    def _inside(self, k: int, size: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of y[k] that a picture of that height and width has; None if it is coded padded.

        Beyond them a level that fills in dropped pixels need not code: any values would do.
        """
        if not all(level.keeps for level in self.model.levels[: k + 1]):
            return None
        rows, cols = self.model.scale(k)
        return -(-size[0] // rows), -(-size[1] // cols)

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError if a picture does not fit the model."""
        spec = self.model.spec
        check_image(x, x.shape[1] if x.ndim == 4 else spec.channels)
        if x.shape[0] != 1 or 0 in x.shape or x.shape[1] not in {1, spec.channels}:
            raise ValueError(
                f"expected one picture uint8 (1, {spec.channels}, H, W), or of 1 channel; "
                f"got {tuple(x.shape)}"
            )
        check_size(*self.padded(x.shape[2], x.shape[3]))
        if int(x.max()) > spec.max_value:
            raise ValueError(
                f"the model has levels 0 to {spec.max_value}; the picture holds {int(x.max())}"
            )

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size that is computed for a picture: what the model's levels divide, in pixels."""
        return round_up((height, width), self.model.multiples[0])

    def check_model(self, found: bytes) -> None:
        """Raise CodecError if the fingerprint found in a file is not this model's."""
        if found != self.fingerprint:
            raise CodecError(
                f"the file was written with another model: {found.hex()}; this one is "
                f"{self.fingerprint.hex()}: give the model that wrote it"
            )

    def _check_header(self, header: Header) -> None:
        self.check_model(header.fingerprint)
        spec = self.model.spec
        check_size(*self.padded(header.height, header.width))
        if (
            header.channels not in (1, spec.channels)
            or header.num_values != spec.num_values
            or [part.name for part in header.parts] != self.names
        ):
            raise CodecError("the header does not fit the model that it names: the file is damaged")
