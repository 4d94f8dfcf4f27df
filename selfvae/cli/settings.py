"""Flags from files: --config, and the settings of a run that --resume continues."""

from __future__ import annotations

import importlib
import math
import os
import sys
from pathlib import Path

__all__ = ["FORMER_FLAGS", "SAVED", "expand", "import_modules", "imported"]

SAVED = "train.yaml"  # a run's settings, in its folder

# flags that had other names when runs were saved
FORMER_FLAGS = {
    "accumulate": "grad-accum",
    "clip": "clip-factor",
    "lr-floor": "min-lr",
    "skip": "skip-factor",
    "start": "init-from",
}

imported: list[str] = []  # the modules of --import, which train saves with its flags


def import_modules(words: list[str]) -> list[str]:
    """Import what --import names, and return the other words."""
    left, modules = [], []
    parts = iter(words)
    for word in parts:
        flag, given, value = word.partition("=")
        if flag != "--import":
            left.append(word)
            continue
        module = value if given else next(parts, "")
        if not module or module.startswith("-"):
            raise ValueError("--import takes the name of a Python module, e.g. my_transforms")
        modules.append(module)
    imported.clear()
    _import(modules)
    return left


def _import(modules: list[str]) -> None:
    for module in modules:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"--import {module}: {error}") from None
        imported.append(module)


def expand(command: str, words: list[str]) -> list[str]:
    """The words of a command with --config FILE, and --resume's saved settings, as flags."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags: list[str] = []
    if "--config" in words:
        at = words.index("--config")
        if at + 1 == len(words):
            raise ValueError("--config takes a YAML file")
        flags += _flags(Path(words[at + 1]), {})
        del words[at : at + 2]
    if command == "train" and "--resume" in words and "--out" in words[:-1]:
        saved = Path(words[words.index("--out") + 1]) / SAVED
        if saved.exists():
            flags += _flags(saved, FORMER_FLAGS)
    # after the positional arguments, which a list would swallow; before the other flags, which override
    at = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return [*words[:at], *flags, *words[at:]]


def _flags(path: Path, former: dict[str, str]) -> list[str]:
    """The flags that a YAML file stands for; its modules are imported."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map flags to values, e.g. 'steps: 1000'")
    flags: list[str] = []
    for key, value in values.items():
        key = str(key).replace("_", "-")
        key = former.get(key, key)
        if key == "import":
            _import([value] if isinstance(value, str) else list(map(str, value)))
        elif isinstance(value, bool):
            flags.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path}: {key} must be finite")
        elif value is not None:
            flags += [f"--{key}", str(value)]
    return flags
