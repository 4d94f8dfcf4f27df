"""The command line: thin functions whose signatures are the flags."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
import yaml
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import track
from tyro.conf import OmitArgPrefixes, Positional, arg

from selfvae import data as sources
from selfvae import demo as first_run
from selfvae import evaluate as scoring
from selfvae import figures as sheets
from selfvae import hub, pictures, plots, tasks
from selfvae import ood as outliers
from selfvae import quality as samples
from selfvae import report as whole
from selfvae import train as loop
from selfvae.model import SelfVAE
from selfvae.presets import PRESETS, SIZES, build, configure
from selfvae.tiles import tiled
from selfvae.train import TrainConfig
from selfvae.transforms import Format

_SETTINGS = "train.yaml"
_TILE = 192  # pixels of a tile's side
_WHOLE = (2 * _TILE) ** 2  # pixels, of all pictures drawn together, that are worked on without tiles

_Run = Annotated[Positional[Path], arg(metavar="DIR")]
_In = Annotated[Positional[Path], arg(metavar="IN")]
_Out = Annotated[Positional[Path], arg(metavar="OUT")]


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    width = max(map(len, result))
    for key, value in result.items():
        if isinstance(value, float):
            value = f"{value:.4f}"
        elif isinstance(value, list):
            digits = 4 if "bits" in key else 1
            value = ", ".join(f"{v:.{digits}f}" if isinstance(v, float) else str(v) for v in value)
        print(f"{key:<{width}}  {value}")


def train(
    out: Path,
    model: str = "selfvae",
    size: Literal["tiny", "small", "paper"] = "small",
    data: str = "photos",
    image_size: int | None = None,
    options: tuple[str, ...] = (),
    resume: bool = False,
    devices: int = 1,
    nodes: int = 1,
    training: Annotated[TrainConfig, OmitArgPrefixes] = TrainConfig(),  # noqa: B008 (frozen)
) -> None:
    """Train a model; Ctrl-C saves and ends, --resume goes on (with the flags of the first call).

    Args:
        out: folder for the model, the checkpoint, the curve (log.csv) and samples.
        model: name of a preset (selfvae info --presets lists them).
        size: of the networks.
        data: photos, cifar10, imagenet32, imagenet64, imagenette, celeba, or a path to images.
        image_size: height and width in pixels; by default the data's own.
        options: fields of the model's configuration, e.g. width=0.25 latents=top.
        resume: go on with the run in OUT.
        devices: GPUs or processes a node.
        nodes: how many nodes.
    """
    if not resume:
        loop.check_free(out)
    dataset = sources.load(data, image_size)
    overrides = dict(map(_option, options))
    _, c, h, w = dataset.train.shape
    config = configure(model, size, (c, h, w), **overrides)
    if not resume:
        flags = {
            "model": model, "size": size, "data": data, "image-size": image_size,
            "options": list(options), "devices": devices, "nodes": nodes,
            **{k.replace("_", "-"): v for k, v in vars(training).items()},
        }  # fmt: skip
        text = yaml.safe_dump({k: v for k, v in flags.items() if v not in (None, [])}, sort_keys=False)
        hub.write_atomic(out / _SETTINGS, text.encode())
    fabric = Fabric(devices=devices, num_nodes=nodes, precision=training.precision)
    loop.train(config, dataset, out, training, resume=resume, fabric=fabric)
    print(f"model and curve are in {out}")


@dataclass(frozen=True)
class Drawing:
    """How variables are drawn.

    Args:
        temperature: of every draw, 0.7, or by variable, y0=0.3,z1=1; below 1 plainer, 0 the modes.
        decode: sample, or mode: the most likely image at every level.
        seed: of the draws.
    """

    temperature: str = "1"
    decode: Literal["sample", "mode"] = "sample"
    seed: int = 0

    def how(self, net: SelfVAE) -> dict[str, Any]:
        """The keyword arguments of `tasks`, checked for the model."""
        heat: Any
        try:
            if "=" in self.temperature:
                pairs = (part.split("=") for part in self.temperature.split(","))
                heat = {name.strip() or "?": float(value) for name, value in pairs}
            else:
                heat = float(self.temperature)
        except ValueError:
            raise ValueError(
                f"--temperature takes a number, or NAME=NUMBER,...; got {self.temperature!r}"
            ) from None
        tasks.temperatures(net, heat, self.decode)
        return {"temperature": heat, "decode": self.decode, "seed": self.seed}


_Drawing = Annotated[Drawing, OmitArgPrefixes]
_DRAWING = Drawing()


def evaluate(
    model: _Run,
    data: str = "photos",
    split: Literal["train", "validation", "test"] = "test",
    iw: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    enhance: bool = False,
    level: int = 1,
    draws: int = 8,
    precision: scoring.Precision = "32-true",
    json: bool = False,
    drawing: _Drawing = _DRAWING,
) -> None:
    """Score a trained model: bits/dim of the ELBO, every term in nats and, with --iw, the IWAE bound.

    With --enhance instead: PSNR (dB), SSIM, consistency and diversity of images drawn given y alone.

    Args:
        model: folder that training wrote.
        data: as for train; images must have the model's number of channels.
        split: which images.
        iw: draws an image of the importance-weighted bounds (IWAE, and all pairs of draws); 0: none.
        limit: score the first so many images.
        batch_size: images at a time.
        enhance: score enhancement from y[LEVEL] instead of likelihood.
        level: which computed image is given.
        draws: enhancements of each image.
        precision: of the networks; bf16-mixed is faster, likelihoods stay in float32.
        json: print one JSON object and nothing else.
    """
    net = _load(model)
    images = _images(net, data, split)
    if enhance:
        result = scoring.enhancement(
            net, images, level, draws=draws, limit=limit, batch_size=batch_size, **drawing.how(net)
        )
    else:
        if (drawing, level, draws) != (Drawing(seed=drawing.seed), 1, 8):
            raise ValueError("--level, --draws, --temperature and --decode go with --enhance")
        torch.manual_seed(drawing.seed)
        result = scoring.evaluate(
            net, images, iw=iw, limit=limit, batch_size=batch_size, precision=precision
        )
    _show(result, json)


def ood(
    model: _Run,
    data: str = "photos",
    out_sets: tuple[str, ...] = ("noise", "constant", "inverted", "rotated"),
    limit: int | None = 1000,
    batch_size: int = 32,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Out-of-distribution detection: AUROC of every score per image, for every out-set.

    Args:
        model: folder that training wrote.
        data: the in-set, as for train; its test images.
        out_sets: noise, constant, inverted, rotated (made from the in-set), or any data as for train.
        limit: the first so many images of each.
        batch_size: images at a time.
        seed: of the latents and the random sets.
        json: print one JSON object and nothing else.
    """
    net = _load(model)
    inside = _images(net, data)
    outside = _outside(net, out_sets)
    result = outliers.ood(net, inside, outside, limit=limit, batch_size=batch_size, seed=seed)
    if json:
        _show(result, json)
        return
    print(f"AUROC, {result.pop('images')} images each")
    names = list(next(iter(result.values())))
    print(" " * 24 + "".join(f"{name:>10}" for name in names))
    for out_set, values in result.items():
        print(f"{out_set[-24:]:<24}" + "".join(f"{values[name]:>10.3f}" for name in names))


