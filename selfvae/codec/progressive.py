"""Coding of single pictures into files: one class for all models and all versions of the file format.

Each image is coded given the coarser one, as in SReC (Cao et al. 2020) and L3C (Mentzer et al. 2019), so
that a prefix of the file contains a smaller version of the picture. Halving and quincunx chains code pixels
in the order of FLIF's interlacing, with learnt interpolation as in LLICTI (Kamisli 2022).
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from selfvae.codec import picture
from selfvae.codec.ans import ANSCoder
from selfvae.codec.chains import ChainCodec
from selfvae.codec.container import CodecError, Header, check_size
from selfvae.codec.float64.pictures import Float64Codec, Written
from selfvae.codec.format3 import NO_MODEL, PictureHeader
from selfvae.codec.picture import read_header
from selfvae.data.metadata import Metadata
from selfvae.hub import fingerprint, frozen
from selfvae.model import SelfVAE
from selfvae.operations import SamplingOptions, complete, infer, variables
from selfvae.progress import Track, no_progress
from selfvae.tiling import tiled
from selfvae.transforms import check_image
from selfvae.transforms.base import round_up

__all__ = ["Codec"]


class Codec:
    """Lossless compression of pictures with a model.

    An integer model (`ModelConfig.integer`) writes format 3: quickly, on all cores, with alpha and
    metadata, never much larger than lossless WebP. Other models write format 2, with networks in float64.
    A file can be read only with the weights that wrote it.

    Args:
        model: Any model that `build` or `load` returns.

    Attributes:
        model: The copy that codes, on the device of the original.
        fingerprint: Of the model, 8 bytes.
        format: Version of the file format that `compress` writes.
        names: The model's variables in coding order, e.g. z1, y1, z0, y0.
        gaussian: Whether latents are coded by bits-back, which takes bits from the stack.

    Raises:
        ValueError: The model has too many components, or no config.
        CodecError: This machine does not compute an integer model's networks exactly.
    """

    def __init__(self, model: SelfVAE) -> None:
        self.fingerprint, self.names = fingerprint(model), variables(model)
        self.chain: ChainCodec | None = None
        if model.config.integer:
            self.model = frozen(model).eval().requires_grad_(False)
            self.chain, self.format, self.gaussian = ChainCodec(self.model, self.fingerprint), 3, False
        else:
            self._float64 = Float64Codec(model)
            self.model, self.format, self.gaussian = self._float64.model, 2, self._float64.gaussian

    def compress(
        self,
        x: Tensor,
        *,
        metadata: Metadata | None = None,
        verify: bool = True,
        track: Track = no_progress,
    ) -> bytes:
        """Compress a picture.

        Args:
            x: uint8 (1, C, H, W), of any size. A model of three channels takes one channel as three equal
                ones. Format 3 also takes alpha as the last of 2 or 4 channels.
            metadata: Kept in the file; only format 3 can hold any.
            verify: Decode the file and compare the result with x.
            track: Receives the parts of the work and their name, and yields them, to show progress.

        Returns:
            The file.

        Raises:
            TypeError: x is not uint8.
            ValueError: x does not fit the model, or the format does not hold metadata.
            CodecError: x has too many pixels, or the decoded file differs from it.
        """
        self.check(x)
        chain = self.chain
        if chain is None:
            if metadata:
                raise ValueError(
                    "files of models that are not integer models hold no metadata: leave it out"
                )
            data = self._float64.compress(x, track)
            if verify and not torch.equal(self.decompress(data, track=track), x.cpu()):
                raise CodecError("the picture came back changed: please report this, with the picture")
            return data

        def code_levels(colours: Tensor) -> tuple[bytes, picture.Levels]:
            wide = colours.expand(-1, self.model.spec.channels, -1, -1)
            fit = chain.fit(wide, track)
            return fit.data, chain.encode(wide, fit, verify=verify, track=track)

        return picture.encode(
            x, metadata, code_levels, self.fingerprint, num_values=self.model.spec.num_values,
            thorough=False,
        )  # fmt: skip

    def decompress(
        self,
        data: bytes,
        upto: str = "y0",
        *,
        partial: bool = False,
        track: Track = no_progress,
        **how: Unpack[SamplingOptions],
    ) -> Tensor:
        """Decompress a file.

        Args:
            data: The file.
            upto: "y0" for the picture; "y1", ... for a coarser image, exactly, without decoding the rest.
            partial: Accept a truncated file; the missing variables are drawn.
            track: As for `compress`.
            how: How they are drawn, see `operations.SamplingOptions`; by default the mean.

        Returns:
            uint8 (1, C, H, W), identical to the original.

        Raises:
            CodecError: The file is damaged, truncated, or written with another model.
        """
        header = read_header(data)
        self._check_header(header)
        held = [name for name in self.names if name[0] == "y"]
        if upto not in held:
            raise CodecError(f"the file holds {', '.join(held)}; got {upto!r}")
        if isinstance(header, Header):
            return self._float64.decompress(data, upto, partial, track, **how)

        def decode_levels(
            header: PictureHeader, corrections: bytes, parts: picture.Levels, k: int
        ) -> Tensor:
            return self._decode_levels(header, corrections, parts, k, track, how)

        def coarser(x: Tensor, k: int) -> Tensor:
            return self._coarser(x, k)

        return picture.decode(data, decode_levels, int(upto[1:]), partial=partial, coarser=coarser)[0]

    @torch.no_grad()
    def _decode_levels(
        self,
        header: PictureHeader,
        corrections: bytes,
        parts: picture.Levels,
        k: int,
        track: Track,
        how: SamplingOptions,
    ) -> Tensor:
        """Decode y[k] from the levels that a file holds; draw it if they end before."""
        assert self.chain is not None
        size = header.height, header.width
        joined = self.chain.joined(size)
        if [level for level, _ in parts] != list(range(joined, joined - len(parts), -1)):
            raise CodecError("the header does not fit the model that it names: the file is damaged")
        images = self.chain.decode([data for _, data in parts], size, k, track, corrections)
        if k not in images:
            options: SamplingOptions = {"decode": "mean", **how}
            known = {f"y{j}": y for j, y in images.items()}
            images[k] = complete(tiled(self.model), known, (1, *size), **options)[f"y{k}"]
        y = self._cropped(images[k], k, size)
        return y[:, :1] if header.channels < 3 else y

    def _coarser(self, x: Tensor, k: int) -> Tensor:
        """Compute y[k] of a picture, grey or RGB."""
        size = x.shape[2], x.shape[3]
        wide = x.expand(-1, self.model.spec.channels, -1, -1)
        y = self._cropped(infer(self.model, wide, [f"y{k}"])[f"y{k}"], k, size)
        return y[:, :1] if x.shape[1] < y.shape[1] else y

    def _cropped(self, y: Tensor, k: int, size: tuple[int, int]) -> Tensor:
        rows, cols = self.model.scale(k)
        return y[:, :, : -(-size[0] // rows), : -(-size[1] // cols)].cpu().contiguous()

    def push(self, x: Tensor, stack: ANSCoder, track: Track = no_progress) -> dict[str, Written]:
        """Push pictures of one size to a stack, for archives.

        Gaussian latents are drawn with bits that the stack holds, if these suffice.

        Args:
            x: uint8 (B, C, H, W).
            stack: May hold other pictures.
            track: As for `compress`.

        Returns:
            The coded variables by name.
        """
        return self._float64.push(x, stack, track)

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
        return self._float64.pop(n, size, stack, side, padded=padded)

    def check(self, x: Tensor) -> None:
        """Check that a picture fits the model.

        Raises:
            TypeError: It is not uint8.
            ValueError: Its shape or a value does not fit.
            CodecError: It has too many pixels.
        """
        spec = self.model.spec
        check_image(x, x.shape[1] if x.ndim == 4 else spec.channels)
        allowed = {1, spec.channels} | (
            {2, spec.channels + 1} if self.format > 2 and spec.channels != 2 else set()
        )
        if x.shape[0] != 1 or 0 in x.shape or x.shape[1] not in allowed:
            raise ValueError(
                f"expected one picture uint8 (1, C, H, W), C one of {sorted(allowed)}; got {tuple(x.shape)}"
            )
        self.check_size(x.shape[2], x.shape[3])
        if spec.max_value < 255 and int(x.max()) > spec.max_value:
            raise ValueError(
                f"the model has values 0 to {spec.max_value}; the picture holds {int(x.max())}"
            )

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width, in pixels, to which a picture is padded for the model's levels."""
        return round_up((height, width), self.model.multiples[0])

    def check_size(self, height: int, width: int) -> None:
        """Check a picture's height and width, in pixels, against the limits of `container.check_size`.

        Raises:
            CodecError: It has too many pixels.
        """
        check_size(*self.padded(height, width), latents=self.model.has_latents)

    def check_model(self, found: bytes) -> None:
        """Check the fingerprint in a file.

        Raises:
            CodecError: It is not this model's.
        """
        if found != self.fingerprint:
            raise CodecError(
                f"the file was written with another model: {found.hex()}; this one is "
                f"{self.fingerprint.hex()}: use the model that wrote it"
            )

    def _check_header(self, header: Header | PictureHeader) -> None:
        if isinstance(header, PictureHeader) and header.fingerprint == NO_MODEL:
            return
        self.check_model(header.fingerprint)
        spec = self.model.spec
        self.check_size(header.height, header.width)
        if isinstance(header, PictureHeader):
            fits = self.chain is not None and header.channels - header.has_alpha in (1, spec.channels)
        else:
            names = [part.name for part in header.parts]
            fits = self.chain is None and header.channels in (1, spec.channels) and names == self.names
        if not fits or header.num_values != spec.num_values:
            raise CodecError("the header does not fit the model that it names: the file is damaged")
