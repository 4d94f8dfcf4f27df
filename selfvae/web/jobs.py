"""The page's jobs: how far each is, and how it is stopped."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from selfvae.progress import Track

__all__ = ["Jobs", "StoppedError"]


class StoppedError(Exception):
    """The job was stopped, by its visitor or with the server."""


class Jobs:
    """The jobs that run, by the session that asked for them."""

    def __init__(self) -> None:
        self._signs: dict[str, threading.Event] = {}
        self._changed = threading.Condition()
        self._ended = False

    @contextlib.contextmanager
    def run(
        self,
        session: str,
        show: Callable[[float, str], Any],
        shares: Mapping[str, float],
        *space_to_depth: str,
    ) -> Iterator[Track]:
        """A job, as the hook that it reports its steps to; they raise StoppedError once it is stopped.

        Arguments:
            session: who asked for it.
            show: takes how much is done, 0 to 1, and words for it.
            shares: of the whole work, by the text that a job gives with its steps; others do not count.
            phases: words for parts of the work, alike in length; by default the steps' own text.
        """
        sign, done = threading.Event(), 0.0
        with self._changed:
            self._signs[session] = sign
            if self._ended:
                sign.set()

        def track(steps: Sequence[Any], text: str) -> Iterable[Any]:
            nonlocal done
            for step in steps:
                if sign.is_set():
                    raise StoppedError
                part = min(done, 0.999)
                show(part, space_to_depth[int(part * len(space_to_depth))] if space_to_depth else text)
                yield step
                done += shares.get(text, 0.0) / len(steps)

        try:
            yield track
        finally:
            with self._changed:
                if self._signs.get(session) is sign:
                    del self._signs[session]
                self._changed.notify_all()

    def stop(self, session: str) -> None:
        """Stop what a session asked for, if it runs, at its next step."""
        with self._changed:
            if session in self._signs:
                self._signs[session].set()

    def end(self, seconds: float) -> None:
        """Stop all jobs, those that are still to come too, and wait until they have."""
        with self._changed:
            self._ended = True
            for sign in self._signs.values():
                sign.set()
            self._changed.wait_for(lambda: not self._signs, seconds)
