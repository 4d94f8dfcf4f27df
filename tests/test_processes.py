"""Work that processes share: the same results for any number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import selfvae
from selfvae import hub
from selfvae.codec import Codec, pack
from selfvae.data import Images
from selfvae.evaluate import evaluate
from selfvae.figures import figures
from selfvae.processes import alone, launch, rank, spread

WORK = """
import hashlib, json, sys
from pathlib import Path
from tests.test_processes import work
from selfvae.processes import alone, launch, rank, spread

launch(2)
found = work(Path(sys.argv[1]), Path(sys.argv[2]))
found["ranks"] = spread(lambda item: rank(), [0, 1, 2])
try:
    spread(lambda item: 1 // item, [1, 0, 1])
except ZeroDivisionError as error:
    found["error"] = str(error)
Path(sys.argv[2], f"{rank()}.json").write_text(json.dumps(found))
print(rank())
"""


def work(run: Path, out: Path) -> dict[str, object]:
    """Whatever is shared, with a model and its own images."""
    model = hub.load(run)
    x = torch.randint(0, 256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    torch.manual_seed(5)
    scores = evaluate(model, Images(x.numpy()), iw=3, batch_size=4)
    files = figures(model, x[:2], out, seed=0)
    archive = pack(Codec(model), [(str(i), image[None]) for i, image in enumerate(x)], block=4)
    return {"scores": scores, "archive": archive.hex(), "files": [file.name for file in files]}


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    model = selfvae.build("selfvae", "tiny", (3, 8, 8), width=0.05)
    hub.save(model, tmp_path / "run")
    (tmp_path / "work.py").write_text(WORK)
    done = subprocess.run(
        [sys.executable, tmp_path / "work.py", tmp_path / "run", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == ["0"]  # one alone speaks
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1)]
    assert found[0] == found[1]
    assert found[0].pop("ranks") == [0, 1, 0]
    assert found[0].pop("error") == "integer division or modulo by zero"
    assert found[0] == work(tmp_path / "run", tmp_path / "alone")


def test_one_process() -> None:
    assert rank() == 0 and launch().type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="at least 1"):
        launch(0)
    torch.manual_seed(1)
    one = spread(lambda _: torch.rand(()).item(), range(3))
    torch.manual_seed(1)
    assert spread(lambda _: torch.rand(()).item(), range(3)) == one and len(set(one)) == 3
    assert torch.rand(()).item() not in one
    assert alone(lambda: 4) == 4
    with pytest.raises(KeyError):
        spread({}.__getitem__, [1])
