"""How well colour can be told from a grey picture by a plain network: an upper limit for colourisation.

    python -m benchmarks.colour DATA --seconds 400

A network sees a grey crop and predicts its blue and red minus grey at an eighth of the height and width, by
Huber loss, without any likelihood. With the true luma, the interpolated prediction is a colour picture. Its
PSNR stands beside those of the grey picture, of the crop's true mean colour, and of the true colour at an
eighth: what a chain that decides colour coarsely first could gain in its first step. DATA is a folder that
`selfvae prepare-crops` wrote.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tyro.conf import Positional

from selfvae.files import write_atomic
from selfvae.metrics.enhancement import psnr

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
COARSE = 8  # pixels of a side for which there is one colour


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


class ColourNet(nn.Module):
    """Grey (B, 1, H, W) -> chroma (B, 2, H / 8, W / 8): residual 3x3 layers that see the global mean."""

    def __init__(self, width: int = 64, layers: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(16, width, 3, padding=1), nn.ELU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ELU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2), nn.ELU(),
        )  # fmt: skip
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ELU(), nn.Conv2d(width, width, 3, padding=1)
            )
            for _ in range(layers)
        )
        self.everywhere = nn.Linear(width, width)
        self.head = nn.Conv2d(width, 2, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, grey: Tensor) -> Tensor:
        h = self.stem(F.pixel_unshuffle(grey / 64 - 2, 4))
        h = h + self.everywhere(h.mean((2, 3)))[:, :, None, None]
        for layer in self.layers:
            h = h + layer(F.elu(h))
        out: Tensor = 40 * self.head(F.elu(h))
        return out


@torch.no_grad()
def score(net: ColourNet, images: np.ndarray) -> dict[str, float]:
    """Return mean PSNR, dB, over images uint8 (N, 3, H, W)."""
    found: dict[str, list[Tensor]] = {}
    for part in torch.from_numpy(images).split(50):
        grey, chroma = split(part)
        coarse = F.avg_pool2d(chroma, COARSE)
        for name, small in (
            ("grey", torch.zeros_like(coarse)),
            ("predicted", net(grey)),
            ("true mean colour", coarse.mean((2, 3), keepdim=True)),
            ("true coarse colour", coarse),
        ):
            full = F.interpolate(small, grey.shape[2:], mode="bilinear")
            found.setdefault(name, []).append(psnr(merge(grey, full), part))
    return {name: round(torch.cat(values).mean().item(), 2) for name, values in found.items()}


def main(data: Positional[Path], seconds: float = 400.0, batch: int = 32, out: Path | None = None) -> None:
    """Train and score.

    Args:
        data: folder with train.npy, validation.npy and test.npy.
        seconds: of this process's own time that training takes.
        batch: crops per step.
        out: JSON file for the result.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    train = np.load(data / "train.npy", mmap_mode="r")
    names = [name for name in ("validation", "test") if (data / f"{name}.npy").exists()]
    held = {name: np.load(data / f"{name}.npy")[::3] for name in names}
    net, step, part = ColourNet(), 0, 0.0
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    began = time.process_time()
    while part < 1:
        optimizer.param_groups[0]["lr"] = 0.001 * (1 + math.cos(math.pi * part))
        x = torch.from_numpy(train[np.sort(rng.integers(len(train), size=batch))])
        grey, chroma = split(x.flip(3) if step % 2 else x)
        loss = F.huber_loss(net(grey), F.avg_pool2d(chroma, COARSE), delta=20.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, part = step + 1, (time.process_time() - began) / seconds
        if step % 500 == 0:
            print(step, {name: score(net, images) for name, images in held.items()}, flush=True)
    result: dict[str, object] = {"steps": step, "parameters": sum(p.numel() for p in net.parameters())}
    result |= {name: score(net, images) for name, images in held.items()}
    print(json.dumps(result, indent=1))
    if out:
        write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    tyro.cli(main)
