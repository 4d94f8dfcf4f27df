"""Every recipe is one that `selfvae train` takes, and the table has a row for it with its parameters."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import selfvae
from benchmarks import equal_compute
from selfvae.cli import main
from selfvae.presets import from_config
from selfvae.training import loop

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))


def rows() -> dict[str, str]:
    """Cells of the tables after the recipe's name; a row of two recipes is split."""
    found: dict[str, str] = {}
    for line in (RECIPES / "README.md").read_text().splitlines():
        name, _, cells = line.removeprefix("| ").partition(" | ")
        if stem := name.removesuffix("small, -paper") if name.endswith(", -paper") else "":
            counts, _, rest = cells.partition(" |")
            for size, count in zip(("small", "paper"), counts.split(", "), strict=True):
                found[stem + size] = f"{count} M |{rest}"
        elif line.startswith("| "):
            found.setdefault(name, cells)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(RECIPES)))
def test_recipe(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda *args, **_: came.append(args))
    pixels = 64 if file.parent.name in ("64", "photos", "emoji") or file.stem.endswith("-64") else 32
    recipe, options = yaml.safe_load(file.read_text()), dict[str, Any]()
    if (start := recipe.get("init-from", "")).startswith("runs/"):
        while "model" not in recipe:
            recipe = yaml.safe_load((file.parent / f"{Path(recipe['init-from']).name}.yaml").read_text())
            own = (option.split("=") for option in recipe.get("options", ()))
            options = {**{key: yaml.safe_load(value) for key, value in own}, **options}
        shape = (3, pixels, pixels)
        selfvae.save(selfvae.build(recipe["model"], recipe["size"], shape, **options), tmp_path / start)
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "x.npy", np.zeros((8, 3, pixels, pixels), np.uint8))
    command = ["train", "--config", file, "--data", tmp_path / "x.npy", "--out", tmp_path / "run"]
    assert main(list(map(str, command))) == 0
    config, _, _, settings = came[0]
    assert config.image_shape == (3, pixels, pixels)
    with torch.device("meta"):
        model = from_config(config)
    assert settings.max_seconds > 0
    if settings.optimizer == "muon":
        assert settings.schedule == "cosine" and settings.min_lr < settings.lr / 10
    # the table has a row for it; the photographs' has no column of parameters
    row = rows()[str(file.relative_to(RECIPES)).removesuffix(".yaml")]
    stated = re.match(r"([\d.]+) M \|", row)
    assert stated or file.parent.name == "photos"
    if stated:
        digits = len(stated[1].partition(".")[2])
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert abs(count - float(stated[1])) < 0.501 * 10**-digits


def test_the_three_priors_are_compared_with_the_same_networks() -> None:
    """The recipes of the papers' first claim differ in the preset only, and so in the prior."""
    names = "claims/vae-normal", "claims/vae-mog", "equal-compute/vae"
    read = {Path(name).name: RECIPES / f"{name}.yaml" for name in names}
    settings = {name: yaml.safe_load(file.read_text()) for name, file in read.items()}
    assert [flags.pop("model") for flags in settings.values()] == list(settings)
    assert settings["vae"] == settings["vae-normal"] == settings["vae-mog"]
    options = {key: float(value) for key, value in (o.split("=") for o in settings["vae"]["options"])}
    shapes = []
    for name in settings:
        with torch.device("meta"):
            model = selfvae.build(name, "paper", (3, 32, 32), **options)
        (level,) = model.levels
        shapes.append([p.shape for net in (level.encoder, level.decoder) for p in net.parameters()])
        assert name != "vae-mog" or level.prior_net.means.shape[0] == 1000
    assert shapes[0] == shapes[1] == shapes[2]


def test_equal_compute_continues_and_gives_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def command(*words: Any) -> str:
        called.append(f"{words[0]}{' again' if '--resume' in words else ''}")
        if words[0] == "train":
            folder = Path(words[words.index("--out") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "checkpoint.safetensors").touch()
            (folder / "log.csv").write_text("step,seconds,cpu_seconds,val_bits_per_dim\n9,2,1,5.5\n")
        seed = int(str(words[1]).rpartition("-")[2]) if words[0] != "train" else 0
        scores = {"bits_per_dim": 5 + seed, "bits_per_dim_stderr": 0.1, "re_nats": [1], "kl_nats": [2]}
        return json.dumps({"parameters": 2_000_000} if words[0] == "info" else scores)

    monkeypatch.setattr(equal_compute, "command", command)
    what = {"data": "DATA", "out": tmp_path, "seeds": (0, 1, 2), "together": 1}
    equal_compute.main((Path("vae.yaml"),), **what)
    assert called == ["train", "info", "eval"] * 3
    result = (tmp_path / "result.md").read_text()
    assert "| vae | 2 | 2.00 M | 9 | 2 (1) | 7.000 ± 0.100 | 1 | 2 |" in result
    assert result.endswith("| vae | 3 | 6.000 ± 1.000 |\n")
    called.clear()
    equal_compute.main((Path("vae.yaml"),), **what)
    assert called == ["train again", "info"] * 3 and (tmp_path / "result.md").read_text() == result
    called.clear()
    equal_compute.main((Path("vae.yaml"),), **{**what, "seeds": (1,), "limit": 5})  # other images
    assert called == ["train again", "info", "eval"]
    assert "standard deviation" not in (tmp_path / "result.md").read_text()


def test_equal_compute_is_at_equal_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda *args, **_: came.append(args[0]))
    np.save(tmp_path / "x.npy", np.zeros((8, 3, 32, 32), np.uint8))
    for name in ("srvae", "selfvae-quincunx"):
        command = ["train", "--config", str(RECIPES / "equal-compute" / f"{name}.yaml")]
        assert main([*command, "--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / name)]) == 0
    theirs, ours = (sum(p.numel() for p in from_config(config).parameters()) for config in came)
    assert all(abs(count / 2e6 - 1) < 0.05 for count in (theirs, ours))
