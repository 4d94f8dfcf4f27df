"""Archives of many pictures."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from codec_models import bits, fixed, mixed_album
from PIL import Image
from torch import Tensor

import selfvae
from selfvae.cli import main
from selfvae.codec import (
    Archive,
    Codec,
    CodecError,
    pack,
)


@pytest.mark.parametrize("block", [1, 3, 64])
def test_archives(codec: Codec, picture: Tensor, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    album = mixed_album(picture)
    data = pack(codec, album, block=block)
    archive = Archive(codec, data)
    assert len(archive) == 10 and [entry.name for entry in archive.entries] == [name for name, _ in album]
    for (name, x), (found, back) in zip(album, archive, strict=True):
        assert name == found and torch.equal(x, back)
    decoded = 0
    monkeypatch.setattr(codec, "pop", lambda *args, **how: (_count(), Codec.pop(codec, *args, **how))[1])

    def _count() -> None:
        nonlocal decoded
        decoded += 1

    assert torch.equal(archive["grey.png"], album[2][1]) and torch.equal(archive[9], album[9][1])
    assert decoded == {1: 2, 3: 3, 64: 8}[block]  # groups of one size, up to the picture asked for
    with pytest.raises(KeyError, match="no picture 'x'"):
        archive["x"]
    with pytest.raises(IndexError, match="holds 10 pictures"):
        archive[10]


def test_an_archive_is_as_long_as_the_scores(codec: Codec, picture: Tensor) -> None:
    album = [(str(i), (picture.int() + i).clamp(max=255).byte()) for i in range(40)]
    model = fixed()
    ideal = sum(bits(model, x) for _, x in album)
    data = pack(codec, album, verify=False)
    index = 21 + int.from_bytes(data[13:17], "little")
    assert 8 * (len(data) - index) == pytest.approx(ideal, rel=0.003, abs=200)
    assert index < 40 * 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pictures": [["../../etc/x", 1, 1, 3, 0]]}, "path inside the archive"),
        ({"pictures": [["/x", 1, 1, 3, 0]]}, "path inside the archive"),
        ({"pictures": [["x", 2**20, 2**20, 3, 0]]}, "are more than"),
        ({"pictures": [["x", 0, 1, 3, 0]]}, "makes no sense"),
        ({"pictures": [["x", 1]]}, "makes no sense"),
        ({"pictures": 3}, "makes no sense"),
        ({"pictures": []}, "do not hold its pictures"),
        ({"blocks": [[1, -5, 0], [0, 5, 0]]}, "do not hold|bytes long"),
        ({"levels": 8}, "does not fit the model"),
        ({"levels": math.inf}, "makes no sense"),
        ({"pictures": [["x", 24, 32, 4, 0]]}, "does not fit the model"),
        ({"pictures": [["C:/x", 24, 32, 3, 0]]}, "path inside the archive"),
        ({"pictures": [["a/./b", 24, 32, 3, 0]]}, "path inside the archive"),
        ({"pictures": [["x", 24, 32, 3, 0], ["x", 24, 32, 3, 0]]}, "name of its own"),
    ],
)
def test_hostile_indices(codec: Codec, picture: Tensor, changes: dict[str, Any], words: str) -> None:
    data = pack(codec, [("x", picture)], verify=False)
    size = int.from_bytes(data[13:17], "little")
    index = json.loads(zlib.decompress(data[21 : 21 + size]))
    for text in (json.dumps({**index, **changes}), "[" * 200_000):
        packed = zlib.compress(text.encode())
        crc = zlib.crc32(packed, zlib.crc32(data[:13]))
        head = len(packed).to_bytes(4, "little") + crc.to_bytes(4, "little")
        with pytest.raises(CodecError, match=words if text[0] == "{" else "makes no sense"):
            Archive(codec, data[:13] + head + packed + data[21 + size :])


def test_what_cannot_be_packed(codec: Codec, picture: Tensor) -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        pack(codec, [("a", picture), ("a", picture)])
    with pytest.raises(ValueError, match="path inside"):
        pack(codec, [("../a", picture)])
    with pytest.raises(ValueError, match="at least 1"):
        pack(codec, [("a", picture)], block=0)
    assert len(Archive(codec, pack(codec, []))) == 0


def test_archive_commands(picture: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selfvae.save(fixed(), tmp_path / "run")
    run = ["--model", str(tmp_path / "run")]
    for name, x in mixed_album(picture):
        if name != "small.jpg":
            target = tmp_path / "in" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            selfvae.data.pictures.write(x[0], target)
    file = tmp_path / "all.svaes"
    assert main(["pack", str(tmp_path / "in"), str(file), *run]) == 0
    assert f"{file}: 9 pictures, " in capsys.readouterr().out
    assert main(["unpack", str(file), str(tmp_path / "out"), *run]) == 0
    before, after = (
        {f.relative_to(root).as_posix(): f for root in [tmp_path / where] for f in root.rglob("*.png")}
        for where in ("in", "out")
    )
    assert before.keys() == after.keys() and len(before) == 9
    for name, one in before.items():
        a, b = Image.open(one), Image.open(after[name])
        assert a.mode == b.mode and a.tobytes() == b.tobytes()
    assert main(["unpack", str(file), str(tmp_path / "one"), "--only", "deep/3.png", *run]) == 0
    assert [f.name for f in (tmp_path / "one").rglob("*.png")] == ["3.png"]
    assert main(["unpack", str(file), str(tmp_path / "one"), "--only", "x", *run]) == 2
    assert main(["info", str(file)]) == 2
    names = ["a.jpg", "a.gif", "a.jpg.png"]
    x = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    file.write_bytes(pack(Codec(fixed()), [(name, x) for name in names]))
    assert main(["unpack", str(file), str(tmp_path / "clash"), *run]) == 2
    assert "would become" in capsys.readouterr().err and not (tmp_path / "clash").exists()
    assert main(["unpack", str(file), str(tmp_path / "b"), "--only", "a.gif", *run]) == 0
    assert main(["pack", str(tmp_path / "in"), str(tmp_path / "a.zip"), *run]) == 2
    assert main(["pack", str(tmp_path / "in" / "one.png"), str(file), *run]) == 2


def test_an_index_that_could_not_be_read_is_not_written(
    codec: Codec, picture: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfvae.codec import archive

    monkeypatch.setattr(archive, "_INDEX", 200)
    with pytest.raises(ValueError, match="too many for one archive"):
        pack(codec, [("a" * 200, picture)])
    with pytest.raises(ValueError, match=r"^b.png: expected one picture"):
        pack(codec, [("b.png", picture[:, :2])])
