"""What a model can do with an image: some variables are given, the rest is drawn.

The definitions are in docs/spec.md, section Operations. A set of variables is written as names ("z0",
"y1", with x = y0 and u the top latent) or as the papers' operations, one or several, e.g. {"z1", "z0"},
"RS2" or "u,z0". With one computed image (K = 1):

| operation | given |
|---|---|
| generation | nothing |
| conditional generation, CG, super resolution, SR | y1 |
| conditional reconstruction, CR | y1, z0 |
| RS1, RS2, ... | the 1, 2, ... coarsest latents |
| reconstruction, RS | all latents |
| variation | u |

Conditioning on an image also fixes the coarser images computed from it and their latents, inferred by q
(only `complete` takes nothing but the variables it is given). Images of any height and width are padded
to multiples that the networks need (the last row and column repeated), and the results cropped.

Random numbers come from a seed or a generator. With either of them torch's global random state is neither
used nor changed, so that threads do not disturb each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypedDict, Unpack, cast

import torch
from torch import Tensor

from selfvae.distributions.pixels import PixelMixture
from selfvae.level import Posterior
from selfvae.model import Distribution, SelfVAE
from selfvae.progress import Track, no_progress
from selfvae.transforms.base import round_up

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

    Attributes:
        temperature: of every draw, from priors, likelihoods and posteriors: below 1 less varied, 0 the
            modes. A mapping sets it by variable, e.g. {"z1": 0.7, "y0": 0}; it is 1 for those left out.
        decode: "sample" draws images; "mode" takes the most likely image at every level, "mean" the mean of
            its distribution, which is nearest to the truth on average; both at any temperature.
        seed: of the draws: the same as a new generator with that seed.
        generator: of the draws, on the model's device; not together with a seed. With neither, draws come
            from torch's global random state.
    """

    temperature: float | Mapping[str, float]
    decode: Literal["sample", "mode", "mean"]
    seed: int | None
    generator: torch.Generator | None


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
    """Resolve names and operations (see the module) to variables.

    Args:
        given: separated by commas, or one by one.

    Returns:
        Names of variables in the order of the walk, e.g. ["z1", "y1"].

    Raises:
        ValueError: for a name that the model does not have; the message lists those it has.
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


def _generator(
    model: SelfVAE, seed: int | None, generator: torch.Generator | None
) -> torch.Generator | None:
    """The generator that draws come from: the one given, a new one of a seed, or None."""
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("seed and generator exclude each other: give one of them")
    return torch.Generator(model.device).manual_seed(seed)


def _one_stream(model: SelfVAE, how: SamplingOptions) -> SamplingOptions:
    """The options with a generator in place of a seed: several draws continue one sequence of numbers."""
    generator = _generator(model, how.get("seed"), how.get("generator"))
    return {**how, "seed": None, "generator": generator}


@contextmanager
def seeded(model: SelfVAE, seed: int | None) -> Iterator[None]:
    """Seed torch's global random state for a while, for functions that draw from it, such as scores.

    It is as before at the end; no other thread should use it meanwhile. None: change nothing.
    """
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

    Raises:
        ValueError: for a name that the model does not have, and for a temperature below 0.
    """
    if decode not in ("sample", "mode", "mean"):
        raise ValueError(f"decode must be 'sample', 'mode' or 'mean'; got {decode!r}")
    heats = dict.fromkeys(variables(model), 1.0 if isinstance(temperature, Mapping) else temperature)
    if isinstance(temperature, Mapping):
        for name, value in temperature.items():
            for variable in names(model, name):
                heats[variable] = value
    for name, value in heats.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"temperature must be finite and 0 or more; got {value} for {name}")
        if decode != "sample" and name[0] == "y":
            heats[name] = 0.0
    return heats


def _draw(p: Distribution | Posterior, temperature: float, generator: torch.Generator | None) -> Tensor:
    return p.sample(temperature, generator) if temperature > 0 else p.mode()


