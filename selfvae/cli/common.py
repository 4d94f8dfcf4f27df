"""What the commands share: loading models and images, and printing results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from selfvae.cli.flags import SamplingFlags
from selfvae.cli.names import check_model

if TYPE_CHECKING:
    from selfvae.data.batches import Images
    from selfvae.model import SelfVAE
    from selfvae.operations import SamplingOptions

__all__ = ["load_images", "load_model", "sampling", "show"]


def show(result: dict[str, object], as_json: bool) -> None:
    """Print a result: one JSON object, or a line per entry."""
    if as_json:
        print(json.dumps(result))
        return
    width = max(map(len, result))
    for key, value in result.items():
        print(f"{key:<{width}}  {_text(key, value)}")


def _text(key: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list | tuple):
        digits = 4 if "bits" in key else 1
        return ", ".join(f"{v:.{digits}f}" if isinstance(v, float) else str(v) for v in value)
    return str(value)


def load_model(model: Path, devices: int = 1) -> SelfVAE:
    """A trained model on the device where it is to compute; starts as many processes as `devices`."""
    check_model(model)
    from selfvae import distributed, hub

    return hub.load(model).to(distributed.launch(devices))


def load_images(net: SelfVAE, data: str, split: str = "test") -> Images:
    """A source's images, at the model's size where the source has no size of its own."""
    from selfvae.data import sources

    path = Path(data)
    array = path.suffix == ".npy" or (path / "train.npy").exists()
    images: Images = getattr(sources.load(data, None if array else net.config.image_shape[1]), split)
    return images


def sampling(flags: SamplingFlags, net: SelfVAE, auto: float = 1.0) -> SamplingOptions:
    """The options of `selfvae.operations` that the flags mean, checked; `auto` is that temperature."""
    from selfvae import operations

    heat: float | dict[str, float]
    text = str(auto) if flags.temperature == "auto" else flags.temperature
    try:
        if "=" in text:
            pairs = (part.split("=") for part in text.split(","))
            heat = {name.strip(): float(value) for name, value in pairs}
        else:
            heat = float(text)
    except ValueError:
        raise ValueError(f"--temperature takes a number, or NAME=NUMBER,...; got {text!r}") from None
    held = operations.variables(net)
    for name in heat if isinstance(heat, dict) else ():
        if name not in (*held, "x", *(["u"] if net.has_latents else [])):
            raise ValueError(f"--temperature: unknown variable {name!r}; this model has {', '.join(held)}")
    operations.temperatures(net, heat, flags.decode)
    return {"temperature": heat, "decode": flags.decode, "seed": flags.seed}
