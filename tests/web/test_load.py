"""The page under load: a server of its own, several visitors, and a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import selfvae
from selfvae.codec import Codec
from selfvae.data import pictures

pytest.importorskip("gradio", reason="the page needs gradio")
gradio_client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.slow

MODEL = "photos-v2"


@contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server whose temporary files lie in a folder: its process and address."""
    with subprocess.Popen(
        [sys.executable, "-m", "selfvae.cli", "serve", MODEL, "--no-browser"],
        env={**os.environ, "TMPDIR": str(folder)}, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            yield process, process.stdout.readline().split()[0]
        finally:
            process.kill()


def resident(process: subprocess.Popen[str]) -> int:
    """The memory that a process uses, bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def submit(page: Any, file: Path) -> Any:
    return page.submit(gradio_client.handle_file(file), api_name="/compress")


def packed(job: Any) -> bytes:
    """The file that a job has made."""
    file = job.result(timeout=300)[3]
    return Path(file if isinstance(file, str) else file["value"]).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_ten_visitors(tmp_path: Path) -> None:
    """Everybody gets their own picture back, whoever else stops or leaves; memory and files return."""
    rng, codec, files = np.random.default_rng(0), Codec(selfvae.load(MODEL)), list[Path]()
    (tmp_path / "tmp").mkdir()
    for i in range(12):
        files.append(tmp_path / f"{i}.png")
        smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((120 + i, 160 - i))
        smooth.save(files[-1])
    with server(tmp_path / "tmp") as (process, address):
        first, second, stopping, leaving = (gradio_client.Client(address, verbose=False) for _ in range(4))
        packed(submit(first, files[0]))  # networks are made ready
        before = resident(process)
        visitors = [first, second] * 4 + [stopping, leaving, first, second]
        jobs = [submit(page, file) for page, file in zip(visitors, files, strict=True)]
        jobs[8].cancel()
        leaving.close()
        for i in (*range(8), 10, 11):
            assert (codec.decompress(packed(jobs[i])) == pictures.read(files[i]).pixels).all()
        assert resident(process) - before < 200 * 2**20
        process.send_signal(signal.SIGKILL)
        process.wait()
    (left,) = (tmp_path / "tmp").glob("selfvae-*")
    os.utime(left, (0, 0))
    with server(tmp_path / "tmp") as (process, address):
        again = gradio_client.Client(address, verbose=False)
        assert not left.exists()
        packed(submit(again, files[0]))
        process.terminate()
        assert process.wait(30) == 0
    assert not [file for file in (tmp_path / "tmp").rglob("*") if file.is_file()]
