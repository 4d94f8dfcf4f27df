import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from selfvae.data.crops import photo
from selfvae.presets import TRANSFORMS, transform
from selfvae.transforms import (
    BicubicDownscale,
    BitDepth,
    Chain,
    Checkerboard,
    GaussianBlur,
    Greyscale,
    ImageSpec,
    Jpeg,
    MeanDownscale,
    Null,
    Sketch,
    Subsample,
    Support,
    check_image,
)
from selfvae.transforms.base import round_up, scale_slice

RGB = ImageSpec(3)
NAMES = [*TRANSFORMS, "grey+mean2", "mean2+bits3"]
RESTRICTING = [n for n in TRANSFORMS if n.startswith(("mean", "subsample", "bits"))]
RESTRICTING += ["grey", "rows", "columns", "checkerboard", "staggered"]


def noise(b: int = 5, c: int = 3, h: int = 12, w: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (b, c, h, w), dtype=torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_for_any_batch_size(name: str) -> None:
    d, x = transform(name), noise()
    y = d(x)
    assert y.dtype == torch.uint8
    assert y.shape == (5, d.output_spec(RGB).channels, *d.size(12, 24))
    assert torch.equal(y, torch.cat([d(one[None]) for one in x]))
    assert y.max().item() < d.output_spec(RGB).num_values


@pytest.mark.parametrize("name", NAMES)
def test_estimate_has_the_images_shape(name: str) -> None:
    d, x = transform(name), noise()
    guess = d.estimate(d(x), RGB)
    assert guess.shape == x.shape and guess.dtype == torch.float32
    assert guess.min() >= -1 and guess.max() <= 256


@pytest.mark.parametrize("name", RESTRICTING)
def test_support_is_a_bijection_and_holds_the_image(name: str) -> None:
    d, x = transform(name), noise()
    support = d.support(d(x), RGB)
    v = support.split(x)
    assert torch.equal(support.merge(v), x)
    lo, hi = support.bounds(v.long())
    assert bool(((lo <= v) & (v <= hi)).all())
    assert bool(support.allows(x).all())
    other = x.clone()
    other[:, 0, 0, 0] ^= 128
    assert not bool(support.allows(other).any())


@pytest.mark.parametrize("name", RESTRICTING)
@pytest.mark.parametrize("end", ["lo", "hi", "random"])
def test_every_way_to_fill_the_bounds_gives_y(name: str, end: str) -> None:
    d, x = transform(name), noise()
    x[0], x[1] = 0, 255
    y = d(x)
    support = d.support(y, RGB)
    v = torch.zeros_like(support.split(x).long())
    for g, c in itertools.product(range(v.shape[1]), range(v.shape[2])):
        lo, hi = (edge[:, g, c] for edge in support.bounds(v))
        assert bool((lo <= hi).all())
        spread = (torch.rand(lo.shape) * (hi - lo + 1)).long().clamp(max=255)
        v[:, g, c] = {"lo": lo, "hi": hi, "random": torch.minimum(lo + spread, hi)}[end]
    assert torch.equal(d(support.merge(v).to(torch.uint8)), y)


@pytest.mark.parametrize("name", RESTRICTING)
def test_bounds_look_only_at_earlier_entries(name: str) -> None:
    d, x = transform(name), noise(b=2)
    support = d.support(d(x), RGB)
    v = support.split(x).long()
    for g, c in itertools.product(range(v.shape[1]), range(v.shape[2])):
        later = v.clone()
        later[:, g, c:] = 7
        later[:, g + 1 :] = 7
        for one, other in zip(support.bounds(v), support.bounds(later), strict=True):
            assert torch.equal(one[:, g, c], other[:, g, c])


def test_bounds_are_tight() -> None:
    """Exhaustively on few levels: a value is in the interval iff it can be completed to d(x) = y."""
    levels = 5
    every = torch.tensor(list(itertools.product(range(levels), repeat=4)), dtype=torch.uint8)
    x = every.view(-1, 1, 2, 2)
    d = MeanDownscale(2)
    for y in range(levels):
        possible = every[d(x).flatten() == y]
        support = d.support(torch.tensor([[[[y]]]], dtype=torch.uint8), ImageSpec(1, levels))
        for prefix in {tuple(row[:3].tolist()) for row in possible}:
            v = torch.tensor([*prefix, 0]).view(1, 4, 1, 1, 1)
            lo, hi = (edge.flatten()[3].item() for edge in support.bounds(v))
            last = {int(row[3]) for row in possible if tuple(row[:3].tolist()) == prefix}
            assert last == set(range(int(lo), int(hi) + 1))


def test_a_refined_guess_ends_at_what_is_left() -> None:
    """Refined by all earlier phases, the guess at the last is the block's remainder, whatever it was."""
    d, x = MeanDownscale(2), noise()
    support = d.support(d(x), RGB)
    v = support.split(x).long()
    guess = support.refine(100 * torch.rand(v.shape), v)
    left = 4 * d(x).long() - v[:, :3].sum(1)
    assert torch.allclose(guess[:, 3], left.float(), atol=1e-3)
    assert (guess[:, 3] - v[:, 3]).abs().max() <= 2
    exact = support.refine(v.float(), v)  # a right guess hardly moves
    assert (exact - v).abs().max() <= 2


@pytest.mark.parametrize("name", ["columns", "rows", "subsample3", "checkerboard", "staggered"])
def test_kept_pixels_are_estimated_exactly_and_ramps_too(name: str) -> None:
    """Where y keeps pixels its estimate has them; on a ramp it has the others as well, off the border."""
    d = transform(name)
    x = (3 * torch.arange(24)[:, None] + 5 * torch.arange(24)).to(torch.uint8).expand(1, 3, 24, 24)
    if name == "staggered":
        x = Checkerboard()(x)
    y = d(x)
    off = d.estimate(y, RGB) - x
    assert off[:, :, 3:-3, 3:-3].abs().max() < 1e-4
    y = d(noise())
    support = d.support(y, RGB)
    guess = d.estimate(y, RGB)
    assert torch.equal(support.merge(support.split(guess)), guess)  # merge puts y where it was kept


def test_checkerboard_then_staggered_is_every_second_row_and_column() -> None:
    x = noise()
    y = Checkerboard()(x)
    assert torch.equal(y[:, :, 1], x[:, :, 1, 1::2])  # odd rows keep odd columns
    assert torch.equal(transform("staggered")(y), x[:, :, ::2, ::2])


def test_a_checkerboard_corrects_by_the_corners() -> None:
    """One wrong guess at an upper right pixel moves the lower left ones around it by their weights."""
    d, x = Checkerboard(), noise(b=1, c=2, h=8, w=8)
    format = ImageSpec(2)
    weights = torch.randn(1, d.weights(format), 4, 4)
    support = d.support(d(x), format, weights)
    known = support.split(x).float()
    missed = known.clone()
    missed[0, 0, 1, 2, 1] -= 10  # the guess at pixel (4, 3) of channel 1
    moved = (support.refine(missed, known) - missed)[0]
    expected = torch.zeros(2, 2, 4, 4)
    # its corners are the pixels (5, 4), (5, 2), (3, 4) and (3, 2)
    for corner, row, col in ((0, 2, 2), (1, 2, 1), (2, 1, 2), (3, 1, 1)):
        expected[1, 1, row, col] = 10 * torch.tanh(weights[0, 2 * corner + 1, row, col])
    assert torch.allclose(moved, expected, atol=1e-4)
    assert torch.equal(d.support(d(x), format).refine(missed, known), missed)


def test_interpolation_agrees_with_what_is_given() -> None:
    y = torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8)
    d, spec = transform("mean2"), ImageSpec(3)
    x = d.interpolate(y, spec)
    assert x.shape == (2, 3, 12, 16)
    assert torch.allclose(F.avg_pool2d(x, 2), y.float(), atol=1e-3)
    bicubic = F.interpolate(y.float(), scale_factor=2, mode="bicubic")
    shift = (x - bicubic).unfold(2, 2, 2).unfold(3, 2, 2)
    assert torch.allclose(shift, shift[..., :1, :1].expand_as(shift), atol=1e-3)
    x = torch.from_numpy(photo("coffee", 2)[None, :, :120, :160].copy())
    d = transform("bicubic2")
    plain, better = d.estimate(d(x), spec), d.interpolate(d(x), spec)
    assert better.shape == x.shape
    for far, near in (
        (plain - x, better - x),
        (d(plain.byte()) - d(x).float(), d(better.clamp(0, 255).byte()) - d(x).float()),
    ):
        assert near.square().mean() < 0.95 * far.square().mean()
    grey = transform("grey")
    assert torch.equal(grey.interpolate(y[:, :1], spec), grey.estimate(y[:, :1], spec))


