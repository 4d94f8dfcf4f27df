"""Speed beside the code that was published with the papers: training steps, 20 images and FLOPs.

    git clone https://github.com/ioangatop/srVAE /tmp/srVAE
    python -m benchmarks.published /tmp/srVAE --out results/speed/published.json

Measures three sides in turn, in float32, for `vae` and `srvae` as published (RealNVP prior, 32 x 32): the
published code as it stands, the plain reference (reference.py), which does the same, and ours with its
default settings, which include a moving average of the weights and a guard of the gradients besides. On a
processor where bfloat16 is our default (`--precision auto`), ours is measured so as well ("ours_bf16").
All sides have the same convolutions, so the ratio to the time that these take in the published code
("at_most") is what any other code could reach. Needs a quiet machine.

The published code imports torchvision, of which it needs three transforms here; where it is not installed
they are replaced by Pillow's. It also asks for views that present torch cannot give where a convolution
chose another memory layout: they become copies.
"""

from __future__ import annotations

import importlib
import json
import platform
import subprocess
import sys
import types
from functools import partial
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
from benchmarks.measure import Task, flop_count, medians
from benchmarks.speed import model_and_images, plain_training, training
from selfvae.files import write_atomic
from selfvae.nn.precision import autocast, resolve

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


def published(source: Path, name: str, x: Tensor) -> tuple[nn.Module, Task, Task]:
    """Return the published model, its training step on images x and its generation of 20 images."""
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

    return net, step, generate


def _generate_bf16(model: selfvae.SelfVAE, n: int) -> None:
    with autocast(model.device, "bf16-mixed"):
        selfvae.generate(model, n)


def convolution_seconds(task: Task) -> float:
    """Return the seconds that a task spends in convolutions, forward and backward, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        task()
    spent = {event.key: event.self_cpu_time_total for event in record.key_averages()}
    return sum(us for key, us in spent.items() if key.startswith("aten::") and "convolution" in key) / 1e6


def compare(source: Path, name: str, batch: int, repeats: int) -> dict[str, Any]:
    """Measure one model: seconds, ratios to the published code, parameters and GFLOP."""
    model, x = model_and_images(name, "paper", batch)
    theirs, step, generate = published(source, name, x)
    fast = selfvae.build(name, "paper").eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fast.load_state_dict(model.state_dict())
    # without gradients the published code's convolutions choose the channels-last layout by themselves
    plain = reference.plain(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        forward = {
            "published": flop_count(lambda: theirs(x.float() / 255)),
            "reference": flop_count(lambda: plain(x)),
            "ours": flop_count(lambda: model(x)),
        }
    tasks: dict[str, dict[str, Task]] = {
        "train": {
            "published": step,
            "reference": plain_training(model, x, averaged=False),
            "ours": training(model, x, precision="32-true"),
        },
        "generate20": {
            "published": generate,
            "reference": partial(selfvae.generate, plain, 20),
            "ours": partial(selfvae.generate, fast, 20),
        },
    }
    if resolve("auto", "cpu") == "bf16-mixed":
        tasks["train"]["ours_bf16"] = training(model, x, precision="bf16-mixed")
        tasks["generate20"]["ours_bf16"] = partial(_generate_bf16, fast, 20)
    out: dict[str, Any] = {
        "parameters": {
            "published": sum(p.numel() for p in theirs.parameters()),
            "ours": sum(p.numel() for p in model.parameters()),
        },
        "forward_gflop_per_image": {side: round(n / batch / 1e9, 3) for side, n in forward.items()},
    }
    for what, sides in tasks.items():
        found = medians(sides, repeats)
        out[what] = {f"{side}_seconds": round(value, 4) for side, value in found.items()}
        for side in (name for name in sides if name != "published"):
            out[what][f"published/{side}"] = round(found["published"] / found[side], 2)
        convolutions = convolution_seconds(sides["published"])
        out[what]["convolutions_seconds"] = round(convolutions, 4)  # of the published code
        out[what]["at_most"] = round(found["published"] / convolutions, 2)  # if nothing else took time
    return out


def main(
    source: tyro.conf.Positional[Path],
    models: tuple[str, ...] = ("vae", "srvae"),
    batch: int = 8,
    repeats: int = 7,
    threads: int = 2,
    out: Path | None = None,
    one: str | None = None,
) -> None:
    """Measure.

    Args:
        source: clone of the published code.
        models: vae, srvae or both; each in a process of its own.
        batch: images per training step.
        repeats: of each measurement.
        threads: of torch.
        out: JSON file for the result.
        one: only measure this model, in this process.
    """
    torch.set_num_threads(threads)
    if one:
        print(json.dumps(compare(source.resolve(), one, batch, repeats)))
        return
    result: dict[str, Any] = {
        "batch": batch,
        "repeats": repeats,
        "threads": threads,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    for name in models:
        command = [sys.executable, "-m", "benchmarks.published", str(source), "--one", name]
        command += ["--batch", str(batch), "--repeats", str(repeats), "--threads", str(threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        result[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, json.dumps(result[name], indent=1), flush=True)
    if out:
        write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    tyro.cli(main)
