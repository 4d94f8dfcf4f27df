"""Commands that compress."""

from __future__ import annotations

import time
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from selfvae.cli.common import load_model
from selfvae.cli.files import check_exists, each_file, note_lost, pictures_in, read_picture, targets
from selfvae.cli.flags import In, Out, positive
from selfvae.cli.pool import cores, in_worker
from selfvae.cli.progress import FileProgress, note, progress

if TYPE_CHECKING:
    from torch import Tensor

    from selfvae.codec import Codec
    from selfvae.data.pictures import Picture
    from selfvae.model import SelfVAE
    from selfvae.progress import Track

PHOTOS = Path("photos-v5")  # hub.PHOTOS; the command line starts without importing torch
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

    def of(self, mark: bytes) -> Codec | None:
        """The codec for a file that carries this fingerprint; FileNotFoundError if no model has it.

        None for a file that needs no model, unless one is named.
        """
        from selfvae.codec.format3 import NO_MODEL

        if self._named:
            return self._named  # which refuses the files of other models
        if mark == NO_MODEL:
            return None
        if mark not in self._found:
            from selfvae import hub

            self._found[mark] = _codec_of(hub.load(hub.find_writer(mark)).to(self._device))
        return self._found[mark]


def _pixels(picture: Picture, file: Path, convert: bool) -> Tensor:
    """The pixels to be stored where a format holds no alpha, uint8 (1, C, H, W)."""
    if picture.alpha is not None and int(picture.alpha.min()) < 255:
        if not convert:
            raise ValueError(
                f"{file} has an alpha channel, which would be lost (--convert drops it; .png keeps it)"
            )
        note(f"{file}: alpha channel dropped")
    return picture.pixels


def _jobs(jobs: int, devices: int) -> int:
    """The number of processes for a folder on this machine's cores; 1 if GPUs do the work."""
    if jobs < 0:
        raise ValueError(f"--jobs must be 0 (one per core) or more; got {jobs}")
    if devices != 1:
        if jobs > 1:
            raise ValueError(f"--devices {devices} already starts processes: leave out --jobs {jobs}")
        return 1
    if jobs:
        return jobs
    from selfvae import distributed

    return 1 if distributed.accelerator() == "cuda" else cores()


def _progress(stages: tuple[str, ...], file: Path, pixels: int, codec: Codec) -> FileProgress:
    """A bar; none in a pool, where several files are in work at a time."""
    from selfvae.web.work import shares

    return FileProgress(stages, file.name, pixels, shares(codec.model), quiet=in_worker())


class _Compress:
    """The task of `compress`: a picture file -> the bytes of a .svae file.

    Every process loads the model for itself.
    """

    def __init__(self, model: Path, verify: bool, convert: bool, strip: bool) -> None:
        self.model, self.verify, self.convert, self.strip = model, verify, convert, strip
        self._codec: Codec | None = None

    def load(self, devices: int = 1) -> Codec:
        """Load the model once; in other processes than the first at their first file."""
        if self._codec is None:
            self._codec = _codec(self.model, devices)
        return self._codec

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_codec": None}

    def __call__(self, file: Path, target: Path) -> tuple[bytes, str]:
        if target.suffix.lower() != _ENDING:
            raise ValueError(f"{target}: a compressed picture ends in {_ENDING}; got {target.suffix!r}")
        from selfvae.data.metadata import Metadata

        picture = read_picture(file, self.convert)
        if self.strip:
            picture = picture._replace(metadata=Metadata())
        codec = self.load()  # which is not part of the time
        began, pixels = time.perf_counter(), picture.pixels[0, 0].numel()
        stages = ("compressing", "checking")[: 1 + self.verify]
        with _progress(stages, file, pixels, codec) as bar:
            data, raw = self._packed(picture, file, bar.track)
        return data, _summary(file, target, raw, len(data), time.perf_counter() - began)

    def _packed(self, picture: Picture, file: Path, track: Track) -> tuple[bytes, int]:
        """The .svae file, and the bytes of the pixels in it."""
        codec = self.load()
        if codec.format < 3:  # which holds neither alpha nor metadata
            x = _pixels(picture, file, self.convert)
            return codec.compress(x, verify=self.verify, track=track), x.numel()
        x = picture.channels()
        return codec.compress(x, metadata=picture.metadata, verify=self.verify, track=track), x.numel()


