"""The page's jobs: their progress, and how they are stopped."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from selfvae.progress import Track

__all__ = ["Jobs", "StoppedError"]


class StoppedError(Exception):
    """The job was stopped: by its visitor, or since the server ends."""


class Jobs:
    """The jobs that are running, by session."""

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
        *phases: str,
    ) -> Iterator[Track]:
        """Run a job: a context whose value is the hook that the job reports its steps to.

        Args:
            session: of the visitor who asked for it.
            show: show(part, text) is told which part of the work is done, 0 to 1, and what is being done.
            shares: of the whole work, by the text that a job gives with its steps; other steps count
                nothing.
            *phases: what is being done in the first, second, ... part of the work, all of one length; by
                default the steps' own text.

        Yields:
            track(steps, text), which raises StoppedError at the next step once the job is stopped.
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
                show(part, phases[int(part * len(phases))] if phases else text)
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
        """Stop the job of a session, if there is one, at its next step."""
        with self._changed:
            if session in self._signs:
                self._signs[session].set()

    def end(self, seconds: float) -> None:
        """Stop all jobs, and those that are still to come, and wait for them, at most `seconds`."""
        with self._changed:
            self._ended = True
            for sign in self._signs.values():
                sign.set()
            self._changed.wait_for(lambda: not self._signs, seconds)
