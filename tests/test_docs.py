"""The examples of docs/ run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from selfvae.layers import BACKBONES
from selfvae.presets import TRANSFORMS
from selfvae.priors import TOP_PRIORS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["bound", "chains", "consistency", "extend", "levels"])
def test_page(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A page's blocks run one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL)
    assert blocks
    for table in (TRANSFORMS, TOP_PRIORS, BACKBONES):  # a page may add to them
        before = dict(table)
        request.addfinalizer(lambda table=table, before=before: (table.clear(), table.update(before)))
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)


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
