"""All that is to be learnt on a GPU within a limit of minutes, in the order of its worth.

    python -m benchmarks.gpu --minutes 25 --data CIFAR10 --out results/gpu

1. tests   the part of the test suite that needs a GPU
2. files   written on the CPU and read on the GPU, and the other way, with the bundled models
3. speed   training step, generation and IWAE-512 of the models at size `paper`, beside the plain
           reference (see reference.py, float32) in the same run: images per second, the share of the
           matrix ceiling measured here in bfloat16, peak memory; ours eager, compiled, as a CUDA graph
4. train   each model for an equal share of the minutes that are left, then bits/dim on test images

Every result is written to OUT/result.json as soon as it is known, with an error in place of a figure
where something failed. Called again, the command skips what is there and resumes the training. Models
below 16 MB come back as float16 folders, OUT/NAME. With `--device cpu --minutes 2` the same runs on a
CPU (with tiny models: `--size tiny`), so that it works at first sight on a GPU.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

import selfvae
from benchmarks import reference
from benchmarks.measure import Task, flop_count
from benchmarks.speed import model_and_images, plain_training, training
from selfvae.codec import Codec
from selfvae.files import write_atomic
from selfvae.nn.precision import autocast

LARGEST = 16 * 2**20  # bytes of a model that comes back
SCORING = 60.0  # seconds kept for a trained model's scores


class Results:
    """What is known so far: OUT/result.json."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.file, self.out = out / "result.json", out
        self.found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.ends = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.ends - time.monotonic()

    def once(self, name: str, task: Callable[[], object], least: float = 0.0) -> None:
        """Do a task unless its result is known or too little time is left; keep what it gives."""
        if name in self.found or self.left < least:
            return
        began = time.monotonic()
        try:
            value = task()
        except Exception:
            value = {"error": traceback.format_exc().splitlines()[-1][:300]}
        self.found[name] = value
        write_atomic(self.file, (json.dumps(self.found, indent=1) + "\n").encode())
        print(f"{name} ({time.monotonic() - began:.0f} s): {value}", flush=True)


def run_tests(seconds: float) -> str:
    """The last line of pytest over the tests marked `cuda`."""
    files = [file for file in Path("tests").rglob("test_*.py") if "mark.cuda" in file.read_text()]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=max(60, seconds), check=False)
    lines = done.stdout.strip().splitlines()
    return "; ".join([line for line in lines if line.startswith(("FAILED", "ERROR"))] + lines[-1:])


def cross_files(device: str) -> dict[str, object]:
    """For each bundled model: bytes of a file from either side, and whether the other side reads it."""
    found: dict[str, object] = {}
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    x = (255 * torch.nn.functional.interpolate(coarse, 64, mode="bicubic")).clamp(0, 255)
    x = (x + 4 * torch.randn(x.shape, generator=generator)).clamp(0, 255).byte()
    for name in selfvae.hub.bundled():
        model = selfvae.load(name)
        if model.spec.num_values != 256:
            continue
        here, there = Codec(model), Codec(copy.deepcopy(model).to(device))
        files = [codec.compress(x, verify=False) for codec in (here, there)]
        found[name] = {
            "bytes_cpu": len(files[0]),
            "bytes_device": len(files[1]),
            "device_reads_cpu": torch.equal(there.decompress(files[0]).cpu(), x),
            "cpu_reads_device": torch.equal(here.decompress(files[1]).cpu(), x),
        }
    return found


# --- speed ------------------------------------------------------------------------------------------------


