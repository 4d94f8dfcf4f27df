"""Traces of JPEG compression."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfvae.transforms.base import ImageSpec, Transform, check_image, full_range

__all__ = ["Jpeg"]


class Jpeg(Transform):
    """The image as it comes back from a JPEG file, with chroma at half the height and width.

    Every x is possible given the result, so that only training and measuring compute it. Versions of
    libjpeg may differ in single values.

    Args:
        quality: 1 to 95, as Pillow and libjpeg count it.
    """

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        if not 1 <= quality <= 95:
            raise ValueError(f"quality must be 1 to 95; got {quality}")
        self.quality = quality

    def output_spec(self, x: ImageSpec) -> ImageSpec:
        if x.channels not in (1, 3):
            raise ValueError(f"{self} needs grey or RGB images; got {x.channels} channels")
        return full_range(self, x)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        self.output_spec(ImageSpec(x.shape[1]))
        found = [self._back(image) for image in x.permute(0, 2, 3, 1).cpu().numpy()]
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).to(x.device).contiguous()

    def _back(self, image: np.ndarray) -> np.ndarray:
        """Write and read an image, uint8 (H, W, 1 or 3)."""
        file = io.BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(
            file, "JPEG", quality=self.quality, subsampling="4:2:0"
        )
        return np.asarray(Image.open(file)).reshape(image.shape)

    def extra_repr(self) -> str:
        return f"{self.quality}"
