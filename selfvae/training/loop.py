"""One training loop: any model, any device, resumable to the bit.

Everything random in step t follows from (seed, t, rank) alone, so on the CPU a run that is killed and
resumed makes the same steps as one that is not, to the bit.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from selfvae import hub
from selfvae.data.sheets import save_grid
from selfvae.data.sources import Dataset, augment, batch_indices
from selfvae.distributed import launch_fabric
from selfvae.files import write_atomic, write_tensors
from selfvae.metrics.likelihood import check_values, evaluate
from selfvae.model import SelfVAE
from selfvae.nn.layers import checkpoint_activations
from selfvae.nn.precision import Precision, resolve
from selfvae.operations import generate
from selfvae.presets import ModelConfig, from_config
from selfvae.terms import Terms, bits_per_dim
from selfvae.training.optim import Muon

__all__ = ["TrainConfig", "check_free", "make_step", "prepare", "train"]


_FORMAT = 1  # of checkpoints
_OPTIMIZERS: dict[str, Any] = {"adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW, "muon": Muon}


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; the defaults are the papers' with EMA and clipping added.

    Arguments:
        steps: optimizer steps in all.
        batch_size: images a step, over all devices and accumulated parts.
        optimizer: "adamax", "adamw" or "muon" (see `optim.Muon`).
        lr: learning rate at the start; by default 0.03 for "muon", 0.002 for the others.
        lr_floor: the least learning rate.
        lr_decay: factor a step of the exponential schedule.
        schedule: "exponential" decays by lr_decay a step; "cosine" reaches lr_floor at the last step.
        warmup: steps over which the rate rises from 0.
        kl_warmup: steps over which the weight of the KL terms rises from 0 to 1.
        free_bits: bits/dim (of x) that every latent's KL, averaged over the batch, may cost for free.
        clip: a gradient longer than `clip` times the usual norm is shortened to that.
        skip: one longer than `skip` times the usual norm is dropped.
        ema: decay of the weights' moving average, which is what gets saved and scored.
        flip: random horizontal flips.
        translate: random shifts by up to so many pixels, edges repeated.
        accumulate: parts that a batch is split into to save memory.
        precision: "32-true", "bf16-mixed" (likelihoods stay in float32), or "auto": the faster one here.
        activation_checkpointing: compute what is inside the networks' blocks again in the backward pass:
            less memory, for more time.
        channels_last: memory layout of the networks.
        seed: of the weights, the data order and all noise.
        log_every: steps between rows of log.csv.
        eval_every: steps between validations (and sample grids).
        checkpoint_every: steps between checkpoints.
        eval_images: validation images scored at every evaluation.
        max_seconds: end by the clock if that comes before the last step; "cosine" then follows the clock
            and the run no longer depends on the seed alone. 0: no limit.
        clock: what max_seconds counts: "wall", or "cpu", this process's own time, all threads together,
            whatever else the machine does.
        patience: stop after so many evaluations without a better validation score; 0: never.
    """

    steps: int = 100_000
    batch_size: int = 32
    optimizer: Literal["adamax", "adamw", "muon"] = "adamax"
    lr: float | None = None
    lr_floor: float = 0.0001
    lr_decay: float = 0.999999
    schedule: Literal["exponential", "cosine"] = "exponential"
    warmup: int = 100
    kl_warmup: int = 0
    free_bits: float = 0.0
    clip: float = 2.0
    skip: float = 20.0
    ema: float = 0.9999
    flip: bool = True
    translate: int = 2
    accumulate: int = 1
    precision: Precision = "auto"
    activation_checkpointing: bool = False
    channels_last: bool = True
    seed: int = 0
    log_every: int = 50
    eval_every: int = 1000
    checkpoint_every: int = 1000
    eval_images: int = 512
    max_seconds: float = 0.0
    clock: Literal["wall", "cpu"] = "wall"
    patience: int = 0

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "clip", "skip", "accumulate", "log_every", "eval_every",
                      "checkpoint_every", "eval_images"):  # fmt: skip
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive; got {getattr(self, field)}")
        for field in ("lr_floor", "warmup", "kl_warmup", "free_bits", "translate", "seed", "max_seconds",
                      "patience"):  # fmt: skip
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be finite and not negative; got {getattr(self, field)}")
        for field, known in (
            ("optimizer", tuple(_OPTIMIZERS)),
            ("schedule", ("exponential", "cosine")),
            ("clock", ("wall", "cpu")),
            ("precision", get_args(Precision)),
        ):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}; got {getattr(self, field)!r}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be positive; got {self.lr}")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"lr_decay must be above 0 and at most 1; got {self.lr_decay}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate; got {self.batch_size} and {self.accumulate}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1; got {self.ema}")

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """The learning rate of a step (from 0), begun after so many seconds by the clock."""
        top = self.lr or (0.03 if self.optimizer == "muon" else 0.002)
        if self.schedule == "cosine":
            by_clock = seconds / self.max_seconds if self.max_seconds else 0.0
            part = min(1.0, max(step / self.steps, by_clock))
            rate = self.lr_floor + (top - self.lr_floor) * (1 + math.cos(math.pi * part)) / 2
        else:
            rate = max(self.lr_floor, top * self.lr_decay**step)
        return rate * min(1.0, (step + 1) / self.warmup) if self.warmup else rate


