"""Commands that train, and what comes before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from selfvae.cli import settings
from selfvae.cli.flags import In, Out, Run
from selfvae.cli.names import check_model, check_preset
from selfvae.cli.progress import note, progress
from selfvae.training.config import TrainConfig

if TYPE_CHECKING:
    from selfvae.data.batches import Dataset
    from selfvae.model import SelfVAE
    from selfvae.presets import ModelConfig

Size = Literal["tiny", "small", "paper"]


def train(
    out: Path,
    model: str = "selfvae",
    size: Size = "small",
    data: str = "photos",
    image_size: int | None = None,
    options: tuple[str, ...] = (),
    init_from: str | None = None,
    integer: bool = False,
    resume: bool = False,
    devices: int = 1,
    nodes: int = 1,
    training: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
) -> int:
    """Train a model. Ctrl-C saves the run and stops; --resume continues it, with its first call's flags.

    Args:
        out: folder for the model, the checkpoint, the learning curve (log.csv) and samples.
        model: preset; selfvae info --presets lists them.
        size: size of the networks.
        data: photos, cifar10, imagenet32, imagenet64, imagenette, celeba, an .npy file (N, C, H, W), or a
            folder of pictures.
        image_size: height and width in pixels; by default the data set's own.
        options: fields of the model's configuration, e.g. width=0.25 latents=top.
        init_from: trained model whose weights and configuration the run begins with, a folder or a bundled
            model, in place of --model and --size; --options changes its settings. A wider model without
            latents begins at what a narrower one computes; one with other transforms or latents at the
            top begins with the finest levels; a mixture prior in place of another is fitted to the data.
        integer: train a network of whole numbers, which compresses fast; usually --init-from a float one.
        resume: continue the run in OUT; --steps and --max-seconds count over all calls together.
        devices: number of GPUs or processes on each node.
        nodes: number of nodes.
    """
    if not resume:
        _check_names(model, init_from)
    elif over := _over(out, training):
        note(f"nothing to do: {over} to continue")
        return 0

    from selfvae.data import sources
    from selfvae.distributed import make_fabric
    from selfvae.nn.precision import resolve
    from selfvae.training import loop
    from selfvae.training.checkpoint import check_free

    if not resume:
        check_free(out)
    dataset = sources.load(data, image_size)
    trained = _trained(init_from, (model, size)) if init_from and not resume else None
    if trained:
        model, size, own_options = _flags(trained.config)
        options = (*own_options, *options)
    if integer:
        options = (*options, "integer=true")
    config = _configure(model, size, options, dataset)
    precision = resolve(training.precision)
    if not resume:
        own: dict[str, object] = {
            "import": settings.imported, "model": model, "size": size, "data": data,
            "image-size": image_size, "options": list(options), "init-from": init_from, "devices": devices,
            "nodes": nodes,
        }  # fmt: skip
        # the precision as resolved, so that the run continues alike on another machine
        _save(out, {**own, **vars(training), "precision": precision})
    fabric = make_fabric(devices, nodes, precision)
    try:
        loop.train(config, dataset, out, training, init_from=trained, resume=resume, fabric=fabric)
    except SystemExit:  # SIGTERM
        if not fabric.global_rank:
            _ending(out, training)
        raise
    return 0 if fabric.global_rank else _ending(out, training)


def _check_names(model: str, init_from: str | None) -> None:
    """Raise ValueError for an unknown model, before anything slow is imported."""
    if init_from is None:
        check_preset(model)
    else:
        check_model(Path(init_from))


def _trained(init_from: str, chosen: tuple[str, Size]) -> SelfVAE:
    """The model to begin with, which brings its own settings."""
    from selfvae import hub

    if chosen != ("selfvae", "small"):
        raise ValueError(
            "--init-from brings the model's own settings: leave out --model and --size; --options changes "
            "what the weights fit as well"
        )
    return hub.load(init_from)


def _configure(model: str, size: Size, options: tuple[str, ...], data: Dataset) -> ModelConfig:
    from selfvae.presets import configure

    _, c, h, w = data.train.shape
    chosen: dict[str, object] = dict(map(_option, options))
    return configure(model, size, (c, h, w), **chosen)


def _save(out: Path, flags: dict[str, object]) -> None:
    """Write the settings of a run, for --resume."""
    import yaml

    from selfvae.files import write_atomic

    kept = {k.replace("_", "-"): v for k, v in flags.items() if v is not None and v != []}
    write_atomic(out / settings.SAVED, yaml.safe_dump(kept, sort_keys=False).encode())


def _state(out: Path, training: TrainConfig) -> tuple[int, float, int]:
    """Of a run's checkpoint: steps, seconds by the clock that counts, evaluations without improvement."""
    from safetensors import SafetensorError, safe_open

    from selfvae.training.checkpoint import CHECKPOINT, PREVIOUS

    for name in (CHECKPOINT, PREVIOUS):
        try:
            with safe_open(out / name, framework="np") as file:
                state = json.loads(file.metadata()["state"])
            seconds = state.get("cpu_seconds" if training.clock == "cpu" else "seconds", 0.0)
            return int(state["step"]), float(seconds), int(state.get("since_best", 0))
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            continue  # training says what is wrong
    return 0, 0.0, 0


