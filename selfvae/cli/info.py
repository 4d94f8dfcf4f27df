"""Commands that describe models and files, and the first run."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from selfvae.cli.common import show
from selfvae.cli.names import PRESETS, SIZES, bundled, check_model


def info(
    model: Annotated[Positional[Path | None], arg(metavar="[MODEL|FILE]")] = None,
    presets: bool = False,
    json: bool = False,
) -> None:
    """Describe a trained model, a compressed file, or the presets that selfvae train knows.

    Args:
        model: folder that selfvae train wrote, the name of a bundled model, or a .svae file.
        presets: list the presets with their numbers of parameters at every size, and the bundled models.
        json: print one JSON object only.
    """
    if presets or model is None:
        _presets(json)
    elif model.is_file():
        _describe_file(model, json)
    else:
        _describe_model(model, json)


def _presets(json: bool) -> None:
    if json:
        show({"sizes": list(SIZES), "presets": PRESETS, "bundled": bundled()}, json)
        return
    print(f"{'preset':<18}" + "".join(f"{size:>10}" for size in SIZES) + "   (parameters, 3 x 32 x 32)")
    for name, counts in PRESETS.items():
        print(f"{name:<18}" + "".join(f"{n / 1e6:>8.2f} M" for n in counts))
    print(f"\nbundled models: {', '.join(bundled())}")


def _describe_model(model: Path, json: bool) -> None:
    check_model(model)
    from selfvae import hub
    from selfvae.model import describe

    net = hub.load(model)
    levels = [line.partition(": ")[2] for line in describe(net)]
    config = net.config.to_dict()
    config = {"preset": config.pop("name"), **config}
    if not net.has_latents and not json:  # settings that mean nothing
        for key in ("prior", "posterior", "latent_channels", "prior_components", "inner_elu"):
            del config[key]
    own = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "fingerprint": hub.fingerprint(net).hex(),
        "file_format": 3 if net.config.integer else 2,
    }
    if net.config.integer and net.answer:
        own["known_answer"] = net.answer
    told = {"levels": levels} if json else {f"y{k}": line for k, line in enumerate(levels)}
    show({**config, **own, **told}, json)


def _describe_file(file: Path, json: bool) -> None:
    """What a compressed file says of itself, and the bytes of its parts."""
    if file.suffix.lower() == ".svaes":
        raise ValueError(f"{file} is an archive: selfvae unpack extracts its pictures")
    from selfvae.codec import read_header, read_metadata

    data = file.read_bytes()
    header = read_header(data)
    result: dict[str, object] = {
        "bytes": len(data),
        "format": header.version,
        "height": header.height,
        "width": header.width,
        "channels": header.channels,
        "num_values": header.num_values,
        "bits_per_subpixel": 8 * len(data) / (header.height * header.width * header.channels),
        "model": header.fingerprint.hex() if any(header.fingerprint) else "none is needed",
        "header_bytes": header.size,
        **{f"{part.name}_bytes": part.size for part in header.parts},
    }
    whole = header.size + sum(part.size for part in header.parts)
    if kept := read_metadata(data[:whole]).names():
        result["metadata"] = kept if json else ", ".join(kept)
    missing = whole - len(data)
    if missing:
        result["missing_bytes" if missing > 0 else "extra_bytes"] = abs(missing)
    show(result, json)


def demo(
    out: Path = Path("demo"), train: bool = False, fast: bool = False, seed: int = 0, json: bool = False
) -> None:
    """See what the bundled models do: OUT/figure.png, OUT/result.json and compressed pictures.

    Args:
        out: folder for the figure, the numbers and the compressed pictures.
        train: train two small models on photographs instead, for three minutes, and show these.
        fast: use smaller pictures; with --train, train for half a minute.
        seed: random seed.
        json: print one JSON object only.
    """
    from selfvae import demo as demos

    # whatever libraries print goes to standard error: standard output is for the result
    with contextlib.redirect_stdout(sys.stderr):
        if train:
            result = demos.train_demo(out, fast, seed)
        else:
            result = demos.run_demo(out, fast, seed, report=lambda text: print(text, flush=True))
    if train or json:
        show(result, json)
    if not json:
        print(f"See {out / 'figure.png'}; the scores are in {out / 'result.json'}")
        if not train:
            print(f"Next: selfvae decompress {out / 'coffee.svae'} again.png")
