"""Compression without loss: files about as long as the model's likelihood says.

codec = Codec(selfvae.load("runs/halve"))
data = codec.compress(x)           # bytes
x = codec.decompress(data)         # uint8 (1, C, H, W), bit for bit
y = codec.decompress(data, "y2")   # a smaller version, from the first bytes of the file
"""

from selfvae.codec.archive import Archive, pack
from selfvae.codec.container import CodecError, Header
from selfvae.codec.format3 import PictureHeader
from selfvae.codec.picture import read_header, read_metadata
from selfvae.codec.plugin import use
from selfvae.codec.progressive import Codec
from selfvae.hub import fingerprint

__all__ = [
    "Archive",
    "Codec",
    "CodecError",
    "Header",
    "PictureHeader",
    "fingerprint",
    "pack",
    "read_header",
    "read_metadata",
    "use",
]
