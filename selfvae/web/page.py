"""The page in a browser: a tab for each task of the models. It makes no request to any other machine."""

from __future__ import annotations

import contextlib
import functools
import html
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from selfvae.codec import Codec
from selfvae.data import pictures
from selfvae.data.crops import photo
from selfvae.operations import generate
from selfvae.progress import Track
from selfvae.web import work
from selfvae.web.jobs import Jobs, StoppedError
from selfvae.web.work import Models

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse
except ImportError:
    raise ImportError("the page needs gradio: pip install 'selfvae[web]'") from None

__all__ = ["Page", "served"]

_PREFIX = "selfvae-page-"  # of temporary folders
_KEPT = 1800.0  # seconds that files and results are kept
_PATIENCE = 20.0  # seconds for jobs to stop when the server ends
_QUEUE = 16  # jobs that may wait
_STEPS = 9  # of an interpolation
_HEAVY: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "work"}
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
# the parts of gradio's server that the page needs; the rest is not answered
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
Models that know how likely a picture is: they **enhance** pictures and **compress** them without loss.
Everything runs on this machine; no picture leaves it. Pictures and results may have up to {:,} pixels."""
_ENHANCE = """Give a small or banded picture, and the model tells what it may have looked like before:
at temperature 0 the mean of all that is possible, else versions drawn from it, which differ where the model
is unsure. Where the model is exact, every one agrees with your picture. Move the slider to compare."""
_COMPRESS = """The file holds every pixel exactly, coarse to fine: its first part gives a preview already.
The model was trained on photographs; drawings, and pictures that have been JPEG files, may be smaller as
they are."""
_GENERATE = """New images, without any input. The model draws a coarse level first, then finer ones; below
the images are the levels that they were drawn from. emoji-v3 draws emoji; the other models are small and
saw photographs: expect textures, no objects."""
_INTERPOLATE = """The model describes a picture by a latent, which holds its layout. On a line between those
of two pictures, every point is a picture as well; the rest is drawn. Both are cropped to a square and
shrunk to the {} x {} pixels of this model. emoji-v3 knows emoji on white, as the examples that it draws."""

# small pictures are for looking at, and their pixels are what matters
_STYLE = """.pixels img { width: 100%; object-fit: contain; image-rendering: pixelated }
.sheet .grid-wrap { max-height: none; height: auto }
.sheet .thumbnail-item { aspect-ratio: auto }"""

# the browser may ask nobody but this server
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'"
)


class _Gate:
    """Answers only the requests of this page, none of another page, and adds the security policy."""

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
            return "no part of this page", 404
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != headers.get("host"):
            return "another page may not use this one", 403
        if int(headers.get("content-length") or 0) > self.most:
            return "the file exceeds the maximum size of this page (selfvae serve --megabytes)", 413
        return None


class _Upload(NamedTuple):
    """A file that came, its name without the ending."""

    name: str
    data: bytes


def _upload(label: str) -> gr.File:
    """A box to drop a file into; jobs get it as an `_Upload`.

    Two methods of this one component are replaced, for what gradio has no setting for:

    - `async_move_resource_to_block_cache` also takes an address and downloads it, for whoever sends one by
      the API: this page fetches nothing.
    - `preprocess` fails without words if the file was deleted meanwhile, as old files are; and it gives
      the bytes only, although the name is wanted for the download.

    A subclass of gr.File would be the plain way, but gradio writes a .pyi file beside the module of each
    subclass of a component, that is into the installed package.
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
            raise gr.Error("this file was deleted meanwhile: drop it again", print_exception=False)
        data = preprocess(payload)
        return None if data is None else _Upload(Path(payload.orig_name or "picture").stem[:60], data)

    file.async_move_resource_to_block_cache, file.preprocess = dropped, there
    return file


def _errors_shown(job: Callable[..., Any]) -> Callable[..., Any]:
    """The job, its errors shown on the page: once, in words."""

    @functools.wraps(job)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return job(*args, **kwargs)
        except StoppedError:
            raise gr.Error("stopped", title="", duration=3, print_exception=False) from None
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from None
        except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
            text = f"that did not work ({html.escape(str(error))[:200]}): try a smaller picture"
            raise gr.Error(text, duration=None) from None

    return told


