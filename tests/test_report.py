"""The report: whole, resumable, and what it prints is what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import selfvae
from selfvae import report as module
from selfvae.cli import main
from selfvae.data import Images
from selfvae.report import PAPERS, Settings, report

SMALL = Settings(limit=5, iw=3, iw_limit=4, enhance_limit=3, draws=2, ood_limit=4)


def test_report(tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for name in ("selfvae", "selfvae-halve", "vae-normal"):
        model = selfvae.build(name, "tiny", (3, 16, 16), width=0.06, components=2)
        model.initialise(images)
        selfvae.save(model, tmp_path / name)
        runs.append(tmp_path / name)
    data = Images(images.repeat(2, 1, 1, 1).numpy())
    told: list[str] = []
    path = report(runs[:2], data, "smooth", tmp_path / "out", SMALL, command="x", progress=told.append)
    text = path.read_text()
    assert told == [
        f"{run}: {part}"
        for run, parts in (
            ("selfvae", "elbo time ood iwae enhance"),
            ("selfvae-halve", "elbo time ood enhance"),
        )
        for part in parts.split()
    ]
    elbo = json.loads(next((tmp_path / "out/parts").glob("selfvae-elbo-*")).read_text())
    assert f"| {elbo['bits_per_dim']:.3f} +- {elbo['bits_per_dim_stderr']:.3f} |" in text
    assert "| exact | exact |" in text and "command: `x`" in text.lower() and "IWAE-3" in text
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<table>") == text.count("## ") == 5
    # goes on: nothing is measured twice, another model is added, other settings are measured anew
    told.clear()
    report(runs, data, "smooth", tmp_path / "out", SMALL, progress=told.append)
    assert told == ["vae-normal: elbo", "vae-normal: time", "vae-normal: ood", "vae-normal: iwae"]
    monkeypatch.setattr(module, "evaluate", lambda *args, **how: pytest.fail("measured twice"))
    report(runs, data, "smooth", tmp_path / "out", SMALL)
    with pytest.raises(ValueError, match="at least one folder"):
        report([], data, "smooth", tmp_path / "out")


def test_the_papers_terms_add_up_to_their_figures() -> None:
    """Which shows that the printed IWAE are ELBOs; CelebA and Imagenette rows print sums of terms."""
    dims = {"CIFAR-10": 3072, "ImageNet32": 3072, "CelebA64": 12288, "Imagenette64": 12288}
    for row in PAPERS:
        bits = (sum(row.re) + sum(row.kl)) / np.log(2) / dims[row.data]
        assert bits == pytest.approx(row.bits_per_dim, abs=0.025)


def test_command(tmp_path: Path, images: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    model = selfvae.build("selfvae-halve", "tiny", (3, 16, 16), width=0.06, components=2)
    model.initialise(images)
    selfvae.save(model, tmp_path / "run")
    np.save(tmp_path / "a.npy", images.repeat(5, 1, 1, 1).numpy())
    flags = ["--data", str(tmp_path / "a.npy"), "--out", str(tmp_path / "out"), "--limit", "2"]
    flags += ["--enhance-limit", "2", "--draws", "2", "--ood-limit", "2"]
    assert main(["report", str(tmp_path / "run"), *flags]) == 0
    assert "report.md" in capsys.readouterr().out and (tmp_path / "out/report.html").exists()
    assert main(["report", str(tmp_path / "nowhere"), *flags]) == 2