class Guard:
    """Clips large gradients and drops outliers, relative to the usual norm, by a rule that cannot lock up.

    The usual norm is a running geometric mean. A gradient above `clip` times it is shortened to that; one
    above `skip` times it, or one that is not finite, is dropped: it counts as zero. A dropped finite one
    still raises the usual norm by a fixed factor, so where gradients really grow the limit follows within
    some dozen steps. Nothing here waits for the device.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.log_clip, self.log_skip = math.log(config.clip), math.log(config.skip)
        self.log_usual = torch.full((), torch.nan, device=device)
        self.dropped = torch.zeros((), device=device)
        self.dropped_in_a_row = torch.zeros((), device=device)

    def __call__(self, grads: list[Tensor]) -> Tensor:
        """Shorten or zero the gradients in place; the norm they had."""
        norm = torch.nn.utils.get_total_norm(grads)
        finite = torch.isfinite(norm)
        log_norm = torch.log(norm.clamp(min=1e-12))
        usual = torch.where(self.log_usual.isnan(), log_norm, self.log_usual)
        keep = finite & (log_norm < usual + self.log_skip)
        moved = usual + 0.05 * (torch.minimum(log_norm, usual + self.log_skip) - usual)
        self.log_usual = torch.where(finite, moved, self.log_usual)
        self.dropped = self.dropped + ~keep
        self.dropped_in_a_row = torch.where(keep, 0.0, self.dropped_in_a_row + 1)
        shorten = torch.exp((usual + self.log_clip - log_norm).clamp(max=0.0))
        factor = torch.where(keep, shorten, 0.0)
        for grad in grads:
            grad.nan_to_num_(0.0, 0.0, 0.0).mul_(factor)
        return norm

    def state(self) -> dict[str, Tensor]:
        names = ("log_usual", "dropped", "dropped_in_a_row")
        return {f"guard.{name}": getattr(self, name) for name in names}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for key in self.state():
            setattr(self, key.removeprefix("guard."), tensors[key].to(self.log_usual.device))


class Log:
    """A CSV file with one row a logged step; a resumed run drops the rows after its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if step and path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        out = io.StringIO()
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomic(self.path, out.getvalue().encode())


