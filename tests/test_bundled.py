"""The models that come with the package: they load by name, offline, and are worth it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import selfvae
from selfvae import hub
from selfvae.cli import main
from selfvae.cli.codec import PHOTOS
from selfvae.codec import fingerprint
from selfvae.data import crops, sources
from selfvae.data.batches import Images
from selfvae.demo import run_demo
from selfvae.metrics.baselines import lossless_bits
from selfvae.metrics.likelihood import evaluate
from selfvae.transforms import MeanDownscale

NAMES = (
    "cifar10-2m-v1", "emoji-v3", "photos-deband-v1",
    "photos-v2", "photos-v3", "photos-v4", "photos-v5",
    "photos-x2-bicubic-v1", "photos-x2-jpeg-v1", "photos-x2-v1",
)  # fmt: skip


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """A part of a photograph that is in no training set, uint8 (1, 3, 80, 96)."""
    return torch.from_numpy(crops.photo("coffee", 2)[None, :, 60:140, 90:186])


def test_all_are_there_and_small() -> None:
    assert tuple(hub.bundled()) == NAMES and str(PHOTOS) == hub.PHOTOS
    root = Path(__file__).parent.parent
    for folder, most in (("selfvae", 16e6), ("results", 30e6)):
        weights = root.glob(f"{folder}/models/*/*.safetensors")
        assert sum(file.stat().st_size for file in weights) < most


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_has_a_card(name: str) -> None:
    model = selfvae.load(name)
    assert all(p.isfinite().all() for p in model.parameters()) and not model.training
    card = (hub.bundled()[name] / "README.md").read_text()
    for part in ("## Data", "## Recipe", "## Numbers", "## Limits", fingerprint(model).hex()):
        assert part in card
    assert selfvae.generate(model, 2, seed=0).shape == (2, *model.config.image_shape)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(FileNotFoundError, match=f"or one of {', '.join(NAMES)}"):
        selfvae.load("selfvae-cats")


def test_photographs_are_smaller_than_as_webp(photo: torch.Tensor, tmp_path: Path) -> None:
    picture, file, back = (tmp_path / name for name in ("a.png", "a.svae", "b.png"))
    Image.fromarray(photo[0].permute(1, 2, 0).numpy()).save(picture)
    assert main(["compress", str(picture), str(file)]) == 0
    assert main(["decompress", str(file), str(back)]) == 0
    assert np.array_equal(np.asarray(Image.open(back)), np.asarray(Image.open(picture)))
    assert 8 * file.stat().st_size < 0.95 * lossless_bits(photo, "WebP").item()


def test_photographs_are_enlarged_as_well_as_by_interpolation(photo: torch.Tensor, tmp_path: Path) -> None:
    model = selfvae.load("photos-x2-v1")
    small = MeanDownscale(2)(photo)
    plain = model.levels[0].transform.estimate(small, model.spec).round().clamp(0, 255)
    ours = selfvae.enhance(model, small, decode="mean")
    assert torch.equal(MeanDownscale(2)(ours), small)

    def error(x: torch.Tensor) -> float:
        return (x.float() - photo).square().mean().item()

    assert error(ours) < 0.75 * error(plain)
    Image.fromarray(small[0].permute(1, 2, 0).numpy()).save(tmp_path / "small.png")
    assert main(["enhance", str(tmp_path / "small.png"), str(tmp_path / "large.png")]) == 0
    assert Image.open(tmp_path / "large.png").size == (96, 80)


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run_demo(tmp_path, fast=True, report=lines.append)
    rates = result["bits_per_subpixel"]
    assert rates[hub.PHOTOS] < 0.97 * rates["WebP"] < rates["PNG"]
    assert all(score["photos-x2-v1"] > 25 for score in result["psnr"].values())
    assert Image.open(tmp_path / "figure.png").width > 600
    for name, sizes in result["bytes"].items():
        assert (tmp_path / f"{name}.svae").stat().st_size == sizes[hub.PHOTOS]
    assert "less than PNG" in lines[1]


@pytest.mark.slow
def test_small_images_are_likelier_than_webp_thinks() -> None:
    """Crops of photographs are not CIFAR-10, but near enough."""
    some = sources.load("photos", 32).test.take(range(64))
    found = evaluate(selfvae.load("cifar10-2m-v1"), Images(some.numpy()))
    assert found["bits_per_dim"] < 0.95 * lossless_bits(some, "WebP").sum().item() / some.numel()
