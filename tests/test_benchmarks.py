"""The benchmarks run, and give what they promise; what they find is not for a test."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import selfvae
from benchmarks import (
    codec,
    colour,
    cost,
    features,
    frontier,
    fuzz,
    gpu,
    pictures,
    published,
    rates,
    sheets,
    variations,
)
from benchmarks.measure import flop_count, medians, peak_flops, seconds
from selfvae import SelfVAE, save
from selfvae.data.crops import photo
from selfvae.data.pictures import write

ROOT = Path(__file__).parents[1]


def run(*words: str) -> dict[str, object]:
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_speed() -> None:
    found = run(
        "benchmarks.speed", "--quick", "--json", "--models", "vae", "--size", "tiny", "--threads", "1"
    )
    for task in ("train", "memory", "generate20", "iwae512", "compress", "decompress"):
        assert found[f"{task}_vae"] > 0  # type: ignore[operator]
    for kind in ("flops", "floor", "at_most", "seconds"):
        assert found[kind]["train_vae"]  # type: ignore[index]
    assert found["bytes"]["memory_vae"][1] > 1e8  # type: ignore[index]


@pytest.mark.slow
def test_cost(tmp_path: Path) -> None:
    row = run("benchmarks.cost", "--one", "32", "2", "--size", "tiny", "--batch", "2", "--repeats", "1")
    assert row["side"] == 32 and row["levels"] == 2 and row["bytes"] > 0  # type: ignore[operator]
    rows = [{**row, "side": side, "levels": k} for side in cost.SIDES for k in cost.LEVELS]
    cost.plot(rows, 2, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_rates(capsys: pytest.CaptureFixture[str]) -> None:
    rates.main(images=1, threads=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and all(float(rate) > 0 for line in lines for rate in line.split()[-3:])


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures(name: str) -> None:
    image = pictures.PICTURES[name](1)
    assert image.tobytes() == pictures.PICTURES[name](1).tobytes()
    found = pictures.measure(image.crop((20, 20, 68, 52)))
    assert found[".svae"] <= min(found["WebP"], found["quick"]) + 64 and found["PNG"] > 0
    assert pictures.table({name: found}).splitlines()[2].startswith(f"| {name} | ")


@pytest.mark.slow
def test_codec(tiny_integer: SelfVAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pillow_jxl")
    save(tiny_integer, tmp_path / "model")
    write(torch.from_numpy(photo("coffee", 2)[:, :64, :80].copy()), tmp_path / "in/a.png")
    words = ["--models", str(tmp_path / "model"), "--threads", "1", "2", "--repeats", "2"]
    codec.main([str(tmp_path / "in"), *words, "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out/codec.json").read_text())
    assert [(row["threads"], row["codec"]) for row in result["rows"]] == [
        (n, name) for n in (1, 2) for name in ("model", "JPEG XL", "WebP")
    ]
    for row in result["rows"]:
        assert row["subpixels"] == 64 * 80 * 3 and 0 < row["bytes"] < row["subpixels"]
        assert row["compress"]["wall"] > 0 < row["decompress"]["cpu"]
        assert ("checked" in row) == (row["codec"] == "model")
    found = result["parts"]["model"]
    assert found["network_gflop"] > 0 and min(found.values()) > 0
    lines = (tmp_path / "out/codec.md").read_text().splitlines()
    assert sum(line.startswith(("| 1 |", "| 2 |", "| model |")) for line in lines) == 7
    assert "compress, MB/s" in capsys.readouterr().out


@pytest.mark.slow
def test_gpu_on_a_cpu(images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part gives a result; called again, the command skips these and trains in the time left."""
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: "passed")
    only = {"cifar10-2m-v1": selfvae.hub.bundled()["cifar10-2m-v1"]}
    monkeypatch.setattr(selfvae.hub, "bundled", lambda: only)
    monkeypatch.setattr(gpu, "SCORING", 0.0)
    monkeypatch.setattr(gpu, "seconds_of", lambda task, device: seconds(task))  # once
    x = torch.nn.functional.interpolate(images.float(), 32).byte().repeat(4, 1, 1, 1).numpy()
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        np.save(tmp_path / "data" / f"{split}.npy", x)
    names = ("vae",)
    common: dict[str, Any] = {"data": str(tmp_path / "data"), "out": tmp_path / "out", "device": "cpu"}
    common |= {"size": "tiny", "batch": 2, "models": names, "options": "batch-size=4"}
    gpu.main(**common, minutes=20, trained=())
    file = tmp_path / "out/result.json"
    first = json.loads(file.read_text())
    assert "error" not in str(first) and first["files"]["cifar10-2m-v1"]["device_reads_cpu"] is True
    kinds = ("train_ours", "train_reference", "generate_ours", "iwae_ours", "forward_backward_eager")
    assert all(first[f"{kind}_vae"]["images_per_second"] > 0 for kind in kinds)
    gpu.main(**common, minutes=0.25, trained=names)
    second = json.loads(file.read_text())
    assert {key: second[key] for key in first} == first
    assert second["trained_vae"]["steps"] > 0 and (tmp_path / "out/vae/model.safetensors").exists()


def test_frontier(tmp_path: Path) -> None:
    row = {"name": "relu-3x3", "share": "1/6", "steps": 9, "validation": 3.0, "test": 2.5, "stderr": 0.1}
    (tmp_path / "frontier.json").write_text(json.dumps([row]))
    frontier.main(tmp_path / "frontier.json")
    assert "| relu-3x3 | 0.18 M | 58 | 1/6 | 9 | 3.000 | 2.500 |" in (tmp_path / "frontier.md").read_text()
    assert (tmp_path / "frontier.png").stat().st_size > 1000


