"""Loops that are compiled by numba where it is installed, and run as plain Python where it is not.

    @compiled
    def total(values):
        ...

A function that is marked so must give the same integers both ways. Python's integers and NumPy's scalars
do not overflow alike, so all arithmetic stays below 2^63, or is on uint64 arrays and scalars throughout.

Marked functions may call one another by name, within one file: numba keeps compiled code beside the file,
or in the user's cache where that cannot be written, and notices changes of that file only.
"""

from __future__ import annotations

import functools
import logging
import threading
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

__all__ = ["compiled", "is_fast", "wide_vectors"]

P = ParamSpec("P")
R = TypeVar("R")

PLAIN = False  # whether to run everything as plain Python; numba's own switch is NUMBA_DISABLE_JIT=1
_log = logging.getLogger("selfvae")
_lock = threading.RLock()


@functools.cache
def _njit() -> Callable[..., Any] | None:
    """Return numba's decorator, or None where numba is missing; imports numba, which takes a second."""
    try:
        import numba
    except ImportError as error:
        warnings.warn(
            f"numba cannot be imported ({error}): loops of the codec run as plain Python, hundreds of "
            "times slower, with the same results; pip install numba",
            stacklevel=5,
        )
        return None
    return numba.njit


def wide_vectors() -> None:
    """Ask for vectors of 512 bits in the marked function that calls this, where the processor has them.

    LLVM prefers 256 bits, because the first of these processors ran slower with 512.
    """


@functools.cache
def _wide_vectors() -> Any:
    """Return `wide_vectors` for compiled functions: it gives its caller an attribute, and does nothing."""
    from numba import types as numba_types
    from numba.extending import intrinsic

    @intrinsic
    def mark(context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            attributes = builder.function.attributes
            if isinstance(attributes, set):  # whose own `add` refuses attributes of processors
                set.add(attributes, '"prefer-vector-width"="512"')
            return context.get_dummy_value()

        return numba_types.void(), generate

    return mark


@functools.cache
def _announce() -> None:
    """Say once per process why the first call takes seconds."""
    _log.info("compiling loops for this processor; this takes some seconds once after the installation")


def is_fast() -> bool:
    """Return whether marked functions are compiled, rather than run as plain Python."""
    return not PLAIN and _njit() is not None


class _Compiled:
    """A function that is compiled when it is first called, not when its file is imported."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._fast: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if PLAIN else self.fast(*args)

    @property
    def fast(self) -> Callable[..., Any]:
        """The compiled function; the plain one where numba is missing."""
        if self._fast is None:
            with _lock:
                self._fast = self._fast or self._compile()
        return self._fast

    def _compile(self) -> Callable[..., Any]:
        njit = _njit()
        if njit is None:
            return self.function
        # numba must find its own objects under the names of other marked functions
        names = dict(self.function.__globals__)
        for name in self.function.__code__.co_names:
            if isinstance(names.get(name), _Compiled):
                names[name] = names[name].fast
            elif names.get(name) is wide_vectors:
                names[name] = _wide_vectors()
        own = types.FunctionType(self.function.__code__, names, self.function.__name__)
        own.__qualname__ = self.function.__qualname__
        try:
            fast = njit(cache=True, nogil=True)(own)
            kept = any(Path(fast.stats.cache_path).glob(f"*.{own.__name__}-*.nbi"))
        except RuntimeError:  # no folder in which compiled code could be kept
            fast, kept = njit(nogil=True)(own), False
        if not kept:
            _announce()
        return fast


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function of integers and NumPy arrays to be compiled when it is first called.

    It takes positional arguments only, and releases Python's global lock while it runs. Arrays of another
    type or layout, or that are read-only, cost a compilation of their own.

    >>> @compiled
    ... def double(n: int) -> int:
    ...     return 2 * n
    >>> double(21)
    42
    """
    return cast("Callable[P, R]", _Compiled(function))
