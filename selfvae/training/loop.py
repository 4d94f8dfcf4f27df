"""One training loop: any model, any device, resumable to the bit.

Everything random in step t follows from (seed, t, rank) alone, so on the CPU a run that is killed and
resumed makes the same steps as one that is not, to the bit.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from selfvae import hub
from selfvae.data.batches import Dataset, augment, batch_indices
from selfvae.data.sheets import save_grid
from selfvae.distributed import launch_fabric
from selfvae.metrics.likelihood import check_values, evaluate
from selfvae.model import SelfVAE
from selfvae.nn.layers import checkpoint_activations
from selfvae.nn.precision import resolve
from selfvae.operations import generate
from selfvae.presets import ModelConfig, from_config
from selfvae.terms import Terms, bits_per_dim
from selfvae.training.checkpoint import Log, State, check_free, check_same_model, take_weights
from selfvae.training.config import TrainConfig
from selfvae.training.graphs import GraphedPass
from selfvae.training.guard import Guard
from selfvae.training.optim import OPTIMIZERS

__all__ = ["make_step", "prepare", "train"]


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


def _forward_backward(fabric: Fabric, model: Any, x: Tensor, config: TrainConfig, step: int) -> Terms:
    """Add the gradients of the loss on a batch, in its parts; returns the terms of the last part."""
    terms, parts = None, x.chunk(config.grad_accum)
    for i, part in enumerate(parts):
        with fabric.no_backward_sync(model, enabled=i + 1 < len(parts)):
            terms = model(part)
            fabric.backward(_loss(terms, x[0].numel(), config, step) / len(parts))
    assert terms is not None
    return terms


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
    kind = OPTIMIZERS[config.optimizer]
    wrapped, optimizer = fabric.setup(model, kind(model.parameters(), lr=config.rate(0)))
    state = State(model, ema, optimizer, Guard(config, fabric.device))
    if config.cuda_graphs and fabric.device.type == "cuda" and fabric.world_size == 1:
        state.graphed = GraphedPass(
            model, partial(_forward_backward, fabric, wrapped, config=config, step=0)
        )
    return wrapped, state


def make_step(
    fabric: Fabric, model: Any, state: State, x: Tensor, config: TrainConfig
) -> tuple[Terms, Tensor]:
    """One step on this process's part of a batch, uint8 (B, C, H, W).

    Returns the terms of its last part (see `TrainConfig.grad_accum`) and the gradient's norm.
    """
    if state.graphed is None:
        terms = _forward_backward(fabric, model, x, config, state.step)
    else:
        terms = state.graphed(x)
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


def train(
    model_config: ModelConfig,
    data: Dataset,
    out: str | Path,
    config: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
    *,
    init_from: SelfVAE | None = None,
    resume: bool = False,
    fabric: Fabric | None = None,
    quiet: bool = False,
) -> SelfVAE:
    """Train and return the averaged model; leave model, checkpoint, curve and samples in `out`.

    Writes out/config.json and model.safetensors (the averaged weights, see `hub.load`),
    checkpoint.safetensors (to resume from), log.csv and samples/*.png. Interrupted by Ctrl-C it saves
    and returns. `init_from`: a trained model whose weights a new run begins with.

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
    part = config.batch_size // (world * config.grad_accum)
    if config.max_seconds and world > 1:
        raise ValueError("max_seconds ends by one process's clock: use --steps with several processes")
    if part * world * config.grad_accum != config.batch_size:
        raise ValueError(
            f"batch_size must be a multiple of devices x accumulate = {world * config.grad_accum}; "
            f"got {config.batch_size}"
        )

    def batch(step: int) -> Tensor:
        chosen = batch_indices(len(data.train), config.batch_size, step, config.seed)
        x = data.train.take(chosen[rank::world]).to(fabric.device, non_blocking=True)
        return augment(x, flip=config.flip, translate=config.translate)

    if resume:
        check_same_model(checkpoint, model_config)
    _seed(config.seed, 2**32 - 1)
    bare = from_config(model_config).to(fabric.device)
    check_values(bare, data.train)
    if not resume:
        if init_from is not None:
            take_weights(bare, init_from)
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
