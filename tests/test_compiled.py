"""Compiled functions: the same results with numba and without, and numba is imported only when needed."""

from __future__ import annotations

import builtins
import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest

from selfvae import compiled as shim
from selfvae.compiled import compiled, wide_vectors


@compiled
def _step(state: int, value: int) -> int:
    return (state * 31 + value) & 0xFFFFFF


@compiled
def _hash(values: np.ndarray) -> int:
    state = 0
    for i in range(len(values)):
        state = _step(state, np.int64(values[i]))
    return state


VALUES = np.arange(1000, dtype=np.int32) * 7919


def test_both_ways_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = _hash(VALUES)
    monkeypatch.setattr(shim, "PLAIN", True)
    assert _hash(VALUES) == fast
    state = 0
    for value in VALUES.tolist():
        state = (state * 31 + value) & 0xFFFFFF
    assert fast == state


def test_compiled_functions_call_one_another_compiled() -> None:
    pytest.importorskip("numba")
    _hash(VALUES)
    assert _hash.fast.signatures and _hash.fast.py_func.__globals__["_step"] is _step.fast  # type: ignore[attr-defined]


def test_wide_vectors_are_asked_for_where_a_function_says_so() -> None:
    @compiled
    def double(values: np.ndarray) -> None:
        wide_vectors()
        for i in range(len(values)):
            values[i] += values[i]

    values = VALUES.copy()
    double(values)
    assert np.array_equal(values, 2 * VALUES)
    fresh = numba.njit(double.fast.py_func)  # type: ignore[attr-defined]  # cached code cannot be read
    fresh(values)
    assert '"prefer-vector-width"="512"' in next(iter(fresh.inspect_llvm().values()))


def test_without_numba_a_warning_and_the_same_results(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "numba":
            raise ImportError("No module named 'numba'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(shim, "_njit", shim._njit.__wrapped__)
    monkeypatch.setattr(builtins, "__import__", missing)

    @compiled
    def three(n: int) -> int:
        return 3 * n

    with pytest.warns(UserWarning, match="pip install numba"):
        assert three(2) == 6


@pytest.mark.slow
def test_numba_is_imported_by_the_first_call_only() -> None:
    code = (
        "import sys, selfvae, selfvae.codec\nassert 'numba' not in sys.modules\n"
        "from selfvae.compiled import compiled\n"
        "f = compiled(lambda n: n + 1)\nassert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
