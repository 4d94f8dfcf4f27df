"""Sheets of images: grids, figures of titled rows, animations."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selfvae.data.batches import Bytes
from selfvae.data.pictures import save

__all__ = ["figure", "grid", "magnify", "save_animation", "save_figure", "save_grid", "to_rgb"]


def to_rgb(x: Tensor) -> Tensor:
    """Convert images uint8 (B, C, H, W), grey or colour, to RGB (B, 3, H, W); alpha is left out."""
    return x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)


def magnify(x: Tensor, rows: int, cols: int | None = None) -> Tensor:
    """Repeat every pixel of images (B, C, H, W) `rows` times down and `cols` (or `rows`) times across."""
    return x.repeat_interleave(rows, 2).repeat_interleave(cols or rows, 3)


def grid(x: Tensor, columns: int | None = None, zoom: int = 1, gap: int = 2) -> Tensor:
    """Arrange images in a grid, row by row.

    Args:
        x: uint8 (B, C, H, W), B at least 1.
        columns: images per row; by default about as many as rows.
        zoom: pixels per pixel, in height and width.
        gap: white pixels between images.

    Returns:
        RGB, uint8 (3, h, w).

    Raises:
        ValueError: if there are no images.
    """
    x = magnify(to_rgb(x), zoom)
    n, _, h, w = x.shape
    if n == 0:
        raise ValueError("no images to draw: ask for at least one")
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    out = torch.full((3, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i in range(n):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        out[:, top : top + h, left : left + w] = x[i]
    return out


def _array(picture: Tensor) -> Bytes:
    """(3, h, w) -> (h, w, 3)."""
    return picture.permute(1, 2, 0).contiguous().numpy()


def save_grid(x: Tensor, path: str | Path, columns: int | None = None, zoom: int = 2) -> None:
    """Write `grid` of uint8 (B, C, H, W) as a picture file."""
    save(Image.fromarray(_array(grid(x.cpu(), columns, zoom))), Path(path))


def figure(rows: list[tuple[str, Tensor]], cell: int = 96) -> Image.Image:
    """Draw titled rows of images.

    Args:
        rows: title and images, uint8 (B, C, H, W), of each row.
        cell: about how many pixels high and wide an image becomes (nearest neighbour).
    """
    gap, head = 4, 22
    largest = max(max(x.shape[2:]) for _, x in rows)
    side, strips = largest * max(1, cell // largest), []
    for title, x in rows:
        zoom = side // max(x.shape[2:])
        strips.append((title, Image.fromarray(_array(grid(x.cpu(), len(x), zoom, gap)))))
    font, top = ImageFont.load_default(14), 0
    width = max(max(strip.width, math.ceil(font.getlength(title))) for title, strip in strips) + 2 * gap
    height = sum(strip.height + head for _, strip in strips) + gap
    out = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(out)
    for title, strip in strips:
        draw.text((gap, top + 3), title, fill="black", font=font)
        out.paste(strip, (gap, top + head))
        top += head + strip.height
    return out


def save_figure(rows: list[tuple[str, Tensor]], path: str | Path, cell: int = 96) -> None:
    """Write `figure` of the rows as a picture file."""
    save(figure(rows, cell), Path(path))


def save_animation(x: Tensor, path: str | Path, milliseconds: int = 100) -> None:
    """Write images as an animation that repeats for ever.

    Args:
        x: uint8 (frames, C, H, W).
        path: ending in .gif or .webp.
        milliseconds: per frame.
    """
    first, *rest = (Image.fromarray(_array(frame)) for frame in to_rgb(x.cpu()))
    save(first, Path(path), save_all=True, append_images=rest, duration=milliseconds, loop=0)
