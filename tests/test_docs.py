"""The examples of docs/ run as they stand."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selfvae.cli import main
from selfvae.data.crops import photo
from selfvae.distributions.priors import TOP_PRIORS
from selfvae.nn.layers import BACKBONES
from selfvae.presets import TRANSFORMS

ROOT = Path(__file__).parents[1]


# exports to ONNX take long, this page's and most of test_export.py's
SLOW = [pytest.param("share", marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    "page",
    ["bound", "chains", "codec", "consistency", "extend", "levels", "scores", *SLOW, "tutorial"],
)
def test_page(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A page's blocks run one after the other, as a reader would paste them."""
    if page == "share":
        pytest.importorskip("onnxscript", reason="ONNX files need onnxscript")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
    assert blocks
    for table in (TRANSFORMS, TOP_PRIORS, BACKBONES):  # a page may add to them
        before = dict(table)
        request.addfinalizer(lambda table=table, before=before: (table.clear(), table.update(before)))
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)


def test_the_readme_in_python() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["larger"].shape == (1, 3, 192, 256) and names["images"].shape == (16, 3, 64, 64)


def test_the_readme_is_short_and_has_the_commands_of_ci() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    for line in ("pip install -e . && selfvae demo", 'pip install -e ".[test]" && pytest'):
        assert line in lines


DOCUMENTS = [
    file
    for pattern in (
        "*.md",
        "docs/*.md",
        "recipes/*.md",
        "benchmarks/*.md",
        "results/*.md",
        "selfvae/models/*/*.md",
    )
    for file in sorted(ROOT.glob(pattern))
]
# flags of every command, and of the words before it
EVERYWHERE = {"--help", "--config", "--import"}


def prose(text: str) -> str:
    """A Markdown text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def shown_commands(text: str) -> list[list[str]]:
    """The words of every `selfvae ...` in fenced blocks and between backticks, continued lines joined."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    fenced = [block for language, block in blocks if language in ("", "sh")]
    lines = [line for block in fenced for line in block.splitlines()]
    lines += re.findall(r"`([^`]+)`", prose(text))
    found = [
        re.search(r"(?:^|[ /])(?:selfvae|-m selfvae\.cli) ([a-z].*)", line.split(" #")[0]) for line in lines
    ]
    return [match[1].split() for match in found if match]


def test_every_command_and_flag_in_the_documents_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    known: dict[str, set[str]] = {}
    wrong: list[str] = []
    for file in DOCUMENTS:
        for command, *words in shown_commands(file.read_text()):
            if command not in known:
                with contextlib.suppress(SystemExit):
                    main([command, "--help"])
                shown = capsys.readouterr()
                known[command] = set(re.findall(r"--[a-z][\w-]*", shown.out))
            flags = {word.split("=")[0] for word in words if word.startswith("--")} - EVERYWHERE
            missing = flags - known[command] if known[command] else {"(no such command)"}
            wrong += [f"{file.relative_to(ROOT)}: selfvae {command}: {flag}" for flag in sorted(missing)]
    assert not wrong, "\n".join(wrong)
    assert len(known) > 15


def headings(file: Path) -> set[str]:
    """The anchors of a Markdown file's headings."""
    lines = re.findall(r"^#+ (.*)$", prose(file.read_text()), re.MULTILINE)
    found = [re.sub(r"[^\w\- ]", "", line.lower()) for line in lines]
    return {heading.strip().replace(" ", "-") for heading in found}


def test_every_link_leads_somewhere() -> None:
    wrong, anchors = [], 0
    for file in {*DOCUMENTS, *ROOT.glob("*/models/*/README.md")}:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(file.read_text())):
            name, _, anchor = link.partition("#")
            if "://" in link or name.startswith("mailto:"):
                continue
            target = (file.parent / name).resolve() if name else file
            anchors += bool(anchor)
            if not target.exists() or (anchor and anchor not in headings(target)):
                wrong.append(f"{file.relative_to(ROOT)}: {link}")
    assert not wrong, "\n".join(sorted(wrong))
    assert anchors > 20


