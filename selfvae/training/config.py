"""The settings of training; free of torch, so that the command line can explain them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from selfvae.nn.precision import Precision

__all__ = ["TrainConfig"]


Optimizer = Literal["adamax", "adamw", "muon"]


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
        clip: a gradient longer than `clip_factor` times the usual norm is shortened to that.
        skip: one longer than `skip_factor` times the usual norm is dropped.
        ema: decay of the weights' moving average, which is what gets saved and scored.
        flip: random horizontal flips.
        translate: random shifts by up to so many pixels, edges repeated.
        accumulate: parts that a batch is split into to save memory.
        precision: "32-true", "bf16-mixed" (likelihoods stay in float32), or "auto": the faster one here.
        activation_checkpointing: compute what is inside the networks' blocks again in the backward pass:
            less memory, for more time.
        channels_last: memory layout of the networks.
        cuda_graphs: record the forward and backward pass once and replay it: faster on one CUDA GPU;
            needs kl_warmup=0, and has no effect on other devices or with several processes.
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
    optimizer: Optimizer = "adamax"
    lr: float | None = None
    min_lr: float = 0.0001
    lr_decay: float = 0.999999
    schedule: Literal["exponential", "cosine"] = "exponential"
    warmup: int = 100
    kl_warmup: int = 0
    free_bits: float = 0.0
    clip_factor: float = 2.0
    skip_factor: float = 20.0
    ema: float = 0.9999
    flip: bool = True
    translate: int = 2
    grad_accum: int = 1
    precision: Precision = "auto"
    activation_checkpointing: bool = False
    channels_last: bool = True
    cuda_graphs: bool = False
    seed: int = 0
    log_every: int = 50
    eval_every: int = 1000
    checkpoint_every: int = 1000
    eval_images: int = 512
    max_seconds: float = 0.0
    clock: Literal["wall", "cpu"] = "wall"
    patience: int = 0

    def __post_init__(self) -> None:
        positive = (
            "steps", "batch_size", "clip_factor", "skip_factor", "grad_accum", "log_every", "eval_every",
            "checkpoint_every", "eval_images",
        )  # fmt: skip
        for field in positive:
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} must be positive; got {getattr(self, field)}")
        for field in ("min_lr", "warmup", "kl_warmup", "free_bits", "translate", "seed", "max_seconds",
                      "patience"):  # fmt: skip
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be finite and not negative; got {getattr(self, field)}")
        for field, known in (
            ("optimizer", get_args(Optimizer)),
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
        if self.batch_size % self.grad_accum:
            raise ValueError(
                f"batch_size must be a multiple of accumulate; got {self.batch_size} and {self.grad_accum}"
            )
        if self.cuda_graphs and self.kl_warmup:
            raise ValueError(
                "cuda_graphs replays one weight of the KL terms: set kl_warmup=0 or cuda_graphs=false; "
                f"got kl_warmup {self.kl_warmup}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1; got {self.ema}")

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """The learning rate of a step (from 0), begun after so many seconds by the clock."""
        top = self.lr or (0.03 if self.optimizer == "muon" else 0.002)
        if self.schedule == "cosine":
            by_clock = seconds / self.max_seconds if self.max_seconds else 0.0
            part = min(1.0, max(step / self.steps, by_clock))
            rate = self.min_lr + (top - self.min_lr) * (1 + math.cos(math.pi * part)) / 2
        else:
            rate = max(self.min_lr, top * self.lr_decay**step)
        return rate * min(1.0, (step + 1) / self.warmup) if self.warmup else rate
