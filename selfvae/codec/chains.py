"""Coding with integer networks: the levels of a chain as independent streams, on several processor cores.

A level's pixels are coded in bands of rows, each in a stream of its own, given the image above. The network
sees the whole image, in strips that overlap: where a strip ends changes no result. The coarsest levels have
few pixels; they share one stream.

The encoder knows all images, and codes all bands of all levels side by side. The decoder goes from level to
level and decodes the bands of each side by side.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfvae.codec.adaptation import Adaptation, Collector, Neighbours
from selfvae.codec.container import CodecError, Reader, varint
from selfvae.codec.exact import ExactNetwork, Steps
from selfvae.codec.symbols import Ints, Mixture, Params, SlotDecoder, SlotEncoder, Tables, tables
from selfvae.distributions.pixels import param_count
from selfvae.hub import known_answer
from selfvae.level import Level
from selfvae.model import SelfVAE
from selfvae.nn.integer import check_exact
from selfvae.operations import infer
from selfvae.progress import Track, no_progress
from selfvae.transforms import Support
from selfvae.transforms.base import round_up

__all__ = ["ChainCodec", "Fit", "side_by_side"]

_BAND = 1 << 14  # positions in a band; part of the format
_JOINED = 1 << 12  # positions in the coarsest levels that share a stream; part of the format
_STRIP = 1 << 16  # positions that a network sees at once
_FITTED = 8  # bands of a level, at most, to which corrections are fitted and whose outputs are then kept
_WORTH = 8  # bytes that corrections must save beyond their own
_BEYOND = 2  # rows of blocks beyond a strip that a transform's estimate depends on

_NONE: Mapping[int, Adaptation] = MappingProxyType({})
_CHECKED: set[tuple[bytes, str, str]] = set()  # models, answers and devices that were right

Coder = SlotEncoder | SlotDecoder | Collector
Size = tuple[int, int]
T = TypeVar("T")


class Fit(NamedTuple):
    """Corrections that fit a picture, and what was computed on the way.

    Attributes:
        data: The corrections, for `ChainCodec.decode`; empty if none are worth their bytes.
        adaptations: The same by level.
        images: All y[k], padded.
        outputs: Of networks, by level and first row of blocks of a strip.
    """

    data: bytes
    adaptations: dict[int, Adaptation]
    images: list[Tensor]
    outputs: dict[tuple[int, int], _Outputs]


class _Grid(NamedTuple):
    """The blocks of a level's image: how many rows and columns of blocks, and their size in pixels."""

    rows: int
    cols: int
    block: Size
    above: Size  # pixels of the image above in a block

    def bands(self) -> list[slice]:
        """Divide the rows of blocks into bands of about equal height."""
        n = max(1, min(self.rows, -(-self.rows * self.cols // _BAND)))
        return [slice(i * self.rows // n, (i + 1) * self.rows // n) for i in range(n)]

    def strips(self, threads: int) -> list[list[slice]]:
        """Collect neighbouring bands to strips, as many for each thread if there are enough bands."""
        bands = self.bands()
        n = min(len(bands), threads * -(-self.rows * self.cols // (_STRIP * threads)))
        return [bands[i * len(bands) // n : (i + 1) * len(bands) // n] for i in range(n)]


def _rows(x: Tensor, rows: slice, height: int) -> Tensor:
    """Return the pixels of some rows of blocks; a block has that height."""
    return x[:, :, rows.start * height : rows.stop * height]


def _checksum(*images: Tensor) -> int:
    """Return a checksum of 31 bits."""
    crc = 0
    for image in images:
        crc = zlib.crc32(image.contiguous().numpy().data, crc)
    return crc & 0x7FFFFFFF


class _Outputs(NamedTuple):
    """What a network and a transform say of some rows of blocks.

    Attributes:
        rows: The rows of blocks.
        steps: The network's outputs, int16 (P, B, h, w).
        guess: The transform's estimate, float32 (B, C, H, W); None for a level without one.
        above: The image above, uint8.
    """

    rows: slice
    steps: Steps
    guess: Tensor | None
    above: Tensor

    def part(self, rows: slice, grid: _Grid) -> _Outputs:
        """Return the outputs of some of the rows."""
        here = slice(rows.start - self.rows.start, rows.stop - self.rows.start)
        n = self.steps.shape[2] // (self.rows.stop - self.rows.start)
        guess = None if self.guess is None else _rows(self.guess, here, grid.block[0])
        steps = self.steps[:, :, here.start * n : here.stop * n]
        return _Outputs(rows, steps, guess, _rows(self.above, here, grid.above[0]))


class _LevelCoder:
    """Codes the images of one level.

    Args:
        level: Of an integer model, frozen.
    """

    def __init__(self, level: Level) -> None:
        self.level, self.network = level, ExactNetwork(level.decoder)
        spec, params = level.spec, self.network.params
        self.weights = level.keeps.weights(spec) if level.keeps and level.residual_mean else 0
        groups = math.prod(level.transform.block) - len(level.keeps.kept) if level.keeps else 1
        self.own = (params - self.weights) // groups  # outputs per group
        self.tables = tables(
            spec.num_values, spec.channels, self.own // param_count(spec.channels, 1), level.residual_mean,
            level.coefficients == "residual",
        )  # fmt: skip

    def grid(self, above: Size) -> _Grid:
        """Return the grid of blocks, given the size of the image above."""
        t = self.level.transform
        up = t.block[0] // t.scale[0], t.block[1] // t.scale[1]
        return _Grid(above[0] // up[0], above[1] // up[1], t.block, up)

    def outputs(self, above: Tensor, rows: slice, grid: _Grid) -> _Outputs:
        """Evaluate the network for some rows of blocks.

        Args:
            above: The whole image above, uint8 (B, c, h, w).
            rows: The rows.
            grid: Of the level's image.
        """
        level, each = self.level, 1 if self.level.keeps else grid.block[0]
        margin = -(-self.network.reach // each) + _BEYOND
        wide = slice(max(0, rows.start - margin), min(grid.rows, rows.stop + margin))
        y = _rows(above, wide, grid.above[0])
        steps = self.network(level.context(y.to(self.network.device)))
        guess = level.transform.estimate(y.float(), level.spec) if level.residual_mean else None
        return _Outputs(wide, steps, guess, y).part(rows, grid)

    @property
    def adapts(self) -> bool:
        """Whether corrections can be fitted: the level keeps pixels and has estimates of the others."""
        return self.level.keeps is not None and self.level.residual_mean

    def counts(self) -> list[int]:
        """Return the number of weights of each step, see `adaptation`."""
        assert self.level.keeps is not None
        kept = len(self.level.keeps.kept)
        groups = math.prod(self.level.keeps.block) - kept
        return Neighbours.counts(kept, groups, self.level.spec.channels)

    def code(
        self,
        outputs: _Outputs,
        coder: Coder,
        y: Tensor | None,
        coded: Tensor | None,
        adaptation: Adaptation | None = None,
    ) -> Tensor:
        """Code the pixels of some rows of blocks.

        Args:
            outputs: For these rows.
            coder: Encodes, decodes, or collects what corrections are fitted by.
            y: The pixels, uint8 (B, C, H, W); None: decode them.
            coded: Whether each pixel is coded, bool of y's shape; None: all are.
            adaptation: Corrections.

        Returns:
            The pixels, uint8 (B, C, H, W).
        """
        level, spec, steps = self.level, self.level.spec, outputs.steps
        _, b, h, w = steps.shape
        if level.keeps:
            support = level.keeps.support(outputs.above, spec)
            every = steps.reshape(len(steps), -1)
            groups = [(every, g * self.own) for g in range(support.groups)]
        else:
            support = (level.transform.support if level.consistent else Support)(outputs.above, spec)
            by_group = support.space_to_depth(torch.from_numpy(steps).transpose(0, 1))
            h, w = by_group.shape[3:]
            by_group = by_group.permute(1, 2, 0, 3, 4).reshape(support.groups, self.own, -1)
            groups = [(own, 0) for own in by_group.contiguous().numpy()]
        t = self.tables
        guess = None
        if outputs.guess is not None:
            guess = torch.round(support.split(outputs.guess) * (1 << t.bits)).long()
        mask = None if coded is None else support.split(coded)
        v = self._begin(support, (b, len(groups), spec.channels, h, w), y, mask)
        n, everything = b * h * w, np.ones(b * h * w, np.bool_)
        bounds = np.zeros(n, np.int64), np.full(n, spec.max_value)
        near = None
        if level.keeps and (adaptation or isinstance(coder, Collector)):
            kept = level.keeps.stack_kept(outputs.above).unflatten(1, (-1, spec.channels))
            tall = kept.permute(1, 2, 0, 3, 4).flatten(2, 3)  # pictures one above the other
            near = Neighbours(tall.numpy(), len(groups), t.bits)
        for g, (own, at) in enumerate(groups):
            prediction = self._prediction(support, g, guess, v, own, t)
            values = v[:, g].transpose(0, 1).reshape(spec.channels, n).numpy()
            mixture = Mixture(own, at, prediction, values, t)
            for c in range(spec.channels):
                here = everything if mask is None else mask[:, g, c].reshape(-1).numpy()
                if support.truncates:
                    lo, hi = support.step_bounds(v, g, c)
                    bounds = lo.reshape(-1).numpy(), hi.reshape(-1).numpy()
                mixture.begin(c)
                step, by = g * spec.channels + c, None
                if isinstance(coder, Collector):
                    assert near is not None
                    coder.add(near, step, mixture)
                    mixture.learn(here)
                    continue
                if adaptation and near is not None:
                    moments = mixture.moments()
                    by = near.correct(moments, adaptation.weights[step], adaptation.factors[step])
                coder.code(mixture, *bounds, here, by)
                if by is not None and near is not None:
                    near.add(values[c], moments)
                if y is None and support.truncates:
                    v[:, g, c] = torch.from_numpy(values[c]).view(b, h, w)
            if y is None:
                v[:, g] = torch.from_numpy(values).view(-1, b, h, w).transpose(0, 1)
        return support.merge(v.to(torch.uint8)) if y is None else y

    def _begin(
        self, support: Support, shape: tuple[int, ...], y: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return the entries, int64: known, or where they are not coded near pixels, or 0."""
        if y is not None:
            return support.split(y).long()
        if mask is None:
            return torch.zeros(shape, dtype=torch.long)
        return torch.where(mask, 0, support.nearest().long())

    def _prediction(
        self, support: Support, g: int, guess: Tensor | None, v: Tensor, outputs: Params, t: Tables
    ) -> Ints:
        """Return estimates of a group's entries, in steps of the means: (C, n); see `Support.refine`."""
        b, _, channels, h, w = v.shape
        if guess is None:
            return np.full((channels, b * h * w), t.top << (t.bits - 1), np.int64)
        if support.truncates:  # exact but for one division, which IEEE 754 defines
            unit = 1 << t.bits
            refined = support.refine_group(guess.double() / unit, v, g)
            rounded = torch.round(refined * unit).long()
        else:
            rounded = guess[:, g]
        found = rounded.transpose(0, 1).contiguous().numpy()
        if g and self.weights:
            misses = F.pad((v[:, 0] << t.bits) - guess[:, 0], (1, 0, 0, 1)).transpose(0, 1)
            weights = outputs[len(outputs) - self.weights :].reshape(-1, b, h, w)
            found = t.add_weighted(found, weights, misses.contiguous().numpy())
        return found.reshape(channels, -1)


class ChainCodec:
    """Lossless compression of pictures with an integer model.

    Args:
        model: An integer model, frozen, in float32.
        mark: Its fingerprint.

    Raises:
        ValueError: A network may exceed what float32 computes exactly, or a transform's estimate depends on
            the machine.
        CodecError: This machine computes another answer than the model's `answer`.
    """

    def __init__(self, model: SelfVAE, mark: bytes) -> None:
        self.model = model
        for k, level in enumerate(model.levels):
            if not level.transform.exact_estimate:
                raise ValueError(
                    f"the estimate of y{k} by {level.transform} differs between machines, so that files "
                    "cannot be exchanged: choose means of blocks of 2, 4, 8 or 16, or kept pixels"
                )
            try:
                check_exact(level.decoder)
            except ValueError as error:
                raise ValueError(f"the network of y{k} cannot be used for files: {error}") from None
        self._levels = [_LevelCoder(level) for level in model.levels]
        self._multiple = model.multiples[0]
        self._check_answer(mark)

    def _check_answer(self, mark: bytes) -> None:
        """Check once in a process that this machine computes the networks exactly."""
        model, where = self.model, (mark, str(self.model.answer), str(self.model.device))
        if model.answer is None or where in _CHECKED:
            return
        networks = {coder.level: coder.network for coder in self._levels}

        def evaluate(level: Level, context: Tensor) -> Tensor:
            return torch.from_numpy(networks[level](context)).transpose(0, 1)

        found = known_answer(model, evaluate)
        if found != model.answer:
            raise CodecError(
                f"this machine does not compute the networks exactly: {found} instead of {model.answer}. "
                "Switch off what makes float32 convolutions inexact (TF32, bfloat16 or Winograd: unset "
                "ONEDNN_DEFAULT_FPMATH_MODE and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE), or use another device"
            )
        _CHECKED.add(where)

    def size(self, k: int, size: Size) -> Size:
        """Return the padded height and width of y[k], in pixels, for a picture of a size."""
        padded, scale = round_up(size, self._multiple), self.model.scale(k)
        return padded[0] // scale[0], padded[1] // scale[1]

    def _grid(self, k: int, size: Size) -> _Grid:
        last = len(self._levels) - 1
        return self._levels[k].grid(self.size(min(k + 1, last), size))

    def joined(self, size: Size) -> int:
        """Return the finest of the coarsest levels, which share a stream."""
        k = last = len(self._levels) - 1
        total = math.prod(self._grid(last, size)[:2])
        while k and (total := total + math.prod(self._grid(k - 1, size)[:2])) <= _JOINED:
            k -= 1
        return k

    @torch.no_grad()
    def fit(self, x: Tensor, track: Track = no_progress) -> Fit:
        """Fit corrections to a picture.

        Args:
            x: uint8 (1, C, H, W), of any size and of the model's channels.
            track: Receives the parts of the work and its name, and yields them, to show progress.
        """
        size, threads = (x.shape[2], x.shape[3]), torch.get_num_threads()
        images, joined = self._images(x, size), self.joined(size)
        levels = [k for k in range(joined) if self._levels[k].adapts]
        fitted = {k: self._fitted(k, size) for k in levels}
        strips = {k: self._strips(k, size, threads) for k in levels}
        jobs = [(k, strip) for k in levels for strip in strips[k]]
        outputs, solved = {}, {}
        with side_by_side(threads) as run:
            parts = [partial(self._collect, k, strip, fitted[k], images, size) for k, strip in jobs]
            for (k, strip), (found, collected) in zip(jobs, run(parts, track, "fit"), strict=True):
                if found is not None:
                    outputs[k, strip[0].start] = found
                if strip is strips[k][0]:
                    collector = collected
                else:
                    collector.join(collected)
                if strip is strips[k][-1]:  # while other threads go on with the next level
                    adaptation, saved = collector.solve()
                    solved[k] = adaptation, saved * len(self._grid(k, size).bands()) / len(fitted[k])
        return Fit(*_worthwhile(solved, joined), images, outputs)

    @torch.no_grad()
    def fit_together(self, batches: Iterable[Tensor]) -> bytes:
        """Fit corrections that many small pictures share.

        Args:
            batches: Some of the pictures, uint8 (B, C, H, W); all of a batch have one size.

        Returns:
            The corrections, for `adaptations`; empty if none are worth their bytes.
        """
        collectors = {k: Collector(coder.counts()) for k, coder in enumerate(self._levels) if coder.adapts}
        for x in batches:
            size = x.shape[2], x.shape[3]
            images = self._images(self._wide(x), size)
            for k, collector in collectors.items():
                self._together(k, images, size, collector, images[k])
        return _worthwhile({k: c.solve() for k, c in collectors.items()}, len(self._levels))[0]

    def _fitted(self, k: int, size: Size) -> list[slice]:
        """Return the bands of y[k] to which corrections are fitted."""
        bands = self._grid(k, size).bands()
        return bands[:: max(-(-len(bands) // _FITTED), 2 if len(bands) > 3 else 1)]

    def _strips(self, k: int, size: Size, threads: int) -> list[list[slice]]:
        """Return the strips of y[k] that fitting evaluates; all if their outputs are kept."""
        grid = self._grid(k, size)
        keeps = len(grid.bands()) <= _FITTED
        return grid.strips(threads) if keeps else [[band] for band in self._fitted(k, size)]

    def _collect(
        self, k: int, strip: list[slice], fitted: list[slice], images: list[Tensor], size: Size
    ) -> tuple[_Outputs | None, Collector]:
        """Evaluate the network for some neighbouring bands of y[k]; collect from those that are fitted.

        The outputs are returned unless the strip is one of many.
        """
        coder, grid = self._levels[k], self._grid(k, size)
        outputs = coder.outputs(self._above(k, images), slice(strip[0].start, strip[-1].stop), grid)
        collector = Collector(coder.counts())
        for rows in strip:
            if rows in fitted:
                mask = self._inside(k, size, slice(rows.start * grid.block[0], rows.stop * grid.block[0]))
                y = _rows(images[k], rows, grid.block[0])
                coder.code(outputs.part(rows, grid), collector, y, mask)
        return (outputs if len(grid.bands()) <= _FITTED else None), collector

    def adaptations(self, data: bytes, size: Size | None = None) -> dict[int, Adaptation]:
        """Return corrections by level.

        Args:
            data: What `fit_together` returned, or `Fit.data` of a picture.
            size: Height and width of the picture, in pixels; None: of many pictures.

        Raises:
            CodecError: The data are damaged.
        """
        reader, found = Reader(data, "the corrections"), {}
        levels = self.joined(size) if size else len(self._levels)
        for k in reversed(range(levels)) if data else ():
            own = reader.take(reader.varint())
            if own and not self._levels[k].adapts:
                raise CodecError("the file is damaged: it corrects a level that has no corrections")
            if own:
                found[k] = Adaptation.from_bytes(own, self._levels[k].counts())
        if reader.at != len(data):
            raise CodecError("the file is damaged: bytes follow its corrections")
        return found

    @torch.no_grad()
    def encode(
        self, x: Tensor, fit: Fit | None = None, *, verify: bool = True, track: Track = no_progress
    ) -> list[tuple[int, bytes]]:
        """Encode a picture.

        Args:
            x: uint8 (1, C, H, W), of any size and of the model's channels.
            fit: Corrections that fit it; None: none.
            verify: Decode every stream and compare.
            track: As for `fit`.

        Returns:
            The number k of a level and the bytes that complete y[k], coarsest first.

        Raises:
            CodecError: The pixels do not come back.
        """
        size = x.shape[2], x.shape[3]
        fit = fit or Fit(b"", {}, self._images(x, size), {})
        images, joined, threads = fit.images, self.joined(size), torch.get_num_threads()
        # the coarsest levels first: nothing else could be done beside them at the end
        jobs: list[tuple[int, Callable[[], list[bytes]]]] = [
            (joined, lambda: [self.encode_together(images[joined:], size, verify)])
        ]
        jobs += [
            (k, partial(self._encode, k, strip, fit, size, verify))
            for k in range(joined)
            for strip in self._grid(k, size).strips(threads)
        ]
        streams: dict[int, list[bytes]] = {k: [] for k in range(joined + 1)}
        with side_by_side(threads) as run:
            for (k, _), found in zip(jobs, run([job for _, job in jobs], track, "pixels"), strict=True):
                streams[k] += found
        return [(k, _join(streams[k])) for k in reversed(range(joined + 1))]

    def _images(self, x: Tensor, size: Size) -> list[Tensor]:
        """Return all y[k], padded as the decoder will find them."""
        found = infer(self.model, x, [f"y{k}" for k in range(len(self._levels))])
        images = [found[f"y{k}"].cpu() for k in range(len(self._levels))]
        for k in reversed(range(len(self._levels) - 1)):
            level, grid = self.model.levels[k], self._grid(k, size)
            for rows in (slice(i, min(i + 64, grid.rows)) for i in range(0, grid.rows, 64)):
                inside = self._inside(k, size, slice(rows.start * grid.block[0], rows.stop * grid.block[0]))
                if inside is not None:
                    own = _rows(images[k], rows, grid.block[0])
                    support = level.transform.support(_rows(images[k + 1], rows, grid.above[0]), level.spec)
                    own[:] = support.merge(
                        torch.where(support.split(inside), support.split(own), support.nearest())
                    )
        return images

    def _inside(self, k: int, size: Size, rows: slice | None = None) -> Tensor | None:
        """Return whether pixels of y[k] lie within the picture, bool; None if all are coded.

        Beyond the picture, a level that models dropped pixels codes nothing: any values would do.
        """
        padded, scale = self.size(k, size), self.model.scale(k)
        if size == round_up(size, self._multiple):
            return None
        if not all(level.keeps for level in self.model.levels[: k + 1]):
            return None
        own = -(-size[0] // scale[0]), -(-size[1] // scale[1])
        rows = rows or slice(0, padded[0])
        if rows.stop <= own[0] and own[1] == padded[1]:
            return None
        mask = torch.zeros(1, self.model.spec.channels, rows.stop - rows.start, padded[1], dtype=torch.bool)
        mask[:, :, : max(0, own[0] - rows.start), : own[1]] = True
        return mask

    def _above(self, k: int, images: Sequence[Tensor | None]) -> Tensor:
        """Return the image above level k, which is the last of those images or comes after it."""
        up = images[k + 1] if k + 1 < len(self._levels) else None
        if up is not None:
            return up
        own = images[k]
        assert own is not None
        return own[:, :0]

    def _encode(self, k: int, strip: list[slice], fit: Fit, size: Size, verify: bool) -> list[bytes]:
        """Return the streams of some neighbouring bands of y[k]."""
        coder, grid, adaptation = self._levels[k], self._grid(k, size), fit.adaptations.get(k)
        outputs = fit.outputs.get((k, strip[0].start))
        if outputs is None:
            above = self._above(k, fit.images)
            outputs = coder.outputs(above, slice(strip[0].start, strip[-1].stop), grid)
        streams = []
        for rows in strip:
            part = outputs.part(rows, grid)
            y = _rows(fit.images[k], rows, grid.block[0])
            mask = self._inside(k, size, slice(rows.start * grid.block[0], rows.stop * grid.block[0]))
            encoder = SlotEncoder()
            coder.code(part, encoder, y, mask, adaptation)
            streams.append(encoder.finish(_checksum(y)))
            if verify:
                decoder = SlotDecoder(streams[-1])
                again = coder.code(part, decoder, None, mask, adaptation)
                decoder.finish(_checksum(again))
                _check_equal(again, y)
        return streams

    def _decode(
        self,
        k: int,
        strip: list[slice],
        streams: list[bytes],
        adaptation: Adaptation | None,
        above: Tensor,
        y: Tensor,
        size: Size,
    ) -> None:
        """Decode some neighbouring bands of y[k] into y."""
        coder, grid = self._levels[k], self._grid(k, size)
        outputs = coder.outputs(above, slice(strip[0].start, strip[-1].stop), grid)
        for rows, stream in zip(strip, streams, strict=True):
            mask = self._inside(k, size, slice(rows.start * grid.block[0], rows.stop * grid.block[0]))
            decoder = SlotDecoder(stream)
            part = coder.code(outputs.part(rows, grid), decoder, None, mask, adaptation)
            decoder.finish(_checksum(part))
            _rows(y, rows, grid.block[0])[:] = part

    def encode_together(
        self,
        images: list[Tensor],
        size: Size,
        verify: bool = True,
        adaptations: Mapping[int, Adaptation] = _NONE,
    ) -> bytes:
        """Encode the coarsest levels of pictures of one size in one stream.

        Args:
            images: The coarsest y[k], uint8 (B, C, h, w) each, finest first.
            size: Height and width of the pictures x, in pixels.
            verify: Decode the stream and compare.
            adaptations: Corrections by level.

        Raises:
            CodecError: The pixels do not come back.
        """
        encoder, first = SlotEncoder(), len(self._levels) - len(images)
        known: list[Tensor | None] = [*[None] * first, *images]
        for k in reversed(range(first, len(self._levels))):
            self._together(k, known, size, encoder, images[k - first], adaptations.get(k))
        stream = encoder.finish(_checksum(*images))
        if verify:
            found = self.decode_together(stream, first, len(images[0]), size, adaptations=adaptations)
            for again, y in zip(found, images, strict=True):
                _check_equal(again, y)
        return stream

    def decode_together(
        self,
        stream: bytes,
        first: int,
        n: int,
        size: Size,
        upto: int = 0,
        adaptations: Mapping[int, Adaptation] = _NONE,
    ) -> list[Tensor]:
        """Decode what `encode_together` returned, for n pictures and levels from `first` on.

        Returns:
            The coarsest y[k], uint8 (n, C, h, w) each, finest first; not those finer than `upto`.

        Raises:
            CodecError: The stream is damaged.
        """
        decoder, upto = SlotDecoder(stream), max(upto, first)
        known: list[Tensor | None] = [None] * len(self._levels)
        last = len(self._levels) - 1
        known[last] = torch.empty(n, 0, *self.size(last, size), dtype=torch.uint8)
        for k in reversed(range(upto, len(self._levels))):
            known[k] = self._together(k, known, size, decoder, None, adaptations.get(k))
        found = [y for y in known if y is not None]
        if upto == first:
            decoder.finish(_checksum(*found))
        return found

    def encode_batch(self, x: Tensor, shared: Mapping[int, Adaptation] = _NONE) -> bytes:
        """Encode pictures of one size in one stream, a large one as `encode` does.

        Args:
            x: uint8 (B, C, H, W).
            shared: Corrections by level. A large picture has its own instead.
        """
        size, wide = (x.shape[2], x.shape[3]), self._wide(x)
        if _is_large(len(x), size):
            fit = self.fit(wide)
            return _join([fit.data, *(data for _, data in self.encode(wide, fit, verify=False))])
        return self.encode_together(self._images(wide, size), size, verify=False, adaptations=shared)

    def decode_batch(
        self, data: bytes, n: int, size: Size, shared: Mapping[int, Adaptation] | None = _NONE
    ) -> Tensor:
        """Decode what `encode_batch` returned for n pictures: uint8 (n, C, H, W).

        Args:
            data: The stream.
            n: The number of pictures.
            size: Their height and width, in pixels.
            shared: Corrections by level; None: no picture has any, as in archives of format 3.

        Raises:
            CodecError: The data are damaged.
        """
        if _is_large(n, size):
            own = 0 if shared is None else 1
            parts = _split(data, own + self.joined(size) + 1)
            y = self.decode(parts[own:], size, corrections=b"".join(parts[:own]))[0]
        else:
            y = self.decode_together(data, 0, n, size, adaptations=shared or {})[0]
        return y[:, :, : size[0], : size[1]]

    def _wide(self, x: Tensor) -> Tensor:
        """Return pictures with the model's channels: grey ones have equal channels."""
        return x.expand(-1, self.model.spec.channels, -1, -1)

    def _together(
        self,
        k: int,
        known: Sequence[Tensor | None],
        size: Size,
        coder: Coder,
        y: Tensor | None,
        adaptation: Adaptation | None = None,
    ) -> Tensor:
        above, grid = self._above(k, known), self._grid(k, size)
        outputs = self._levels[k].outputs(above, slice(0, grid.rows), grid)
        mask = self._inside(k, size)
        if mask is not None:
            mask = mask.expand(len(above), -1, -1, -1)
        return self._levels[k].code(outputs, coder, y, mask, adaptation)

    @torch.no_grad()
    def decode(
        self,
        parts: Sequence[bytes],
        size: Size,
        upto: int = 0,
        track: Track = no_progress,
        corrections: bytes = b"",
    ) -> dict[int, Tensor]:
        """Decode a picture.

        Args:
            parts: What `encode` returned, or the first ones of it.
            size: Height and width of the picture, in pixels.
            upto: The number k of the finest image wanted.
            track: As for `fit`.
            corrections: Those with which the picture was encoded: `Fit.data`.

        Returns:
            uint8 (1, C, h, w) by level, padded; not those finer than `upto` or than the parts tell.

        Raises:
            CodecError: A part is damaged.
        """
        joined, threads = self.joined(size), torch.get_num_threads()
        adaptations = self.adaptations(corrections, size)
        coarse = self.decode_together(parts[0], joined, 1, size, upto)
        images = dict(enumerate(coarse, len(self._levels) - len(coarse)))
        with side_by_side(threads) as run:
            for k, data in zip(reversed(range(upto, joined)), parts[1:], strict=False):
                grid, spec = self._grid(k, size), self.model.levels[k].spec
                streams, bands = _split(data, len(grid.bands())), grid.bands()
                y = torch.empty(1, spec.channels, *self.size(k, size), dtype=torch.uint8)
                jobs = []
                for strip in grid.strips(threads):
                    own = [streams[bands.index(rows)] for rows in strip]
                    jobs.append(
                        partial(self._decode, k, strip, own, adaptations.get(k), images[k + 1], y, size)
                    )
                for _ in run(jobs, track, f"y{k}"):
                    pass
                images[k] = y
        return images


def _is_large(n: int, size: Size) -> bool:
    """Whether n pictures of that size are one that a batch codes as `ChainCodec.encode` does."""
    return n == 1 and math.prod(size) > _STRIP


def _worthwhile(
    solved: Mapping[int, tuple[Adaptation, float]], levels: int
) -> tuple[bytes, dict[int, Adaptation]]:
    """Return the corrections that are worth their bytes, packed and by level.

    Args:
        solved: By level: corrections, and how many bits they save.
        levels: The number of levels that can have any.
    """
    found, data = {}, b""
    for k in reversed(range(levels)):
        own = b""
        if k in solved:
            adaptation, saved = solved[k]
            packed = adaptation.to_bytes()
            if saved > 8 * (len(packed) + _WORTH):
                found[k], own = adaptation, packed
        data += varint(len(own)) + own
    return data if found else b"", found


def _check_equal(again: Tensor, y: Tensor) -> None:
    if not torch.equal(again, y):
        raise CodecError("the picture came back changed: please report this, with the picture")


def _join(streams: list[bytes]) -> bytes:
    """Put streams together; the lengths of all but the last come first."""
    return b"".join([*(varint(len(stream)) for stream in streams[:-1]), *streams])


def _split(data: bytes, n: int) -> list[bytes]:
    """Invert `_join`, for n streams."""
    reader = Reader(data, "a part of it")
    lengths = [reader.varint() for _ in range(n - 1)]
    streams = [reader.take(length) for length in lengths]
    return [*streams, data[reader.at :]]


@contextmanager
def side_by_side(threads: int) -> Iterator[Callable[[Sequence[Callable[[], T]], Track, str], Iterator[T]]]:
    """Yield a function that does jobs in threads and yields their results in order, showing progress."""
    if threads < 2:
        yield lambda jobs, track, text: (job() for job in track(jobs, text))
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def run(jobs: Sequence[Callable[[], T]], track: Track, text: str) -> Iterator[T]:
            return (job.result() for job in track([pool.submit(job) for job in jobs], text))

        try:
            yield run
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