def _required(file: _Upload | None) -> _Upload:
    if file is None:
        raise ValueError("no file yet: drop one into the empty box")
    return file


def _remembered(value: Any) -> Any:
    if value is None:
        raise ValueError("this result was deleted meanwhile: press the button again")
    return value


def _image(label: str | None, height: int | None = None) -> gr.Image:
    """A place for a picture, enlarged to it; without the button that would publish the picture."""
    return gr.Image(
        label=label, show_label=label is not None, format="png", interactive=False, height=height,
        buttons=["download", "fullscreen"], elem_classes="pixels",
    )  # fmt: skip


class _PackedView(NamedTuple):
    """The components that show a compressed file."""

    shown: gr.Image
    part: gr.Slider
    words: gr.Markdown
    result: gr.File
    table: gr.Markdown
    kept: gr.State

    @classmethod
    def make(cls) -> _PackedView:
        """Lay them out here."""
        return cls(
            _image("what the file shows", height=480),
            gr.Slider(0, 100, 100, step=1, label="% of the file is there", visible=False),
            gr.Markdown(),
            gr.File(label="the file", interactive=False, visible=False),
            gr.Markdown(),
            gr.State(None, time_to_live=_KEPT),
        )

    def show(self, codec: Codec, found: work.Packed, file: str | None, track: Track) -> list[Any]:
        """Their values for a file, which can be downloaded from a path if there is one."""
        image, words = work.prefix(codec, found, 1.0, track)
        download = gr.File(file, visible=file is not None)
        return [image, gr.Slider(value=100, visible=True), words, download, found.table(), found]

    def clear(self) -> list[Any]:
        """Their values without a file."""
        return [None, gr.Slider(visible=False), "", gr.File(visible=False), "", None]


