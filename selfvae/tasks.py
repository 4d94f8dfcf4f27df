"""What a model can do with an image: some variables are given, the rest is drawn. SPEC section 7."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from selfvae.model import SelfVAE
from selfvae.transforms import check_image

__all__ = ["complete", "enhance", "generate", "reconstruct"]


@contextmanager
def _seeded(model: SelfVAE, seed: int | None) -> Iterator[None]:
    """Draw from `seed` and leave the global random state as it was; None: draw from the global state."""
    if seed is None:
        yield
        return
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def complete(
    model: SelfVAE,
    given: Mapping[str, Tensor],
    size: tuple[int, int, int],
    *,
    temperature: float = 1.0,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """One walk down the model: variables in `given` are taken, all others drawn.

    Arguments:
        given: by name, "y0".."yK" uint8 images and "z0".."zK" float latents.
        size: number, height and width (pixels) of the images x.
        temperature: of every draw; 0 takes the modes.
        seed: of the draws; None takes torch's global random state.

    Returns every variable by name; "y0" is the image, uint8 (B, C, H, W).
    """
    known = [f"{kind}{k}" for k in range(len(model.levels)) for kind in "yz"]
    for name in given:
        if name not in known:
            raise ValueError(f"unknown variable {name!r}; this model has {', '.join(known)}")
    given = {name: value.to(model.device) for name, value in given.items()}
    for name, value in given.items():
        if name[0] == "y":
            check_image(value, model.levels[int(name[1:])].format.channels, name)
        if value.shape[0] != size[0]:
            raise ValueError(f"{name} must be for {size[0]} images; got {value.shape[0]}")
    out: dict[str, Tensor] = {}

    def pick(name: str, p: Any) -> Tensor:
        if name in given:
            out[name] = given[name]
        else:
            out[name] = p.sample(temperature) if temperature > 0 else p.mode()
        return out[name]

    with _seeded(model, seed):
        model.walk(pick, model.blank(*size))
    return out


def generate(
    model: SelfVAE, n: int, height: int, width: int, *, temperature: float = 1.0, seed: int | None = None
) -> Tensor:
    """n images from nothing: uint8 (n, C, height, width)."""
    return complete(model, {}, (n, height, width), temperature=temperature, seed=seed)["y0"]


@torch.no_grad()
def enhance(
    model: SelfVAE, y: Tensor, k: int = 1, *, temperature: float = 1.0, seed: int | None = None
) -> Tensor:
    """Images x drawn given y[k] = y, uint8 (B, c, h, w): super-resolution, colourisation, de-banding.

    All that y determines is taken from it: the smaller images above and, by their posteriors, the latents.
    """
    if not 1 <= k < len(model.levels):
        raise ValueError(f"k must be 1 to {len(model.levels) - 1} for this model; got {k}")
    check_image(y, model.levels[k].format.channels, f"y{k}")
    y = y.to(model.device)
    given: dict[str, Tensor] = {}
    height, width = y.shape[2:]
    for level in reversed(model.levels[:k]):
        height, width = height * level.transform.scale[0], width * level.transform.scale[1]
    with _seeded(model, seed):
        for j in range(k, len(model.levels)):
            level = model.levels[j]
            given[f"y{j}"] = y
            if level.has_latent:
                given[f"z{j}"] = level.posterior(y).sample()
            y = level.transform(y)
        size = (y.shape[0], int(height), int(width))
        return complete(model, given, size, temperature=temperature)["y0"]


@torch.no_grad()
def reconstruct(
    model: SelfVAE,
    x: Tensor,
    given: set[str] | None = None,
    *,
    temperature: float = 1.0,
    seed: int | None = None,
) -> Tensor:
    """x, uint8 (B, C, H, W), again from the variables named in `given`, inferred from x itself.

    By default all latents and no image: what the model calls a reconstruction.
    """
    with _seeded(model, seed):
        ys = model.pyramid(x.to(model.device))
        latents = {name: q.sample() for name, q in model.posteriors(ys).items()}
        values = latents | {f"y{k}": y for k, y in enumerate(ys)}
        chosen = set(latents) if given is None else given
        for name in chosen - set(values):
            raise ValueError(f"unknown variable {name!r}; this model has {', '.join(values)}")
        size = (x.shape[0], x.shape[2], x.shape[3])
        return complete(model, {n: values[n] for n in chosen}, size, temperature=temperature)["y0"]
