"""A folder's files on several cores; and that metadata pass through the commands."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from codec_models import INTEGER, integer, photo_like
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import selfvae
from selfvae import hub
from selfvae.cli import main
from selfvae.cli import pool as pools
from selfvae.codec import Archive, Codec
from selfvae.data import pictures
from selfvae.data.metadata import Metadata


def task(file: Path, target: Path) -> tuple[bytes, str]:
    """The file's bytes in another order; later files are done earlier."""
    data = file.read_bytes()
    if data == b"end":
        os._exit(1)
    if data == b"bad":
        raise ValueError("nothing to be done")
    time.sleep(0.2 if file.name == "0" else 0)
    return data[::-1], f"{target.name} by {'a worker' if pools.in_worker() else 'the first'}"


@pytest.fixture
def files(tmp_path: Path) -> dict[Path, Path]:
    (tmp_path / "in").mkdir()
    for i in range(9):
        (tmp_path / f"in/{i}").write_bytes(b"bad" if i == 4 else b"file %d" % i)
    return {tmp_path / f"in/{i}": tmp_path / f"out/{i}.out" for i in range(9)}


@pytest.mark.slow
def test_results_come_in_order_and_failures_stop_nothing(files: dict[Path, Path], tmp_path: Path) -> None:
    found = list(pools.run(task, files, 2))
    assert found.pop(4) == ("", f"{tmp_path / 'in/4'}: nothing to be done")
    assert found == [(f"{i}.out by a worker", "") for i in range(9) if i != 4]
    assert (tmp_path / "out/8.out").read_bytes() == b"8 elif" and not (tmp_path / "out/4.out").exists()
    assert pools.cores() >= 1 and not pools.in_worker()


def test_a_killed_process_is_an_error(files: dict[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "in/7").write_bytes(b"end")
    with pytest.raises(OSError, match="try --jobs 1"):
        list(pools.run(task, files, 1))


def test_what_is_left_undone(files: dict[Path, Path], tmp_path: Path) -> None:
    results = pools.run(task, files, 1)
    next(results)
    results.close()  # as Ctrl-C does: the processes end
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["0.out"]


@pytest.mark.slow
def test_ctrl_c_ends_the_pool_with_one_line(tmp_path: Path) -> None:
    for i in range(4):
        pictures.write(torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8), tmp_path / f"in/{i}.png")
    pictures.write(torch.zeros(3, 1, 1, dtype=torch.uint8), tmp_path / "in/#.png")
    with subprocess.Popen(
        [sys.executable, "-m", "selfvae.cli", "compress", "in", "out", "--jobs", "2"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(selfvae.__file__).parent.parent)},
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline().startswith("out/#.svae: ")
        os.killpg(running.pid, signal.SIGINT)  # all processes get it, as from a terminal
        out, error = running.communicate(timeout=120)
    said = [line for line in error.splitlines() if "compiling loops" not in line]  # only the first time
    assert running.returncode == 130 and said == ["selfvae: interrupted"] and not out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["#.svae"]


@pytest.mark.slow
def test_commands_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.save(selfvae.build("selfvae-halve", "tiny", (3, 8, 8), width=0.05), tmp_path / "run")
    for i in range(3):
        pictures.write(torch.full((3, 8, 8), i, dtype=torch.uint8), tmp_path / f"in/{i}.png")
    (tmp_path / "in/2x.png").write_bytes(b"no picture")
    model = ["--model", str(tmp_path / "run")]
    assert main(["compress", str(tmp_path / "in"), str(tmp_path / "out"), "--jobs", "2", *model]) == 1
    told = capsys.readouterr()
    names = [line.split(":")[0] for line in told.out.splitlines()]
    assert names == [
        *(str(tmp_path / f"out/{i}.svae") for i in range(3)),
        f"3 of 4 files in {tmp_path / 'out'}",
    ]
    assert told.err.count("2x.png cannot be read") == 1
    assert main(["decompress", str(tmp_path / "out"), str(tmp_path / "back"), "--jobs", "1", *model]) == 0
    for i in range(3):
        assert pictures.read(tmp_path / f"back/{i}.png").pixels.unique().tolist() == [i]


