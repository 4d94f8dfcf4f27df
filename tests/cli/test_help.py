"""What the command line says before it works: help, version, unknown words; and how quickly."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import selfvae
from selfvae.cli import main, names
from selfvae.cli.commands import COMMANDS, load
from selfvae.cli.flags import GROUPS
from selfvae.cli.parsing import flags_of
from selfvae.cli.settings import FORMER_FLAGS
from selfvae.hub import bundled
from selfvae.presets import PRESETS, SIZES, build

ROOT = Path(__file__).parents[2]

# habits of phrasing that the help has lost
_ODD = re.compile(r"\bso many\b|\balone\b|comes? along|from nothing|bits a (sub-)?pixel|images a step")


def python(code: str, *words: str, limit: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=limit,
    )  # fmt: skip


def command(*words: str, cwd: Path, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *options, "-m", "selfvae.cli", *words], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


# every command's help in one process; by what it prints, whether torch is there, and how long each took
_HELP = """
import contextlib, io, json, sys, time
from selfvae.cli import main
from selfvae.cli.commands import COMMANDS
seconds = {}
for words in [["--help"], *([name, "--help"] for name in COMMANDS)]:
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == 0
    assert "usage: selfvae" in out.getvalue(), words
    seconds[words[0]] = time.process_time() - began