class _Decompress:
    """The task of `decompress`: a .svae file -> the bytes of a picture file.

    Every process loads models for itself.
    """

    def __init__(self, model: Path | None, upto: str, partial: bool) -> None:
        self.model, self.upto, self.partial = model, upto, partial
        self._readers: _Readers | None = None

    def load(self, devices: int = 1) -> _Readers:
        """Load the model that is named; in other processes than the first at their first file."""
        if self._readers is None:
            self._readers = _Readers(self.model, devices)
        return self._readers

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_readers": None}

    def __call__(self, file: Path, target: Path) -> tuple[bytes, str]:
        from selfvae.codec import read_header, read_metadata
        from selfvae.data import pictures
        from selfvae.transforms import ImageSpec

        pictures.check_ending(target)  # before the work
        data = file.read_bytes()
        header = read_header(data)
        codec, began = self.load().of(header.fingerprint), time.perf_counter()
        try:
            if codec is None:
                x, spec = self._stored(data), ImageSpec(header.channels, header.num_values)
            else:
                with _progress(("decompressing",), file, header.height * header.width, codec) as bar:
                    x = codec.decompress(data, self.upto, partial=self.partial, track=bar.track)
                spec = codec.model.levels[int(self.upto[1:])].spec
        except ValueError as error:
            raise ValueError(str(error).replace("partial=True", "--partial")) from None
        seconds = time.perf_counter() - began
        metadata = read_metadata(data)
        note_lost(metadata, target)
        shown = pictures.show(x[0], spec)
        size = f"{x.shape[3]} x {x.shape[2]} pixels"
        line = f"{target}: {size}, {x.numel() / 1e6 / seconds:.3g} MB/s"
        return pictures.file_of(shown, target, metadata=metadata), line

    def _stored(self, data: bytes) -> Tensor:
        """The picture in a file that needs no model."""
        from selfvae.codec import picture

        if self.upto != "y0":
            raise ValueError(
                f"the file stores its pixels as WebP, without smaller versions: --upto {self.upto} needs "
                "--model, which computes them"
            )
        return picture.decode(data, partial=self.partial)[0]


def compress(
    source: In,
    out: Out,
    model: Path = PHOTOS,
    verify: bool = True,
    convert: bool = False,
    strip: bool = False,
    skip_existing: bool = False,
    devices: int = 1,
    jobs: int = 0,
) -> int:
    """Compress a picture losslessly, or every picture in a folder.

    What is kept depends on the model. With an integer model (selfvae train --integer): pixels, alpha,
    colour profile, EXIF, XMP and the texts of PNG files. With any other model: pixels only, and pictures
    with alpha are refused. Palettes become RGB, and EXIF orientation is applied to the pixels.
    Only the model that wrote a file can read it; decompress finds it by its fingerprint. Prints for each
    file its bytes before (and those of its raw pixels) and after, the ratio of file sizes, and the speed in
    MB/s (10^6 bytes of raw pixels per second).

    Args:
        source: picture file, or a folder.
        out: file ending in .svae, or a folder for them.
        model: folder that selfvae train wrote, or a bundled model.
        verify: decode every file and compare it with the picture; takes twice as long, with an integer
            model less, since its networks need not be evaluated again.
        convert: reduce pictures with more than 8 bits per channel, with other colours than grey and RGB,
            with alpha or with several frames to 8-bit grey or RGB, instead of refusing them.
        strip: drop metadata (colour profile, EXIF, XMP, texts), which only integer models keep.
        skip_existing: leave out files of a folder whose outputs exist and are newer, e.g. to go on after an
            interruption.
        devices: number of GPUs or processes that share a folder's files.
        jobs: number of processes, each with one thread, that share a folder's files; 0 for one per core,
            or one in all if there is a GPU.
    """
    check_exists(source)
    jobs, task = _jobs(jobs, devices), _Compress(model, verify, convert, strip)
    task.load(devices)
    return each_file(source, out, task, jobs, ending=_ENDING, skip_existing=skip_existing)


