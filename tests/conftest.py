"""Fixtures of all tests; one thread per process, those that tests start included."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# before torch is imported: threads of processes side by side would wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait leave the cores to other tests

import pytest
import torch

if TYPE_CHECKING:
    from selfvae.codec import Codec
    from selfvae.model import SelfVAE


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


@pytest.fixture(scope="session")
def codec() -> Codec:
    """A codec of a small model with fixed weights, for the tests of the codec."""
    from codec_models import fixed

    from selfvae.codec import Codec

    return Codec(fixed())


@pytest.fixture(scope="session")
def tiny_integer() -> SelfVAE:
    """A small integer model, initialised and not trained."""
    from selfvae import build

    torch.manual_seed(0)
    options = {"width": 0.06, "components": 3, "latents": "none", "backbone": "residual", "integer": True}
    model = build("selfvae-halve", "tiny", image_shape=(3, 16, 16), **options)
    model.initialise(torch.arange(4 * 3 * 256).view(4, 3, 16, 16).mul(7919).remainder(97).byte())
    return model.eval()


@pytest.fixture
def never_webp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of integer models hold levels, however little the model knows of the picture."""
    monkeypatch.setattr("selfvae.codec.picture._clearly_smaller", lambda *_: True)


@pytest.fixture(scope="session")
def picture() -> torch.Tensor:
    """A smooth picture with an edge and some noise, uint8 (1, 3, 24, 32)."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    base = 100 + 3 * x + 2 * y + 60 * (x + y > 30)
    noise = torch.randn(3, 24, 32, generator=generator)
    return (base + torch.tensor([0.0, 10.0, -20.0]).view(3, 1, 1) + 4 * noise).clamp(0, 255).byte()[None]
