"""Commands that compress."""

from __future__ import annotations

import time
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from selfvae.cli.common import load_model
from selfvae.cli.files import check_exists, each, read_picture, targets
from selfvae.cli.flags import In, Out, positive
from selfvae.cli.progress import FileProgress, note, progress

if TYPE_CHECKING:
    from torch import Tensor

    from selfvae.codec import Codec
    from selfvae.model import SelfVAE

PHOTOS = Path("photos-v0")  # the bundled model that compresses photographs
_ENDING, _ARCHIVE = ".svae", ".svaes"
_LOSSLESS = (".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def _codec(model: Path, devices: int = 1) -> Codec:
    return _codec_of(load_model(model, devices))


def _codec_of(net: SelfVAE) -> Codec:
    from selfvae.codec import Codec

    if net.spec.num_values != 256:
        raise ValueError(f"picture files have 256 values per channel; this model has {net.spec.num_values}")
    return Codec(net)


class _Readers:
    """Codecs of the models that files need: of the one that is named, or found by their fingerprints.

    Args:
        model: folder or bundled model; None: find it.
        devices: number of GPUs or processes to start.
    """

    def __init__(self, model: Path | None, devices: int) -> None:
        from selfvae import distributed

        self._named = None if model is None else _codec(model, devices)
        self._found: dict[bytes, Codec] = {}
        if model is None:
            self._device = distributed.launch(devices)

    def of(self, mark: bytes) -> Codec:
        """The codec for a file that carries this fingerprint; FileNotFoundError if no model has it."""
        if self._named:
            return self._named  # which refuses the files of other models
        if mark not in self._found:
            from selfvae import hub

            self._found[mark] = _codec_of(hub.load(hub.find_writer(mark)).to(self._device))
        return self._found[mark]


def _pixels(file: Path, convert: bool) -> Tensor:
    """The pixels to be stored, uint8 (1, C, H, W)."""
    picture = read_picture(file, convert)
    if picture.alpha is not None and int(picture.alpha.min()) < 255:
        if not convert:
            raise ValueError(
                f"{file} has an alpha channel, which would be lost (--convert drops it; .png keeps it)"
            )
        note(f"{file}: alpha channel dropped")
    return picture.pixels


def compress(
    source: In, out: Out, model: Path = PHOTOS, verify: bool = True, convert: bool = False, devices: int = 1
) -> int:
    """Compress a picture losslessly, or every picture in a folder.

    Only pixels are stored: palettes, EXIF data and colour profiles are not. EXIF orientation is applied.
    Only the model that wrote a file can read it; decompress finds it by its fingerprint.
    Prints for each file its bytes before and after, their ratio, and the speed in MB/s (10^6 bytes of raw
    pixels per second).

    Args:
        source: picture file, or a folder.
        out: file ending in .svae, or a folder for them.
        model: folder that selfvae train wrote, or a bundled model.
        verify: decode every file and compare it with the picture; takes twice as long.
        convert: reduce pictures with more than 8 bits per channel, with other colours than grey and RGB,
            with alpha or with several frames to 8-bit grey or RGB, instead of refusing them.
        devices: number of GPUs or processes that share a folder's files.
    """
    check_exists(source)
    packer = _codec(model, devices)
    from selfvae.files import write_atomic
    from selfvae.web.work import shares

    stages, parts = ("compressing", "checking")[: 1 + verify], shares(packer.model)

    def work(file: Path, target: Path) -> str:
        if target.suffix.lower() != _ENDING:
            raise ValueError(f"{target}: a compressed picture ends in {_ENDING}; got {target.suffix!r}")
        x, began = _pixels(file, convert), time.perf_counter()
        with FileProgress(stages, file.name, x[0, 0].numel(), parts) as bar:
            data = packer.compress(x, verify=verify, track=bar.track)
        seconds = time.perf_counter() - began
        write_atomic(target, data)
        return _summary(file, target, x.numel(), seconds)

    return each(source, out, work, ending=_ENDING)


def _summary(file: Path, target: Path, raw: int, seconds: float) -> str:
    """What became of a picture's bytes; a word where a JPEG file has grown."""
    before, after = file.stat().st_size, target.stat().st_size
    if after > before and file.read_bytes()[:2] == b"\xff\xd8":
        note(
            f"{file} is a JPEG, which is lossy already: storing its exact pixels takes more; keep the JPEG"
        )
    return (
        f"{target}: {before:,} -> {after:,} bytes, ratio {before / after:.2f}, "
        f"{raw / 1e6 / seconds:.3g} MB/s"
    )


def decompress(
    source: In,
    out: Out,
    model: Path | None = None,
    upto: str = "y0",
    partial: bool = False,
    devices: int = 1,
) -> int:
    """Restore the picture in a compressed file, or the pictures in all files of a folder.

    Args:
        source: .svae file, or a folder.
        out: picture file (.png and .webp are lossless), or a folder for them.
        model: the model that compressed the files. By default it is found by its fingerprint, among the
            bundled models and those in the folder that the environment variable SELFVAE_MODELS names.
        upto: stop at this level: y1, y2, ... is the exact smaller or greyer version of the picture, from
            the first bytes of the file; y0 is the picture itself.
        partial: accept a truncated file and fill in what is missing with the most likely values.
        devices: number of GPUs or processes that share a folder's files.
    """
    check_exists(source)
    readers = _Readers(model, devices)
    from selfvae.codec import read_header
    from selfvae.data import pictures
    from selfvae.web.work import shares

    def work(file: Path, target: Path) -> str:
        pictures.check_ending(target)
        data, began = file.read_bytes(), time.perf_counter()
        header = read_header(data)
        packer = readers.of(header.fingerprint)
        size, parts = header.height * header.width, shares(packer.model)
        with FileProgress(("decompressing",), file.name, size, parts) as bar:
            try:
                x = packer.decompress(data, upto, partial=partial, track=bar.track)
            except ValueError as error:
                raise ValueError(str(error).replace("partial=True", "--partial")) from None
        seconds = time.perf_counter() - began
        pictures.write(pictures.show(x[0], packer.model.levels[int(upto[1:])].spec), target)
        return f"{target}: {x.shape[3]} x {x.shape[2]} pixels, {x.numel() / 1e6 / seconds:.3g} MB/s"

    return each(source, out, work, (_ENDING,))


def pack(
    source: In,
    out: Out,
    model: Path = PHOTOS,
    block: int = 64,
    verify: bool = True,
    convert: bool = False,
    devices: int = 1,
) -> None:
    """Compress all pictures of a folder losslessly into one archive.

    Args:
        source: folder of pictures; its sub-folders are included.
        out: file ending in .svaes.
        model: folder that selfvae train wrote, or a bundled model.
        block: pictures that are decoded together; larger blocks make smaller files, smaller blocks make
            single pictures faster to extract.
        verify: decode everything and compare; takes twice as long.
        convert: as for compress.
        devices: number of GPUs or processes that share the blocks.
    """
    if out.suffix.lower() != _ARCHIVE:
        raise ValueError(f"{out}: an archive ends in {_ARCHIVE}; got {out.suffix!r}")
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: for one picture, use selfvae compress")
    files = _pictures_in(source)
    named = [(file.relative_to(source).as_posix(), _pixels(file, convert)) for file in files]
    check_exists(source)
    packer = _codec(model, devices)
    from selfvae import codec, distributed
    from selfvae.files import write_atomic

    data = codec.pack(packer, named, block=block, verify=verify, track=progress)
    distributed.on_rank_zero(lambda: write_atomic(out, data))
    before, subpixels = sum(f.stat().st_size for f in files), sum(x.numel() for _, x in named)
    print(
        f"{out}: {len(named)} pictures, {before:,} -> {len(data):,} bytes, "
        f"{8 * len(data) / subpixels:.3f} bits per sub-pixel"
    )


def _pictures_in(folder: Path) -> list[Path]:
    from selfvae.data.pictures import ENDINGS
    from selfvae.files import below

    files = below(folder, ENDINGS)
    if not files:
        raise ValueError(f"{folder} holds no pictures")
    return files


def unpack(
    source: In, out: Out, model: Path | None = None, only: str | None = None, devices: int = 1
) -> None:
    """Extract the pictures of an archive as PNG files, or in the lossless format that their names end in.

    Args:
        source: .svaes file.
        out: folder for the pictures.
        model: the model that packed the archive. By default it is found by its fingerprint, among the
            bundled models and those in the folder that the environment variable SELFVAE_MODELS names.
        only: name of a single picture to extract; by default all are.
        devices: number of GPUs or processes that share the blocks.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder")
    check_exists(source)
    readers = _Readers(model, devices)
    from selfvae import distributed
    from selfvae.codec.archive import Archive, read_fingerprint
    from selfvae.data import pictures

    data = source.read_bytes()
    archive = Archive(readers.of(read_fingerprint(data)), data)
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
    count = sum(distributed.distributed_map(write, blocks, progress, "decompressing blocks"))
    print(f"{count} of {len(names)} pictures in {out}")


def _targets(names: list[str], out: Path) -> dict[str, Path]:
    """Files for the pictures of an archive, all different, all inside `out`, by the pictures' names."""
    found = dict(zip(names, targets(names, out, ".png", _LOSSLESS), strict=True))
    for name, target in found.items():
        if not target.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{name!r} would be written outside {out}: do not trust this archive")
    return found


def bench_codec(
    folder: Annotated[Positional[Path], arg(metavar="FOLDER")],
    model: Path = PHOTOS,
    out: Path | None = None,
    limit: int | None = None,
    prefixes: bool = True,
    json: bool = False,
) -> None:
    """Compare sizes and speeds with PNG, WebP, JPEG XL and JPEG 2000; previews with JPEG, WebP and AVIF.

    Args:
        folder: pictures; sub-folders are included.
        model: folder that selfvae train wrote, or a bundled model.
        out: folder for codec.md, codec.json and codec.png; by default nothing is written.
        limit: number of pictures, the first by name; by default all.
        prefixes: also measure the quality of the pictures that the first bytes of each file give.
        json: print one JSON object only.
    """
    if limit is not None:
        positive("limit", limit)
    packer = _codec(model)
    from selfvae.codec import bench
    from selfvae.data.pictures import read_exactly
    from selfvae.files import write_atomic

    pictures = [read_exactly(file) for file in _pictures_in(folder)[:limit]]
    result = bench.bench(packer, pictures, prefixes=prefixes, track=progress)
    if out:
        write_atomic(out / "codec.json", (dumps(result, indent=1) + "\n").encode())
        write_atomic(out / "codec.md", bench.markdown(result).encode())
        bench.plot(result, out / "codec.png")
    print(dumps(result) if json else bench.markdown(result))
