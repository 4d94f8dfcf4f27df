"""Every operation for every kind of hierarchy, sizes that nothing divides, and the names of variables."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import selfvae
from selfvae import operations
from selfvae.model import SelfVAE
from selfvae.operations import complete, enhance, generate, infer, interpolate, names, reconstruct, vary
from selfvae.presets import PRESETS, TRANSFORMS
from selfvae.tiling import tiled

TINY = {"size": "tiny", "width": 0.06, "components": 2, "image_shape": (3, 16, 16)}
CHAINS = ("selfvae-halve", "selfvae-quincunx")
WITH_LATENTS = [name for name in PRESETS if name not in CHAINS]


def build(name: str, images: torch.Tensor, **overrides: object) -> SelfVAE:
    model = selfvae.build(name, **{**TINY, **overrides})  # type: ignore[arg-type]
    model.initialise(images)
    return model


@pytest.fixture
def odd() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 19, 29), dtype=torch.uint8)


@pytest.mark.parametrize("tile", [0, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*PRESETS, "selfvae, whole numbers"])
def test_every_operation_at_an_odd_size(
    name: str, tile: int, images: torch.Tensor, odd: torch.Tensor
) -> None:
    """K = 0, 1, 2 and a long chain; whole and in tiles."""
    name, rounded, _ = name.partition(",")
    options = {"posterior": "uniform", "prior": "logistic"} if rounded else {}
    if name == "vae-mog":
        options = {"prior": "mog-local"}  # the other has one size
    model = build(name, images, **options)
    if tile:
        model = tiled(model, tile, 8)
    assert generate(model, 2, 19, 29, seed=1).shape == odd.shape
    assert torch.equal(reconstruct(model, odd, "x"), odd)
    if len(model.levels) > 1:
        y = infer(model, odd, "y1")["y1"]
        x = enhance(model, y, seed=1)
        rows, cols = model.scale(1)
        assert x.shape == (2, 3, y.shape[2] * rows, y.shape[3] * cols)
        if model.levels[0].level.consistent if tile else model.levels[0].consistent:
            assert torch.equal(model.levels[0].transform(x), y)
        drawn = reconstruct(model, odd, "CG", seed=1)
        assert torch.equal(drawn, x[:, :, :19, :29])  # the same operation by its other name
    if name in WITH_LATENTS:
        for given in ("RS1", "RS", {"z0"}):
            again = reconstruct(model, odd, given, seed=2)
            assert again.shape == odd.shape and again.dtype == torch.uint8
            assert torch.equal(again, reconstruct(model, odd, given, seed=2))
        varied = vary(model, odd, 3, seed=3)
        assert varied.shape == (2, 3, *odd.shape[1:])
        assert not torch.equal(varied[:, 0], varied[:, 1])
        frames = interpolate(model, odd, odd.flip(3), 3, seed=4)
        assert frames.shape == (2, 3, *odd.shape[1:])


@pytest.mark.parametrize("transform", list(TRANSFORMS))
def test_one_pixel_with_every_transform(transform: str, images: torch.Tensor) -> None:
    side = 24 if transform.endswith("3") else 16
    picture = torch.nn.functional.interpolate(images, side)
    model = build("selfvae", picture, transforms=(transform,), prior="normal", image_shape=(3, side, side))
    dot = picture[:, :, :1, :1]
    assert torch.equal(reconstruct(model, dot, "x"), dot)
    assert reconstruct(model, dot).shape == dot.shape
    assert generate(model, 1, 1, 1).shape == (1, 3, 1, 1)
    level = model.levels[0]
    y = torch.randint(
        0, level.transform.output_spec(level.spec).num_values, (2, 3, 1, 1), dtype=torch.uint8
    )
    y = y[:, : level.transform.output_spec(level.spec).channels]
    for how in ({}, {"temperature": 0.3}, {"decode": "mode"}, {"decode": "mean"}):
        x = enhance(model, y, **how)
        assert x.shape[2:] == level.transform.scale
        if level.transform.support(y, level.spec).restricts:
            rows = level.transform.block[0] // level.transform.scale[0]  # a checkerboard takes two
            assert torch.equal(level.transform(x.repeat_interleave(rows, 2))[:, :, :1], y)


@pytest.mark.parametrize(
    ("transform", "side"), [("mean1x2", 32), ("mean3", 48), ("bicubic3", 48), ("grey+mean2", 32)]
)
def test_odd_sizes_where_strides_differ(transform: str, side: int) -> None:
    x = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    model = build("selfvae", x, transforms=(transform,), prior="mog-local", image_shape=(3, side, side))
    (rows, cols), channels = model.scale(1), model.levels[1].spec.channels
    for n in (1, 5, 9):
        y = torch.randint(0, 256, (2, channels, n, n), dtype=torch.uint8)
        assert enhance(model, y).shape == (2, 3, n * rows, n * cols)
        assert reconstruct(model, x[:, :, : n + 1, :n]).shape == (2, 3, n + 1, n)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_channels(channels: int, images: torch.Tensor) -> None:
    x = images[:, :1].repeat(1, channels, 1, 1)[:, :, :7, :9]
    model = build(
        "selfvae", x.repeat(1, 1, 2, 2)[:, :, :8, :16], image_shape=(channels, 8, 16), prior="mog-local"
    )
    assert reconstruct(model, x).shape == x.shape
    assert vary(model, x, 2).shape == (4, 2, channels, 7, 9)


def test_variations_belong_to_their_images(images: torch.Tensor) -> None:
    kept = vary(build("selfvae", images), images, 3, "x")
    assert torch.equal(kept, images[:, None].expand(-1, 3, -1, -1, -1))


def test_names_and_aliases(images: torch.Tensor) -> None:
    three = build("selfvae-mean-3lvl", images)
    assert operations.variables(three) == ["z2", "y2", "z1", "y1", "z0", "y0"]
    for given, expected in {
        "generation": [],
        "": [],
        "u": ["z2"],
        "variation": ["z2"],
        "RS1": ["z2"],
        "RS2": ["z2", "z1"],
        "rs3": ["z2", "z1", "z0"],
        "reconstruction": ["z2", "z1", "z0"],
        "CR": ["y1", "z0"],
        "conditional_reconstruction": ["y1", "z0"],
        "Conditional generation": ["y1"],
        "super-resolution": ["y1"],
        "super_resolution": ["y1"],
        "conditional-generation": ["y1"],
        "u, z0": ["z2", "z0"],
        "x": ["y0"],
    }.items():
        assert names(three, given) == expected
    assert names(three, {"RS1", "y1"}) == ["z2", "y1"]
    plain = build("vae-normal", images)
    assert names(plain, "RS1") == ["z0"]
    for wrong in ("RS2", "CR", "y1", "z1", "nonsense"):
        with pytest.raises(ValueError, match=f"unknown variable '{wrong}': this model has z0, y0"):
            names(plain, wrong)
    with pytest.raises(ValueError, match=r"operations are generation, reconstruction, rs, .*, x, rs1$"):
        names(plain, "CR")
    chain = build("selfvae-halve", images)
    with pytest.raises(ValueError, match=r"unknown variable 'u': .* \(and no latents\)"):
        vary(chain, images, 2)
    assert names(chain, "CG") == ["y1"]


def test_an_image_brings_what_it_determines(images: torch.Tensor) -> None:
    model = build("selfvae-mean-3lvl", images)
    assert set(infer(model, images, "CR")) == {"z2", "y2", "z1", "y1", "z0"}
    assert set(infer(model, images, "RS2")) == {"z2", "z1"}
    assert set(infer(model, images)) == set(operations.variables(model))
    values = infer(model, images, "y1")
    assert torch.equal(values["y2"], model.pyramid(images)[2])


def test_what_is_given_is_kept(images: torch.Tensor) -> None:
    model = build("srvae", images)
    values = infer(model, images)
    drawn = complete(model, {"u": values["z1"], "z0": values["z0"]}, seed=0)
    assert torch.equal(drawn["z1"], values["z1"]) and torch.equal(drawn["z0"], values["z0"])
    assert drawn["y0"].shape == images.shape  # the model's own size, the latents' number
    assert torch.equal(complete(model, {"x": images})["y0"], images)
    assert complete(model, {"y1": values["y1"]})["y0"].shape == images.shape


def test_temperature_by_variable_and_modes(images: torch.Tensor) -> None:
    model = build("selfvae-mean-3lvl", images)
    cold = [generate(model, 1, temperature=0.0, seed=s) for s in (1, 2)]
    assert torch.equal(*cold)
    values = infer(model, images, "RS")
    fixed = [complete(model, values, decode="mode", seed=s)["y0"] for s in (1, 2)]
    assert torch.equal(*fixed)
    free = [complete(model, {}, (2, 16, 16), decode="mode", seed=s) for s in (1, 2)]
    assert not torch.equal(free[0]["z2"], free[1]["z2"])  # latents are drawn as ever
    calm = [complete(model, values, temperature={"y2": 0, "y1": 0, "y0": 0}, seed=s)["y0"] for s in (1, 2)]
    assert torch.equal(calm[0], fixed[0]) and torch.equal(calm[1], fixed[0])
    only = [complete(model, values, temperature={"y2": 0}, seed=s) for s in (1, 2)]
    assert torch.equal(only[0]["y2"], only[1]["y2"]) and not torch.equal(only[0]["y1"], only[1]["y1"])
    with pytest.raises(ValueError, match="finite and 0 or more; got -1"):
        generate(model, 1, temperature=-1)
    with pytest.raises(ValueError, match="'sample', 'mode' or 'mean'; got 'best'"):
        generate(model, 1, decode="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown variable 'y7'"):
        generate(model, 1, temperature={"y7": 1.0})


def test_seeds_leave_the_global_state_alone(images: torch.Tensor) -> None:
    model = build("selfvae", images)
    before = torch.get_rng_state()
    vary(model, images, 2, seed=3)
    interpolate(model, images, images.flip(3), 2, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_interpolations_end_at_both_images(images: torch.Tensor) -> None:
    """The ends are reconstructions from the posterior means; a line and an arc differ between them."""
    model = build("vae-normal", images)
    a, b = images[:2], images[2:]
    line = interpolate(model, a, b, 5, "u", decode="mode", seed=0)
    arc = interpolate(model, a, b, 5, "u", spherical=True, decode="mode", seed=0)
    for x, end in ((a, 0), (b, -1)):
        expected = reconstruct(model, x, "u", temperature=0.0)
        for strip in (line, arc):
            off = (strip[:, end].int() - expected.int()).abs()
            assert off.max() <= 1
    assert not torch.equal(line[:, 2], arc[:, 2])
    still = interpolate(model, a, a, 3, seed=1)
    assert torch.equal(still[:, 0], still[:, 1])  # the same noise at every step
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert torch.allclose(operations._slerp(a, b, 0.5), torch.tensor([[math.sqrt(0.5)] * 2]))
    assert torch.equal(operations._slerp(a, a, 0.5), a)
    with pytest.raises(ValueError, match="only latents are interpolated"):
        interpolate(build("selfvae", images), images, images, 3, "CR")
    with pytest.raises(ValueError, match="one shape"):
        interpolate(model, images, images[:, :, :8], 3)


def test_errors(images: torch.Tensor) -> None:
    model = build("selfvae", images)
    with pytest.raises(ValueError, match=r"y1 must be uint8 \(B, 3, H, W\); got uint8 \(4, 1, 16, 16\)"):
        enhance(model, images[:, :1])
    with pytest.raises(ValueError, match="y1 must be 8 x 8 pixels for images of 16 x 16; got 4 x 4"):
        complete(model, {"y1": images[:, :, :4, :4]}, (4, 16, 16))
    with pytest.raises(ValueError, match="at least one image of 1 x 1 pixel"):
        generate(model, 0)
    with pytest.raises(ValueError, match="stands for 2 variables"):
        complete(model, {"RS2": images})
    with pytest.raises(ValueError, match=r"z1 must be \(2, 16, 4, 4\) for images of 16 x 16; got"):
        complete(model, {"z1": torch.zeros(2, 16, 3, 5)})
    with pytest.raises(ValueError, match=r"y1 must be uint8 \(B, 3, H, W\); got uint8 \(3, 8, 8\)"):
        complete(model, {"y1": images[0, :, :8, :8]})
    with pytest.raises(ValueError, match="computes no image"):
        enhance(build("vae-normal", images), images)
    with pytest.raises(ValueError, match="at least one image and pixel"):
        reconstruct(model, images[:0])


# --- tiles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["selfvae-mean-3lvl", "selfvae-grey", *CHAINS])
def test_tiles_with_all_the_context_are_the_whole(name: str, images: torch.Tensor) -> None:
    model = build(name, images)
    x = images.repeat(1, 1, 3, 2)[:2, :, :41, :30]
    parts = tiled(model, 16, 64)
    y = infer(model, x, "y1")["y1"]
    whole, tiles = (enhance(m, y, temperature=0.0) for m in (model, parts))
    off = (whole.int() - tiles.int()).abs()
    assert (off > 0).float().mean() < 0.01  # a rounding, now and then
    if name not in CHAINS:
        a, b = (infer(m, x, "RS", temperature=0.0) for m in (model, parts))
        assert all(torch.allclose(a[z], b[z], atol=1e-5) for z in a)


@pytest.mark.parametrize("name", CHAINS)
def test_tiles_of_enough_context_are_the_whole(name: str, images: torch.Tensor) -> None:
    """Residual blocks reach only so far: a margin beyond it changes nothing, though no tile sees all."""
    model = build(name, images)
    for level in model.levels:
        for p in level.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
    y = infer(model, images.repeat(1, 1, 6, 8)[:1], "y2")["y2"]
    whole, near, short = (
        enhance(m, y, 2, temperature=0.0).int() for m in (model, tiled(model, 16, 32), tiled(model, 16, 0))
    )
    assert ((whole - near).abs() > 0).float().mean() < 0.001
    assert ((whole - short).abs() > 0).float().mean() > 0.001


def test_progress_is_shown_over_variables_and_steps(images: torch.Tensor) -> None:
    model, seen = build("selfvae", images), []

    def track(steps, text):  # type: ignore[no-untyped-def]
        for step in steps:
            seen.append((text, step))
            yield step

    complete(model, {}, (1, 16, 16), track=track)
    interpolate(model, images[:1], images[1:2], 3, track=track)
    assert seen == [("variables", name) for name in operations.variables(model)] + [
        ("steps", i) for i in range(3)
    ]


def test_tiles_report_progress_and_keep_memory_bounded(images: torch.Tensor) -> None:
    model = build("selfvae-halve", images)
    seen: dict[str, int] = {}

    def track(tiles, name):  # type: ignore[no-untyped-def]
        seen[name] = len(tiles)
        return tiles

    generate(tiled(model, 16, 4, track), 1, 64, 48, seed=0)
    assert seen["y0"] == 12 and seen["y1"] == 8 and seen["y2"] == 4
    shapes = []
    hook = model.levels[0].decoder.register_forward_hook(lambda m, i, out: shapes.append(out.shape[2:]))
    generate(tiled(model, 16, 4), 1, 64, 48)
    hook.remove()
    assert max(h for h, _ in shapes) <= 24
    with pytest.raises(ValueError, match="tile must be at least 1"):
        tiled(model, 0)


def test_images_of_fewer_levels_are_checked(images: torch.Tensor) -> None:
    model = selfvae.build("selfvae-bits", "tiny", (3, 16, 16), width=0.06, components=2)
    with pytest.raises(ValueError, match="y1 must hold values of 0 to 7; got"):
        selfvae.enhance(model, images)
    with pytest.raises(ValueError, match="x must hold values of 0 to 7; got"):
        selfvae.build("vae", "tiny", (3, 16, 16), num_values=8, width=0.06)(images)
    with pytest.raises(ValueError, match="at least one image and pixel"):
        selfvae.iwae(model, images[:0])


@pytest.mark.parametrize("prior", ["normal", "mog", "flow"])
def test_in_double_precision(prior: str, images: torch.Tensor) -> None:
    model = selfvae.build("selfvae", "tiny", (3, 16, 16), width=0.06, components=2, prior=prior).double()
    x = selfvae.generate(model, 2, seed=0)
    values = infer(model, x, "z1")
    assert complete(model, values)["y0"].shape == x.shape
    assert complete(model.float(), values)["y0"].shape == x.shape  # given in another precision


# --- random numbers --------------------------------------------------------------------------------------


def everything(model: SelfVAE, x: torch.Tensor, **how: object) -> list[torch.Tensor]:
    """A result of every operation, drawn one after the other."""
    y = model.pyramid(x)[1]
    return [
        generate(model, 2, **how), enhance(model, y, **how), reconstruct(model, x, **how),
        vary(model, x, 2, **how), interpolate(model, x, x.flip(3), 2, **how),
        *infer(model, x, **how).values(), *complete(model, {"y1": y}, **how).values(),
    ]  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(
    ("prior", "tile"), [("normal", 0), ("mog", 0), ("flow", 0), ("logistic", 0), ("flow", 16)]
)
def test_generators_and_seeds(prior: str, tile: int, images: torch.Tensor) -> None:
    """A generator continues, a seed starts one; torch's global random state is left alone by both."""
    uniform = {"posterior": "uniform"} if prior == "logistic" else {}
    model = build("selfvae", images, prior=prior, **uniform)
    model = tiled(model, tile, 8) if tile else model
    before = torch.get_rng_state()
    first, second = (everything(model, images, generator=g) for g in [torch.Generator().manual_seed(3)] * 2)
    again = everything(model, images, generator=torch.Generator().manual_seed(3))
    seeded = everything(model, images, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[:5], second[:5], strict=True))
    assert torch.equal(first[0], seeded[0])
    with pytest.raises(ValueError, match="exclude each other"):
        generate(model, 1, seed=1, generator=torch.Generator())


def test_a_seed_draws_what_the_global_state_would(images: torch.Tensor) -> None:
    """So that figures made with seeds before stay what they are."""
    model = build("selfvae-mean-3lvl", images)
    for draw in (
        lambda **how: generate(model, 2, **how),
        lambda **how: vary(model, images, 2, **how),
        lambda **how: enhance(model, model.pyramid(images)[1], **how),
    ):
        torch.manual_seed(5)
        expected = draw()
        assert torch.equal(draw(seed=5), expected)


def test_threads_do_not_disturb_each_other(images: torch.Tensor) -> None:
    model = build("selfvae", images).eval()
    alone = [generate(model, 4, seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda seed: generate(model, 4, seed=seed), range(6)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
