"""Progress on standard error: a bar on a terminal, one plain line per file elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self, TypeVar

from selfvae.progress import no_progress

__all__ = ["FileProgress", "note", "progress"]

Step = TypeVar("Step")


def note(text: str) -> None:
    """One line on standard error, from the first of several processes only."""
    from selfvae import distributed

    if not distributed.rank():
        print(f"selfvae: {text}", file=sys.stderr, flush=True)


def _visible() -> bool:
    from selfvae import distributed

    return not distributed.rank() and sys.stderr.isatty()


def progress(steps: Sequence[Step], text: str) -> Iterable[Step]:
    """A hook that shows a bar with that text on a terminal."""
    if not _visible():
        return no_progress(steps, text)
    from rich.console import Console
    from rich.progress import track

    return track(steps, text, console=Console(stderr=True), transient=True)


class FileProgress:
    """How far the work on one picture is, e.g. "compressing a.png, 0.4 of 1.2 megapixels".

    Args:
        stages: what is done with the picture, one after the other.
        name: the file's name.
        pixels: number of pixels.
        shares: part of one stage's work (0 to 1) by the texts that `track` is called with.
        quiet: say nothing.
    """

    def __init__(
        self,
        stages: Sequence[str],
        name: str,
        pixels: int,
        shares: Mapping[str, float],
        quiet: bool = False,
    ) -> None:
        self.quiet = quiet
        self.stages, self.name, self.megapixels, self.shares = stages, name, pixels / 1e6, shares
        self._calls: Counter[str] = Counter()  # how often each part was begun: once in each stage
        self._done = [0.0] * len(stages)
        self._stack = ExitStack()

    def describe(self, stage: int) -> str:
        """The text beside the bar."""
        digits = 1 if self.megapixels >= 1 else 2
        whole = f"{self.megapixels:.{digits}f} megapixels"
        if not self._calls:  # nothing is counted so far: small pictures are done in one piece
            return f"{self.stages[stage]} {self.name}, {whole}"
        part = min(1.0, self._done[stage]) * self.megapixels
        return f"{self.stages[stage]} {self.name}, {part:.{digits}f} of {whole}"

    def __enter__(self) -> Self:
        if self.quiet:
            return self
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        if _visible():
            columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._stack.enter_context(self._bar)
            self._task = self._bar.add_task(self.describe(0), total=None)
        else:
            note(self.describe(0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def track(self, steps: Sequence[Step], text: str) -> Iterable[Step]:
        """The hook for the work: steps of the part called `text`."""
        stage = min(self._calls[text], len(self.stages) - 1)
        self._calls[text] += 1
        for step in steps:
            yield step
            self._done[stage] += self.shares.get(text, 0.0) / len(steps)
            if hasattr(self, "_bar"):
                done = sum(min(1.0, part) for part in self._done)
                self._bar.update(
                    self._task, total=len(self.stages), completed=done, description=self.describe(stage)
                )
