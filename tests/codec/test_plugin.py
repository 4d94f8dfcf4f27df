"""The Pillow plugin, the commands for files, and the benchmark of formats."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from codec_models import fixed
from PIL import Image, ImageFile
from torch import Tensor

import selfvae
from selfvae.cli import main
from selfvae.codec import (
    Codec,
    CodecError,
    plugin,
    use,
)


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
    assert main(["decompress", str(packed), str(tmp_path / "some")]) == 1
    told = capsys.readouterr().err
    assert "mine.svae: the file needs the model with the fingerprint " in told
    assert "none of photos-v0," in told and "--model" in told and "SELFVAE_MODELS" in told
    assert main(["unpack", album, str(tmp_path / "out")]) == 2
    assert "the file needs the model" in capsys.readouterr().err
    monkeypatch.setenv("SELFVAE_MODELS", str(tmp_path / "models"))
    assert main(["decompress", str(packed), str(tmp_path / "back")]) == 0
    assert main(["unpack", album, str(tmp_path / "out")]) == 0
    for file in (tmp_path / "back/mine.png", tmp_path / "back/usual.png", tmp_path / "out/a.png"):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(Image.open(pictures / "a.png")))
    assert main(["decompress", str(packed / "usual.svae"), str(tmp_path / "x.png"), *own]) == 2
    assert "another model" in capsys.readouterr().err
    use(fixed(width=0.05))  # saves; the others are found
    for name in ("mine", "usual"):
        assert Image.open(packed / f"{name}.svae").tobytes() == Image.open(pictures / "a.png").tobytes()
    assert len(plugin._codecs) == 1


def test_commands(picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selfvae.save(fixed(), tmp_path / "run")
    run = ["--model", str(tmp_path / "run")]
    pictures = tmp_path / "in"
    (pictures / "deep").mkdir(parents=True)
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy())
    image.save(pictures / "a.png")
    image.convert("L").save(pictures / "deep" / "b.png")
    packed, back = tmp_path / "packed", tmp_path / "back"
    assert main(["compress", str(pictures), str(packed), *run]) == 0
    assert main(["decompress", str(packed), str(back), *run]) == 0
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
        result = bench.bench(codec, [picture, picture], prefixes=False)
    assert {"PNG", "selfvae"} <= set(result["lossless"]) and "WebP" not in result["lossless"]
