"""Distances of feature sets: against closed forms, and against torchmetrics."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import selfvae
from selfvae.cli import main
from selfvae.data.batches import Images
from selfvae.metrics import fid


class Mean(torch.nn.Module):
    """Three features: the channels' means."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3))


def whitened(n: int, d: int) -> torch.Tensor:
    """Points of mean exactly 0 and covariance exactly 1."""
    x = torch.randn(n, d, dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance_of_gaussians() -> None:
    """N(0, 1) and N(m, diag(s^2)): |m|^2 + sum (1 - s)^2; and of rotated covariances."""
    x, y = whitened(500, 4), whitened(300, 4)
    m, s = torch.tensor([1.0, 0, -2, 0.5]), torch.tensor([0.5, 1, 2, 3])
    expected = (m.square().sum() + (1 - s).square().sum()).item()
    assert fid.frechet_distance(x, y * s + m) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert fid.frechet_distance(x @ turn, (y * s + m) @ turn) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="covariance of 4 features needs at least 5 images.*got 4 and 300"):
        fid.frechet_distance(x[:4], y)
    with pytest.raises(ValueError, match=r"\(N, D\) and \(M, D\)"):
        fid.frechet_distance(x, y[:, :3])


def test_kernel_distance() -> None:
    """One-dimensional points at a and b: the kernels are known, and the subsets are the whole."""
    a, b = 2.0, 3.0
    x, y = torch.full((5, 1), a), torch.full((6, 1), b)
    k = [(p * q + 1) ** 3 for p, q in ((a, a), (b, b), (a, b))]
    assert fid.kernel_distance(x, y).mean == pytest.approx(k[0] + k[1] - 2 * k[2])
    same = fid.kernel_distance(torch.randn(2000, 8), torch.randn(2000, 8), subsets=50, size=400)
    assert abs(same.mean) < 4 * same.std  # unbiased: around 0


def test_precision_and_recall() -> None:
    torch.manual_seed(0)
    wide = torch.randn(400, 2)
    narrow, far = 0.3 * torch.randn(400, 2), torch.randn(400, 2) + 100
    p, r = fid.precision_recall(wide, narrow)
    assert p > 0.95 and r < 0.6  # all drawn are plausible, but they do not cover
    assert fid.precision_recall(wide, wide) == (1, 1)
    assert fid.precision_recall(wide, far) == (0, 0)
    assert fid.precision_recall(wide, narrow, chunk=7) == (p, r)


def test_against_torchmetrics() -> None:
    peer = pytest.importorskip("torchmetrics.image.fid")
    x, y = (torch.randint(0, n, (60, 3, 8, 8), dtype=torch.uint8) for n in (256, 200))
    metric = peer.FrechetInceptionDistance(feature=Mean(), normalize=False)
    metric.set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    net = fid.load_network("test_fid:Mean")
    ours = fid.frechet_distance(fid.features(net, x), fid.features(net, y))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-4)
    from torchmetrics.image.kid import KernelInceptionDistance

    kid = KernelInceptionDistance(feature=Mean(), subsets=1, subset_size=60, normalize=False)
    kid.update(x, real=True)
    kid.update(y, real=False)
    ours = fid.kernel_distance(fid.features(net, x), fid.features(net, y), subsets=1, size=60)
    assert ours.mean == pytest.approx(kid.compute()[0].item(), rel=1e-3)


def test_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)
    assert fid.features(Mean(), grey).tolist() == [[7.0] * 3] * 2
    with pytest.raises(ValueError, match=r"must return \(B, D\); got \(2,\)"):
        fid.features(lambda x: x.float().mean((1, 2, 3)), grey)
    with pytest.raises(ImportError, match="no features at test_fid:Nothing"):
        fid.load_network("test_fid:Nothing")
    with pytest.raises(ValueError, match="inception or MODULE:NAME; got 'mean'"):
        fid.load_network("mean")
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pip install 'selfvae\[quality\]', or give --features"):
        fid.load_network("inception")


def test_command(tmp_path: Path, images: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    model = selfvae.build("selfvae-halve", "tiny", (3, 16, 16), width=0.06, components=2)
    model.initialise(images)
    selfvae.save(model, tmp_path / "run")
    np.save(tmp_path / "a.npy", images.repeat(12, 1, 1, 1).numpy())
    flags = ["fid", str(tmp_path / "run"), "--data", str(tmp_path / "a.npy")]
    flags += ["--features", "test_fid:Mean"]
    assert main([*flags, "--n", "9", "--split", "train", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["real_images"] == 35 and result["drawn_images"] == 9
    assert result["frechet_distance"] > 0 and 0 <= result["precision"] <= 1
    assert main([*flags, "--n", "3"]) == 2
    assert "needs at least 4 images" in capsys.readouterr().err


def test_too_few_images_are_noticed_before_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = selfvae.build("selfvae-halve", "tiny", (3, 8, 8), width=0.05)
    images = Images(np.zeros((40, 3, 8, 8), np.uint8))
    monkeypatch.setattr(fid, "generate", lambda *args, **how: pytest.fail("drew"))
    with pytest.raises(ValueError, match="at least 193 images on both sides; got 40 and 300"):
        fid.evaluate_samples(model, images, lambda x: x.flatten(1).float(), 300)