def _over(out: Path, training: TrainConfig) -> str:
    """Why there is nothing left to train in a run, if so."""
    step, seconds, _ = _state(out, training)
    if 0 < training.max_seconds <= seconds:
        return (
            f"{out} has used {seconds:.0f} of its {training.max_seconds:g} seconds of training, which "
            "count over all calls; give a larger --max-seconds"
        )
    return f"{out} has made its {step} steps; give more --steps" if training.steps <= step else ""


def _ending(out: Path, training: TrainConfig) -> int:
    """Say how a run has ended, and return the exit status: 130 if it was interrupted."""
    step, seconds, since_best = _state(out, training)
    spent = 0 < training.max_seconds <= seconds or 0 < training.patience <= since_best
    if 0 < step < training.steps and not spent:
        note(f"interrupted after {step} steps, which are saved: --resume --out {out} continues")
        return 130
    print(f"model and learning curve are in {out}")
    return 0


def push(
    model: Run,
    name: Annotated[Positional[str], arg(metavar="OWNER/NAME")],
    half: bool = False,
    private: bool = False,
) -> None:
    """Upload a model to the Hugging Face hub, with a model card. Run `hf auth login` first.

    Args:
        model: folder that selfvae train wrote; its settings become part of the card.
        name: name on the hub, which selfvae.from_pretrained then takes.
        half: round the weights to float16, for half the bytes; by default they stay as they are. Rounding
            makes another model, with another fingerprint, which cannot read files that the original
            compressed.
        private: make the repository private.
    """
    check_model(model)
    import yaml

    from selfvae import hub

    sections = {}
    if (model / settings.SAVED).is_file():
        saved = yaml.safe_load((model / settings.SAVED).read_text())
        saved["data"] = Path(saved["data"]).name  # the path is nobody's concern
        sections["Recipe"] = f"```\n{yaml.safe_dump(saved, sort_keys=False)}```"
    net = hub.load(model)
    if half:
        note(hub.about_rounding(net))
    print(hub.push_to_hub(net, name, sections, half=half, private=private))


def export(
    model: Run,
    out: Out,
    what: Literal["enhance", "decoder"] = "enhance",
    level: int | None = None,
) -> None:
    """Export the enhancement path or a decoder to another runtime: ONNX, or a torch.export program.

    Takes a minute or two, most of it in torch's own tracing.

    Args:
        model: folder that selfvae train wrote, or a bundled model.
        out: file ending in .onnx or .pt2.
        what: enhance maps y[LEVEL] to the most likely picture; decoder maps y[LEVEL + 1], and z[LEVEL]
            where there is one, to the parameters of the distribution of y[LEVEL].
        level: level, see --what; by default 1 for enhance and 0 for decoder.
    """
    check_model(model)
    from selfvae import hub
    from selfvae.export import DecoderPart, Enhancement, check_path, write

    check_path(out)
    net = hub.load(model)
    part: Enhancement | DecoderPart
    if what == "enhance":
        part = Enhancement(net, 1 if level is None else level)
    else:
        part = DecoderPart(net, 0 if level is None else level)
    write(part, out, note)
    print(f"{out}: {out.stat().st_size:,} bytes")
    print("\n".join(part.describe()))


def prepare_crops(
    source: In,
    out: Out,
    size: int = 64,
    shrink: tuple[int, ...] = (2, 3, 4),
    n: int = 20_000,
    seed: int = 0,
) -> None:
    """Cut a folder of photographs into a data set for --data: random crops; whole pictures are held out.

    Args:
        source: folder of at least three pictures; its sub-folders are included.
        out: folder for train.npy, validation.npy and test.npy.
        size: height and width of each crop in pixels.
        shrink: factors by which every picture is shrunk first, which hides JPEG artefacts.
        n: number of training crops; a twentieth of that is added for validation and for testing.
        seed: random seed.
    """
    from selfvae.data import crops

    pictures = crops.crop(source, out, size, shrink, n, seed, progress)
    print(
        f"{out}: {n} training crops from {pictures['train']} pictures, {n // 20} for validation from "
        f"{pictures['validation']} others, {n // 20} for testing from {pictures['test']} others"
    )


def _flags(config: ModelConfig) -> tuple[str, Size, tuple[str, ...]]:
    """--model, --size and --options that make a model of this configuration."""
    rest = {k: v for k, v in config.to_dict().items() if k not in ("name", "image_shape")}
    return config.name, "small", tuple(f"{key}={json.dumps(value)}" for key, value in rest.items())


def _option(text: str) -> tuple[str, object]:
    """A model option KEY=VALUE."""
    import yaml

    key, given, value = text.partition("=")
    if not given or key in ("name", "size", "image_shape"):
        raise ValueError(f"--options takes fields of the model as KEY=VALUE, e.g. width=0.25; got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"--options: the value in {text!r} cannot be read; e.g. width=0.25") from None
