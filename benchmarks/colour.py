"""How well colour can be told from a grey picture by a plain network: an upper limit for colourisation.

    python -m benchmarks.colour PICTURES... --validation FOLDER --test FOLDER --seconds 600

A network sees a grey picture and predicts its blue and red minus grey at an eighth of the height and width,
by Huber loss, without any likelihood. With the true luma, the interpolated prediction is a colour picture.
Its PSNR stands beside those of the grey picture, of the true mean colour, and of the true colour at an
eighth: what a chain that decides colour coarsely first could gain in its first step.

Whole pictures are scored, reduced to a shorter side of 192 pixels. Two things are chosen on those for
validation: when to stop, and a factor of 0 to 1 on the prediction, which shrinks it towards grey as far as
it is not to be trusted. With a factor of 0 nothing is lost.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn
from tyro.conf import Positional

from selfvae.data.pictures import ENDINGS, open_picture
from selfvae.files import below, write_atomic
from selfvae.metrics.enhancement import psnr

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
COARSE = 8  # pixels of a side for which there is one colour
SIDE = 192  # pixels of the shorter side of a picture that is scored
CROP = 128  # pixels of a side of what is trained on
MULTIPLE = 32  # of scored sides, for four scales of networks
FACTORS = tuple(i / 10 for i in range(11))
MEASURES = "mean", "pooled"


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return grey (B, 1, H, W), and blue and red minus grey (B, 2, H, W), float32, of RGB images uint8."""
    x = x.float()
    grey = sum(weight * x[:, c : c + 1] for c, weight in enumerate(_LUMA))
    assert isinstance(grey, Tensor)
    return grey, torch.cat([x[:, 2:], x[:, :1]], 1) - grey


def merge(grey: Tensor, chroma: Tensor) -> Tensor:
    """Invert `split`: RGB images, float32 (B, 3, H, W), within 0..255."""
    blue, red = grey + chroma[:, :1], grey + chroma[:, 1:]
    green = (grey - _LUMA[0] * red - _LUMA[2] * blue) / _LUMA[1]
    return torch.cat([red, green, blue], 1).clamp(0, 255)