def test_jpeg_is_what_a_jpeg_file_holds() -> None:
    x = torch.from_numpy(photo("coffee", 2)[None, :, :50, :75].copy())
    file = io.BytesIO()
    Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=75, subsampling="4:2:0")
    again = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None]
    d = transform("jpeg75")
    assert torch.equal(d(x), again) and not torch.equal(d(x), x)
    assert transform("jpeg50")(x[:, :1]).shape == (1, 1, 50, 75)
    both = transform("bicubic2+jpeg75")
    small = x[:, :, :48, :74]
    assert torch.equal(both(small), d(transform("bicubic2")(small)))
    assert torch.equal(
        both.interpolate(both(small), RGB), transform("bicubic2").interpolate(both(small), RGB)
    )
    for wrong, words in ((lambda: Jpeg(0), "1 to 95"), (lambda: d(x[:, :2]), "grey or RGB"),
                         (lambda: d.output_spec(ImageSpec(3, 8)), "256 values")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            wrong()


def test_a_checkerboard_needs_even_sides() -> None:
    with pytest.raises(ValueError, match="height divisible by 2 and a width divisible by 2; got 5 x 4"):
        Checkerboard()(noise(h=5, w=4))
    with pytest.raises(ValueError, match="got 6 x 4"):  # 3 rows of y
        Chain(MeanDownscale(2, 1), Checkerboard()).size(6, 4)


def test_grey_leaves_two_greens_at_most() -> None:
    x = noise(h=32, w=32)
    support = Greyscale().support(Greyscale()(x), RGB)
    lo, hi = support.bounds(support.split(x).long())
    assert support.order == (2, 0, 1)
    assert (hi - lo)[:, :, 2].max() <= 1


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_is_pillows(factor: int) -> None:
    x = noise(b=1, h=24, w=36)
    picture = Image.fromarray(x[0].permute(1, 2, 0).numpy())
    small = picture.resize((36 // factor, 24 // factor), Image.Resampling.BICUBIC)
    ours = BicubicDownscale(factor)(x)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(ours, np.asarray(small))


def test_values() -> None:
    x = torch.tensor([[[[10, 11], [12, 14]]]], dtype=torch.uint8)
    assert MeanDownscale(2)(x).item() == 12  # 47 / 4 = 11.75
    assert MeanDownscale(1, 2)(x).flatten().tolist() == [11, 13]  # 10.5 and 13 round half up
    assert Subsample(1, 2)(x).flatten().tolist() == [10, 12]
    assert BitDepth(3)(torch.full_like(x, 255)).unique().tolist() == [7]
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    for d in (Greyscale(), Sketch(), GaussianBlur(2.0)):
        assert d(white).unique().tolist() == [255]
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert Greyscale()(red).item() == 76
    assert Chain(Greyscale(), MeanDownscale(2))(white).shape == (1, 1, 4, 4)
    assert Null()(white).shape == (1, 0, 8, 8)


def test_blur_is_a_gaussian_and_keeps_the_mean() -> None:
    x = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    x[..., 16, 16] = 255
    y = GaussianBlur(1.0)(x).double()
    expected = 255 * torch.exp(-0.5 * (torch.arange(33) - 16.0) ** 2) / np.sqrt(2 * np.pi)
    assert (y[0, 0, 16] - expected / np.sqrt(2 * np.pi)).abs().max() < 1.5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 256), st.integers(0, 10**6))
def test_mean_of_any_block_and_levels(rows: int, cols: int, levels: int, seed: int) -> None:
    if rows * cols == 1:
        return
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(0, levels, (2, 1, rows * 2, cols * 3), generator=random).to(torch.uint8)
    d = MeanDownscale(rows, cols)
    support = d.support(d(x), ImageSpec(1, levels))
    assert bool(support.allows(x).all())


def test_errors_say_what_came() -> None:
    with pytest.raises(TypeError, match=r"x must be uint8 \(B, C, H, W\); got float32 .*to_uint8"):
        check_image(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"divisible by 2 .* got 7 x 8"):
        MeanDownscale(2)(noise(h=7, w=8))
    with pytest.raises(ValueError, match="3 channels"):
        Greyscale().output_spec(ImageSpec(1))
    with pytest.raises(ValueError, match="did you mean 'mean2'"):
        transform("maen2")
    for d in (BitDepth(2), BicubicDownscale(2), GaussianBlur(), Sketch()):
        with pytest.raises(ValueError, match="256 values per channel"):
            d.output_spec(ImageSpec(3, 8))
    for wrong in (lambda: MeanDownscale(1, 1), lambda: BitDepth(8), lambda: GaussianBlur(0), Chain):
        with pytest.raises(ValueError, match="got"):
            wrong()


def test_unrestricted_support() -> None:
    x = noise()
    support = Support(x[:, :0], RGB)
    assert torch.equal(support.merge(support.split(x)), x)
    assert bool(support.allows(x).all())


def test_multiples_and_slices() -> None:
    assert round_up((0, 1), (4, 4)) == (0, 4) and round_up((4, 5), (4, 2)) == (4, 6)
    assert scale_slice(slice(1, 3), 8, 4) == slice(2, 6)


@pytest.mark.parametrize("name", [*RESTRICTING, "bicubic2"])
def test_a_step_agrees_with_all_steps_at_once(name: str) -> None:
    """`step_bounds` and `refine_group`, which sampling calls, are parts of `bounds` and `refine`."""
    d, x = transform(name), noise(b=2)
    y = d(x)
    weights = torch.randn(2, 12, 6, 12)
    support = d.support(y, RGB, weights) if isinstance(d, Checkerboard) else d.support(y, RGB)
    v = support.split(x).long()
    bounds, estimate = support.bounds(v), 255 * torch.rand(v.shape)
    refined = support.refine(estimate, v)
    for group in range(v.shape[1]):
        assert torch.equal(support.refine_group(estimate, v, group), refined[:, group])
        for channel in range(3):
            for one, every in zip(support.step_bounds(v, group, channel), bounds, strict=True):
                assert torch.equal(one, every[:, group, channel])
