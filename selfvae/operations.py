"""What a model can do with an image: some variables are given, the rest is drawn. SPEC section 7.

A set of variables is written as names ("z0", "y1", with x = y0 and u the top latent) and as the papers'
operations, alone or together, e.g. {"z1", "z0"}, "RS2" or "u,z0". With one computed image (K = 1):

| operation | given |
|---|---|
| generation | nothing |
| conditional generation, CG, super resolution, SR | y1 |
| conditional reconstruction, CR | y1, z0 |
| RS1, RS2, ... | the 1, 2, ... coarsest latents |
| reconstruction, RS | all latents |
| variation | u |

An image that is named brings what it determines: the images computed from it, exactly, and their
latents, inferred by q. (`complete` alone takes exactly what it is given.) Images of any height and width
are padded to what the model's networks divide (the last row and column repeated) and the results cropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from selfvae.model import SelfVAE
from selfvae.progress import Track, no_progress

__all__ = [
    "ALIASES",
    "SamplingOptions",
    "check_computed",
    "complete",
    "enhance",
    "generate",
    "infer",
    "interpolate",
    "names",
    "reconstruct",
    "seeded",
    "temperatures",
    "variables",
    "vary",
]


class SamplingOptions(TypedDict, total=False):
    """How variables are drawn, the same for every operation.

    temperature: of every draw, from priors, likelihoods and posteriors: below 1 plainer, 0 the modes.
        A mapping sets it by variable, e.g. {"z1": 0.7, "y0": 0}; it is 1 for those left out.
    decode: "mode" takes the most likely image at every level, whatever the temperature of the latents.
    seed: of the draws; None draws from torch's global random state.
    """

    temperature: float | Mapping[str, float]
    decode: Literal["sample", "mode"]
    seed: int | None


def _latents(model: SelfVAE) -> list[str]:
    """Names of the latents, the coarsest first."""
    return [f"z{k}" for k in reversed(range(len(model.levels))) if model.levels[k].has_latent]


def variables(model: SelfVAE) -> list[str]:
    """The names of all variables of a model, in the order of the walk, e.g. z1, y1, z0, y0."""
    return [
        f"{kind}{k}"
        for k in reversed(range(len(model.levels)))
        for kind in ("zy" if model.levels[k].has_latent else "y")
    ]


# the papers' operations: the names that each gives, from the latents, the coarsest first
ALIASES: dict[str, Callable[[list[str]], list[str]]] = {
    "generation": lambda z: [],
    "conditional generation": lambda z: ["y1"],
    "cg": lambda z: ["y1"],
    "super resolution": lambda z: ["y1"],
    "sr": lambda z: ["y1"],
    "conditional reconstruction": lambda z: ["y1", "z0"],
    "cr": lambda z: ["y1", "z0"],
    "reconstruction": lambda z: z,
    "rs": lambda z: z,
    "variation": lambda z: z[:1],
    "u": lambda z: z[:1],
    "x": lambda z: ["y0"],
}
_LATENT = ("reconstruction", "rs", "variation", "u")  # mean nothing for a model without latents


def names(model: SelfVAE, given: str | Iterable[str]) -> list[str]:
    """The variables that `given` stands for, in the order of the walk: names and operations as above.

    Raises ValueError for a name that the model does not have; the message lists those it has.
    """
    known, latents = variables(model), _latents(model)
    numbered = {f"rs{j}": latents[:j] for j in range(1, len(latents) + 1)}
    out: set[str] = set()
    for part in given.split(",") if isinstance(given, str) else given:
        name = part.strip()
        word = name.lower().replace("_", " ").replace("-", " ")
        itself = [word] if word else []
        chosen = ALIASES[word](latents) if word in ALIASES else numbered.get(word, itself)
        missing = [v for v in chosen if v not in known]
        if missing or (word in _LATENT and not latents):
            operations = [word for word, of in ALIASES.items() if set(of(latents)) <= set(known)]
            operations = [*(w for w in operations if latents or w not in _LATENT), *numbered]
            raise ValueError(
                f"unknown variable {name!r}: this model has {', '.join(known)}"
                f"{'' if latents else ' (and no latents)'}; operations are {', '.join(operations)}"
            )
        out |= set(chosen)
    return [v for v in known if v in out]


def _one(model: SelfVAE, name: str) -> list[str]:
    """The one variable that a name stands for."""
    chosen = names(model, name)
    if len(chosen) != 1:
        raise ValueError(f"{name!r} stands for {len(chosen)} variables: give each by its own name")
    return chosen


# --- the walk with some variables given ---------------------------------------------------------------


@contextmanager
def seeded(model: SelfVAE, seed: int | None) -> Iterator[None]:
    """Draw from `seed` and leave torch's global random state as it was; None: draw from that."""
    if seed is None:
        yield
        return
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def temperatures(
    model: SelfVAE, temperature: float | Mapping[str, float] = 1.0, decode: str = "sample"
) -> dict[str, float]:
    """The temperature of every variable by name; arguments as in `SamplingOptions`.

    Raises ValueError for a name that the model does not have and for a temperature below 0.
    """
    if decode not in ("sample", "mode"):
        raise ValueError(f"decode must be 'sample' or 'mode'; got {decode!r}")
    heats = dict.fromkeys(variables(model), 1.0 if isinstance(temperature, Mapping) else temperature)
    if isinstance(temperature, Mapping):
        for name, value in temperature.items():
            for variable in names(model, name):
                heats[variable] = value
    for name, value in heats.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"temperature must be finite and 0 or more; got {value} for {name}")
        if decode == "mode" and name[0] == "y":
            heats[name] = 0.0
    return heats


