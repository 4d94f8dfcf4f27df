"""One training loop: any model, any device, resumable to the bit.

All random numbers of step t depend only on (seed, t, rank), so on the CPU a run that is killed and resumed
makes the same steps as one that is not, to the bit.
"""

from __future__ import annotations

import copy
import math
import operator
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
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
from selfvae.distributed import accelerator, launch_fabric, make_fabric
from selfvae.distributions.latents import DiagonalNormal
from selfvae.distributions.priors import MixturePrior
from selfvae.metrics.likelihood import check_values, evaluate
from selfvae.model import SelfVAE
from selfvae.nn.integer import choose_steps
from selfvae.nn.layers import checkpoint_activations
from selfvae.nn.precision import resolve
from selfvae.presets import ModelConfig, from_config
from selfvae.terms import Terms, bits_per_dim
from selfvae.training.checkpoint import (
    Log,
    State,
    check_free,
    check_same_model,
    has_another_top,
    is_wider,
    read_checkpoint,
    take_weights,
)
from selfvae.training.config import TrainConfig
from selfvae.training.graphs import GraphedPass
from selfvae.training.guard import Guard
from selfvae.training.optim import make_optimizer

__all__ = ["make_step", "prepare", "train"]

_STEP_IMAGES = 32  # on which the steps of an integer model's activations are chosen
_PRIOR_IMAGES = 2**14  # to whose posteriors a mixture prior is fitted, at most


def _seed(*parts: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1))


def _loss(terms: Terms, dims: int, config: TrainConfig, step: int) -> Tensor:
    """The training objective in bits/dim: the bound, with what was asked for beyond it."""
    loss = torch.stack([term.mean() for term in terms.re]).sum()
    weight = min(1.0, (step + 1) / config.kl_warmup) if config.kl_warmup else 1.0
    free = config.free_bits * math.log(2) * dims
    for term in terms.kl:
        kl = term.mean()
        loss = loss + weight * (kl.clamp(min=free) if free else kl)
    out = bits_per_dim(loss, dims)
    for errors in terms.errors:
        out = out + config.l1_weight * errors.mean()
    return out


def _forward_backward(fabric: Fabric, model: Any, x: Tensor, config: TrainConfig, step: int) -> Terms:
    """Add the gradients of the loss on a batch, in its parts; returns the terms of the last part."""
    terms, parts = None, x.chunk(config.grad_accum)
    for i, part in enumerate(parts):
        with fabric.no_backward_sync(model, enabled=i + 1 < len(parts)):
            terms = model(part, errors=config.l1_weight > 0, levels=config.levels)
            fabric.backward(_loss(terms, x[0].numel(), config, step) / len(parts))
    assert terms is not None
    return terms


@torch.no_grad()
def _update_ema(ema: SelfVAE, model: SelfVAE, config: TrainConfig, step: int) -> None:
    decay = min(config.ema, (step + 1) / (step + 10))
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), step)


