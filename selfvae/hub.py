"""Models on disk: a folder with config.json and model.safetensors, nothing that is ever executed.

Some come with the package: see `shipped`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfvae.model import SelfVAE
from selfvae.presets import ModelConfig, from_config

__all__ = ["load", "own_state", "save", "set_state", "shipped", "write_atomic", "write_tensors"]

_FORMAT = 1
_SHIPPED = Path(__file__).parent / "models"


def shipped() -> dict[str, Path]:
    """The models that come with the package, by name; each folder holds a model card, README.md."""
    return {file.parent.name: file.parent for file in sorted(_SHIPPED.glob("*/config.json"))}


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once: what levels share goes by its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def set_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `own_state`; RuntimeError if the names or shapes are not the model's."""
    own = own_state(model)
    first = {id(value): name for name, value in own.items()}
    firsts = {name: first[id(value)] for name, value in model.state_dict(keep_vars=True).items()}
    again = {name: state[f] for name, f in firsts.items() if name != f and f in state}
    model.load_state_dict({**state, **again})


def save(model: SelfVAE, folder: str | Path, *, half: bool = False) -> None:
    """Write folder/config.json and folder/model.safetensors; the model must come from `build`.

    half: round the weights to float16, for half the bytes; they are float32 again when loaded.
    """
    if not isinstance(model.config, ModelConfig):
        raise ValueError("only a model made by selfvae.build can be saved: this one has no config")
    folder = Path(folder)
    state = {k: v.half() if half and v.is_floating_point() else v for k, v in own_state(model).items()}
    write_tensors(folder / "model.safetensors", state)
    config: dict[str, Any] = {"format": _FORMAT, "model": model.config.to_dict()}
    write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def load(path: str | Path) -> SelfVAE:
    """The model in a folder that `save` or training wrote, or one of `shipped`; on the CPU, ready for use.

    Raises FileNotFoundError or ValueError saying what the folder lacks.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        folder = shipped().get(str(path), folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no model: {name} is missing (expected config.json and model.safetensors, "
                f"as selfvae train writes them, or one of {', '.join(shipped())})"
            )
    config = json.loads((folder / "config.json").read_text())
    if not isinstance(config, dict) or "model" not in config or config.get("format") != _FORMAT:
        raise ValueError(
            f"{folder}/config.json must be {{'format': {_FORMAT}, 'model': ...}}; got {str(config)[:50]}: "
            "use the version of selfvae that wrote it"
        )
    model = from_config(ModelConfig.from_dict(config["model"]))
    try:
        set_state(model, load_file(folder / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder}/model.safetensors is damaged or not of the model in config.json: {error}"
        ) from None
    return model.eval()
