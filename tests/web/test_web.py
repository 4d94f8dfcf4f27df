"""What the page does, without a browser; test_browser.py clicks through it."""

from __future__ import annotations

import inspect
import io
import os
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import selfvae
from selfvae.codec import Codec, read_header, read_metadata
from selfvae.data.crops import photo
from selfvae.data.pictures import encode, to_image
from selfvae.transforms import MeanDownscale
from selfvae.web import work
from selfvae.web.jobs import Jobs, StoppedError
from selfvae.web.work import Models

PIXELS = 60_000


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """A part of a photograph, uint8 (1, 3, 40, 52)."""
    return torch.from_numpy(photo("coffee", 2)[None, :, 60:100, 90:142].copy())


@pytest.fixture(scope="module")
def models() -> Models:
    return Models.load()


def png(x: torch.Tensor) -> bytes:
    return encode(to_image(x[0]))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]


def test_the_progress_of_an_integer_model(models: Models, x: torch.Tensor) -> None:
    seen: list[tuple[float, str]] = []
    assert models.codec is not None
    steps, phases = work.compression(models.codec)
    with Jobs().run("a", lambda *news: seen.append(news), steps, *phases) as track:
        work.compress(models.codec, png(x), PIXELS, track)
    assert seen == [(0.0, "compressing and checking"), (0.5, "comparing with other formats")]
    assert work.shares(models.codec.model)["pixels"] == 1  # the command's bar counts by these


def test_every_gap_is_filled_consistently(models: Models, x: torch.Tensor) -> None:
    names = [str(gap) for gap in models.gaps]
    assert names == [
        "enlarge it, 2 x as wide and 2 x as high",
        "enlarge it (reduced by bicubic interpolation), 2 x as wide and 2 x as high",
        "enlarge it (reduced by bicubic interpolation and saved as JPEG), 2 x as wide and 2 x as high",
        "remove banding (8 values per channel)",
    ]  # fmt: skip
    for gap in models.gaps:
        (_, given), (_, plain), (_, a), (_, b) = work.enhance(gap, png(x), PIXELS, n=2, seed=3)
        rows = gap.model.scale(1)[0]
        assert a.size == b.size == given.size == plain.size == (52 * rows, 40 * rows)
        assert a.tobytes() != b.tobytes()
        drawn = pixels(a)
        d = gap.model.levels[0].transform
        if gap.model.levels[0].consistent:
            assert torch.equal(d(drawn), x >> 5 if "banding" in str(gap) else x)


def test_a_whole_picture_is_taken_apart_and_compared(models: Models, x: torch.Tensor) -> None:
    found = work.enhance(models.gaps[0], png(x[..., :51]), PIXELS, computed=True, n=1, decode="mean")
    names = [name for name, _ in found]
    assert names[0] == "given" and names[-1] == "the picture itself"
    plain, ours = (float(name.split()[-2]) for name in names[1:3])
    assert ours > plain + 0.5 and plain > 25
    given, whole = (pixels(found[i][1]) for i in (0, -1))
    assert torch.equal(given[:, :, ::2, ::2], MeanDownscale(2)(whole))
    with pytest.raises(ValueError, match="at least 2 x 2 pixels"):
        work.enhance(models.gaps[0], png(x[..., :1]), PIXELS, computed=True)


