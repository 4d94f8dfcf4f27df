"""Speed of the operations relative to a plain implementation of the same models (see reference.py).

    python -m benchmarks.speed [--quick] [--json] [--models srvae vae selfvae] [--size paper] [--threads 2]

Prints ratios, reference / ours, of medians of interleaved repeats, for each model M:
    train_M       seconds per training step, with Guard, AdaMax and EMA, at the same batch size
    memory_M      peak memory of a process that makes two such steps, bytes
    generateN_M   seconds for N images
    iwae512_M     seconds for IWAE-512 of one image; the reference's are extrapolated from fewer draws
    compress_M, decompress_M
                  seconds for a few images: one archive, compared with one file per image
Ours uses default settings. "seconds" and "bytes" are the values of both, (reference, ours). "floor" is the
time of ours if it consisted only of its convolutions and matrix products ("flops"), at the highest rate
that these reach on this machine. "at_most" is the reference's time divided by that floor: no implementation
of the same operations can be faster by more. Both are omitted for files, which are computed in float64 and
take most of their time for entropy coding.
"""

from __future__ import annotations

import copy
import json as jsonlib
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import tyro
from lightning_fabric import Fabric
from torch import Tensor

import selfvae
from benchmarks import reference
from benchmarks.measure import Task, flop_count, medians, own_peak, peak_flops
from selfvae.codec import Archive, Codec, pack
from selfvae.nn.precision import Precision, autocast, resolve
from selfvae.training.config import TrainConfig
from selfvae.training.loop import make_step, prepare

Pair = tuple[Task, Task]  # the reference's and ours


def model_and_images(
    name: str, size: str, n: int, initialise: bool = True
) -> tuple[selfvae.SelfVAE, Tensor]:
    """Return a model and smooth images with noise, uint8 (n, 3, 32, 32)."""
    torch.manual_seed(0)
    model = selfvae.build(name, size)
    coarse = torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4), 32, mode="bicubic")
    x = (255 * coarse + 8 * torch.randn(n, 3, 32, 32)).clamp(0, 255).byte()
    if initialise:
        model.initialise(x[:8])
    return model, x


def plain_training(
    model: selfvae.SelfVAE,
    x: Tensor,
    averaged: bool = True,
    layout: torch.memory_format = torch.contiguous_format,
) -> Task:
    """Return a training step of the reference, its networks in a memory layout."""
    model = reference.plain(model).to(memory_format=layout)  # type: ignore[call-overload]
    average = copy.deepcopy(model) if averaged else None
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-4, foreach=False)
    return lambda: reference.train_step(model, average, optimizer, x)


def training(model: selfvae.SelfVAE, x: Tensor, device: str = "cpu", precision: Precision = "auto") -> Task:
    """Return a training step of ours."""
    config = TrainConfig(batch_size=len(x), lr=1e-4)
    fabric = Fabric(devices=1, accelerator=device, precision=resolve(precision, device))
    wrapped, state = prepare(copy.deepcopy(model), fabric, config)
    return lambda: make_step(fabric, wrapped, state, x, config)


def within(precision: Precision, task: Callable[..., object], model: selfvae.SelfVAE, *args: Any) -> object:
    """Do a task of a model in a precision, as the command line does."""
    with autocast(model.device, precision):
        return task(model, *args)


