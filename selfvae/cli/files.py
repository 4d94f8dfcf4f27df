"""Commands over a file or a folder of files: where results go, and what becomes of broken files."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from selfvae.cli.pool import Task, describe, run

if TYPE_CHECKING:
    from torch import Tensor

    from selfvae.data.metadata import Metadata
    from selfvae.data.pictures import Picture
    from selfvae.transforms import ImageSpec

__all__ = [
    "alpha_of",
    "check_free",
    "each",
    "each_file",
    "each_picture",
    "note_lost",
    "read_picture",
    "targets",
    "write_like",
]


def check_free(source: Path, out: Path) -> None:
    """Raise ValueError if the output is the input itself."""
    if source.exists() and out.exists() and out.samefile(source):
        raise ValueError(f"{out} is the input itself: write to another file")


def read_picture(file: Path, convert: bool) -> Picture:
    """The picture in a file, its alpha channel apart.

    Refused are pictures that would lose something: other than 8 bits per channel, colours other than grey
    and RGB, several pictures in a file. `convert` takes them all the same, and says so.
    """
    from selfvae.cli.progress import note
    from selfvae.data import pictures

    try:
        return pictures.read(file, exact=True)
    except ValueError as error:
        picture = pictures.read(file)  # unless that fails as well, it can be converted
        grey = picture.pixels.shape[1] == 1
        if not convert:
            raise ValueError(f"{error} (--convert does so: 8 bits, {'grey' if grey else 'RGB'})") from None
        note(f"{file}: converted to 8-bit {'grey' if grey else 'RGB'}")
        return picture


def alpha_of(picture: Picture, spec: ImageSpec) -> Tensor | None:
    """The picture's alpha channel, unless the model itself has drawn one."""
    return None if picture.alpha is None or spec.channels in (2, 4) else picture.alpha[0, 0]


def write_like(picture: Picture, x: Tensor, target: Path, spec: ImageSpec) -> None:
    """Write x, (C, H, W), with the alpha and the metadata of the picture that it was made of."""
    from selfvae.data import pictures

    metadata = picture.metadata
    if (x.shape[0] < 3) != (picture.pixels.shape[1] < 3):  # the profile is for grey or for colours
        metadata = replace(metadata, icc=b"")
    note_lost(metadata, target)
    pictures.write(x, target, alpha_of(picture, spec), metadata)


def note_lost(metadata: Metadata, target: Path) -> None:
    """Say which metadata a file cannot hold."""
    from selfvae.cli.progress import note
    from selfvae.data import pictures

    kind = pictures.check_ending(target)
    if lost := metadata.lost(kind):
        note(f"{target}: {kind} files do not hold {', '.join(lost)} of this picture; .png does")


def targets(names: Sequence[str], out: Path, ending: str, keep: Collection[str] = ()) -> list[Path]:
    """A file in `out` for every name, with this ending unless the name's own is one to keep.

    Names that differ only in their endings keep them. Raises ValueError if two would be one file.
    """
    stems = Counter(Path(name).with_suffix("") for name in names)
    found = []
    for name in names:
        target = out / name
        if target.suffix.lower() not in keep:
            single = stems[Path(name).with_suffix("")] == 1
            target = target.with_suffix(ending) if single else target.with_name(f"{target.name}{ending}")
        found.append(target)
    for target, times in Counter(found).items():
        if times > 1:
            raise ValueError(f"{times} pictures would become {target}: process or rename them one by one")
    return found


def check_exists(source: Path) -> None:
    """Raise FileNotFoundError for an input that is not there."""
    if not source.exists():
        raise FileNotFoundError(f"no file or folder at {source}")


