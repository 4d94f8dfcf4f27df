"""Muon: steps of one size in all directions of a weight matrix, by orthogonalised momentum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selfvae.training.config import TrainConfig

__all__ = ["Muon", "make_optimizer"]

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0 among quintics that end near 1
_SMALL = 64  # a weight of fewer kernels than this, out x in, is left to Adam


def _orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (N, r, c), their singular values brought to 0.7 to 1.2, by Newton-Schulz steps.

    Those below about 1/500 of the norm stay smaller.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    if 2 * x.shape[1] <= x.shape[2] and x.dtype != torch.bfloat16:
        # a step multiplies x from the left by a polynomial of x x^T: collect these, and multiply once
        square, product = x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        for _ in range(steps):
            factor = torch.baddbmm(square, square, square, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product, square = factor @ product, factor @ square @ factor
        x = product @ x
    else:
        for _ in range(steps):
            square = x @ x.mT
            x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the weights of convolutions, Adam for everything else.

    A weight (out, in, h, w) is taken as a matrix out x (in h w); its momentum (Nesterov's), made
    orthogonal, times sqrt(max(1, rows / columns)) is the step. Weight normalisation takes care of the
    weights' size. A weight whose gradient is all zero, as that of a dropped step, stays where it is.
    Under FSDP parameters are parts of matrices: use another optimizer there.

    Args:
        params: parameters; those of 4 dimensions with out x in at least 64 get Muon's steps.
        lr: length of a step in every direction of a matrix.
        momentum: of Muon's steps.
        adam: Adam's learning rate, as a fraction of `lr`.
        betas: Adam's.
        adam_only: of the parameters, those that never get Muon's steps.

    Source: Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.03,
        momentum: float = 0.95,
        adam: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        adam_only: Iterable[nn.Parameter] = (),
    ) -> None:
        self._adam_only = set(map(id, adam_only))
        super().__init__(params, {"lr": lr, "momentum": momentum, "adam": adam, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the parameters by one step from their gradients.

        Raises:
            ValueError: if `closure` is given.
        """
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients before the step")
        for group in self.param_groups:
            matrices: dict[torch.Size, list[Tensor]] = defaultdict(list)
            others: list[Tensor] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.ndim == 4 and p.shape[0] * p.shape[1] >= _SMALL and id(p) not in self._adam_only:
                    matrices[p.shape].append(p)
                else:
                    others.append(p)
            for alike in matrices.values():
                self._muon(alike, group["lr"], group["momentum"])
            if others:
                self._adam(others, group["lr"] * group["adam"], *group["betas"])

    @staticmethod
    def _grads(params: list[Tensor]) -> list[Tensor]:
        return [p.grad for p in params if p.grad is not None]

    def _kept(self, params: list[Tensor], *names: str) -> list[list[Tensor]]:
        for p in params:
            for name in names:
                if name not in self.state[p]:
                    self.state[p][name] = torch.zeros_like(p)
        return [[self.state[p][name] for p in params] for name in names]

    def _muon(self, params: list[Tensor], lr: float, momentum: float) -> None:
        """For weights of one shape: all at once."""
        (kept,), grads = self._kept(params, "momentum"), self._grads(params)
        torch._foreach_mul_(kept, momentum)
        torch._foreach_add_(kept, grads)
        ahead = torch._foreach_add(grads, kept, alpha=momentum)
        matrices = torch.stack([m.flatten(1) for m in ahead])
        # half precision is exact enough for directions, and faster where it is native
        steps = _orthogonalised(matrices.bfloat16() if matrices.is_cuda else matrices).to(matrices.dtype)
        steps *= torch.stack([g.any() for g in grads])[:, None, None]
        lr *= max(1.0, steps.shape[1] / steps.shape[2]) ** 0.5
        torch._foreach_add_(params, [s.view_as(p) for s, p in zip(steps, params, strict=True)], alpha=-lr)

    def _adam(self, params: list[Tensor], lr: float, beta1: float, beta2: float) -> None:
        mean, square = self._kept(params, "mean", "square")
        steps = []
        for p in params:
            self.state[p].setdefault("step", torch.tensor(0.0)).add_(1)
            steps.append(self.state[p]["step"].item())  # it lies on the CPU: nothing waits
        grads = self._grads(params)
        torch._foreach_lerp_(mean, grads, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, 1 - beta2)
        root = torch._foreach_sqrt(square)
        torch._foreach_div_(root, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(root, 1e-8)
        torch._foreach_addcdiv_(params, mean, root, [-lr / (1 - beta1**step) for step in steps])


def make_optimizer(
    params: Iterable[nn.Parameter], config: TrainConfig, adam_only: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer of a run, before its first step; `weight_decay` counts for "adamw" only.

    adam_only: as for `Muon`.
    """
    lr = config.rate(0)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(params, lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamax":
        return torch.optim.Adamax(params, lr)
    return Muon(params, lr, adam_only=adam_only)
