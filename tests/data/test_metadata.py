"""Colour profiles, EXIF, XMP and texts: read, kept, written back."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from selfvae.data.metadata import Metadata
from selfvae.data.pictures import read, write

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
KEY = st.text(st.characters(min_codepoint=1, max_codepoint=255), min_size=1, max_size=79)
ANY = st.builds(
    Metadata,
    *[st.binary(max_size=300)] * 3,
    st.lists(st.tuples(KEY, st.text(st.characters(codec="utf-8"))), max_size=4).map(tuple),
)


def _exif(orientation: int = 6) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "Camera", orientation
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.5
    return exif


def _save(file: Path) -> None:
    picture = Image.fromarray(RGB)
    if file.suffix == ".png":
        texts = PngInfo()
        texts.add_text("Title", "a title")
        texts.add_itxt("Author", "Łukasz 猫")
        texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
        picture.save(file, icc_profile=ICC, exif=_exif(), pnginfo=texts)
    elif file.suffix == ".tif":
        exif = _exif()
        exif[ExifTags.Base.XMLPacket] = XMP
        picture.save(file, icc_profile=ICC, exif=exif.tobytes())
    elif file.suffix == ".jpg":
        picture.save(file, icc_profile=ICC, exif=_exif(), xmp=XMP, comment="née")
    else:
        picture.save(file, icc_profile=ICC, exif=_exif(), xmp=XMP, lossless=True, exact=True)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("other", [".png", ".jpg", ".webp", ".tif"])
def test_files_of_every_kind_keep_them(ending: str, other: str, tmp_path: Path) -> None:
    file, again = tmp_path / f"a{ending}", tmp_path / f"b{other}"
    _save(file)
    picture = read(file)
    kept = picture.metadata
    assert picture.pixels.shape == (1, 3, 7, 5)  # turned upright
    assert kept.icc == ICC
    turned = (b"", b'tiff:Orientation="6"') if ending == ".tif" else (b"1", b"6")  # Pillow drops it there
    assert kept.xmp == XMP.replace(*turned[::-1])
    texts = {".png": (("Title", "a title"), ("Author", "Łukasz 猫")), ".jpg": (("Comment", "née"),)}
    assert kept.text == texts.get(ending, ())
    assert Metadata.from_bytes(kept.to_bytes()) == kept

    write(picture.pixels[0], again, metadata=kept)
    found = read(again)
    assert found.pixels.shape == (1, 3, 7, 5)  # and not turned again
    assert found.metadata.icc == ICC and found.metadata.xmp == kept.xmp
    lost = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".tif": "TIFF"}[other]
    assert found.metadata.text == (() if "texts" in kept.lost(lost) else kept.text)
    exif = Image.open(again).getexif()
    assert exif[ExifTags.Base.Make] == "Camera" and exif.get(ExifTags.Base.Orientation, 1) == 1
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] == 0.5
    if ".tif" not in (ending, other):
        assert found.metadata.exif == kept.exif


@pytest.mark.parametrize("order", ["<", ">"])
def test_only_the_orientation_changes(order: str, tmp_path: Path) -> None:
    exif = _exif()
    exif.endian = order
    before = exif.tobytes()
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=before)
    after = b"Exif\0\0" + read(tmp_path / "a.jpg").metadata.exif
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert changed == [(6, 1)]


def test_exif_of_imagemagick(tmp_path: Path) -> None:
    texts = PngInfo()
    exif = _exif().tobytes()
    texts.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=True)
    Image.fromarray(RGB).save(tmp_path / "a.png", pnginfo=texts)
    picture = read(tmp_path / "a.png")
    assert picture.pixels.shape == (1, 3, 7, 5) and not picture.metadata.text
    loaded = Image.Exif()
    loaded.load(b"Exif\0\0" + picture.metadata.exif)
    assert loaded[ExifTags.Base.Orientation] == 1 and loaded[ExifTags.Base.Make] == "Camera"


def test_pictures_without_any_and_formats_that_hold_none(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert not read(tmp_path / "a.png").metadata
    kept = Metadata(ICC, b"II*\0" + bytes(70_000), text=(("Title", "猫"),))
    assert kept.lost("BMP") == ["colour profile", "EXIF", "texts"] and not kept.lost("PNG")
    assert kept.lost("JPEG") == ["EXIF", "texts"]
    for ending in (".bmp", ".jpg"):
        write(read(tmp_path / "a.png").pixels[0], tmp_path / f"b{ending}", metadata=kept)


@pytest.mark.filterwarnings("ignore:.*EXIF data")
@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
def test_broken_exif_stops_nothing(ending: str, tmp_path: Path) -> None:
    rng, whole = np.random.default_rng(0), bytearray(_exif().tobytes()[6:])
    for _ in range(50):
        exif = bytearray(whole[: rng.integers(4, len(whole) + 1)])
        exif[rng.integers(len(exif))] = rng.integers(256)
        Image.fromarray(RGB).save(tmp_path / "a.png", exif=b"Exif\0\0" + exif)
        picture = read(tmp_path / "a.png")
        write(picture.pixels[0], tmp_path / f"b{ending}", metadata=picture.metadata)
        read(tmp_path / f"b{ending}")


@given(ANY)
def test_bytes_and_back(metadata: Metadata) -> None:
    assert Metadata.from_bytes(metadata.to_bytes()) == metadata
    assert len(Metadata(text=(("Title", "a" * 1000),)).to_bytes()) < 50


@given(ANY, st.data())
def test_damage_is_an_error(metadata: Metadata, data: st.DataObject) -> None:
    whole = bytearray(metadata.to_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    for damaged in (bytes(whole), metadata.to_bytes()[: data.draw(st.integers(0, len(whole) - 1))]):
        try:
            Metadata.from_bytes(damaged)  # the file's checksum finds the damage that is none here
        except ValueError as error:
            assert "metadata are damaged" in str(error)


def test_a_bomb_is_refused() -> None:
    with pytest.raises(ValueError, match="do not end"):
        Metadata.from_bytes(b"\1" + zlib.compress(bytes(1 << 27)))
    with pytest.raises(ValueError, match="strip them"):
        Metadata(icc=bytes(1 << 27)).to_bytes()
