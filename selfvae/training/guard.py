"""Protection against gradients that are far too large."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from selfvae.training.config import TrainConfig

__all__ = ["Guard"]


class Guard:
    """Clip large gradients and skip outliers, relative to the usual norm, by a rule that cannot lock up.

    The usual norm is a running geometric mean. A gradient above `clip_factor` times that norm is scaled
    down to that. One above `skip_factor` times it, or one that is not finite, becomes zero. A skipped
    finite gradient still raises the usual norm by a fixed factor, so that within a few dozen steps the
    limit follows gradients that really grow. Nothing here waits for the device.

    Args:
        config: for clip_factor and skip_factor.
        device: of the gradients.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.log_clip, self.log_skip = math.log(config.clip_factor), math.log(config.skip_factor)
        self.log_usual = torch.full((), torch.nan, device=device)
        self.dropped = torch.zeros((), device=device)
        self.dropped_in_a_row = torch.zeros((), device=device)

    def __call__(self, grads: list[Tensor]) -> Tensor:
        """Scale or zero the gradients of a step in place.

        Args:
            grads: of all parameters, any shapes.

        Returns:
            The norm of all of them before, a scalar.
        """
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
        if norm.is_cpu and factor == 1:  # a GPU would have to be waited for
            return norm
        for grad in grads:
            grad.nan_to_num_(0.0, 0.0, 0.0).mul_(factor)
        return norm

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by name."""
        names = ("log_usual", "dropped", "dropped_in_a_row")
        return {f"guard.{name}": getattr(self, name) for name in names}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state` gave from a checkpoint's tensors."""
        for key in self.state():
            setattr(self, key.removeprefix("guard."), tensors[key].to(self.log_usual.device))
