"""Commands that draw pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from selfvae import operations
from selfvae.cli.common import (
    SAMPLING,
    In,
    Out,
    Run,
    Sampling,
    alpha_of,
    check_free,
    each_picture,
    load_images,
    load_model,
    positive,
    progress,
)
from selfvae.data import pictures, sheets
from selfvae.reports.figures import draw_figures
from selfvae.tiling import WHOLE, tiled_if_large


def generate(
    model: Run,
    out: Path = Path("grid.png"),
    n: int = 64,
    height: int | None = None,
    width: int | None = None,
    zoom: int = 2,
    drawing: Sampling = SAMPLING,
) -> None:
    """Draw images from nothing into one picture.

    Args:
        model: folder that training wrote.
        out: picture file.
        n: number of images.
        height: of an image, in pixels; by default what the model was built for.
        width: of an image, in pixels.
        zoom: pixels of the picture for one of an image.
    """

    net = load_model(model)
    own = net.config.image_shape
    height, width = own[1] if height is None else height, own[2] if width is None else width
    for flag, value in (("n", n), ("height", height), ("width", width), ("zoom", zoom)):
        positive(flag, value)
    pictures.check_ending(out)
    how = drawing.how(net)
    fitting, chunk = tiled_if_large(net, height * width, progress), max(1, WHOLE // (height * width))
    parts = [
        operations.generate(fitting, min(chunk, n - i), height, width, **{**how, "seed": how["seed"] + i})
        for i in range(0, n, chunk)
    ]
    images = torch.cat(parts)
    sheets.save_grid(pictures.show(images, net.spec), out, zoom=zoom)
    print(f"{n} images in {out}")


def enhance(
    source: In,
    out: Out,
    model: Path = Path("selfvae-photos-x2"),
    level: int = 1,
    n: int = 1,
    devices: int = 1,
    drawing: Sampling = SAMPLING,
) -> int:
    """Enlarge, colour or de-band a picture of your own: whichever undoes the model's transform.

    The picture is taken as y[LEVEL]: colour becomes grey for a model that colours, 8 bits become fewer for
    one that de-bands. Alpha is kept.

    Args:
        source: picture file, or a folder: every picture in it.
        out: picture file (.png and .webp are lossless), or folder for them.
        model: folder that training wrote, or a shipped model (selfvae info).
        level: which computed image the picture is.
        n: draws; with more than one, OUT is a sheet: the picture and its draws.
        devices: GPUs or processes that share a folder's files.
    """

    net = load_model(model, devices)
    how = drawing.how(net)
    operations.check_computed(net, level)
    positive("n", n)
    rows, cols = net.scale(level)

    def work(picture: pictures.Picture, file: Path) -> None:
        y = pictures.to_spec(picture, net.levels[level].spec)
        fitting = tiled_if_large(net, y.shape[2] * rows * y.shape[3] * cols, progress)
        draws = [
            operations.enhance(fitting, y, level, **{**how, "seed": how["seed"] + i})[0] for i in range(n)
        ]
        shown = [pictures.show(x, net.spec) for x in draws]
        if n == 1:
            pictures.write(shown[0], file, alpha_of(picture, net.spec))
        else:
            given = sheets.magnify(pictures.show(y, net.levels[level].spec), rows, cols)
            sheet = [sheets.to_rgb(x) for x in (given, *(x[None] for x in shown))]
            sheets.save_grid(torch.cat([x.cpu() for x in sheet]), file, zoom=1)

    return each_picture(source, out, work, alpha=n == 1 and net.spec.channels in (1, 3))


def reconstruct(
    source: In,
    out: Out,
    model: Path,
    given: str = "reconstruction",
    devices: int = 1,
    drawing: Sampling = SAMPLING,
) -> int:
    """Draw a picture again from what the model infers of it. Alpha is kept.

    Args:
        source: picture file, or a folder: every picture in it.
        out: picture file (.png and .webp are lossless), or folder for them.
        model: folder that training wrote.
        given: what is kept: variables and the papers' operations, e.g. RS1, CR, u,z0.
        devices: GPUs or processes that share a folder's files.
    """

    net = load_model(model, devices)
    how, given_names = drawing.how(net), operations.names(net, given)

    def work(picture: pictures.Picture, file: Path) -> None:
        x = pictures.to_spec(picture, net.spec)
        drawn = operations.reconstruct(
            tiled_if_large(net, x[0, 0].numel(), progress), x, given_names, **how
        )
        pictures.write(pictures.show(drawn[0], net.spec), file, alpha_of(picture, net.spec))

    return each_picture(source, out, work, alpha=net.spec.channels in (1, 3))


def vary(
    source: In,
    out: Out,
    model: Path,
    n: int = 8,
    given: str = "u",
    drawing: Sampling = SAMPLING,
) -> int:
    """Variations of a picture in one sheet, the picture itself first.

    Args:
        source: picture file, or a folder: every picture in it.
        out: picture file, or folder for them.
        model: folder that training wrote.
        n: number of variations.
        given: what is kept; the rest is drawn anew.
    """

    net = load_model(model)
    how, given_names = drawing.how(net), operations.names(net, given)
    positive("n", n)

    def work(picture: pictures.Picture, file: Path) -> None:
        x = pictures.to_spec(picture, net.spec)
        drawn = operations.vary(
            tiled_if_large(net, n * x[0, 0].numel(), progress), x, n, given_names, **how
        )[0].cpu()
        sheets.save_grid(pictures.show(torch.cat([x, drawn]), net.spec), file, zoom=1)

    return each_picture(source, out, work)


def interpolate(
    a: Annotated[Positional[Path], arg(metavar="A")],
    b: Annotated[Positional[Path], arg(metavar="B")],
    out: Out,
    model: Path,
    steps: int = 8,
    given: str = "u",
    spherical: bool = False,
    milliseconds: int = 100,
    drawing: Sampling = SAMPLING,
) -> None:
    """From one picture to another through the latents: a strip, or an animation (.gif, .webp).

    Args:
        a: picture file to start from.
        b: picture file to end with, of the same size.
        out: .gif or .webp for an animation, any other picture file for a strip.
        model: folder that training wrote.
        steps: pictures, both ends included.
        given: the latents that are interpolated, e.g. u or u,z0.
        spherical: along an arc instead of a line.
        milliseconds: of a picture in an animation.
    """

    positive("milliseconds", milliseconds)
    net = load_model(model)
    pictures.check_ending(out)
    for file in (a, b):
        check_free(file, out)
    ends = [pictures.to_spec(pictures.read(file), net.spec) for file in (a, b)]
    fitting = tiled_if_large(net, ends[0][0, 0].numel(), progress)
    frames = operations.interpolate(
        fitting, ends[0], ends[1], steps, given, spherical=spherical, **drawing.how(net)
    )
    frames = pictures.show(frames[0], net.spec)
    if out.suffix.lower() in (".gif", ".webp"):
        sheets.save_animation(frames, out, milliseconds)
    else:
        sheets.save_grid(frames, out, columns=steps, zoom=1)
    print(f"{steps} steps in {out}")


def figures(
    model: Run,
    data: str = "photos",
    out: Path | None = None,
    n: int = 8,
    devices: int = 1,
    drawing: Sampling = SAMPLING,
) -> None:
    """The papers' figures from a trained model, and a page that shows them: OUT/index.html.

    Args:
        model: folder that training wrote.
        data: as for train; the first N test images are shown.
        out: folder; by default figures inside the model's, for a shipped model here.
        n: images in a row.
        devices: GPUs or processes that share the figures.
    """

    net = load_model(model, devices)
    images = load_images(net, data)
    out = out or (model if model.is_dir() else Path()) / "figures"
    files = draw_figures(net, images.take(range(min(n, len(images)))), out, **drawing.how(net))
    print(f"See {files[-1]}")
