"""Every recipe is one that `selfvae train` takes, and the table has a line for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selfvae.cli import main
from selfvae.presets import from_config
from selfvae.training import loop

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(RECIPES)))
def test_recipe(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda *args, **_: came.append(args))
    pixels = 64 if file.parent.name in ("64", "photos") or file.stem.endswith("-64") else 32
    np.save(tmp_path / "x.npy", np.zeros((8, 3, pixels, pixels), np.uint8))
    command = ["train", "--config", file, "--data", tmp_path / "x.npy", "--out", tmp_path / "run"]
    assert main(list(map(str, command))) == 0
    config, _, _, settings = came[0]
    assert config.image_shape == (3, pixels, pixels)
    with torch.device("meta"):
        from_config(config)
    assert settings.max_seconds > 0
    if settings.optimizer == "muon":
        assert settings.schedule == "cosine" and settings.min_lr < settings.lr / 10


def test_the_table_is_complete() -> None:
    rows = [
        line.split("|")[1].strip()
        for line in (RECIPES / "README.md").read_text().splitlines()
        if "|" in line
    ]
    listed = {row.removesuffix(", -paper") for row in rows}
    listed |= {row.removesuffix("small, -paper") + "paper" for row in rows}
    for file in FILES:
        assert str(file.relative_to(RECIPES)).removesuffix(".yaml") in listed, file


def test_equal_compute_is_at_equal_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda *args, **_: came.append(args[0]))
    np.save(tmp_path / "x.npy", np.zeros((8, 3, 32, 32), np.uint8))
    for name in ("srvae", "selfvae-quincunx"):
        command = ["train", "--config", str(RECIPES / "equal-compute" / f"{name}.yaml")]
        assert main([*command, "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / name)]) == 0
    theirs, ours = (sum(p.numel() for p in from_config(config).parameters()) for config in came)
    assert all(abs(count / 2e6 - 1) < 0.05 for count in (theirs, ours))
