"""Training and packing, killed without warning at random moments and run again: the same bytes.

    python -m benchmarks.kills --times 50 --out results/kills.json

Every trial starts the command in a new process, ends it by SIGKILL at a random moment, and repeats the
command (training with --resume once there is a checkpoint) until it ends by itself. Weights, optimizer
state and learning curve (but for the seconds) must be those of a run that was never killed, and an archive
the same bytes; a file must at no time be half written.
"""

from __future__ import annotations

import csv
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file

from selfvae.cli import main as command
from selfvae.files import write_atomic
from selfvae.training.checkpoint import CHECKPOINT, PREVIOUS

_TRAIN = [
    "train", "--model", "selfvae-halve", "--size", "tiny", "--options", "width=0.05", "depth=0.3",
    "components=2", "--data", "x.npy", "--batch-size", "4", "--steps", "40", "--checkpoint-every", "2",
    "--eval-every", "10", "--eval-images", "4", "--log-every", "1",
]  # fmt: skip
_TIMED = {"seconds", "cpu_seconds"}  # columns of the learning curve


def _child(words: list[str]) -> None:
    torch.set_num_threads(1)
    for fd in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    sys.exit(command(words))


def _run(words: list[str], kill_after: float | None = None) -> tuple[float, int]:
    """Seconds that a command took, and its exit status; negative if it was killed."""
    process, began = mp.get_context("fork").Process(target=_child, args=(words,)), time.monotonic()
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    return time.monotonic() - began, process.exitcode or 0


def _training(out: Path) -> list[str]:
    resume = any((out / name).exists() for name in (CHECKPOINT, PREVIOUS))
    return ["train", "--resume", "--out", str(out)] if resume else [*_TRAIN, "--out", str(out)]


def _trained(out: Path) -> tuple[dict[str, torch.Tensor], bytes, list[dict[str, str]]]:
    with (out / "log.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in _TIMED} for row in csv.DictReader(file)]
    return load_file(out / CHECKPOINT), (out / "model.safetensors").read_bytes(), rows


def _same(a: Any, b: Any) -> bool:
    weights = a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())
    return bool(weights and a[1:] == b[1:])


def train_trials(times: int, rng: np.random.Generator) -> dict[str, Any]:
    """Trials of training."""
    taken, status = _run([*_TRAIN, "--out", "straight"])
    assert status == 0
    expected, kills, wrong = _trained(Path("straight")), 0, []
    while kills < times:
        out, tries = Path(f"run{kills}"), 0
        while True:
            # a second and a third kill in a run become rarer
            after = float(rng.uniform(0, 1.2 * taken)) if rng.random() < 0.9**tries else None
            _, status = _run(_training(out), after)
            tries += 1
            if status == 0:
                break
            assert status < 0, status
            kills += 1
        if not _same(_trained(out), expected):
            wrong.append(str(out))
    return {"kills": kills, "seconds_of_a_run": round(taken, 2), "other_results": wrong}


def pack_trials(times: int, rng: np.random.Generator) -> dict[str, Any]:
    """Trials of packing, to a new archive and over an old one."""
    words = ["pack", "in", "all.svaes", "--model", "cifar10-2m-v1", "--block", "4"]
    taken, status = _run(words)
    assert status == 0
    archive = Path("all.svaes")
    expected, kills, wrong = archive.read_bytes(), 0, 0
    while kills < times:
        old = b"an archive of another day" if rng.random() < 0.5 else None
        archive.unlink(missing_ok=True)
        if old:
            archive.write_bytes(old)
        _, status = _run(words, float(rng.uniform(0, 1.1 * taken)))
        kills += status < 0
        found = archive.read_bytes() if archive.exists() else None
        wrong += found not in (old, expected)
        if status < 0:
            assert _run(words)[1] == 0
            wrong += archive.read_bytes() != expected
    return {"kills": kills, "seconds_of_a_run": round(taken, 2), "other_results": wrong}


def main(out: Path, times: int = 50, seed: int = 0) -> int:
    """Kill training and packing at random moments; the exit status is 1 if a result differs.

    Args:
        out: JSON file for the results.
        times: kills of each command.
        seed: of the moments.
    """
    torch.set_num_threads(1)
    out, rng, here = out.absolute(), np.random.default_rng(seed), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            np.save("x.npy", rng.integers(0, 256, (64, 3, 8, 8), dtype=np.uint8))
            Path("in").mkdir()
            for i in range(16):
                x = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(x).save(f"in/{i}.png")
            found = {"train": train_trials(times, rng), "pack": pack_trials(times, rng)}
            found["train"]["files_left"] = sorted(
                {f.name for f in Path().glob("run*/.*")}
            )  # of interrupted writing; the next run takes no notice
        finally:
            os.chdir(here)
    write_atomic(out, (json.dumps(found, indent=1) + "\n").encode())
    print(json.dumps(found))
    return int(any(trials["other_results"] for trials in found.values()))


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
