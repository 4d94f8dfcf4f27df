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

    Args:
        steps: optimizer steps in all.
        batch_size: images per step, over all devices and accumulated parts.
        optimizer: "adamax", "adamw" or "muon" (see `optim.Muon`).
        lr: learning rate at the start; by default 0.03 for "muon", 0.002 for the others.
        min_lr: the least learning rate, at most lr; by default 0.0001, or lr / 20 where that is less.
        lr_decay: factor per step of the exponential schedule.
        schedule: "exponential" decays by lr_decay per step; "cosine" reaches min_lr at the last step.
        warmup: steps over which the rate rises from 0; at most a tenth of the run, by steps or seconds.
        weight_decay: of "adamw", decoupled: each step takes lr * weight_decay of all weights away.
        kl_warmup: steps over which the weight of the KL terms rises from 0 to 1.
        free_bits: bits/dim (of x) of every latent's KL, averaged over the batch, that cost nothing.
        l1_weight: bits/dim per grey level of the mean absolute difference between each image and its
            expectation given the one above, which is added to the bound; needs coefficients="residual".
        clip_factor: a gradient longer than this times the usual norm is shortened to that.
        skip_factor: a gradient longer than this times the usual norm is dropped.
        ema: decay of the weights' moving average, which is what gets saved and scored.
        levels: the finest and the coarsest level to train, e.g. 4 10; by default all. In models of at most
            one latent no level's training depends on another's, so the coarse ones can be trained for
            longer.
        flip: random horizontal flips.
        translate: random shifts by up to this many pixels, edges repeated.
        grad_accum: parts that a batch is split into to save memory.
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
        eval_images: validation images scored at every evaluation: the first ones, whose order is random
            wherever they could come class by class (see `sources.load`).
        max_seconds: end by the clock if that comes before the last step, counted over all parts of a
            resumed run; warm-up and "cosine" then follow the clock, and the run depends on more than the
            seed. 0: no limit.
        clock: what max_seconds counts: "wall", or "cpu", this process's own time, all threads together,
            whatever else the machine does.
        patience: stop after this many evaluations without a better validation score; 0: never.

    Raises:
        ValueError: if a setting is out of range; the message names it.
    """

    steps: int = 100_000
    batch_size: int = 32
    optimizer: Optimizer = "adamax"
    lr: float | None = None
    min_lr: float | None = None
    lr_decay: float = 0.999999
    schedule: Literal["exponential", "cosine"] = "exponential"
    warmup: int = 100
    weight_decay: float = 0.0
    kl_warmup: int = 0
    free_bits: float = 0.0
    l1_weight: float = 0.0
    clip_factor: float = 2.0
    skip_factor: float = 20.0
    ema: float = 0.9999
    levels: tuple[int, int] | None = None
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
        for field in ("warmup", "weight_decay", "kl_warmup", "free_bits", "l1_weight", "translate", "seed",
                      "max_seconds", "patience"):  # fmt: skip
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
        if self.levels is not None and not 0 <= self.levels[0] <= self.levels[1]:
            raise ValueError(
                f"levels must be the finest and the coarsest level, e.g. 4 10; got {self.levels}"
            )
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be positive; got {self.lr}")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.top_lr:
            raise ValueError(f"min_lr must be 0 to lr, {self.top_lr:g}; got {self.min_lr:g}")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(f"weight_decay goes with optimizer adamw; got {self.optimizer}")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"lr_decay must be above 0 and at most 1; got {self.lr_decay}")
        if self.batch_size % self.grad_accum:
            raise ValueError(
                f"batch_size must be a multiple of grad_accum; got {self.batch_size} and {self.grad_accum}"
            )
        if self.cuda_graphs and self.kl_warmup:
            raise ValueError(
                "cuda_graphs replays one weight of the KL terms: set kl_warmup=0 or cuda_graphs=false; "
                f"got kl_warmup {self.kl_warmup}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1; got {self.ema}")

    @property
    def top_lr(self) -> float:
        """The learning rate at the start, after warm-up."""
        return self.lr or (0.03 if self.optimizer == "muon" else 0.002)

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """The learning rate of a step.

        Args:
            step: from 0.
            seconds: by the `clock`, when the step begins; only `max_seconds` makes them count.
        """
        top = self.top_lr
        least = min(0.0001, top / 20) if self.min_lr is None else self.min_lr
        by_clock = seconds / self.max_seconds if self.max_seconds else 0.0
        if self.schedule == "cosine":
            part = min(1.0, max(step / self.steps, by_clock))
            rate = least + (top - least) * (1 + math.cos(math.pi * part)) / 2
        else:
            rate = max(least, top * self.lr_decay**step)
        warmup = min(self.warmup, max(1, self.steps // 10))
        return rate * min(1.0, max((step + 1) / warmup, 10 * by_clock)) if warmup else rate
