"""All scores of trained models in one report, in the layout of the papers' tables and beside their figures.

Every part is kept in OUT/parts as JSON under a key made of the weights and the settings: a report that was
ended goes on where it was, and one with another model added computes that model alone.
"""

from __future__ import annotations

import datetime
import hashlib
import html
import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import selfvae
from selfvae.data import Images
from selfvae.evaluate import enhancement, evaluate, timing
from selfvae.hub import load, write_atomic
from selfvae.ood import ALTERED, ood

__all__ = ["PAPERS", "Settings", "report"]


@dataclass(frozen=True)
class Published:
    """A row of the papers' tables: nats, millions of parameters, FID against test / train images."""

    data: str
    model: str
    bits_per_dim: float
    re: tuple[float, ...]
    kl: tuple[float, ...]
    fid: str = ""
    parameters: str = ""


# the thesis, tables 7.1 to 7.6; the printed "IWAE" are in effect ELBOs: the terms add up to them
PAPERS = (
    Published("CIFAR-10", "VAE, N(0, I)", 3.88, (6675,), (1596,)),
    Published("CIFAR-10", "VAE, mixture of Gaussians", 3.83, (6512,), (1653,)),
    Published("CIFAR-10", "VAE, RealNVP", 3.51, (5540,), (1966,), "41.36 / 37.25", "32 M"),
    Published("CIFAR-10", "srVAE", 3.65, (5107, 1241), (619, 819), "34.71 / 29.95"),
    Published("ImageNet32", "VAE", 4.15, (7153,), (1683,), "50.94 / 46.93"),
    Published("ImageNet32", "ssVAE", 4.32, (6548, 1278), (596, 760), "45.99 / 41.34"),
    Published("CelebA64", "VAE", 3.12, (24096,), (2502,), "", "40 M"),
    Published("CelebA64", "ssVAE, sketch", 3.24, (23797,), (3816,), "", "50 M"),
    Published("CelebA64", "ssVAE, 3 levels", 2.88, (23336,), (1214,), "", "50 M"),
    Published("Imagenette64", "VAE", 3.85, (30809,), (1961,)),
    Published("Imagenette64", "ssVAE, 3 levels", 3.70, (30394,), (1171,)),
)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    limit: images for the ELBO. iw: draws of the importance-weighted bounds, of iw_limit images.
    enhance_limit: images enhanced, draws times each. ood_limit: images of each set. seed: of all draws.
    """

    limit: int = 10_000
    iw: int = 512
    iw_limit: int = 1000
    enhance_limit: int = 500
    draws: int = 8
    ood_limit: int = 1000
    batch_size: int = 64
    seed: int = 0


Table = tuple[str, list[str], list[list[str]]]  # caption, columns, rows


def report(
    runs: Sequence[Path],
    images: Images,
    data: str,
    out: Path,
    settings: Settings = Settings(),
    *,
    command: str = "",
    device: str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Measure the models in the folders `runs` on images; writes out/report.md and report.html.

    Arguments:
        data: what the images are called in the report.
        command: noted in the report.
        progress: told what is measured next.

    Returns the path of report.md.
    """
    if not runs:
        raise ValueError("a report needs at least one folder with a model")
    found = {run: _measure(run, images, data, out / "parts", settings, device, progress) for run in runs}
    names = {run: run.name if len({r.name for r in runs}) == len(runs) else str(run) for run in runs}
    rows = {names[run]: parts for run, parts in found.items()}
    tables = [_likelihood(rows), _enhancement(rows), _ood(rows), _time(rows), _papers()]
    tables = [table for table in tables if table[2]]
    notes = [
        f"Command: `{command}`" if command else "",
        f"Data: {data}, {len(images)} images, {settings.limit} at most for the ELBO, "
        f"{settings.iw_limit} for IWAE-{settings.iw}. Seed {settings.seed}.",
        f"selfvae {_commit()}, torch {torch.__version__}, {_machine(device)}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.",
        "Terms are nats per image; bits/dim counts the dimensions of x only; +- is the standard error over "
        "images.",
    ]
    notes = [note for note in notes if note]
    write_atomic(out / "report.md", _markdown(notes, tables).encode())
    write_atomic(out / "report.html", _html(notes, tables).encode())
    return out / "report.md"


def _measure(
    run: Path,
    images: Images,
    data: str,
    parts: Path,
    settings: Settings,
    device: str,
    progress: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    model = load(run).to(device)
    weights = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    s = settings
    common: dict[str, Any] = {"batch_size": s.batch_size}
    tasks: dict[str, Callable[[], dict[str, Any]]] = {
        "elbo": lambda: evaluate(model, images, limit=s.limit, **common),
        "time": lambda: timing(model),
        "ood": lambda: ood(model, images, dict.fromkeys(ALTERED), limit=s.ood_limit, seed=s.seed, **common),
    }
    if s.iw and model.has_latents:
        tasks["iwae"] = lambda: evaluate(model, images, iw=s.iw, limit=s.iw_limit, **common)
    if len(model.levels) > 1:
        tasks["enhance"] = lambda: enhancement(
            model, images, draws=s.draws, limit=s.enhance_limit, seed=s.seed, **common
        )
    out = {}
    for name, task in tasks.items():
        key = hashlib.sha256(
            json.dumps([weights, name, data, images.shape, device, asdict(s)]).encode()
        ).hexdigest()[:16]
        file = parts / f"{run.name}-{name}-{key}.json"
        if not file.exists():
            progress(f"{run.name}: {name}")
            torch.manual_seed(s.seed)
            write_atomic(file, json.dumps(task()).encode())
        out[name] = json.loads(file.read_text())
    return out


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.0f}" for v in values)