def each(
    source: Path,
    out: Path,
    work: Callable[[Path, Path], str],
    endings: Collection[str] | None = None,
    ending: str = ".png",
    pooled: Callable[[Mapping[Path, Path]], Iterator[tuple[str, str]]] | None = None,
    skip_existing: bool = False,
) -> int:
    """work(file, output file) for a file, or for every file below a folder; returns the exit status.

    `work` returns a line about its result, which is printed. In a folder, files whose ending is among
    `endings` (by default, pictures) are taken, outputs have the given `ending`, and a broken file is
    skipped and reported at the end: the exit status is then 1. Several processes share a folder's files.
    `pooled` does several files instead of `work`, as `pool.run`. `skip_existing` leaves out the files of a
    folder whose outputs exist and are newer: these are complete, since files are written whole.
    """
    from selfvae import distributed
    from selfvae.data import pictures

    check_exists(source)
    if source.is_file():
        out = out / f"{source.stem}{ending}" if out.is_dir() else out
        check_free(source, out)
        print(distributed.on_rank_zero(lambda: work(source, out)))
        return 0
    written = _written(source, out, pictures.ENDINGS if endings is None else endings, ending)
    if skip_existing:
        every, pairs = len(written), list(written.items())
        # one process decides, since others may be writing already
        written = distributed.on_rank_zero(lambda: {f: out for f, out in pairs if not _is_newer(out, f)})
        if len(written) < every:
            distributed.on_rank_zero(
                lambda: print(f"{every - len(written)} of {every} files are done already")
            )
        if not written:
            return 0

    def do(file: Path) -> tuple[str, str]:
        """A line about the result, or what went wrong."""
        try:
            line = work(file, written[file])
        except (ValueError, OSError) as error:
            return "", describe(file, error)
        if distributed.world_size() == 1:
            print(line, flush=True)
        return line, ""

    if pooled and len(written) > 1 and distributed.world_size() == 1:
        done = []
        for line, error in pooled(written):
            done.append((line, error))
            if line:
                print(line, flush=True)
    else:
        done = distributed.distributed_map(do, list(written))
    failed = [error for _, error in done if error]
    if distributed.world_size() > 1:
        print("\n".join(line for line, _ in done if line))
    print(f"{len(done) - len(failed)} of {len(done)} files in {out}")
    if not distributed.rank():
        for error in failed:
            print(f"selfvae: {error}", file=sys.stderr)
    return 1 if failed else 0


def _is_newer(target: Path, file: Path) -> bool:
    return target.exists() and target.stat().st_mtime >= file.stat().st_mtime


def each_file(
    source: Path,
    out: Path,
    task: Task,
    jobs: int,
    endings: Collection[str] | None = None,
    ending: str = ".png",
    skip_existing: bool = False,
) -> int:
    """`each` for a task that returns a file's bytes and a line; `jobs` processes share a folder."""
    from selfvae.files import write_atomic

    def work(file: Path, target: Path) -> str:
        data, line = task(file, target)
        write_atomic(target, data)
        return line

    def pooled(files: Mapping[Path, Path]) -> Iterator[tuple[str, str]]:
        return run(task, files, min(jobs, len(files)))

    return each(source, out, work, endings, ending, pooled if jobs > 1 else None, skip_existing)


def _written(source: Path, out: Path, endings: Collection[str], ending: str) -> dict[Path, Path]:
    """The files in a folder, each with the file that it becomes; ValueError if that cannot be."""
    from selfvae.files import below

    if out.exists() and not out.is_dir():
        raise ValueError(f"{source} is a folder, so OUT must be one too; {out} is a file")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{out} lies in the input folder: write to another one")
    files = below(source, endings)
    if not files:
        raise ValueError(f"no files in {source} end in {', '.join(endings)}")
    names = [str(file.relative_to(source)) for file in files]
    written = dict(zip(files, targets(names, out, ending), strict=True))
    if taken := {f.resolve() for f in files} & {f.resolve() for f in written.values()}:
        raise ValueError(f"{min(taken)} is an input and would be overwritten: write to another folder")
    return written


def pictures_in(folder: Path) -> list[Path]:
    """Return all pictures in a folder, sorted; raise ValueError if there are none."""
    from selfvae.data.pictures import ENDINGS
    from selfvae.files import below

    files = below(folder, ENDINGS)
    if not files:
        raise ValueError(f"{folder} holds no pictures")
    return files


def each_picture(
    source: Path,
    out: Path,
    work: Callable[[Picture, Path, Path], None],
    alpha: bool,
    convert: bool,
    skip_existing: bool = False,
) -> int:
    """`each` for pictures: work(picture, file, output file).

    `alpha` says whether the picture's alpha channel is to be written, so that an output format that has
    none is refused before the work.
    """
    from selfvae.data import pictures

    def read(file: Path, target: Path) -> str:
        picture = read_picture(file, convert)
        pictures.check_ending(target, alpha and picture.alpha is not None)
        work(picture, file, target)
        return f"{target}"

    return each(source, out, read, skip_existing=skip_existing)