def prepare(model: SelfVAE, fabric: Fabric, config: TrainConfig) -> tuple[Any, State]:
    """Make a model ready for training: on its device, in its memory layout, with an optimizer.

    Args:
        model: initialised on data; changed in place.
        fabric: launched.
        config: how it is trained.

    Returns:
        The model as `make_step` takes it (of the class that Fabric wraps it in), and the state of step 0.
    """
    model.to(fabric.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    mixtures = [p for m in model.modules() if isinstance(m, MixturePrior) for p in m.parameters()]
    wrapped, optimizer = fabric.setup(model, make_optimizer(model.parameters(), config, mixtures))
    state = State(model, ema, optimizer, Guard(config, fabric.device))
    if config.cuda_graphs and fabric.device.type == "cuda" and fabric.world_size == 1:
        state.graphed = GraphedPass(
            model, partial(_forward_backward, fabric, wrapped, config=config, step=0)
        )
    return wrapped, state


def make_step(
    fabric: Fabric, model: Any, state: State, x: Tensor, config: TrainConfig
) -> tuple[Terms, Tensor]:
    """Make one optimizer step and update the moving average.

    Args:
        fabric, model, state: as `prepare` gives them.
        x: this process's part of the batch, uint8 (B, C, H, W), on its device.
        config: how it is trained.

    Returns:
        The terms of the last part of x (see `TrainConfig.grad_accum`), in nats, and the gradient's norm
        before it was clipped, a scalar.
    """
    # only here, so that the memory of the last step's gradients goes to this step's activations
    state.optimizer.zero_grad()
    if state.graphed is None:
        terms = _forward_backward(fabric, model, x, config, state.step)
    else:
        terms = state.graphed(x)
    norm = state.guard([p.grad for p in state.model.parameters() if p.grad is not None])
    state.optimizer.step()
    _update_ema(state.ema, state.model, config, state.step)
    return terms, norm


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM ends the loop after the step in hand; the list holds it."""
    came: list[int] = []
    kept: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
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


class _Clock:
    """Adds the time of this process to what a resumed run took before."""

    def __init__(self, state: State) -> None:
        self.state, self.before = state, (state.seconds, state.cpu_seconds)
        self.began, self.cpu_began, self.first_step = time.monotonic(), time.process_time(), state.step

    def tick(self) -> None:
        """Bring the state's times up to date."""
        self.state.seconds = self.before[0] + time.monotonic() - self.began
        self.state.cpu_seconds = self.before[1] + time.process_time() - self.cpu_began

    def steps_per_second(self) -> float:
        """Since this process began, all its work counted."""
        return (self.state.step - self.first_step) / max(1e-9, time.monotonic() - self.began)


@dataclass
class _Run:
    """A run in one process: the steps that `train` is made of."""

    model: Any  # as Fabric wraps it
    state: State
    data: Dataset
    out: Path
    config: TrainConfig
    fabric: Fabric
    quiet: bool
    evaluation: dict[str, float] = field(default_factory=dict)  # the last one, until it is logged

    def __post_init__(self) -> None:
        self.name, self.first = self.state.model.config.name, self.fabric.global_rank == 0
        self.clock, self.log = _Clock(self.state), Log(self.out / "log.csv", self.state.step)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            disable=self.quiet or not self.first, console=Console(stderr=True),
        )  # fmt: skip
        self.task = self.bar.add_task(self.name, total=self.config.steps, completed=self.state.step)

    def batch(self) -> Tensor:
        """This process's part of the batch of the step in hand."""
        config, rank, world = self.config, self.fabric.global_rank, self.fabric.world_size
        chosen = batch_indices(len(self.data.train), config.batch_size, self.state.step, config.seed)
        x = self.data.train.take(chosen[rank::world]).to(self.fabric.device, non_blocking=True)
        return augment(x, flip=config.flip, translate=config.translate)

    def step(self) -> tuple[Terms, Tensor]:
        """One optimizer step, as `make_step`."""
        config, state = self.config, self.state
        for group in state.optimizer.param_groups:
            group["lr"] = config.rate(state.step, state.spent(config.clock))
        _seed(config.seed, state.step, self.fabric.global_rank)
        found = make_step(self.fabric, self.model, state, self.batch(), config)
        state.step += 1
        self.clock.tick()
        return found

    def interrupted(self, came: list[int]) -> bool:
        """Whether a signal ends the run: in every process alike."""
        if self.fabric.world_size == 1:
            return bool(came)
        # all processes must end together: they agree now and then
        agree = self.state.step % self.config.log_every == 0
        return agree and bool(self.fabric.all_reduce(torch.tensor(float(bool(came))), reduce_op="sum"))

    def complete(self) -> bool:
        """Whether the run has made its steps, or spent its time (which only a single process may limit)."""
        config, state = self.config, self.state
        return state.step == config.steps or 0 < config.max_seconds <= state.spent(config.clock)

    def evaluate(self) -> None:
        """Score the averaged model on validation images, and draw samples."""
        config, state = self.config, self.state
        _seed(config.seed, state.step - 1, 2**31)
        images = self.data.validation
        scores = evaluate(state.ema, images, limit=config.eval_images, batch_size=64, levels=config.levels)
        state.ema.eval()  # drops the weights that scoring kept
        self.evaluation = {"val_bits_per_dim": round(scores["bits_per_dim"], 5)}
        if state.step % config.eval_every == 0:  # one out of turn must not count
            score = self.fabric.broadcast(scores["bits_per_dim"])
            state.since_best = 0 if score < state.best else state.since_best + 1
            state.best = min(state.best, score)
        if self.first:
            save_grid(self.draw(16), self.out / f"samples/{state.step:07d}.png")

    @torch.no_grad()
    def draw(self, n: int) -> Tensor:
        """Draw images of the finest level that is trained: uint8 (n, c, h, w)."""
        ema, levels = self.state.ema, self.config.levels
        blank = ema.blank(n, *self.data.train.shape[2:])
        down = (levels[0], len(ema.levels) - 1) if levels else None
        return ema.walk(lambda name, p: p.sample(), blank, down)

    def report(self, terms: Terms, norm: Tensor) -> None:
        """Write a row of log.csv and say how far it is; FloatingPointError if all gradients are dropped."""
        state = self.state
        values = {
            f"{kind}{k}": term.detach().mean().item()
            for k, both in enumerate(zip(terms.re, terms.kl, strict=True))
            for kind, term in zip(("re", "kl"), both, strict=True)
        }
        loss, dropped = sum(values.values()), int(state.guard.dropped.item())
        loss /= math.log(2) * math.prod(self.data.train.shape[1:])
        row: dict[str, float | str] = {
            "step": state.step,
            "seconds": round(state.seconds, 1),
            "cpu_seconds": round(state.cpu_seconds, 1),
            "bits_per_dim": round(loss, 5),
            **{name: round(value, 2) for name, value in values.items()},
            "grad_norm": round(norm.item(), 5),
            "dropped": dropped,
            **(self.evaluation or {"val_bits_per_dim": ""}),
        }
        self.evaluation = {}
        if self.first:
            self.log.write(row)
        speed = self.clock.steps_per_second() * self.config.batch_size
        text = f"{self.name} {loss:.3f} bits/dim, {speed:.0f} images/s"
        if math.isfinite(state.best):
            text += f", best validation {state.best:.3f}"
        if dropped:
            text += f", {dropped} gradients dropped"
        self.bar.update(self.task, description=text)
        if state.guard.dropped_in_a_row.item() >= 1000:
            self.save()
            raise FloatingPointError(
                "the last 1000 gradients were all dropped as outliers or not finite; the run "
                "is saved as it is: lower --lr, or use --precision 32-true"
            )

    def show(self) -> None:
        """Move the progress bar: towards the last step or the time limit, whichever comes first."""
        done, total = self.state.step, self.config.steps
        if self.config.max_seconds:
            spent = max(1e-9, self.state.spent(self.config.clock))
            total = min(total, round(done * max(1.0, self.config.max_seconds / spent)))
        self.bar.update(self.task, completed=done, total=total)

    def save(self) -> None:
        """Write the checkpoint and the averaged model."""
        if self.first:
            self.state.save(self.out, self.config)
            hub.save(self.state.ema, self.out)


