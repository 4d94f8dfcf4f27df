"""The command that serves the page."""

from __future__ import annotations

import signal
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from selfvae.cli.names import check_model


def serve(
    model: Annotated[Positional[Path | None], arg(metavar="[MODEL]")] = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    pixels: int = 2**22,
    megabytes: int = 20,
    browser: bool = True,
) -> None:
    """Serve a web page to enhance, compress, generate and interpolate pictures on this machine.

    Args:
        model: folder that selfvae train wrote, or a bundled model; by default all bundled models, each for
            what it does best.
        host: address to listen on; 127.0.0.1 answers this machine only.
        port: by default the first free port from 7860.
        pixels: largest number of pixels of an uploaded picture, and of a result.
        megabytes: largest size of an uploaded file, in MB.
        browser: open the page in the browser.
    """
    if model is not None:
        check_model(model)
    from selfvae.web.page import served
    from selfvae.web.work import Models

    # so that a `kill` ends it as Ctrl-C does, and its files are removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with served(Models.load(model), host, port, pixels, megabytes) as address:
        print(f"{address} (Ctrl-C stops the server)", flush=True)
        if browser:
            webbrowser.open(address)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")
