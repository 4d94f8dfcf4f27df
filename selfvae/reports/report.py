"""All scores of trained models in one report, in the layout of the papers' tables and beside their figures.

Every part is kept in OUT/parts as JSON under a key made of the weights, the images and the settings: a
report that was interrupted goes on where it was, and a model added later is the only one computed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

import selfvae
from selfvae.data.batches import Images, ranges
from selfvae.distributed import distributed_map, on_rank_zero
from selfvae.files import write_atomic
from selfvae.hub import fingerprint, load
from selfvae.metrics.bounds import Bounds, estimate_bounds
from selfvae.metrics.enhancement import evaluate_enhancement
from selfvae.metrics.fid import Network, evaluate_samples
from selfvae.metrics.likelihood import evaluate, summary
from selfvae.metrics.ood import ALTERED, evaluate_ood
from selfvae.metrics.timing import measure_speed
from selfvae.nn.precision import autocast
from selfvae.operations import seeded
from selfvae.reports import html
from selfvae.reports.figures import draw_figures
from selfvae.reports.settings import Settings

__all__ = ["PAPERS", "Settings", "write_report"]


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


_BLOCK = 20  # images whose importance-weighted bounds are kept at a time
Outside = dict[str, Images | None]
Part = dict[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # caption, columns, rows


def write_report(
    runs: Sequence[Path],
    images: Images,
    data: str,
    out: Path,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    outside: Outside | None = None,
    features: tuple[str, Network] | None = None,
    command: str = "",
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Measure models and write out/report.md and report.html; several processes share the work.

    A report that was interrupted goes on where it was: what is in out/parts is not measured again.

    Args:
        runs: folders of the models.
        images: that they are measured on.
        data: name of the images in the report.
        out: folder to write.
        settings: what is measured.
        outside: out-sets, as for `evaluate_ood`; by default all that are made from the images.
        features: name and network for the sample quality, which is left out without.
        command: printed in the report.
        device: that the models run on.
        progress: told what is measured next.

    Returns:
        The path of report.md.

    Raises:
        ValueError: if there are no runs, or the images do not fit.
    """
    if not runs:
        raise ValueError("a report needs at least one folder with a model")
    outside = dict.fromkeys(ALTERED) if outside is None else outside
    names = {run: run.name if len({r.name for r in runs}) == len(runs) else str(run) for run in runs}
    rows = {}
    for run in runs:
        work = _Work(run, images, out, settings, outside, features, torch.device(device), progress)
        rows[names[run]] = work.measure()
    tables = [
        _likelihood(rows), _draws(rows), _enhancement(rows), _ood(rows), _quality(rows, features),
        _time(rows), _papers(),
    ]  # fmt: skip
    tables = [table for table in tables if table[2]]
    pictures = [
        (f"{name}: {Path(file).stem}", file)
        for name, parts in rows.items()
        for file in parts.get("figures", {"files": []})["files"]
    ]
    notes = _notes(settings, len(images), data, command, torch.device(device))
    on_rank_zero(lambda: write_atomic(out / "report.md", _markdown(notes, tables, pictures).encode()))
    on_rank_zero(lambda: write_atomic(out / "report.html", _html(notes, tables, pictures)))
    return out / "report.md"


def _notes(settings: Settings, n: int, data: str, command: str, device: torch.device) -> list[str]:
    """What was measured, where, and how to read it."""
    notes = [
        f"Command: `{command}`" if command else "",
        f"Data: {data}, {n} images, {settings.limit} at most for the ELBO, "
        f"{settings.iwae_limit} for IWAE-{settings.iwae_samples} ({settings.precision}). "
        f"Seed {settings.seed}.",
        f"selfvae {_commit()}, torch {torch.__version__}, {_machine(device)}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.",
        "Terms are nats per image; bits/dim counts the dimensions of x only; +- is the standard error over "
        "images.",
    ]
    return [note for note in notes if note]


