"""The command line: thin functions whose signatures are the flags.

Only the module of the command that was asked for is imported, and torch only once it has work to do.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

__all__ = ["main"]

_SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}
_OUT_OF_MEMORY = (
    "out of memory. Training: lower --batch-size, or add --grad-accum 4 or --activation-checkpointing. "
    "Folders of pictures: --jobs 1. Otherwise use smaller pictures, or a machine with more memory"
)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    0, 1 if some files of a folder failed, 2 with a message for bad input, 130 if interrupted, 143 if ended
    by SIGTERM, as schedulers do; nothing is then half written.
    """
    logging.basicConfig(format="selfvae: %(message)s")
    logging.getLogger("selfvae").setLevel(logging.INFO)
    with _interrupts() as came:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        except BaseException as error:
            # libraries may turn it into errors of their own
            if came or isinstance(error, KeyboardInterrupt):
                return _ended(came[0] if came else signal.SIGINT)
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                return error.code
            if isinstance(error, BrokenPipeError):  # as in `selfvae --help | head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            if _lacks_memory(error):
                _say(_OUT_OF_MEMORY)
                return 2
            if not isinstance(error, ValueError | OSError | ImportError | FloatingPointError):
                raise
            _say(str(error))
            return 2


def _run(words: list[str]) -> int:
    from selfvae.cli.commands import COMMANDS, load
    from selfvae.cli.parsing import overview, parse
    from selfvae.cli.settings import expand, import_modules
    from selfvae.hints import unknown

    words = import_modules(words)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if name in ("-v", "--version"):
        import selfvae

        print(f"selfvae {selfvae.__version__}")
        return 0
    if name not in COMMANDS:
        raise ValueError(unknown("command", name, COMMANDS, "selfvae --help lists the commands"))
    try:
        call = parse(load(name), name, expand(name, words[1:]))
    except SystemExit as end:  # --help, or a message about the flags that is printed already
        return end.code if isinstance(end.code, int) else 2
    return call() or 0


def _say(text: str) -> None:
    """A line on standard error; one of several processes gives its number."""
    distributed = sys.modules.get("selfvae.distributed")  # None before torch was needed
    rank = distributed.rank() if distributed and hasattr(distributed, "rank") else 0
    print(f"selfvae (process {rank}): {text}" if rank else f"selfvae: {text}", file=sys.stderr, flush=True)


def _lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch raises RuntimeError, on the CPU and on GPUs."""
    said = str(error)
    torch_said = isinstance(error, RuntimeError) and ("allocate memory" in said or "out of memory" in said)
    return torch_said or isinstance(error, MemoryError)


def _ended(number: int) -> int:
    """Say that a signal has ended the command; the status that shells report for it."""
    _say(_SAID[signal.Signals(number)])
    return 128 + number


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM, whatever becomes of the KeyboardInterrupt on its way."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if _importing(frame):  # libraries swallow exceptions there, or fail later in odd ways
            os._exit(_ended(number))
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    with suppress(ValueError):  # not the main thread
        for kind in _SAID:
            before[kind] = signal.signal(kind, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported, before any file is written."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
