"""Models as folders: config.json and model.safetensors, nothing that is ever executed.

Some are bundled with the package; others are on the Hugging Face hub, with a model card, README.md.

Compressed files name the model they need by its fingerprint, which depends on every weight. Rounding the
weights to float16 (`half`) makes another model: it cannot read the files of the unrounded one.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from selfvae.files import cache_folder, write_atomic, write_tensors
from selfvae.level import Level
from selfvae.model import SelfVAE
from selfvae.nn.integer import freeze
from selfvae.nn.networks import Constant, Shared
from selfvae.presets import FORMAT, FORMER_FIELDS, ModelConfig, from_config

__all__ = [
    "PHOTOS",
    "about_rounding",
    "bundled",
    "card",
    "check_plain",
    "find",
    "find_writer",
    "fingerprint",
    "from_pretrained",
    "frozen",
    "known_answer",
    "load",
    "load_unique_state_dict",
    "push_to_hub",
    "save",
    "save_pretrained",
    "unique_state_dict",
]

_FILES = ("config.json", "model.safetensors")
_EXPONENTS = ".exponents"  # ends the names of what goes with weights that are stored as bytes
_NEGATIVE_ZERO = -128  # no weight has it; the fingerprint tells -0.0 from 0.0
_BUNDLED = Path(__file__).parent / "models"
PHOTOS = "photos-v5"  # the bundled model that compresses photographs
_MODELS = "SELFVAE_MODELS"  # the environment variable
# options that came later, as they were before: they leave the fingerprints of older models alone
_PLAIN: dict[str, Any] = {
    "posterior": "normal",
    "shared": False,
    "subpixel": False,
    "inner_elu": True,
    "activation": "elu",
    "kernels": (3, 3, 3),
    "depthwise": False,
    "integer": False,
    "autoregressive": 0,
    "level_width": 1.0,
    "level_depth": 0.5,
    "top_width": 1.0,
    "top_autoregressive": 0,
}
# what fingerprints call presets and priors that were renamed
_NAMES = {"selfvae-mean-3lvl": "selfvae-3"}
_PRIORS = {"flow-residual": "flow", "mog-local": "mog"}


def bundled() -> dict[str, Path]:
    """The folders of the bundled models, by name; each holds a model card, README.md."""
    return {file.parent.name: file.parent for file in sorted(_BUNDLED.glob("*/config.json"))}


def unique_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once: what levels share goes by its first name."""
    saved = model.state_dict(keep_vars=True)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value for name, value in own.items() if name in saved}


def load_unique_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `unique_state_dict`; RuntimeError if the names or shapes are not the model's."""
    own = unique_state_dict(model)
    first = {id(value): name for name, value in own.items()}
    firsts = {name: first[id(value)] for name, value in model.state_dict(keep_vars=True).items()}
    again = {name: state[f] for name, f in firsts.items() if name != f and f in state}
    model.load_state_dict({**state, **again})


def check_plain(model: SelfVAE) -> None:
    """Raise ValueError unless the model is as `build` made it, with all that its weights mean."""
    if not isinstance(model.config, ModelConfig):
        raise ValueError("expected a model made by selfvae.build; this one has no config")
    if not all(isinstance(level, Level) for level in model.levels):
        raise ValueError(
            "expected a model made by selfvae.build; this one is tiled: take what it was made of"
        )


def fingerprint(model: SelfVAE) -> bytes:
    """8 bytes that tell models apart: of the structure and of every weight's value as float64.

    Of an integer model the rounded weights count, with which it computes.
    """
    check_plain(model)
    model = frozen(model)
    plain, prior = dict(_PLAIN), model.config.prior
    if prior != "mog":
        plain["prior_components"] = model.config.prior_components
    if model.config.backbone != "dense" and prior != "flow":
        plain["inner_elu"] = model.config.inner_elu
    former = {new: old for old, new in FORMER_FIELDS.items()}
    options = {key: value for key, value in model.config.to_dict().items() if value != plain.get(key)}
    config = {former.get(key, key): value for key, value in options.items()}
    config["prior"] = _PRIORS.get(prior, prior)
    config["name"] = _NAMES.get(model.config.name, model.config.name)
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(unique_state_dict(model).items()):
        found.update(f"{name} {tuple(value.shape)} ".encode())
        found.update(value.detach().cpu().double().numpy().astype("<f8").tobytes())
    return found.digest()[:8]


