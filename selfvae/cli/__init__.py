"""The command line: thin functions whose signatures are the flags."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import Positional, arg

from selfvae import demo as first_run
from selfvae import distributed, hub
from selfvae.cli.codec import bench, compress, decompress, describe, pack, unpack
from selfvae.cli.common import show
from selfvae.cli.drawing import enhance, figures, generate, interpolate, reconstruct, vary
from selfvae.cli.pages import serve
from selfvae.cli.scores import evaluate, ood, quality, report, timing
from selfvae.cli.training import crop, expand, export, push, train
from selfvae.presets import PRESETS, SIZES, build


def info(
    model: Annotated[Positional[Path | None], arg(metavar="DIR|FILE")] = None,
    presets: bool = False,
    json: bool = False,
) -> None:
    """What a trained model is: configuration, parameters, levels. With --presets: the known names.

    Args:
        model: folder that training wrote, or the name of a shipped model; or a compressed picture, for the
            bytes of its parts.
        presets: list the presets with their parameter counts at every size, and the models that come with
            selfvae, instead.
        json: print one JSON object and nothing else.
    """

    def count(net: Any) -> int:
        return sum(p.numel() for p in net.parameters())

    if presets or model is None:
        with torch.device("meta"):  # shapes only
            sizes = {name: [count(build(name, size)) for size in SIZES] for name in PRESETS}
        if json:
            show({"sizes": list(SIZES), "presets": sizes, "bundled": list(hub.bundled())}, json)
        else:
            show({"size": list(SIZES), **sizes, "comes along": list(hub.bundled())}, json)
        return
    if model.is_file():
        describe(model, json)
        return
    net = hub.load(model)
    config = net.config.to_dict()
    config["levels_of_grey"] = config.pop("levels")
    levels = [
        f"y{k}: {level.spec.channels} channels, {level.spec.num_values} levels"
        + (f", z{k}" if level.has_latent else "")
        + f", up by {level.transform}"
        for k, level in enumerate(net.levels)
    ]
    own = {"parameters": count(net), "fingerprint": hub.fingerprint(net).hex()}
    show({**config, **own, "hierarchy": levels}, json)


def demo(
    out: Path = Path("demo"), train: bool = False, fast: bool = False, seed: int = 0, json: bool = False
) -> None:
    """Show what the models do that come with selfvae: OUT/figure.png, OUT/result.json, compressed pictures.

    Args:
        out: folder for the picture, the numbers and the files.
        train: train two small models on photographs instead, for three minutes, and show those.
        fast: smaller pictures; with --train, half a minute.
        seed: of everything random.
        json: print one JSON object and nothing else.
    """

    # whatever libraries print goes to standard error: standard output is for the result
    with contextlib.redirect_stdout(sys.stderr):
        result = (first_run.train_demo if train else first_run.demo)(out, fast, seed)
    show(result, json)
    if not json:
        print(f"\nSee {out / 'figure.png'}")


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, 1 if some pictures of a folder failed, or 2 with a message for bad input."""
    commands: dict[str, Any] = {
        "train": train,
        "crop": crop,
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
        "compress": compress,
        "decompress": decompress,
        "pack": pack,
        "unpack": unpack,
        "bench": bench,
        "serve": serve,
        "push": push,
        "export": export,
        "info": info,
        "demo": demo,
    }
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            commands,
            args=expand(sys.argv[1:] if argv is None else argv),
            prog="selfvae",
            description="Self-supervised variational auto-encoders.",
        )
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        who = f"selfvae (process {distributed.rank()})" if distributed.rank() else "selfvae"
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    return status or 0
