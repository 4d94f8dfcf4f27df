"""Fixtures of all tests; one thread per process, those that tests start included."""

import os

# before torch is imported: threads of processes side by side would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, a fixed seed, and a cache that no test shares with the user."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setenv("SELFVAE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    os.environ.pop("HF_ENDPOINT", None)


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth random colour images, uint8 (4, 3, 16, 16)."""
    coarse = torch.rand(4, 3, 4, 4)
    smooth = torch.nn.functional.interpolate(coarse, 16, mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8)