def _likelihood(rows: dict[str, Any]) -> Table:
    columns = [
        "model",
        "parameters",
        "ELBO, bits/dim",
        "IWAE",
        "all pairs",
        "RE_0, RE_1, ...",
        "KL_0, KL_1, ...",
    ]
    lines = []
    for name, parts in rows.items():
        elbo, iwae = parts["elbo"], parts.get("iwae")
        bounds = [
            f"{iwae[f'{kind}_bits_per_dim']:.3f} +- {iwae[f'{kind}_bits_per_dim_stderr']:.3f}"
            if iwae
            else "exact"
            for kind in ("iwae", "pairs")
        ]
        if iwae:  # what a correct IWAE gains, on the same images and draws
            gain = iwae["elbo_bits_per_dim"] - iwae["iwae_bits_per_dim"]
            bounds[0] += f" ({gain:.3f} below their ELBO)"
        lines.append(
            [
                name,
                f"{parts['time']['parameters'] / 1e6:.2f} M",
                f"{elbo['bits_per_dim']:.3f} +- {elbo['bits_per_dim_stderr']:.3f}",
                *bounds,
                _numbers(elbo["re_nats"]),
                _numbers(elbo["kl_nats"]),
            ]
        )
    return "Density estimation", columns, lines


def _enhancement(rows: dict[str, Any]) -> Table:
    columns = ["model", "PSNR: draw", "mean of draws", "plain", "SSIM: draw", "mean of draws", "plain",
               "consistency error: draw", "plain", "diversity"]  # fmt: skip
    keys = [f"{score}_{kind}" for score in ("psnr", "ssim") for kind in ("draw", "mean", "plain")]
    keys += ["consistency_error_draw", "consistency_error_plain", "diversity_rmse"]
    lines = [
        [name, *(f"{parts['enhance'][key]:.{3 if 'ssim' in key else 2}f}" for key in keys)]
        for name, parts in rows.items()
        if "enhance" in parts
    ]
    return "Enhancement from y1 (dB; levels of y1; grey levels)", columns, lines


def _ood(rows: dict[str, Any]) -> Table:
    columns = ["model", "score", *ALTERED]
    lines = [
        [name, score, *(f"{parts['ood'][out_set][score]:.3f}" for out_set in ALTERED)]
        for name, parts in rows.items()
        for score in parts["ood"][next(iter(ALTERED))]
    ]
    return "Out-of-distribution detection, AUROC", columns, lines


def _time(rows: dict[str, Any]) -> Table:
    counts = (1, 20, 100)
    columns = ["model", *(f"{task} {n}" for task in ("generate", "reconstruct") for n in counts)]
    lines = [
        [
            name,
            *(
                f"{parts['time'][key]:.3f}" if (key := f"{task}_{n}_seconds") in parts["time"] else ""
                for task in ("generate", "reconstruct")
                for n in counts
            ),
        ]
        for name, parts in rows.items()
    ]
    return "Seconds (median)", columns, lines


def _papers() -> Table:
    columns = ["data", "model", "bits/dim", "RE", "KL", "FID test / train", "parameters"]
    lines = [
        [p.data, p.model, f"{p.bits_per_dim:.2f}", _numbers(p.re), _numbers(p.kl), p.fid, p.parameters]
        for p in PAPERS
    ]
    return "The papers' figures (printed as IWAE, in effect ELBOs)", columns, lines


def _commit() -> str:
    folder = Path(selfvae.__file__).parent
    try:
        return subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "of unknown commit"


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _markdown(notes: list[str], tables: list[Table]) -> str:
    text = ["# selfvae report", "", *(f"{note}\n" for note in notes)]
    for caption, columns, rows in tables:
        text += [f"## {caption}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        text += [f"| {' | '.join(row)} |" for row in rows]
        text.append("")
    return "\n".join(text)


def _html(notes: list[str], tables: list[Table]) -> str:
    def cells(tag: str, row: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>\n"

    text = [
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>selfvae report</title>\n'
        "<style>body{font:16px/1.5 sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.2rem .7rem;border-bottom:1px solid #ccc;"
        "text-align:left}</style>\n<h1>selfvae report</h1>\n"
    ]
    text += [f"<p>{html.escape(note)}</p>\n" for note in notes]
    for caption, columns, rows in tables:
        text.append(f"<h2>{html.escape(caption)}</h2>\n<table>\n{cells('th', columns)}")
        text += [cells("td", row) for row in rows]
        text.append("</table>\n")
    return "".join(text) + "</html>\n"
