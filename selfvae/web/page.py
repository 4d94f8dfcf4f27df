"""The page in a browser: a tab for each thing that the models do. It asks nobody but this machine."""

from __future__ import annotations

import contextlib
import functools
import html
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image

from selfvae import data as sources
from selfvae import pictures
from selfvae.web import work
from selfvae.web.work import Models

try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
except ImportError:
    raise ImportError("the page needs gradio: pip install 'selfvae[demo]'") from None

__all__ = ["Page", "served"]

_KEPT = 1800.0  # seconds that files and what a tab remembers are kept
_QUEUE = 16  # jobs that may wait
_STEPS = 9  # of an interpolation
_HEAVY: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "work"}
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
# what of gradio's server the page needs; the rest is not answered
_PATHS = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json")
_FOLDERS = ("/assets/", "/static/")
_API = (
    "info",
    "config",
    "upload",
    "file=",
    "queue/",
    "heartbeat/",
    "startup-events",
    "cancel",
    "reset",
    "app_id",
)

_INTRO = """# selfvae
Models that know how likely a picture is: so they can **fill in** what a picture lacks, and **store** what
is there in few bytes. All of it happens on this machine; no picture leaves it."""
_ENHANCE = """A small, grey or banded picture comes in, and the model draws what could have been there.
Draws differ where it is unsure; each of them agrees with what was given, exactly."""
_COMPRESS = """The file holds every pixel, the coarsest part of the picture first. So a file that has not
arrived as a whole shows a picture already: move the slider."""
_GENERATE = "Images from nothing, the coarsest level first; each level is drawn given the one before."
_INTERPOLATE = """The model explains a picture by latents, some hundred numbers. Between those of two
pictures lies a line, and each point of it is a picture again. (A small model of small pictures: expect the
gist.)"""

# small pictures are for looking at, and their pixels are what matters
_STYLE = ".pixels img { width: 100%; object-fit: contain; image-rendering: pixelated }"

# the browser may ask nobody but this server
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'"
)


