"""Sizes of pictures that are no photographs, drawn here, as .svae, WebP, PNG and JPEG XL files.

    python -m benchmarks.pictures [--model photos-v5] [--scale 1] [--json FILE]

With a model, files are what `selfvae compress` writes; without, they contain WebP. Each file of format 3 is
decoded and compared with its picture, and must be at most 64 bytes larger than the WebP file. The
columns "quick" are the time and size of WebP with quick settings (`codec.fallback`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import selfvae
from benchmarks.measure import seconds
from selfvae.codec import Codec
from selfvae.codec.bench import lossless_sizes
from selfvae.codec.fallback import encode_pixels
from selfvae.codec.picture import decode, encode
from selfvae.data.pictures import from_image

__all__ = ["PICTURES", "measure", "table"]

WHITE, BLACK, GREY, BLUE = (255, 255, 255), (0, 0, 0), (236, 238, 241), (38, 96, 202)
OVERHEAD = 64  # bytes that a file of format 3 may have beyond WebP
_WORDS = (
    "a", "the", "of", "image", "pixel", "level", "model", "code", "file", "and", "is", "to", "in", "with",
    "from", "each", "other", "finer", "part", "coarse", "value", "network",
)  # fmt: skip
_FORMATS = ("WebP", "PNG", "JPEG XL")


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words)).capitalize() + "."


def drawing(scale: int) -> Image.Image:
    """Coloured shapes with smooth edges."""
    rng, side = random.Random(1), 240 * scale
    large = Image.new("RGB", (4 * side, 3 * side), (252, 244, 222))
    draw = ImageDraw.Draw(large)
    for _ in range(40):
        x, y, r = rng.randrange(4 * side), rng.randrange(3 * side), rng.randrange(side // 8, side // 2)
        colour = tuple(rng.randrange(40, 256, 36) for _ in range(3))
        if rng.random() < 0.5:
            draw.ellipse((x - r, y - r, x + r, y + r), colour, BLACK, 6)
        else:
            draw.regular_polygon((x, y, r), rng.randint(3, 7), rng.randrange(90), colour, BLACK)
    return large.resize((side * 4 // 3, side), Image.Resampling.BOX)


def page(scale: int) -> Image.Image:
    """A window with a toolbar, buttons, a table and text, like a screenshot."""
    rng, width, height = random.Random(2), 320 * scale, 240 * scale
    image = Image.new("RGB", (width, height), WHITE)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    draw.rectangle((0, 0, width, 24), BLUE)
    draw.text((8, 5), "Pictures - selfvae", WHITE, font)
    draw.rectangle((0, 25, width, 48), GREY)
    for i in range(width // 64):
        draw.rounded_rectangle((6 + 64 * i, 29, 62 + 64 * i, 45), 4, WHITE, (170, 174, 180))
        draw.text((14 + 64 * i, 31), rng.choice(_WORDS), BLACK, font)
    for i, y in enumerate(range(56, height - 16, 16)):
        draw.rectangle((8, y, width - 8, y + 15), GREY if i % 2 else WHITE)
        draw.text((12, y + 1), _sentence(rng, 6 * scale), BLACK, font)
        draw.text((width - 60, y + 1), f"{rng.randrange(10**6):,}", BLUE, font)
    return image


def text(scale: int) -> Image.Image:
    """A page of black text in greys, as a scanner's software renders it."""
    rng, width, height = random.Random(3), 320 * scale, 240 * scale
    image = Image.new("L", (width, height), 255)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for y in range(6, height - 14, 15):
        draw.text((8, y), _sentence(rng, 8 * scale), 0, font)
    return image


