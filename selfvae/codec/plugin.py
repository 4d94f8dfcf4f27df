"""Pillow opens and saves .svae files, from the first call of `use` on, with the models that it was given.

import selfvae.codec
selfvae.codec.use(selfvae.load("runs/halve"))
Image.open("photo.png").save("photo.svae")
Image.open("photo.svae")

Integer models keep alpha and what `image.info` says of colour profile, EXIF and XMP, and the texts of PNG
files. The EXIF data stay as they are, with the orientation, since Pillow does not turn pixels by itself.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import IO, Any

import torch
from PIL import Image, ImageFile

from selfvae.codec.container import MAGIC, CodecError
from selfvae.codec.format3 import NO_MODEL, VERSION
from selfvae.codec.picture import decode, read_header, read_metadata
from selfvae.codec.progressive import Codec
from selfvae.data.metadata import Metadata
from selfvae.data.pictures import MODES, from_image, to_image
from selfvae.hub import find_writer, load
from selfvae.model import SelfVAE

__all__ = ["use"]

_FORMAT = "SVAE"
_EXIF = b"Exif\0\0"  # what Pillow puts before EXIF data
_codecs: dict[bytes, Codec] = {}  # by fingerprint; the last one saves


def use(model: SelfVAE) -> Codec:
    """Teach Pillow to open .svae files of a model, and to save pictures with it.

    The last model given saves. Files of all models given can be opened, and of all models that
    `hub.find_writer` finds. Nothing is registered with Pillow before the first call.

    Returns:
        The codec of that model.

    Raises:
        ValueError: if the model has no codec (see `Codec`).
    """
    codec = Codec(model)
    if _FORMAT not in Image.SAVE:
        _register()
    _codecs.pop(codec.fingerprint, None)
    _codecs[codec.fingerprint] = codec
    return codec


@functools.lru_cache(maxsize=4)
def _found(mark: bytes) -> Codec:
    """Return the codec of a model that was not given but can be found, see `hub.find_writer`."""
    try:
        return Codec(load(find_writer(mark)))
    except FileNotFoundError as error:
        raise CodecError(f"{error}; or load the model and call selfvae.codec.use(model)") from None


class SvaeImageFile(ImageFile.ImageFile):
    """A picture in a .svae file, decoded when its pixels are asked for."""

    format = _FORMAT
    format_description = "selfvae, lossless"

    def _open(self) -> None:
        assert self.fp is not None
        self._data = self.fp.read()
        header = read_header(self._data)
        if header.num_values != 256:
            raise CodecError(f"Pillow shows pictures of 256 levels; this one has {header.num_values}")
        if header.version < VERSION and header.channels not in (1, 3):
            raise CodecError(f"Pillow shows pictures of 1 or 3 channels; this one has {header.channels}")
        self._size = header.width, header.height
        self._mode = MODES[header.channels]
        self._fingerprint = header.fingerprint
        self._describe(read_metadata(self._data))
        self.tile = []

    def _describe(self, metadata: Metadata) -> None:
        """Fill in `info` and `text` as Pillow does for PNG files."""
        self.text = dict(metadata.text)
        exif = _EXIF + metadata.exif if metadata.exif else b""
        own = {"icc_profile": metadata.icc, "exif": exif, "xmp": metadata.xmp}
        self.info.update(self.text)
        self.info.update({name: value for name, value in own.items() if value})

    def load(self) -> Any:
        if self._data:
            partial = ImageFile.LOAD_TRUNCATED_IMAGES
            if self._fingerprint == NO_MODEL:
                x = decode(self._data, partial=partial)[0]
            else:
                codec = _codecs.get(self._fingerprint) or _found(self._fingerprint)
                x = codec.decompress(self._data, partial=partial)
            if x.shape[1] < len(self._mode):  # alpha has not arrived
                x = torch.cat([x, torch.full_like(x[:, :1], 255)], 1)
            self._data = b""
            self.im = to_image(x[0]).im
            if self._exclusive_fp and self.fp is not None:
                self.fp.close()
                self.fp = None
        return super().load()


def _save(image: Image.Image, file: IO[bytes], name: str | bytes) -> None:
    if not _codecs:
        raise CodecError("no model to compress with: call selfvae.codec.use(model) first")
    codec = list(_codecs.values())[-1]
    modes = tuple(MODES.values()) if codec.format >= VERSION else ("L", "RGB")
    if image.mode not in modes:
        raise OSError(
            f"cannot write mode {image.mode} as {_FORMAT} with this model: convert it to "
            f"{', '.join(modes[:-1])} or {modes[-1]}"
        )
    metadata = _metadata(image) if codec.format >= VERSION else None
    file.write(codec.compress(from_image(image), metadata=metadata))


def _metadata(image: Image.Image) -> Metadata:
    """Return what an image says of itself, or `Image.save` was told to write instead."""
    told = {**image.info, **getattr(image, "encoderinfo", {})}
    found, exif = Metadata.of(image), told.get("exif")
    if exif is not None:
        exif = exif.tobytes() if isinstance(exif, Image.Exif) else bytes(exif)
        found = replace(found, exif=exif.removeprefix(_EXIF))
    xmp = told.get("xmp") or b""
    xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
    return replace(found, icc=bytes(told.get("icc_profile") or b""), xmp=xmp)


def _register() -> None:
    Image.register_open(_FORMAT, SvaeImageFile, lambda start: start[:4] == MAGIC)
    Image.register_save(_FORMAT, _save)
    Image.register_extension(_FORMAT, ".svae")
    Image.register_mime(_FORMAT, "image/x-svae")