def _pad(y: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeat the last row and column up to a height and width."""
    for dim, n in zip((2, 3), size, strict=True):
        if y.shape[dim] == n:
            continue
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
    """Find variables of images: computed images are computed, latents drawn from their posterior q.

    Args:
        model: any.
        image: y[k], uint8 (B, c, H, W).
        condition_on: names or operations (see the module) of the variables wanted; None: all that y[k]
            determines. A wanted image also brings the coarser images and their latents.
        k: the level of the image; 0: x.
        **how: see `SamplingOptions`.

    Returns:
        Tensors by name, for `complete`, of the padded size: images uint8, latents float (B, c, h, w).

    Raises:
        TypeError, ValueError: if the image is not one of level k, or a name is unknown.
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
    y = _pad(y, round_up((y.shape[2], y.shape[3]), model.multiples[k]))
    generator = _generator(model, how.get("seed"), how.get("generator"))
    for j in range(k, len(model.levels)):
        if f"y{j}" in wanted:
            out[f"y{j}"] = y
        if f"z{j}" in wanted:
            out[f"z{j}"] = _draw(model.levels[j].posterior(y), heats[f"z{j}"], generator)
        y = model.levels[j].transform(y)
    return out


@torch.no_grad()
def complete(
    model: SelfVAE,
    given: Mapping[str, Tensor],
    shape: tuple[int, int, int] | None = None,
    *,
    temperature: float | Mapping[str, float] = 1.0,
    decode: Literal["sample", "mode", "mean"] = "sample",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    track: Track = no_progress,
) -> dict[str, Tensor]:
    """Walk down the model once: variables in `given` are taken as they are, all others drawn.

    Only the variables that are given count: what a given image determines besides is drawn too, unless
    `infer` found it and it is given as well.

    Args:
        model: any.
        given: by name, "y0".."yK" (or "x") uint8 images and "z0".."zK" (or "u") float latents, as
            `infer` returns them.
        shape: number, height and width (pixels) of the images x; None: those of the given images, or the
            size that the model was built for.
        temperature, decode, seed, generator: see `SamplingOptions`.
        track: shows progress over the variables.

    Returns:
        Every variable by name: images uint8 (B, c, h, w), of which "y0" is x, and latents float.

    Raises:
        TypeError, ValueError: if a name is unknown, or a shape or value does not fit; the message says what
            was expected.
    """
    given = {variable: value for name, value in given.items() for variable in _one(model, name)}
    for name, value in given.items():
        if name[0] == "y":
            model.levels[int(name[1:])].spec.check(value, name)
    n, height, width = shape or _shape(model, given)
    if min(n, height, width) < 1:
        raise ValueError(f"shape must be at least one image of 1 x 1 pixel; got {n, height, width}")
    padded = round_up((height, width), model.multiples[0])
    scales = [model.scale(k) for k in range(len(model.levels))]
    wanted = [(-(-height // rows), -(-width // cols)) for rows, cols in scales]
    taken = _padded(model, given, (n, height, width), wanted)
    heats = temperatures(model, temperature, decode)
    generator = _generator(model, seed, generator)
    out: dict[str, Tensor] = {}
    left = iter(track(variables(model), "variables"))

    def provider(name: str, p: Distribution) -> Tensor:
        next(left)
        if name in taken:
            out[name] = taken[name]
        elif decode == "mean" and name[0] == "y":
            out[name] = cast(PixelMixture, p).mean()
        else:
            out[name] = _draw(p, heats[name], generator)
        return out[name]

    model.walk(provider, model.blank(n, *padded))
    for k, (rows, cols) in enumerate(wanted):
        out[f"y{k}"] = out[f"y{k}"][:, :, :rows, :cols]
    return out


def _padded(
    model: SelfVAE, given: Mapping[str, Tensor], shape: tuple[int, int, int], wanted: list[tuple[int, int]]
) -> dict[str, Tensor]:
    """Given variables as the walk takes them: checked, padded, on the model's device.

    shape: number, height and width of x; wanted: height and width of every y[k] before padding.
    """
    n, height, width = shape
    sizes = [round_up((height, width), model.multiples[0])]  # of every y[k], padded
    for level in model.levels[:-1]:
        sizes.append(level.transform.size(*sizes[-1]))
    taken: dict[str, Tensor] = {}
    for name, value in given.items():
        if value.shape[0] != n:
            raise ValueError(f"{name} must be for {n} images; got {value.shape[0]}")
        k = int(name[1:])
        if name[0] == "y":
            if tuple(value.shape[2:]) not in (wanted[k], sizes[k]):
                raise ValueError(
                    f"{name} must be {wanted[k][0]} x {wanted[k][1]} pixels for images of {height} x "
                    f"{width}; got {value.shape[2]} x {value.shape[3]}"
                )
            value = _pad(value, sizes[k])
        elif tuple(value.shape[1:]) != model.levels[k].latent_shape(*sizes[k]):
            raise ValueError(
                f"{name} must be {(n, *model.levels[k].latent_shape(*sizes[k]))} for images of {height} x "
                f"{width}; got {tuple(value.shape)}: is shape, (number, height, width), the images' own?"
            )
        taken[name] = value.to(model.device, model.dtype if name[0] == "z" else None)
    return taken


def _shape(model: SelfVAE, given: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """The number, height and width of x that given variables imply."""
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
    """Draw unconditional samples.

    Args:
        model: initialised or loaded.
        n: number of images.
        height, width: in pixels; by default those that the model was built for.
        **how: see `SamplingOptions`.

    Returns:
        uint8 (n, C, height, width).

    Raises:
        ValueError: if an argument is out of range, or the model has no size of its own and none is given.
    """
    shape = _shape(model, {}) if height is None or width is None else (n, height, width)
    return complete(model, {}, (n, height or shape[1], width or shape[2]), **how)["y0"]


def check_computed(model: SelfVAE, k: int) -> None:
    """Raise ValueError unless y[k] is an image that the model computes from x."""
    if len(model.levels) == 1:
        raise ValueError("this model computes no image to enhance from: take one with transforms")
    if not 1 <= k < len(model.levels):
        raise ValueError(f"the level must be 1 to {len(model.levels) - 1} for this model; got {k}")


def times_applied(model: SelfVAE, k: int, scale: int | None) -> int:
    """How often `enhance` is applied, from its own results, to enlarge by a factor.

    Args:
        model: a model that enlarges by the same factor in both directions.
        k: level of the given image.
        scale: a power of that factor; None: once.

    Raises:
        ValueError: if the model does not enlarge so.
    """
    (rows, cols), times = model.scale(k), 1
    if scale is None:
        return times
    while rows**times < scale and rows > 1:
        times += 1
    again = model.levels[0].spec == model.levels[k].spec  # results are such pictures as are given
    if rows != cols or rows**times != scale or (times > 1 and not again):
        does = f"enlarges {rows} times" if rows == cols > 1 else "does not enlarge"
        also = " or a power of that" if rows == cols > 1 and again else ""
        raise ValueError(f"scale {scale}: this model {does}{also}")
    return times


def enhance(model: SelfVAE, y: Tensor, k: int = 1, **how: Unpack[SamplingOptions]) -> Tensor:
    """Draw images given their computed image y[k]: super-resolution, colourisation, debanding.

    Where all levels below k are consistent (`Level.consistent`), computing y[k] from the result gives y
    again, exactly.

    Args:
        model: with at least k + 1 levels.
        y: y[k] of the wanted images, uint8 (B, c, h, w), 0 to `model.levels[k].spec.max_value`.
        k: its level, from 1.
        **how: see `SamplingOptions`.

    Returns:
        uint8 (B, C, H, W), H and W as many times h and w as `model.scale(k)` says.

    Raises:
        TypeError, ValueError: if the model has no level k, or y is not an image of it.
    """
    check_computed(model, k)
    how = _one_stream(model, how)
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
    """Draw images again from some of their own variables.

    Args:
        model: any.
        x: uint8 (B, C, H, W).
        condition_on: names or operations (see the module) of the variables that are inferred from x and
            kept; by default all latents and no image.
        **how: see `SamplingOptions`.

    Returns:
        uint8 (B, C, H, W).

    Raises:
        TypeError, ValueError: if x is not an image of the model, or a name is unknown.
    """
    how = _one_stream(model, how)
    values = infer(model, x, "reconstruction" if condition_on is None else condition_on, **how)
    return complete(model, values, (x.shape[0], x.shape[2], x.shape[3]), **how)["y0"]


def vary(
    model: SelfVAE,
    x: Tensor,
    n: int,
    condition_on: str | Iterable[str] = "u",
    **how: Unpack[SamplingOptions],
) -> Tensor:
    """Draw variations of images: some variables are inferred once and kept, the rest is drawn anew.

    Args:
        model: any.
        x: uint8 (B, C, H, W).
        n: variations per image.
        condition_on: names or operations (see the module) of what is kept.
        **how: see `SamplingOptions`.

    Returns:
        uint8 (B, n, C, H, W).

    Raises:
        TypeError, ValueError: if x is not an image of the model, or a name is unknown.
    """
    how = _one_stream(model, how)
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
    """Go from images a to images b through their latents.

    The posterior means of these latents are interpolated; everything else is drawn, with the same noise at
    every step.

    Args:
        model: with latents.
        a, b: uint8 (B, C, H, W), of one shape.
        steps: images per pair, both ends included.
        latents: names or operations (see the module) of the latents.
        spherical: along an arc (Shoemake's slerp, each image's latent taken as one vector) instead of a
            line.
        track: shows progress over the steps.
        **how: see `SamplingOptions`.

    Returns:
        uint8 (B, steps, C, H, W), the first for a and the last for b.

    Raises:
        TypeError, ValueError: if the images do not fit, steps is below 2, or `latents` names an image.
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
    generator = _generator(model, how.get("seed"), how.get("generator"))
    if how.get("seed") is None:
        device = "cpu" if generator is None else generator.device
        how["seed"] = int(torch.randint(2**31, (), generator=generator, device=device).item())
    how["generator"] = None
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
