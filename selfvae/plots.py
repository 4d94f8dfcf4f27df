"""Pictures: grids of images and the demo's figure."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

__all__ = ["grid", "save_grid", "to_rgb"]


def to_rgb(x: Tensor, levels: int = 256) -> Tensor:
    """uint8 (B, C, H, W) with C = 1, 3 or 4 and any number of levels -> RGB uint8 (B, 3, H, W)."""
    if levels != 256:
        x = (x.int() * 255 // (levels - 1)).to(torch.uint8)
    return x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)


def grid(x: Tensor, columns: int | None = None, zoom: int = 1, gap: int = 2) -> Tensor:
    """uint8 (B, C, H, W) -> one RGB picture (3, h, w), row by row, white gaps of `gap` pixels."""
    x = to_rgb(x).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    n, _, h, w = x.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    out = torch.full((3, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i in range(n):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        out[:, top : top + h, left : left + w] = x[i]
    return out


def save_grid(x: Tensor, path: str | Path, columns: int | None = None, zoom: int = 2) -> None:
    """Write `grid` as a picture file; the ending of `path` says which format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    picture = Image.fromarray(grid(x.cpu(), columns, zoom).permute(1, 2, 0).numpy())
    picture.save(temporary, format=Image.registered_extensions().get(path.suffix.lower(), "PNG"))
    temporary.replace(path)