def line_art(scale: int) -> Image.Image:
    """Thin black curves and hatching on white, of two values."""
    width, height = 320 * scale, 240 * scale
    image = Image.new("1", (width, height), 1)
    draw = ImageDraw.Draw(image)
    t = np.linspace(0, 40 * np.pi, 4000)
    for k in range(3):
        r = (0.3 + 0.06 * k) * height * np.cos(t * (7 + k) / 20)
        points = np.stack([width / 2 + 1.3 * r * np.cos(t / 20), height / 2 + r * np.sin(t / 20)], 1)
        draw.line([tuple(p) for p in points.round().tolist()], 0)
    for x in range(0, width // 4, 5):
        draw.line((x, 0, 0, x), 0)
    return image


def gradient(scale: int) -> Image.Image:
    """Smooth colours, without dither."""
    y, x = np.mgrid[0 : 1 : 240j * scale, 0 : 1 : 320j * scale]
    round_ = np.exp(-6 * ((x - 0.4) ** 2 + (y - 0.5) ** 2))
    channels = [40 + 180 * x, 250 * round_, 60 + 100 * y + 80 * round_]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8))


def icons(scale: int) -> Image.Image:
    """A sheet of icons with smooth edges on transparent ground."""
    rng, side = random.Random(4), 48 * scale
    sheet = Image.new("RGBA", (4 * side, 3 * side))
    for i in range(12):
        icon = Image.new("RGBA", (4 * side, 4 * side))
        draw, s = ImageDraw.Draw(icon), side
        colour = tuple(rng.randrange(20, 230) for _ in range(3))
        draw.rounded_rectangle((s // 3, s // 3, 4 * s - s // 3, 4 * s - s // 3), s // 2, (*colour, 255))
        draw.regular_polygon((2 * s, 2 * s, s), 3 + i % 5, 30 * i, (255, 255, 255, 230))
        sheet.paste(icon.resize((side, side), Image.Resampling.BOX), (side * (i % 4), side * (i // 4)))
    return sheet


def grey_alpha(scale: int) -> Image.Image:
    """A grey shadow that fades out."""
    y, x = np.mgrid[-1 : 1 : 120j * scale, -1 : 1 : 160j * scale]
    fade = np.clip(1.2 - np.hypot(x, y), 0, 1)
    return Image.fromarray(np.stack([90 - 60 * fade, 255 * fade], 2).astype(np.uint8))


PICTURES: dict[str, Callable[[int], Image.Image]] = {
    "drawing": drawing,
    "screenshot": page,
    "text": text,
    "line art": line_art,
    "gradient": gradient,
    "icons": icons,
    "shadow": grey_alpha,
}


def measure(image: Image.Image, codec: Codec | None = None) -> dict[str, float]:
    """Measure a picture's bytes in each format, and the seconds that WebP and the .svae file take.

    Args:
        image: Of mode 1, L, LA, RGB or RGBA.
        codec: Of an integer model; None: the .svae file contains WebP.

    Raises:
        AssertionError: The .svae file is too large, or does not give the picture back.
    """
    image = image.convert("L") if image.mode == "1" else image
    x, files = from_image(image), dict[str, bytes]()

    def svae() -> None:
        files["svae"] = codec.compress(x) if codec else encode(x)

    def quick() -> None:
        files["quick"] = encode_pixels(x, effort=1)

    spent = {"seconds": seconds(svae), "quick s": seconds(quick)}
    again = codec.decompress(files["svae"]) if codec else decode(files["svae"])[0]
    assert torch.equal(again, x), "the picture came back changed"
    sizes = lossless_sizes(image)
    assert len(files["svae"]) <= sizes["WebP"] + OVERHEAD, f"{len(files['svae'])} > {sizes['WebP']} + 64"
    own = {".svae": len(files["svae"]), "quick": len(files["quick"])}
    return {"raw": x.numel(), **own, **{name: sizes[name] for name in _FORMATS if name in sizes}, **spent}


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the results as a table in Markdown."""
    names = [name for name in ("raw", ".svae", *_FORMATS, "seconds", "quick", "quick s") if name in
             next(iter(results.values()))]  # fmt: skip
    rows = [f"| picture | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for picture, found in results.items():
        cells = [f"{found[n]:.2f}" if n[-1:] == "s" and n != ".svae" else f"{found[n]:,}" for n in names]
        rows.append(f"| {picture} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="1: 320 x 240 pixels")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--model", help="folder or name of an integer model")
    flags = parser.parse_args()
    codec = Codec(selfvae.load(flags.model)) if flags.model else None
    results = {name: measure(draw(flags.scale), codec) for name, draw in PICTURES.items()}
    print(table(results))
    if flags.json:
        flags.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
