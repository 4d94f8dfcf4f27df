"""The deterministic maps y[k+1] = d_k(y[k]) (docs/spec.md, Transforms)."""

from selfvae.transforms.base import (
    Chain,
    ImageSpec,
    Null,
    Support,
    Transform,
    at_least_float32,
    check_image,
)
from selfvae.transforms.blur import GaussianBlur
from selfvae.transforms.downscale import BicubicDownscale, MeanDownscale
from selfvae.transforms.jpeg import Jpeg
from selfvae.transforms.subsample import Checkerboard, Subsample, Subsampling
from selfvae.transforms.tone import BitDepth, Greyscale, Sketch

__all__ = [
    "BicubicDownscale",
    "BitDepth",
    "Chain",
    "Checkerboard",
    "GaussianBlur",
    "Greyscale",
    "ImageSpec",
    "Jpeg",
    "MeanDownscale",
    "Null",
    "Sketch",
    "Subsample",
    "Subsampling",
    "Support",
    "Transform",
    "at_least_float32",
    "check_image",
]