def _check_devices(config: TrainConfig, fabric: Fabric) -> None:
    """Raise ValueError for a number or kind of devices that a run cannot have."""
    parts = fabric.world_size * config.grad_accum
    if fabric.device.type == "mps":
        raise ValueError(
            f"Apple GPUs have no float64, which models need: use accelerator={accelerator()!r}"
        )
    if config.max_seconds and fabric.world_size > 1:
        raise ValueError("max_seconds ends by one process's clock: use --steps with several processes")
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of devices x grad_accum = {parts}; got {config.batch_size}"
        )


def _check_levels(config: ModelConfig, model: SelfVAE, levels: tuple[int, int] | None) -> None:
    """Raise ValueError for levels that cannot be trained without the others."""
    if levels is None:
        return
    if sum(level.has_latent for level in model.levels) > 1:
        raise ValueError(
            f"levels needs a model of at most one latent: set latents=none or top; got {config.latents}"
        )
    if levels[1] >= len(model.levels):
        raise ValueError(
            f"levels must lie between 0 and {len(model.levels) - 1} for this model; got {levels[1]}"
        )


@torch.no_grad()
def _fit_mixture(model: SelfVAE, data: Dataset, config: TrainConfig, fabric: Fabric) -> None:
    """Fit a mixture prior of the top latent to the posteriors of training images, flipped too if asked."""
    chosen = batch_indices(len(data.train), min(len(data.train), _PRIOR_IMAGES), 0, config.seed)
    mean, var = list[Tensor](), list[Tensor]()
    for part in np.array_split(chosen, -(-len(chosen) // 64)):
        x = data.train.take(part).to(fabric.device)
        x = torch.cat([x, x.flip(3)]) if config.flip else x
        q = model.levels[-1].posterior(model.pyramid(x)[-1])
        assert isinstance(q, DiagonalNormal)
        mean.append(q.mean)
        var.append(q.log_var.exp())
    prior = model.levels[-1].prior_net
    assert isinstance(prior, MixturePrior)
    prior.fit(torch.cat(mean), torch.cat(var))


def _begin(
    model_config: ModelConfig, data: Dataset, config: TrainConfig, init_from: SelfVAE | None, fabric: Fabric
) -> tuple[Any, State]:
    """The model and the state that a new run starts with; the same in every process."""
    _seed(config.seed, 2**32 - 1)
    model = from_config(model_config).to(fabric.device)
    check_values(model, data.train)
    _check_levels(model_config, model, config.levels)
    partly = init_from is not None and (
        is_wider(model_config, init_from.config) or has_another_top(model_config, init_from.config)
    )
    if init_from is not None and not partly:
        take_weights(model, init_from)
    # every process initialises on the whole first batch, so all start alike
    chosen = batch_indices(len(data.train), config.batch_size, 0, config.seed)
    model.initialise(data.train.take(chosen).to(fabric.device))
    if init_from is not None and partly:
        take_weights(model, init_from)
        kind = operator.attrgetter("latents", "prior", "prior_components")
        if model_config.prior == "mog" and kind(model_config) != kind(init_from.config):
            _fit_mixture(model, data, config, fabric)
    if init_from is not None and model_config.integer and not init_from.config.integer:
        x = data.train.take(batch_indices(len(data.train), _STEP_IMAGES, 0, config.seed)).to(fabric.device)
        choose_steps(model, lambda: model(x).elbo.mean().neg().item())
    return prepare(model, fabric, config)


def _go_on(
    model_config: ModelConfig, data: Dataset, config: TrainConfig, out: Path, fabric: Fabric
) -> tuple[Any, State]:
    """The model and the state that a run left in `out`; ValueError if they do not fit, or time is spent."""
    checkpoint = read_checkpoint(out)
    check_same_model(checkpoint, model_config)
    model = from_config(model_config).to(fabric.device)
    check_values(model, data.train)
    wrapped, state = prepare(model, fabric, config)
    state.restore(checkpoint)
    spent = state.spent(config.clock)
    if 0 < config.max_seconds <= spent:
        raise ValueError(
            f"{out} has been trained for {spent:.0f} s of {config.max_seconds:g} s ({config.clock} clock), "
            "which count over all its parts: raise max_seconds, or set it to 0 for no limit"
        )
    return wrapped, state


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
    """Train a model; leaves model, checkpoint, curve and samples in a folder.

    Writes out/config.json and model.safetensors (the averaged weights, see `hub.load`),
    checkpoint.safetensors (to resume from), log.csv and samples/*.png. Interrupted by Ctrl-C it saves
    and returns; ended by SIGTERM, as by a scheduler, it saves and exits with status 143.

    Args:
        model_config: the model's structure, e.g. `build(...).config`.
        data: images uint8 of the model's shape; see `sources.load`.
        out: folder of the run.
        config: how it is trained.
        init_from: a trained model of the same structure whose weights a new run begins with, or a narrower
            one without latents: the run begins at what that computes; or one with another top: the run
            begins with its finest levels, and a mixture prior in place of another fitted to posteriors.
        resume: go on with the run in `out`; on the CPU the steps are those of a run without a break.
        fabric: devices and precision; by default one device as `distributed.accelerator` says.
        quiet: show no progress bar.

    Returns:
        The averaged model, in eval mode.

    Raises:
        FileExistsError: if `out` holds a run and resume is False.
        FileNotFoundError: if it holds none and resume is True.
        ValueError: if the data, the checkpoint or the devices do not fit, or no time is left.
        FloatingPointError: if 1000 gradients in a row were dropped.
        SystemExit: ended by SIGTERM.
    """
    out = Path(out)
    if not resume:
        check_free(out)
    fabric = fabric or make_fabric(precision=resolve(config.precision, accelerator()))
    launch_fabric(fabric)
    _check_devices(config, fabric)
    if resume:
        model, state = _go_on(model_config, data, config, out, fabric)
    else:
        model, state = _begin(model_config, data, config, init_from, fabric)
    run = _Run(model, state, data, out, config, fabric, quiet)
    ends = state.step >= config.steps
    with run.bar, _interruptible() as came:
        while not ends:
            terms, norm = run.step()
            ends, interrupted = run.complete(), run.interrupted(came)
            if ends or state.step % config.eval_every == 0:
                run.evaluate()
                ends = ends or 0 < config.patience <= state.since_best
            ends = ends or interrupted  # which leaves time for nothing but saving
            if ends or state.step % config.log_every == 0:
                run.report(terms, norm)
            run.show()
            if ends or state.step % config.checkpoint_every == 0:
                run.save()
    if signal.SIGTERM in came:
        raise SystemExit(128 + signal.SIGTERM)
    return state.ema