heavy = [name for name in ("torch", "numpy", "PIL", "rich", "lightning_fabric") if name in sys.modules]
print(json.dumps([heavy, time.process_time(), max(seconds.values())]))
"""


def test_help_is_quick_and_needs_no_torch() -> None:
    done = python(_HELP)
    assert done.returncode == 0, done.stderr
    heavy, total, longest = json.loads(done.stdout)
    assert heavy == []
    assert longest < 0.5 and total < 4  # generous: 0.1 and 0.9 s where this was written


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], ["trian"]])
def test_one_process_answers_at_once(words: list[str]) -> None:
    code = "import sys; from selfvae.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python(code, *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 1.0  # 0.15 to 0.3 s where this was written; torch alone takes 2


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, selfvae; assert 'torch' not in sys.modules; selfvae.__version__; dir(selfvae)\n"
        "assert 'torch' not in sys.modules; selfvae.build; assert 'torch' in sys.modules"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    for name in selfvae.__all__:
        found = getattr(selfvae, name)
        assert found.__name__ == name and name in dir(selfvae)
    assert "__version__" in dir(selfvae) and selfvae.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="has no attribute 'biuld'"):
        _ = selfvae.biuld


@pytest.mark.parametrize("flag", ["-v", "--version"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"selfvae {selfvae.__version__}\n"


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.help)}$", text, re.MULTILINE), name
    assert not _ODD.search(text) and max(map(len, text.splitlines())) < 100
    assert main([]) == 2
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_says_what_it_is(name: str) -> None:
    flags, listed = flags_of(load(name)), [f for group in GROUPS.values() for f in group]
    for flag in flags:
        assert len(flag.help) > 10, f"selfvae {name}: {flag.name} has no help"
        assert not _ODD.search(flag.help), f"selfvae {name}: {flag.name}: {flag.help}"
    assert len({flag.name for flag in flags}) == len(flags)
    if name == "train":
        assert {f.name for f in flags if not f.positional} - {*listed} == {"resume"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([name, "--help"]) == 0
    text = out.getvalue()
    for flag in flags:
        assert flag.positional or flag.words[0] in text
    assert "(default: None)" not in text and "(default: True)" not in text and "(default: )" not in text
    assert "--config FILE" in text and "--import MODULE" in text


def test_headings() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(["train", "--help"])
    text = out.getvalue()
    places = [text.index(f"{title} options") for title in ("model", "data", "optimisation", "output")]
    assert places == sorted(places)
    assert places[1] < text.index("--batch-size") < places[2] < text.index("--clip-factor") < places[3]


def test_names_known_without_torch_are_the_models() -> None:
    assert list(names.PRESETS) == list(PRESETS) and list(names.SIZES) == list(SIZES)
    assert names.bundled() == sorted(bundled())


def test_numbers_of_parameters_are_the_models() -> None:
    """Tiny models show every change of a structure, one preset at all sizes every change of scale."""
    for name, counts in names.PRESETS.items():
        for size, count in zip(names.SIZES, counts, strict=True):
            if size == "tiny" or name == "selfvae-grey":
                with torch.device("meta"):
                    found = sum(p.numel() for p in build(name, size).parameters())
                assert count == found, f"count the parameters of all presets again: {name} {size} {found}"


def test_presets_are_listed_without_torch() -> None:
    done = python(
        "import sys; from selfvae.cli import main; main(['info', '--presets'])\n"
        "assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
    for name in names.PRESETS:
        assert re.search(rf"^{name} +\d+\.\d\d M +\d+\.\d\d M +\d+\.\d\d M$", done.stdout, re.MULTILINE)
    assert "bundled models: cifar10-2m-v1, " in done.stdout


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian --out x", "unknown command 'trian': did you mean 'train'? (selfvae --help lists"),
        ("quantum", "unknown command 'quantum' (selfvae --help lists"),
        ("train --modle vae", "unknown flag '--modle': did you mean '--model'? (selfvae train --help"),
        ("train --out x --iw 3", "unknown flag '--iw'"),
        ("train --out x --model vaee", "unknown model 'vaee': did you mean 'vae'?"),
        ("train --out x --model photos-v2", "is a trained model, not a preset: continue from it with"),
        ("train --out x --init-from photo-v2", "did you mean 'photos-v2'?"),
        ("enhance a.png b.png --model photos-x3-v1", "did you mean 'photos-x2-v1'?"),
        ("info cifar10-2m", "did you mean 'cifar10-2m-v1'?"),
        ("train --config", "--config takes a YAML file"),
        ("--import", "--import takes the name of a Python module"),
        ("--import no_such_module_anywhere info", "--import no_such_module_anywhere: No module named"),
    ],
)
def test_unknown_words(
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train", "missing --out PATH (selfvae train --help)"),
        ("compress", "missing IN, OUT (selfvae compress --help)"),
        ("compress a.png", "missing OUT (selfvae compress --help)"),
        (
            "train --out x --steps many",
            "--steps: invalid literal for int() with base 10: 'many' (selfvae train",
        ),
        (
            "train --out x --size big",
            "'big' for argument '--size'. Expected one of ('tiny', 'small', 'paper') (",
        ),
        ("compress a.png a.svae b.svae", "unrecognized options: b.svae (selfvae compress --help)"),
    ],
)
def test_missing_and_wrong_values(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each, however narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", "50")
    assert main(line.split()) == 2
    told = capsys.readouterr()
    assert message in told.err and told.err.count("\n") == 1 and not told.out


@pytest.mark.slow
def test_sigterm_ends_with_one_line(tmp_path: Path) -> None:
    """In the middle of the work: no traceback, nothing half written. (Ctrl-C: see test_pool.)"""
    (tmp_path / "noise.ppm").write_bytes(b"P6 600 400 255\n" + os.urandom(600 * 400 * 3))
    with command("compress", "noise.ppm", "noise.svae", cwd=tmp_path) as running:
        assert running.stderr is not None
        while "compiling loops" in (line := running.stderr.readline()):  # only the first time
            pass
        assert line == "selfvae: compressing noise.ppm, 0.24 megapixels\n"
        time.sleep(0.5)
        assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        out, error = running.communicate(timeout=120)
    assert running.returncode == 143, error
    said = [line for line in error.splitlines() if "compiling loops" not in line]
    assert said == ["selfvae: ended by SIGTERM"] and not out
    assert [file.name for file in tmp_path.iterdir()] == ["noise.ppm"]


def test_ctrl_c_while_torch_is_imported(tmp_path: Path) -> None:
    with command("info", "photos-v2", cwd=tmp_path, options=("-X", "importtime")) as running:
        assert running.stderr is not None
        while "torch." not in (line := running.stderr.readline()):
            assert line
        running.send_signal(signal.SIGINT)
        out, error = running.communicate(timeout=120)
    assert running.returncode == 130, error
    assert error.endswith("selfvae: interrupted\n") and "Traceback" not in error and not out
    assert " selfvae.hub\n" not in error  # it ended there and then


def test_former_names_are_no_flags() -> None:
    flags = {word for flag in flags_of(load("train")) for word in flag.words}
    for old, new in FORMER_FLAGS.items():
        assert f"--{old}" not in flags and f"--{new}" in flags
