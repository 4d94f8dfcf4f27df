"""What a training run writes: the checkpoint to resume from, the one before, and the curve."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfvae import hub
from selfvae.files import write_atomic, write_tensors
from selfvae.model import SelfVAE
from selfvae.nn.autoregressive import AutoregressiveDecoder
from selfvae.presets import FORMAT, ModelConfig
from selfvae.training.config import TrainConfig
from selfvae.training.graphs import GraphedPass
from selfvae.training.guard import Guard
from selfvae.transforms import Null

__all__ = [
    "CHECKPOINT",
    "PREVIOUS",
    "Checkpoint",
    "Log",
    "State",
    "check_free",
    "check_same_model",
    "read_checkpoint",
    "take_weights",
]

# in a run's folder; the one before serves if the last one is damaged
CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint-previous.safetensors"

_log = logging.getLogger("selfvae")


class Log:
    """A CSV file with one row per logged step; a resumed run drops the rows after its checkpoint.

    Args:
        path: of the file.
        step: of the checkpoint; 0: a new run.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if step and path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, by column; the file is written anew, whole or not at all."""
        self.rows.append(row)
        out = io.StringIO()
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomic(self.path, out.getvalue().encode())


@dataclass
class State:
    """Everything that changes during training.

    Attributes:
        model: the weights that are trained.
        ema: their moving average.
        optimizer: of the model's parameters.
        guard: against outlying gradients.
        step: optimizer steps made.
        seconds, cpu_seconds: of training, over all parts of a resumed run.
        best: lowest validation score, bits/dim.
        since_best: evaluations since then.
    """

    model: SelfVAE
    ema: SelfVAE
    optimizer: torch.optim.Optimizer
    guard: Guard
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best: float = math.inf
    since_best: int = 0
    graphed: GraphedPass | None = None  # where CUDA graphs are used

    _numbers = ("step", "seconds", "cpu_seconds", "best", "since_best")

    def spent(self, clock: Literal["wall", "cpu"]) -> float:
        """Seconds of training by a clock: wall time, or this process's processor time."""
        return self.cpu_seconds if clock == "cpu" else self.seconds

    def save(self, out: Path, config: TrainConfig) -> None:
        """Write everything needed to resume as out/CHECKPOINT, and keep the one before as out/PREVIOUS."""
        tensors: dict[str, Tensor] = dict(self.guard.state())
        for prefix, model in (("model", self.model), ("ema", self.ema)):
            tensors |= {f"{prefix}.{k}": v for k, v in hub.unique_state_dict(model).items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in values.items()}
        numbers = {name: getattr(self, name) for name in self._numbers}
        assert isinstance(self.model.config, ModelConfig)
        metadata = {
            "format": str(FORMAT),
            "model": json.dumps(self.model.config.to_dict()),
            "train": json.dumps(dataclasses.asdict(config)),
            "state": json.dumps(numbers),
        }
        metadata["checksum"] = _checksum(tensors, metadata)
        new = out / f".{CHECKPOINT}.new"
        write_tensors(new, tensors, metadata)
        if (out / CHECKPOINT).exists():
            (out / CHECKPOINT).replace(out / PREVIOUS)
        new.replace(out / CHECKPOINT)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take what `save` wrote into models and an optimizer of the same structure.

        Raises:
            ValueError: if it lacks something.
        """
        try:
            self._restore(checkpoint.tensors, json.loads(checkpoint.metadata["state"]))
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{checkpoint.path} is no checkpoint of this model ({error!r})") from None

    def _restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        for prefix, model in (("model.", self.model), ("ema.", self.ema)):
            part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            hub.load_unique_state_dict(model, part)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".", 2)
                state.setdefault(int(i), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.guard.restore(tensors)
        for name in self._numbers:
            setattr(self, name, numbers[name])


class Checkpoint(NamedTuple):
    """What a checkpoint holds: its file, the tensors by name, and what describes them."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_checkpoint(out: Path) -> Checkpoint:
    """Read the last checkpoint in a run's folder, or, if it is damaged, the one before, and say so.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if none is whole.
    """
    there = [path for path in (out / CHECKPOINT, out / PREVIOUS) if path.exists()]
    if not there:
        raise FileNotFoundError(f"nothing to resume: {out / CHECKPOINT} does not exist")
    wrong = "" if there[0].name == CHECKPOINT else f"no {CHECKPOINT}"
    for path in there:
        try:
            found = _read(path)
        except ValueError as error:
            wrong = wrong or str(error)
            continue
        if wrong:
            _log.warning("%s: going on from the one before", wrong)
        return found
    raise ValueError(f"{wrong}: begin another run with --init-from {out}")


