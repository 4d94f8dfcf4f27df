"""Work that processes share: the same results for any number of them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import selfvae
from selfvae import hub
from selfvae.cli import main
from selfvae.codec import Codec, pack
from selfvae.data import pictures
from selfvae.data.batches import Dataset, Images
from selfvae.distributed import distributed_map, launch, make_fabric, on_rank_zero, rank
from selfvae.metrics.fid import evaluate_samples
from selfvae.metrics.likelihood import evaluate
from selfvae.metrics.ood import evaluate_ood
from selfvae.reports.figures import draw_figures
from selfvae.reports.report import Settings, write_report
from selfvae.training.config import TrainConfig
from selfvae.training.loop import train

WORK = """
import atexit, json, sys
from pathlib import Path
import torch.distributed as dist
from tests.test_distributed import work
from selfvae.distributed import launch, rank, distributed_map

atexit.register(lambda: print("together at the end:", dist.is_initialized()))  # the last of those called
launch(2)
found = work(Path(sys.argv[1]), Path(sys.argv[2]))
found["ranks"] = distributed_map(lambda item: rank(), [0, 1, 2])
found["nested"] = distributed_map(lambda a: distributed_map(lambda b: a + b, ["1", "2"]), ["A", "B"])
try:
    distributed_map(lambda item: 1 // item, [1, 0, 1])
except ZeroDivisionError as error:
    found["error"] = str(error)
    assert "1 // item" in error.__notes__[0]
Path(sys.argv[2], f"{rank()}.json").write_text(json.dumps(found))
print(rank())
"""


def work(run: Path, out: Path) -> dict[str, object]:
    """Whatever is shared, with a model and its own images."""
    model = hub.load(run)
    x = torch.randint(
        0, 256, (10, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    images = Images(x.numpy())
    torch.manual_seed(5)
    files = draw_figures(model, x[:2], out, seed=0)
    archive = pack(Codec(model), [(str(i), image[None]) for i, image in enumerate(x)], block=4)
    some = Settings(
        limit=8,
        iwae_samples=2,
        iwae_limit=30,
        ood_limit=8,
        enhance_limit=4,
        draws=2,
        batch_size=4,
        figures=2,
    )
    whole = write_report([run], images, "noise", out / "report", some)
    return {
        "scores": evaluate(model, images, iwae_samples=3, batch_size=4),
        "ood": evaluate_ood(model, images, {"inverted": None}, batch_size=4),
        "quality": evaluate_samples(
            model, images, lambda x: x[:, 0, 0, :9].float(), n=10, batch_size=3, seed=0
        ),
        "archive": archive.hex(),
        "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        "report": whole.read_text().split("## Seconds")[0],
    }


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    model = selfvae.build("selfvae", "tiny", (3, 16, 16), width=0.05)
    hub.save(model, tmp_path / "run")
    (tmp_path / "work.py").write_text(WORK)
    done = subprocess.run(
        [sys.executable, tmp_path / "work.py", tmp_path / "run", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0", "together at the end: False"]  # one alone speaks
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1)]
    assert found[0] == found[1]
    assert found[0].pop("ranks") == [0, 1, 0]
    assert found[0].pop("nested") == [["A1", "A2"], ["B1", "B2"]]
    assert found[0].pop("error") == "integer division or modulo by zero"
    assert found[0] == work(tmp_path / "run", tmp_path / "on_rank_zero")


@pytest.mark.slow
def test_a_folder_by_two_processes(tmp_path: Path) -> None:
    hub.save(selfvae.build("selfvae-halve", "tiny", (3, 8, 8), width=0.05), tmp_path / "run")
    for i in range(3):
        pictures.write(torch.full((3, 8, 8), i, dtype=torch.uint8), tmp_path / f"in/{i}.png")
    (tmp_path / "in/bad.png").write_bytes(b"no picture")
    done = subprocess.run(
        [sys.executable, "-m", "selfvae.cli", "compress", tmp_path / "in", tmp_path / "out",
         "--model", tmp_path / "run", "--devices", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.count("3 of 4 files") == 1 and done.stderr.count("bad.png cannot be read") == 1
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0.svae", "1.svae", "2.svae"]


def _nodes(port: int, *words: object) -> list[subprocess.Popen[str]]:
    """A command on two "machines", each started by torchrun with two processes."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
             "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port),
             "-m", "selfvae.cli", *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]  # fmt: skip


