"""Speed beside the code that was published with the papers: training steps, 20 images and FLOPs.

    git clone https://github.com/ioangatop/srVAE /tmp/srVAE
    python -m benchmarks.published /tmp/srVAE --out results/speed/published.json

Measures three sides in turn, in float32, for `vae` and `srvae` as published (RealNVP prior, 32 x 32): the
published code as it stands, the plain reference (reference.py), which does the same, and ours with its
default settings, which include a moving average of the weights and a guard of the gradients besides. On a
processor where bfloat16 is our default (`--precision auto`), ours is measured so as well ("ours_bf16").
All sides have the same convolutions, so the ratio to the time that these and the optimizer take in the
published code ("at_most") is what any other code could reach. Needs a quiet machine.

Each side has a process of its own, as in use: oneDNN keeps 1,024 compiled operations per process, and all
sides in one process would have theirs compiled again at each step, the published code most of all.

The published code imports torchvision, of which it needs three transforms here; where it is not installed
they are replaced by Pillow's. It also asks for views that present torch cannot give where a convolution
chose another memory layout: they become copies.
"""

from __future__ import annotations

import copy
import importlib
import json
import multiprocessing as mp
import platform
import sys
import types
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import selfvae
from benchmarks import reference
from benchmarks.measure import Task, flop_count, medians, peak_flops, seconds
from benchmarks.speed import model_and_images, plain_training, training, within
from selfvae.files import write_atomic
from selfvae.nn.precision import Precision, resolve

# of ours: the published model and its network
_NAMES = {"vae": ("VAE", "densenet32"), "srvae": ("srVAE", "densenet16x32")}


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _image(x: Tensor) -> Image.Image:
    return Image.fromarray((x.permute(1, 2, 0) * 255).byte().numpy())


def _resize(size: tuple[int, int], image: Image.Image) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


class _Compose:
    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __call__(self, x: Any) -> Any:
        for part in self.parts:
            x = part(x)
        return x


def _stand_ins() -> None:
    """Put modules in place that the published code imports and does not need here."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.utils",
                 "markdown", "requests"):  # fmt: skip
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = mock.MagicMock(__name__=name)
    vision = sys.modules["torchvision"]
    if isinstance(vision, mock.MagicMock):
        vision.transforms = types.SimpleNamespace(
            Compose=_Compose,
            ToPILImage=lambda: _image,
            ToTensor=lambda: _tensor,
            Resize=lambda size, *_: partial(_resize, size),
        )


_VIEW = torch.Tensor.view


def _view(x: Tensor, *shape: Any) -> Tensor:
    try:
        return _VIEW(x, *shape)
    except RuntimeError:
        return x.reshape(*shape)


def published(source: Path, name: str, x: Tensor) -> tuple[nn.Module, dict[str, Task]]:
    """Return the published model and its tasks on images x (see `side`)."""
    model, network = _NAMES[name]
    _stand_ins()
    sys.path.insert(0, str(source))
    sys.argv = ["main.py", "--model", model, "--network", network, "--prior", "RealNVP", "--device", "cpu"]
    code = importlib.import_module("src")
    torch.Tensor.view = _view  # type: ignore[assignment,method-assign]
    net = getattr(code, model)(tuple(x.shape[1:]))
    data = x.float() / 255
    net.initialize([(data, None)])
    criterion = code.ELBOLoss()
    optimizer = torch.optim.Adamax(net.parameters(), lr=2e-3, betas=(0.9, 0.999), eps=1e-7)
    scheduler = code.LowerBoundedExponentialLR(optimizer, gamma=0.999999, lower_bound=0.0001)

    def step() -> None:
        net.train()
        optimizer.zero_grad()
        loss, _ = criterion(data, net(data), net)
        loss.backward(retain_graph=True)
        optimizer.step()
        scheduler.step()

    def generate() -> None:
        net.eval()
        net.generate(20)

    return net, {"train": step, "generate20": generate, "bound": lambda: criterion(data, net(data), net)}


def side(which: str, source: Path, name: str, batch: int) -> tuple[nn.Module, dict[str, Task]]:
    """Prepare one side: published, reference, ours or ours_bf16.

    Returns:
        Its model, and its tasks: a training step, generation of 20 images, and the bound of a batch.
    """
    model, x = model_and_images(name, "paper", batch)
    if which == "published":
        return published(source, name, x)
    precision: Precision = "bf16-mixed" if which == "ours_bf16" else "32-true"
    if which == "reference":
        # what the published code's convolutions choose by themselves
        step = plain_training(model, x, averaged=False, layout=torch.channels_last)
        drawing = reference.plain(model)
    else:
        step = training(model, x, precision=precision)
        drawing = copy.deepcopy(model)
    drawing = drawing.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generate = partial(within, precision, selfvae.generate, drawing, 20)
    return model, {"train": step, "generate20": generate, "bound": lambda: model(x)}


def necessary_seconds(task: Task) -> float:
    """Return the seconds of a task's convolutions, both ways, and its optimizer, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        task()
    events = record.key_averages()
    spent = sum(
        e.self_cpu_time_total for e in events if e.key.startswith("aten::") and "convolution" in e.key
    )
    return (spent + sum(e.cpu_time_total for e in events if e.key.startswith("Optimizer.step"))) / 1e6


