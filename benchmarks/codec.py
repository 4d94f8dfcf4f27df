"""Sizes and times of compressed photographs, beside JPEG XL and WebP in the same run.

    python -m benchmarks.codec FOLDER [--models photos-v5 PATH ...] [--threads 1 2] [--repeats 3]
                               [--limit N] [--others NAME ...] [--out results/codec]

For every picture, number of threads, and model or format:
    bytes       of the file, and bits per sub-pixel
    compress    seconds without the check
    checked     seconds of compressing with the check, which decodes the file (models only)
    decompress  seconds
Seconds are given as wall time and as CPU time (user and system, of all threads). Each is the median of the
repeats; models and formats take turns within a repeat, and everything runs once before (on a small
picture), so that nothing is compiled during the measurement. Every file is decoded and compared.

Of integer models also the parts, each with one thread: the networks (seconds, GFLOP, GFLOP/s; a
multiplication and an addition are two FLOP) and the coder of mixtures (MB/s, 10^6 sub-pixels per second,
encoding and decoding, without corrections), and the bytes of all streams without corrections.

JPEG XL has effort 7 (pillow-jxl-plugin) and as many threads; WebP is lossless, quality 100, method 6, and
uses one thread. Prints a table in Markdown, and writes OUT/codec.json, which has all figures, and
OUT/codec.md. Run it on an idle machine: wall times beside other work mean little. Models that are not
integer models, such as results/models/photos-v0, take about a minute of CPU time per Kodak photograph.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import selfvae
from selfvae.codec import Codec, chains, exact, read_header, symbols
from selfvae.codec.format3 import NO_MODEL
from selfvae.data.pictures import ENDINGS, LOSSLESS, encode, encode_lossless, from_image, read, to_image
from selfvae.files import below, write_atomic
from selfvae.hub import PHOTOS

__all__ = ["measure", "parts", "table"]

Task = Callable[[], object]
_OTHERS = ("JPEG XL", "WebP")


class _Format:
    """A format of `LOSSLESS`, with the methods of a codec that are measured."""

    def __init__(self, name: str) -> None:
        self.name = name

    def compress(self, x: Tensor, **_: object) -> bytes:
        image = to_image(x[0])
        if self.name == "JPEG XL":
            kind, options = LOSSLESS[self.name]
            return encode(image, kind, **options, num_threads=torch.get_num_threads())
        return encode_lossless(image, self.name)

    def decompress(self, data: bytes) -> Tensor:
        if self.name == "JPEG XL":
            from pillow_jxl import JpegXLImagePlugin

            JpegXLImagePlugin.DECODE_THREADS = torch.get_num_threads()
        return from_image(Image.open(io.BytesIO(data)))


def _flops(x: Sequence[int], *args: Any, out_shape: Sequence[int], **_: Any) -> int:
    """Return the operations of a convolution of bytes, given shapes of x, the kernel and the result."""
    return 2 * math.prod(args[2]) * out_shape[0] * math.prod(out_shape[2:])


def _seconds(task: Task) -> tuple[float, float]:
    """Return wall and CPU seconds of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    task()
    return time.perf_counter() - wall, time.process_time() - cpu


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tasks(codec: Any, x: Tensor, data: bytes) -> dict[str, Task]:
    def decompress() -> None:
        if not torch.equal(codec.decompress(data), x):
            raise RuntimeError("a decoded picture differs from the original")

    tasks: dict[str, Task] = {"compress": lambda: codec.compress(x, verify=False), "decompress": decompress}
    if not isinstance(codec, _Format):
        tasks["checked"] = lambda: codec.compress(x)
    return tasks


