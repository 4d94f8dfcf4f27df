"""Names that the command line knows without torch."""

from __future__ import annotations

from pathlib import Path

from selfvae.hints import unknown

__all__ = ["PRESETS", "SIZES", "bundled", "check_model", "check_preset"]

SIZES = ("tiny", "small", "paper")

# the presets of selfvae.presets, which needs torch, with their numbers of parameters by size for colour
# images of 32 x 32 pixels; a test compares them with the models
PRESETS: dict[str, tuple[int, int, int]] = {
    "vae-normal": (177732, 2306388, 22864488),
    "vae-mog": (382532, 4354388, 24912488),
    "vae": (386796, 3981160, 34276092),
    "srvae": (400158, 4855012, 39272298),
    "selfvae-sketch": (450298, 5308558, 44065216),
    "selfvae-3lvl": (464920, 4876106, 42166734),
    "selfvae": (400158, 4855012, 39272298),
    "selfvae-mean-3lvl": (464920, 4876106, 42166734),
    "selfvae-grey": (450298, 5308558, 44065216),
    "selfvae-bits": (470306, 5402054, 44343672),
    "selfvae-halve": (240484, 3775444, 24401684),
    "selfvae-quincunx": (420868, 5370532, 33158692),
}

_MODELS = Path(__file__).parents[1] / "models"


def bundled() -> list[str]:
    """The names of the bundled models."""
    return sorted(file.parent.name for file in _MODELS.glob("*/config.json"))


def check_model(model: Path) -> None:
    """Raise ValueError unless `model` is an existing path or the name of a bundled model."""
    if not model.exists() and str(model) not in bundled():
        raise ValueError(
            unknown(
                "model", str(model), bundled(),
                f"expected a folder that selfvae train wrote, or a bundled model: {', '.join(bundled())}",
            )
        )  # fmt: skip


def check_preset(name: str) -> None:
    """Raise ValueError unless a preset has that name; a bundled model has --init-from."""
    if name in PRESETS:
        return
    if name in bundled():
        raise ValueError(f"{name!r} is a trained model, not a preset: continue from it with --init-from")
    raise ValueError(unknown("model", name, PRESETS))
