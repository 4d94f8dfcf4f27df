"""Scores of strangeness, and how well they tell."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import selfvae
from selfvae.cli import main
from selfvae.data.batches import Images
from selfvae.distributed import distributed_map
from selfvae.metrics.baselines import lossless_bits
from selfvae.metrics.ood import ALTERED, auroc, evaluate_ood, scores


def build(name: str, images: torch.Tensor) -> selfvae.SelfVAE:
    model = selfvae.build(name, "tiny", tuple(images.shape[1:]), width=0.06, components=2)  # type: ignore[arg-type]
    model.initialise(images)
    return model


@pytest.mark.parametrize("name", ["vae-normal", "srvae", "selfvae-halve"])
def test_scores_are_the_terms(name: str, images: torch.Tensor) -> None:
    model = build(name, images)
    torch.manual_seed(1)
    found = scores(model, images, batch_size=4)
    torch.manual_seed(1)
    (terms,) = distributed_map(model, [images])
    assert torch.allclose(found["nll"], -terms.elbo.double(), rtol=1e-5)
    assert torch.allclose(found["re0"], terms.re[0].double())
    assert ("kl0" in found) == model.levels[0].has_latent
    if name == "srvae":
        rest = found["re1"] + found["kl1"]
        assert torch.allclose(found["ratio"], found["re0"] + found["kl0"] - rest)
    bits = lossless_bits(images, "PNG").double()
    assert torch.allclose(found["nll"] - found["nll-png"], bits * math.log(2))


def test_auroc_against_all_pairs() -> None:
    torch.manual_seed(0)
    inside, outside = torch.randint(0, 9, (40,)).double(), torch.randint(3, 12, (30,)).double()
    difference = outside[:, None] - inside
    expected = ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()
    assert auroc(inside, outside) == pytest.approx(expected)
    assert auroc(inside, inside) == pytest.approx(0.5)
    assert auroc(inside, inside + 100) == 1.0


def test_altered_sets(images: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    made = {name: alter(images, 255, generator) for name, alter in ALTERED.items()}
    assert all(x.shape == images.shape and x.dtype == torch.uint8 for x in made.values())
    assert torch.equal(255 - made["inverted"], images)
    assert bool((made["constant"] == made["constant"][:, :, :1, :1]).all())
    assert torch.equal(made["rotated"][:, :, 0, 0], images[:, :, 0, -1])


def test_a_model_that_knows_smooth_images_finds_noise(images: torch.Tensor) -> None:
    model = build("selfvae-halve", images)
    optimizer = torch.optim.Adamax(model.parameters(), 0.01)
    for _ in range(30):
        loss = -model(images).elbo.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = evaluate_ood(model, Images(images.numpy()), {"noise": None, "own": Images(images.numpy())})
    assert result["images"] == 4
    assert result["noise"]["nll"] == 1.0 and result["own"]["nll"] == 0.5
    assert result == evaluate_ood(
        model, Images(images.numpy()), {"noise": None, "own": Images(images.numpy())}
    )
    with pytest.raises(ValueError, match=r"must hold images of \(3, 16, 16\).*got \(3, 8, 8\)"):
        evaluate_ood(model, Images(images.numpy()), {"small": Images(images[:, :, :8, :8].numpy())})
    with pytest.raises(ValueError, match="unknown out-set 'nosie'"):
        evaluate_ood(model, Images(images.numpy()), {"nosie": None})
    with pytest.raises(ValueError, match="at least 2 images"):
        evaluate_ood(model, Images(images.numpy()), {}, limit=1)


def test_command(tmp_path: Path, images: torch.Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    selfvae.save(build("srvae", images), tmp_path / "run")
    np.save(tmp_path / "a.npy", images.repeat(5, 1, 1, 1).numpy())
    flags = ["ood", str(tmp_path / "run"), "--data", str(tmp_path / "a.npy"), "--ood-data", "inverted"]
    assert main([*flags, str(tmp_path / "a.npy"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 3 and set(result) == {"images", "inverted", str(tmp_path / "a.npy")}
    assert main(flags) == 0
    assert "AUROC, 3 images" in capsys.readouterr().out
    assert main([*flags, "nowhere"]) == 2
    assert "no data at nowhere" in capsys.readouterr().err


def test_the_global_random_state_is_left_alone(images: torch.Tensor) -> None:
    model = build("vae-normal", images)
    before = torch.random.get_rng_state()
    evaluate_ood(model, Images(images.numpy()), {"noise": None})
    assert torch.equal(torch.random.get_rng_state(), before)
