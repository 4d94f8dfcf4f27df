import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selfvae.data import sources
from selfvae.data.batches import Images, augment, batch_indices, hold_out, shuffled, to_uint8
from selfvae.data.crops import crop
from selfvae.files import cache_folder
from selfvae.metrics.baselines import lossless_bits_per_dim


def pictures(folder: Path, n: int, size: tuple[int, int] = (20, 14)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(
            folder / f"{i:03}.png"
        )


def test_photos_are_prepared_once_and_held_out_by_photograph() -> None:
    first = sources.load("photos", 16)
    assert isinstance(first.train.array, np.memmap) and first.train.array.dtype == np.uint8
    assert first.train.shape[1:] == first.test.shape[1:] == (3, 16, 16)
    before = sorted((f, f.stat().st_mtime_ns) for f in cache_folder().rglob("*"))
    second = sources.load("photos", 16)
    assert torch.equal(first.train.take([0, 5]), second.train.take([0, 5]))
    assert before == sorted((f, f.stat().st_mtime_ns) for f in cache_folder().rglob("*"))
    with pytest.raises(ValueError, match="smaller than size 999"):
        sources.load("photos", 999)


def test_folder_of_images(tmp_path: Path) -> None:
    pictures(tmp_path / "mine", 20)
    images = sources.load(tmp_path / "mine", 8)
    assert len(images.train) + len(images.validation) + len(images.test) == 20
    assert images.train.shape[1:] == (3, 8, 8)
    pictures(tmp_path / "mine", 21)  # a new file: prepared anew
    again = sources.load(tmp_path / "mine", 8)
    assert len(again.train) + len(again.validation) + len(again.test) == 21


def test_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 20)
    pictures(tmp_path / "val", 4)
    pictures(tmp_path / "test", 3)
    images = sources.load(tmp_path, 8)
    assert [len(i) for i in (images.train, images.validation, images.test)] == [20, 4, 3]


def test_resizing_takes_the_centre_square(tmp_path: Path) -> None:
    picture = Image.new("RGB", (24, 8), "red")
    picture.paste("blue", (8, 0, 16, 8))
    assert sources.square(picture, 8)[2].min() == 255


