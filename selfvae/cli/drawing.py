"""Commands that draw pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from selfvae.cli.common import load_images, load_model, sampling
from selfvae.cli.files import check_free, each_picture, read_picture, write_like
from selfvae.cli.flags import In, Out, Run, SamplingFlags, positive
from selfvae.cli.progress import FileProgress, note, progress

if TYPE_CHECKING:
    from selfvae.data.pictures import Picture
    from selfvae.model import SelfVAE

_SAMPLING = SamplingFlags()


def generate(
    model: Run,
    out: Path = Path("grid.png"),
    n: int = 64,
    height: int | None = None,
    width: int | None = None,
    zoom: int = 2,
    drawing: SamplingFlags = _SAMPLING,
) -> None:
    """Generate images and write them as one grid.

    Args:
        model: folder that selfvae train wrote, or a bundled model.
        out: picture file.
        n: number of images.
        height: height of each image in pixels; by default that of the training images.
        width: width of each image in pixels; by default that of the training images.
        zoom: size at which each pixel is shown, in pixels of the grid.
    """
    net = load_model(model)
    import torch

    from selfvae import operations
    from selfvae.data import pictures, sheets
    from selfvae.tiling import WHOLE, tiled_if_large

    own = net.config.image_shape
    height, width = own[1] if height is None else height, own[2] if width is None else width
    for flag, value in (("n", n), ("height", height), ("width", width), ("zoom", zoom)):
        positive(flag, value)
    pictures.check_ending(out)
    how = sampling(drawing, net)
    fitting, chunk = tiled_if_large(net, height * width, progress), max(1, WHOLE // (height * width))
    parts = []
    for i in progress(range(0, n, chunk), "generating images"):
        how["seed"] = drawing.seed + i
        parts.append(operations.generate(fitting, min(chunk, n - i), height, width, **how))
    sheets.save_grid(pictures.show(torch.cat(parts), net.spec), out, zoom=zoom)
    print(f"{n} images in {out}")


def enhance(
    source: In,
    out: Out,
    model: Path = Path("photos-x2-v1"),
    level: int = 1,
    scale: int | None = None,
    n: int = 1,
    convert: bool = False,
    skip_existing: bool = False,
    devices: int = 1,
    drawing: SamplingFlags = SamplingFlags(temperature="auto"),  # noqa: B008 (frozen)
) -> int:
    """Enlarge, colour or de-band a picture: whichever inverts the model's transform.

    The default model enlarges photographs. The picture is taken as y[LEVEL] of the model: colour is reduced
    to grey for a model that colours, 8 bits to fewer for one that de-bands. The result is the mean of the
    pictures that the model finds possible, which is nearest to the truth on average; --n and --temperature
    draw some of them. Alpha is kept.

    Args:
        source: picture file, or a folder: every picture in it.
        out: picture file (.png and .webp are lossless), or a folder for them.
        model: folder that selfvae train wrote, or a bundled model.
        level: which of the images that the model computes the picture is: y1, y2, ... .
        scale: factor by which a model that enlarges does so, 2, 4, 8, ...: it is applied to its own result
            until that is reached. By default it is applied once.
        n: number of draws; with more than one, OUT is a sheet of the picture and its draws.
        convert: reduce pictures with more than 8 bits per channel, with other colours than grey and RGB or
            with several frames to 8-bit grey or RGB, instead of refusing them.
        skip_existing: leave out files of a folder whose outputs exist and are newer, e.g. to go on after an
            interruption.
        devices: number of GPUs or processes that share a folder's files.
        temperature: sampling temperature: one number, or one per variable, e.g. y0=0.3,z1=1. auto is the
            mean, --decode mean, at the modes of the latents, and 1 with --n above 1.
    """
    net = load_model(model, devices)
    _check_level(net, level)
    positive("n", n)
    import torch

    from selfvae import operations
    from selfvae.data import pictures, sheets
    from selfvae.tiling import tiled_if_large
    from selfvae.web.work import shares

    how = sampling(drawing, net, auto=0.0 if n == 1 else 1.0)
    if n == 1 and drawing.temperature == "auto" and drawing.decode == "sample":
        how["decode"] = "mean"
    (rows, cols), parts, times = net.scale(level), shares(net), operations.times_applied(net, level, scale)

    def work(picture: Picture, file: Path, target: Path) -> None:
        y = pictures.to_spec(picture, net.levels[level].spec)
        shown = []
        with FileProgress(("enhancing",) * n * times, file.name, y[0, 0].numel(), parts) as bar:
            for i in range(n):
                how["seed"], x = drawing.seed + i, y
                for _ in range(times):
                    fitting = tiled_if_large(net, x[0, 0].numel() * rows * cols, bar.track)
                    x = operations.enhance(fitting, x, level, **how)
                shown.append(pictures.show(x[0], net.spec))
        if n == 1:
            write_like(picture, shown[0], target, net.spec)
        else:
            given = pictures.show(y, net.levels[level].spec)
            given = sheets.magnify(given, rows**times, cols**times)
            sheet = [sheets.to_rgb(x) for x in (given, *(x[None] for x in shown))]
            sheets.save_grid(torch.cat([x.cpu() for x in sheet]), target, zoom=1)

    keeps = n == 1 and net.spec.channels in (1, 3)
    return each_picture(source, out, work, keeps, convert, skip_existing)


def _check_level(net: SelfVAE, level: int) -> None:
    """Raise ValueError unless the model computes y[level]."""
    top = len(net.levels) - 1
    if not top:
        raise ValueError("this model computes no image to enhance from: choose one with transforms")
    if not 1 <= level <= top:
        found = "--level must be 1: this model computes only y1" if top == 1 else (
            f"--level must be 1 to {top}: this model computes y1 to y{top}"
        )  # fmt: skip
        again = " (to enlarge further, enhance the result again)" if net.scale(top) != (1, 1) else ""
        raise ValueError(f"{found}; got {level}{again}")


def reconstruct(
    source: In,
    out: Out,
    model: Path,
    condition_on: str = "reconstruction",
    convert: bool = False,
    devices: int = 1,
    drawing: SamplingFlags = _SAMPLING,
) -> int:
    """Reconstruct a picture from what the model infers from it. Alpha is kept.

    Args:
        source: picture file, or a folder: every picture in it.
        out: picture file (.png and .webp are lossless), or a folder for them.
        model: folder that selfvae train wrote, or a bundled model.
        condition_on: variables to condition on, by name or as the papers' operations, e.g. RS1, CR or u,z0;
            reconstruction is all latents.
        convert: as for enhance.
        devices: number of GPUs or processes that share a folder's files.
    """
    net = load_model(model, devices)
    from selfvae import operations
    from selfvae.data import pictures
    from selfvae.tiling import tiled_if_large
    from selfvae.web.work import shares

    how, chosen, parts = sampling(drawing, net), operations.names(net, condition_on), shares(net)

    def work(picture: Picture, file: Path, target: Path) -> None:
        x = pictures.to_spec(picture, net.spec)
        with FileProgress(("reconstructing",), file.name, x[0, 0].numel(), parts) as bar:
            fitting = tiled_if_large(net, x[0, 0].numel(), bar.track)
            drawn = operations.reconstruct(fitting, x, chosen, **how)
        write_like(picture, pictures.show(drawn[0], net.spec), target, net.spec)

    return each_picture(source, out, work, net.spec.channels in (1, 3), convert)


def vary(
    source: In,
    out: Out,
    model: Path,
    n: int = 8,
    condition_on: str = "u",
    convert: bool = False,
    drawing: SamplingFlags = _SAMPLING,
) -> int:
    """Draw variations of a picture, in one sheet with the picture itself first.

    Args:
        source: picture file, or a folder: every picture in it.
        out: picture file, or a folder for them.
        model: folder that selfvae train wrote, or a bundled model.
        n: number of variations.
        condition_on: variables that all variations share, e.g. u (the top latent) or u,z0; the others are
            drawn again.
        convert: as for enhance.
    """
    net = load_model(model)
    positive("n", n)
    import torch

    from selfvae import operations
    from selfvae.data import pictures, sheets
    from selfvae.tiling import tiled_if_large
    from selfvae.web.work import shares

    how, chosen, parts = sampling(drawing, net), operations.names(net, condition_on), shares(net)

    def work(picture: Picture, file: Path, target: Path) -> None:
        x = pictures.to_spec(picture, net.spec)
        pixels = n * x[0, 0].numel()
        with FileProgress(("drawing variations of",), file.name, pixels, parts) as bar:
            fitting = tiled_if_large(net, pixels, bar.track)
            drawn = operations.vary(fitting, x, n, chosen, **how)[0].cpu()
        sheets.save_grid(pictures.show(torch.cat([x, drawn]), net.spec), target, zoom=1)

    return each_picture(source, out, work, False, convert)


def interpolate(
    a: Annotated[Positional[Path], arg(metavar="A")],
    b: Annotated[Positional[Path], arg(metavar="B")],
    out: Out,
    model: Path,
    steps: int = 8,
    latents: str = "u",
    spherical: bool = False,
    milliseconds: int = 100,
    convert: bool = False,
    drawing: SamplingFlags = _SAMPLING,
) -> None:
    """Interpolate between two pictures in latent space: a strip, or an animation (.gif, .webp).

    Args:
        a: first picture.
        b: last picture, of the same size.
        out: .gif or .webp for an animation, any other picture file for a strip.
        model: folder that selfvae train wrote, or a bundled model.
        steps: number of pictures, both ends included.
        latents: latents to interpolate, e.g. u (the top one) or u,z0.
        spherical: interpolate along an arc (slerp) instead of a line.
        milliseconds: duration of each frame of an animation, in ms.
        convert: as for enhance.
    """
    positive("milliseconds", milliseconds)
    net = load_model(model)
    from selfvae import operations
    from selfvae.data import pictures, sheets
    from selfvae.tiling import tiled_if_large

    pictures.check_ending(out)
    for file in (a, b):
        check_free(file, out)
    ends = [pictures.to_spec(read_picture(file, convert), net.spec) for file in (a, b)]
    note(f"interpolating from {a.name} to {b.name}")
    fitting, how = tiled_if_large(net, ends[0][0, 0].numel()), sampling(drawing, net)
    frames = operations.interpolate(
        fitting, ends[0], ends[1], steps, latents, spherical=spherical, track=progress, **how
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
    drawing: SamplingFlags = _SAMPLING,
) -> None:
    """Draw the papers' figures from a trained model, and a page that shows them: OUT/index.html.

    Args:
        model: folder that selfvae train wrote, or a bundled model.
        data: data set, as for train; its first N test images are used.
        out: folder; by default MODEL/figures, and for a bundled model figures.
        n: number of images in a row.
        devices: number of GPUs or processes that share the figures.
    """
    net = load_model(model, devices)
    from selfvae.reports.figures import draw_figures

    images = load_images(net, data)
    out = out or (model if model.is_dir() else Path()) / "figures"
    files = draw_figures(net, images.take(range(min(n, len(images)))), out, **sampling(drawing, net))
    print(f"See {files[-1]}")