def _draw(p: Any, temperature: float) -> Tensor:
    value: Tensor = p.sample(temperature) if temperature > 0 else p.mode()
    return value


def _up(size: tuple[int, int], multiple: tuple[int, int]) -> tuple[int, int]:
    """The next size that the multiples divide."""
    return -(-size[0] // multiple[0]) * multiple[0], -(-size[1] // multiple[1]) * multiple[1]


def _pad(y: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeat the last row and column up to a height and width."""
    for dim, n in zip((2, 3), size, strict=True):
        y = y.index_select(dim, torch.arange(n, device=y.device).clamp(max=y.shape[dim] - 1))
    return y


@torch.no_grad()
def infer(
    model: SelfVAE,
    image: Tensor,
    condition_on: str | Iterable[str] | None = None,
    k: int = 0,
    **how: Unpack[SamplingOptions],
) -> dict[str, Tensor]:
    """The variables of `condition_on` (None: all) that y[k] = image determines, and what these bring.

    image: uint8 (B, c, H, W), by default x. Images are computed, latents drawn from q. Returns tensors by
    name, for `complete`, of the padded size.
    """
    if not 0 <= k < len(model.levels):
        raise ValueError(f"k must be 0 to {len(model.levels) - 1} for this model; got {k}")
    model.levels[k].spec.check(image, f"y{k}")
    wanted = set(variables(model) if condition_on is None else names(model, condition_on))
    images = [int(name[1:]) for name in wanted if name[0] == "y"]
    if images:  # an image brings all above it
        wanted |= {name for name in variables(model) if int(name[1:]) >= min(images)}
    heats = temperatures(model, how.get("temperature", 1.0), how.get("decode", "sample"))
    out: dict[str, Tensor] = {}
    y = image.to(model.device)
    y = _pad(y, _up((y.shape[2], y.shape[3]), model.multiples[k]))
    with seeded(model, how.get("seed")):
        for j in range(k, len(model.levels)):
            if f"y{j}" in wanted:
                out[f"y{j}"] = y
            if f"z{j}" in wanted:
                out[f"z{j}"] = _draw(model.levels[j].posterior(y), heats[f"z{j}"])
            y = model.levels[j].transform(y)
    return out


@torch.no_grad()
def complete(
    model: SelfVAE,
    given: Mapping[str, Tensor],
    shape: tuple[int, int, int] | None = None,
    *,
    temperature: float | Mapping[str, float] = 1.0,
    decode: Literal["sample", "mode"] = "sample",
    seed: int | None = None,
    track: Track = no_progress,
) -> dict[str, Tensor]:
    """One walk down the model: variables in `given` are taken, all others drawn.

    Arguments:
        given: by name, "y0".."yK" (or "x") uint8 images and "z0".."zK" (or "u") float latents, as
            `infer` returns them.
        shape: number, height and width (pixels) of the images x; None: what the given images say, or
            the size that the model was built for.
        temperature, decode, seed: see `SamplingOptions`.
        track: shows progress over the variables.

    Returns every variable by name; "y0" is the image, uint8 (B, C, H, W). What a given image determines is
    drawn too unless it is given: `infer` finds it.
    """
    given = {variable: value for name, value in given.items() for variable in _one(model, name)}
    for name, value in given.items():
        if name[0] == "y":
            model.levels[int(name[1:])].spec.check(value, name)
    n, height, width = shape or _shape(model, given)
    if min(n, height, width) < 1:
        raise ValueError(f"shape must be at least one image of 1 x 1 pixel; got {n, height, width}")
    padded = _up((height, width), model.multiples[0])
    sizes = [padded]  # of every y as the walk sees it, and what of it is wanted
    for level in model.levels[:-1]:
        sizes.append(level.transform.size(*sizes[-1]))
    scales = [model.scale(k) for k in range(len(sizes))]
    own = [(-(-height // rows), -(-width // cols)) for rows, cols in scales]
    taken: dict[str, Tensor] = {}
    for name, value in given.items():
        if value.shape[0] != n:
            raise ValueError(f"{name} must be for {n} images; got {value.shape[0]}")
        k = int(name[1:])
        if name[0] == "y":
            if tuple(value.shape[2:]) not in (own[k], sizes[k]):
                raise ValueError(
                    f"{name} must be {own[k][0]} x {own[k][1]} pixels for images of {height} x {width}; "
                    f"got {value.shape[2]} x {value.shape[3]}"
                )
            value = _pad(value, sizes[k])
        elif tuple(value.shape[1:]) != model.levels[k].latent_shape(*sizes[k]):
            raise ValueError(
                f"{name} must be {(n, *model.levels[k].latent_shape(*sizes[k]))} for images of {height} x "
                f"{width}; got {tuple(value.shape)}: is shape, (number, height, width), the images' own?"
            )
        taken[name] = value.to(model.device, model.dtype if name[0] == "z" else None)
    heats = temperatures(model, temperature, decode)
    out: dict[str, Tensor] = {}
    left = iter(track(variables(model), "variables"))

    def provider(name: str, p: Any) -> Tensor:
        next(left)
        out[name] = taken[name] if name in taken else _draw(p, heats[name])
        return out[name]

    with seeded(model, seed):
        model.walk(provider, model.blank(n, *padded))
    for k, (rows, cols) in enumerate(own):
        out[f"y{k}"] = out[f"y{k}"][:, :, :rows, :cols]
    return out


def _shape(model: SelfVAE, given: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """The images' number, height and width as the given variables tell them."""
    images = [int(name[1:]) for name in given if name[0] == "y"]
    if images:
        y = given[f"y{min(images)}"]
        rows, cols = model.scale(min(images))
        return y.shape[0], y.shape[2] * rows, y.shape[3] * cols
    if model.config is None:
        raise ValueError("shape is needed (number, height, width): the model has no size of its own")
    _, height, width = model.config.image_shape
    return next((z.shape[0] for z in given.values()), 1), height, width


# --- the operations -----------------------------------------------------------------------------------


def generate(
    model: SelfVAE,
    n: int = 1,
    height: int | None = None,
    width: int | None = None,
    **how: Unpack[SamplingOptions],
) -> Tensor:
    """n images from nothing: uint8 (n, C, height, width), by default of the size of training."""
    shape = _shape(model, {}) if height is None or width is None else (n, height, width)
    return complete(model, {}, (n, height or shape[1], width or shape[2]), **how)["y0"]


def check_computed(model: SelfVAE, k: int) -> None:
    """Raise ValueError unless y[k] is an image that the model computes."""
    if len(model.levels) == 1:
        raise ValueError("this model computes no image to enhance from: take one with transforms")
    if not 1 <= k < len(model.levels):
        raise ValueError(f"the level must be 1 to {len(model.levels) - 1} for this model; got {k}")


def enhance(model: SelfVAE, y: Tensor, k: int = 1, **how: Unpack[SamplingOptions]) -> Tensor:
    """Images x drawn given y[k] = y alone: super-resolution, colourisation, de-banding.

    y: uint8 (B, c, h, w); returns uint8 (B, C, H, W). With a consistent likelihood d(x) = y exactly.
    """
    check_computed(model, k)
    seed = how.pop("seed", None)
    with seeded(model, seed):
        given = infer(model, y, k=k, **how)
        rows, cols = model.scale(k)
        shape = (y.shape[0], y.shape[2] * rows, y.shape[3] * cols)
        return complete(model, given, shape, **how)["y0"]


def reconstruct(
    model: SelfVAE,
    x: Tensor,
    condition_on: str | Iterable[str] | None = None,
    **how: Unpack[SamplingOptions],
) -> Tensor:
    """x, uint8 (B, C, H, W), again from the variables named in `condition_on`, inferred from x itself.

    By default all latents and no image: what the model calls a reconstruction.
    """
    seed = how.pop("seed", None)
    with seeded(model, seed):
        values = infer(model, x, "reconstruction" if condition_on is None else condition_on, **how)
        return complete(model, values, (x.shape[0], x.shape[2], x.shape[3]), **how)["y0"]


def vary(
    model: SelfVAE,
    x: Tensor,
    n: int,
    condition_on: str | Iterable[str] = "u",
    **how: Unpack[SamplingOptions],
) -> Tensor:
    """n variations of each x, uint8 (B, C, H, W): one inference of `condition_on`, the rest drawn n times.

    Returns uint8 (B, n, C, H, W).
    """
    seed = how.pop("seed", None)
    with seeded(model, seed):
        values = infer(model, x, condition_on, **how)
        values = {name: value.repeat_interleave(n, 0) for name, value in values.items()}
        out = complete(model, values, (n * x.shape[0], x.shape[2], x.shape[3]), **how)["y0"]
    return out.unflatten(0, (x.shape[0], n))


def interpolate(
    model: SelfVAE,
    a: Tensor,
    b: Tensor,
    steps: int = 8,
    latents: str | Iterable[str] = "u",
    *,
    spherical: bool = False,
    track: Track = no_progress,
    **how: Unpack[SamplingOptions],
) -> Tensor:
    """From a to b, uint8 (B, C, H, W) each, through the latents named in `latents`.

    The latents' posterior means are joined by a line, or by an arc (spherical: Shoemake's slerp, each
    image's latent taken as one vector); all else is drawn with the same noise at every step. Returns uint8
    (B, steps, C, H, W), the first for a and the last for b.
    """
    if a.shape != b.shape:
        raise ValueError(f"both images must have one shape; got {tuple(a.shape)} and {tuple(b.shape)}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2; got {steps}")
    chosen = names(model, latents)
    for name in chosen:
        if name[0] == "y":
            raise ValueError(f"only latents are interpolated ({', '.join(_latents(model))}); got {name!r}")
    ends = [infer(model, x, chosen, temperature=0.0) for x in (a, b)]
    if how.get("seed") is None:
        how["seed"] = int(torch.randint(2**31, ()).item())
    join = _slerp if spherical else torch.lerp
    frames = []
    for i in track(range(steps), "steps"):
        values = {name: join(ends[0][name], ends[1][name], i / (steps - 1)) for name in chosen}
        shape = (a.shape[0], a.shape[2], a.shape[3])
        frames.append(complete(model, values, shape, **how)["y0"])
    return torch.stack(frames, 1)


def _slerp(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Along the arc from a to b, per image; along the line where they point the same way."""
    flat = a.flatten(1), b.flatten(1)
    cosine = torch.cosine_similarity(*flat, dim=1).clamp(-1, 1)
    angle = torch.acos(cosine).view(-1, *[1] * (a.ndim - 1))
    sine = torch.sin(angle)
    arc = (torch.sin((1 - part) * angle) * a + torch.sin(part * angle) * b) / sine
    return torch.where(sine < 1e-3, torch.lerp(a, b, part), arc)
