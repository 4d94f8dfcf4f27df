"""Self-supervised variational auto-encoders: likelihood, generation, enhancement and compression."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfvae.hub import from_pretrained, load, push_to_hub, save, save_pretrained
    from selfvae.metrics.bounds import iwae
    from selfvae.model import SelfVAE
    from selfvae.operations import complete, enhance, generate, infer, interpolate, reconstruct, vary
    from selfvae.presets import ModelConfig, build
    from selfvae.terms import Terms
    from selfvae.tiling import tiled

    __version__: str

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

# public names are imported on first use: `import selfvae` is quick, and `selfvae --help` needs no torch
_MODULES = {
    "hub": ("from_pretrained", "load", "push_to_hub", "save", "save_pretrained"),
    "metrics.bounds": ("iwae",),
    "model": ("SelfVAE",),
    "operations": ("complete", "enhance", "generate", "infer", "interpolate", "reconstruct", "vary"),
    "presets": ("ModelConfig", "build"),
    "terms": ("Terms",),
    "tiling": ("tiled",),
}
_HOMES = {name: f"selfvae.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: object = version("selfvae")
        except PackageNotFoundError:  # run from a source tree that was never installed
            value = "unknown"
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