def _outside(net: SelfVAE, out_sets: Iterable[str]) -> dict[str, sources.Images | None]:
    """Out-sets by name; None for those that are made from the in-set."""
    return {name: None if name in outliers.ALTERED else _images(net, name) for name in out_sets}


def quality(
    model: _Run,
    data: str = "photos",
    split: Literal["train", "validation", "test"] = "test",
    n: int = 10_000,
    features: str = "inception",
    batch_size: int = 100,
    json: bool = False,
    drawing: _Drawing = _DRAWING,
) -> None:
    """Quality of samples: Frechet distance (FID), kernel distance (KID), precision and recall.

    Args:
        model: folder that training wrote.
        data: as for train: the real images.
        split: which of them; all are used.
        n: images to generate; the papers take 10,000 against test and 50,000 against train.
        features: inception, or MODULE:NAME, a network from images uint8 (B, 3, H, W) to (B, D).
        batch_size: images at a time.
        json: print one JSON object and nothing else.
    """
    network = _network(features)
    net = _load(model)
    images = _images(net, data, split)
    result = samples.quality(
        net, images, network, n, batch_size=batch_size, track=_track, **drawing.how(net)
    )
    _show(result, json)


def _network(features: str) -> samples.Network:
    """The feature network of that name, a user's own among them."""
    sys.path.append(os.getcwd())  # where it may lie
    return samples.load_network(features, _device())


