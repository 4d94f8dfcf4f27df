"""The commands for pictures, the figures, and the scores of enhancement."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import selfvae
from selfvae.cli import main
from selfvae.cli.progress import FileProgress
from selfvae.data import pictures
from selfvae.data.batches import Images
from selfvae.metrics import enhancement
from selfvae.operations import enhance, infer
from selfvae.reports.figures import draw_figures
from selfvae.transforms import Greyscale, MeanDownscale

NAMES = ("selfvae", "selfvae-grey", "selfvae-bits", "vae-normal", "selfvae-halve")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models, as files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        model = selfvae.build(name, "tiny", (3, 16, 16), width=0.06, components=2)
        model.initialise(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8))
        selfvae.save(model, folder / name)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (9, 14, 4), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_enhance(runs: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    for name in ("selfvae", "selfvae-grey", "selfvae-bits"):
        assert main(["enhance", str(photo), str(out), "--model", str(runs / name)]) == 0
        given, drawn = pictures.read(photo), pictures.read(out)
        rows = 2 if name == "selfvae" else 1
        assert drawn.pixels.shape == (1, 3, 9 * rows, 14 * rows)
        assert drawn.alpha is not None and drawn.alpha.shape[2:] == drawn.pixels.shape[2:]
        if name == "selfvae":
            assert torch.equal(MeanDownscale(2)(drawn.pixels), given.pixels)
        elif name == "selfvae-grey":
            assert torch.equal(Greyscale()(drawn.pixels), Greyscale()(given.pixels))
            assert torch.equal(drawn.alpha, given.alpha)
        else:
            assert torch.equal(drawn.pixels >> 5, given.pixels >> 5)
    flags = ["--model", str(runs / "selfvae"), "--n", "3", "--temperature", "y0=0.5"]
    assert main(["enhance", str(photo), str(tmp_path / "sheet.webp"), *flags]) == 0
    assert pictures.read(tmp_path / "sheet.webp").pixels.shape[3] == 2 * 28 + 2


def test_enlarge_four_times(runs: Path, photo: Path, tmp_path: Path) -> None:
    model = ["--model", str(runs / "selfvae")]
    once, twice, both = (tmp_path / f"{name}.png" for name in ("once", "twice", "both"))
    assert main(["enhance", str(photo), str(once), *model]) == 0
    assert main(["enhance", str(once), str(twice), *model]) == 0
    assert main(["enhance", str(photo), str(both), *model, "--scale", "4"]) == 0
    assert torch.equal(pictures.read(both).pixels, pictures.read(twice).pixels)
    assert main(["enhance", str(photo), str(both), *model, "--scale", "4", "--n", "2"]) == 0
    assert pictures.read(both).pixels.shape[2:] == (2 * 36 + 2, 2 * 56 + 2)


def test_what_is_done_is_skipped(
    runs: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "abc":
        (source / f"{name}.png").write_bytes(photo.read_bytes())
    command = ["enhance", str(source), str(out), "--model", str(runs / "selfvae"), "--skip-existing"]
    assert main(command) == 0 and "3 of 3 files in" in capsys.readouterr().out
    (out / "a.png").unlink()  # is missing
    os.utime(out / "b.png", (0, 0))  # is older than its picture
    (out / "c.png").write_bytes(b"kept")
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "1 of 3 files are done already" in told and "2 of 2 files in" in told
    assert (out / "c.png").read_bytes() == b"kept" and pictures.read(out / "b.png").pixels.shape[2] == 18
    assert main(command) == 0 and "3 of 3 files are done already" in capsys.readouterr().out


def test_pictures_much_larger_than_a_tile(runs: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (211, 223), dtype=np.uint8)).save(large)
    model = str(runs / "selfvae")
    assert main(["enhance", str(large), str(tmp_path / "out.png"), "--model", model]) == 0
    drawn = pictures.read(tmp_path / "out.png").pixels
    given = pictures.read(large).pixels.expand(-1, 3, -1, -1)
    assert torch.equal(MeanDownscale(2)(drawn), given)


def test_reconstruct_vary_interpolate_generate(runs: Path, photo: Path, tmp_path: Path) -> None:
    model = ["--model", str(runs / "selfvae")]
    out = tmp_path / "out.png"
    assert main(["reconstruct", str(photo), str(out), *model, "--condition-on", "x"]) == 0
    assert torch.equal(pictures.read(out).pixels, pictures.read(photo).pixels)
    assert (
        main(["reconstruct", str(photo), str(out), *model, "--condition-on", "RS1", "--decode", "mode"])
        == 0
    )
    assert pictures.read(out).pixels.shape == (1, 3, 9, 14)
    assert main(["vary", str(photo), str(out), *model, "--n", "3"]) == 0
    assert pictures.read(out).pixels.shape == (1, 3, 20, 30)
    with Image.open(photo) as upright:
        upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(tmp_path / "other.png")
    strip = ["interpolate", str(photo), str(tmp_path / "other.png")]
    assert main([*strip, str(out), *model, "--steps", "4", "--spherical"]) == 0
    assert pictures.read(out).pixels.shape == (1, 3, 9, 4 * 16 - 2)
    for ending in ("gif", "webp"):
        assert main([*strip, str(tmp_path / f"a.{ending}"), *model, "--steps", "4"]) == 0
        with Image.open(tmp_path / f"a.{ending}") as animation:
            assert animation.n_frames == 4 and animation.size == (14, 9)
    assert main(["generate", str(runs / "selfvae"), "--n", "2", "--out", str(out), "--height", "5"]) == 0
    assert pictures.read(out).pixels.shape == (1, 3, 10, 66)


def test_a_folder_goes_on_past_a_broken_file(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for name in ("a.png", "a.bmp", "sub/c.jpg"):
        grey.save(source / name)
    (source / "b.png").write_bytes(b"nonsense")
    (source / "notes.txt").write_text("not a picture")
    model = ["--model", str(runs / "selfvae-halve")]
    assert main(["enhance", str(source), str(out), *model, "--level", "2"]) == 1
    told = capsys.readouterr()
    assert "3 of 4 files" in told.out and "b.png cannot be read" in told.err
    made = sorted(str(f.relative_to(out)) for f in out.rglob("*.*"))
    assert made == ["a.bmp.png", "a.png.png", "sub/c.png"]
    (source / "b.png").unlink()
    assert main(["enhance", str(source), str(out), *model]) == 0
    capsys.readouterr()
    assert main(["enhance", str(source), str(out), *model, "--temperature", "q=1"]) == 2
    assert "unknown variable 'q'" in capsys.readouterr().err
    assert main(["enhance", str(source / "a.png"), str(out), *model]) == 0 and (out / "a.png").exists()
    assert main(["enhance", str(source), str(source / "out"), *model]) == 2
    assert "lies in the input folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["enhance", "PHOTO", "PHOTO", "--model", "selfvae"], "is the input itself"),
        (["enhance", "nowhere.png", "o.png", "--model", "selfvae"], "no file or folder at nowhere.png"),
        (["enhance", "PHOTO", "o.jpg", "--model", "selfvae"], "JPEG files hold no alpha"),
        (["enhance", "PHOTO", "o.png", "--model", "vae-normal"], "computes no image"),
        (["enhance", "PHOTO", "o.png", "--model", "selfvae", "--level", "2"], "--level must be 1: this"),
        (["enhance", "PHOTO", "o.png", "--model", "selfvae", "--temperature", "hot"], "takes a number"),
        (
            ["enhance", "PHOTO", "o.png", "--model", "selfvae", "--scale", "3"],
            "scale 3: this model enlarges 2 times or a power of that",
        ),
        (["enhance", "PHOTO", "o.png", "--model", "selfvae-grey", "--scale", "2"], "does not enlarge"),
        (
            ["enhance", "PHOTO", "o.png", "--model", "selfvae", "--temperature", "q=1"],
            "this model has z1, y1, z0, y0\n",
        ),
        (
            ["reconstruct", "PHOTO", "o.png", "--model", "selfvae", "--condition-on", "z9"],
            "this model has z1, y1",
        ),
        (["vary", "PHOTO", "o.png", "--model", "selfvae-halve"], "no latents"),
        (["vary", "PHOTO", "o.png", "--model", "selfvae", "--n", "0"], "--n must be at least 1"),
        (
            ["interpolate", "PHOTO", "PHOTO", "o.png", "--model", "selfvae", "--latents", "y1"],
            "only latents",
        ),
        (["enhance", "PHOTO", "o.xyz", "--model", "selfvae"], "ends in .png"),
        (["enhance", "PHOTO", "o.png", "--model", "selfvae", "--temperature", "inf"], "must be finite"),
        (["enhance", "PHOTO", "o.png", "--model", "selfvae", "--temperature", "=1"], "variable ''"),
        (["interpolate", "PHOTO", "PHOTO", "PHOTO", "--model", "selfvae"], "is the input itself"),
        (["generate", "selfvae", "--out", "o"], "ends in .png"),
        (["enhance", "PHOTO", "o.png", "--model", "nowhere"], "unknown model 'nowhere' (expected a folder"),
        (["enhance", "PHOTO", "o.png", "--model", "photo-v2"], "did you mean 'photos-v2'?"),
    ],
)
def test_wrong_input(
    flags: list[str],
    message: str,
    runs: Path,
    photo: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(photo.parent)
    before = sorted(photo.parent.iterdir())
    places = {"PHOTO": str(photo), **{name: str(runs / name) for name in NAMES}}
    assert main([places.get(flag, flag) for flag in flags]) == 2
    assert message in capsys.readouterr().err
    assert sorted(photo.parent.iterdir()) == before


@pytest.mark.parametrize("name", NAMES)
def test_figures(name: str, runs: Path, tmp_path: Path, images: torch.Tensor) -> None:
    files = draw_figures(selfvae.load(runs / name), images, tmp_path, seed=0, temperature=0.5)
    made = {f.stem for f in files}
    assert ("conditional" in made) == (name != "vae-normal")
    assert ({"reconstructions", "interpolations", "variations"} <= made) == (name != "selfvae-halve")
    page = (tmp_path / "index.html").read_text()
    for file in files[:-1]:
        assert f'src="{file.name}"' in page and pictures.read(file).pixels.shape[1] == 3
    with pytest.raises(ValueError, match="at least 2 images"):
        draw_figures(selfvae.load(runs / name), images[:1], tmp_path)


def test_figures_and_scores_by_command(
    runs: Path, tmp_path: Path, images: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "data.npy", images.repeat(5, 1, 1, 1).numpy())
    data = ["--data", str(tmp_path / "data.npy")]
    model, out = str(runs / "selfvae"), tmp_path / "figures"
    assert main(["figures", model, *data, "--out", str(out), "--n", "99"]) == 0
    assert (out / "index.html").exists()
    capsys.readouterr()
    assert main(["eval-enhance", model, *data, "--draws", "3", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["consistency_error_draw"] == 0 and scores["draws"] == 3 and scores["split"] == "test"
    assert main(["eval", model, *data, "--split", "validation", "--iwae-samples", "2"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["split"] == "validation" and lines["data"] == "data.npy"
    terms = [float(lines[f"{name}_nats"]) for name in ("re_y0", "kl_z0", "re_y1", "kl_z1")]
    assert -sum(terms) == pytest.approx(float(lines["elbo_nats"]), rel=1e-5)
    assert float(lines["iwae_bits_per_dim"]) > 0 and "re_y0_bits_per_dim" in lines
    assert main(["eval", str(runs / "selfvae-halve"), *data]) == 0
    assert "kl_z0" not in capsys.readouterr().out


# --- what the scores of enhancement mean ----------------------------------------------------------------


def test_psnr_and_ssim() -> None:
    x = torch.randint(0, 200, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(enhancement.psnr(x, x), torch.full((2,), 100.0, dtype=torch.float64))
    assert torch.allclose(enhancement.psnr(x, x + 10), torch.tensor(28.1308036, dtype=torch.float64))
    assert torch.allclose(enhancement.ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert bool((enhancement.ssim(x, 255 - x) < 0.1).all())
    with pytest.raises(ValueError, match="11 x 11 pixels or more; got 8 x 16"):
        enhancement.ssim(x[:, :, :8], x[:, :, :8])


def test_ssimulacra2(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, cols = torch.meshgrid(torch.arange(40.0), torch.arange(48.0), indexing="ij")
    x = (120 + 80 * torch.sin(rows / 5) * torch.cos(cols / 7)).expand(1, 3, -1, -1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    little, much = (enhancement.ssimulacra2(x + n * noise, x).item() for n in (1, 20))
    assert enhancement.ssimulacra2(x, x).item() == pytest.approx(100)
    assert 100 > little > 60 > much
    grey = enhancement.ssimulacra2(x[:, :1] + noise[:, :1], x[:, :1])
    assert grey.shape == (1,) and 100 > grey.item() > 60
    with pytest.raises(ValueError, match="8 x 8 pixels; got 7 x 48"):
        enhancement.ssimulacra2(x[:, :, :7], x[:, :, :7])
    monkeypatch.setitem(sys.modules, "ssimulacra2", None)
    with pytest.raises(ImportError, match=r"selfvae\[bench\]"):
        enhancement.ssimulacra2(x, x)


@pytest.mark.parametrize("name", ["selfvae", "selfvae-grey", "selfvae-bits", "selfvae-halve"])
def test_enhancement_scores(name: str, runs: Path) -> None:
    model = selfvae.load(runs / name)
    x = torch.randint(0, 256, (3, 3, 24, 20), dtype=torch.uint8)
    scores = enhancement.evaluate_enhancement(model, Images(x.numpy()), draws=3, seed=0, batch_size=2)
    assert scores == enhancement.evaluate_enhancement(
        model, Images(x.numpy()), draws=3, seed=0, batch_size=2
    )
    assert scores["consistency_error_draw"] == 0
    assert scores["diversity_rmse"] > 1
    assert scores["psnr_average"] > scores["psnr_draw"]  # errors average out
    assert scores["consistency_error_mean"] == 0
    assert ("psnr_lanczos" in scores) == (name in ("selfvae", "selfvae-halve"))
    y = infer(model, x[:, :, :24, :16], "y1")["y1"]
    plain = enhancement.baseline_enhancement(model, y)
    assert plain.shape == (3, 3, 24, 16)
    if name == "selfvae-grey":
        assert torch.equal(plain, y.expand(-1, 3, -1, -1)) and scores["consistency_error_plain"] == 0
    if name == "selfvae-halve":
        assert torch.equal(plain[:, :, :, ::2], y) and scores["consistency_error_plain"] == 0
    if name == "selfvae-bits":
        assert torch.equal(plain, (y << 5) + 16)
    with pytest.raises(ValueError, match="draws must be at least 2"):
        enhancement.evaluate_enhancement(model, Images(x.numpy()), draws=1)


def test_known_scores(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws that are 5 levels above and below x."""
    x = torch.randint(10, 240, (2, 3, 16, 16), dtype=torch.uint8)
    signs = iter([1, 5, -5])  # the mean of the distribution, and two draws
    monkeypatch.setattr(
        enhancement, "enhance", lambda *args, **how: (x.int() + next(signs)).to(torch.uint8)
    )
    scores = enhancement.evaluate_enhancement(
        selfvae.load(runs / "selfvae-grey"), Images(x.numpy()), draws=2
    )
    assert scores["psnr_draw"] == pytest.approx(34.1514, abs=1e-3)
    assert scores["psnr_average"] == 100 and scores["ssim_average"] == pytest.approx(1)
    assert scores["psnr_mean"] == pytest.approx(48.1308, abs=1e-3)
    assert scores["diversity_rmse"] == pytest.approx(10)
    assert scores["consistency_error_draw"] == pytest.approx(5)
    assert scores["consistency_error_average"] == 0


