"""Self-supervised variational auto-encoders: likelihood, generation, enhancement and compression."""

from selfvae.bounds import iwae
from selfvae.hub import load, save
from selfvae.model import SelfVAE
from selfvae.objective import Terms
from selfvae.presets import ModelConfig, build
from selfvae.tasks import complete, enhance, generate, infer, interpolate, reconstruct, vary
from selfvae.tiles import tiled

__all__ = [
    "ModelConfig",
    "SelfVAE",
    "Terms",
    "build",
    "complete",
    "enhance",
    "generate",
    "infer",
    "interpolate",
    "iwae",
    "load",
    "reconstruct",
    "save",
    "tiled",
    "vary",
]
