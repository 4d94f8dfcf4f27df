"""Levels whose pixels depend on those before them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import selfvae
from selfvae.codec import Codec
from selfvae.distributions.autoregressive import AutoregressiveMixture
from selfvae.distributions.pixels import PixelMixture
from selfvae.export import DecoderPart
from selfvae.model import SelfVAE, describe
from selfvae.nn.autoregressive import Wave, waves
from selfvae.operations import complete, enhance, generate

SUBPIXEL = {"latents": "none", "backbone": "residual", "subpixel": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "quincunx": ("selfvae-quincunx", {}),
    "halve": ("selfvae-halve", {"autoregressive": 3}),
    "top": ("selfvae-quincunx", {"transforms": ("checkerboard",), "top_autoregressive": 9}),
    "shared": ("selfvae-quincunx", {"shared": True}),
    "latent": ("selfvae-quincunx", {"latents": "top", "prior": "normal"}),
    "prior": ("selfvae-quincunx", {"latents": "top", "prior": "flow-autoregressive"}),
    "means": ("selfvae", SUBPIXEL),
    "alternating": ("selfvae", {**SUBPIXEL, "autoregressive": 1}),
    "kept": ("selfvae-quincunx", {"transforms": ("subsample2", "subsample2"), "autoregressive": 1}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, images: Tensor) -> SelfVAE:
    """A model in float64, whose parameters are not near their start."""
    name, options = MODELS[request.param]
    options = {"width": 0.06, "components": 2, "autoregressive": 5, **options}
    model = selfvae.build(name, "tiny", tuple(images.shape[1:]), **options)  # type: ignore[arg-type]
    model.initialise(images)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval().double()


def levels(model: SelfVAE, x: Tensor) -> list[tuple[Tensor, AutoregressiveMixture]]:
    """y[k] and its distribution, of the autoregressive levels."""
    ys, out = model.pyramid(x), []
    for k, level in enumerate(model.levels):
        if level.autoregressive:
            y_up = ys[k + 1] if k + 1 < len(ys) else ys[k][:, :0]
            z = level.posterior(ys[k]).mode() if level.has_latent else None
            mixture = level.likelihood(y_up, z)
            assert isinstance(mixture, AutoregressiveMixture)
            out.append((ys[k], mixture))
    assert out
    return out


def test_a_window_holds_earlier_waves_only() -> None:
    for height, width, radius in ((1, 1, 1), (4, 7, 1), (5, 3, 2), (9, 9, 3), (4, 5, 0)):
        number = torch.full((height, width), -1)
        for i, (rows, cols) in enumerate(waves(height, width, radius)):
            assert (number[rows, cols] == -1).all()
            number[rows, cols] = i
        if radius == 0:  # the window is empty
            assert (number == 0).all()
            continue
        for row in range(height):
            for col in range(width):
                left = max(0, col - radius)
                above = number[max(0, row - radius) : row, left : col + radius + 1]
                assert (above < number[row, col]).all()
                assert (number[row, left:col] < number[row, col]).all()


def test_the_waves_multiply_to_the_score(model: SelfVAE, images: Tensor) -> None:
    for y, mixture in levels(model, images):
        true, total = mixture.support.split(y).long(), torch.zeros(len(y), dtype=torch.float64)

        def known(
            part: PixelMixture, group: int, wave: Wave, true: Tensor = true, total: Tensor = total
        ) -> Tensor:
            v = true[:, group][(..., *wave)][:, None, :, None]
            for channel in range(v.shape[2]):
                mass = part.log_pmf(v, 0, channel)
                total.add_(mass.gather(3, v[:, 0, channel, ..., None]).flatten(1).sum(1))
            return v[:, 0]

        assert torch.equal(mixture.fill(torch.zeros_like(true), known), true)
        torch.testing.assert_close(total, mixture.log_prob(y), rtol=1e-9, atol=1e-9)


def test_a_pixel_sees_only_those_before_it(model: SelfVAE, images: Tensor) -> None:
    for y, mixture in levels(model, images[:1]):
        true = mixture.support.split(y).long()
        before = mixture.given(y).offsets
        for group in range(true.shape[1]):
            h, w = true.shape[3:]
            row, col = h // 2, w // 2
            changed = true.clone()
            changed[:, group, :, row, col] = 255 - changed[:, group, :, row, col]
            differs = (mixture.given(mixture.support.merge(changed).to(torch.uint8)).offsets != before)[0]
            differs = differs.flatten(1, 2).any(1)  # groups, rows, columns
            assert not differs[:group].any()
            if mixture.decoder.radius == 0:
                assert not differs[group].any()
                for later in differs[group + 1 :]:  # on all sides
                    assert later[max(0, row - 1) : row + 2, max(0, col - 1) : col + 2].all()
                continue
            assert not differs[group, :row].any() and not differs[group, row, : col + 1].any()
            if h > 1 and w > col + 1:
                assert differs[group, row, col + 1]


@pytest.mark.parametrize("decode", ["sample", "mode", "mean"])
def test_draws_agree_with_what_is_given(model: SelfVAE, images: Tensor, decode: Any) -> None:
    drawn = generate(model, 2, 16, 16, seed=1, decode=decode)
    assert torch.equal(drawn, generate(model, 2, 16, 16, seed=1, decode=decode))
    ys = model.pyramid(images)
    if len(ys) > 1:
        x = enhance(model, ys[1], seed=2, decode=decode)
        assert torch.equal(model.levels[0].transform(x), ys[1])
    given = {f"y{k}": y for k, y in enumerate(ys)}
    assert torch.equal(complete(model, given)["y0"], images)


def test_pixels_of_a_draw_depend_on_each_other(images: Tensor) -> None:
    """A model that copies the pixel to the left draws rows of one value."""
    model = selfvae.build(
        "selfvae", "tiny", (1, 8, 8), autoregressive=3, components=1, width=0.06, **SUBPIXEL
    )
    model.initialise(torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8))
    level, group = model.levels[0], model.levels[0].decoder.groups[0]
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        group.own.direction[0, 0, 1, 0] = 1.0  # the left neighbour's difference from its estimate
        group.own.gain[0] = 1.0
        head = group.layers[-1]
        head.direction[1, 0] = 1.0  # one component: its weight, its mean, its scale
        head.gain[1] = 1.0
        head.bias[2] = -30.0
    y = torch.full((1, 1, 4, 4), 100, dtype=torch.uint8)
    mixture = level.likelihood(y, None)
    v = torch.zeros(1, 4, 1, 4, 4, dtype=torch.long)
    first: list[int] = []

    def draw(part: PixelMixture, at: int, wave: Wave) -> Tensor:
        if at == 0 and not first:
            first.append(1)
            return torch.full((1, 1, 1, 1), 130)
        return part.mode().long()

    assert isinstance(mixture, AutoregressiveMixture)
    mixture.fill(v, draw)
    assert (v[0, 0, 0, 0] > 120).all() and (v[0, 0, 0, 1:] == 100).all()


def test_the_groups_alternate(images: Tensor) -> None:
    """The first half of the groups lie on one colour of a checkerboard; other models keep their order."""
    place = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    for kernel, order in ((0, [0, 1, 2, 3]), (1, [0, 3, 1, 2]), (3, [0, 1, 2, 3])):
        model = selfvae.build("selfvae", "tiny", (3, 16, 16), autoregressive=kernel, **SUBPIXEL)
        model.initialise(images)
        support = model.levels[0].likelihood(place[..., :1, :1], None).support
        assert support.split(place)[0, :, 0, 0, 0].tolist() == order
        assert torch.equal(support.merge(support.split(place)), place)


def test_files_come_back(model: SelfVAE) -> None:
    codec = Codec(model.float())
    for size in ((16, 16), (13, 5)):
        x = torch.randint(0, 256, (1, 3, *size), generator=torch.Generator().manual_seed(0)).byte()
        assert torch.equal(codec.decompress(codec.compress(x)), x)


def test_what_it_cannot_do_says_so(images: Tensor) -> None:
    wrong = {"integer": True}, {"backbone": "dense", "latents": "all"}, {"autoregressive": 4}
    for options in (*wrong, {"top_autoregressive": 33}, {"top_autoregressive": 1}):
        with pytest.raises(ValueError, match="autoregressive"):
            selfvae.build("selfvae-quincunx", "tiny", **{"autoregressive": 5, **options})
    for options in ({"consistent": False}, {"transforms": ("bicubic2",)}):
        with pytest.raises(ValueError, match="autoregressive"):
            selfvae.build("selfvae", "tiny", autoregressive=1, **{**SUBPIXEL, **options})
    model = selfvae.build("selfvae-quincunx", "tiny", (3, 16, 16), autoregressive=3)
    model.initialise(images)
    assert "pixel after pixel" in describe(model)[0]
    alternating = selfvae.build("selfvae", "tiny", autoregressive=1, **SUBPIXEL)
    assert "group after group" in describe(alternating)[0] and "after" not in describe(alternating)[1]
    with pytest.raises(ValueError, match="autoregressive"):
        DecoderPart(model)
    with pytest.raises(ValueError, match="autoregressive"):
        model(images, errors=True)