def few(draws: int) -> int:
    """Return the number of draws for the reference, which would take too long with all of them."""
    return max(1, draws // 32)


def inference(
    model: selfvae.SelfVAE, x: Tensor, generated: tuple[int, ...], draws: int, files: int
) -> dict[str, Pair]:
    """Return the operations of a trained model, of the reference and of ours."""
    slow = reference.plain(model)
    fast = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    low = resolve("auto", "cpu")
    pairs: dict[str, Pair] = {
        f"generate{n}": (
            partial(selfvae.generate, slow, n),
            partial(within, low, selfvae.generate, fast, n),
        )
        for n in generated
    }
    pairs["iwae512"] = (
        partial(reference.iwae, slow, x[:1], few(draws)),
        partial(within, low, selfvae.iwae, fast, x[:1], draws),
    )
    one, other = Codec(slow), Codec(fast)
    album = [(str(i), x[i : i + 1]) for i in range(files)]
    alone, together = reference.compress(one, x[:files]), pack(other, album, verify=False)
    pairs["compress"] = (
        partial(reference.compress, one, x[:files]),
        partial(pack, other, album, verify=False),
    )
    pairs["decompress"] = (
        partial(reference.decompress, one, alone),
        lambda: list(Archive(other, together)),
    )
    return pairs


def peak(side: int, name: str, size: str, batch: int, threads: int) -> int:
    """Return the peak memory, bytes, of a separate process that trains the reference (0) or ours (1)."""
    command = [sys.executable, "-m", "benchmarks.speed", "--peak-of", str(side), "--models", name]
    command += ["--size", size, "--batch", str(batch), "--threads", str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


class _Race:
    """Times the reference and ours, and collects the results.

    Args:
        repeats: Of each measurement.
        quiet: Print nothing.
    """

    def __init__(self, repeats: int, quiet: bool) -> None:
        self.repeats, self.quiet = repeats, quiet
        self.precision = resolve("auto", "cpu")
        self.rate = peak_flops(torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32)
        self.result: dict[str, Any] = {"seconds": {}, "bytes": {}, "flops": {}, "floor": {}, "at_most": {}}

    def record(self, name: str, kind: str, reference: float, ours: float, more: str = "") -> None:
        """Add a pair of seconds or bytes."""
        self.result[name] = round(reference / ours, 2)
        self.result[kind][name] = [round(reference, 4), round(ours, 4)]
        if not self.quiet:
            ratio = self.result[name]
            print(f"{name:20} {ratio:6.2f}  {kind} {reference:.4g} -> {ours:.4g}{more}", flush=True)

    def compare(self, name: str, pair: Pair, scale: tuple[float, float] = (1, 1)) -> None:
        """Time a pair of tasks; their seconds are multiplied by `scale`."""
        found = medians(dict(zip("ab", pair, strict=True)), self.repeats)
        a, b = found["a"] * scale[0], found["b"] * scale[1]
        more = ""
        if "compress" not in name:
            count = flop_count(pair[1]) * scale[1]
            floor = count / self.rate
            self.result["flops"][name], self.result["floor"][name] = count, round(floor, 4)
            self.result["at_most"][name] = round(a / floor, 2)
            more = f", floor {floor:.4g}, at most {a / floor:.2f}"
        self.record(name, "seconds", a, b, more)


def main(
    models: tuple[str, ...] = ("srvae", "vae", "selfvae"),
    size: str = "paper",
    batch: int = 32,
    repeats: int = 3,
    threads: int = 2,
    quick: bool = False,
    json: bool = False,
    peak_of: int | None = None,
) -> None:
    """Measure.

    Args:
        models: presets.
        size: of the models.
        batch: images per training step.
        repeats: of each measurement.
        threads: of torch.
        quick: fewer images, draws and repeats: under five minutes.
        json: print only a JSON object.
        peak_of: only train the reference (0) or ours (1), and print the peak memory.
    """
    torch.set_num_threads(threads)
    if peak_of is not None:
        # without data-dependent initialisation, whose memory is not that of training
        task = (plain_training, training)[peak_of](*model_and_images(models[0], size, batch, False))
        task()
        task()
        print(own_peak())
        return
    generated, draws, files = (1, 20, 100), 512, 8
    if quick:
        models, batch, repeats, generated, draws, files = models[:2], 4, 1, (20,), 64, 2
    race = _Race(repeats, quiet=json)
    for name in models:
        model, x = model_and_images(name, size, max(batch, 8))
        race.compare(f"train_{name}", (plain_training(model, x[:batch]), training(model, x[:batch])))
        bytes_ = [peak(side, name, size, batch, threads) for side in (0, 1)]
        race.record(f"memory_{name}", "bytes", bytes_[0], bytes_[1])
        for kind, pair in inference(model, x, generated, draws, files).items():
            scale = (512 / few(draws), 512 / draws) if kind == "iwae512" else (1, 1)
            race.compare(f"{kind}_{name}", pair, scale)
    race.result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": threads,
        "precision": race.precision,
        "peak_flops": round(race.rate),
        "size": size,
        "batch": batch,
    }
    if json:
        print(jsonlib.dumps(race.result))


if __name__ == "__main__":
    tyro.cli(main)
