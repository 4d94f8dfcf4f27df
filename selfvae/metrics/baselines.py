"""What ordinary lossless formats need for the same images."""

from __future__ import annotations

import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

__all__ = ["lossless_bits", "lossless_bits_per_dim"]

# bytes of every file that do not depend on the picture and are not counted
_FORMATS: dict[str, tuple[int, dict[str, Any]]] = {
    "PNG": (8 + 25 + 12 + 12, {"optimize": True}),  # signature, IHDR, IDAT's frame, IEND
    "WebP": (12 + 8, {"lossless": True, "quality": 100, "method": 6}),  # RIFF and VP8L headers
}


def lossless_bits(x: Tensor, format: str) -> Tensor:
    """Length in bits of images x, uint8 (B, C, H, W), each a file of "PNG" or "WebP": int64 (B,)."""
    header, options = _FORMATS[format]
    lengths = []
    for picture in x.cpu():
        file = io.BytesIO()
        array = picture.permute(1, 2, 0).squeeze(2).numpy()
        Image.fromarray(array).save(file, format, **options)
        lengths.append(8 * (len(file.getvalue()) - header))
    return torch.tensor(lengths, dtype=torch.long)


def lossless_bits_per_dim(x: Tensor, format: str) -> float:
    """Mean bits per dimension of images x, uint8 (B, C, H, W), as files of "PNG" or "WebP"."""
    return lossless_bits(x, format).sum().item() / x.numel()
