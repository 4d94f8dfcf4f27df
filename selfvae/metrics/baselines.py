"""What ordinary lossless formats need for the same images."""

from __future__ import annotations

import torch
from torch import Tensor

from selfvae.data.pictures import encode_lossless, to_image

__all__ = ["lossless_bits", "lossless_bits_per_dim"]

# bytes of every file that do not depend on the picture and are not counted
_HEADERS = {
    "PNG": 8 + 25 + 12 + 12,  # signature, IHDR, IDAT's frame, IEND
    "WebP": 12 + 8,  # RIFF and VP8L headers
}


def lossless_bits(x: Tensor, format: str) -> Tensor:
    """Lengths of images as lossless files, without the headers that every file has.

    Args:
        x: uint8 (B, C, H, W), C = 1 to 4.
        format: "PNG" or "WebP".

    Returns:
        int64 (B,), bits.
    """
    lengths = [8 * (len(encode_lossless(to_image(image), format)) - _HEADERS[format]) for image in x]
    return torch.tensor(lengths, dtype=torch.long)


def lossless_bits_per_dim(x: Tensor, format: str) -> float:
    """Mean bits per dimension of images as lossless files; arguments as for `lossless_bits`."""
    return lossless_bits(x, format).sum().item() / x.numel()
