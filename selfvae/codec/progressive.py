"""Single pictures: the levels of a model without latents, one after the other, into one file and back."""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from selfvae.codec import container
from selfvae.codec.coder import Bits, Decoder, Encoder, code
from selfvae.codec.container import CodecError, Header, Part
from selfvae.codec.lattice import Lattice, Notes
from selfvae.level import Level
from selfvae.model import SelfVAE
from selfvae.tasks import Drawing, complete, infer
from selfvae.tiles import Tile, split, tiled
from selfvae.transforms import check_image

__all__ = ["Codec", "fingerprint"]

# part of the format: the networks see tiles of so many rows and columns of y_up, and a margin around
_TILE, _MARGIN = 192, 16

Square = tuple[Tile, Tile]
Track = Callable[[Sequence[Square], str], Iterable[Square]]


def fingerprint(model: SelfVAE) -> bytes:
    """8 bytes that tell models apart: of the structure and of every weight's value as float64."""
    found = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)} ".encode())
        found.update(value.detach().cpu().double().numpy().astype("<f8").tobytes())
    return found.digest()[:8]


def _as_they_come(tiles: Sequence[Square], name: str) -> Iterable[Square]:
    return tiles


class Written(NamedTuple):
    """What was put on a stack, level by level, y_0 first."""

    notes: list[bytes]
    ends: list[int]  # words below the state after each
    sums: list[int]  # CRC-32 of the pixels


