"""The benchmarks run, and give what they promise; what they find is not for a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import codec, cost, pictures, rates
from benchmarks.measure import flop_count, medians, peak_flops
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


def test_measures() -> None:
    a = torch.rand(30, 40)
    assert flop_count(lambda: a @ a.T) == 2 * 30 * 40 * 30
    assert peak_flops(torch.float32, 1) > 1e8
    calls: list[str] = []
    found = medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == list("ababab") and found.keys() == {"a", "b"}
    assert found["a"] == pytest.approx(0, abs=1)