def _summary(file: Path, target: Path, raw: int, after: int, seconds: float) -> str:
    """What became of a picture's bytes; a word where a JPEG file has grown."""
    before = file.stat().st_size
    if after > before and file.read_bytes()[:2] == b"\xff\xd8":
        note(
            f"{file} is a JPEG, which is lossy already: storing its exact pixels takes more; keep the JPEG"
        )
    return (
        f"{target}: {before:,} ({raw:,} raw) -> {after:,} bytes, ratio {before / after:.2f}, "
        f"{raw / 1e6 / seconds:.3g} MB/s"
    )


def decompress(
    source: In,
    out: Out,
    model: Path | None = None,
    upto: str = "y0",
    partial: bool = False,
    skip_existing: bool = False,
    devices: int = 1,
    jobs: int = 0,
) -> int:
    """Restore the picture in a compressed file, or the pictures in all files of a folder.

    Metadata in the file are written where the output format can hold them; .png holds all. Files whose
    pixels are stored as WebP need no model.

    Args:
        source: .svae file, or a folder.
        out: picture file (.png and .webp are lossless), or a folder for them.
        model: the model that compressed the files. By default it is found by its fingerprint, among the
            bundled models and those in the folder that the environment variable SELFVAE_MODELS names.
        upto: stop at this level: y1, y2, ... is the exact smaller or greyer version of the picture, from
            the first bytes of the file; y0 is the picture itself. Metadata are kept with all of them.
        partial: accept a truncated file and fill in the mean of what is missing.
        skip_existing: as for compress.
        devices: number of GPUs or processes that share a folder's files.
        jobs: as for compress.
    """
    check_exists(source)
    jobs, task = _jobs(jobs, devices), _Decompress(model, upto, partial)
    task.load(devices)
    return each_file(source, out, task, jobs, (_ENDING,), skip_existing=skip_existing)


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

    An archive holds names and pixels only, with any model: no alpha and no metadata.

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
    files = pictures_in(source)
    subpixels = 0
    for file in progress(files, "reading"):  # a picture that does not fit is found before the work begins
        subpixels += _pixels(read_picture(file, convert), file, convert).numel()
    check_exists(source)
    packer = _codec(model, devices)
    from selfvae import codec, distributed
    from selfvae.data import pictures
    from selfvae.files import write_atomic

    named = [
        (
            file.relative_to(source).as_posix(),
            lambda file=file: pictures.read(file, exact=not convert).pixels,
        )
        for file in files
    ]
    data = codec.pack(packer, named, block=block, verify=verify, track=progress)
    distributed.on_rank_zero(lambda: write_atomic(out, data))
    before = sum(f.stat().st_size for f in files)
    print(
        f"{out}: {len(named)} pictures, {before:,} -> {len(data):,} bytes, "
        f"{8 * len(data) / subpixels:.3f} bits per sub-pixel"
    )


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
    reader = readers.of(read_fingerprint(data))
    if reader is None:
        raise ValueError(f"{source} is damaged: it names no model")
    archive = Archive(reader, data)
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

    pictures = [read_exactly(file) for file in pictures_in(folder)[:limit]]
    result = bench.compare_formats(packer, pictures, prefixes=prefixes, track=progress)
    if out:
        write_atomic(out / "codec.json", (dumps(result, indent=1) + "\n").encode())
        write_atomic(out / "codec.md", bench.markdown(result).encode())
        bench.plot(result, out / "codec.png")
    print(dumps(result) if json else bench.markdown(result))