def known_answer(model: SelfVAE, evaluate: Callable[[Level, Tensor], Tensor] | None = None) -> str:
    """A checksum of what an integer model's networks compute for a fixed image.

    A machine that finds another one than the model's folder states does not compute exactly.

    Args:
        model: an integer model, frozen.
        evaluate: maps a level and its context (1, C, h, w) to the outputs of its network (1, P, h, w) in
            steps of their grids; by default by the decoder.

    Returns:
        16 hexadecimal digits.
    """
    rows, cols = model.multiples[0]
    shape = 1, model.spec.channels, 2 * rows, 2 * cols
    noise = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(2654435761) >> np.uint64(16)
    image = (noise % np.uint64(model.spec.num_values)).astype(np.uint8).reshape(shape)
    ys = model.pyramid(torch.from_numpy(image).to(model.device))
    found = hashlib.sha256()
    for level, up in zip(model.levels, [*ys[1:], ys[-1][:, :0]], strict=True):
        steps = (evaluate or _steps)(level, level.context(up))
        found.update(steps.cpu().numpy().astype("<i2").tobytes())
    return found.hexdigest()[:16]


@torch.no_grad()
def _steps(level: Level, context: Tensor) -> Tensor:
    decoder: Any = level.decoder
    decoder = decoder.decoder if isinstance(decoder, Shared) else decoder
    scale: Any = decoder.scale if isinstance(decoder, Constant) else decoder.head.scale
    scale = scale.view(-1, 1, 1)
    out: Tensor = level.decoder(context, None) * scale
    return out


def frozen(model: SelfVAE) -> SelfVAE:
    """A copy of an integer model with the rounded weights, with which it computes; others as they are."""
    if not model.config.integer:
        return model
    model = copy.deepcopy(model)
    freeze(model)
    return model


