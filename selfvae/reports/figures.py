"""The papers' figures from a trained model, and a page that shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from torch import Tensor

from selfvae.data.pictures import show
from selfvae.data.sheets import save_figure
from selfvae.distributed import distributed_map, on_rank_zero
from selfvae.files import write_atomic
from selfvae.model import SelfVAE, spread_levels
from selfvae.operations import (
    SamplingOptions,
    complete,
    enhance,
    infer,
    interpolate,
    names,
    reconstruct,
    variables,
    vary,
)
from selfvae.presets import TRANSFORMS, transform
from selfvae.reports.html import figure, page
from selfvae.transforms import ImageSpec, Transform

__all__ = ["draw_figures"]

Row = tuple[str, Tensor]
_LEVELS = 3  # shown of the computed images of a long chain


def draw_figures(model: SelfVAE, x: Tensor, out: str | Path, **how: Unpack[SamplingOptions]) -> list[Path]:
    """Draw all figures that a model allows; several processes share the work.

    A model without latents has no reconstructions, interpolations and variations; one without computed
    images has no conditional generations.

    Args:
        model: initialised or loaded.
        x: images to start from, uint8 (B, C, H, W), B at least 2.
        out: folder for a PNG file per figure and index.html.
        **how: see `SamplingOptions`.

    Returns:
        The files.

    Raises:
        ValueError: if there are fewer than 2 images.
    """
    if x.shape[0] < 2:
        raise ValueError(f"figures take at least 2 images; got {x.shape[0]}")
    out = Path(out)
    x = x.to(model.device)
    pages: list[tuple[str, str, Callable[..., list[Row]]]] = []
    if model.has_latents:
        pages += [
            ("reconstructions", "Reconstructions, by what is given.", _reconstructions),
            (
                "interpolations",
                "Interpolations of u; the rest is drawn with equal noise.",
                _interpolations,
            ),
            ("variations", "Variations: u is kept, the rest is drawn anew.", _variations),
        ]
    if len(model.levels) > 1:
        caption = "Conditional generations: only a computed image is given."
        pages.insert(1, ("conditional", caption, _conditional))
    pages += [
        ("generations", "Unconditional samples, every level.", _generations),
        ("transforms", "The transforms that a hierarchy can be made of.", _transforms),
    ]

    def draw(number: int) -> Path:
        name, _, rows = pages[number]
        save_figure(rows(model, x, **how), out / f"{name}.png")
        return out / f"{name}.png"

    files = distributed_map(draw, range(len(pages)))
    title = f"selfvae: {getattr(model.config, 'name', 'model')}"
    sections = [figure(file.name, caption) for file, (_, caption, _) in zip(files, pages, strict=True)]
    on_rank_zero(lambda: write_atomic(out / "index.html", page(title, sections)))
    return [*files, out / "index.html"]


def _computed(model: SelfVAE, x: Tensor) -> dict[str, Tensor]:
    """The images that x determines, as seen by the eye, by name."""
    values = infer(model, x, "x")
    return {f"y{k}": show(values[f"y{k}"], level.spec) for k, level in enumerate(model.levels)}


def _operations(model: SelfVAE) -> list[tuple[str, str]]:
    """Name and label of every reconstruction: RS1, RS2, ..., CR."""
    latents = [name for name in variables(model) if name[0] == "z"]
    out = [f"RS{j}" for j in range(1, len(latents) + 1)]
    if len(model.levels) > 1 and model.levels[0].has_latent:
        out.append("CR")
    return [(name, f"{name}: given {', '.join(names(model, name))}") for name in out]


def _reconstructions(model: SelfVAE, x: Tensor, **how: Unpack[SamplingOptions]) -> list[Row]:
    computed = _computed(model, x)
    rows = [("the images", computed["y0"])]
    rows += [(f"y{k}, computed", computed[f"y{k}"]) for k in spread_levels(model, _LEVELS, first=1)]
    for name, label in _operations(model):
        rows.append((label, show(reconstruct(model, x, name, **how), model.spec)))
    return rows


def _conditional(model: SelfVAE, x: Tensor, **how: Unpack[SamplingOptions]) -> list[Row]:
    computed, seed = _computed(model, x), how.get("seed")
    rows = []
    for k in spread_levels(model, _LEVELS, first=1):
        rows.append((f"y{k}, given", computed[f"y{k}"]))
        y = infer(model, x, f"y{k}")[f"y{k}"]
        for draw in range(2):
            how["seed"] = None if seed is None else seed + draw
            drawn = enhance(model, y, k, **how)
            rows.append((f"draw {draw + 1}", show(drawn[:, :, : x.shape[2], : x.shape[3]], model.spec)))
    return [*rows, ("the images", computed["y0"])]


def _generations(model: SelfVAE, x: Tensor, **how: Unpack[SamplingOptions]) -> list[Row]:
    drawn = complete(model, {}, (x.shape[0], x.shape[2], x.shape[3]), **how)
    return [
        (f"y{k}" if k else "x", show(drawn[f"y{k}"], model.levels[k].spec))
        for k in [*reversed(spread_levels(model, _LEVELS, first=1)), 0]
    ]


def _interpolations(model: SelfVAE, x: Tensor, **how: Unpack[SamplingOptions]) -> list[Row]:
    pairs = [(i, i + 1) for i in range(0, min(8, x.shape[0]) - 1, 2)]
    a, b = x[[i for i, _ in pairs]], x[[j for _, j in pairs]]
    rows = []
    for spherical in (False, True):
        strips = interpolate(model, a, b, x.shape[0], spherical=spherical, **how)
        for (i, j), strip in zip(pairs, strips, strict=True):
            kind = "an arc" if spherical else "a line"
            rows.append((f"image {i + 1} to image {j + 1} by {kind}", show(strip, model.spec)))
    return rows


def _variations(model: SelfVAE, x: Tensor, **how: Unpack[SamplingOptions]) -> list[Row]:
    drawn = vary(model, x, 4, **how)
    rows = [("the images", show(x, model.spec))]
    return rows + [(f"variation {i + 1}", show(drawn[:, i], model.spec)) for i in range(drawn.shape[1])]


def _transforms(model: SelfVAE, x: Tensor, **how: Unpack[SamplingOptions]) -> list[Row]:
    """Every named transform that takes such images."""
    x = show(x, model.spec)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1]  # no alpha
    spec, rows = ImageSpec(x.shape[1]), [("x", x)]
    for name in TRANSFORMS:
        d: Transform = transform(name)
        h, w = (n - n % m for n, m in zip(x.shape[2:], d.block, strict=True))
        try:
            rows.append((name, show(d(x[:, :, :h, :w]), d.output_spec(spec))))
        except ValueError:  # not for this number of channels
            continue
    return rows
