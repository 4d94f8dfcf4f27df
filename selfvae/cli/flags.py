"""Arguments and flags that several commands share; free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

__all__ = ["GROUPS", "In", "Out", "Run", "SamplingFlags", "Split", "positive"]

Run = Annotated[Positional[Path], arg(metavar="MODEL")]
In = Annotated[Positional[Path], arg(metavar="IN")]
Out = Annotated[Positional[Path], arg(metavar="OUT")]
Split = Literal["train", "validation", "test"]

# headings of --help; a flag that is not listed comes first, under "options"
GROUPS: dict[str, tuple[str, ...]] = {
    "model": ("model", "size", "options", "init_from", "integer"),
    "data": (
        "data", "split", "image_size", "limit", "iwae_limit", "enhance_limit", "ood_limit", "ood_data",
        "batch_size", "flip", "translate", "convert",
    ),
    "optimisation": (
        "steps", "max_seconds", "clock", "patience", "grad_accum", "optimizer", "lr", "min_lr",
        "lr_decay", "schedule", "warmup", "weight_decay", "kl_warmup", "free_bits", "l1_weight",
        "clip_factor", "skip_factor", "ema", "levels",
    ),
    "sampling": ("temperature", "decode"),
    "computation": (
        "seed", "devices", "jobs", "nodes", "precision", "activation_checkpointing", "channels_last",
        "cuda_graphs",
    ),
    "logging": ("log_every", "eval_every", "eval_images", "checkpoint_every"),
    "output": ("out", "json", "zoom", "milliseconds"),
}  # fmt: skip


@dataclass(frozen=True)
class SamplingFlags:
    """How variables are drawn.

    Args:
        temperature: sampling temperature: one number, or one per variable, e.g. y0=0.3,z1=1. Below 1 gives
            less noise; 0 takes the mode (the most likely value).
        decode: sample draws images; mode takes the most likely image at every level, mean the mean of its
            distribution, whatever the temperature of the latents.
        seed: random seed.
    """

    temperature: str = "1"
    decode: Literal["sample", "mode", "mean"] = "sample"
    seed: int = 0


def positive(flag: str, n: int) -> None:
    """Raise ValueError unless the value of a flag is at least 1."""
    if n < 1:
        raise ValueError(f"--{flag} must be at least 1; got {n}")