def measure(
    codecs: dict[str, Any], pictures: dict[str, Tensor], threads: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Measure sizes and times.

    Args:
        codecs: By name.
        pictures: uint8 (1, C, H, W), C = 1 or 3, by name.
        threads: Numbers of threads to measure with.
        repeats: Of which medians are taken.

    Returns:
        A row per picture, number of threads and codec: {"picture", "threads", "codec", "subpixels",
        "bytes", "compress": {"wall", "cpu"}, "decompress": ..., "checked": ... (models only)}, in seconds;
        "stored": True if a model's file stores the pixels as WebP.

    Raises:
        RuntimeError: A decoded picture differs from the original.
    """
    rows = []
    for codec in codecs.values():  # compile
        small = next(iter(pictures.values()))[:, :, :96, :96].contiguous()
        codec.decompress(codec.compress(small))
    for picture, x in pictures.items():
        files = {name: codec.compress(x, verify=False) for name, codec in codecs.items()}
        for n in threads:
            found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in codecs}
            with _threads(n):
                for _ in range(repeats):
                    for name, codec in codecs.items():
                        for what, task in _tasks(codec, x, files[name]).items():
                            found[name].setdefault(what, []).append(_seconds(task))
            for name, tasks in found.items():
                times = {}
                for what, measured in tasks.items():
                    wall, cpu = (statistics.median(kind) for kind in zip(*measured, strict=True))
                    times[what] = {"wall": wall, "cpu": cpu}
                size = {"subpixels": x.numel(), "bytes": len(files[name])}
                if not isinstance(codecs[name], _Format):
                    size["stored"] = read_header(files[name]).fingerprint == NO_MODEL
                rows.append({"picture": picture, "threads": n, "codec": name, **size, **times})
        print(f"{picture}: {', '.join(f'{k} {len(v):,} bytes' for k, v in files.items())}", flush=True)
    return rows


class _Watch:
    """Wall seconds that functions take, by their names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.flops = 0
        self._before: list[tuple[Any, str, Any]] = []

    def add(self, owner: Any, method: str, name: str, *, count: bool = False) -> None:
        """Replace a method by one that adds its seconds to `name`; count: its FLOP too."""
        plain = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            out = plain(*args, **options)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            return out

        def counted(*args: Any, **options: Any) -> Any:
            convolution = torch.ops.onednn.qconv2d_pointwise  # of bytes, which torch does not count
            with FlopCounterMode(display=False, custom_mapping={convolution: _flops}) as counter:
                out = plain(*args, **options)
            self.flops += counter.get_total_flops()
            return out

        self._before.append((owner, method, plain))
        setattr(owner, method, counted if count else timed)

    def end(self) -> None:
        """Undo the replacements."""
        for owner, method, plain in reversed(self._before):
            setattr(owner, method, plain)


@contextmanager
def _watched() -> Iterator[_Watch]:
    watch = _Watch()
    try:
        yield watch
    finally:
        watch.end()


def parts(codec: Codec, pictures: dict[str, Tensor], repeats: int) -> dict[str, float]:
    """Measure the networks and the coder of an integer model on one core, while pictures are coded.

    Returns:
        {"network_s", "network_gflop", "network_gflop_s", "encode_s", "encode_mb_s", "decode_s",
        "decode_mb_s", "plain_bytes"}: sums over the pictures of the medians of the repeats; MB/s are of all
        sub-pixels. `plain_bytes` is the size without corrections.
    """
    assert codec.chain is not None
    chain, total = codec.chain, dict.fromkeys(("network", "encode", "decode"), 0.0)
    flops = subpixels = plain = 0
    with _threads(1):
        for x in pictures.values():
            wide = x.expand(-1, codec.model.spec.channels, -1, -1)
            size = x.shape[2], x.shape[3]
            subpixels += x.numel()
            with _watched() as watch:
                watch.add(exact.ExactNetwork, "__call__", "network", count=True)
                chain.encode(wide, verify=False)
                flops += watch.flops
            found: dict[str, list[float]] = {name: [] for name in total}
            for _ in range(repeats):
                with _watched() as watch:
                    watch.add(exact.ExactNetwork, "__call__", "network")
                    for method in ("code", "finish"):
                        watch.add(symbols.SlotEncoder, method, "encode")
                        watch.add(symbols.SlotDecoder, method, "decode")
                    watch.add(chains.Mixture, "__init__", "mixture")  # both ways alike
                    streams = chain.encode(wide, verify=False)
                    half = watch.seconds["mixture"]
                    chain.decode([data for _, data in streams], size)
                found["network"].append(watch.seconds["network"] / 2)
                found["encode"].append(watch.seconds["encode"] + half)
                found["decode"].append(watch.seconds["decode"] + watch.seconds["mixture"] - half)
            for name, times in found.items():
                total[name] += statistics.median(times)
            plain += sum(len(data) for _, data in streams)
    megabytes, gigaflops = subpixels / 1e6, flops / 1e9
    return {
        "network_s": total["network"],
        "network_gflop": gigaflops,
        "network_gflop_s": gigaflops / total["network"],
        "encode_s": total["encode"],
        "encode_mb_s": megabytes / total["encode"],
        "decode_s": total["decode"],
        "decode_mb_s": megabytes / total["decode"],
        "plain_bytes": plain,
    }


def table(result: dict[str, Any]) -> str:
    """Return sums over all pictures as tables in Markdown."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["threads"], row["codec"]), []).append(row)
    whats = ("compress", "checked", "decompress")
    lines = [
        f"{result['pictures']} pictures, {result['subpixels']:,} sub-pixels; medians of "
        f"{result['repeats']} repeats per picture, summed; seconds, and MB/s, of wall time / CPU time",
        "",
        "| threads | | bytes | bits per sub-pixel | compress, s | with check, s | decompress, s | "
        "compress, MB/s | decompress, MB/s |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (threads, name), rows in sorted(groups.items(), key=lambda item: item[0][0]):
        size, n = sum(row["bytes"] for row in rows), sum(row["subpixels"] for row in rows)
        sums = {
            what: [sum(row[what][kind] for row in rows) for kind in ("wall", "cpu")]
            for what in whats
            if what in rows[0]
        }
        cells = [f"{sums[what][0]:.2f} / {sums[what][1]:.2f}" if what in sums else "" for what in whats]
        speeds = [
            " / ".join(f"{n / 1e6 / seconds:.3g}" for seconds in sums[what])
            for what in ("compress", "decompress")
        ]
        head = [str(threads), name, f"{size:,}", f"{8 * size / n:.3f}"]
        lines.append(f"| {' | '.join([*head, *cells, *speeds])} |")
    if stored := [f"{row['codec']} of {row['picture']}" for row in result["rows"] if row.get("stored")]:
        names = ", ".join(dict.fromkeys(stored))
        lines += ["", f"These files store the pixels as WebP, which was smaller: {names}."]
    if result["parts"]:
        lines += [
            "",
            "| one core | networks, s | GFLOP | GFLOP/s | mixtures: encoding, s | MB/s | decoding, s | "
            "MB/s | bytes without corrections |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
    for name, own in result["parts"].items():
        *times, size = own.values()
        lines.append(f"| {name} | {' | '.join(f'{value:.3g}' for value in times)} | {size:,} |")
    return "\n".join(lines) + "\n"


def _machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "selfvae": selfvae.__version__,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.codec", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="pictures; sub-folders are included")
    parser.add_argument("--models", nargs="+", default=[PHOTOS], help="bundled models or folders")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--limit", type=int, help="number of pictures, the first by name; default: all")
    parser.add_argument(
        "--others", nargs="*", default=_OTHERS, choices=list(LOSSLESS), help="formats beside the models"
    )
    parser.add_argument("--out", type=Path, help="folder for codec.json and codec.md")
    flags = parser.parse_args(words)
    files = below(flags.folder, ENDINGS)[: flags.limit]
    if not files or min(flags.repeats, *flags.threads) < 1:
        parser.error(f"{flags.folder} holds no pictures, or --threads, --repeats or --limit is below 1")
    pictures = {file.stem: read(file, exact=True).pixels for file in files}
    codecs: dict[str, Any] = {Path(name).name: Codec(selfvae.load(name)) for name in flags.models}
    exactly = {name: codec for name, codec in codecs.items() if codec.chain is not None}
    if flags.others:
        import pillow_jxl  # noqa: F401 (registers JPEG XL)

        codecs |= {name: _Format(name) for name in flags.others}
    result: dict[str, Any] = {
        "machine": _machine(),
        "pictures": len(pictures),
        "subpixels": sum(x.numel() for x in pictures.values()),
        "repeats": flags.repeats,
        "rows": measure(codecs, pictures, flags.threads, flags.repeats),
        "parts": {name: parts(codec, pictures, flags.repeats) for name, codec in exactly.items()},
    }
    print("\n" + table(result))
    if flags.out:
        write_atomic(flags.out / "codec.json", (json.dumps(result, indent=1) + "\n").encode())
        write_atomic(flags.out / "codec.md", table(result).encode())


if __name__ == "__main__":
    main()
