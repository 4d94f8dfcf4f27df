"""What the commands share: arguments, loading, progress, files and folders."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from tyro.conf import OmitArgPrefixes, Positional, arg

from selfvae import distributed, hub, operations
from selfvae.data import pictures, sources
from selfvae.data.batches import Images
from selfvae.files import below
from selfvae.model import SelfVAE
from selfvae.transforms import ImageSpec

Run = Annotated[Positional[Path], arg(metavar="DIR")]


In = Annotated[Positional[Path], arg(metavar="IN")]


Out = Annotated[Positional[Path], arg(metavar="OUT")]


def show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    width = max(map(len, result))
    for key, value in result.items():
        if isinstance(value, float):
            value = f"{value:.4f}"
        elif isinstance(value, list):
            digits = 4 if "bits" in key else 1
            value = ", ".join(f"{v:.{digits}f}" if isinstance(v, float) else str(v) for v in value)
        print(f"{key:<{width}}  {value}")


@dataclass(frozen=True)
class SamplingFlags:
    """How variables are drawn.

    Args:
        temperature: of every draw, 0.7, or by variable, y0=0.3,z1=1; below 1 plainer, 0 the modes.
        decode: sample, or mode: the most likely image at every level.
        seed: of the draws.
    """

    temperature: str = "1"
    decode: Literal["sample", "mode"] = "sample"
    seed: int = 0

    def how(self, net: SelfVAE) -> dict[str, Any]:
        """The keyword arguments of `tasks`, checked for the model."""
        heat: Any
        try:
            if "=" in self.temperature:
                pairs = (part.split("=") for part in self.temperature.split(","))
                heat = {name.strip() or "?": float(value) for name, value in pairs}
            else:
                heat = float(self.temperature)
        except ValueError:
            raise ValueError(
                f"--temperature takes a number, or NAME=NUMBER,...; got {self.temperature!r}"
            ) from None
        operations.temperatures(net, heat, self.decode)
        return {"temperature": heat, "decode": self.decode, "seed": self.seed}


Sampling = Annotated[SamplingFlags, OmitArgPrefixes]


SAMPLING = SamplingFlags()


def load_images(net: SelfVAE, data: str, split: str = "test") -> Images:
    """A source's images at the model's size, where the source can be had in any."""
    dataset = sources.load(data, net.config.image_shape[1] if _resizable(data) else None)
    images: Images = getattr(dataset, split)
    return images


def load_model(folder: Path, devices: int = 1) -> SelfVAE:
    """The model in a folder, where it is to score and draw; starts as many processes as `devices`."""
    return hub.load(folder).to(distributed.launch(devices))


def _resizable(data: str) -> bool:
    """Whether the source can be had in the model's size (arrays have their own)."""
    path = Path(data)
    return not (path.suffix == ".npy" or (path / "train.npy").exists())


def positive(flag: str, n: int) -> None:
    if n < 1:
        raise ValueError(f"--{flag} must be at least 1; got {n}")


def progress(sequence: Sequence[Any], description: str) -> Iterable[Any]:
    """A progress bar, on standard error; nothing where that is no terminal."""
    console = Console(stderr=True)
    hidden = distributed.rank() > 0 or not console.is_terminal
    return track(sequence, description, console=console, transient=True, disable=hidden)


def check_free(source: Path, out: Path) -> None:
    if source.exists() and out.exists() and out.samefile(source):
        raise ValueError(f"{out} is the input itself: write to another file")


def alpha_of(picture: pictures.Picture, spec: ImageSpec) -> torch.Tensor | None:
    """The picture's alpha, unless the model itself has drawn one."""
    return None if picture.alpha is None or spec.channels in (2, 4) else picture.alpha[0, 0]


def targets(names: Sequence[str], out: Path, ending: str, keep: Collection[str] = ()) -> list[Path]:
    """A file in `out` for every name, with this ending unless the name's own is one to keep.

    Names that differ in their endings alone keep them. Raises ValueError if two would be one file.
    """
    stems = Counter(Path(name).with_suffix("") for name in names)
    found = []
    for name in names:
        target = out / name
        if target.suffix.lower() not in keep:
            on_rank_zero = stems[Path(name).with_suffix("")] == 1
            target = (
                target.with_suffix(ending) if on_rank_zero else target.with_name(f"{target.name}{ending}")
            )
        found.append(target)
    for target, times in Counter(found).items():
        if times > 1:
            raise ValueError(f"{times} pictures would become {target}: take or rename them one by one")
    return found


def each(
    source: Path,
    out: Path,
    work: Callable[[Path, Path], None],
    endings: tuple[str, ...] = pictures.ENDINGS,
    ending: str = ".png",
) -> int:
    """work(file, output file) for a file, or for every file below a folder whose ending is among `endings`.

    In a folder a broken file is passed over and reported at the end: the exit status is then 1. Outputs
    there have the given ending. Several processes share a folder's files.
    """
    if not source.exists():
        raise FileNotFoundError(f"no file or folder at {source}")
    if source.is_file():
        out = out / f"{source.stem}{ending}" if out.is_dir() else out
        check_free(source, out)
        distributed.on_rank_zero(lambda: work(source, out))
        print(f"{out}")
        return 0
    if out.exists() and not out.is_dir():
        raise ValueError(f"{source} is a folder, so OUT must be one; {out} is a file")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies in the input folder: write to another one")
    files = below(source, endings)
    if not files:
        raise ValueError(f"{source} holds no fitting files: expected some ending in {', '.join(endings)}")
    names = [str(file.relative_to(source)) for file in files]
    written = dict(zip(files, targets(names, out, ending), strict=True))
    if taken := {f.resolve() for f in files} & {f.resolve() for f in written.values()}:
        raise ValueError(f"{min(taken)} is an input and would be overwritten: write to another folder")

    def do(file: Path) -> str:
        """What went wrong."""
        try:
            work(file, written[file])
        except (ValueError, OSError) as error:
            return f"{file}: {error}"
        return ""

    failed = list(filter(None, distributed.distributed_map(do, files)))
    print(f"{len(files) - len(failed)} of {len(files)} files in {out}")
    if not distributed.rank():
        for line in failed:
            print(f"selfvae: {line}", file=sys.stderr)
    return 1 if failed else 0


def each_picture(
    source: Path, out: Path, work: Callable[[pictures.Picture, Path], None], alpha: bool = False
) -> int:
    """`each` for pictures: work(picture, output file).

    `alpha` says whether the picture's alpha is to be written, so that a file that cannot hold it is refused
    before the work.
    """

    def read(file: Path, target: Path) -> None:
        picture = pictures.read(file)
        pictures.check_ending(target, alpha and picture.alpha is not None)
        work(picture, target)

    return each(source, out, read)
