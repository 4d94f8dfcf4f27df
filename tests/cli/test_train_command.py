"""Training by the command line: saved settings, limits, and transforms of one's own."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

import selfvae
from selfvae.cli import main
from selfvae.presets import TRANSFORMS
from selfvae.training.guard import Guard

TINY = ["--model", "selfvae-halve", "--size", "tiny", "--options", "width=0.05", "--batch-size", "4",
        "--eval-images", "2"]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> str:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8))
    return str(tmp_path / "x.npy")


def made(run: Path) -> int:
    with safe_open(run / "checkpoint.safetensors", "np") as file:
        return int(json.loads(file.metadata()["state"])["step"])


def test_settings_saved_under_former_names_are_resumed(tmp_path: Path, data: str) -> None:
    run = tmp_path / "run"
    assert main(["train", "--out", str(run), "--data", data, *TINY, "--steps", "1"]) == 0
    saved = yaml.safe_load((run / "train.yaml").read_text())
    assert saved["clip-factor"] == 2.0 and "init-from" not in saved
    for new, old in (("clip-factor", "clip"), ("skip-factor", "skip"), ("grad-accum", "accumulate")):
        saved[old] = saved.pop(new)
    (run / "train.yaml").write_text(yaml.safe_dump({**saved, "lr-floor": 0.0001, "start": "gone"}))
    assert main(["train", "--out", str(run), "--resume", "--steps", "2"]) == 0
    assert made(run) == 2


def test_former_names_are_for_saved_settings_only(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text("clip: 3\n")
    flags = ["--out", str(tmp_path / "run"), "--data", data, "--config", str(tmp_path / "recipe.yaml")]
    assert main(["train", *flags]) == 2
    assert "unknown flag '--clip': did you mean '--clip-factor'?" in capsys.readouterr().err


def test_a_run_that_is_over_says_so(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    flags = ["--out", str(run), "--data", data, *TINY]
    assert main(["train", *flags, "--steps", "50", "--max-seconds", "0.001"]) == 0
    done = made(run)
    before = (run / "checkpoint.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(run)]) == 0
    told = capsys.readouterr().err
    assert "of its 0.001 seconds" in told and "count over all calls; give a larger --max-seconds" in told
    assert (run / "checkpoint.safetensors").read_bytes() == before
    assert (
        main(["train", "--resume", "--out", str(run), "--max-seconds", "0", "--steps", str(done + 1)]) == 0
    )
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(run), "--max-seconds", "0", "--steps", str(done)]) == 0
    assert f"nothing to do: {run} has made its {done + 1} steps; give more" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_says_so(
    number: int,
    tmp_path: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, step, calls = tmp_path / "run", Guard.__call__, []

    def interrupted(guard: Guard, gradients: list[torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return step(guard, gradients)

    monkeypatch.setattr(Guard, "__call__", interrupted)
    assert main(["train", "--out", str(run), "--data", data, *TINY, "--steps", "4"]) == 128 + number
    told = capsys.readouterr()
    assert (
        f"selfvae: interrupted after 2 steps, which are saved: --resume --out {run} continues" in told.err
    )
    assert "Traceback" not in told.err and not told.out and made(run) == 2
    assert main(["train", "--out", str(run), "--resume"]) == 0
    assert made(run) == 4 and f"model and learning curve are in {run}" in capsys.readouterr().out


MODULE = """
from selfvae.presets import TRANSFORMS
from selfvae.transforms import MeanDownscale
TRANSFORMS["my-means"] = lambda: MeanDownscale(2)
"""


@pytest.mark.slow
def test_transforms_of_one_s_own(
    tmp_path: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By --import, which the run remembers; other commands take it too."""
    request.addfinalizer(lambda: TRANSFORMS.pop("my-means", None))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_transforms.py").write_text(MODULE)
    flags = ["--out", "run", "--data", data, "--model", "selfvae", "--size", "tiny", "--batch-size", "4",
             "--eval-images", "2", "--options", "width=0.05", "depth=0.1"]  # fmt: skip
    wish = ["transforms=[my-means]", "--steps", "1"]
    assert main(["train", *flags, *wish]) == 2
    assert "unknown transform 'my-means'" in capsys.readouterr().err
    assert main(["train", "--import", "own_transforms", *flags, *wish]) == 0
    assert yaml.safe_load(Path("run/train.yaml").read_text())["import"] == ["own_transforms"]
    for forget in (False, True):
        if forget:
            del TRANSFORMS["my-means"]
            monkeypatch.delitem(__import__("sys").modules, "own_transforms")
        assert main(["train", "--resume", "--out", "run", "--steps", str(2 + forget)]) == 0
    assert selfvae.load("run").config.transforms == ("my-means",)
    assert main(["eval", "run", "--data", data, "--import=own_transforms"]) == 0