def _read(path: Path) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                tensors[key] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if metadata.get("checksum", "") not in ("", _checksum(tensors, metadata)):  # the first ones had none
        raise ValueError(f"{path} is damaged (its checksum does not fit)")
    return Checkpoint(path, tensors, metadata)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of all tensors, the settings and the state of a run, 8 hexadecimal digits."""
    found = zlib.crc32(json.dumps([metadata.get(name) for name in ("model", "train", "state")]).encode())
    for name, value in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), found)
        values = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(values.numpy().data, found)
    return f"{found:08x}"


def check_same_model(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise ValueError if a checkpoint is of another model or of a later format."""
    path, metadata = checkpoint.path, checkpoint.metadata
    if not {"model", "state"} <= metadata.keys():
        raise ValueError(f"{path} is not a checkpoint: expected one that selfvae train wrote")
    version = metadata.get("format", "1")  # the first ones did not say
    if not version.isdecimal() or int(version) > FORMAT:
        raise ValueError(
            f"{path} has format {version}; this version of selfvae goes on from 1 to {FORMAT}: "
            "use the one that wrote it"
        )
    try:
        saved = ModelConfig.from_dict(json.loads(metadata["model"]), int(version))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} describes no model: {error}") from None
    if saved != config:
        raise ValueError(
            f"{path} is of another model; saved and asked for differ in "
            f"{_differences(saved, config)}: leave those flags as they were"
        )


def _differences(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[Any, Any]]:
    now = b.to_dict()
    return {k: (v, now[k]) for k, v in a.to_dict().items() if now[k] != v}


def is_wider(config: ModelConfig, start: ModelConfig) -> bool:
    """Whether a model differs from another one by more channels in residual networks without latents."""
    same = dataclasses.replace(start, width=config.width, level_width=config.level_width) == config
    return same and config.width > start.width and (config.backbone, config.latents) == ("residual", "none")


def _widened(model: SelfVAE, start: SelfVAE) -> dict[str, Tensor]:
    """The weights of a wider model, which make it compute what a narrower one does.

    Channels that both have are computed from these alone. The others keep the weights of the wider model,
    and change nothing until training makes use of them.

    Source: after Chen et al. 2016 (Net2Net), who copy channels instead.
    """
    narrow, found = hub.unique_state_dict(start), {}
    parts = {  # features of each group of pixels follow each other: they are widened one by one
        f"{name}.decoder.{tensor}": len(module.groups)
        for name, module in model.named_modules()
        if isinstance(module, AutoregressiveDecoder)
        for tensor, _ in module.decoder.named_parameters()
        if tensor == "params" or "head" in tensor.split(".")
    }
    for name, value in hub.unique_state_dict(model).items():
        found[name] = value.clone()
        new, old = found[name], narrow[name]
        if name in parts:
            new, old = (v.view(parts[name], -1, *v.shape[1:]) for v in (new, old))
        if old.shape == new.shape:
            new.copy_(old)
            continue
        rows = old.shape[: 2 if name in parts else 1]
        new[tuple(map(slice, rows))] = 0
        new[tuple(map(slice, old.shape))] = old
    return found


def has_another_top(config: ModelConfig, start: ModelConfig) -> bool:
    """Whether a model differs from another one in its coarsest levels only."""
    top = (
        "transforms", "latents", "latent_channels", "prior", "prior_components", "posterior", "top_width",
        "top_autoregressive",
    )  # fmt: skip
    same = dataclasses.replace(start, **{name: getattr(config, name) for name in top}) == config
    return same and config != start and config.backbone == "residual" and not config.shared


def _with_another_top(model: SelfVAE, start: SelfVAE) -> dict[str, Tensor]:
    """The weights of a model, with those of the finest levels of another one, as far as these are alike.

    If all but the coarsest are, also those of its networks that are.
    """
    found, given = hub.unique_state_dict(model), hub.unique_state_dict(start)

    def take(prefix: str) -> bool:
        """Take the tensors with a prefix if their shapes fit, and return whether they do."""
        own, theirs = (
            {name: value for name, value in tensors.items() if name.startswith(prefix)}
            for tensors in (found, given)
        )
        alike = _shapes(own) == _shapes(theirs)
        if alike:
            found.update(theirs)
        return alike

    for k, (level, other) in enumerate(zip(model.levels, start.levels, strict=False)):
        if str(level.transform) != str(other.transform):
            break
        if isinstance(level.transform, Null):
            for part in ("encoder", "prior_net", "decoder"):
                take(f"levels.{k}.{part}.")
        elif not take(f"levels.{k}."):
            break
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def take_weights(model: SelfVAE, start: SelfVAE) -> None:
    """Copy the weights of `start` into a model.

    An integer model also takes those of its float twin; its steps are then still to be chosen. A
    wider model (see `is_wider`), which must be initialised, then computes the same. One with another top
    (see `has_another_top`), which must be initialised too, takes those of the finest levels.

    Raises:
        ValueError: if they are not of the same shapes; the message says which settings differ.
    """
    try:
        wider = is_wider(model.config, start.config)
        if has_another_top(model.config, start.config):
            weights = _with_another_top(model, start)
        else:
            weights = _widened(model, start) if wider else hub.unique_state_dict(start)
        if model.config.integer and not start.config.integer:
            weights = {**hub.unique_state_dict(model), **weights}
        hub.load_unique_state_dict(model, weights)
    except RuntimeError:
        raise ValueError(
            "the weights to start from do not fit; their model and the run's differ in "
            f"{_differences(start.config, model.config)}; data of another size: --image-size, "
            "selfvae prepare-crops"
        ) from None


def check_free(out: Path) -> None:
    """Raise FileExistsError if a folder holds a run or a model that training would overwrite."""
    if any((out / name).exists() for name in (CHECKPOINT, PREVIOUS, "model.safetensors")):
        raise FileExistsError(f"{out} holds a run already: pass --resume to go on, or another --out")
