"""The wheel: whole, and enough by itself."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfvae.data.crops import photo
from selfvae.hub import bundled

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path) -> str:
    """Run a command that cannot see the checkout, and return its output."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, which leaves the checkout as it is."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for file in (*ROOT.glob("*.*"), ROOT / "LICENSE", *(ROOT / "selfvae").rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            target = source / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    # with the setuptools at hand where they are new enough, so that nothing is fetched
    try:
        isolate = int(importlib.metadata.version("setuptools").split(".")[0]) < 77
    except importlib.metadata.PackageNotFoundError:
        isolate = True
    how = [] if isolate else ["--no-build-isolation"]
    run(sys.executable, "-m", "pip", "wheel", source, "--no-deps", *how, "-w", out, cwd=out)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a fresh environment: the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    programs = folder / "bin"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "install",
        "--no-deps",
        wheel,
        cwd=folder,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    # after the environment's own packages; .pth files of that folder (editable installs) do not count
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def test_the_wheel_holds_all_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "selfvae").rglob("*.py")}
    for name in bundled():
        files |= {
            f"selfvae/models/{name}/{file}" for file in ("config.json", "model.safetensors", "README.md")
        }
    assert files | {"selfvae/py.typed"} == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith("/LICENSE") for name in names)


def test_it_works_alone(installed: Path, tmp_path: Path) -> None:
    code = "import selfvae.codec, sys; print(selfvae.__file__); print(selfvae.codec.__file__)"
    for file in run(installed / "python", "-c", code, cwd=tmp_path).splitlines():
        assert Path(file).is_relative_to(installed.parent), file
    command = installed / "selfvae"
    presets = run(command, "info", "--presets", cwd=tmp_path)
    assert "selfvae-quincunx" in presets and all(name in presets for name in bundled())
    Image.fromarray(photo("coffee", 2)[:, 60:100, 90:142].transpose(1, 2, 0)).save(tmp_path / "a.png")
    run(command, "compress", "a.png", "a.svae", cwd=tmp_path)
    run(command, "decompress", "a.svae", "b.png", cwd=tmp_path)
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "b.png")), np.asarray(Image.open(tmp_path / "a.png"))
    )
