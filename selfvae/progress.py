"""Hooks that show progress.

A hook takes a sequence of steps and the name of the activity, and yields the steps one by one, as
`rich.progress.track` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["Track", "no_progress"]

Track = Callable[[Sequence[Any], str], Iterable[Any]]


def no_progress(steps: Sequence[Any], text: str) -> Iterable[Any]:
    """Return the steps, showing nothing."""
    return steps