def test_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers of both kinds of data are trained, and read again as features."""
    monkeypatch.setattr(features, "_ENOUGH", 2)
    x = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    names = ["noto-1f600", "noto-1f601-fe0f", "noto-23", "noto-1f469-200d", "twemoji-1f600", "twemoji-23"]
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}.npy", x.numpy())
        (tmp_path / f"{part}_labels.json").write_text(json.dumps([0, 1, 2, 3, 9, 0]))
    features.main(tmp_path, tmp_path / "cifar.safetensors", seconds=0.1)
    assert features.Features(tmp_path / "cifar.safetensors")(x).shape == (6, 128)
    (tmp_path / "names.json").write_text(json.dumps({"train": names, "test": names[::-1]}))
    assert features.read_labels(tmp_path) == {"train": [2, 2, 0, 0, 1, 1], "test": [1, 1, 0, 0, 2, 2]}
    features.main(tmp_path, tmp_path / "emoji.safetensors", seconds=0.1)
    assert features.EmojiFeatures(tmp_path / "emoji.safetensors").head.out_features == 3


def test_colour(tmp_path: Path) -> None:
    """What it splits it merges, and the true colour is nearer than none."""
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(colour.merge(*colour.split(x)), x.float(), atol=1e-2, rtol=0)
    smooth = x[:, :, :4, :4].repeat_interleave(8, 2).repeat_interleave(8, 3)
    for i, picture in enumerate(smooth):
        write(picture, tmp_path / f"{i}.png")
    colour.main(
        (tmp_path,), tmp_path, tmp_path, seconds=0.1, batch=2, scales=2, out=tmp_path / "found.json"
    )
    found = json.loads((tmp_path / "found.json").read_text())["mean"]["test"]
    assert found["true coarse colour"] > found["true mean colour"] > found["grey"] - 1
    assert found["predicted"] >= found["grey"]  # with a factor of 0 nothing is lost


def test_sheet(tmp_path: Path) -> None:
    write(torch.from_numpy(photo("coffee", 4)[:, :41, :63].copy()), tmp_path / "a.png")
    sheets.main("photos-x2-v1", (tmp_path / "a.png",), tmp_path / "sheet.png", height=32, width=32)
    assert Image.open(tmp_path / "sheet.png").size == (5 * 32 + 4 * 2, 32)


def test_interpolations_and_variations(tmp_path: Path, images: torch.Tensor) -> None:
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.npy", images.numpy())
    model = selfvae.build("selfvae", "tiny", tuple(images.shape[1:]), width=0.06)
    model.initialise(images)
    save(model, tmp_path / "model")
    variations.main(str(tmp_path / "model"), str(tmp_path), tmp_path, rows=1, columns=3)
    side = 2 * images.shape[3]
    for name in ("interpolations", "variations"):
        assert Image.open(tmp_path / f"{name}.png").size == (3 * side + 2 * 2, 2 * images.shape[2])


@pytest.mark.slow
def test_necessary_seconds(images: torch.Tensor) -> None:
    """Those of convolutions and the optimizer: most of a training step's, none of a sum's."""
    model = selfvae.build("vae", "tiny", tuple(images.shape[1:]))
    model.initialise(images)
    step = published.training(model, images)
    step()
    assert 0 < published.necessary_seconds(step) < seconds(step) * 2
    assert published.necessary_seconds(lambda: images.sum()) == 0


def test_measures() -> None:
    a = torch.rand(30, 40)
    assert flop_count(lambda: a @ a.T) == 2 * 30 * 40 * 30
    assert peak_flops(torch.float32, 1) > 1e8
    calls: list[str] = []
    found = medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == list("ababab") and found.keys() == {"a", "b"}
    assert found["a"] == pytest.approx(0, abs=1)


@pytest.mark.slow
def test_fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # the fuzzer lowers it
    found = fuzz.run(tmp_path / "fuzz.json", minutes=5, cases=12)
    assert found["findings"] == [] and found == json.loads((tmp_path / "fuzz.json").read_text())
    assert all(target["cases"] == 12 for target in found["targets"].values())


@pytest.mark.parametrize("kind", ["crash", "hang", "memory", "exception", "accepted"])
def test_fuzz_finds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that fails at every third case, and goes on after it."""
    monkeypatch.setattr(fuzz, "LONGEST", 0.5)

    def read(data: bytes, origin: bytes, forged: bool, rng: np.random.Generator) -> None:
        calls.value += 1
        if calls.value % 3:
            raise ValueError("damaged")
        if kind == "crash":
            os._exit(3)
        elif kind == "hang":
            time.sleep(60)
        elif kind == "memory":
            bytes(2 * fuzz.MOST)
        elif kind == "exception":
            {}["x"]
        else:
            raise fuzz.AcceptedError("another picture")

    calls = multiprocessing.get_context("fork").Value("q", 0)
    worker = fuzz.Worker("reader", 0, fuzz.Target([b"abc"], read), seed=0)
    worker.run(60, 7)
    assert [(f["kind"], f["times"]) for f in worker.findings] == [(kind, 2)]
    # what a process that died had counted is lost
    assert worker.counts[kind] == 2 and (kind in ("crash", "hang") or worker.counts["refused"] == 5)
