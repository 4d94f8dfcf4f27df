"""Bad days: full disks, folders that cannot be written, files that vanish, too little memory."""

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfvae.cli import main
from selfvae.data import pictures
from selfvae.training.guard import Guard

TINY = [
    "--model", "selfvae", "--size", "tiny", "--options", "width=0.05", "depth=0.3", "components=2",
    "prior=normal", "--batch-size", "4", "--eval-images", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in "in", an archive of them, images in x.npy, a short run."""
    folder, before = tmp_path_factory.mktemp("prepared"), Path.cwd()
    os.chdir(folder)
    try:
        random = np.random.default_rng(0)
        Path("in").mkdir()
        for i in range(3):
            Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(f"in/{i}.png")
        np.save("x.npy", random.integers(0, 256, (64, 3, 16, 16), dtype=np.uint8))
        assert main(["train", *TINY, "--data", "x.npy", "--steps", "2", "--out", "run"]) == 0
        assert main(["pack", "in", "all.svaes", "--model", "cifar10-2m-v1"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def home(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what was prepared, to work in."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def quota(size: int) -> Iterator[None]:
    """No file may become longer than `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def state_of(folder: Path) -> dict[str, bytes]:
    """The contents of all files."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


COMMANDS = {
    "train": "train --resume --out run --steps 4",
    "compress": "compress in/0.png out.svae",
    "compress a folder": "compress in out --jobs 1",
    "pack": "pack in new.svaes --model cifar10-2m-v1",
    "unpack": "unpack all.svaes out",
    "prepare-crops": "prepare-crops in crops --size 8 --shrink 1 --n 60",
    "report": "report run --data x.npy --out rep --ood-data x.npy --limit 2 --iwae-samples 2 "
    "--iwae-limit 2 --enhance-limit 2 --ood-limit 2 --fid-samples 4 --figures 0",
    "generate": "generate run --n 2 --out grid.png",
}


def command(name: str) -> list[str]:
    return COMMANDS[name].split()


_SLOW = {"report", "unpack", "compress a folder", "prepare-crops"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in COMMANDS]
)
def test_a_full_disk(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line that names a file; what was there stays as it was, and nothing is half written."""
    before = state_of(home)
    capsys.readouterr()
    with quota(100):
        assert main(command(name)) in (1, 2)
    told = capsys.readouterr().err
    assert "File too large" in told and "Traceback" not in told
    after = state_of(home)
    assert {key: after[key] for key in before if after.get(key) != before[key]} == {}
    new = [home / key for key in after if key not in before]
    assert all(len(file.read_bytes()) < 100 for file in new)  # whole, since they fit
    assert not [file for file in new if file.name.startswith(".")]
    assert main(command(name)) == 0  # the next run does it


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"train"}))
def test_a_folder_that_cannot_be_written(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of /proc, which nobody can write to, whatever his rights."""
    before = state_of(home)
    words = [
        word if home.joinpath(word).exists() or word not in _OUTPUTS else f"/proc/nowhere/{word}"
        for word in command(name)
    ]
    assert words != command(name)
    capsys.readouterr()
    assert main(words) in (1, 2)
    told = capsys.readouterr().err
    assert "/proc/nowhere" in told and "Traceback" not in told
    assert state_of(home) == before


_OUTPUTS = {"out.svae", "out", "new.svaes", "crops", "rep", "grid.png"}


@pytest.mark.parametrize("name", ["compress a folder", "pack", "prepare-crops"])
@pytest.mark.parametrize("how", ["vanishes", "is cut short"])
def test_a_picture_changes_in_the_middle(
    name: str, how: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the folder was listed, and before the picture is read."""
    opened = pictures._open

    def change(source: pictures.Source) -> Image.Image:
        last = Path("in/2.png")
        if last.exists() and last.stat().st_size > 500:
            last.unlink() if how == "vanishes" else last.write_bytes(last.read_bytes()[:500])
        return opened(source)

    monkeypatch.setattr(pictures, "_open", change)
    assert main(command(name)) in (1, 2)
    told = capsys.readouterr().err
    assert "2.png" in told and "Traceback" not in told
    if name == "compress a folder":  # the others are done
        assert sorted(f.name for f in Path("out").iterdir()) == ["0.svae", "1.svae"]
    else:
        assert not Path("new.svaes").exists() and not Path("crops/train.npy").exists()


def test_data_that_are_not_numbers(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("nan.npy", np.full((20, 3, 8, 8), np.nan, dtype=np.float32))
    assert main(["train", *TINY, "--data", "nan.npy", "--steps", "2", "--out", "other"]) == 2
    told = capsys.readouterr().err
    assert "uint8" in told and "nan.npy" in told and not Path("other").exists()


def _no_memory(*_: object) -> None:
    torch.empty(2**60)


def _no_memory_in_python(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("fail", [_no_memory, _no_memory_in_python])
def test_too_little_memory(
    fail: Callable[..., None],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = state_of(home)
    monkeypatch.setattr(Guard, "__call__", fail)
    assert main(command("train")) == 2
    assert "selfvae: out of memory. Training: lower --batch-size" in capsys.readouterr().err
    assert state_of(home) == before


def test_clocks_that_go_backwards(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training counts by clocks that cannot; the time of day may do what it likes."""
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(times)))
    assert main(command("train")) == 0
    seconds = [line.split(",")[1] for line in Path("run/log.csv").read_text().splitlines()[1:]]
    assert [float(s) for s in seconds] == sorted(map(float, seconds))


def test_killed_between_two_names(home: Path) -> None:
    """The last checkpoint has become the one before, and the new one has no name yet."""
    shutil.move("run/checkpoint.safetensors", "run/checkpoint-previous.safetensors")
    assert main(command("train")) == 0
    assert not os.path.exists("run/.checkpoint.safetensors.new")