@dataclass
class State:
    """All that changes during training."""

    model: SelfVAE
    ema: SelfVAE
    optimizer: torch.optim.Optimizer
    guard: Guard
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    best: float = math.inf
    since_best: int = 0

    _numbers = ("step", "seconds", "cpu_seconds", "best", "since_best")

    def spent(self, clock: Literal["wall", "cpu"]) -> float:
        """Seconds of training by that clock."""
        return self.cpu_seconds if clock == "cpu" else self.seconds

    def save(self, path: Path, config: TrainConfig) -> None:
        """Everything needed to go on, in one file, written whole or not at all."""
        tensors: dict[str, Tensor] = dict(self.guard.state())
        for prefix, model in (("model", self.model), ("ema", self.ema)):
            tensors |= {f"{prefix}.{k}": v for k, v in hub.unique_state_dict(model).items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in values.items()}
        numbers = {name: getattr(self, name) for name in self._numbers}
        assert isinstance(self.model.config, ModelConfig)
        metadata = {
            "format": str(_FORMAT),
            "model": json.dumps(self.model.config.to_dict()),
            "train": json.dumps(dataclasses.asdict(config)),
            "state": json.dumps(numbers),
        }
        write_tensors(path, tensors, metadata)

    def restore(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            numbers = json.loads(file.metadata()["state"])
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                tensors[key] = file.get_tensor(key)
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


def _check_same_model(checkpoint: Path, config: ModelConfig) -> None:
    """Raise ValueError if a checkpoint is of another model, or of a later format."""
    try:
        with safe_open(checkpoint, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{checkpoint} is damaged ({error}): begin another run with --start {checkpoint.parent}"
        ) from None
    if "model" not in metadata:
        raise ValueError(f"{checkpoint} is no checkpoint of a run: expected what selfvae train writes")
    found = int(metadata.get("format", 1))  # the first ones did not say
    if found > _FORMAT:
        raise ValueError(
            f"{checkpoint} has format {found}; this version of selfvae goes on from 1 to {_FORMAT}: "
            "use the one that wrote it"
        )
    saved = ModelConfig.from_dict(json.loads(metadata["model"]))
    if saved != config:
        raise ValueError(
            f"{checkpoint} is of another model; saved and asked for differ in "
            f"{_differences(saved, config)}: leave those flags as they were"
        )


def _differences(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[Any, Any]]:
    now = b.to_dict()
    return {k: (v, now[k]) for k, v in a.to_dict().items() if now[k] != v}


def _take_weights(model: SelfVAE, start: SelfVAE) -> None:
    """Begin with another model's weights; ValueError if they are not of the same shapes."""
    try:
        hub.load_unique_state_dict(model, hub.unique_state_dict(start))
    except RuntimeError:
        raise ValueError(
            "the weights to start from do not fit; their model and the run's differ in "
            f"{_differences(start.config, model.config)}; data of another size: --image-size, selfvae crop"
        ) from None


def _seed(*parts: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1))


def _loss(terms: Terms, dims: int, config: TrainConfig, step: int) -> Tensor:
    """The training objective in bits/dim: the bound, with KL warm-up and free bits if asked for."""
    loss = torch.stack([term.mean() for term in terms.re]).sum()
    weight = min(1.0, (step + 1) / config.kl_warmup) if config.kl_warmup else 1.0
    free = config.free_bits * math.log(2) * dims
    for term in terms.kl:
        kl = term.mean()
        loss = loss + weight * (kl.clamp(min=free) if free else kl)
    return bits_per_dim(loss, dims)


@torch.no_grad()
def _update_ema(ema: SelfVAE, model: SelfVAE, config: TrainConfig, step: int) -> None:
    decay = min(config.ema, (step + 1) / (step + 10))
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), step)