def _children(parent: int) -> list[int]:
    stats = [file.read_text().rsplit(")", 1) for file in Path("/proc").glob("[0-9]*/stat")]
    return [int(head.split()[0]) for head, rest in stats if int(rest.split()[1]) == parent]


@pytest.mark.slow
def test_two_machines_one_of_which_fails(tmp_path: Path) -> None:
    """One process is killed in the middle; the same command again goes on from what is there."""
    hub.save(selfvae.build("selfvae-halve", "tiny", (3, 8, 8), width=0.05), tmp_path / "run")
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        x = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8, generator=generator)
        pictures.write(x, tmp_path / f"in/{i}.png")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, one = tmp_path / "out", tmp_path / "one"
    words = "compress", tmp_path / "in", out, "--model", tmp_path / "run", "--skip-existing"
    nodes = _nodes(port, *words)
    while not (out.is_dir() and len(list(out.glob("*.svae"))) > 3):
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.05)
    os.kill(_children(nodes[1].pid)[0], signal.SIGKILL)
    told = [node.communicate(timeout=120)[1] for node in nodes]
    assert all(node.returncode for node in nodes)
    assert "another process has ended, perhaps on another machine" in told[0]
    done = len(list(out.glob("*.svae")))
    assert 3 < done < 40
    nodes = _nodes(port, *words)
    printed = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert f"{done} of 40 files are done already" in printed[0] and not printed[1]
    assert f"{40 - done} of {40 - done} files" in printed[0]
    assert main(["compress", *map(str, words[1:2]), str(one), *map(str, words[3:5])]) == 0
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in one.iterdir()
    }


def test_one_process() -> None:
    assert rank() == 0 and launch().type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="at least 1"):
        launch(0)
    torch.manual_seed(1)
    one = distributed_map(lambda _: torch.rand(()).item(), range(3))
    torch.manual_seed(1)
    assert distributed_map(lambda _: torch.rand(()).item(), range(3)) == one and len(set(one)) == 3
    assert torch.rand(()).item() not in one
    torch.manual_seed(1)
    torch.randint(2**62, ())
    after = torch.rand(())
    torch.manual_seed(1)
    distributed_map(lambda _: torch.rand(9), range(3))
    assert torch.rand(()) == after  # one number is taken of the global state
    assert on_rank_zero(lambda: 4) == 4
    with pytest.raises(KeyError):
        distributed_map({}.__getitem__, [1])


def test_apple_gpus_are_never_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They have no float64; Fabric's own rule would take them."""
    from lightning_fabric import Fabric
    from lightning_fabric.accelerators import MPSAccelerator

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(MPSAccelerator, "parse_devices", staticmethod(lambda _: [0]))
    monkeypatch.setattr(
        MPSAccelerator, "get_parallel_devices", staticmethod(lambda _: [torch.device("mps")])
    )
    taken = Fabric(devices=1)
    assert taken.device.type == "mps" and make_fabric().device.type == launch().type == "cpu"
    config = selfvae.build("selfvae-halve", "tiny", (3, 8, 8), width=0.05).config
    images = Images(torch.zeros(8, 3, 8, 8, dtype=torch.uint8).numpy())
    data = Dataset("x", images, images, images)
    monkeypatch.setattr("selfvae.training.loop.launch_fabric", lambda fabric: None)
    few = TrainConfig(steps=1, eval_images=2)
    with pytest.raises(ValueError, match="Apple GPUs have no float64"):
        train(config, data, tmp_path / "mps", few, fabric=taken, quiet=True)
    train(config, data, tmp_path / "cpu", few, quiet=True)
