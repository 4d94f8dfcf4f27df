"""An archive of many small pictures: seconds and memory of packing it, and of taking one picture out.

    python -m benchmarks.archive --pictures 100000 --out results/archive.json

The pictures are made: random colours on a coarse grid, interpolated, with noise. Every command is a process
of its own with one thread; its processor time includes the program's start.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from selfvae.files import write_atomic
from selfvae.hub import PHOTOS

_FOLDER = 1000  # pictures in a folder


def make(folder: Path, n: int, size: int) -> None:
    """Write n pictures, as PNG files."""
    rng = np.random.default_rng(0)
    for i in range(n):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + rng.normal(0, 4, (size, size, 3))
        file = folder / f"{i // _FOLDER:03}" / f"{i:06}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, compress_level=1)


def command(*words: object) -> dict[str, float]:
    """Run a command of selfvae: its processor seconds, and its peak memory in MiB."""
    process = subprocess.Popen(
        [sys.executable, "-m", "selfvae.cli", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"selfvae {words[0]} failed")
    return {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1), "peak_mib": usage.ru_maxrss >> 10}


def main(
    pictures: int = 100_000,
    size: int = 32,
    model: str = PHOTOS,
    out: Path = Path("results/archive.json"),
) -> None:
    """Measure.

    Args:
        pictures: their number.
        size: their height and width, in pixels.
        model: to pack with.
        out: file for the result.
    """
    result: dict[str, Any] = {"pictures": pictures, "size": size, "model": model}
    with tempfile.TemporaryDirectory() as work:
        folder, archive = Path(work) / "in", Path(work) / "all.svaes"
        folder.mkdir()
        make(folder, pictures, size)
        last = f"{(pictures - 1) // _FOLDER:03}/{pictures - 1:06}.png"
        result["pack"] = command("pack", folder, archive, "--model", model, "--no-verify")
        result["one"] = command("unpack", archive, Path(work) / "one", "--only", last)
        same = np.array_equal(*(np.asarray(Image.open(Path(work) / part / last)) for part in ("in", "one")))
        with archive.open("rb") as file:
            (index,) = struct.unpack("<I", file.read(17)[13:])
        result |= {"same": same, "bytes": archive.stat().st_size, "index_bytes": index}
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result))


if __name__ == "__main__":
    tyro.cli(main)
