"""The command that serves the page."""

from __future__ import annotations

import signal
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


def serve(
    model: Annotated[Positional[Path | None], arg(metavar="[MODEL]")] = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    pixels: int = 2**22,
    megabytes: int = 20,
    browser: bool = True,
) -> None:
    """Serve a page on which all of it can be tried: enhance, compress, generate, interpolate.

    Args:
        model: folder that training wrote, or a shipped model (selfvae info); by default those that come
            with selfvae, each for what it is good at.
        host: address to listen on; by default this machine alone is answered.
        port: by default the first free one from 7860 on.
        pixels: of a picture that comes in or goes out, at most.
        megabytes: of a file that comes in, at most.
        browser: open the page in the browser.
    """
    from selfvae.web.page import served
    from selfvae.web.work import Models

    # so that a `kill` ends it as Ctrl-C does, and its files go
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with served(Models.load(model), host, port, pixels, megabytes) as address:
        print(f"{address} (Ctrl-C ends it)", flush=True)
        if browser:
            webbrowser.open(address)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("ended")