def prepare(model: SelfVAE, fabric: Fabric, config: TrainConfig) -> tuple[Any, State]:
    """The model as `make_step` takes it, and all that changes; the model itself is moved and laid out."""
    model.to(fabric.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    kind = _OPTIMIZERS[config.optimizer]
    wrapped, optimizer = fabric.setup(model, kind(model.parameters(), lr=config.rate(0)))
    return wrapped, State(model, ema, optimizer, Guard(config, fabric.device))


def make_step(
    fabric: Fabric, model: Any, state: State, x: Tensor, config: TrainConfig
) -> tuple[Terms, Tensor]:
    """One step on this process's part of a batch, uint8 (B, C, H, W).

    Returns the terms of its last part (see `TrainConfig.accumulate`) and the gradient's norm.
    """
    terms, parts = None, x.chunk(config.accumulate)
    dims = x[0].numel()
    for i, part in enumerate(parts):
        with fabric.no_backward_sync(model, enabled=i + 1 < len(parts)):
            terms = model(part)
            fabric.backward(_loss(terms, dims, config, state.step) / len(parts))
    assert terms is not None
    norm = state.guard([p.grad for p in state.model.parameters() if p.grad is not None])
    state.optimizer.step()
    state.optimizer.zero_grad()
    _update_ema(state.ema, state.model, config, state.step)
    return terms, norm


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM ends the loop after the step in hand; the list holds it."""
    came: list[int] = []
    kept: dict[int, Any] = {}

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, kept[number])  # a second one does what it always does

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            kept[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        pass
    try:
        yield came
    finally:
        for kind, handler in kept.items():
            signal.signal(kind, handler)


def _term_columns(terms: Terms) -> dict[str, Tensor]:
    out = {}
    for k, (re, kl) in enumerate(zip(terms.re, terms.kl, strict=True)):
        out[f"re{k}"], out[f"kl{k}"] = re.detach().mean(), kl.detach().mean()
    return out


def check_free(out: Path) -> None:
    """Raise FileExistsError if a folder holds a run or a model that training would overwrite."""
    if (out / "checkpoint.safetensors").exists() or (out / "model.safetensors").exists():
        raise FileExistsError(f"{out} holds a run already: pass --resume to go on, or another --out")


def train(
    model_config: ModelConfig,
    data: Dataset,
    out: str | Path,
    config: TrainConfig = TrainConfig(),
    *,
    start: SelfVAE | None = None,
    resume: bool = False,
    fabric: Fabric | None = None,
    quiet: bool = False,
) -> SelfVAE:
    """Train and return the averaged model; leave model, checkpoint, curve and samples in `out`.

    Writes out/config.json and model.safetensors (the averaged weights, see `hub.load`),
    checkpoint.safetensors (to resume from), log.csv and samples/*.png. Interrupted by Ctrl-C it saves
    and returns. `start`: a trained model whose weights a new run begins with.

    Raises FileExistsError if `out` holds a run and resume is False, FileNotFoundError the other way.
    """
    out = Path(out)
    checkpoint = out / "checkpoint.safetensors"
    if not resume:
        check_free(out)
    if resume and not checkpoint.exists():
        raise FileNotFoundError(f"nothing to resume: {checkpoint} does not exist")
    fabric = fabric or Fabric(devices=1, precision=resolve(config.precision))
    launch_fabric(fabric)
    rank, world = fabric.global_rank, fabric.world_size
    part = config.batch_size // (world * config.accumulate)
    if config.max_seconds and world > 1:
        raise ValueError("max_seconds ends by one process's clock: use --steps with several processes")
    if part * world * config.accumulate != config.batch_size:
        raise ValueError(
            f"batch_size must be a multiple of devices x accumulate = {world * config.accumulate}; "
            f"got {config.batch_size}"
        )

    def batch(step: int) -> Tensor:
        chosen = batch_indices(len(data.train), config.batch_size, step, config.seed)
        x = data.train.take(chosen[rank::world]).to(fabric.device, non_blocking=True)
        return augment(x, flip=config.flip, translate=config.translate)

    if resume:
        _check_same_model(checkpoint, model_config)
    _seed(config.seed, 2**32 - 1)
    bare = from_config(model_config).to(fabric.device)
    check_values(bare, data.train)
    if not resume:
        if start is not None:
            _take_weights(bare, start)
        # every process initialises on the whole first batch, so all start alike
        chosen = batch_indices(len(data.train), config.batch_size, 0, config.seed)
        bare.initialise(data.train.take(chosen).to(fabric.device))
    model, state = prepare(bare, fabric, config)
    if resume:
        state.restore(checkpoint)
    dims = math.prod(model_config.image_shape)
    log = Log(out / "log.csv", state.step)
    evaluation: dict[str, Any] = {}

    def keep() -> None:
        if rank == 0:
            state.save(checkpoint, config)
            hub.save(state.ema, out)

    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        disable=quiet or rank > 0, console=Console(stderr=True),
    )  # fmt: skip
    task = progress.add_task(model_config.name, total=config.steps, completed=state.step)
    began, cpu_began, done_before = time.monotonic(), time.process_time(), state.step
    seconds_before, cpu_before = state.seconds, state.cpu_seconds
    with progress, _interruptible() as came:
        while state.step < config.steps:
            step = state.step
            for group in state.optimizer.param_groups:
                group["lr"] = config.rate(step, state.spent(config.clock))
            _seed(config.seed, step, rank)
            terms, norm = make_step(fabric, model, state, batch(step), config)
            state.step = step + 1
            state.seconds = seconds_before + time.monotonic() - began
            state.cpu_seconds = cpu_before + time.process_time() - cpu_began

            spent = state.spent(config.clock)
            stop = bool(came) or 0 < config.max_seconds <= spent
            if world > 1:  # all processes must end together: they agree now and then
                agree = state.step % config.log_every == 0
                stop = agree and bool(fabric.all_reduce(torch.tensor(float(stop)), reduce_op="sum"))
            ends = stop or state.step == config.steps
            if state.step % config.eval_every == 0 or ends:
                _seed(config.seed, step, 2**31)
                scores = evaluate(state.ema, data.validation, limit=config.eval_images, batch_size=64)
                state.ema.eval()  # drops the weights that scoring kept
                evaluation = {"val_bits_per_dim": round(scores["bits_per_dim"], 5)}
                if state.step % config.eval_every == 0:  # one out of turn must not count
                    score = fabric.broadcast(scores["bits_per_dim"])
                    state.since_best = 0 if score < state.best else state.since_best + 1
                    state.best = min(state.best, score)
                if rank == 0:
                    picture = generate(state.ema, 16, *model_config.image_shape[1:])
                    save_grid(picture, out / f"samples/{state.step:07d}.png")
                ends = ends or (0 < config.patience <= state.since_best)
            if state.step % config.log_every == 0 or ends:
                values = {k: v.item() for k, v in _term_columns(terms).items()}
                loss = sum(values.values()) / (math.log(2) * dims)
                row = {
                    "step": state.step,
                    "seconds": round(state.seconds, 1),
                    "cpu_seconds": round(state.cpu_seconds, 1),
                    "bits_per_dim": round(loss, 5),
                    **{k: round(v, 2) for k, v in values.items()},
                    "grad_norm": round(norm.item(), 5),
                    "dropped": int(state.guard.dropped.item()),
                    **(evaluation or {"val_bits_per_dim": ""}),
                }
                evaluation = {}
                if rank == 0:
                    log.write(row)
                elapsed = max(1e-9, time.monotonic() - began)
                rate = (state.step - done_before) * config.batch_size / elapsed
                text = f"{model_config.name} {loss:.3f} bits/dim, {rate:.0f} images/s"
                if math.isfinite(state.best):
                    text += f", best validation {state.best:.3f}"
                if row["dropped"]:
                    text += f", {row['dropped']} gradients dropped"
                progress.update(task, description=text)
                if state.guard.dropped_in_a_row.item() >= 1000:
                    keep()
                    raise FloatingPointError(
                        "the last 1000 gradients were all dropped as outliers or not finite; the run "
                        "is saved as it is: lower --lr, or use --precision 32-true"
                    )
            done, total = state.step, config.steps
            if config.max_seconds:  # whichever limit comes first
                total = min(total, round(done * max(1.0, config.max_seconds / max(1e-9, spent))))
            progress.update(task, completed=done, total=total)
            if state.step % config.checkpoint_every == 0 or ends:
                keep()
            if ends:
                break
    return state.ema