@dataclass
class _Work:
    """The measurements of one model."""

    run: Path
    images: Images
    out: Path
    settings: Settings
    outside: Outside
    features: tuple[str, Network] | None
    device: torch.device
    progress: Callable[[str], None]

    def __post_init__(self) -> None:
        self.model = load(self.run).to(self.device)
        self.mark = fingerprint(self.model).hex()
        self.base = [self.mark, self.images.digest(), self.device.type]

    def kept(self, name: str, on: list[Any], task: Callable[[], Part], shared: bool = True) -> Part:
        """The result of a task: from its file if it was measured before, else measured and written.

        Args:
            name: of the task.
            on: everything that the result depends on, besides model, images, device and seed.
            task: measures it.
            shared: all processes call this together; else one process does.
        """
        text = json.dumps([*self.base, name, self.settings.seed, *on])
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        file = self.out / "parts" / f"{self.run.name}-{name}-{key}.json"
        if not (on_rank_zero(file.exists) if shared else file.exists()):
            self.progress(f"{self.run.name}: {name}")
            with seeded(self.model, self.settings.seed):
                found = json.dumps(task()).encode()
            if shared:
                on_rank_zero(lambda: write_atomic(file, found))
            else:
                write_atomic(file, found)
        part: Part = json.loads(file.read_text())
        return part

    def measure(self) -> dict[str, Part]:
        """All parts, by name."""
        model, images, s = self.model, self.images, self.settings
        size: dict[str, Any] = {"batch_size": s.batch_size}
        how: dict[str, Any] = {**size, "seed": s.seed}
        parts = {
            "elbo": self.kept(
                "elbo", [s.limit, s.precision],
                lambda: evaluate(model, images, limit=s.limit, precision=s.precision, **size),
            ),
            "time": self.kept("time", [], lambda: on_rank_zero(lambda: measure_speed(model))),
        }  # fmt: skip
        if self.outside:
            sets = {name: images and images.digest() for name, images in sorted(self.outside.items())}
            parts["ood"] = self.kept(
                "ood", [s.ood_limit, sets],
                lambda: evaluate_ood(model, images, self.outside, limit=s.ood_limit, **how),
            )  # fmt: skip
        if s.iwae_samples and model.has_latents:
            parts["iwae"] = {
                str(draws): self.iwae(draws)
                for draws in sorted({n for n in (1, 8, 64) if n < s.iwae_samples} | {s.iwae_samples})
            }
        if len(model.levels) > 1:
            parts["enhance"] = self.kept(
                "enhance", [s.enhance_limit, s.draws],
                lambda: evaluate_enhancement(model, images, draws=s.draws, limit=s.enhance_limit, **how),
            )  # fmt: skip
        if self.features is not None:
            name, network = self.features
            parts["quality"] = self.kept(
                "quality", [name, s.fid_samples],
                lambda: evaluate_samples(model, images, network, s.fid_samples, **how),
            )  # fmt: skip
        if s.figures:
            parts["figures"] = self.kept("figures", [s.figures], self.draw)
        return parts

    def iwae(self, draws: int) -> Part:
        """Means over images, in bits/dim, found block by block."""
        s, n = self.settings, min(self.settings.iwae_limit, len(self.images))

        def found(block: range) -> Part:
            name = f"iwae-{draws}-{block.start}"
            return self.kept(
                name, [len(block), s.precision], lambda: self.block(block, draws), shared=False
            )

        parts = distributed_map(found, ranges(n, _BLOCK))
        dims = math.prod(self.images.shape[1:])
        nats = {
            kind: torch.tensor([value for part in parts for value in part[kind]], dtype=torch.float64)
            for kind in Bounds._fields
        }
        return {**summary(nats, dims), "images": n}

    def block(self, block: range, draws: int) -> Part:
        """The bounds of some images: nats."""
        torch.manual_seed(self.settings.seed + block.start)
        x = self.images.take(block).to(self.device)
        with autocast(self.model.device, self.settings.precision):
            found = estimate_bounds(self.model, x, draws, batch=self.settings.batch_size)
        return {kind: values.tolist() for kind, values in found._asdict().items()}

    def draw(self) -> Part:
        """The figures: their files' paths from the report."""
        x = self.images.take(range(min(self.settings.figures, len(self.images))))
        own = f"{self.run.name}-{self.mark}"  # two runs may have one name
        files = draw_figures(self.model, x, self.out / "figures" / own, seed=self.settings.seed)
        return {"files": [str(file.relative_to(self.out)) for file in files if file.suffix == ".png"]}


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.0f}" for v in values)


