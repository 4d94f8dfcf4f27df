"""Self-supervised variational auto-encoders: likelihood, generation, enhancement and compression."""

from selfvae.evaluate import iwae
from selfvae.hub import load, save
from selfvae.model import SelfVAE
from selfvae.objective import Terms
from selfvae.presets import ModelConfig, build

__all__ = ["ModelConfig", "SelfVAE", "Terms", "build", "iwae", "load", "save"]
