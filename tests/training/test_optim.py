import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from selfvae.cli import main
from selfvae.training import loop
from selfvae.training.config import TrainConfig
from selfvae.training.optim import Muon, _orthogonalised


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_orthogonalised_keeps_directions_and_evens_sizes(shape: tuple[int, int]) -> None:
    left, values, right = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    out = _orthogonalised(left @ torch.diag_embed(torch.linspace(0.1, 1, values.shape[1])) @ right)
    core = left.mT @ out @ right.mT  # diagonal if the singular vectors are kept
    values = core.diagonal(dim1=1, dim2=2)
    assert (core - torch.diag_embed(values)).abs().max() < 1e-3
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
def test_orthogonalised_by_small_squares_equals_the_steps_written_out(shape: tuple[int, int]) -> None:
    left, _, right = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    matrices = left @ torch.diag_embed(torch.logspace(0, -4, 8).expand(3, -1)) @ right
    x = matrices.double() / (matrices.double().norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        x = 3.4445 * x + (-4.7750 * (x @ x.mT) + 2.0315 * (x @ x.mT) @ (x @ x.mT)) @ x
    assert (_orthogonalised(matrices) - x).abs().max() < 1e-3


def test_what_is_no_kernel_is_adams() -> None:
    """Biases, small kernels and exceptions move as torch's Adam moves them, at a tenth of the rate."""
    shapes = (7,), (3, 4, 3, 3), (20, 16, 2, 2)
    ours = [nn.Parameter(torch.randn(*shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    one, other = (
        Muon(ours, lr=0.1, adam_only=ours[2:]),
        torch.optim.Adam(theirs, lr=0.01, betas=(0.9, 0.99)),
    )
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_kernels_of_one_shape_do_not_mix() -> None:
    grads = [torch.randn(16, 8, 3, 3) for _ in range(3)]
    together = [nn.Parameter(torch.zeros(16, 8, 3, 3)) for _ in grads]
    alone = [nn.Parameter(torch.zeros(16, 8, 3, 3)) for _ in grads]
    for p, q, g in zip(together, alone, grads, strict=True):
        p.grad, q.grad = g, g.clone()
        Muon([q], lr=0.1).step()
    Muon(together, lr=0.1).step()
    for p, q in zip(together, alone, strict=True):
        assert torch.allclose(p, q, atol=1e-6)
        # every direction is walked as far: 16 singular values of about 0.1
        assert math.isclose(p.norm().item(), 0.1 * 4, rel_tol=0.2)


def test_a_dropped_gradient_moves_no_matrix() -> None:
    p = nn.Parameter(torch.zeros(16, 8, 3, 3))
    optimizer = Muon([p], lr=0.1)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = p.detach().clone()
    p.grad.zero_()
    optimizer.step()
    assert torch.equal(p, before)


def test_no_closure() -> None:
    with pytest.raises(ValueError, match="no closure"):
        Muon([nn.Parameter(torch.zeros(1))]).step(lambda: None)


def test_muon_has_a_rate_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for without --lr, on the command line too."""
    came: list[TrainConfig] = []
    monkeypatch.setattr(loop, "train", lambda *args, **_: came.append(args[3]))
    np.save(tmp_path / "x.npy", np.zeros((8, 3, 8, 8), np.uint8))
    for name in ("muon", "adamax"):
        command = ["train", "--model", "selfvae-halve", "--data", str(tmp_path / "x.npy")]
        assert main([*command, "--out", str(tmp_path / name), "--optimizer", name]) == 0
    assert [config.rate(200) for config in came] == pytest.approx([0.03, 0.002], rel=0.001)
