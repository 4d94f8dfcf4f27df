"""Self-supervised variational auto-encoders: likelihood, generation, enhancement and compression."""

from selfvae.bounds import iwae
from selfvae.hub import from_pretrained, load, push_to_hub, save, save_pretrained
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