class _Gate:
    """Answers what the page asks alone, nothing that another page asks, and puts the policy on it."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer"}
                message["headers"] = [
                    *message["headers"],
                    *((name.encode(), value.encode()) for name, value in more.items()),
                ]
            await send(message)

        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal:
            await PlainTextResponse(*refusal)(scope, receive, answer)
        else:
            await self.app(scope, receive, answer)

    def _refusal(self, scope: Any) -> tuple[str, int] | None:
        """Text and status of a refusal."""
        path = scope["path"]
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        api = tuple(f"/gradio_api/{name}" for name in _API)
        if path not in _PATHS and not path.startswith((*_FOLDERS, *api)):
            return "not a part of this page", 404
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != headers.get("host"):
            return "another page may not use this one", 403
        if int(headers.get("content-length") or 0) > self.most:
            return "the file exceeds the maximum size of this page (selfvae serve --megabytes)", 413
        return None


def _upload(label: str) -> gr.File:
    """A box for a file that is dropped there: neither an address to fetch nor one that is forgotten.

    Not a class of its own: gradio writes a file beside the module of one.
    """
    file: Any = gr.File(label=label, type="binary", height=130)
    move, preprocess = file.async_move_resource_to_block_cache, file.preprocess

    async def dropped(place: Any) -> str | None:
        if "://" in str(place):
            raise gr.Error("this page fetches nothing from elsewhere: drop a file", print_exception=False)
        found: str | None = await move(place)
        return found

    def there(payload: Any) -> Any:
        if payload is not None and not Path(payload.path).is_file():
            raise gr.Error("this file was forgotten meanwhile: drop it again", print_exception=False)
        return preprocess(payload)

    file.async_move_resource_to_block_cache, file.preprocess = dropped, there
    return file


def _errors_shown(job: Callable[..., Any]) -> Callable[..., Any]:
    """The job, its refusals shown on the page."""

    @functools.wraps(job)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return job(*args, **kwargs)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None
        except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
            text = f"this did not work ({html.escape(str(error))[:200]}): try a smaller picture"
            raise gr.Error(text, duration=None) from None

    return told


def _required(value: bytes | None) -> bytes:
    if value is None:
        raise ValueError("no file is chosen yet: drop one into the box on the left")
    return value


def _remembered(value: Any) -> Any:
    if value is None:
        raise ValueError("this was too long ago and is forgotten: press the button again")
    return value


def _image(label: str | None, height: int | None = None) -> gr.Image:
    """A place for a picture, enlarged to it; without the button that would publish the picture."""
    return gr.Image(
        label=label, show_label=label is not None, format="png", interactive=False, height=height,
        buttons=["download", "fullscreen"], elem_classes="pixels",
    )  # fmt: skip


class Page:
    """The page of some models.

    Arguments:
        pixels: of a picture that comes in or goes out, at most.
        folder: what it writes for the browser goes there.
    """

    def __init__(self, models: Models, pixels: int, folder: Path) -> None:
        self.models, self.pixels, self.folder = models, pixels, folder
        with gr.Blocks(title="selfvae", analytics_enabled=False) as self.blocks:
            gr.Markdown(_INTRO)
            if models.gaps:
                self._enhance()
            if models.codec:
                self._compress()
            self._generate()
            if models.latent:
                self._interpolate()
        self.blocks.queue(max_size=_QUEUE, api_open=False)  # nothing passes by the queue

    def _file(self, data: bytes, name: str) -> str:
        """A file for the browser, in a folder of its own."""
        file = Path(tempfile.mkdtemp(dir=self.folder)) / name
        file.write_bytes(data)
        return str(file)

    def _picture(self, label: str, example: str) -> gr.File:
        """A box for a file, what is in it, and a button for a photograph that comes with scikit-image."""
        file = _upload(label)
        take = gr.Button("or take an example", size="sm")
        seen = _image("what was in it", height=200)

        @_errors_shown
        def look(data: bytes | None) -> Image.Image | None:
            return None if data is None else pictures.to_image(work.read(data, self.pixels).pixels[0])

        def example_file() -> str:
            x = torch.from_numpy(sources.photo(example, 2))
            return self._file(pictures.encode(pictures.to_image(x)), f"{example}.png")

        file.change(look, file, seen, api_visibility="private")
        take.click(example_file, None, file, api_visibility="private")
        return file

    def _how(self, temperature: float) -> list[Any]:
        """Temperature and seed."""
        return [
            gr.Slider(0, 1, temperature, step=0.05, label="temperature: 0 the likeliest, 1 a fair draw"),
            gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**31 - 1),
        ]

    def _enhance(self) -> None:
        gaps = self.models.gaps
        with gr.Tab("Enhance"):
            gr.Markdown(_ENHANCE)
            with gr.Row():
                with gr.Column(scale=1):
                    file = self._picture("a picture", "chelsea")
                    names = [str(gap).capitalize() for gap in gaps]
                    which = gr.Radio(names, value=names[0], label="what it lacks", type="index")
                    computed = gr.Checkbox(label="it lacks nothing: take that away first, and compare")
                    n = gr.Slider(1, 4, 2, step=1, precision=0, label="draws")
                    how = self._how(0.5)
                    go = gr.Button("Enhance", variant="primary")
                with gr.Column(scale=2):
                    sheet = gr.Gallery(
                        label="result", format="png", columns=2, height=1000, object_fit="contain",
                        buttons=["download", "fullscreen"], elem_classes="pixels",
                    )  # fmt: skip

        @_errors_shown
        def enhance(
            data: bytes | None, which: int, computed: bool, n: int, heat: float, seed: int,
            progress: Any = gr.Progress(),  # noqa: B008 (the place where gradio looks for it)
        ) -> list[tuple[Image.Image, str]]:  # fmt: skip
            found = work.enhance(
                gaps[which], _required(data), self.pixels, computed=computed, n=n, temperature=heat,
                seed=seed, track=progress.tqdm,
            )  # fmt: skip
            return [(image, name) for name, image in found]

        go.click(enhance, [file, which, computed, n, *how], sheet, **_HEAVY)

    def _compress(self) -> None:
        codec = self.models.codec
        assert codec is not None
        with gr.Tab("Compress"):
            gr.Markdown(_COMPRESS)
            with gr.Row():
                with gr.Column(scale=1):
                    file = self._picture("a picture", "coffee")
                    go = gr.Button("Compress", variant="primary")
                    packed = _upload("or a .svae file")
                    open_it = gr.Button("Open")
                with gr.Column(scale=2):
                    table = gr.Markdown()
                    result = gr.File(label="the file", interactive=False, visible=False)
                    part = gr.Slider(0, 100, 100, step=1, label="% of it has arrived", visible=False)
                    words = gr.Markdown()
                    shown = _image("what it shows", height=480)
            kept = gr.State(None, time_to_live=_KEPT)

        @_errors_shown
        def compress(data: bytes | None, progress: Any = gr.Progress()) -> Any:  # noqa: B008
            found = work.compress(codec, _required(data), self.pixels, progress.tqdm)
            return {
                kept: found,
                table: found.table(),
                result: gr.File(self._file(found.data, "picture.svae"), visible=True),
                part: gr.Slider(value=100, visible=True),
                **dict(zip((shown, words), work.prefix(codec, found, 1.0), strict=True)),
            }

        @_errors_shown
        def arrive(found: work.Compressed | None, part: float) -> tuple[Image.Image, str]:
            return work.prefix(codec, _remembered(found), part / 100)

        @_errors_shown
        def open_file(data: bytes | None, progress: Any = gr.Progress()) -> Any:  # noqa: B008
            image = work.decompress(codec, _required(data), self.pixels, progress.tqdm)
            return {
                kept: None,
                table: "",
                result: gr.File(visible=False),
                part: gr.Slider(visible=False),
                shown: image,
                words: f"{image.width} x {image.height} pixels, every one as it was.",
            }

        outputs = [kept, table, result, part, shown, words]
        go.click(compress, file, outputs, **_HEAVY)
        part.input(arrive, [kept, part], [shown, words], trigger_mode="always_last", **_HEAVY)
        open_it.click(open_file, packed, outputs, **_HEAVY)

    def _generate(self) -> None:
        models = self.models.generators
        with gr.Tab("Generate"):
            gr.Markdown(_GENERATE)
            with gr.Row():
                with gr.Column(scale=1):
                    name = gr.Dropdown(list(models), label="model", visible=len(models) > 1)
                    n = gr.Slider(1, 12, 8, step=1, precision=0, label="images")
                    how = self._how(0.9)
                    go = gr.Button("Generate", variant="primary")
                with gr.Column(scale=2):
                    shown = _image(None)

        @_errors_shown
        def generate(
            name: str, n: int, heat: float, seed: int, progress: Any = gr.Progress()  # noqa: B008
        ) -> Image.Image:  # fmt: skip
            return work.generate(models[name], n, progress.tqdm, temperature=heat, seed=seed)

        go.click(generate, [name, n, *how], shown, **_HEAVY)

    def _interpolate(self) -> None:
        model = self.models.latent
        assert model is not None
        with gr.Tab("Interpolate"):
            gr.Markdown(_INTERPOLATE)
            with gr.Row():
                with gr.Column(scale=1):
                    ends = [
                        self._picture("from this picture", "chelsea"),
                        self._picture("to this one", "coffee"),
                    ]
                with gr.Column(scale=2):
                    given = gr.Radio(
                        [("all latents", "reconstruction"), ("the coarsest one, u", "u")],
                        value="reconstruction", label="what is interpolated; the rest is drawn",
                    )  # fmt: skip
                    how = self._how(0.0)
                    go = gr.Button("Interpolate", variant="primary")
                    step = gr.Slider(
                        0, _STEPS - 1, _STEPS // 2, step=1, precision=0, label="step", visible=False
                    )
                    shown = _image("between them", height=400)
            frames = gr.State(None, time_to_live=_KEPT)

        @_errors_shown
        def interpolate(
            a: bytes | None, b: bytes | None, given: str, heat: float, seed: int, step: int,
            progress: Any = gr.Progress(),  # noqa: B008
        ) -> Any:  # fmt: skip
            both = _required(a), _required(b)
            found = work.interpolate(
                model, both, self.pixels, _STEPS, given, progress.tqdm, temperature=heat, seed=seed
            )
            return found, gr.Slider(visible=True), found[step]

        @_errors_shown
        def at(found: list[Image.Image] | None, step: int) -> Image.Image:
            return _remembered(found)[step]

        go.click(interpolate, [*ends, given, *how, step], [frames, step, shown], **_HEAVY)
        step.change(at, [frames, step], shown, api_visibility="private", show_progress="hidden")


def _sweep(folder: Path, age: float) -> None:
    """Remove what lies in a folder for longer than so many seconds."""
    for file in list(folder.iterdir()):
        with contextlib.suppress(OSError):  # somebody else was quicker
            newest = max(f.stat().st_mtime for f in (file, *file.rglob("*")))
            if time.time() - newest > age:
                shutil.rmtree(file) if file.is_dir() else file.unlink()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def served(
    models: Models,
    host: str = "127.0.0.1",
    port: int | None = None,
    pixels: int = 2**20,
    megabytes: int = 20,
) -> Iterator[str]:
    """The page is served as long as this is open; gives its address.

    Arguments:
        host: the address to listen on; by default this machine alone is answered.
        port: None takes the first free one from 7860 on.
        pixels: of a picture that comes in or goes out, at most.
        megabytes: of a file that comes in, at most.

    What arrives and what is made lies in a folder of its own for half an hour, and goes with the server.
    """
    if pixels < 1 or megabytes < 1:
        raise ValueError(f"pixels and megabytes must be at least 1; got {pixels} and {megabytes}")
    done, most = threading.Event(), megabytes * 2**20
    # a job may still be writing when the server ends
    kept = tempfile.TemporaryDirectory(prefix="selfvae-", ignore_cleanup_errors=True)
    with kept as name, _environment("GRADIO_TEMP_DIR", name):
        folder = Path(name)
        page = Page(models, pixels, folder).blocks
        around = [Middleware(_Gate, most=most + 2**20)]
        if host not in ("0.0.0.0", "::"):
            # a foreign name for this machine may be a foreign page's trick
            around.append(Middleware(TrustedHostMiddleware, allowed_hosts=[host, *_LOCAL]))

        def clean() -> None:
            while not done.wait(60):
                _sweep(folder, _KEPT)

        threading.Thread(target=clean, daemon=True).start()
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port, share=False, inbrowser=False, quiet=True,
                prevent_thread_lock=True, max_file_size=most, footer_links=[], ssr_mode=False,
                run_history=False, enable_monitoring=False, mcp_server=False, pwa=False,
                theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                css=_STYLE, app_kwargs={"middleware": around},
            )  # fmt: skip
            yield address
        finally:
            done.set()
            page.close(verbose=False)