def test_known_scores_of_few_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(0, 7, (2, 3, 16, 16), dtype=torch.uint8)
    model = selfvae.build("selfvae", "tiny", (3, 16, 16), num_values=8, width=0.06)
    steps = iter([0, 1, 0])
    monkeypatch.setattr(enhancement, "enhance", lambda *args, **how: x + next(steps))
    scores = enhancement.evaluate_enhancement(model, Images(x.numpy()), draws=2)
    assert scores["diversity_rmse"] == pytest.approx(255 / 7)
    assert scores["psnr_draw"] == pytest.approx((100 + 20 * np.log10(7)) / 2)


def test_the_protocol_of_publications(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The luma without a border, of whole pictures of different sizes."""
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    assert torch.allclose(enhancement.luma(white), torch.tensor(235.0).double())
    assert torch.allclose(enhancement.luma(white * 0), torch.tensor(16.0).double())
    model, folder = selfvae.load(runs / "selfvae"), tmp_path / "pictures"
    folder.mkdir()
    xs = [torch.randint(0, 256, (1, 3, h, 32), dtype=torch.uint8) for h in (24, 31)]
    for i, x in enumerate(xs):
        pictures.write(x[0], folder / f"{i}.png")
    flags = ["--whole", "--draws", "0", "--on-luma", "--border", "2", "--perceptual", "--json"]
    assert main(["eval-enhance", str(runs / "selfvae"), "--data", str(folder), *flags]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 2 and "psnr_draw" not in scores
    expected, perceptual = [], []
    for x in xs:
        rows = model.multiples[0][0]
        x = x[:, :, : x.shape[2] // rows * rows]
        y = MeanDownscale(2)(x)
        found = enhance(model, y, temperature=0.0, decode="mean")
        a, b = (image[:, :, 2:-2, 2:-2] for image in (x, found))
        expected.append(enhancement.psnr(enhancement.luma(a), enhancement.luma(b)).item())
        perceptual.append(enhancement.ssimulacra2(b, a).item())
    assert scores["psnr_mean"] == pytest.approx(sum(expected) / 2)
    assert scores["ssimulacra2_mean"] == pytest.approx(sum(perceptual) / 2)
    image = Image.fromarray(MeanDownscale(2)(xs[0])[0].permute(1, 2, 0).numpy())
    for name in ("bicubic", "lanczos"):
        wanted = np.asarray(image.resize((32, 24), Image.Resampling[name.upper()]))
        found = enhancement.baseline_enhancement(model, MeanDownscale(2)(xs[0]), enlarging=name)
        assert np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 1
    scores = enhancement.evaluate_enhancement(model, Images(xs[0].numpy()), scale=4, draws=0)
    y = MeanDownscale(4)(xs[0][:, :, : 24 // (2 * rows) * 2 * rows])
    how = {"temperature": 0.0, "decode": "mean"}
    twice = enhance(model, enhance(model, y, **how), **how)
    assert scores["psnr_mean"] == pytest.approx(
        enhancement.psnr(twice, xs[0][:, :, : twice.shape[2]]).item()
    )
    assert scores["consistency_error_mean"] < 1  # of two roundings
    with pytest.raises(ValueError, match="scale 3: this model enlarges 2 times"):
        enhancement.evaluate_enhancement(model, Images(xs[0].numpy()), scale=3)
    grey = selfvae.build("selfvae", "tiny", (1, 16, 16), width=0.06)
    with pytest.raises(ValueError, match="only RGB images"):
        enhancement.evaluate_enhancement(grey, Images(xs[0][:, :1].numpy()), on_luma=True)


@pytest.mark.parametrize("transform", ["grey+mean2", "mean2+grey", "mean2+bits3", "bicubic2+grey"])
def test_plain_enhancement_of_chains(transform: str, images: torch.Tensor) -> None:
    model = selfvae.build("selfvae", "tiny", (3, 16, 16), transforms=(transform,), width=0.06)
    plain = enhancement.baseline_enhancement(model, infer(model, images, "y1")["y1"])
    flat = images.double().mean((2, 3), keepdim=True)
    assert plain.shape == images.shape
    assert enhancement.psnr(plain, images).mean() > enhancement.psnr(flat, images).mean() - 3


@pytest.mark.parametrize("name", ["selfvae", "selfvae-halve"])
def test_timing(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--counts", "1", "3", "--repeats", "2", "--json"]
    assert main(["benchmark", str(runs / name), *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["generate_1_seconds"] > 0 and result["generate_3_seconds"] > 0
    assert ("reconstruct_3_seconds" in result) == (name == "selfvae")
    assert main(["benchmark", str(runs / name), "--repeats", "0"]) == 2


def test_a_folder_s_outputs_are_all_different_and_no_input(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(runs / "selfvae-halve")]
    for name in ("in/a.png", "in/a.bmp", "in/a.png.bmp", "k/in/x.png", "k/in/in/x.png"):
        pictures.write(torch.zeros(3, 8, 8, dtype=torch.uint8), tmp_path / name)
    assert main(["compress", str(tmp_path / "in"), str(tmp_path / "out"), *model]) == 2
    assert "2 pictures would become" in capsys.readouterr().err and not (tmp_path / "out").exists()
    before = (tmp_path / "k/in/x.png").read_bytes()
    assert (
        main(["reconstruct", str(tmp_path / "k/in"), str(tmp_path / "k"), *model, "--condition-on", "y1"])
        == 2
    )
    assert "would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "k/in/x.png").read_bytes() == before
    (tmp_path / "in/a.png.bmp").unlink()
    (tmp_path / "in/folder.png").mkdir()  # a folder's name may end as it likes
    assert main(["compress", str(tmp_path / "in"), str(tmp_path / "out"), *model, "--jobs", "1"]) == 0
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"a.png.svae", "a.bmp.svae"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate MODEL --zoom 0", "--zoom must be at least 1; got 0"),
        ("generate MODEL --height 0", "--height must be at least 1; got 0"),
        ("benchmark MODEL --counts", "--counts must be at least 1; got 0"),
        ("ood MODEL --ood-data", "--ood-data takes at least one of noise"),
        ("fid MODEL --features math:pi", "math:pi is 3.14"),
        ("bench-codec . --limit 0", "--limit must be at least 1; got 0"),
        (
            "train --model vae --data photos --out x --options width=[",
            "the value in 'width=[' cannot be read",
        ),
        (
            "train --model vae --data photos --out x --options transforms=5",
            "transforms must be names",
        ),
        (
            "train --model vae --data photos --out x --options num_values=2.5",
            "num_values must be a positive whole",
        ),
        ("train --model vae --data photos --out x --options width=.inf", "width must be a positive number"),
        ("train --model vaee --data photos --out x", "unknown model 'vaee': did you mean 'vae'? (known: "),
        ("demo --train --out .", "selfvae-halve exists: remove it"),
    ],
)
def test_wrong_settings(
    line: str, message: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "selfvae-halve").mkdir()
    assert main(line.replace("MODEL", str(runs / "vae-normal")).split()) == 2
    assert message in capsys.readouterr().err


def test_a_list_in_a_config_takes_no_more_than_its_own(
    runs: Path, tmp_path: Path, images: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", images.repeat(5, 1, 1, 1).numpy())
    (tmp_path / "ood.yaml").write_text(f"data: {tmp_path}/x.npy\nood-data: [noise]\n")
    assert main(["ood", str(runs / "selfvae-halve"), "--config", str(tmp_path / "ood.yaml"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"images", "noise"}


# --- files and folders ----------------------------------------------------------------------------------


def test_enhance_gives_the_mean_unless_draws_are_asked_for(runs: Path, photo: Path, tmp_path: Path) -> None:
    model = selfvae.load(runs / "selfvae")
    y = pictures.to_spec(pictures.read(photo), model.levels[1].spec)

    def made(name: str, *flags: str) -> torch.Tensor:
        model_flags = ["--model", str(runs / "selfvae"), *flags]
        assert main(["enhance", str(photo), str(tmp_path / name), *model_flags]) == 0
        return pictures.read(tmp_path / name).pixels

    plain = made("a.png")
    assert torch.equal(plain, enhance(model, y, temperature=0.0, decode="mean"))
    assert torch.equal(plain, made("b.png", "--seed", "7"))
    drawn = made("c.png", "--temperature", "1", "--seed", "7")
    assert torch.equal(drawn, enhance(model, y, seed=7)) and not torch.equal(drawn, plain)
    sheet = made("d.png", "--n", "2")  # the picture and two draws that differ, in two rows
    a, b = sheet[:, :, :18, 30:], sheet[:, :, 20:, :28]
    assert a.shape == b.shape == plain.shape and not torch.equal(a, b) and not torch.equal(a, plain)


@pytest.mark.parametrize("command", ["compress", "enhance"])
def test_what_would_lose_something_is_refused_or_converted(
    command: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    out = str(tmp_path / ("o.svae" if command == "compress" else "o.png"))
    flags = ["--model", str(runs / "selfvae-halve")]
    for name, words, kind in (
        ("cmyk.tif", "neither grey nor RGB", "RGB"),
        ("deep.png", "does not have 8 bits per channel", "grey"),
    ):
        assert main([command, str(tmp_path / name), out, *flags]) == 2
        told = capsys.readouterr().err
        assert words in told and f"(--convert does so: 8 bits, {kind})" in told
        assert told.count(str(tmp_path / name)) == 1 and not Path(out).exists()
        assert main([command, str(tmp_path / name), out, *flags, "--convert"]) == 0
        assert f"{name}: converted to 8-bit {kind}\n" in capsys.readouterr().err
        Path(out).unlink()


def test_compress_tells_sizes_speed_and_progress(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(runs / "selfvae-halve")]
    flat = Image.new("RGB", (64, 48), (90, 120, 60))
    flat.save(tmp_path / "a.bmp")
    flat.save(tmp_path / "b.jpg")
    for name in ("a.bmp", "b.jpg"):
        source, out = tmp_path / name, tmp_path / f"{name}.svae"
        assert main(["compress", str(source), str(out), *model]) == 0
        told = capsys.readouterr()
        before, after = source.stat().st_size, out.stat().st_size
        assert f"{out}: {before:,} (9,216 raw) -> {after:,} bytes, ratio {before / after:.2f}, " in told.out
        assert float(told.out.split("ratio")[1].split()[1]) > 0 and told.out.endswith(" MB/s\n")
        lines = told.err.splitlines()
        assert lines[0] == f"selfvae: compressing {name}, 0.00 megapixels"
        grown = name == "b.jpg"
        assert after > before if grown else after < before
        assert lines[1:] == ([f"selfvae: {source} is a JPEG, which is lossy already: storing its exact "
                              "pixels takes more; keep the JPEG"] if grown else [])  # fmt: skip


def test_progress_names_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("selfvae.cli.progress.note", told.append)
    parts = {"y1": 0.25, "y0": 0.75}
    with FileProgress(("compressing", "checking"), "a.png", 1_200_000, parts) as bar:
        assert bar.describe(0) == "compressing a.png, 1.2 megapixels"
        assert list(bar.track([1, 2], "y1")) == [1, 2]
        assert bar.describe(0) == "compressing a.png, 0.3 of 1.2 megapixels"
        for _ in bar.track(range(3), "y0"):
            pass
        assert bar.describe(0) == "compressing a.png, 1.2 of 1.2 megapixels"
        seen = [bar.describe(1) for _ in bar.track(range(2), "y0")]
    assert seen == [f"checking a.png, {n} of 1.2 megapixels" for n in ("0.0", "0.4")]  # 0.45 rounds down
    assert told == ["compressing a.png, 1.2 megapixels"]


def test_a_terminal_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with FileProgress(("enhancing",), "a.png", 2_000_000, {"y0": 1.0}) as bar:
        list(bar.track(range(2), "y0"))
    assert "enhancing a.png, 2.0 of 2.0 megapixels" in capsys.readouterr().err


def test_errors_name_a_file_once(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/broken.png").write_bytes(b"nonsense")
    model = ["--model", str(runs / "selfvae-halve")]
    for source, out in (("in/broken.png", "o.svae"), ("in", "out")):
        assert main(["compress", str(tmp_path / source), str(tmp_path / out), *model]) > 0
        assert capsys.readouterr().err.count(str(tmp_path / "in/broken.png")) == 1


def test_enhancing_keeps_alpha_and_metadata(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.randint(0, 256, (4, 16, 16), dtype=torch.uint8)
    source, target = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    pictures.to_image(x).save(source, icc_profile=b"profile")
    for command, side in (("enhance", 32), ("reconstruct", 16)):
        assert main([command, source, target, "--model", str(runs / "selfvae")]) == 0
        found = pictures.read(Path(target))
        assert found.pixels.shape[2:] == (side, side) and found.alpha is not None
        assert found.metadata.icc == b"profile" and not capsys.readouterr().err.count("do not hold")
    grey = tmp_path / "grey.png"
    pictures.to_image(x[:1]).save(grey, icc_profile=b"grey")
    assert main(["enhance", str(grey), str(tmp_path / "c.png"), "--model", str(runs / "selfvae")]) == 0
    assert pictures.read(tmp_path / "c.png").metadata.icc == b""  # of a grey picture, and it is RGB now


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m selfvae.cli --help | head -1", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr
