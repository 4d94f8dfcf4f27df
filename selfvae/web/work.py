"""The work of the page's tabs, without a browser: uploaded files in, pictures and numbers out."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

import torch
from PIL import Image
from torch import Tensor

from selfvae import hub, operations
from selfvae.codec import Codec, read_header
from selfvae.codec.bench import lossless_sizes
from selfvae.data import pictures
from selfvae.data.pictures import Picture, show, to_image, to_spec
from selfvae.data.sheets import figure, magnify, to_rgb
from selfvae.data.sources import square
from selfvae.metrics.enhancement import baseline_enhancement, psnr
from selfvae.model import SelfVAE, spread_levels
from selfvae.progress import Track, no_progress
from selfvae.tiling import tiled_if_large
from selfvae.transforms import BicubicDownscale, Jpeg
from selfvae.transforms.base import round_up

__all__ = [
    "Gap", "Models", "Packed", "compress", "enhance", "generate",
    "interpolate", "keeps_alpha", "open_packed", "prefix", "read", "shares",
]  # fmt: skip

_GAPS = ("photos-x2-v1", "photos-x2-bicubic-v1", "photos-x2-jpeg-v1", "photos-deband-v1")
_LATENT = "emoji-v3"
_GENERATORS = (_LATENT, "cifar10-2m-v1", hub.PHOTOS)
_REDUCED = {BicubicDownscale: "reduced by bicubic interpolation", Jpeg: "saved as JPEG"}
_LEVELS = 6  # shown of a long chain


@dataclass(frozen=True)
class Gap:
    """An enhancement: y[k] of a model is given, and the rest is drawn."""

    model: SelfVAE
    k: int

    def __str__(self) -> str:
        rows, cols = self.model.scale(self.k)
        given, whole = self.model.levels[self.k].spec, self.model.spec
        words = []
        if rows * cols > 1:
            parts = {type(part) for part in self.model.levels[0].transform.modules()}
            how = [text for kind, text in _REDUCED.items() if kind in parts]
            reduced = f" ({' and '.join(how)})" if how else ""
            words.append(f"enlarge it{reduced}, {cols} x as wide and {rows} x as high")
        if given.channels < whole.channels:
            words.append("colourise a grey picture")
        if given.num_values < whole.num_values:
            words.append(f"remove banding ({given.num_values} values per channel)")
        return "; ".join(words) or f"draw what y{self.k} does not hold"

    def label(self, pixels: int) -> str:
        """What to do, and how large a picture may be whose result has that many pixels at most."""
        text, enlarged = str(self), math.prod(self.model.scale(self.k))
        return f"{text[0].upper()}{text[1:]}" + (
            f": up to {pixels // enlarged:,} pixels" if enlarged > 1 else ""
        )


@dataclass(frozen=True)
class Models:
    """What the tabs work with: enhancements, a codec, models that generate, one with latents."""

    gaps: tuple[Gap, ...]
    codec: Codec | None
    generators: dict[str, SelfVAE]
    latent: SelfVAE | None

    @classmethod
    def load(cls, path: Path | None = None) -> Models:
        """Load one trained model, for everything that it can do; None: the bundled ones.

        Args:
            path: folder of a model, or a bundled one's name.

        Raises:
            FileNotFoundError, ValueError: if there is no such model, as `hub.load`.
        """
        if path is None:
            bundled = {name: hub.load(name) for name in (*_GAPS, *_GENERATORS)}
            gaps = tuple(Gap(bundled[name], 1) for name in _GAPS)
            generators = {name: bundled[name] for name in _GENERATORS}
            return cls(gaps, Codec(bundled[hub.PHOTOS]), generators, bundled[_LATENT])
        model = hub.load(path)
        gaps = tuple(Gap(model, k) for k in range(1, len(model.levels)))
        codec = Codec(model) if model.spec.num_values == 256 and model.spec.channels in (1, 3) else None
        return cls(gaps, codec, {path.name: model}, model if model.has_latents else None)


def read(
    data: bytes,
    pixels: int,
    exact: bool = False,
    multiples: tuple[int, int] = (1, 1),
    alpha: bool = False,
) -> Picture:
    """Read an uploaded picture, unless it is too large.

    Args:
        data: the file's bytes.
        pixels: height times width that it may have, checked before it is decoded.
        exact: refuse what `pictures.read_exactly` refuses.
        multiples: rows and columns that a model pads pictures to; the padding counts.
        alpha: with `exact`, take pictures with alpha; without, refuse them.

    Raises:
        ValueError: if the file is empty, too large, or cannot be read.
    """
    if not data:
        raise ValueError("the file is empty: drop another one")
    _check_pixels(*pictures.picture_size(io.BytesIO(data)), pixels, multiples)
    if exact and alpha:
        return pictures.read(io.BytesIO(data), exact=True)
    if exact:
        return Picture(pictures.read_exactly(io.BytesIO(data)))
    return pictures.read(io.BytesIO(data))


def _check_pixels(
    height: int,
    width: int,
    pixels: int,
    multiples: tuple[int, int] = (1, 1),
    which: str = "the picture has",
) -> None:
    if math.prod(round_up((height, width), multiples)) > pixels:
        raise ValueError(
            f"{which} {width} x {height} pixels, too many for this page, which takes {pixels:,} in all: "
            "choose or crop a smaller one, start the page with --pixels, or use the command line"
        )


# --- enhance ------------------------------------------------------------------------------------------


def enhance(
    gap: Gap,
    data: bytes,
    pixels: int,
    *,
    computed: bool = False,
    n: int = 2,
    track: Track = no_progress,
    **how: Unpack[operations.SamplingOptions],
) -> list[tuple[str, Image.Image]]:
    """Enhance an uploaded picture.

    Args:
        gap: the enhancement.
        data: the file's bytes.
        pixels: height times width that picture and result may have.
        computed: degrade the picture first (compute y[k] from it), and measure the results against it.
        n: number of draws.
        track: shows progress.
        **how: see `SamplingOptions`.

    Returns:
        Captions and pictures: what was given, the result without a model, n draws, and the clean picture
        where it is known.

    Raises:
        ValueError: if the picture is refused.
    """
    model, k = gap.model, gap.k
    picture, (rows, cols) = read(data, pixels, multiples=model.multiples[k]), model.scale(k)
    x: Tensor | None = None
    if computed:
        x = to_spec(picture, model.spec)
        height, width = x.shape[2] // rows, x.shape[3] // cols
        if not height or not width:
            raise ValueError(f"the picture must have at least {cols} x {rows} pixels to be made smaller")
        x = x[:, :, : height * rows, : width * cols]
        y = operations.infer(tiled_if_large(model, x[0, 0].numel()), x, f"y{k}")[f"y{k}"][
            :, :, :height, :width
        ]
    else:
        y = to_spec(picture, model.levels[k].spec)
    _check_pixels(y.shape[2] * rows, y.shape[3] * cols, pixels, model.multiples[0], "the result would have")
    large = tiled_if_large(model, y.shape[2] * rows * y.shape[3] * cols, track)
    seed = how.get("seed") or 0
    drawn = {"without a model": baseline_enhancement(model, y, k)}
    for i in track(range(n), "versions"):
        how["seed"] = seed + i
        drawn[f"version {i + 1}"] = operations.enhance(large, y, k, **how)
    out = [("given", magnify(show(y, model.levels[k].spec), rows, cols))]
    for name, value in drawn.items():
        shown = show(value, model.spec)
        if x is not None:
            name = f"{name}: {psnr(shown, show(x, model.spec)).item():.1f} dB"
        out.append((name, shown))
    if x is not None:
        out.append(("the picture itself", show(x, model.spec)))
    return [(name, _image(value)) for name, value in out]


def _image(x: Tensor) -> Image.Image:
    """A picture uint8 (1, C, h, w), C = 1 to 4, in RGB, or RGBA where it has alpha."""
    rgb = to_rgb(x)
    return to_image((rgb if x.shape[1] % 2 else torch.cat([rgb, x[:, -1:]], 1))[0])


# --- compress -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """A .svae file, whole or truncated.

    Args:
        data: its bytes.
        x: the picture, uint8 (1, C, H, W), if it is known.
        others: sizes of the same picture in other formats, in bytes, by name.
        seen: what was decoded of it, by the finest image that was complete.
    """

    data: bytes
    x: Tensor | None = None
    others: dict[str, int] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)

    def table(self) -> str:
        """Sizes, the smallest first, as Markdown."""
        if self.x is None:
            return ""
        sizes = {"**selfvae**": len(self.data), **self.others}
        lines = ["| lossless | bytes | bits per sub-pixel |", "|---|---|---|"]
        for name, size in sorted(sizes.items(), key=lambda item: item[1]):
            lines.append(f"| {name} | {size:,} | {8 * size / self.x.numel():.2f} |")
        return "\n".join(lines)


def shares(model: SelfVAE) -> dict[str, float]:
    """The share of each level in the work of coding a picture, roughly; they sum to 1.

    Integer models encode all levels together, which they call "pixels".
    """
    left = [1 / math.prod(model.scale(k)) for k in range(len(model.levels))]
    own = {f"y{k}": left[k] - (left[k + 1] if level.keeps else 0) for k, level in enumerate(model.levels)}
    return {"pixels": 1.0, **{name: part / sum(own.values()) for name, part in own.items()}}


def compression(codec: Codec) -> tuple[dict[str, float], tuple[str, ...]]:
    """The shares of the steps of `compress`, and what is being done in parts of equal length, in words."""
    others = "comparing with other formats"
    if codec.format >= 3:  # integer models encode and check all levels together
        return {"pixels": 1 / 2, "other formats": 1 / 2}, ("compressing and checking", others)
    levels = {name: share / 3 for name, share in shares(codec.model).items()}
    return {**levels, "other formats": 1 / 3}, ("compressing", "checking: reading it back", others)


def compress(codec: Codec, data: bytes, pixels: int, track: Track = no_progress) -> Packed:
    """Compress an uploaded picture, check the result, and find its size in other formats.

    Raises:
        ValueError: if the picture is refused, as by `read` with `exact`.
    """
    picture = read(data, pixels, exact=True, multiples=codec.model.multiples[0], alpha=keeps_alpha(codec))
    x, metadata = picture.channels(), picture.metadata if codec.format >= 3 else None
    packed = codec.compress(x, metadata=metadata, track=track)
    for _ in track(range(1), "other formats"):
        others = lossless_sizes(to_image(x[0]))
    return Packed(packed, x, {"your file": len(data), **others})


def open_packed(codec: Codec, data: bytes, pixels: int) -> Packed:
    """Take an uploaded .svae file, which may be truncated.

    Raises:
        ValueError: if it is no such file, or its picture has more than `pixels` pixels.
    """
    header = read_header(data)
    _check_pixels(header.height, header.width, pixels, codec.model.multiples[0])
    return Packed(data)


def keeps_alpha(codec: Codec) -> bool:
    """Whether files of this codec hold alpha and metadata."""
    return codec.format >= 3


def prefix(codec: Codec, file: Packed, part: float, track: Track = no_progress) -> tuple[Image.Image, str]:
    """Decode a prefix of a file, at least the first image in it.

    The files of integer models may also hold metadata, alpha, or "pixels": the whole picture in one part,
    stored as WebP.

    Args:
        codec: of the model that the file was made with.
        file: the file.
        part: fraction of its bytes, 0 to 1.
        track: shows progress.

    Returns:
        The picture, and what is exact in it, in words.
    """
    header = read_header(file.data)
    ends = header.ends()
    cut = round(part * len(file.data))
    images = [("y0" if name == "pixels" else name, end) for name, end in ends if name[0] in "yp"]
    cut = max(cut, images[0][1])  # the least that is a picture
    exact = [name for name, end in images if end <= cut][-1]
    alpha_too = all(end <= cut for name, end in ends if name == "alpha")
    seen = exact if alpha_too else f"{exact} without alpha"
    if seen not in file.seen:
        known = file.x if exact == "y0" else None
        file.seen[seen] = (
            codec.decompress(file.data[:cut], partial=True, track=track) if known is None else known
        )
    x, (rows, cols) = file.seen[seen], codec.model.scale(int(exact[1:]))
    words = f"{cut:,} of {ends[-1][1]:,} bytes: "
    if exact == "y0":
        words += f"{header.width} x {header.height} pixels, every one as it was"
        words += "; they are stored as WebP, in one part." if ends[-1][0] == "pixels" else "."
    else:
        size = f"{-(-header.width // cols)} x {-(-header.height // rows)}"
        words += (
            f"of {header.width} x {header.height} pixels {size} are exact ({exact}), the rest is guessed"
        )
        words += "" if alpha_too else ", alpha is missing"
        words += "." if file.x is None else f": {psnr(x, file.x[:, : x.shape[1]]).item():.1f} dB."
    return _image(x), words


# --- generate, interpolate ----------------------------------------------------------------------------


def generate(
    model: SelfVAE, n: int, track: Track = no_progress, **how: Unpack[operations.SamplingOptions]
) -> Image.Image:
    """Draw n unconditional samples; one picture of them, and of the levels they were drawn from."""
    height, width = model.config.image_shape[1:]
    drawn = operations.complete(model, {}, (n, height, width), track=track, **how)
    rows = []
    for k in spread_levels(model, _LEVELS):
        y = drawn[f"y{k}"]
        title = f"y{k}: {y.shape[3]} x {y.shape[2]}" if k else f"the images: {width} x {height} pixels"
        whole = magnify(to_rgb(show(y, model.levels[k].spec)), *model.scale(k))
        rows.append((title, whole[:, :, :height, :width]))
    return figure(rows)


def interpolate(
    model: SelfVAE,
    ends: Sequence[bytes],
    pixels: int,
    steps: int,
    given: str,
    track: Track = no_progress,
    **how: Unpack[operations.SamplingOptions],
) -> list[Image.Image]:
    """Interpolate between two uploaded pictures through the latents, at the model's own size.

    Args:
        model: with latents.
        ends: both files' bytes.
        pixels: height times width that each may have.
        steps: pictures in all, both ends included.
        given: which latents, as for `operations.interpolate`.
        track: shows progress over the steps.
        **how: see `SamplingOptions`.
    """

    def small(data: bytes) -> Tensor:
        picture = square(to_image(read(data, pixels).pixels[0]), model.config.image_shape[1])
        return to_spec(Picture(torch.tensor(picture)[None]), model.spec)

    a, b = map(small, ends)
    frames = show(operations.interpolate(model, a, b, steps, given, track=track, **how)[0], model.spec)
    return [_image(frame[None]) for frame in frames]