class Page:
    """The page.

    Args:
        models: what its tabs work with.
        pixels: height times width that a picture or a result may have.
        folder: for the files that the browser fetches.
    """

    def __init__(self, models: Models, pixels: int, folder: Path) -> None:
        self.models, self.pixels, self.folder, self.jobs = models, pixels, folder, Jobs()
        with gr.Blocks(title="selfvae", analytics_enabled=False) as self.blocks:
            gr.Markdown(_INTRO.format(pixels))
            if models.gaps:
                self._enhance()
            if models.codec:
                self._compress()
            self._generate()
            if models.latent:
                self._interpolate()
            self.blocks.unload(self._leave)
        self.blocks.queue(max_size=_QUEUE, api_open=False)  # nothing passes by the queue

    def _leave(self, request: gr.Request) -> None:
        """Stop the job of a visitor who has left."""
        if request.session_hash:
            self.jobs.stop(request.session_hash)

    def _run(self, request: gr.Request, progress: Any, shares: Mapping[str, float], *phases: str) -> Any:
        """A visitor's job (`Jobs.run`), shown in the browser."""
        return self.jobs.run(
            request.session_hash or "",
            lambda part, text: progress(part, desc=text),
            shares,
            *phases,
        )

    def _go(self, label: str) -> gr.Button:
        """The button that starts a job, beside the one that stops it."""
        with gr.Row():
            go = gr.Button(label, variant="primary", scale=3)
            stop = gr.Button("Stop", scale=1, min_width=60)
        stop.click(self._leave, None, None, api_visibility="private", show_progress="hidden")
        return go

    def _file(self, data: bytes, name: str) -> str:
        """A file for the browser, in a folder of its own."""
        file = Path(tempfile.mkdtemp(dir=self.folder)) / name
        file.write_bytes(data)
        return str(file)

    def _picture(
        self,
        label: str,
        example: str | Callable[[], Tensor],
        exact: bool = False,
        alpha: bool = False,
    ) -> gr.File:
        """A box for a file, what is in it, and a button for an example.

        example: name of a photograph that comes with scikit-image, or a function that draws a picture.
        exact: refuse at once what `pictures.read_exactly` refuses.
        alpha: but take pictures with alpha.
        """
        file = _upload(label)
        take = gr.Button("or take an example", size="sm")
        seen = _image("your picture", height=200)

        @_errors_shown
        def look(file: _Upload | None) -> Image.Image | None:
            if file is None:
                return None
            found = work.read(file.data, self.pixels, exact, alpha=alpha)
            return pictures.to_image((found.channels() if alpha else found.pixels)[0])

        def example_file() -> str:
            if isinstance(example, str):
                x, name = torch.from_numpy(photo(example, 2)), example
            else:
                x, name = example()[0], "drawn"
            return self._file(pictures.encode(pictures.to_image(x)), f"{name}.png")

        file.change(look, file, seen, api_visibility="private", show_progress="hidden")
        take.click(example_file, None, file, api_visibility="private", show_progress="hidden")
        return file

    def _how(self, temperature: float) -> list[Any]:
        """Temperature and seed."""
        heat = "temperature: 0 without randomness, 1 everything that the model finds possible"
        seed = "seed: another number draws another result"
        return [
            gr.Slider(0, 1, temperature, step=0.05, label=heat),
            gr.Number(0, label=seed, precision=0, minimum=0, maximum=2**31 - 1),
        ]

    def _enhance(self) -> None:
        gaps = self.models.gaps
        with gr.Tab("Enhance"):
            gr.Markdown(_ENHANCE)
            with gr.Row():
                with gr.Column(scale=1):
                    file = self._picture("a picture", "chelsea")
                    names = [gap.label(self.pixels) for gap in gaps]
                    which = gr.Radio(names, value=names[0], label="what to do", type="index")
                    computed = gr.Checkbox(label="Degrade a clean picture first, then compare")
                    go = self._go("Enhance")
                    n = gr.Slider(1, 4, 1, step=1, precision=0, label="versions")
                    how = self._how(0.0)
                with gr.Column(scale=2):
                    slider = gr.ImageSlider(
                        label="without a model | with it", format="png", type="pil", interactive=False,
                        buttons=["download", "fullscreen"], elem_classes="pixels",
                    )  # fmt: skip
                    sheet = gr.Gallery(
                        label="result", format="png", columns=2, height=None, object_fit="contain",
                        buttons=["download", "fullscreen"], elem_classes=["pixels", "sheet"],
                    )  # fmt: skip

        @_errors_shown
        def enhance(
            file: _Upload | None, which: int, computed: bool, n: int, heat: float, seed: int,
            request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008 (where gradio looks for it)
        ) -> tuple[tuple[Image.Image, Image.Image], list[tuple[Image.Image, str]]]:  # fmt: skip
            phases = [f"drawing version {i + 1} of {n}" for i in range(n)]
            with self._run(request, progress, {"versions": 1}, *phases) as track:
                found = work.enhance(
                    gaps[which], _required(file).data, self.pixels, computed=computed, n=n, seed=seed,
                    temperature=heat, decode="sample" if heat else "mean", track=track,
                )  # fmt: skip
            (_, plain), (_, first) = found[1:3]
            return (plain.convert("RGB"), first.convert("RGB")), [(image, name) for name, image in found]

        results = [slider, sheet]
        file.change(lambda: (None, None), None, results, api_visibility="private", show_progress="hidden")
        go.click(enhance, [file, which, computed, n, *how], results, show_progress_on=sheet, **_HEAVY)

    def _compress(self) -> None:
        codec = self.models.codec
        assert codec is not None
        with gr.Tab("Compress"):
            gr.Markdown(_COMPRESS)
            with gr.Row():
                with gr.Column(scale=1):
                    file = self._picture("a picture", "coffee", exact=True, alpha=work.keeps_alpha(codec))
                    go = self._go("Compress")
                    packed = _upload("or a .svae file, whole or truncated")
                    open_it = gr.Button("Open")
                with gr.Column(scale=2):
                    view = _PackedView.make()
        coding = work.shares(codec.model)

        @_errors_shown
        def compress(
            file: _Upload | None, request: gr.Request, progress: Any = gr.Progress()  # noqa: B008
        ) -> Any:  # fmt: skip
            steps, phases = work.compression(codec)
            with self._run(request, progress, steps, *phases) as track:
                name, data = _required(file)
                found = work.compress(codec, data, self.pixels, track)
                return view.show(codec, found, self._file(found.data, f"{name}.svae"), track)

        @_errors_shown
        def arrive(
            found: work.Packed | None, part: float, request: gr.Request,
            progress: Any = gr.Progress(),  # noqa: B008
        ) -> tuple[Image.Image, str]:  # fmt: skip
            with self._run(request, progress, coding, "decoding") as track:
                return work.prefix(codec, _remembered(found), part / 100, track)

        @_errors_shown
        def open_file(
            file: _Upload | None, request: gr.Request, progress: Any = gr.Progress()  # noqa: B008
        ) -> Any:  # fmt: skip
            with self._run(request, progress, coding, "decoding") as track:
                found = work.open_packed(codec, _required(file).data, self.pixels)
                return view.show(codec, found, None, track)

        for source in (file, packed):
            source.change(view.clear, None, [*view], api_visibility="private", show_progress="hidden")
        there: dict[str, Any] = {"show_progress_on": view.shown, **_HEAVY}
        go.click(compress, file, [*view], **there)
        to = [view.shown, view.words]
        view.part.input(arrive, [view.kept, view.part], to, trigger_mode="always_last", **there)
        open_it.click(open_file, packed, [*view], **there)

    def _generate(self) -> None:
        models = self.models.generators
        with gr.Tab("Generate"):
            gr.Markdown(_GENERATE)
            with gr.Row():
                with gr.Column(scale=1):
                    name = gr.Dropdown(list(models), label="model", visible=len(models) > 1)
                    n = gr.Slider(1, 8, 6, step=1, precision=0, label="images")
                    how = self._how(0.9)
                    go = self._go("Generate")
                with gr.Column(scale=2):
                    shown = _image(None)

        @_errors_shown
        def generate(
            name: str, n: int, heat: float, seed: int, request: gr.Request,
            progress: Any = gr.Progress(),  # noqa: B008
        ) -> Image.Image:  # fmt: skip
            with self._run(request, progress, {"variables": 1}, "drawing") as track:
                return work.generate(models[name], n, track, temperature=heat, seed=seed)

        go.click(generate, [name, n, *how], shown, **_HEAVY)

    def _interpolate(self) -> None:
        model = self.models.latent
        assert model is not None
        with gr.Tab("Interpolate"):
            gr.Markdown(_INTERPOLATE.format(*model.config.image_shape[1:]))
            with gr.Row():
                with gr.Column(scale=1):
                    ends = [
                        self._picture(
                            label, functools.partial(generate, model, 1, seed=seed, temperature=0.8)
                        )
                        for seed, label in ((9, "from this picture"), (25, "to this one"))
                    ]
                with gr.Column(scale=2):
                    shown = _image("between them", height=400)
                    step = gr.Slider(
                        0, _STEPS - 1, _STEPS // 2, step=1, precision=0, label="step", visible=False
                    )
                    go = self._go("Interpolate")
                    given = gr.Radio(
                        [("all latents", "reconstruction"), ("only the coarsest one, u", "u")],
                        value="reconstruction", label="what is interpolated; the rest is drawn",
                    )  # fmt: skip
                    how = self._how(0.0)
            frames = gr.State(None, time_to_live=_KEPT)

        @_errors_shown
        def interpolate(
            a: _Upload | None, b: _Upload | None, given: str, heat: float, seed: int, step: int,
            request: gr.Request, progress: Any = gr.Progress(),  # noqa: B008
        ) -> Any:  # fmt: skip
            both = _required(a).data, _required(b).data
            with self._run(request, progress, {"steps": 1}, "drawing") as track:
                found = work.interpolate(
                    model, both, self.pixels, _STEPS, given, track, temperature=heat, seed=seed
                )
            return found, gr.Slider(visible=True), found[step]

        @_errors_shown
        def at(found: list[Image.Image] | None, step: int) -> Image.Image:
            return _remembered(found)[step]

        inputs = [*ends, given, *how, step]
        go.click(interpolate, inputs, [frames, step, shown], show_progress_on=shown, **_HEAVY)
        step.change(at, [frames, step], shown, api_visibility="private", show_progress="hidden")