def save(model: SelfVAE, folder: str | Path, *, half: bool = False) -> None:
    """Write a model as folder/config.json and folder/model.safetensors, each whole or not at all.

    An integer model's weights are written rounded, as it computes with them: as bytes with one exponent per
    output channel, or in float16, where that changes nothing.

    Args:
        model: made by `build` or `load`.
        folder: made if need be.
        half: round the weights to float16, for half the bytes; they are float32 again when loaded. The
            fingerprint changes: the rounded model cannot read files that the model itself compressed.

    Raises:
        ValueError: if the model was not made by `build`.
    """
    check_plain(model)
    folder = Path(folder)
    model = frozen(model)
    state: dict[str, Tensor] = {}
    for name, value in unique_state_dict(model).items():
        if model.config.integer and (parts := _as_bytes(value)):
            state[name], state[name + _EXPONENTS] = parts
        elif value.is_floating_point() and (half or _is_half(value, model)):
            state[name] = value.half()
        else:
            state[name] = value
    write_tensors(folder / "model.safetensors", state)
    config: dict[str, Any] = {"format": FORMAT, "model": model.config.to_dict()}
    if model.config.integer:
        config["answer"] = known_answer(model)
    write_atomic(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _is_half(value: Tensor, model: SelfVAE) -> bool:
    return model.config.integer and bool((value.half() == value).all())


def _as_bytes(value: Tensor) -> tuple[Tensor, Tensor] | None:
    """n (out, ...) and e (out,), both int8, of rounded weights n 2^e; None if they are not of that kind."""
    if value.ndim < 2 or not value.is_floating_point():
        return None
    value = value.detach().cpu()
    _, exponents = torch.frexp(value.flatten(1).abs().amax(1))
    exponents -= 7  # |n| < 2^7, the finest steps that fit
    steps = torch.ldexp(value, -exponents.view(-1, *[1] * (value.ndim - 1)))
    if not torch.equal(steps, steps.round()) or int(exponents.abs().max()) > 127:
        return None
    negative_zero = (steps == 0) & steps.signbit()
    return steps.masked_fill(negative_zero, _NEGATIVE_ZERO).to(torch.int8), exponents.to(torch.int8)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of weights; those stored as bytes with exponents as float32."""
    state = load_file(path)
    for name in [name for name, value in state.items() if value.dtype == torch.int8 and value.ndim > 1]:
        steps, exponents = state[name], state.pop(name + _EXPONENTS, None)
        if exponents is None or exponents.shape != steps.shape[:1]:
            raise RuntimeError(f"{name}{_EXPONENTS} is missing, or not one for each output channel")
        signed = steps.float().masked_fill(steps == _NEGATIVE_ZERO, -0.0)
        state[name] = torch.ldexp(signed, exponents.int().view(-1, *[1] * (steps.ndim - 1)))
    return state


def about_rounding(model: SelfVAE) -> str:
    """A sentence or two on what rounding a model's weights to float16 does to its compressed files."""
    rounded = copy.deepcopy(frozen(model))
    for value in unique_state_dict(rounded).values():
        if value.is_floating_point():
            value.data.copy_(value.half())
    own, new = fingerprint(model).hex(), fingerprint(rounded).hex()
    if own == new:
        return f"Rounding to float16 changes no weight; the fingerprint stays {own}."
    return (
        f"Rounded to float16; the fingerprint is {new}. Files that were compressed before rounding "
        f"need the model of fingerprint {own}."
    )


def find(path: str | Path) -> Path:
    """The folder of a model.

    Args:
        path: a folder that `save` or training wrote, or the name of one of `bundled`.

    Raises:
        FileNotFoundError: if there is none; the message says what the folder lacks.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        folder = bundled().get(str(path), folder)
    for name in _FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no model: {name} is missing (expected config.json and model.safetensors, "
                f"as selfvae train writes them, or one of {', '.join(bundled())})"
            )
    return folder


def load(path: str | Path) -> SelfVAE:
    """The model in a folder that `save` or training wrote, or one of `bundled`; on the CPU, ready for use.

    Raises FileNotFoundError or ValueError saying what the folder lacks.
    """
    folder = find(path)
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is not valid JSON: {error}") from None
    if not isinstance(config, dict) or "model" not in config or config.get("format") not in (1, FORMAT):
        raise ValueError(
            f"{folder}/config.json must be {{'format': {FORMAT}, 'model': ...}}; got {str(config)[:50]}: "
            "use the version of selfvae that wrote it"
        )
    try:
        model = from_config(ModelConfig.from_dict(config["model"], config["format"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json describes no model: {error}") from None
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
        raise ValueError(f"{folder}/config.json describes too large a model: {error}") from None
    try:
        load_unique_state_dict(model, _read_weights(folder / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder}/model.safetensors is damaged or not of the model in config.json: {error}"
        ) from None
    model.answer = config.get("answer")
    return model.eval()


# --- the model that a compressed file needs -----------------------------------------------------------


def find_writer(wanted: bytes) -> Path:
    """Find a model by the fingerprint that its files carry.

    It is looked for among the bundled models, the codec's usual one first, then in the folders inside the
    one that the environment variable SELFVAE_MODELS names. A model is loaded at most once for this: its
    fingerprint is kept in the cache until its files change.

    Args:
        wanted: 8 bytes.

    Returns:
        The model's folder.

    Raises:
        FileNotFoundError: No model has it; the message says which were looked at.
    """
    looked = []
    for name, folder in _searched():
        try:
            if _kept_fingerprint(folder) == wanted:
                return folder
        except (ValueError, OSError) as error:
            name += f" (unreadable: {_first_line(error)})"
        looked.append(name)
    own = os.environ.get(_MODELS)
    add = "" if own else f", or put it into a folder that the environment variable {_MODELS} names"
    raise FileNotFoundError(
        f"the file needs the model with the fingerprint {wanted.hex()}, which is none of "
        f"{', '.join(looked)}: name that model's folder (--model on the command line){add}"
    )


def _searched() -> Iterator[tuple[str, Path]]:
    """Yield name and folder of the models that files may need, the likeliest first."""
    own = bundled()
    yield from sorted(own.items(), key=lambda item: item[0] != PHOTOS)  # stable: the others stay in order
    if others := os.environ.get(_MODELS):
        if not Path(others).is_dir():
            raise FileNotFoundError(f"{_MODELS} must name a folder of models; {others} is none")
        yield from ((str(file.parent), file.parent) for file in sorted(Path(others).glob("*/config.json")))


def _kept_fingerprint(folder: Path) -> bytes:
    """Return the fingerprint of the model in a folder: as kept in the cache, or computed and kept."""
    state = [[s.st_mtime_ns, s.st_size] for s in ((folder / name).stat() for name in _FILES)]
    kept, key = cache_folder() / "fingerprints.json", str(folder.resolve())
    known: dict[str, Any] = {}
    try:
        known = dict(json.loads(kept.read_text()))
        then, found = known[key]
        if then == state:
            return bytes.fromhex(found)
    except (OSError, KeyError, TypeError, ValueError):  # not there, or damaged: written anew
        pass
    mark = fingerprint(load(folder))
    with contextlib.suppress(OSError):  # nothing can be kept here
        write_atomic(kept, (json.dumps({**known, key: [state, mark.hex()]}, indent=0) + "\n").encode())
    return mark


# --- the hub ------------------------------------------------------------------------------------------


def from_pretrained(
    name: str | Path, *, revision: str | None = None, token: str | None = None, offline: bool = False
) -> SelfVAE:
    """Load a model from a folder, from the package, or from the Hugging Face hub.

    From the hub only config.json and model.safetensors are fetched, and neither is executed.

    Args:
        name: a folder, the name of a bundled model, or OWNER/NAME on the hub.
        revision: branch, tag or commit on the hub.
        token: of the hub, for private models; by default the one of `hf auth login`.
        offline: use what was fetched before, without any request.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        FileNotFoundError, ValueError: as `load`, or if the hub has no such model.
        ImportError: if the hub is needed and huggingface_hub is missing.
    """
    if Path(name).exists() or str(name) in bundled() or str(name).count("/") != 1:
        return load(name)
    hub = _huggingface()
    try:
        folder = hub.snapshot_download(
            str(name), revision=revision, token=token, allow_patterns=_FILES, local_files_only=offline
        )
    except Exception as error:  # what it raises differs by its version
        where = "among what was fetched before" if offline else "on the hub, nor is there such a folder"
        raise ValueError(
            f"no model {name} {where} ({_first_line(error)}): check the name and the connection"
        ) from None
    return load(folder)


def save_pretrained(
    model: SelfVAE, folder: str | Path, sections: Mapping[str, str] | None = None, *, half: bool = False
) -> None:
    """Write a model and its card, README.md, into a folder; arguments as for `save` and `card`."""
    _save_with_card(model, Path(folder), Path(folder).name, sections, half)


def _save_with_card(
    model: SelfVAE, folder: Path, name: str, sections: Mapping[str, str] | None, half: bool
) -> None:
    save(model, folder, half=half)
    if half:
        sections = {**(sections or {}), "Weights": about_rounding(model)}
    write_atomic(folder / "README.md", card(model, name, sections).encode())


def push_to_hub(
    model: SelfVAE,
    name: str,
    sections: Mapping[str, str] | None = None,
    *,
    half: bool = False,
    private: bool = False,
    token: str | None = None,
    message: str = "Model of selfvae",
) -> str:
    """Write a model to the Hugging Face hub, with a card.

    Args:
        model: made by `build` or `load`.
        name: OWNER/NAME; the repository is made if need be.
        sections: of the card, see `card`.
        half: round the weights to float16, for half the bytes. Without it the model on the hub has the
            fingerprint of this one, and reads its compressed files; with it, it does not.
        private: whether a new repository is visible only to its owner.
        token: of the hub; by default the one of `hf auth login`.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        ValueError: if the name is no OWNER/NAME, or the hub refuses.
        ImportError: if huggingface_hub is missing.
    """
    if name.count("/") != 1:
        raise ValueError(f"a model on the hub is named OWNER/NAME; got {name!r}")
    hub = _huggingface()
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        _save_with_card(model, Path(folder), name, sections, half)
        try:
            address = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        except Exception as error:
            raise ValueError(
                f"the hub did not take {name} ({_first_line(error)}): is `hf auth login` done?"
            ) from None
    return str(address)


def card(model: SelfVAE, name: str, sections: Mapping[str, str] | None = None) -> str:
    """A model card: what the model is, how it is used, and further sections.

    Args:
        model: made by `build` or `load`.
        name: what `from_pretrained` takes.
        sections: text by title, e.g. {"Data": ..., "Recipe": ..., "Numbers": ..., "Limits": ...}.

    Returns:
        Markdown, for README.md.

    Raises:
        ValueError: if the model was not made by `build`.
    """
    if not isinstance(model.config, ModelConfig):
        raise ValueError("only a model made by selfvae.build has a card: this one has no config")
    config, count = model.config, sum(p.numel() for p in model.parameters())
    channels, height, width = config.image_shape
    latents = "latents" if model.has_latents else "no latents: its likelihood is exact"
    options = {key: value for key, value in config.to_dict().items() if key != "name"}
    text = f"""---
library_name: selfvae
pipeline_tag: unconditional-image-generation
tags: [selfvae, density-estimation, compression]
---

# {name.split("/")[-1]}

A self-supervised variational auto-encoder, `{config.name}`, with {latents}. {count / 1e6:.2f} M
parameters, built for images of {channels} x {height} x {width}; it takes any size.

```python
import selfvae

model = selfvae.from_pretrained("{name}")
x = selfvae.generate(model, 16)
```

| level | | latent |
|---|---|---|
"""
    for k, level in enumerate(model.levels):
        kind = f"{level.spec.channels} channels of {level.spec.num_values} values"
        text += f"| y{k} | {kind}, given {level.transform} | {f'z{k}' if level.has_latent else ''} |\n"
    text += f"\nConfiguration: `{json.dumps(options)}`\n"
    for title, section in (sections or {}).items():
        text += f"\n## {title}\n\n{section.strip()}\n"
    return text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _huggingface() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError("the hub needs huggingface_hub: pip install 'selfvae[hub]'") from None
    return huggingface_hub
