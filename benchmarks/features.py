"""Small classifiers, whose features score samples where the Inception network is not available.

    python -m benchmarks.features CIFAR10 [--seconds 600]
    selfvae fid RUN --data CIFAR10 --n 10000 --features benchmarks.features:Features
    python -m benchmarks.features EMOJI [--seconds 600]
    selfvae fid RUN --data EMOJI --n 2000 --features benchmarks.features:EmojiFeatures

CIFAR10 is a folder with train.npy, test.npy, train_labels.json and test_labels.json (lists of 0 to 9).
EMOJI is one with train.npy, test.npy and names.json (lists such as "noto-1f600" for both). The classes of
emoji are the drawing together with the range of code points, as far as a range has enough pictures.
Distances between these 128 features rank models trained on the same data. They are not FID and cannot be
compared with published values.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import load_file
from torch import Tensor, nn
from tyro.conf import Positional

from selfvae.data.batches import augment
from selfvae.distributions.pixels import to_unit
from selfvae.files import write_tensors

FOLDER = Path(__file__).parents[1] / "results/features"
WEIGHTS = FOLDER / "cifar10.safetensors"
_WIDTHS = (32, 64, 128, 128)
_RANGE = 64  # code points that count as one subject
_ENOUGH = 60  # training pictures per drawing of such a subject; the others are one class


class _Block(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Features(nn.Module):
    """Maps uint8 (B, 3, H, W) to 128 features, float (B, 128): means of the last feature maps."""

    def __init__(self, weights: Path | None = WEIGHTS, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c, (a, b) in enumerate(zip((3, *_WIDTHS), _WIDTHS, strict=False)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if c else []
            layers += [_Block(b)] if c in (1, 3) else []
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(_WIDTHS[-1], classes)
        if weights:
            if not weights.is_file():
                raise FileNotFoundError(
                    f"no classifier at {weights}: train it (python -m benchmarks.features)"
                )
            state = {name: value.float() for name, value in load_file(weights).items()}
            self.head = nn.Linear(_WIDTHS[-1], len(state["head.bias"]))
            self.load_state_dict(state, strict=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(to_unit(x, 256)).mean((2, 3))
        return out


class EmojiFeatures(Features):
    """The same, of the classifier of emoji."""

    def __init__(self, weights: Path | None = FOLDER / "emoji.safetensors") -> None:
        super().__init__(weights)


def read_labels(data: Path) -> dict[str, list[int]]:
    """Return the class of each image of "train" and "test"."""
    if not (data / "names.json").exists():
        return {part: json.loads((data / f"{part}_labels.json").read_text()) for part in ("train", "test")}
    names = json.loads((data / "names.json").read_text())

    def subject(name: str) -> tuple[str, int]:
        drawing, first = name.split("-")[:2]
        return drawing, int(first, 16) // _RANGE

    found = Counter(map(subject, names["train"]))
    drawings = sorted({drawing for drawing, _ in found})
    classes = drawings + [kind for kind, n in sorted(found.items()) if n >= _ENOUGH]
    number = {kind: i for i, kind in enumerate(classes)}
    return {
        part: [number.get(kind, number[kind[0]]) for kind in map(subject, names[part])]
        for part in ("train", "test")
    }


def main(data: Positional[Path], out: Path | None = None, seconds: float = 600, seed: int = 0) -> None:
    """Train the classifier and print its accuracy on the test images.

    Args:
        data: folder of CIFAR-10 or of emoji.
        out: file for the weights, float16; by default where `Features` or `EmojiFeatures` looks for it.
        seconds: training time, CPU seconds of this process.
        seed: of the training.
    """
    torch.manual_seed(seed)
    x = {part: torch.from_numpy(np.load(data / f"{part}.npy")) for part in ("train", "test")}
    out = out or (FOLDER / "emoji.safetensors" if (data / "names.json").exists() else WEIGHTS)
    labels = {part: torch.tensor(found) for part, found in read_labels(data).items()}
    classes = int(labels["train"].max()) + 1
    net = Features(None, classes).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    began, part, steps = time.process_time(), 0.0, 0
    while part < 1:
        chosen = torch.randint(len(x["train"]), (128,))
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * part)) / 2
        logits = net.head(net(augment(x["train"][chosen], flip=True, translate=3)))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels["train"][chosen], label_smoothing=0.1).backward()
        optimizer.step()
        part, steps = (time.process_time() - began) / seconds, steps + 1
    net.eval()
    with torch.no_grad():
        found = torch.cat([net.head(net(batch)).argmax(1) for batch in x["test"].split(500)])
    accuracy = (found == labels["test"]).float().mean().item()
    write_tensors(out, {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()})
    print(f"{steps} steps, {classes} classes, {accuracy:.1%} of the test images right; weights in {out}")


if __name__ == "__main__":
    tyro.cli(main)
