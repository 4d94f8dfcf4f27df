"""The report: whole, resumable, and what it prints is what was measured."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import selfvae
from selfvae.cli import main
from selfvae.data.batches import Images
from selfvae.reports import report as module
from selfvae.reports.report import PAPERS, Settings
from selfvae.reports.report import write_report as report

SMALL = Settings(
    limit=5, iwae_samples=3, iwae_limit=4, enhance_limit=3, draws=2, ood_limit=4, fid_samples=6, figures=2
)  # fmt: skip


def corners(x: torch.Tensor) -> torch.Tensor:
    """Features for the sample quality."""
    return x[:, :, 0, 0].float()


@pytest.mark.slow
def test_report(tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for name in ("selfvae", "selfvae-halve", "vae-normal"):
        model = selfvae.build(name, "tiny", (3, 16, 16), width=0.06, components=2)
        model.initialise(images)
        selfvae.save(model, tmp_path / name)
        runs.append(tmp_path / name)
    data = Images(images.repeat(2, 1, 1, 1).numpy())
    told: list[str] = []
    sets: dict[str, Images | None] = {"noise": None, "dark": Images((images // 4).numpy())}
    how: dict[str, Any] = {"outside": sets, "features": ("corners", corners), "progress": told.append}
    monkeypatch.setattr(module, "_BLOCK", 3)
    path = report(runs[:2], data, "smooth", tmp_path / "out", SMALL, command="x", **how)
    text = path.read_text()
    latent = ["elbo", "time", "ood", *(f"iwae-{s}-{i}" for s in (1, 3) for i in (0, 3)), "enhance"]
    exact = ["elbo", "time", "ood", "enhance"]
    assert told == [
        f"{run}: {part}"
        for run, parts in (("selfvae", latent), ("selfvae-halve", exact))
        for part in (*parts, "quality", "figures")
    ]

    def part(name: str) -> Any:
        return json.loads(next((tmp_path / "out/parts").glob(f"{name}-*")).read_text())

    elbo = part("selfvae-elbo")
    assert f"| {elbo['bits_per_dim']:.3f} +- {elbo['bits_per_dim_stderr']:.3f} |" in text
    assert "| exact | exact |" in text and "command: `x`" in text.lower() and "IWAE-3" in text
    assert f"{part('selfvae-ood')['dark']['nll']:.3f}" in text and "features of corners" in text
    assert f"| {part('selfvae-quality')['frechet_distance']:.4g} |" in text
    # the blocks' values, put together
    values = part("selfvae-iwae-3-0")["iwae"] + part("selfvae-iwae-3-3")["iwae"]
    assert len(values) == 4
    assert f"| {-np.mean(values) / np.log(2) / 768:.3f} +- " in text
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<table>") == text.count("## ") == 7
    for picture in re.findall(r'<img src="([^"]+)"', page):
        assert (tmp_path / "out" / picture).exists() and picture in text
    # goes on: nothing is measured twice, another model is added, other settings are measured anew
    told.clear()
    report(runs, data, "smooth", tmp_path / "out", SMALL, **how)
    assert set(told) == {f"vae-normal: {part}" for part in latent if part != "enhance"} | {
        "vae-normal: quality", "vae-normal: figures"
    }  # fmt: skip
    told.clear()
    monkeypatch.setattr(module, "evaluate", lambda *args, **how: pytest.fail("measured twice"))
    report(runs, data, "smooth", tmp_path / "out", replace(SMALL, draws=3), **how)
    assert told == ["selfvae: enhance", "selfvae-halve: enhance"]
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
    np.save(tmp_path / "a.npy", images.repeat(10, 1, 1, 1).numpy())
    flags = ["--data", str(tmp_path / "a.npy"), "--out", str(tmp_path / "out"), "--limit", "2"]
    flags += [
        "--ood-data",
        "noise",
        str(tmp_path / "a.npy"),
        "--features",
        "tests.reports.test_report:corners",
    ]
    flags += ["--fid-samples", "5", "--figures", "2", "--precision", "bf16-mixed"]
    flags += ["--enhance-limit", "2", "--draws", "2", "--ood-limit", "2"]
    assert main(["report", str(tmp_path / "run"), *flags]) == 0
    assert "report.md" in capsys.readouterr().out and (tmp_path / "out/report.html").exists()
    assert main(["report", str(tmp_path / "nowhere"), *flags]) == 2


@pytest.mark.slow
def test_parts_belong_to_their_images_and_models(tmp_path: Path, images: torch.Tensor) -> None:
    """Two data sets of one name, and two models of one: each has its own numbers and figures."""
    few = replace(SMALL, figures=2, iwae_samples=0)
    how: dict[str, Any] = {"outside": {}}
    runs = [tmp_path / "a/run", tmp_path / "b/run"]
    for run in runs:
        model = selfvae.build("selfvae-halve", "tiny", (3, 16, 16), width=0.06, components=2)
        model.initialise(images)
        selfvae.save(model, run)
    pages = [
        report(runs[:1], Images(x.numpy()), "test", tmp_path / "out", few, **how).read_text()
        for x in (images, 255 - images)
    ]
    assert pages[0].split("| run |")[1] != pages[1].split("| run |")[1]
    text = report(runs, Images(images.numpy()), "test", tmp_path / "out", few, **how).read_text()
    assert len(set(re.findall(r"figures/[^/]+/generations.png", text))) == 2
