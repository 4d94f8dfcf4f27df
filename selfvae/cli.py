"""The command line: thin functions whose signatures are the flags."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from tyro.conf import OmitArgPrefixes, Positional

from selfvae.train import TrainConfig

_SETTINGS = "train.yaml"


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    width = max(map(len, result))
    for key, value in result.items():
        if isinstance(value, float):
            value = f"{value:.4f}"
        elif isinstance(value, list):
            value = ", ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in value)
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
    from lightning_fabric import Fabric

    from selfvae import data as sources
    from selfvae import hub, presets
    from selfvae import train as loop

    if not resume:
        loop.check_free(out)
    dataset = sources.load(data, image_size)
    overrides = dict(map(_option, options))
    _, c, h, w = dataset.train.shape
    config = presets.build(model, size, (c, h, w), **overrides).config
    assert isinstance(config, presets.ModelConfig)
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


def evaluate(
    model: Positional[Path],
    data: str = "photos",
    split: Literal["train", "validation", "test"] = "test",
    iw: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Score a trained model: bits/dim of the ELBO, every term in nats and, with --iw, the IWAE bound.

    Args:
        model: folder that training wrote.
        data: as for train; images must have the model's number of channels.
        split: which images.
        iw: draws of the importance-weighted bound; 0: none.
        limit: score the first so many images.
        batch_size: images at a time.
        seed: of the draws from the posteriors.
        json: print one JSON object and nothing else.
    """
    import torch

    from selfvae import data as sources
    from selfvae import evaluate as scoring
    from selfvae import hub

    net = hub.load(model).to(_device())
    dataset = sources.load(data, net.config.image_shape[1] if _resizable(data) else None)
    torch.manual_seed(seed)
    images = getattr(dataset, split)
    _show(scoring.evaluate(net, images, iw=iw, limit=limit, batch_size=batch_size), json)


def _option(text: str) -> tuple[str, Any]:
    """A model option KEY=VALUE."""
    key, given, value = text.partition("=")
    if not given or key in ("name", "size", "image_shape"):
        raise ValueError(f"--options takes fields of the model as KEY=VALUE, e.g. width=0.25; got {text!r}")
    return key, yaml.safe_load(value)


def _device() -> str:
    """Where to score and draw: the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _resizable(data: str) -> bool:
    """Whether the source can be had in the model's size (arrays have their own)."""
    path = Path(data)
    return not (path.suffix == ".npy" or (path / "train.npy").exists())


def sample(
    model: Positional[Path],
    out: Path = Path("grid.png"),
    n: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    zoom: int = 2,
) -> None:
    """Draw images from a trained model into one picture.

    Args:
        model: folder that training wrote.
        out: picture file.
        n: number of images.
        temperature: of every draw; below 1 plainer, 0 the modes.
        seed: of the draws.
        zoom: pixels of the picture for one of an image.
    """
    from selfvae import hub, plots, tasks

    net = hub.load(model).to(_device())
    _, height, width = net.config.image_shape
    images = tasks.generate(net, n, height, width, temperature=temperature, seed=seed)
    plots.save_grid(images, out, zoom=zoom)
    print(f"{n} images in {out}")


def info(model: Positional[Path | None] = None, presets: bool = False, json: bool = False) -> None:
    """What a trained model is: configuration, parameters, levels. With --presets: the known names.

    Args:
        model: folder that training wrote.
        presets: list the presets with their parameter counts at every size instead.
        json: print one JSON object and nothing else.
    """
    from selfvae import hub
    from selfvae import presets as known

    def count(net: Any) -> int:
        return sum(p.numel() for p in net.parameters())

    if presets or model is None:
        sizes = {n: [count(known.build(n, s)) for s in known.SIZES] for n in known.PRESETS}
        _show({"size": list(known.SIZES), **sizes}, json)
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
    from selfvae.demo import demo as run

    # whatever libraries print goes to standard error: standard output is for the result
    with contextlib.redirect_stdout(sys.stderr):
        result = run(out, fast, seed)
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
    """Run a command; 0, or 2 with a message on standard error for bad input."""
    commands: dict[str, Any] = {
        "train": train,
        "eval": evaluate,
        "sample": sample,
        "info": info,
        "demo": demo,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            args=_expand(sys.argv[1:] if argv is None else argv),
            prog="selfvae",
            description="Self-supervised variational auto-encoders.",
        )
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"selfvae: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
