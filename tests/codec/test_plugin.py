"""The Pillow plugin, the commands for files, and the benchmark of formats."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_models import fixed
from PIL import ExifTags, Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import selfvae
from selfvae import hub
from selfvae.cli import main
from selfvae.codec import (
    Codec,
    CodecError,
    pack,
    plugin,
    use,
)
from selfvae.data.crops import photo


def test_pillow(codec: Codec, picture: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "_codecs", {})
    use(fixed())
    plugin._codecs.clear()
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    with pytest.raises(CodecError, match="no model to compress with"):
        image.save(tmp_path / "x.svae")
    use(fixed())
    image.save(tmp_path / "x.svae")
    image.convert("L").save(tmp_path / "grey.svae")
    opened = Image.open(tmp_path / "x.svae")
    assert (opened.format, opened.mode, opened.size) == ("SVAE", "RGB", image.size)
    assert opened.tobytes() == image.tobytes()
    assert Image.open(tmp_path / "grey.svae").tobytes() == image.convert("L").tobytes()
    with pytest.raises(OSError, match="cannot write mode RGBA"):
        image.convert("RGBA").save(tmp_path / "alpha.svae")
    data = (tmp_path / "x.svae").read_bytes()
    with pytest.raises(CodecError, match="cut short"):
        Image.open(io.BytesIO(data[:-9])).load()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert Image.open(io.BytesIO(data[:-9])).size == image.size
    Image.open(io.BytesIO(data[:-9])).load()
    plugin._codecs.clear()
    with pytest.raises(CodecError, match=r"needs the model .* call selfvae\.codec\.use\(model\)"):
        Image.open(tmp_path / "x.svae").load()


@pytest.mark.usefixtures("never_webp")
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pillow_with_an_integer_model(
    mode: str, tiny_integer: selfvae.SelfVAE, picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_codecs", {})
    use(tiny_integer)
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    if mode[-1] == "A":
        image.putalpha(image.getchannel(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    image = image.convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Artist] = 6, "somebody"
    texts = PngInfo()
    texts.add_text("Title", "a title")
    png, file = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", icc_profile=b"profile", exif=exif, pnginfo=texts)
    opened = Image.open(png)
    opened.save(file, "SVAE", xmp=b"<xmp/>")
    again = Image.open(file)
    assert (again.mode, again.size) == (mode, image.size)
    assert again.info["icc_profile"] == b"profile" and again.info["xmp"] == b"<xmp/>"
    assert again.info["Title"] == "a title" == again.text["Title"]
    assert dict(again.getexif()) == {ExifTags.Base.Orientation: 6, ExifTags.Base.Artist: "somebody"}
    assert again.tobytes() == image.tobytes()
    once_more, changed = io.BytesIO(), Image.Exif()
    changed[ExifTags.Base.Artist] = "another"
    again.save(once_more, "SVAE", exif=changed, icc_profile=None)
    last = Image.open(once_more)
    assert dict(last.getexif()) == {ExifTags.Base.Artist: "another"} and "icc_profile" not in last.info
    assert last.text == {"Title": "a title"} and last.tobytes() == image.tobytes()
    with pytest.raises(OSError, match="cannot write mode CMYK .*L, LA, RGB or RGBA"):
        image.convert("RGB").convert("CMYK").save(io.BytesIO(), "SVAE")


def test_files_of_webp_pixels_need_no_model(
    tiny_integer: selfvae.SelfVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(plugin, "_codecs", {})
    use(tiny_integer)
    flat = Image.new("RGBA", (40, 30), (10, 20, 30, 40))
    flat.save(tmp_path / "flat.svae", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    monkeypatch.setattr(plugin, "_codecs", {})
    monkeypatch.setattr(plugin, "load", lambda _: pytest.fail("a model was loaded"))
    monkeypatch.setattr("selfvae.hub.load", lambda _: pytest.fail("a model was loaded"))
    assert Image.open(tmp_path / "flat.svae").tobytes() == flat.tobytes()
    assert main(["decompress", str(tmp_path / "flat.svae"), str(tmp_path / "flat.png")]) == 0
    assert Image.open(tmp_path / "flat.png").tobytes() == flat.tobytes()
    assert main(["decompress", str(tmp_path / "flat.svae"), str(tmp_path / "a.png"), "--upto", "y1"]) == 2
    assert "--upto y1 needs --model" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "flat.svae"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == 3 and told["metadata"] == ["EXIF"] and told["model"] == "none is needed"
    monkeypatch.undo()
    selfvae.save(tiny_integer, tmp_path / "model")
    small = ["--upto", "y2", "--model", str(tmp_path / "model")]
    assert main(["decompress", str(tmp_path / "flat.svae"), str(tmp_path / "a.png"), *small]) == 0
    assert (Image.open(tmp_path / "a.png").mode, Image.open(tmp_path / "a.png").size) == ("RGBA", (20, 15))


@pytest.mark.usefixtures("never_webp")
def test_commands_with_an_integer_model(
    tiny_integer: selfvae.SelfVAE, picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    selfvae.save(tiny_integer, tmp_path / "model")
    own = ["--model", str(tmp_path / "model")]
    assert main(["info", str(tmp_path / "model"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["integer"] and told["file_format"] == 3 and len(told["known_answer"]) == 16
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    image.putalpha(100)
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in/a.png", icc_profile=b"profile")
    for strip in ([], ["--strip"]):
        assert main(["compress", str(tmp_path / "in/a.png"), str(tmp_path / "a.svae"), *own, *strip]) == 0
        capsys.readouterr()
        assert main(["info", str(tmp_path / "a.svae"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["channels"] == 4 and told["alpha_bytes"] > 0 and "y0_bytes" in told
        assert told.get("metadata") == (None if strip else ["colour profile"])
        assert main(["decompress", str(tmp_path / "a.svae"), str(tmp_path / "b.png"), *own]) == 0
        again = Image.open(tmp_path / "b.png")
        assert again.mode == "RGBA" and again.tobytes() == image.tobytes()
        assert again.info.get("icc_profile") == (None if strip else b"profile")
    capsys.readouterr()
    assert main(["pack", str(tmp_path / "in"), str(tmp_path / "all.svaes"), *own]) == 2
    assert "alpha channel" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"a\.png: archives hold no alpha"):
        pack(Codec(tiny_integer), [("a.png", picture[:, [0, 1, 2, 0]])])
    image.convert("RGB").save(tmp_path / "in/a.png")
    image.convert("L").save(tmp_path / "in/b.png")
    assert main(["pack", str(tmp_path / "in"), str(tmp_path / "all.svaes"), *own]) == 0
    assert main(["unpack", str(tmp_path / "all.svaes"), str(tmp_path / "out"), *own]) == 0
    for name in ("a.png", "b.png"):
        one, two = Image.open(tmp_path / "in" / name), Image.open(tmp_path / "out" / name)
        assert one.mode == two.mode and one.tobytes() == two.tobytes()


@pytest.mark.slow
@pytest.mark.usefixtures("never_webp")
def test_prefixes_in_the_benchmark_of_formats(tiny_integer: selfvae.SelfVAE) -> None:
    from selfvae.codec import bench, read_header

    codec = Codec(tiny_integer)
    x = torch.from_numpy(photo("coffee", 2)[None, :, :100, :160].copy())
    names = [name for name, _ in read_header(codec.compress(x)).ends() if name != "corrections"]
    assert names[-1] == "y0" and len(names) > 1
    result = bench.compare_formats(codec, [x])
    assert [row["setting"] for row in result["lossy"]["selfvae"]] == names[:-1]


def test_the_model_is_found_when_it_is_not_named(
    picture: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of several models in one folder, an archive, and Pillow."""
    monkeypatch.setattr(plugin, "_codecs", {})
    plugin._found.cache_clear()
    selfvae.save(fixed(), tmp_path / "models/mine")
    own, pictures = ["--model", str(tmp_path / "models/mine")], tmp_path / "in"
    pictures.mkdir()
    Image.fromarray(picture[0].permute(1, 2, 0).numpy()).save(pictures / "a.png")
    packed, album = tmp_path / "packed", str(tmp_path / "all.svaes")
    packed.mkdir()
    assert main(["compress", str(pictures / "a.png"), str(packed / "mine.svae"), *own]) == 0
    assert main(["compress", str(pictures / "a.png"), str(packed / "usual.svae")]) == 0
    assert main(["pack", str(pictures), album, *own]) == 0
    capsys.readouterr()
    monkeypatch.delenv("SELFVAE_MODELS", raising=False)
    alone = ["--jobs", "1"]  # worker processes take seconds to start; cli/test_pool.py tests them
    assert main(["decompress", str(packed), str(tmp_path / "some"), *alone]) == 1
    told = capsys.readouterr().err
    assert "mine.svae: the file needs the model with the fingerprint " in told
    assert f"none of {hub.PHOTOS}," in told and "--model" in told and "SELFVAE_MODELS" in told
    assert main(["unpack", album, str(tmp_path / "out")]) == 2
    assert "the file needs the model" in capsys.readouterr().err
    monkeypatch.setenv("SELFVAE_MODELS", str(tmp_path / "models"))
    assert main(["decompress", str(packed), str(tmp_path / "back"), *alone]) == 0
    assert main(["unpack", album, str(tmp_path / "out")]) == 0
    for file in (tmp_path / "back/mine.png", tmp_path / "back/usual.png", tmp_path / "out/a.png"):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(pictures / "a.png")))
    assert main(["decompress", str(packed / "usual.svae"), str(tmp_path / "x.png"), *own]) == 2
    assert "another model" in capsys.readouterr().err
    use(fixed(width=0.05))  # saves; the others are found
    for name in ("mine", "usual"):
        assert Image.open(packed / f"{name}.svae").tobytes() == Image.open(pictures / "a.png").tobytes()
    assert len(plugin._codecs) == 1


