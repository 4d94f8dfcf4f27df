"""Hooks that show progress: given steps and what they are for, a hook hands the steps on, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["Track", "no_progress"]

Track = Callable[[Sequence[Any], str], Iterable[Any]]


def no_progress(steps: Sequence[Any], text: str) -> Iterable[Any]:
    """The hook that shows nothing."""
    return steps