def test_array_file_and_folder(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "all.npy", array)
    images = sources.load(tmp_path / "all.npy")
    parts = [images.train, images.validation, images.test]
    assert sum(map(len, parts)) == 40
    seen = np.concatenate([p.take(range(len(p))).numpy() for p in parts])
    assert {a.tobytes() for a in seen} == {a.tobytes() for a in array}
    np.save(tmp_path / "train.npy", array)
    np.save(tmp_path / "test.npy", array[:7])
    images = sources.load(tmp_path)
    assert [len(i) for i in (images.train, images.validation, images.test)] == [34, 6, 7]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 3, 8, 8), np.float32), r"must be uint8 .* got float32 .*0\.\.255"),
        (np.zeros((4, 8, 8, 3), np.uint8), "transpose"),
        (np.zeros((4, 8, 8), np.uint8), "got uint8"),
        (np.zeros((0, 3, 8, 8), np.uint8), "got uint8"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "odd.npy", array)
    with pytest.raises(ValueError, match=message) as caught:
        sources.load(tmp_path / "odd.npy")
    assert "odd.npy" in str(caught.value)


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.*photos, cifar10"):
        sources.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        sources.load(tmp_path / "empty")
    pictures(tmp_path / "broken", 5)
    (tmp_path / "broken" / "002.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"002\.png cannot be read as an image"):
        sources.load(tmp_path / "broken")
    assert not list(cache_folder().glob(".folder*"))  # nothing half prepared is left
    (tmp_path / "a.npy").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"a\.npy cannot be read"):
        sources.load(tmp_path / "a.npy")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"got a \.txt file"):
        sources.load(tmp_path / "a.txt")
    np.save(tmp_path / "b.npy", np.zeros((4, 3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"8 x 8 pixels; 16 x 16 was asked for"):
        sources.load(tmp_path / "b.npy", 16)
    (tmp_path / "sixteen").mkdir()
    pictures(tmp_path / "sixteen", 3)
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "sixteen" / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif has 32 bits per channel"):
        sources.load(tmp_path / "sixteen", 8)


@pytest.mark.parametrize("name", list(sources.HUB))
def test_hub_sources_on_a_local_data_set_of_the_same_schema(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    import dataclasses

    source = sources.HUB[name]
    side = (178, 218) if name == "celeba" else (source.size, source.size)
    random = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for split in filter(None, source.splits):
        noise = random.integers(0, 128, (8, *side[::-1], 3), dtype=np.uint8)
        noise[:, 40:188, 15:163] += 128  # the faces: row 40, column 15, 148 x 148 pixels
        rows = [Image.fromarray(picture) for picture in noise]
        table = datasets.Dataset.from_dict({source.column: rows, "label": [0] * 8})
        table = table.cast_column(source.column, datasets.Image())
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    local = dataclasses.replace(source, repo=str(tmp_path), config=None, revision=None)
    monkeypatch.setitem(sources.HUB, name, local)
    images = sources.load(name)
    assert images.train.shape[1:] == (3, source.size, source.size)
    assert len(images.test) == 8
    assert len(images.train) + len(images.validation) == (16 if source.splits[1] else 8)
    if name == "celeba":  # nothing but the faces, and all of them
        assert images.test.take([0]).float().mean() == pytest.approx(191.5, abs=3)
        assert images.test.take(range(8)).min() > 120


def test_hub_source_that_cannot_be_reached(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    source = sources.HubSource(str(tmp_path / "none"), "image", ("train", None, "test"), 8)
    with pytest.raises(OSError, match="could not be loaded"):
        source.write(tmp_path, 8)


def test_crops_of_photographs(tmp_path: Path) -> None:
    """Whole pictures are held out; what is too small is left out; shrinking takes the means of blocks."""
    pictures(tmp_path / "mine" / "a", 20, (40, 32))
    pictures(tmp_path / "mine" / "small", 5, (12, 12))
    counts = crop(tmp_path / "mine", tmp_path / "out", size=16, shrink=(1, 2, 9), n=200)
    assert counts == {"test": 2, "validation": 2, "train": 16}
    images = sources.load(tmp_path / "out")
    assert [len(i) for i in (images.train, images.validation, images.test)] == [200, 10, 10]
    x = torch.cat([i.take(range(len(i))) for i in (images.train, images.validation, images.test)]).numpy()
    assert x.shape[1:] == (3, 16, 16)
    # noise: halved, its standard deviation of 74 is halved as well
    spread = x.reshape(220, -1).std(1)
    assert (spread[spread > 55].min()) > 60 and (spread[spread < 55]).max() < 45
    assert 0.3 < (spread > 55).mean() < 0.7
    again = crop(tmp_path / "mine", tmp_path / "again", size=16, shrink=(1, 2, 9), n=200)
    assert again == counts
    for split in ("train", "test"):
        one, other = (np.load(tmp_path / out / f"{split}.npy") for out in ("out", "again"))
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out": "mine"}, FileExistsError, "exists: choose another"),
        ({"source": "none"}, FileNotFoundError, "no folder of pictures"),
        ({"size": 64}, ValueError, r"holds 4 picture\(s\), 0 from which 64 x 64"),
        ({"shrink": ()}, ValueError, "every shrink at least 1"),
        ({"n": 3}, ValueError, "n at least 20"),
        ({"source": "broken"}, ValueError, "x.png"),
    ],
)
def test_crops_that_cannot_be(
    changes: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    pictures(tmp_path / "mine", 4)
    pictures(tmp_path / "broken", 4)
    (tmp_path / "broken" / "x.png").write_bytes(b"no picture")
    how = {"source": "mine", "out": "out", "size": 8, "shrink": (1,), "n": 20, **changes}
    source, out = (tmp_path / str(how.pop(name)) for name in ("source", "out"))
    with pytest.raises(error, match=message):
        crop(source, out, **how)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_batches_visit_every_image_once_an_epoch() -> None:
    steps = [batch_indices(10, 4, step, seed=3) for step in range(5)]
    epochs = np.concatenate(steps).reshape(2, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert epochs[0].tolist() != epochs[1].tolist()
    assert np.array_equal(steps[2], batch_indices(10, 4, 2, seed=3))


def test_augment_flips_and_shifts_whole_images() -> None:
    x = torch.arange(8, dtype=torch.uint8).expand(64, 3, 8, 8).contiguous()
    out = augment(x, flip=True)
    mirrored = (out[:, 0, 0, 0] == 7).sum().item()
    assert 10 < mirrored < 54
    assert all(torch.equal(o, x[0]) or torch.equal(o, x[0].flip(2)) for o in out)
    shifted = augment(x, translate=2)
    assert set(shifted[:, 0, 0, 3].tolist()) == {1, 2, 3, 4, 5}
    assert torch.equal(augment(x), x)


def test_to_uint8() -> None:
    with pytest.raises(ValueError, match="nan"):
        to_uint8(torch.tensor([float("nan"), 0.5]))
    assert to_uint8(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert to_uint8(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="floats in"):
        to_uint8(torch.tensor([2.0]))


def test_lossless_formats_count_the_payload() -> None:
    noise = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert 8 < lossless_bits_per_dim(noise, "PNG") < 8.5
    flat = torch.full((3, 3, 32, 32), 9, dtype=torch.uint8)
    assert lossless_bits_per_dim(flat, "WebP") < lossless_bits_per_dim(noise, "WebP") / 10


def test_too_few_images_to_split(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 2)
    for _ in range(2):  # nothing wrong is left in the cache
        with pytest.raises(ValueError, match="holds 2 image.* at least 3"):
            sources.load(str(tmp_path), 8)


def shades(folder: Path, name: str, values: range, side: int = 8) -> None:
    """Grey pictures, each of one value; `name` sorts them."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        Image.new("L", (side, side), value).save(folder / f"{name}{value:03}.png")


def test_the_first_images_of_a_split_are_of_all_classes(tmp_path: Path) -> None:
    """Three classes, folder by folder: a tenth of each split that a limit takes holds all three."""
    for split in ("train", "test"):
        for i, name in enumerate("abc"):
            shades(tmp_path / split / name, name, range(80 * i, 80 * i + 80))
    images = sources.load(tmp_path, 8)
    for part in (images.validation, images.test):
        first = part.take(range(len(part) // 4))[:, 0, 0, 0].div(80, rounding_mode="floor")
        assert set(first.tolist()) == {0, 1, 2}
        again = sources.load(tmp_path, 8)
        assert torch.equal(again.test.take(range(5)), images.test.take(range(5)))
    seen = images.test.take(range(len(images.test)))[:, 0, 0, 0]
    assert sorted(seen.tolist()) == list(range(240))  # all of it is what it was
    train, held = hold_out(200)
    assert train.tolist() == sorted(train) and held.tolist() != sorted(held)
    assert sorted([*train, *held]) == list(range(200))


def test_arrays_keep_their_order(tmp_path: Path) -> None:
    """The first images of a published test set are the first ones."""
    array = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1) + np.zeros((1, 3, 8, 8), np.uint8)
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.npy", array)
    images = sources.load(tmp_path)
    assert images.test.take(range(5))[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    held = images.validation.take(range(6))[:, 0, 0, 0].tolist()
    assert held != sorted(held) and len(set(held)) == 6
    part = shuffled(Images(array, np.arange(30, 40)))
    assert sorted(part.take(range(10))[:, 0, 0, 0].tolist()) == list(range(30, 40))


def test_preparing_needs_the_memory_of_one_picture(tmp_path: Path) -> None:
    shades(tmp_path / "mine", "x", range(60))
    sources.load(tmp_path / "mine", 8)  # imports
    tracemalloc.start()
    images = sources.load(tmp_path / "mine", 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(images.train) * 3 * 200 * 200 > 4_000_000 and peak < 2_000_000


def test_one_prepares_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shades(tmp_path / "mine", "x", range(60))
    times: list[int] = []
    write = sources._write_folder

    def slow(*args: Any) -> None:
        times.append(1)
        time.sleep(0.3)
        write(*args)

    monkeypatch.setattr(sources, "_write_folder", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: sources.load(tmp_path / "mine", 8), range(4)))
    assert len(times) == 1 and len({images.train.digest() for images in found}) == 1