def seconds_of(task: Task, device: str, repeats: int = 10) -> float:
    """Median seconds of a task, each run waited for, after three that do not count."""
    times = []
    for _ in range(repeats + 3):
        wait(device)
        began = time.perf_counter()
        task()
        wait(device)
        times.append(time.perf_counter() - began)
    return float(np.median(times[3:]))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ceiling(device: str) -> dict[str, float]:
    """FLOP/s of a large matrix product, in bfloat16, float32 and TF32."""
    n = 8192 if device == "cuda" else 512
    found = {}
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
    ):  # fmt: skip
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        found[name] = 2.0 * n**3 / seconds_of(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


@contextmanager
def peak_memory(found: dict[str, float], device: str) -> Iterator[None]:
    """Bytes allocated at most inside, beyond what was there before."""
    if device != "cuda":
        yield
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    found["bytes"] = torch.cuda.max_memory_allocated() - before


def rate(task: Task, images: int, device: str, peak: float, flops: int) -> dict[str, float]:
    """Images per second of a task over n images, and the share of the ceiling that it reaches."""
    found: dict[str, float] = {}
    with peak_memory(found, device):
        spent = seconds_of(task, device)
    return {
        "images_per_second": round(images / spent, 2), "seconds": round(spent, 5),
        "share_of_ceiling": round(flops / spent / peak, 4), **found,
    }  # fmt: skip


def forward_backward(model: selfvae.SelfVAE, x: Tensor) -> Task:
    """Networks and objective, forward and backward, in bfloat16: what compiling and graphs act on."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def task() -> object:
        with autocast(model.device, "bf16-mixed"):
            loss = -model(x).elbo.mean()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return task


def as_graph(task: Task) -> Task:
    """The same work recorded once as a CUDA graph and replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            task()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        task()
    return graph.replay


def measure_speed(results: Results, name: str, size: str, batch: int, device: str, compiled: bool) -> None:
    """Rates of one model, each written as it is known; compiled: only that of the compiled model."""
    peak = max(results.found["ceiling"].values())  # of bfloat16, where the device has it
    model, x = model_and_images(name, size, batch)
    model, x = model.to(device), x.to(device)
    fast = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast.requires_grad_(False)
    slow = reference.plain(model)
    draws, few = (512, 16) if device == "cuda" else (16, 4)

    def quickly(task: Callable[..., object], *args: Any) -> object:
        with autocast(fast.device, "bf16-mixed"):
            return task(fast, *args)

    step = forward_backward(copy.deepcopy(model).train(), x)
    flops = flop_count(step)
    iwae_flops = flop_count(lambda: selfvae.iwae(fast, x[:1], few)) * draws // few
    kinds: dict[str, tuple[Callable[[], Task], int, int]] = {
        "train_ours": (lambda: training(model, x, device), batch, flops),
        "train_reference": (lambda: plain_training(model, x), batch, flops),
        "forward_backward_eager": (lambda: step, batch, flops),
        "forward_backward_graph": (lambda: as_graph(step), batch, flops),
        "generate_ours": (lambda: lambda: quickly(selfvae.generate, 100), 100, 0),
        "generate_reference": (lambda: lambda: selfvae.generate(slow, 100), 100, 0),
        "generate1_ours": (lambda: lambda: quickly(selfvae.generate, 1), 1, 0),
        "iwae_ours": (lambda: lambda: quickly(selfvae.iwae, x[:1], draws), 1, iwae_flops),
        "iwae_reference": (lambda: lambda: reference.iwae(slow, x[:1], few), 1, iwae_flops * few // draws),
        "forward_backward_compiled": (
            lambda: forward_backward(torch.compile(copy.deepcopy(model).train()), x), batch, flops,
        ),
    }  # fmt: skip
    for kind, (make, images, work) in kinds.items():
        if kind.endswith("compiled") != compiled or (device != "cuda" and kind.endswith("graph")):
            continue
        least = 100 if compiled else 20
        results.once(f"{kind}_{name}", lambda: rate(make(), images, device, peak, work), least)  # noqa: B023
        if device == "cuda":
            torch.cuda.empty_cache()


# --- training ---------------------------------------------------------------------------------------------


def train(results: Results, name: str, size: str, data: str, seconds: float, flags: list[str]) -> object:
    """Train for a number of seconds, or go on; the curve, and bits/dim on 1,000 test images."""
    run = results.out / "runs" / name

    def command(*words: object) -> str:
        line = [sys.executable, "-m", "selfvae.cli", *map(str, words)]
        return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout

    if (run / "checkpoint.safetensors").exists():
        command("train", "--resume", "--out", run, "--max-seconds", seconds)
    else:
        command(
            "train", "--model", name, "--size", size, "--data", data, "--out", run, "--steps", 10**7,
            "--max-seconds", seconds, *flags,
        )  # fmt: skip
    scores = json.loads(command("eval", run, "--data", data, "--limit", 1000, "--json"))
    model = selfvae.load(run)
    if 2 * sum(p.numel() for p in model.parameters()) < LARGEST:
        selfvae.save(model, results.out / name, half=True)
    (results.out / f"{name}.csv").write_bytes((run / "log.csv").read_bytes())
    last = list(csv.DictReader((run / "log.csv").open()))[-1]
    return {"steps": int(last["step"]), "seconds": float(last["seconds"]), **scores}


def main(
    data: str,
    out: Path = Path("results/gpu"),
    minutes: float = 25.0,
    models: tuple[str, ...] = ("vae", "srvae", "selfvae-quincunx"),
    size: Literal["tiny", "small", "paper"] = "paper",
    batch: int = 128,
    trained: tuple[str, ...] = ("vae", "selfvae-quincunx"),
    options: str = "batch-size=256",
    device: Literal["cuda", "cpu"] = "cuda",
) -> None:
    """Measure.

    Args:
        data: to train on, as for `selfvae train`.
        out: folder for the results; the runs stay in OUT/runs.
        minutes: limit of the whole command.
        models: presets whose speed is measured.
        size: of all models.
        batch: images of a training step.
        trained: presets that are trained in the minutes left.
        options: further flags of `selfvae train`, as "NAME=VALUE NAME=VALUE".
        device: cuda, or cpu to try the command.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out, minutes)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    what = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    results.once(
        "machine", lambda: {"device": what, "torch": torch.__version__, "batch": batch, "size": size}
    )
    results.once("tests", lambda: run_tests(results.left / 3))
    results.once("files", lambda: cross_files(device))
    results.once("ceiling", lambda: ceiling(device))
    for compiled in (False, True)[: 2 if device == "cuda" else 1]:  # compiling may take minutes
        for name in models:
            measure_speed(results, name, size, batch, device, compiled)
    for i, name in enumerate(trained):
        share = (results.left - SCORING) / (len(trained) - i)
        if share > 10:
            words = [f"--{option}" for option in options.split()]
            results.once(f"trained_{name}", lambda: train(results, name, size, data, share, words))  # noqa: B023


if __name__ == "__main__":
    tyro.cli(main)