def _with_error(part: Part, name: str) -> str:
    return f"{part[name]:.3f} +- {part[f'{name}_stderr']:.3f}"


def _likelihood(rows: dict[str, Any]) -> Table:
    columns = [
        "model", "parameters", "ELBO, bits/dim", "IWAE", "TMC", "RE_0, RE_1, ...", "KL_0, KL_1, ...",
    ]  # fmt: skip
    lines = []
    for name, parts in rows.items():
        elbo, found = parts["elbo"], ["exact", "exact"]
        if "iwae" in parts:
            iwae = list(parts["iwae"].values())[-1]
            # what a correct IWAE gains, on the same images and draws
            gain = iwae["elbo"] - iwae["iwae"]
            found = [
                f"{_with_error(iwae, 'iwae')} ({gain:.3f} below their ELBO)", _with_error(iwae, "tmc"),
            ]  # fmt: skip
        lines.append([
            name, f"{parts['time']['parameters'] / 1e6:.2f} M", _with_error(elbo, "bits_per_dim"), *found,
            _numbers(elbo["re_nats"]), _numbers(elbo["kl_nats"]),
        ])  # fmt: skip
    return "Density estimation", columns, lines


def _draws(rows: dict[str, Any]) -> Table:
    columns = ["model", "draws", "images", "ELBO of these draws", "IWAE", "TMC"]
    lines = [
        [name, draws, str(part["images"]), *(_with_error(part, kind) for kind in Bounds._fields)]
        for name, parts in rows.items()
        for draws, part in parts.get("iwae", {}).items()
    ]
    return "Bounds by the number of draws, bits/dim", columns, lines


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
    found = {name: parts["ood"] for name, parts in rows.items() if "ood" in parts}
    sets = [key for key in next(iter(found.values()), {}) if key != "images"]
    lines = [
        [name, score, *(f"{part[out_set][score]:.3f}" for out_set in sets)]
        for name, part in found.items()
        for score in part[sets[0]]
    ]
    return "Out-of-distribution detection, AUROC", ["model", "score", *sets], lines


def _quality(rows: dict[str, Any], features: tuple[str, Network] | None) -> Table:
    keys = ["frechet_distance", "kernel_distance", "precision", "recall"]
    columns = ["model", "drawn", "real", "Frechet distance", "kernel distance", "precision", "recall"]
    lines = [
        [
            name,
            *(str(part[f"{kind}_images"]) for kind in ("drawn", "real")),
            *(f"{part[k]:.4g}" for k in keys),
        ]
        for name, parts in rows.items()
        if (part := parts.get("quality"))
    ]
    return f"Sample quality by the features of {features[0] if features else ''}", columns, lines


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


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _markdown(notes: list[str], tables: list[Table], pictures: list[tuple[str, str]]) -> str:
    text = ["# selfvae report", "", *(f"{note}\n" for note in notes)]
    for caption, columns, rows in tables:
        text += [f"## {caption}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        text += [f"| {' | '.join(row)} |" for row in rows]
        text.append("")
    text += [f"![{caption}]({file})\n" for caption, file in pictures]
    return "\n".join(text)


def _html(notes: list[str], tables: list[Table], pictures: list[tuple[str, str]]) -> bytes:
    sections = [f"<p>{escape(note)}</p>" for note in notes]
    for caption, columns, rows in tables:
        sections += [f"<h2>{escape(caption)}</h2>", html.table(columns, rows)]
    sections += [html.figure(file, caption) for caption, file in pictures]
    return html.page("selfvae report", sections)
