"""The commands by name: where each function lives, and one line of help."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

__all__ = ["COMMANDS", "GROUPS", "Command", "load"]


class Command(NamedTuple):
    """A module of `selfvae.cli`, a function in it, and what it does."""

    module: str
    function: str
    help: str


GROUPS: dict[str, dict[str, Command]] = {
    "Compression": {
        "compress": Command("codec", "compress", "compress pictures losslessly (.svae)"),
        "decompress": Command("codec", "decompress", "restore pictures from .svae files"),
        "pack": Command("codec", "pack", "compress a folder into one archive (.svaes)"),
        "unpack": Command("codec", "unpack", "extract pictures from an archive"),
    },
    "Pictures": {
        "enhance": Command("drawing", "enhance", "enlarge, colour or de-band pictures"),
        "generate": Command("drawing", "generate", "generate images"),
        "reconstruct": Command("drawing", "reconstruct", "reconstruct pictures from their latents"),
        "vary": Command("drawing", "vary", "draw variations of a picture"),
        "interpolate": Command("drawing", "interpolate", "interpolate between two pictures"),
    },
    "Training": {
        "train": Command("training", "train", "train a model, or resume training"),
        "prepare-crops": Command("training", "prepare_crops", "cut photographs into a training set"),
        "push": Command("training", "push", "upload a model to the Hugging Face hub"),
        "export": Command("training", "export", "export networks to ONNX or torch.export"),
    },
    "Evaluation": {
        "eval": Command("scores", "evaluate", "likelihood: ELBO, IWAE and every term of the bound"),
        "eval-enhance": Command("scores", "evaluate_enhance", "enhancement: PSNR, SSIM, diversity"),
        "fid": Command("scores", "fid", "sample quality: FID, KID, precision and recall"),
        "ood": Command("scores", "ood", "out-of-distribution detection: AUROC"),
        "benchmark": Command("scores", "benchmark", "speed of generation and reconstruction"),
        "bench-codec": Command("codec", "bench_codec", "file sizes and speeds beside PNG, WebP, JPEG XL"),
        "figures": Command("drawing", "figures", "the papers' figures from a trained model"),
        "report": Command("scores", "report", "all scores of several models in one report"),
    },
    "Start here": {
        "demo": Command("info", "demo", "see what the bundled models do, in about half a minute"),
        "info": Command("info", "info", "describe a model, a compressed file, or the presets"),
        "serve": Command("pages", "serve", "try everything in the browser"),
    },
}  # fmt: skip

COMMANDS: dict[str, Command] = {name: c for group in GROUPS.values() for name, c in group.items()}


def load(name: str) -> Callable[..., int | None]:
    """The function of a command."""
    command = COMMANDS[name]
    function: Callable[..., int | None] = getattr(
        import_module(f"selfvae.cli.{command.module}"), command.function
    )
    return function