def _sweep(folder: Path, age: float) -> None:
    """Delete the files and folders in a folder that were last changed more than `age` seconds ago."""
    for file in list(folder.iterdir()):
        with contextlib.suppress(OSError):  # somebody else was quicker
            newest = max(f.stat().st_mtime for f in (file, *file.rglob("*")))
            if time.time() - newest > age:
                shutil.rmtree(file) if file.is_dir() else file.unlink()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Make a temporary folder, locked as long as this server lives, so that others know it is used."""
    # a job may still be writing when the server ends
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
        lock = os.open(name, os.O_RDONLY) if fcntl else None
        try:
            if fcntl and lock is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            if lock is not None:
                os.close(lock)


def _remove_abandoned() -> None:
    """Delete the folders of servers that were killed, whose locks the system has released."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*") if fcntl else ():
        with contextlib.suppress(OSError):  # another user's, or locked, or gone
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - folder.stat().st_mtime > 1:  # else its server may be about to lock it
                    shutil.rmtree(folder)
            finally:
                os.close(lock)


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


def _check_served(host: str, port: int | None, pixels: int, megabytes: int) -> None:
    """Raise ValueError or OSError for limits or an address that cannot be."""
    if pixels < 1 or megabytes < 1:
        raise ValueError(f"pixels and megabytes must be at least 1; got {pixels} and {megabytes}")
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"port must be 1 to 65535; got {port}")
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, 0), family=family).close()
    except OSError as error:
        raise OSError(
            f"nothing can be served on {host} ({error}): give an address of this machine"
        ) from None