@pytest.mark.slow
def test_commands(picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selfvae.save(fixed(), tmp_path / "run")
    run = ["--model", str(tmp_path / "run")]
    pictures = tmp_path / "in"
    (pictures / "deep").mkdir(parents=True)
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    image.save(pictures / "a.png")
    image.convert("L").save(pictures / "deep" / "b.png")
    packed, back = tmp_path / "packed", tmp_path / "back"
    assert main(["compress", str(pictures), str(packed), "--jobs", "1", *run]) == 0
    assert main(["decompress", str(packed), str(back), "--jobs", "1", *run]) == 0
    for name in ("a.png", "deep/b.png"):
        one, two = Image.open(pictures / name), Image.open(back / name)
        assert one.mode == two.mode and one.tobytes() == two.tobytes()
    file = packed / "a.svae"
    capsys.readouterr()
    assert main(["info", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    parts = [value for key, value in told.items() if key[0] == "y"]
    assert told["header_bytes"] + sum(parts) == told["bytes"] == file.stat().st_size and len(parts) == 5
    assert main(["decompress", str(file), str(tmp_path / "y2.png"), "--upto", "y2", *run]) == 0
    assert Image.open(tmp_path / "y2.png").size == (16, 12)
    short = tmp_path / "short.svae"
    short.write_bytes(file.read_bytes()[:-200])
    assert main(["info", str(short)]) == 0
    assert "missing_bytes" in capsys.readouterr().out
    assert main(["decompress", str(short), str(tmp_path / "s.png"), *run]) == 2
    assert "--partial" in capsys.readouterr().err and not (tmp_path / "s.png").exists()
    assert main(["decompress", str(short), str(tmp_path / "s.png"), "--partial", *run]) == 0
    # what would lose something is refused
    image.putalpha(100)
    image.save(pictures / "alpha.png")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(pictures / "deep.png")
    (pictures / "deep.ppm").write_bytes(b"P6 1 1 65535\n" + bytes(6))
    (pictures / "ten.ppm").write_bytes(b"P6 1 1 1023\n" + bytes(6))
    (pictures / "bomb.pgm").write_bytes(b"P5 20000 20000 255\n")
    (pictures / "short.pgm").write_bytes(b"P5 100 100 255\n")
    image.convert("CMYK").save(pictures / "cmyk.tif")
    image.convert("P").save(pictures / "two.gif", save_all=True, append_images=[image.rotate(90)])
    for name, words in (
        ("alpha.png", "alpha channel"), ("deep.png", "not have 8 bits"), ("deep.ppm", "8 bits"),
        ("ten.ppm", "8 bits"), ("bomb.pgm", "cannot be read"), ("short.pgm", "cannot be read"),
        ("cmyk.tif", "neither grey nor RGB"), ("two.gif", "holds 2 pictures"),
    ):  # fmt: skip
        assert main(["compress", str(pictures / name), str(tmp_path / "x.svae"), *run]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "x.svae").exists()
    assert main(["compress", str(pictures / "a.png"), str(tmp_path / "x.png"), *run]) == 2
    assert "ends in .svae" in capsys.readouterr().err


def test_a_format_that_cannot_hold_a_picture_is_left_out(
    codec: Codec, picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfvae.codec import bench

    def encoded(image: Image.Image, name: str) -> bytes:
        if name == "WebP":
            raise ValueError("too large")
        return whole(image, name)

    whole = bench.encode_lossless
    monkeypatch.setattr(bench, "encode_lossless", encoded)
    with pytest.warns(UserWarning, match="WebP is left out: too large"):
        result = bench.compare_formats(codec, [picture, picture], prefixes=False)
    assert {"PNG", "selfvae"} <= set(result["lossless"]) and "WebP" not in result["lossless"]
