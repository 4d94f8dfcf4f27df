"""Coding of single pictures: all variables of a model, one after the other, into one file and back.

Each image is coded given the coarser one, as in SReC (Cao et al. 2020) and L3C (Mentzer et al. 2019), so
that a prefix of the file contains a smaller version of the picture. Halving and quincunx chains code pixels
in the order of FLIF's interlacing, with learnt interpolation as in LLICTI (Kamisli 2022).
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from selfvae.codec.ans import ANSCoder
from selfvae.codec.container import CodecError, Header, check_size, read_header
from selfvae.codec.float64.pictures import Float64Codec, Written
from selfvae.model import SelfVAE
from selfvae.operations import SamplingOptions
from selfvae.progress import Track, no_progress
from selfvae.transforms import check_image
from selfvae.transforms.base import round_up

__all__ = ["Codec"]


class Codec:
    """Lossless compression of pictures with a model.

    A file can be read only with the weights that wrote it. This class checks what comes in and what comes
    out; `Float64Codec` does the coding.

    Args:
        model: Any model that `build` or `load` returns.

    Attributes:
        model: The copy that codes, on the device of the original.
        fingerprint: Of the model, 8 bytes.
        names: The model's variables in coding order, e.g. z1, y1, z0, y0.
        gaussian: Whether latents are coded by bits-back, which takes bits from the stack.

    Raises:
        ValueError: The model has too many components, or no config.
    """

    def __init__(self, model: SelfVAE) -> None:
        self._coder = Float64Codec(model)
        self.model, self.fingerprint = self._coder.model, self._coder.fingerprint
        self.names, self.gaussian = self._coder.names, self._coder.gaussian

    def compress(self, x: Tensor, *, verify: bool = True, track: Track = no_progress) -> bytes:
        """Compress a picture.

        Args:
            x: uint8 (1, C, H, W), of any size. A model of three channels takes one channel as three equal
                ones.
            verify: Decode the file and compare the result with x.
            track: Receives the tiles of each image and its name, and yields the tiles, to show progress.

        Returns:
            The file.

        Raises:
            TypeError: x is not uint8.
            ValueError: x does not fit the model.
            CodecError: x has too many pixels, or the decoded file differs from it.
        """
        self.check(x)
        data = self._coder.compress(x, track)
        if verify and not torch.equal(self.decompress(data, track=track), x.cpu()):
            raise CodecError("the picture came back changed: please report this, with the picture")
        return data

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
            how: How they are drawn, see `operations.SamplingOptions`; by default the most likely picture.

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
        return self._coder.decompress(data, upto, partial, track, **how)

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
        return self._coder.push(x, stack, track)

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
        return self._coder.pop(n, size, stack, side, padded=padded)

    def check(self, x: Tensor) -> None:
        """Check that a picture fits the model.

        Raises:
            TypeError: It is not uint8.
            ValueError: Its shape or a value does not fit.
            CodecError: It has too many pixels.
        """
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
                f"the model has values 0 to {spec.max_value}; the picture holds {int(x.max())}"
            )

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width, in pixels, to which a picture is padded for the model's levels."""
        return round_up((height, width), self.model.multiples[0])

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