@contextlib.contextmanager
def served(
    models: Models,
    host: str = "127.0.0.1",
    port: int | None = None,
    pixels: int = 2**22,
    megabytes: int = 20,
) -> Iterator[str]:
    """Serve the page as long as the context is open.

    Uploads and results are kept in a temporary folder for half an hour at most, and deleted at the end;
    those of a server that was killed, by the next one.

    Args:
        models: see `Models.load`.
        host: the address to listen on; by default only this machine is answered.
        port: None takes the first free one from 7860 on.
        pixels: height times width that a picture or a result may have.
        megabytes: that an uploaded file may have, in MiB.

    Yields:
        The page's address.

    Raises:
        ValueError: if a limit or the port is out of range.
        OSError: if the address is not this machine's, or the port is taken.
    """
    _check_served(host, port, pixels, megabytes)
    done, most = threading.Event(), megabytes * 2**20
    _remove_abandoned()
    with _folder() as folder, _environment("GRADIO_TEMP_DIR", str(folder)):
        built = Page(models, pixels, folder)
        page = built.blocks
        around = [Middleware(_Gate, most=most + 2**20)]
        if host not in ("0.0.0.0", "::"):
            # a foreign name for this machine may be a foreign page's trick
            around.append(Middleware(TrustedHostMiddleware, allowed_hosts=[host, *_LOCAL]))

        def clean() -> None:
            while not done.wait(60):
                _sweep(folder, _KEPT)
                _remove_abandoned()

        threading.Thread(target=clean, daemon=True).start()
        try:
            try:
                _, address, _ = page.launch(
                    server_name=host, server_port=port, share=False, inbrowser=False, quiet=True,
                    prevent_thread_lock=True, max_file_size=most, footer_links=[], ssr_mode=False,
                    run_history=False, enable_monitoring=False, mcp_server=False, pwa=False,
                    theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                    css=_STYLE, app_kwargs={"middleware": around},
                )  # fmt: skip
            except OSError:
                which = f"port {port} is" if port else "all ports from 7860 to 7959 are"
                raise OSError(f"{which} taken on {host}: choose another one (--port)") from None
            yield address
        finally:
            done.set()
            built.jobs.end(_PATIENCE)
            page.close(verbose=False)
