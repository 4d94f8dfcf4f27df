"""Files of every kind in, files of every kind out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfvae.codec import fallback
from selfvae.codec.container import check_size
from selfvae.data import pictures
from selfvae.data.pictures import Picture, read, save, show, to_spec, write
from selfvae.transforms import ImageSpec

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("mode", "channels", "alpha"),
    [("1", 1, 0), ("L", 1, 0), ("LA", 1, 1), ("P", 3, 0), ("RGB", 3, 0), ("RGBA", 3, 1), ("CMYK", 3, 0)],
)
def test_modes(mode: str, channels: int, alpha: int, tmp_path: Path) -> None:
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(RGB).convert(mode).save(file)
    picture = read(file)
    assert picture.pixels.shape == (1, channels, 5, 7) and picture.pixels.dtype == torch.uint8
    assert (picture.alpha is not None) == bool(alpha)


def test_values_palette_transparency_and_orientation(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png").pixels[0].permute(1, 2, 0).numpy(), RGB)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=1)
    picture = read(tmp_path / "p.png")
    assert picture.pixels.flatten().tolist() == [10, 40, 20, 50, 30, 60]
    assert picture.alpha is not None and picture.alpha.flatten().tolist() == [255, 0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    assert read(tmp_path / "turned.png").pixels.shape == (1, 3, 7, 5)


def test_deep_files(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").pixels.flatten().tolist() == [0, 0, 1, 255]  # the high byte
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535 " + bytes([1, 0, 255, 255]))
    assert read(tmp_path / "a.pgm").pixels.flatten().tolist() == [1, 255]
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif has 32 bits per channel \(mode F\)"):
        read(tmp_path / "a.tif")


def test_what_8_bits_of_grey_or_rgb_cannot_hold_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "deep.ppm").write_bytes(b"P6 1 1 1023 " + bytes(6))
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
    Image.new("CMYK", (2, 2)).save(tmp_path / "ink.jpg")
    for name, words in (
        ("deep.png", r"does not have 8 bits per channel \(PNG, I;16B\): convert it first"),
        ("deep.ppm", r"does not have 8 bits per channel \(PPM, values up to 1023\): convert it first"),
        ("float.tif", r"does not have 8 bits per channel \(TIFF, F;32F\): convert it first"),
        ("ink.jpg", r"neither grey nor RGB \(mode CMYK\): convert it first"),
    ):
        with pytest.raises(ValueError, match=f"{name} .*{words}"):
            read(tmp_path / name, exact=True)


def test_transparent_colours(tmp_path: Path) -> None:
    for mode, transparent, channels in (("L", 7, 2), ("RGB", (7, 7, 7), 4), ("1", 0, 2)):
        Image.new(mode, (2, 1)).save(tmp_path / "a.png", transparency=transparent)
        assert read(tmp_path / "a.png").channels().shape == (1, channels, 1, 2)


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nonsense")
    Image.fromarray(np.tile(RGB, (40, 40, 1))).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:500])
    for name in ("a.png", "b.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            read(tmp_path / name)


def test_to_format() -> None:
    colour = Picture(torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1))
    grey = Picture(torch.tensor([100], dtype=torch.uint8).view(1, 1, 1, 1), torch.zeros(1, 1, 1, 1).byte())
    assert to_spec(colour, ImageSpec(1)).flatten().tolist() == [76]
    assert to_spec(grey, ImageSpec(3)).flatten().tolist() == [100] * 3
    assert to_spec(colour, ImageSpec(4)).flatten().tolist() == [255, 0, 0, 255]
    assert to_spec(grey, ImageSpec(2)).flatten().tolist() == [100, 0]
    assert to_spec(colour, ImageSpec(3, 8)).flatten().tolist() == [7, 0, 0]
    x = torch.arange(8, dtype=torch.uint8).view(1, 1, 1, 8)
    assert show(x, ImageSpec(1, 8)).flatten().tolist() == [0, 36, 72, 109, 145, 182, 218, 255]
    assert torch.equal(to_spec(Picture(show(x, ImageSpec(1, 8))), ImageSpec(1, 8)), x)  # and back


@pytest.mark.parametrize("ending", [".png", ".webp", ".tiff"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_lossless_files_hold_every_byte(channels: int, ending: str, tmp_path: Path) -> None:
    x = torch.randint(0, 256, (channels, 9, 6), dtype=torch.uint8)
    file = tmp_path / f"new/a{ending}"
    write(x, file)
    assert torch.equal(to_spec(read(file), ImageSpec(channels))[0], x)
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_alpha_is_kept_and_refused_where_it_cannot_be(tmp_path: Path) -> None:
    x, alpha = torch.zeros(3, 4, 6, dtype=torch.uint8), torch.full((2, 3), 77, dtype=torch.uint8)
    write(x, tmp_path / "a.png", alpha)
    kept = read(tmp_path / "a.png").alpha
    assert kept is not None and kept.shape == (1, 1, 4, 6) and bool((kept == 77).all())
    with pytest.raises(ValueError, match="JPEG files hold no alpha"):
        write(x, tmp_path / "a.jpg", alpha)
    with pytest.raises(ValueError, match=r"ends in \.png, .* got '\.xyz'"):
        save(Image.new("L", (1, 1)), tmp_path / "a.xyz")
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.slow
def test_importing_the_codec_changes_nothing() -> None:
    """Pillow gets its plugin from `use`, and Fabric is loaded where processes are started."""
    code = """
import sys
from PIL import Image
import selfvae, selfvae.codec
assert "lightning_fabric" not in sys.modules
Image.init()
assert "SVAE" not in Image.SAVE and ".svae" not in Image.registered_extensions()
selfvae.codec.use(selfvae.build("selfvae-halve", "tiny", (3, 8, 8), width=0.05))
assert "SVAE" in Image.SAVE and Image.registered_extensions()[".svae"] == "SVAE"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_large_pictures_are_converted_in_strips(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randint(0, 256, (1, channels, 23, 17), dtype=torch.uint8)
    whole = pictures.to_image(x[0])
    monkeypatch.setattr(pictures, "_STRIP", 40)  # two rows, and one at the end
    strips = pictures.to_image(x[0])
    assert strips.mode == whole.mode and strips.tobytes() == whole.tobytes()
    assert torch.equal(pictures.from_image(strips), x)
    monkeypatch.setattr(fallback, "_STRIP", 40)
    sizes = [len(fallback.encode_pixels(part, 0)) for part in x.split(2, 2)]
    assert fallback.webp_size(x, 0) == sum(sizes)


def test_the_limit_of_pixels_is_one_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Pillow's own: up to it there is no warning, beyond it neither files nor arrays are taken."""
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    monkeypatch.setattr(pictures, "_STRIP", 100)  # by far less than the limit, as usual
    assert pictures.read(tmp_path / "a.png").pixels.shape == (1, 3, 30, 20) and not recwarn.list
    check_size(30, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with pytest.raises(ValueError, match="exceeds limit of 598 pixels"):
        pictures.read(tmp_path / "a.png")
    with pytest.raises(ValueError, match="are more than 598"):
        check_size(30, 20)