def timing(
    model: _Run,
    counts: tuple[int, ...] = (1, 20, 100),
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Seconds to generate and to reconstruct so many images at once, medians.

    Args:
        model: folder that training wrote.
        counts: numbers of images.
        repeats: timed runs of each, after one that is not counted.
        json: print one JSON object and nothing else.
    """
    _show(scoring.timing(_load(model), counts, repeats), json)


def report(
    models: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR")],
    data: str = "photos",
    out: Path = Path("report"),
    out_sets: tuple[str, ...] = tuple(outliers.ALTERED),
    features: str | None = None,
    settings: Annotated[whole.Settings, OmitArgPrefixes] = whole.Settings(),  # noqa: B008 (frozen)
) -> None:
    """All scores of trained models in one report: OUT/report.md and OUT/report.html; goes on if ended.

    Args:
        models: folders that training wrote.
        data: as for train; its test images.
        out: folder of the report and of its parts.
        out_sets: as for ood.
        features: as for quality (inception, or MODULE:NAME); by default sample quality is left out.
    """
    if not models:
        raise ValueError("a report needs at least one folder with a model")
    first = hub.load(models[0])
    images = _images(first, data)
    path = whole.report(
        models, images, Path(data).name, out, settings, outside=_outside(first, out_sets), device=_device(),
        features=None if features is None else (features, _network(features)),
        command="selfvae " + " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:]),
        progress=lambda text: print(text, file=sys.stderr),
    )  # fmt: skip
    print(f"See {path}")


def _images(net: SelfVAE, data: str, split: str = "test") -> sources.Images:
    """A source's images at the model's size, where the source can be had in any."""
    dataset = sources.load(data, net.config.image_shape[1] if _resizable(data) else None)
    images: sources.Images = getattr(dataset, split)
    return images


def _option(text: str) -> tuple[str, Any]:
    """A model option KEY=VALUE."""
    key, given, value = text.partition("=")
    if not given or key in ("name", "size", "image_shape"):
        raise ValueError(f"--options takes fields of the model as KEY=VALUE, e.g. width=0.25; got {text!r}")
    return key, yaml.safe_load(value)


def _load(folder: Path) -> SelfVAE:
    """The model in a folder, where it is to score and draw."""
    return hub.load(folder).to(_device())


def _device() -> str:
    """Where to score and draw: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _resizable(data: str) -> bool:
    """Whether the source can be had in the model's size (arrays have their own)."""
    path = Path(data)
    return not (path.suffix == ".npy" or (path / "train.npy").exists())


def generate(
    model: _Run,
    out: Path = Path("grid.png"),
    n: int = 64,
    height: int | None = None,
    width: int | None = None,
    zoom: int = 2,
    drawing: _Drawing = _DRAWING,
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

    net = _load(model)
    _positive("n", n)
    pictures.check_ending(out)
    how = drawing.how(net)
    height, width = height or net.config.image_shape[1], width or net.config.image_shape[2]
    fitting, chunk = _fitting(net, height * width), max(1, _WHOLE // (height * width))
    parts = [
        tasks.generate(fitting, min(chunk, n - i), height, width, **{**how, "seed": how["seed"] + i})
        for i in range(0, n, chunk)
    ]
    images = torch.cat(parts)
    plots.save_grid(pictures.show(images, net.format), out, zoom=zoom)
    print(f"{n} images in {out}")


def enhance(
    source: _In,
    out: _Out,
    model: Path,
    level: int = 1,
    n: int = 1,
    drawing: _Drawing = _DRAWING,
) -> int:
    """Enlarge, colour or de-band a picture of your own: whichever undoes the model's transform.

    The picture is taken as y[LEVEL]: colour becomes grey for a model that colours, 8 bits become fewer for
    one that de-bands. Alpha is kept.

    Args:
        source: picture file, or a folder: every picture in it.
        out: picture file (.png and .webp are lossless), or folder for them.
        model: folder that training wrote.
        level: which computed image the picture is.
        n: draws; with more than one, OUT is a sheet: the picture and its draws.
    """

    net = _load(model)
    how = drawing.how(net)
    tasks.check_computed(net, level)
    _positive("n", n)
    rows, cols = net.scale(level)

    def work(picture: pictures.Picture, file: Path) -> None:
        y = pictures.to_format(picture, net.levels[level].format)
        fitting = _fitting(net, y.shape[2] * rows * y.shape[3] * cols)
        draws = [tasks.enhance(fitting, y, level, **{**how, "seed": how["seed"] + i})[0] for i in range(n)]
        shown = [pictures.show(x, net.format) for x in draws]
        if n == 1:
            pictures.write(shown[0], file, _alpha(picture, net.format))
        else:
            given = pictures.show(y, net.levels[level].format)
            given = given.repeat_interleave(rows, 2).repeat_interleave(cols, 3)
            sheet = [plots.to_rgb(x) for x in (given, *(x[None] for x in shown))]
            plots.save_grid(torch.cat([x.cpu() for x in sheet]), file, zoom=1)

    return _each(source, out, work, alpha=n == 1 and net.format.channels in (1, 3))


def reconstruct(
    source: _In,
    out: _Out,
    model: Path,
    given: str = "reconstruction",
    drawing: _Drawing = _DRAWING,
) -> int:
    """Draw a picture again from what the model infers of it. Alpha is kept.

    Args:
        source: picture file, or a folder: every picture in it.
        out: picture file (.png and .webp are lossless), or folder for them.
        model: folder that training wrote.
        given: what is kept: variables and the papers' operations, e.g. RS1, CR, u,z0.
    """

    net = _load(model)
    how, given_names = drawing.how(net), tasks.names(net, given)

    def work(picture: pictures.Picture, file: Path) -> None:
        x = pictures.to_format(picture, net.format)
        drawn = tasks.reconstruct(_fitting(net, x[0, 0].numel()), x, given_names, **how)
        pictures.write(pictures.show(drawn[0], net.format), file, _alpha(picture, net.format))

    return _each(source, out, work, alpha=net.format.channels in (1, 3))


def vary(
    source: _In,
    out: _Out,
    model: Path,
    n: int = 8,
    given: str = "u",
    drawing: _Drawing = _DRAWING,
) -> int:
    """Variations of a picture in one sheet, the picture itself first.

    Args:
        source: picture file, or a folder: every picture in it.
        out: picture file, or folder for them.
        model: folder that training wrote.
        n: number of variations.
        given: what is kept; the rest is drawn anew.
    """

    net = _load(model)
    how, given_names = drawing.how(net), tasks.names(net, given)
    _positive("n", n)

    def work(picture: pictures.Picture, file: Path) -> None:
        x = pictures.to_format(picture, net.format)
        drawn = tasks.vary(_fitting(net, n * x[0, 0].numel()), x, n, given_names, **how)[0].cpu()
        plots.save_grid(pictures.show(torch.cat([x, drawn]), net.format), file, zoom=1)

    return _each(source, out, work)


def interpolate(
    a: Annotated[Positional[Path], arg(metavar="A")],
    b: Annotated[Positional[Path], arg(metavar="B")],
    out: _Out,
    model: Path,
    steps: int = 8,
    given: str = "u",
    spherical: bool = False,
    milliseconds: int = 100,
    drawing: _Drawing = _DRAWING,
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

    net = _load(model)
    pictures.check_ending(out)
    for file in (a, b):
        _check_free(file, out)
    ends = [pictures.to_format(pictures.read(file), net.format) for file in (a, b)]
    fitting = _fitting(net, ends[0][0, 0].numel())
    frames = tasks.interpolate(
        fitting, ends[0], ends[1], steps, given, spherical=spherical, **drawing.how(net)
    )
    frames = pictures.show(frames[0], net.format)
    if out.suffix.lower() in (".gif", ".webp"):
        plots.save_animation(frames, out, milliseconds)
    else:
        plots.save_grid(frames, out, columns=steps, zoom=1)
    print(f"{steps} steps in {out}")


def figures(
    model: _Run,
    data: str = "photos",
    out: Path | None = None,
    n: int = 8,
    drawing: _Drawing = _DRAWING,
) -> None:
    """The papers' figures from a trained model, and a page that shows them: OUT/index.html.

    Args:
        model: folder that training wrote.
        data: as for train; the first N test images are shown.
        out: folder; by default figures inside the model's.
        n: images in a row.
    """

    net = _load(model)
    images = _images(net, data)
    files = sheets.figures(
        net, images.take(range(min(n, len(images)))), out or model / "figures", **drawing.how(net)
    )
    print(f"See {files[-1]}")


def _positive(flag: str, n: int) -> None:
    if n < 1:
        raise ValueError(f"--{flag} must be at least 1; got {n}")


def _fitting(net: SelfVAE, pixels: int) -> SelfVAE:
    """The model; in tiles, with a progress bar, for many pixels."""
    if pixels <= _WHOLE:
        return net
    return tiled(net, _TILE, track=_track)


def _track(sequence: Sequence[Any], description: str) -> Iterable[Any]:
    """A progress bar, on standard error."""
    return track(sequence, description, console=Console(stderr=True), transient=True)


def _check_free(source: Path, out: Path) -> None:
    if source.exists() and out.exists() and out.samefile(source):
        raise ValueError(f"{out} is the input itself: write to another file")


def _alpha(picture: pictures.Picture, format: Format) -> torch.Tensor | None:
    """The picture's alpha, unless the model itself has drawn one."""
    return None if picture.alpha is None or format.channels in (2, 4) else picture.alpha[0, 0]


def _each(
    source: Path, out: Path, work: Callable[[pictures.Picture, Path], None], alpha: bool = False
) -> int:
    """work(picture, output file) for a file, or for every picture below a folder.

    In a folder a broken picture is passed over and reported at the end: the exit status is then 1. `alpha`
    says whether the picture's alpha is to be written, so that a file that cannot hold it is refused early.
    """

    if not source.exists():
        raise FileNotFoundError(f"no picture or folder at {source}")
    if source.is_file():
        out = out / f"{source.stem}.png" if out.is_dir() else out
        _check_free(source, out)
        picture = pictures.read(source)
        pictures.check_ending(out, alpha and picture.alpha is not None)
        work(picture, out)
        print(f"{out}")
        return 0
    if out.exists() and not out.is_dir():
        raise ValueError(f"{source} is a folder, so OUT must be one; {out} is a file")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies in the input folder: write to another one")
    files = sorted(f for f in source.rglob("*") if f.suffix.lower() in pictures.ENDINGS)
    if not files:
        raise ValueError(
            f"{source} holds no pictures: expected files ending in {', '.join(pictures.ENDINGS)}"
        )
    stems = Counter(f.with_suffix("") for f in files)
    failed = []
    for file in files:
        target = out / file.relative_to(source)
        # two inputs that differ in their endings alone keep them
        alone = stems[file.with_suffix("")] == 1
        target = target.with_suffix(".png") if alone else target.with_name(f"{target.name}.png")
        try:
            work(pictures.read(file), target)
        except (ValueError, OSError) as error:
            failed.append(f"{file}: {error}")
    print(f"{len(files) - len(failed)} of {len(files)} pictures in {out}")
    for line in failed:
        print(f"selfvae: {line}", file=sys.stderr)
    return 1 if failed else 0


def info(
    model: Annotated[Positional[Path | None], arg(metavar="DIR")] = None,
    presets: bool = False,
    json: bool = False,
) -> None:
    """What a trained model is: configuration, parameters, levels. With --presets: the known names.

    Args:
        model: folder that training wrote.
        presets: list the presets with their parameter counts at every size instead.
        json: print one JSON object and nothing else.
    """

    def count(net: Any) -> int:
        return sum(p.numel() for p in net.parameters())

    if presets or model is None:
        sizes = {name: [count(build(name, size)) for size in SIZES] for name in PRESETS}
        _show({"size": list(SIZES), **sizes}, json)
        return
    net = hub.load(model)
    config = net.config.to_dict()
    config["levels_of_grey"] = config.pop("levels")
    levels = [
        f"y{k}: {level.format.channels} channels, {level.format.levels} levels"
        + (f", z{k}" if level.has_latent else "")
        + f", up by {level.transform}"
        for k, level in enumerate(net.levels)
    ]
    _show({**config, "parameters": count(net), "hierarchy": levels}, json)


def demo(out: Path = Path("demo"), fast: bool = False, seed: int = 0, json: bool = False) -> None:
    """Train two small models on photographs and show what they do: OUT/figure.png, OUT/result.json.

    Args:
        out: folder for the picture, the numbers and the models.
        fast: train for half a minute instead of three.
        seed: of everything random.
        json: print one JSON object and nothing else.
    """

    # whatever libraries print goes to standard error: standard output is for the result
    with contextlib.redirect_stdout(sys.stderr):
        result = first_run.demo(out, fast, seed)
    _show(result, json)
    if not json:
        print(f"\nSee {out / 'figure.png'}")


def _expand(argv: list[str]) -> list[str]:
    """Replace --config FILE, and --resume's saved settings, by the flags they stand for, put first."""
    settings: list[Path] = []
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config needs a YAML file")
        settings.append(Path(argv[at + 1]))
        del argv[at : at + 2]
    if argv[:1] == ["train"] and "--resume" in argv and "--out" in argv[:-1]:
        saved = Path(argv[argv.index("--out") + 1]) / _SETTINGS
        if saved.exists():
            settings.append(saved)
    flags: list[str] = []
    for path in settings:
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} must map flags to values, e.g. 'steps: 1000'")
        for key, value in values.items():
            key = key.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{key}" if value else f"--no-{key}")
            elif isinstance(value, list):
                flags += [f"--{key}", *map(str, value)]
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{path}: {key} must be finite")
            elif value is not None:
                flags += [f"--{key}", str(value)]
    return [*argv[:1], *flags, *argv[1:]]


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, 1 if some pictures of a folder failed, or 2 with a message for bad input."""
    commands: dict[str, Any] = {
        "train": train,
        "eval": evaluate,
        "quality": quality,
        "ood": ood,
        "time": timing,
        "report": report,
        "generate": generate,
        "sample": generate,
        "enhance": enhance,
        "reconstruct": reconstruct,
        "vary": vary,
        "interpolate": interpolate,
        "figures": figures,
        "info": info,
        "demo": demo,
    }
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            commands,
            args=_expand(sys.argv[1:] if argv is None else argv),
            prog="selfvae",
            description="Self-supervised variational auto-encoders.",
        )
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"selfvae: {error}", file=sys.stderr)
        return 2
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