def _serve(pipe: Connection, threads: int, which: str, source: Path, name: str, batch: int) -> None:
    """Prepare a side and do what the pipe asks for until it asks for nothing."""
    torch.set_num_threads(threads)
    model, tasks = side(which, source, name, batch)
    with torch.no_grad():
        flop = flop_count(tasks["bound"])
    pipe.send((sum(p.numel() for p in model.parameters()), flop))
    while asked := pipe.recv():
        what, task = asked
        pipe.send(what(tasks[task]))


def _ask(pipe: Connection, what: Callable[[Task], object], task: str) -> Any:
    pipe.send((what, task))
    return pipe.recv()


def compare(source: Path, name: str, batch: int, repeats: int, threads: int) -> dict[str, Any]:
    """Measure one model: seconds, ratios to the published code, parameters and GFLOP."""
    names = ["published", "reference", "ours"]
    if resolve("auto", "cpu") == "bf16-mixed":
        names.append("ours_bf16")
    context, pipes, processes = mp.get_context("spawn"), {}, []
    for which in names:
        pipes[which], theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, threads, which, source, name, batch))
        process.start()
        theirs.close()
        processes.append(process)
    facts = {which: pipe.recv() for which, pipe in pipes.items()}
    three = names[:3]
    out: dict[str, Any] = {
        "parameters": {which: facts[which][0] for which in ("published", "ours")},
        "forward_gflop_per_image": {which: round(facts[which][1] / batch / 1e9, 3) for which in three},
    }
    for task in ("train", "generate20"):
        found = medians({which: partial(_ask, pipes[which], seconds, task) for which in names}, repeats)
        out[task] = {f"{which}_seconds": round(found[which], 4) for which in names}
        out[task] |= {
            f"published/{which}": round(found["published"] / found[which], 2) for which in names[1:]
        }
        necessary = min(_ask(pipes["published"], necessary_seconds, task) for _ in range(3))
        out[task]["necessary_seconds"] = round(necessary, 4)  # of the published code
        out[task]["at_most"] = round(found["published"] / necessary, 2)  # if nothing else took time
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    return out


def main(
    source: tyro.conf.Positional[Path],
    models: tuple[str, ...] = ("vae", "srvae"),
    batch: int = 8,
    repeats: int = 7,
    threads: int = 2,
    out: Path | None = None,
) -> None:
    """Measure.

    Args:
        source: clone of the published code.
        models: vae, srvae or both.
        batch: images per training step.
        repeats: of each measurement.
        threads: of torch.
        out: JSON file for the result; models that are not measured stay in it.
    """
    torch.set_num_threads(threads)
    kept = json.loads(out.read_text()) if out and out.exists() else {}
    result: dict[str, Any] = {
        "batch": batch,
        "repeats": repeats,
        "threads": threads,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "peak_float32_gflop_per_second": round(peak_flops(torch.float32) / 1e9, 1),
        **{name: kept[name] for name in _NAMES if name in kept},
    }
    for name in models:
        result[name] = compare(source.resolve(), name, batch, repeats, threads)
        print(name, json.dumps(result[name], indent=1), flush=True)
        if out:
            write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    tyro.cli(main)
