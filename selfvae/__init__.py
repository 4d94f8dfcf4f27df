"""Self-supervised variational auto-encoders: likelihood, generation, enhancement and compression."""

from selfvae.hub import from_pretrained, load, push_to_hub, save, save_pretrained
from selfvae.metrics.bounds import iwae
from selfvae.model import SelfVAE
from selfvae.operations import complete, enhance, generate, infer, interpolate, reconstruct, vary
from selfvae.presets import ModelConfig, build
from selfvae.terms import Terms
from selfvae.tiling import tiled

__all__ = [
    "ModelConfig",
    "SelfVAE",
    "Terms",
    "build",
    "complete",
    "enhance",
    "from_pretrained",
    "generate",
    "infer",
    "interpolate",
    "iwae",
    "load",
    "push_to_hub",
    "reconstruct",
    "save",
    "save_pretrained",
    "tiled",
    "vary",
]