@pytest.mark.slow
def test_tutorial_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tutorial's commands, one after the other, with less training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-photos").mkdir()
    for i, (name, top) in enumerate((("coffee", 0), ("chelsea", 0), ("astronaut", 60))):
        x = photo(name, 2)[:, top : top + 72, 40:120].transpose(1, 2, 0)
        Image.fromarray(x).save(tmp_path / f"my-photos/{i}.png")
    shutil.copy(tmp_path / "my-photos/0.png", tmp_path / "photo.png")
    text = "\n".join(re.findall(r"```sh\n(.*?)```", (ROOT / "docs/tutorial.md").read_text(), re.DOTALL))
    less = {"--n 2000": "--n 40", "--max-seconds 600": "--steps 2 --eval-images 4"}
    for long, short in less.items():
        assert long in text
        text = text.replace(long, short)
    lines = list(filter(None, text.splitlines()))
    assert len(lines) >= 9
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("photo.png")))
    assert Image.open("larger.png").size == (160, 144)


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs mkdocs-material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "results/index.html", "recipes/index.html", "api/index.html"):
        html = (tmp_path / "site" / page).read_text()
        assert not re.search(r'(src|href)="https?://(?!squidfunk)', html), (
            page
        )  # nothing is fetched elsewhere
    assert "selfvae.codec.progressive.Codec.compress" in html


@pytest.mark.slow
def test_sharded_training(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/scale.md").read_text(), re.DOTALL)
    code += "\nassert all(p.isfinite().all() for p in weights.values())\nprint(dist.get_world_size())"
    (tmp_path / "shard.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "shard.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]


def tree() -> list[str]:
    """The modules of the tree in docs/architecture.md, in its order: "files", "transforms.base", ...

    A folder whose files it leaves out goes by its own name.
    """
    text = (ROOT / "docs/architecture.md").read_text()
    found = re.search(r"^selfvae/\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found
    order: list[str] = []
    folders: list[str] = []  # those that the line is in
    for line in found[1].splitlines():
        entry = re.match(r"((?:  )+)(\w+)(/|\.py) ", line)
        assert entry, f"docs/architecture.md: not an entry of the tree: {line!r}"
        indent, name, kind = entry.groups()
        depth = len(indent) // 2 - 1
        assert depth <= len(folders), line
        del folders[depth:]
        if folders and order[-1] == ".".join(folders):  # its files are listed
            order.pop()
        order.append(".".join([*folders, name]))
        if kind == "/":
            folders.append(name)
    assert len(order) == len(set(order)), "docs/architecture.md names a module twice"
    return order


def place(module: str, order: list[str]) -> int:
    """Where a module stands; a folder, or a folder's own `__init__`, stands where its last file does."""
    if module in order:
        return order.index(module)
    inside = [i for i, name in enumerate(order) if name.startswith(f"{module}.")]
    if inside:
        return inside[-1]
    folder = module.rpartition(".")[0]
    if folder in order and (ROOT / "selfvae" / folder.replace(".", "/")).is_dir():
        return order.index(folder)
    raise AssertionError(f"the tree in docs/architecture.md lacks selfvae.{module}")


def test_a_file_imports_only_from_files_above_it() -> None:
    """The order of the tree in docs/architecture.md, file by file; imports inside functions count too."""
    order, package = tree(), ROOT / "selfvae"
    files = {".".join(f.relative_to(package).with_suffix("").parts): f for f in package.rglob("*.py")}
    for name in order:
        assert name in files or f"{name}.__init__" in files, f"there is no selfvae.{name}"
    for module, file in files.items():
        if module.endswith("__"):  # an __init__ offers what its folder holds
            continue
        own = place(module, order)
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "selfvae":
                continue
            base = (node.module or "").removeprefix("selfvae").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                used = inner if inner in files or f"{inner}.__init__" in files else base
                assert used, f"selfvae.{module} imports {alias.name} from selfvae itself"
                above = place(used, order) <= own
                assert above, f"selfvae.{module} imports selfvae.{used}, which stands below it"
