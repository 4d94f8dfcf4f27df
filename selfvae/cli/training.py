"""Commands that train, and what comes before and after."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import OmitArgPrefixes, Positional, arg

from selfvae import hub
from selfvae.cli.common import In, Out, Run, progress
from selfvae.data import crops, sources
from selfvae.distributed import make_fabric
from selfvae.files import write_atomic
from selfvae.nn.precision import resolve
from selfvae.presets import ModelConfig, configure
from selfvae.training import loop
from selfvae.training.checkpoint import check_free
from selfvae.training.config import TrainConfig

_SETTINGS = "train.yaml"


def train(
    out: Path,
    model: str = "selfvae",
    size: Literal["tiny", "small", "paper"] = "small",
    data: str = "photos",
    image_size: int | None = None,
    options: tuple[str, ...] = (),
    start: str | None = None,
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
        start: trained model to begin with, a folder or one that comes with the package (selfvae info),
            in place of --model, --size and --options.
        resume: go on with the run in OUT.
        devices: GPUs or processes a node.
        nodes: how many nodes.
    """
    if not resume:
        check_free(out)
    dataset = sources.load(data, image_size)
    _, c, h, w = dataset.train.shape
    trained = None if start is None or resume else hub.load(start)
    if trained:
        if (model, size, options) != ("selfvae", "small", ()):
            raise ValueError(
                "--start brings the model's own settings: leave out --model, --size and --options"
            )
        model, size, options = _flags(trained.config)
    config = configure(model, size, (c, h, w), **dict(map(_option, options)))
    precision = resolve(training.precision)
    if not resume:
        flags = {
            "model": model, "size": size, "data": data, "image-size": image_size,
            "options": list(options), "start": start, "devices": devices, "nodes": nodes,
            **{k.replace("_", "-"): v for k, v in vars(training).items()},
            "precision": precision,  # so that it goes on alike on another machine
        }  # fmt: skip
        text = yaml.safe_dump({k: v for k, v in flags.items() if v not in (None, [])}, sort_keys=False)
        write_atomic(out / _SETTINGS, text.encode())
    fabric = make_fabric(devices, nodes, precision)
    loop.train(config, dataset, out, training, init_from=trained, resume=resume, fabric=fabric)
    if not fabric.global_rank:
        print(f"model and curve are in {out}")


def push(
    model: Run,
    name: Annotated[Positional[str], arg(metavar="OWNER/NAME")],
    half: bool = False,
    private: bool = False,
) -> None:
    """Put a model on the Hugging Face hub, with a card; `hf auth login` first.

    Args:
        model: folder that training wrote; its settings go into the card.
        name: there; selfvae.from_pretrained takes it from then on.
        half: round the weights to float16, for half the bytes: another model, which cannot read files that
            this one compressed.
        private: for its owner alone.
    """
    sections = {}
    if (model / _SETTINGS).is_file():
        settings = yaml.safe_load((model / _SETTINGS).read_text())
        settings["data"] = Path(settings["data"]).name  # where it lay concerns nobody
        sections["Recipe"] = f"```\n{yaml.safe_dump(settings, sort_keys=False)}```"
    print(hub.push_to_hub(hub.load(model), name, sections, half=half, private=private))


def export(
    model: Run,
    out: Out,
    what: Literal["enhance", "decoder"] = "enhance",
    level: int | None = None,
) -> None:
    """Write the enhancement path or a decoder for other runtimes: ONNX, or a program of torch.export.

    Args:
        model: folder that training wrote, or a shipped model (selfvae info).
        out: file ending in .onnx or .pt2.
        what: enhance takes y[LEVEL] and gives the likeliest picture; decoder takes y[LEVEL + 1], and
            z[LEVEL] where there is one, and gives the parameters of y[LEVEL]'s distribution.
        level: by default 1 to enhance, 0 for the decoder.
    """
    from selfvae.export import DecoderPart, Enhancement, write

    net = hub.load(model)
    part: Enhancement | DecoderPart
    if what == "enhance":
        part = Enhancement(net, 1 if level is None else level)
    else:
        part = DecoderPart(net, 0 if level is None else level)
    write(part, out)
    taken = ", ".join(f"{name} {tuple(value.shape)}" for name, value in part.example().items())
    print(f"{out}: {out.stat().st_size:,} bytes; takes e.g. {taken}, gives {part.output}")


def crop(
    source: In,
    out: Out,
    size: int = 64,
    shrink: tuple[int, ...] = (2, 3, 4),
    n: int = 20_000,
    seed: int = 0,
) -> None:
    """Cut a folder of photographs into a data set for --data: random squares, whole pictures held out.

    Args:
        source: folder of at least three pictures; what lies in folders below it too.
        out: folder for train.npy, validation.npy and test.npy.
        size: height and width of a crop in pixels.
        shrink: factors by which every picture is shrunk first, which hides the traces of JPEG.
        n: crops to train on; a twentieth of that for validation, and for test.
        seed: of the choice.
    """
    pictures = crops.crop(source, out, size, shrink, n, seed, progress)
    print(
        f"{out}: {n} crops of {pictures['train']} pictures to train on, {n // 20} of "
        f"{pictures['validation']} others for validation and {n // 20} of {pictures['test']} for test"
    )


def _flags(config: ModelConfig) -> tuple[str, Any, tuple[str, ...]]:
    """--model, --size and --options that make a model of this configuration."""
    rest = {k: v for k, v in config.to_dict().items() if k not in ("name", "image_shape")}
    return config.name, "small", tuple(f"{key}={json.dumps(value)}" for key, value in rest.items())


def _option(text: str) -> tuple[str, Any]:
    """A model option KEY=VALUE."""
    key, given, value = text.partition("=")
    if not given or key in ("name", "size", "image_shape"):
        raise ValueError(f"--options takes fields of the model as KEY=VALUE, e.g. width=0.25; got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--options: {text!r} has no value that can be read, e.g. width=0.25") from None


def expand(argv: list[str]) -> list[str]:
    """Replace --config FILE, and --resume's saved settings, by the flags they stand for."""
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
    # after what has no flag, which a list would swallow; before the other flags, which count for more
    at = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return [*argv[:at], *flags, *argv[at:]]
