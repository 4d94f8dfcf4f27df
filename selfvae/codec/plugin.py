"""Pillow opens and saves .svae files, from the first call of `use` on, with the models that it was given.

import selfvae.codec
selfvae.codec.use(selfvae.load("runs/halve"))
Image.open("photo.png").save("photo.svae")
Image.open("photo.svae")
"""

from __future__ import annotations

import functools
from typing import IO, Any

from PIL import Image, ImageFile

from selfvae.codec.container import MAGIC, CodecError
from selfvae.codec.picture import read_header
from selfvae.codec.progressive import Codec
from selfvae.data.pictures import from_image, to_image
from selfvae.hub import find_writer, load
from selfvae.model import SelfVAE

__all__ = ["use"]

_FORMAT = "SVAE"
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
        if header.channels not in (1, 3):
            raise CodecError(f"Pillow shows pictures of 1 or 3 channels; this one has {header.channels}")
        self._size = header.width, header.height
        self._mode = "L" if header.channels == 1 else "RGB"
        self._fingerprint = header.fingerprint
        self.tile = []

    def load(self) -> Any:
        if self._data:
            codec = _codecs.get(self._fingerprint) or _found(self._fingerprint)
            x = codec.decompress(self._data, partial=ImageFile.LOAD_TRUNCATED_IMAGES)
            self._data = b""
            self.im = to_image(x[0]).im
            if self._exclusive_fp and self.fp is not None:
                self.fp.close()
                self.fp = None
        return super().load()


def _save(image: Image.Image, file: IO[bytes], name: str | bytes) -> None:
    if not _codecs:
        raise CodecError("no model to compress with: call selfvae.codec.use(model) first")
    if image.mode not in ("L", "RGB"):
        raise OSError(f"cannot write mode {image.mode} as {_FORMAT}: convert it to L or RGB")
    file.write(list(_codecs.values())[-1].compress(from_image(image)))


def _register() -> None:
    Image.register_open(_FORMAT, SvaeImageFile, lambda start: start[:4] == MAGIC)
    Image.register_save(_FORMAT, _save)
    Image.register_extension(_FORMAT, ".svae")
    Image.register_mime(_FORMAT, "image/x-svae")
