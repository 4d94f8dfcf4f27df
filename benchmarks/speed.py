"""How much faster operations are than what one writes first (see reference.py), in one run.

    python -m benchmarks.speed [--quick] [--json] [--models srvae vae selfvae] [--size paper] [--threads 2]

Ratios, reference / ours, of the medians of interleaved repeats, by name:
    train_M       seconds of a training step, with Guard, AdaMax and EMA, at the same batch
    memory_M      peak memory of a process that makes two such steps, bytes
    generateN_M   seconds for N images
    iwae512_M     seconds of IWAE-512 of one image; the reference's from fewer draws, to which it is linear
    compress_M, decompress_M
                  seconds of a few images: one archive against files of their own
Ours uses what nobody has to ask for. "seconds" and "bytes" hold both sides' figures, (reference, ours);
"floor" what ours would take if its convolutions and matrix products (its "flops") were all there is,
and ran as fast as the best of them does here; "at_most" the reference's seconds over that floor: the
ratio that no rewriting with the same operations and numbers can pass (left out for files: these are
computed in float64, and most of it is coding).
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
from selfvae.nn.precision import autocast, resolve
from selfvae.training.config import TrainConfig
from selfvae.training.loop import make_step, prepare

Pair = tuple[Task, Task]  # the reference's and ours


def model_and_images(
    name: str, size: str, n: int, initialise: bool = True
) -> tuple[selfvae.SelfVAE, Tensor]:
    """A model and smooth images with noise, uint8 (n, 3, 32, 32)."""
    torch.manual_seed(0)
    model = selfvae.build(name, size)
    coarse = torch.nn.functional.interpolate(torch.rand(n, 3, 4, 4), 32, mode="bicubic")
    x = (255 * coarse + 8 * torch.randn(n, 3, 32, 32)).clamp(0, 255).byte()
    if initialise:
        model.initialise(x[:8])
    return model, x


def plain_training(model: selfvae.SelfVAE, x: Tensor) -> Task:
    """A step of the reference."""
    model = reference.plain(model)
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-4, foreach=False)
    return lambda: reference.train_step(model, average, optimizer, x)


def training(model: selfvae.SelfVAE, x: Tensor) -> Task:
    """A step of ours."""
    config = TrainConfig(batch_size=len(x), lr=1e-4)
    fabric = Fabric(devices=1, accelerator="cpu", precision=resolve(config.precision, "cpu"))
    wrapped, state = prepare(copy.deepcopy(model), fabric, config)
    return lambda: make_step(fabric, wrapped, state, x, config)


def few(draws: int) -> int:
    """Draws of the reference: so many take too long."""
    return max(1, draws // 32)


def inference(
    model: selfvae.SelfVAE, x: Tensor, generated: tuple[int, ...], draws: int, files: int
) -> dict[str, Pair]:
    """All that is done with a trained model."""
    slow = reference.plain(model)
    fast = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    low = resolve("auto", "cpu")

    def quickly(task: Callable[..., object], *args: Any) -> object:
        with autocast(fast.device, low):
            return task(fast, *args)

    pairs: dict[str, Pair] = {
        f"generate{n}": (partial(selfvae.generate, slow, n), partial(quickly, selfvae.generate, n))
        for n in generated
    }
    pairs["iwae512"] = (
        partial(reference.iwae, slow, x[:1], few(draws)),
        partial(quickly, selfvae.iwae, x[:1], draws),
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
    """Bytes of a process of its own that trains, by the reference (0) or ours (1)."""
    command = [sys.executable, "-m", "benchmarks.speed", "--peak-of", str(side), "--models", name]
    command += ["--size", size, "--batch", str(batch), "--threads", str(threads)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


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
        batch: images of a training step.
        repeats: of everything.
        threads: of torch.
        quick: fewer images, draws and repeats: under five minutes.
        json: print one JSON object and nothing else.
        peak_of: only train and print the peak memory: of the reference (0) or ours (1).
    """
    torch.set_num_threads(threads)
    if peak_of is not None:
        # without the initialisation, which runs layer by layer
        task = (plain_training, training)[peak_of](*model_and_images(models[0], size, batch, False))
        task()
        task()
        print(own_peak())
        return
    generated, draws, files = (1, 20, 100), 512, 8
    if quick:
        models, batch, repeats, generated, draws, files = models[:2], 4, 1, (20,), 64, 2
    precision = resolve("auto", "cpu")
    rate = peak_flops(torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    out: dict[str, Any] = {"seconds": {}, "bytes": {}, "flops": {}, "floor": {}, "at_most": {}}

    def note(name: str, kind: str, a: float, b: float, more: str = "") -> None:
        out[name] = round(a / b, 2)
        out[kind][name] = [round(a, 4), round(b, 4)]
        if not json:
            print(f"{name:20} {out[name]:6.2f}  {kind} {a:.4g} -> {b:.4g}{more}", flush=True)

    def compare(name: str, pair: Pair, scale: tuple[float, float] = (1, 1)) -> None:
        found = medians(dict(zip("ab", pair, strict=True)), repeats)
        a, b = found["a"] * scale[0], found["b"] * scale[1]
        more = ""
        if "compress" not in name:
            count = flop_count(pair[1]) * scale[1]
            floor = count / rate
            out["flops"][name], out["floor"][name] = count, round(floor, 4)
            out["at_most"][name] = round(a / floor, 2)
            more = f", floor {floor:.4g}, at most {a / floor:.2f}"
        note(name, "seconds", a, b, more)

    for name in models:
        model, x = model_and_images(name, size, max(batch, 8))
        compare(f"train_{name}", (plain_training(model, x[:batch]), training(model, x[:batch])))
        note(f"memory_{name}", "bytes", *(peak(side, name, size, batch, threads) for side in (0, 1)))
        for kind, pair in inference(model, x, generated, draws, files).items():
            scale = (512 / few(draws), 512 / draws) if kind == "iwae512" else (1, 1)
            compare(f"{kind}_{name}", pair, scale)
    out["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": threads,
        "precision": precision,
        "peak_flops": round(rate),
        "size": size,
        "batch": batch,
    }
    if json:
        print(jsonlib.dumps(out))


if __name__ == "__main__":
    tyro.cli(main)