class Codec:
    """Compresses pictures with a model, without loss: `compress` to bytes, `decompress` to the picture.

    The model must have no latents (e.g. a halving chain): its files are as long as its scores say. It is
    copied in float64. A file can be read with the same weights alone.

    Raises ValueError for a model with latents.
    """

    def __init__(self, model: SelfVAE) -> None:
        if model.has_latents:
            raise ValueError(
                "single pictures are compressed by a model without latents, e.g. selfvae-halve; this one "
                "has some"
            )
        self.fingerprint = fingerprint(model)
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self._drawing = tiled(model, _TILE, _MARGIN)  # what is missing in a file may be computed in haste

    @torch.no_grad()
    def compress(self, x: Tensor, *, verify: bool = True, track: Track = _as_they_come) -> bytes:
        """The file of a picture.

        Arguments:
            x: uint8 (1, C, H, W), any size. One channel is taken as three equal ones by a model of three.
            verify: decode the file and compare.
            track: given a part's tiles and its name, hands them on: to show progress.

        Raises ValueError for a picture that does not fit the model; CodecError if the check fails.
        """
        self.check(x)
        encoder = Encoder()
        written = self.push(x, encoder, track)
        stack = encoder.words()
        ends = [*written.ends[:-1], len(stack)]
        words = [stack[a:b][::-1] for a, b in zip([0, *ends], ends, strict=False)]
        parts = [
            Part(len(n), len(w), crc) for n, w, crc in zip(written.notes, words, written.sums, strict=True)
        ]
        levels = self.model.format.levels
        header = Header(self.fingerprint, x.shape[1], levels, x.shape[2], x.shape[3], tuple(parts[::-1]))
        data = container.write(header, written.notes[::-1], words[::-1])
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
        track: Track = _as_they_come,
        **how: Unpack[Drawing],
    ) -> Tensor:
        """The picture in a file, uint8 (1, C, H, W), bit for bit.

        Arguments:
            data: the file.
            upto: "y1", ...: the computed image of that name, exactly, without decoding the rest.
            partial: take a file that was cut short; what is missing is drawn.
            how: how it is drawn, see `tasks.Drawing`; by default the most likely picture.

        Raises CodecError that says what is wrong with the file, or that it is not of this model.
        """
        header, parts = container.read(data, partial)
        self._check_header(header)
        names = [f"y{k}" for k in range(len(header.parts))]
        if upto not in names:
            raise CodecError(f"the file holds {', '.join(names)}; got {upto!r}")
        last = int(upto[1:])
        if not parts:
            raise CodecError("the file is cut short before the end of its coarsest part")
        first = len(header.parts) - len(parts)  # the finest that is there
        size = header.height, header.width
        ys = self._decode(header, parts[: len(header.parts) - last], track)
        if first > last:
            how = {"decode": "mode", **how}
            channels = self.model.format.channels
            shape = (1, *size)
            ys |= complete(self._drawing, {name: y[:, :channels] for name, y in ys.items()}, shape, **how)
        rows, cols = self.model.scale(last)
        out = ys[upto][:, :, : -(-size[0] // rows), : -(-size[1] // cols)].cpu()
        if header.channels < out.shape[1]:
            out = out[:, : header.channels]
        return out

    def _decode(
        self, header: Header, parts: list[tuple[bytes, np.ndarray]], track: Track
    ) -> dict[str, Tensor]:
        """The images of the first parts, by name, padded."""
        words = np.concatenate([words for _, words in parts])[::-1]
        decoder = Decoder(np.ascontiguousarray(words))
        left, ys = len(words), {}
        found = self._levels(1, (header.height, header.width), decoder, [n for n, _ in parts], track)
        for (k, y), part, (_, own) in zip(found, header.parts, parts, strict=False):
            left -= len(own)
            if zlib.crc32(y.numpy().tobytes()) != part.crc or (k and decoder.left() != left):
                raise CodecError(
                    f"y{k} does not come back as it was: the file was written so, or the model computes "
                    "something else here; please report this, with the file"
                )
            ys[f"y{k}"] = y
        return ys

    def push(self, x: Tensor, encoder: Encoder, track: Track = _as_they_come) -> Written:
        """Put pictures x, uint8 (B, C, H, W), on a stack, all levels of all of them."""
        x = x.expand(-1, self.model.format.channels, -1, -1)
        ys = [y.cpu() for _, y in sorted(infer(self.model, x, "y0").items())]
        ys.append(ys[-1][:, :0])
        written = Written([], [], [])
        for k, level in enumerate(self.model.levels):  # a stack: what is decoded last is coded first
            notes = Notes()
            self._code(level, ys[k + 1], encoder, notes, track, f"y{k}", ys[k])
            written.notes.append(notes.tobytes())
            written.ends.append(encoder.push())
            written.sums.append(zlib.crc32(ys[k].numpy().tobytes()))
        return written

    def pop(self, n: int, size: tuple[int, int], decoder: Decoder, notes: list[bytes]) -> Tensor:
        """Take n pictures of a height and width off a stack: uint8 (n, C, H, W); notes of y_K first."""
        *_, (_, x) = self._levels(n, size, decoder, notes, _as_they_come)
        return x[:, :, : size[0], : size[1]]

    def _levels(
        self, n: int, size: tuple[int, int], decoder: Decoder, notes: list[bytes], track: Track
    ) -> Iterator[tuple[int, Tensor]]:
        """k and y_k, padded, the coarsest first, as far as there are notes."""
        rows, cols = self.model.multiples[0]
        y = self.model.blank(n, -(-size[0] // rows) * rows, -(-size[1] // cols) * cols).cpu()
        for k, noted in zip(reversed(range(len(self.model.levels))), notes, strict=False):
            y = self._code(self.model.levels[k], y, decoder, Notes(noted), track, f"y{k}")
            yield k, y

    def _code(
        self,
        level: Level,
        y_up: Tensor,
        coder: Bits,
        notes: Notes,
        track: Track,
        name: str,
        known: Tensor | None = None,
    ) -> Tensor:
        """Code y given y_up, tile by tile; `known` by an encoder. Returns y, uint8."""
        n, _, height, width = y_up.shape
        rows, cols = level.transform.scale
        y = torch.zeros(n, level.format.channels, height * rows, width * cols, dtype=torch.uint8)
        tiles = [(r, c) for r in split(height, _TILE, _MARGIN) for c in split(width, _TILE, _MARGIN)]
        for r, c in track(tiles, name):
            mixture = level.likelihood(
                y_up[..., r.outer, c.outer].to(self.model.device), None, (r.inner, c.inner)
            )
            at = (
                ...,
                slice(r.core.start * rows, r.core.stop * rows),
                slice(c.core.start * cols, c.core.stop * cols),
            )
            y[at] = self._mixture(mixture, coder, notes, None if known is None else known[at])
        return y

    def _mixture(self, mixture: Any, coder: Bits, notes: Notes, known: Tensor | None) -> Tensor:
        """Code the pixels that a mixture describes; returns them, uint8."""
        support = mixture.support
        b, groups, channels, _, h, w = mixture.offsets.shape
        v = torch.zeros(b, groups, channels, h, w, dtype=torch.long, device=self.model.device)
        entries = None if known is None else support.split(known.to(v.device)).long()
        for group in range(groups):
            lattice = Lattice(mixture, group, notes)
            weights = lattice.weights()
            for channel in range(channels):

                def at(entries: Tensor, group: int = group, channel: int = channel) -> np.ndarray:
                    flat: np.ndarray = entries[:, group, channel].reshape(-1).cpu().numpy()
                    return flat

                logistics = lattice.channel(v)
                lo, hi = support.bounds(v) if support.truncates else (None, None)
                found, weights = code(
                    coder, weights, logistics, mixture.format.levels,
                    None if lo is None or hi is None else (at(lo), at(hi)),
                    None if entries is None else at(entries),
                )  # fmt: skip
                v[:, group, channel] = torch.from_numpy(found).view(b, h, w)
        merged: Tensor = support.merge(v)
        return merged.to(torch.uint8).cpu()

    def check(self, x: Tensor) -> None:
        """Raise TypeError or ValueError if a picture does not fit the model."""
        format = self.model.format
        check_image(x, x.shape[1] if x.ndim == 4 else format.channels)
        if x.shape[0] != 1 or 0 in x.shape or x.shape[1] not in {1, format.channels}:
            raise ValueError(
                f"expected one picture uint8 (1, {format.channels}, H, W), or of 1 channel; "
                f"got {tuple(x.shape)}"
            )
        if int(x.max()) > format.top:
            raise ValueError(f"the model has levels 0 to {format.top}; the picture holds {int(x.max())}")

    def _check_header(self, header: Header) -> None:
        if header.fingerprint != self.fingerprint:
            raise CodecError(
                f"the file was written with another model: {header.fingerprint.hex()}; this one is "
                f"{self.fingerprint.hex()}: give the model that wrote it"
            )
        format = self.model.format
        if (
            header.channels not in (1, format.channels)
            or header.levels != format.levels
            or len(header.parts) != len(self.model.levels)
        ):
            raise CodecError("the header does not fit the model that it names: the file is damaged")