def test_compression_and_its_prefixes(models: Models) -> None:
    codec, x = models.codec, torch.from_numpy(photo("coffee", 2)[None, :, :120, :180].copy())
    assert codec is not None
    found = work.compress(codec, png(x), PIXELS)
    assert torch.equal(codec.decompress(found.data), x)
    assert len(found.data) < found.others["WebP"] < found.others["PNG"]
    sizes = [int(line.split("|")[2].replace(",", "")) for line in found.table().splitlines()[2:]]
    assert sizes == sorted(sizes) and {len(found.data), *found.others.values()} == set(sizes)
    errors = []
    for part in (0.0, 0.3, 0.6, 0.99):
        image, words = work.prefix(codec, found, part)
        assert image.size == (180, 120) and f"of {len(found.data):,} bytes: of 180 x 120 pixels" in words
        errors.append(float(words.split()[-2]))
    assert errors == sorted(errors) and errors[-1] > errors[0] + 3
    image, words = work.prefix(codec, found, 1.0)
    assert words.endswith("180 x 120 pixels, every one as it was.")
    assert torch.equal(pixels(image), x)
    opened = work.open_packed(codec, found.data, PIXELS)
    assert torch.equal(pixels(work.prefix(codec, opened, 1.0)[0]), x) and not opened.table()
    cut = work.open_packed(codec, found.data[: len(found.data) // 2], PIXELS)
    image, words = work.prefix(codec, cut, 1.0)
    assert image.size == (180, 120) and words.endswith("the rest is guessed.")
    assert torch.equal(pixels(image), pixels(work.prefix(codec, found, 0.5)[0]))
    with pytest.raises(ValueError, match="the picture has 180 x 120 pixels, too many"):
        work.open_packed(codec, found.data, 1000)


@pytest.mark.slow
@pytest.mark.usefixtures("never_webp")
def test_an_integer_model_its_alpha_and_its_prefixes(tiny_integer: selfvae.SelfVAE) -> None:
    codec = Codec(tiny_integer)
    rgb = torch.from_numpy(photo("coffee", 2)[None, :, :100, :160].copy())
    x = torch.cat([rgb, rgb[:, :1].flip(3)], 1)
    file = encode(to_image(x[0]), icc_profile=b"profile")
    found = work.compress(codec, file, PIXELS)
    header = read_header(found.data)
    names = [name for name, _ in header.ends()]
    assert names[0] == "metadata" and names[-2:] == ["alpha", "y0"] and len(names) > 3
    assert read_metadata(found.data).icc == b"profile"
    seen = []
    for end in [0, *(end for _, end in header.ends())]:
        image, words = work.prefix(codec, found, end / len(found.data))
        assert image.size == (160, 100)
        seen.append((image.mode, "alpha is missing" in words, "guessed" in words))
    first = [("RGB", True, True)] * (len(names) - 1)  # the last of them is without alpha still
    assert seen == [*first, ("RGBA", False, True), ("RGBA", False, False)]
    assert torch.equal(pixels(image), x) and words.endswith("every one as it was.")
    opened = work.open_packed(codec, found.data, PIXELS)
    assert torch.equal(pixels(work.prefix(codec, opened, 1.0)[0]), x)
    grey = work.compress(codec, encode(to_image(x[0, [0, 3]])), PIXELS)
    assert work.prefix(codec, grey, 1.0)[0].mode == "RGBA"
    assert torch.equal(codec.decompress(grey.data), x[:, [0, 3]])


def test_a_file_of_webp_pixels_has_one_part(tiny_integer: selfvae.SelfVAE) -> None:
    codec = Codec(tiny_integer)
    x = torch.full((1, 3, 30, 40), 7, dtype=torch.uint8)
    found = work.compress(codec, png(x), PIXELS)
    for part in (0.0, 0.5, 1.0):
        image, words = work.prefix(codec, work.open_packed(codec, found.data, PIXELS), part)
        assert torch.equal(pixels(image), x) and words.endswith("stored as WebP, in one part.")
    with pytest.raises(ValueError, match="nothing can be shown"):
        work.prefix(codec, work.open_packed(codec, found.data[:-5], PIXELS), 1.0)


def test_generation_and_interpolation(models: Models, x: torch.Tensor) -> None:
    for model in models.generators.values():
        a, b, c = (work.generate(model, 3, temperature=0.9, seed=seed) for seed in (0, 0, 1))
        assert a.tobytes() == b.tobytes() != c.tobytes()
    assert models.latent is not None
    ends = png(x), png(x.flip(3))
    for given in ("reconstruction", "u"):
        frames = work.interpolate(models.latent, ends, PIXELS, 5, given, temperature=0.0, seed=0)
        assert len(frames) == 5 and frames[0].size == (64, 64)
        assert len({frame.tobytes() for frame in frames}) == 5
        back = work.interpolate(models.latent, ends[::-1], PIXELS, 5, given, temperature=0.0, seed=0)
        assert back[-1].tobytes() == frames[0].tobytes()


def test_a_model_of_one_s_own(tmp_path: Path, x: torch.Tensor) -> None:
    selfvae.save(selfvae.build("vae", "tiny", width=0.05), tmp_path / "vae")
    models = Models.load(tmp_path / "vae")
    assert not models.gaps and models.codec and models.latent and list(models.generators) == ["vae"]
    selfvae.save(selfvae.build("selfvae-halve", "tiny", width=0.05), tmp_path / "halve")
    models = Models.load(tmp_path / "halve")
    assert len(models.gaps) == 6 and models.latent is None
    assert str(models.gaps[0]) == "enlarge it, 2 x as wide and 1 x as high"
    assert len(work.enhance(models.gaps[1], png(x), PIXELS)) == 4
    selfvae.save(selfvae.build("selfvae", "tiny", width=0.05, num_values=16), tmp_path / "few")
    assert Models.load(tmp_path / "few").codec is None


def _huge_png(side: int) -> bytes:
    """A PNG file of side x side black pixels, of a few kilobytes however large the side."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    body = b"".join(packer.compress(row) for _ in range(min(side, 4000))) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _zip(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a.png", content)
    return out.getvalue()


_RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
_IM = b"II*\0\x08\0\0\0: 1\nImage size (x*y): 9000*9000\n".ljust(511, b"\0") + b"\x1a"
_DEEP, _BROKEN = Image.fromarray(np.full((5, 7), 40_000, np.uint16)), "cannot be read"
_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
HOSTILE: dict[str, tuple[bytes, str | None, str | None]] = {  # file; why enhance, compress refuse it
    "huge.png": (_huge_png(50_000), "exceeds limit.*shrink it", "exceeds limit"),
    "tiny.png": (_file(_RGB.crop((0, 0, 1, 1)), "PNG"), None, None),
    "animated.gif": (
        _file(_RGB, "GIF", save_all=True, append_images=[_RGB.rotate(90)]), None, "holds 2 pictures",
    ),
    "cmyk.jpg": (_file(_RGB.convert("CMYK"), "JPEG"), None, "neither grey nor RGB"),
    "deep.png": (_file(_DEEP, "PNG"), None, "8 bits per channel"),
    "corrupt.png": (_file(_RGB.resize((99, 99)), "PNG")[:4000] + bytes(99), _BROKEN, _BROKEN),
    "wrong.txt": (_file(_RGB, "PNG"), None, None),
    "drawing.svg": (_SVG, "of no known kind", "of no known kind"),
    "zero.png": (b"", "the file is empty", "the file is empty"),
    "large.png": (_file(_RGB.resize((500, 500)), "PNG"), "500 x 500 .* for this page", "500 x 500 .* page"),
    "enlarged.png": (_file(_RGB.resize((125, 125)), "PNG"), "250 x 250 .* for this page", None),
    "padded.png": (_file(_RGB.resize((10_000, 1)), "PNG"), None, "10000 x 1 .* for this page"),
    "im.tif": (_IM, "cannot be read", "cannot be read"),
    "exif.jpg": (_file(_RGB, "JPEG", exif=b"Exif\0\0II*\0"), None, None),
    "archive.png": (_zip(_file(_RGB, "PNG")), "of no known kind", "of no known kind"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known kind", "no known kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_or_handled(name: str, models: Models) -> None:
    data, enhance, compress = HOSTILE[name]
    assert models.codec is not None
    began = time.process_time()
    if enhance:
        with pytest.raises(ValueError, match=enhance):
            work.enhance(models.gaps[0], data, PIXELS)
    else:
        assert len(work.enhance(models.gaps[0], data, PIXELS)) == 4
    if compress:
        with pytest.raises(ValueError, match=compress):
            work.compress(models.codec, data, PIXELS)
    else:
        assert work.compress(models.codec, data, PIXELS).data
    assert time.process_time() - began < 30


def test_a_codec_file_that_promises_too_much_or_is_broken(models: Models, x: torch.Tensor) -> None:
    assert models.codec is not None
    data = models.codec.compress(x, verify=False)
    for wrong in (
        b"",
        b"no file of ours",
        data[:40],
        data[:-7] + bytes(7),
        data[:60] + bytes(9) + data[69:],
    ):
        with pytest.raises(ValueError):
            work.prefix(models.codec, work.open_packed(models.codec, wrong, PIXELS), 1.0)
    other = Codec(models.generators["cifar10-2m-v1"]).compress(x, verify=False)
    with pytest.raises(ValueError, match="another model"):
        work.prefix(models.codec, work.open_packed(models.codec, other, PIXELS), 1.0)


# --- the server ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(models: Models) -> Iterator[str]:
    pytest.importorskip("gradio", reason="the page needs gradio")
    from selfvae.web.page import served

    with served(models, pixels=PIXELS, megabytes=1) as address:
        yield address


def get(address: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return answer.status, answer.read().decode(), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), {}


def test_the_page_asks_nobody_else_and_answers_nobody_else(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    status, text, headers = get(address)
    assert status == 200 and "selfvae" in text
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert get(address, Host="evil.example")[0] == 400
    assert get(f"{address}gradio_api/file=/etc/passwd")[0] in (403, 404)


@pytest.mark.slow
def test_hostile_files_leave_the_server_alive(address: str, models: Models, tmp_path: Path) -> None:
    client = pytest.importorskip("gradio_client")
    page = client.Client(address, verbose=False)
    for name, (data, why, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(data)
        what = models.gaps[0].label(PIXELS)
        job = (client.handle_file(tmp_path / name), what, False, 1, 0.5, 0)
        if why:
            with pytest.raises(Exception, match=f"{why}|File is empty"):
                page.predict(*job, api_name="/enhance")
        else:
            pair, sheet = page.predict(*job, api_name="/enhance")
            assert len(pair) == 2 and len(sheet) == 3
    for size in (2**20 + 2**16, 2**22):  # gradio's limit, and the gate's
        (tmp_path / "large.png").write_bytes(os.urandom(size))
        with pytest.raises(Exception, match="exceeds the maximum|413"):
            page.predict(client.handle_file(tmp_path / "large.png"), api_name="/compress")
    assert get(address)[0] == 200


@pytest.mark.usefixtures("never_webp")
def test_the_page_takes_alpha_with_an_integer_model(
    tiny_integer: selfvae.SelfVAE, tmp_path: Path, x: torch.Tensor
) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio")
    client = pytest.importorskip("gradio_client")
    from selfvae.web.page import served

    for channels in ([0, 1, 2, 0], [0, 1]):
        (tmp_path / f"{len(channels)}.png").write_bytes(encode(to_image(x[0, channels])))
    models = Models((), Codec(tiny_integer), {"tiny": tiny_integer}, None)
    with served(models, pixels=PIXELS, megabytes=1) as address:
        page = client.Client(address, verbose=False)
        for channels in ([0, 1, 2, 0], [0, 1]):
            file = client.handle_file(tmp_path / f"{len(channels)}.png")
            shown, _, words, packed, *_ = page.predict(file, api_name="/compress")
            assert "every one as it was" in words
            rgba = np.asarray(Image.open(shown).convert("RGBA"))
            assert np.array_equal(rgba[..., 3], x[0, channels[-1]].numpy())
            data = Path(packed if isinstance(packed, str) else packed["value"]).read_bytes()
            assert torch.equal(Codec(tiny_integer).decompress(data), x[:, channels])


def test_nothing_but_the_page_is_answered(address: str, tmp_path: Path) -> None:
    assert get(address, Origin="http://evil.example")[0] == 403
    assert get(address, Origin=address.rstrip("/"))[0] == 200
    for path in (
        "gradio_api/run/enhance",
        "gradio_api/process_recording",
        "gradio_api/stream/1",
        "monitoring",
    ):
        assert get(f"{address}{path}")[0] == 404
    client = pytest.importorskip("gradio_client")
    page = client.Client(address, verbose=False)
    fetched = {"path": f"{address}config", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match="fetches nothing from elsewhere"):
        page.predict(fetched, api_name="/compress")


def test_one_heavy_job_at_a_time(address: str, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("gradio_client")
    page, running, most = client.Client(address, verbose=False), [], []

    def slow(*args: object, **how: object) -> Image.Image:
        running.append(1)
        most.append(len(running))
        time.sleep(0.3)
        running.pop()
        return _RGB

    monkeypatch.setattr(work, "generate", slow)
    name = next(iter(models.generators))
    jobs = [page.submit(name, 2, 0.9, seed, api_name="/generate") for seed in range(4)]
    assert all(job.result() for job in jobs) and most == [1] * 4


def test_a_job_can_be_stopped_and_says_how_far_it_is(x: torch.Tensor) -> None:
    codec, jobs, seen = Codec(selfvae.load("results/models/photos-v0")), Jobs(), []
    steps, _ = work.compression(codec)

    def show(part: float, text: str) -> None:
        seen.append((part, text))

    with jobs.run("a", show, steps, "writing", "reading", "others") as track:
        work.compress(codec, png(x), PIXELS, track)
    parts, texts = zip(*seen, strict=True)
    assert list(parts) == sorted(parts) and parts[0] == 0 and parts[-1] == pytest.approx(2 / 3)
    assert list(dict.fromkeys(texts)) == ["writing", "reading", "others"]

    def stop(part: float, text: str) -> None:
        jobs.stop("another")
        if part > 0.1:
            jobs.stop("a")

    with pytest.raises(StoppedError), jobs.run("a", stop, steps) as track:
        work.compress(codec, png(x), PIXELS, track)
    jobs.stop("a")  # one that has ended
    with jobs.run("a", show, {}) as track:
        assert list(track(range(3), "")) == [0, 1, 2]
    jobs.end(1)
    with pytest.raises(StoppedError), jobs.run("a", show, {}) as track:
        list(track(range(3), ""))


def test_old_files_are_swept(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from selfvae.web.page import _sweep

    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.bin").write_bytes(b"1")
    for name in ("old", "old.bin"):
        os.utime(tmp_path / name, (time.time() - 100, time.time() - 100))
    (tmp_path / "rewritten").mkdir()
    (tmp_path / "rewritten/a").write_bytes(b"1")
    os.utime(tmp_path / "rewritten", (time.time() - 100, time.time() - 100))
    _sweep(tmp_path, 50)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "new.bin", "rewritten"]


def test_nothing_stays_when_the_server_ends(models: Models) -> None:
    pytest.importorskip("gradio")
    from selfvae.web.page import served

    before = os.environ.get("GRADIO_TEMP_DIR")
    with served(models) as first:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.is_dir() and get(first)[0] == 200
    assert not folder.exists() and os.environ.get("GRADIO_TEMP_DIR") == before
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(first, timeout=5)


@pytest.mark.slow
def test_the_command_ends_clean(tmp_path: Path) -> None:
    """A kill removes what it wrote, too, and ends what is being worked on."""
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    Image.effect_noise((400, 400), 50).convert("RGB").save(tmp_path / "noise.png")
    with subprocess.Popen(
        [sys.executable, "-m", "selfvae.cli", "serve", "photos-v2", "--no-browser"],
        env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout
        address = server.stdout.readline().split()[0]
        assert get(address)[0] == 200 and list(tmp_path.glob("selfvae-*"))
        page = client.Client(address, verbose=False)
        job = page.submit(client.handle_file(tmp_path / "noise.png"), api_name="/compress")
        time.sleep(2)  # in the middle of a job of many seconds
        assert not job.done()
        server.terminate()
        assert server.wait(30) == 0
    assert not list(tmp_path.glob("selfvae-*"))


def test_a_port_that_is_taken(address: str, models: Models) -> None:
    from selfvae.web.page import served

    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"port {port} is taken"), served(models, port=port):
        pass


def test_wrong_limits(models: Models) -> None:
    pytest.importorskip("gradio")
    from selfvae.web.page import served

    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"pixels": 0}, "at least 1"),
        ({"port": 99999}, "1 to 65535"),
        ({"host": "203.0.113.7"}, "can be served on"),
    ]
    for wrong, message in wrongs:
        with pytest.raises((ValueError, OSError), match=message), served(models, **wrong):
            pass


def test_limits_are_told_beforehand_and_errors_once(models: Models, tmp_path: Path) -> None:
    """Results of 4 megapixels by default; a job's progress, or its error, is shown in one place."""
    pytest.importorskip("gradio")
    from selfvae.web.page import Page, served

    assert inspect.signature(served).parameters["pixels"].default == 2**22
    page = Page(models, 2**22, tmp_path)
    words = str(page.blocks.get_config_file())
    assert "Pictures and results may have up to 4,194,304 pixels" in words
    assert "2 x as high: up to 1,048,576 pixels" in words and "Remove banding" in words
    for job in page.blocks.fns.values():
        places = job.show_progress_on or job.outputs
        assert job.show_progress == "hidden" or len(places) == 1, job.name