def read(folder: Path, side: int) -> list[Tensor]:
    """Return all pictures below a folder, uint8 (1, 3, H, W), their shorter sides at most `side` pixels."""
    out = []
    for file in below(folder, ENDINGS):
        picture = open_picture(file).convert("RGB")
        ratio = min(1.0, side / min(picture.size))
        size = round(picture.width * ratio), round(picture.height * ratio)
        pixels = np.array(picture.resize(size, Image.Resampling.BOX))
        out.append(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    return out


def crop(pictures: Sequence[Tensor], n: int, random: np.random.Generator) -> Tensor:
    """Return random squares of pictures, flipped or not, enlarged or reduced to CROP pixels: uint8."""
    out = []
    for i in random.integers(len(pictures), size=n):
        x = pictures[i]
        h, w = x.shape[2:]
        side = round(min(h, w) * random.uniform(0.5, 1))
        top, left = random.integers(h - side + 1), random.integers(w - side + 1)
        x = x[..., top : top + side, left : left + side].float()
        x = F.interpolate(x, (CROP, CROP), mode="bilinear", antialias=True)
        out.append(x.flip(3) if random.random() < 0.5 else x)
    return torch.cat(out).round().to(torch.uint8)


class _Layer(nn.Sequential):
    """h + f(h), f: activation and 3x3 convolution, twice."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.ELU(), nn.Conv2d(width, width, 3, padding=1), nn.ELU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, h: Tensor) -> Tensor:
        change: Tensor = super().forward(h)
        return h + change


class ColourNet(nn.Module):
    """Grey (B, 1, H, W) -> chroma (B, 2, H / 8, W / 8): residual 3x3 layers that see the global mean.

    With several scales the layers are at an eighth of the height and width, a sixteenth, ..., and what they
    find is added on the way back (a U-shaped network).
    """

    def __init__(self, width: int = 64, layers: int = 5, scales: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(16, width, 3, padding=1), nn.ELU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ELU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2), nn.ELU(),
        )  # fmt: skip
        self.scales = nn.ModuleList(
            nn.Sequential(*(_Layer(width) for _ in range(layers))) for _ in range(scales)
        )
        self.back = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(scales - 1))
        self.everywhere = nn.Linear(width, width)
        self.head = nn.Conv2d(width, 2, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, grey: Tensor) -> Tensor:
        h = self.stem(F.pixel_unshuffle(grey / 64 - 2, 4))
        h = h + self.everywhere(h.mean((2, 3)))[:, :, None, None]
        found: list[Tensor] = []
        for layers in self.scales:
            h = layers(F.avg_pool2d(h, 2) if found else h)
            found.append(h)
        h = found.pop()
        for back in self.back:
            h = found.pop() + F.interpolate(back(h), scale_factor=2, mode="nearest")
        out: Tensor = 40 * self.head(F.elu(h))
        return out


@torch.no_grad()
def score(net: ColourNet, pictures: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Return PSNR, dB, of pictures uint8 (1, 3, H, W), whole but for a multiple of 32.

    Returns:
        (n, pictures) by name: "predicted" with n = one for each of FACTORS; "true mean colour" and "true
        coarse colour" with n = 1.
    """
    found: dict[str, list[list[float]]] = {}
    for x in pictures:
        h, w = (n // MULTIPLE * MULTIPLE for n in x.shape[2:])
        x = x[..., :h, :w]
        grey, chroma = split(x)
        coarse, predicted = F.avg_pool2d(chroma, COARSE), net(grey)
        for name, choices in (
            ("predicted", [factor * predicted for factor in FACTORS]),
            ("true mean colour", [coarse.mean((2, 3), keepdim=True).expand_as(coarse)]),
            ("true coarse colour", [coarse]),
        ):
            full = [F.interpolate(small, grey.shape[2:], mode="bilinear") for small in choices]
            found.setdefault(name, []).append([psnr(merge(grey, each), x).item() for each in full])
    return {name: np.array(values).T for name, values in found.items()}


def means(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the mean PSNR over pictures, and the PSNR of the mean square error, of (..., pictures)."""
    pooled = -10 * np.log10((10 ** (-values / 10)).mean(-1))
    return {"mean": values.mean(-1).round(2), "pooled": pooled.round(2)}


def main(
    train: Positional[tuple[Path, ...]],
    validation: Path,
    test: Path,
    seconds: float = 600.0,
    batch: int = 32,
    scales: int = 1,
    weight_decay: float = 0.05,
    out: Path | None = None,
) -> None:
    """Train and score.

    Args:
        train: folders of pictures; steps take them in turn.
        validation: folder of pictures by other photographers, for choices.
        test: folder of pictures by others again.
        seconds: of this process's own time that training takes.
        batch: crops per step.
        scales: of the network; 1: plain.
        weight_decay: of AdamW.
        out: JSON file for the result.
    """
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    sources = [read(folder, 2 * SIDE) for folder in train]
    held = {"validation": read(validation, SIDE), "test": read(test, SIDE)}
    net, step, used = ColourNet(layers=5 if scales == 1 else 2, scales=scales), 0, 0.0
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=weight_decay)
    best = dict.fromkeys(MEASURES, (-math.inf, 0, 0, net))  # score, step, factor, network
    curve: list[dict[str, object]] = []
    while used < seconds:
        began = time.process_time()
        optimizer.param_groups[0]["lr"] = 0.001 * (1 + math.cos(math.pi * used / seconds))
        grey, chroma = split(crop(sources[step % len(sources)], batch, random))
        loss = F.huber_loss(net(grey), F.avg_pool2d(chroma, COARSE), delta=20.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, used = step + 1, used + time.process_time() - began
        if step % 100 == 0 or used >= seconds:
            found = means(score(net, held["validation"])["predicted"])
            curve.append({"step": step, "loss": round(loss.item(), 2)})
            for measure, values in found.items():
                curve[-1][measure] = values.tolist()
                if values.max() > best[measure][0]:
                    best[measure] = values.max(), step, int(values.argmax()), copy.deepcopy(net)
            print(json.dumps(curve[-1]), flush=True)
    result: dict[str, object] = {
        "pictures": [len(source) for source in sources],
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps": step,
    }
    for measure, (_, stopped, factor, chosen) in best.items():
        own: dict[str, object] = {"stopped": stopped, "factor": FACTORS[factor]}
        result[measure] = own
        for name, pictures in held.items():
            found = {key: means(values)[measure] for key, values in score(chosen, pictures).items()}
            predicted, last = found["predicted"], means(score(net, pictures)["predicted"])[measure]
            own[name] = {
                "grey": predicted[0],
                "predicted": predicted[factor],
                "predicted, factor 1": predicted[-1],
                "predicted, last step, factor 1": last[-1],
                "true mean colour": found["true mean colour"][0],
                "true coarse colour": found["true coarse colour"][0],
            }
    print(json.dumps(result, indent=1))
    if out:
        write_atomic(out, (json.dumps({**result, "curve": curve}, indent=1) + "\n").encode())


if __name__ == "__main__":
    tyro.cli(main)
