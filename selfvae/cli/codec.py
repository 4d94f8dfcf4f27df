"""Commands that compress."""

from __future__ import annotations

from json import dumps as encode
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from selfvae import codec as coding
from selfvae import distributed
from selfvae.cli.common import In, Out, each, load_model, positive, progress, show, targets
from selfvae.codec import bench as race
from selfvae.data import pictures
from selfvae.files import below, write_atomic

PHOTOS = Path("selfvae-photos")  # the shipped model that compresses photographs
_ENDING, _ARCHIVE = ".svae", ".svaes"
_LOSSLESS = (".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def _codec(model: Path, devices: int = 1) -> coding.Codec:
    codec = coding.Codec(load_model(model, devices))
    if codec.model.spec.num_values != 256:
        raise ValueError(f"picture files have 256 levels; this model has {codec.model.spec.num_values}")
    return codec


def compress(source: In, out: Out, model: Path = PHOTOS, verify: bool = True, devices: int = 1) -> int:
    """Compress a picture without loss: every pixel comes back. For a folder: every picture in it.

    Pixels alone are kept: no palette, no camera's notes; the orientation that they ask for is applied. The
    file opens with the same model only.

    Args:
        source: picture file, or a folder.
        out: file ending in .svae, or folder for them.
        model: folder that training wrote, or a shipped model (selfvae info).
        verify: decode every file and compare, which takes twice as long.
        devices: GPUs or processes that share a folder's files.
    """
    packer = _codec(model, devices)

    def work(file: Path, target: Path) -> None:
        if target.suffix.lower() != _ENDING:
            raise ValueError(f"{target}: a compressed picture ends in {_ENDING}; got {target.suffix!r}")
        data = packer.compress(pictures.read_exactly(file), verify=verify, track=progress)
        write_atomic(target, data)

    return each(source, out, work, ending=_ENDING)


def decompress(
    source: In, out: Out, model: Path = PHOTOS, upto: str = "y0", partial: bool = False, devices: int = 1
) -> int:
    """The picture in a compressed file, or the pictures in all files of a folder.

    Args:
        source: .svae file, or a folder.
        out: picture file (.png and .webp are lossless), or folder for them.
        model: the model that compressed it.
        upto: y1, y2, ...: the smaller or greyer version of that name, exactly, from the file's first bytes.
        partial: take a file that was cut short: the best picture so far, the rest as is most likely.
        devices: GPUs or processes that share a folder's files.
    """
    packer = _codec(model, devices)

    def work(file: Path, target: Path) -> None:
        pictures.check_ending(target)
        x = packer.decompress(file.read_bytes(), upto, partial=partial, track=progress)
        spec = packer.model.levels[int(upto[1:])].spec
        pictures.write(pictures.show(x[0], spec), target)

    return each(source, out, work, (_ENDING,))


def pack(
    source: In, out: Out, model: Path = PHOTOS, block: int = 64, verify: bool = True, devices: int = 1
) -> None:
    """Compress all pictures of a folder into one archive, without loss.

    Args:
        source: folder of pictures; what lies in folders below it too.
        out: file ending in .svaes.
        model: folder that training wrote, or a shipped model (selfvae info).
        block: pictures that are decoded together: more are smaller, fewer are quicker to take one out of.
        verify: decode everything and compare, which takes twice as long.
        devices: GPUs or processes that share the blocks.
    """
    if out.suffix.lower() != _ARCHIVE:
        raise ValueError(f"{out}: an archive ends in {_ARCHIVE}; got {out.suffix!r}")
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: for one picture, use selfvae compress")
    files = below(source, pictures.ENDINGS)
    if not files:
        raise ValueError(f"{source} holds no pictures")
    named = [(file.relative_to(source).as_posix(), pictures.read_exactly(file)) for file in files]
    packer = _codec(model, devices)
    data = coding.pack(packer, named, block=block, verify=verify, track=progress)
    distributed.on_rank_zero(lambda: write_atomic(out, data))
    subpixels = sum(x.numel() for _, x in named)
    rate = 8 * len(data) / subpixels
    print(f"{len(named)} pictures in {out}: {len(data)} bytes, {rate:.3f} bits a sub-pixel")


def unpack(source: In, out: Out, model: Path = PHOTOS, only: str | None = None, devices: int = 1) -> None:
    """The pictures of an archive, as PNG files under their names (another lossless ending is kept).

    Args:
        source: .svaes file.
        out: folder.
        model: the model that packed it.
        only: the name of one picture, to take out without the rest.
        devices: GPUs or processes that share the blocks.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder")
    packer = _codec(model, devices)
    archive = coding.Archive(packer, source.read_bytes())
    names = [entry.name for entry in archive.entries]
    if only is not None and only not in names:
        raise ValueError(f"{source} holds no picture {only!r}; it holds {', '.join(names[:5])}, ...")
    files = _targets(names if only is None else [only], out)

    def write(number: int) -> int:
        found = archive.block(number) if only is None else [(only, archive[only])]
        count = 0
        for name, x in found:
            pictures.write(x[0], files[name])
            count += 1
        return count

    blocks = range(len(archive.blocks)) if only is None else range(1)
    count = sum(distributed.distributed_map(write, blocks, progress, "decompressing"))
    print(f"{count} of {len(names)} pictures in {out}")


def _targets(names: list[str], out: Path) -> dict[str, Path]:
    """Files for the pictures of an archive, all different, all inside `out`, by the pictures' names."""
    found = dict(zip(names, targets(names, out, ".png", _LOSSLESS), strict=True))
    for name, target in found.items():
        if not target.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{name!r} would leave the folder {out}: the archive is not to be trusted")
    return found


def bench(
    what: Annotated[Positional[Literal["codec"]], arg(metavar="codec")],
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")],
    model: Path = PHOTOS,
    out: Path | None = None,
    limit: int | None = None,
    prefixes: bool = True,
    json: bool = False,
) -> None:
    """Sizes and speeds beside PNG, WebP, JPEG XL and JPEG 2000; prefixes beside JPEG, WebP and AVIF.

    Args:
        what: the codec.
        folder: pictures.
        model: folder that training wrote, or a shipped model (selfvae info).
        out: folder for codec.md, codec.json and codec.png; by default nothing is written.
        limit: the first so many pictures.
        prefixes: measure how good the picture is that a prefix of the file gives.
        json: print one JSON object and nothing else.
    """
    if limit is not None:
        positive("limit", limit)
    packer = _codec(model)
    files = below(folder, pictures.ENDINGS)[:limit]
    if not files:
        raise ValueError(f"{folder} holds no pictures")
    result = race.bench(
        packer, [pictures.read_exactly(file) for file in files], prefixes=prefixes, track=progress
    )
    if out:
        write_atomic(out / "codec.json", (encode(result, indent=1) + "\n").encode())
        write_atomic(out / "codec.md", race.markdown(result).encode())
        race.plot(result, out / "codec.png")
    print(encode(result) if json else race.markdown(result))


def describe(file: Path, json: bool) -> None:
    """What a compressed file says of itself, and the bytes of its parts."""
    data = file.read_bytes()
    if file.suffix.lower() == _ARCHIVE:
        raise ValueError(f"{file} is an archive: selfvae unpack takes the pictures out")
    header = coding.read_header(data)
    result: dict[str, Any] = {
        "bytes": len(data),
        "height": header.height,
        "width": header.width,
        "channels": header.channels,
        "levels": header.num_values,
        "bits_per_subpixel": 8 * len(data) / (header.height * header.width * header.channels),
        "model": header.fingerprint.hex(),
        "header_bytes": header.size,
        **{f"{part.name}_bytes": part.size for part in header.parts},
    }
    missing = header.size + sum(part.size for part in header.parts) - len(data)
    if missing:
        result["missing_bytes" if missing > 0 else "extra_bytes"] = abs(missing)
    show(result, json)