def test_flags_that_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (("--jobs -1", "--jobs must be 0"), ("--jobs 2 --devices 2", "leave out --jobs 2")):
        assert main(["compress", str(tmp_path), str(tmp_path / "out"), *flags.split()]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("strip", [False, True])
def test_metadata_and_alpha_are_kept_where_the_codec_takes_them(
    strip: bool, tiny_integer: selfvae.SelfVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("selfvae.cli.codec._codec", lambda *_: Codec(tiny_integer))
    texts = PngInfo()
    texts.add_text("Title", "a title")
    x = torch.randint(0, 256, (4, 9, 7), dtype=torch.uint8)
    pictures.to_image(x).save(tmp_path / "a.png", pnginfo=texts, icc_profile=b"profile")
    flags = ["--strip"] if strip else []
    assert main(["compress", str(tmp_path / "a.png"), str(tmp_path / "a.svae"), *flags]) == 0
    assert "(252 raw)" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "a.svae"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "none is needed" and told["channels"] == 4 and told["pixels_bytes"] > 0
    assert ("metadata_bytes" in told) != strip
    for name in ("b.png", "b.webp"):
        assert main(["decompress", str(tmp_path / "a.svae"), str(tmp_path / name)]) == 0
        found = pictures.read(tmp_path / name)
        assert torch.equal(found.channels()[0], x)
        text = (("Title", "a title"),) if name == "b.png" and not strip else ()
        assert found.metadata == (Metadata() if strip else Metadata(b"profile", text=text))
    lost = "WEBP files do not hold texts of this picture" in capsys.readouterr().err
    assert lost != strip
    assert Image.open(tmp_path / "b.png").mode == "RGBA"


# kills itself without warning when the third file, or the archive, is complete but has not got its name
_KILLED = """
import os, pathlib, signal, sys
from selfvae.cli import main
plain, files = pathlib.Path.replace, []
def replace(self, target):
    if pathlib.Path(target).suffix in (".svae", ".svaes"):
        files.append(target)
        if len(files) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, target)
pathlib.Path.replace = replace
if __name__ == "__main__":
    main(sys.argv[2:])
"""


def _marked(mark: str) -> list[int]:
    """Processes with a word in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("command", ["compress --jobs 1", "compress --jobs 2", "pack"])
def test_a_killed_command_leaves_whole_files_and_is_done_again(command: str, tmp_path: Path) -> None:
    name, *jobs = command.split()
    hub.save(integer(**INTEGER["halve"]), tmp_path / "run")
    for i in range(5):
        pictures.write(photo_like(20, 30, seed=i)[0], tmp_path / f"in/{i}.png")
    out, mark = tmp_path / ("all.svaes" if name == "pack" else "out"), f"SELFVAE_MARK={tmp_path}"
    args = [name, str(tmp_path / "in"), str(out), "--model", str(tmp_path / "run")]
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    with (tmp_path / "log").open("w") as log:  # no pipe: a process that is left would keep it open
        done = subprocess.run(
            [sys.executable, str(script), "1" if name == "pack" else "3", *args, *jobs],
            stdout=log, stderr=log, env={**os.environ, "SELFVAE_MARK": str(tmp_path)}, timeout=300,
        )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()
    end = time.monotonic() + 20
    while (left := _marked(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left, f"processes {left} outlived the one that started them"
    codec = Codec(hub.load(tmp_path / "run"))
    if name == "pack":
        assert not out.exists()
    else:
        files = sorted(out.glob("*.svae"))
        assert [file.stem for file in files] == ["0", "1"]
        for i, file in enumerate(files):
            assert torch.equal(codec.decompress(file.read_bytes()), photo_like(20, 30, seed=i))
    times = [file.stat().st_mtime_ns for file in out.glob("*.svae")] if name == "compress" else []
    assert main([*args, *(["--jobs", "1", "--skip-existing"] if name == "compress" else [])]) == 0
    for time_before in times:  # what was complete is not done again
        assert time_before in [file.stat().st_mtime_ns for file in out.glob("*.svae")]
    if name == "pack":
        found = dict(Archive(codec, out.read_bytes()))
    else:
        found = {file.stem + ".png": codec.decompress(file.read_bytes()) for file in out.glob("*.svae")}
    assert len(found) == 5
    assert all(torch.equal(found[f"{i}.png"], photo_like(20, 30, seed=i)) for i in range(5))
