"""Fixtures of the tests of the codec."""

import pytest
import torch
from codec_models import fixed
from torch import Tensor

from selfvae.codec import (
    Codec,
)


@pytest.fixture(scope="session")
def codec() -> Codec:
    return Codec(fixed())


@pytest.fixture(scope="session")
def picture() -> Tensor:
    """A smooth picture with an edge and some noise, uint8 (1, 3, 24, 32)."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    base = 100 + 3 * x + 2 * y + 60 * (x + y > 30)
    noise = torch.randn(3, 24, 32, generator=generator)
    return (base + torch.tensor([0.0, 10.0, -20.0]).view(3, 1, 1) + 4 * noise).clamp(0, 255).byte()[None]
