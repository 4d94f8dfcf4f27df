"""Names that the command line knows without torch, and what was probably meant by an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["PRESETS", "bundled", "check_model", "check_preset", "unknown"]

# those of selfvae.presets, which needs torch; a test holds them together
PRESETS = (
    "vae-normal", "vae-mog", "vae", "srvae", "selfvae-sketch", "selfvae-3lvl", "selfvae", "selfvae-3",
    "selfvae-grey", "selfvae-bits", "selfvae-halve", "selfvae-quincunx",
)  # fmt: skip

_MODELS = Path(__file__).parents[1] / "models"


def bundled() -> list[str]:
    """The names of the bundled models."""
    return sorted(file.parent.name for file in _MODELS.glob("*/config.json"))


def unknown(kind: str, name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A message about an unknown name, with the nearest known one."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} ({otherwise or 'known: ' + ', '.join(known)})"


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
