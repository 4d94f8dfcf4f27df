"""What a GPU computes: the same transforms to the byte, the same scores, files that either side reads."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

import selfvae
from selfvae.codec import Codec
from selfvae.nn.precision import autocast
from selfvae.operations import complete, infer
from selfvae.presets import PRESETS, TRANSFORMS, transform
from selfvae.tiling import tiled
from selfvae.training.config import TrainConfig
from selfvae.training.loop import make_step, prepare

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def photograph(height: int = 48, width: int = 72) -> Tensor:
    """A part of a photograph that comes with scikit-image, uint8 (1, 3, h, w)."""
    from skimage import data

    pixels = np.ascontiguousarray(data.coffee()[100 : 100 + height, 200 : 200 + width])
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transforms_give_the_same_bytes(name: str) -> None:
    d, x = transform(name), torch.randint(0, 256, (5, 3, 48, 72), dtype=torch.uint8)
    x[4] = photograph()[0]
    assert torch.equal(d(x.cuda()).cpu(), d(x))


@pytest.mark.parametrize("name", list(PRESETS))
def test_scores_agree(name: str) -> None:
    """In float32, without TF32, given the same latents."""
    model = selfvae.build(name, "tiny", (3, 16, 16)).eval()
    x = photograph(16, 16)
    model.initialise(torch.cat([x, x.flip(3), 255 - x]))
    values = infer(model, x, seed=0)
    there = copy.deepcopy(model).cuda()

    def score(net: selfvae.SelfVAE) -> float:
        total = 0.0

        def provider(name: str, p: object) -> Tensor:
            nonlocal total
            value = values[name].to(net.device)
            total += p.log_prob(value).sum().item()  # type: ignore[attr-defined]
            return value

        net.walk(provider, values[f"y{len(net.levels) - 1}"][:, :0].to(net.device))
        return total

    with torch.no_grad():
        assert score(there) == pytest.approx(score(model), rel=1e-4)


def test_consistency_of_what_is_drawn() -> None:
    model = selfvae.build("selfvae", "tiny", (3, 16, 16)).cuda()
    model.initialise(photograph(64, 64).cuda())
    y = model.levels[0].transform(photograph(16, 16)).cuda()
    x = selfvae.enhance(model, y, seed=1)
    assert torch.equal(model.levels[0].transform(x), y)
    assert torch.equal(x, selfvae.enhance(model, y, seed=1))
    assert torch.equal(model.levels[0].transform(selfvae.enhance(tiled(model, 16), y, seed=1)), y)


def test_bfloat16_scores_are_close() -> None:
    model = selfvae.load("results/models/photos-v0").cuda()
    x = photograph(64, 96).cuda()
    with torch.no_grad():
        exact = model(x).bits_per_dim(x[0].numel())
        with autocast(model.device, "bf16-mixed"):
            low = model(x).bits_per_dim(x[0].numel())
    assert 2 < exact.item() < 5 and low.item() == pytest.approx(exact.item(), abs=0.05)


@pytest.mark.parametrize("name", ["results/models/photos-v0", "emoji-v3", "photos-deband-v1"])
def test_bundled_models_files_cross(name: str) -> None:
    """Written on the CPU and read on the GPU, and the other way: the same pixels."""
    model = selfvae.load(name)
    here, there = Codec(model), Codec(copy.deepcopy(model).cuda())
    x = photograph(40, 56) if "photos" in name else photograph(32, 32)
    for writer, reader in ((here, there), (there, here), (there, there)):
        assert torch.equal(reader.decompress(writer.compress(x, verify=False)).cpu(), x)


def test_given_everything_x_returns() -> None:
    model = selfvae.build("selfvae-quincunx", "tiny", (3, 16, 16)).cuda()
    x = photograph(16, 16)
    values = infer(model, x)
    assert torch.equal(complete(model, values)["y0"].cpu(), x)


@pytest.mark.parametrize("name", ["srvae", "selfvae-quincunx"])
def test_graphed_steps_are_the_eager_ones(name: str) -> None:
    """Five steps by CUDA graphs and eagerly, from the same weights: the same losses.

    With latents only nearly: the draws inside a graph are others.
    """
    curves = []
    torch.manual_seed(0)
    fresh = selfvae.build(name, "tiny", (3, 32, 32)).cuda()
    x = torch.cat([photograph(32, 32).roll(8 * i, 3) for i in range(16)]).cuda()
    fresh.initialise(x)
    for graphs in (False, True):
        config = TrainConfig(batch_size=8, lr=1e-3, warmup=0, precision="32-true", cuda_graphs=graphs)
        fabric = Fabric(accelerator="cuda", devices=1, precision="32-true")
        model, state = prepare(copy.deepcopy(fresh).train(), fabric, config)
        losses = []
        for step in range(5):
            torch.manual_seed(step)
            terms, _ = make_step(fabric, model, state, x[8 * (step % 2) :][:8], config)
            state.step += 1
            losses.append(-terms.elbo.mean().item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-3 if name == "selfvae-quincunx" else 0.02)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("model", ["vae", "selfvae-quincunx"])
def test_training_and_resuming(tmp_path: Path, model: str) -> None:
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (64, 3, 16, 16), np.uint8))
    command = [sys.executable, "-m", "selfvae.cli", "train", "--out", str(tmp_path / "run")]
    flags = ["--model", model, "--size", "tiny", "--data", str(tmp_path / "a.npy"), "--batch-size", "8"]
    subprocess.run([*command, *flags, "--steps", "6", "--log-every", "3"], check=True, timeout=300)
    subprocess.run([*command, "--resume", "--steps", "12"], check=True, timeout=300)
    assert selfvae.load(tmp_path / "run").has_latents == (model == "vae")
    assert "12," in (tmp_path / "run/log.csv").read_text()
