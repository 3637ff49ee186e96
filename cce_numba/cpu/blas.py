"""The number of threads of NumPy's BLAS, if it is OpenBLAS, which NumPy's wheels have.

NumPy has no function for it, so the library's own are called. They are found as dependencies of NumPy's module, whose loading
has loaded them already.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

_lock = threading.Lock()
_limits: list[int] = []  # of the calls that limit the threads now
_before = 0  # the number of threads before the first of them


def threads() -> int | None:
    """How many threads a product may take, as the environment and the caller have chosen (`threadpoolctl`); None if unknown."""
    with _lock:
        if _limits:
            return _before
        return None if (control := _control()) is None else control[0]()


@contextlib.contextmanager
def limited(count: int) -> Iterator[None]:
    """Inside, products take at most so many threads. This holds for the whole process, since OpenBLAS knows no other limit.

    Calls in several threads may overlap: the lowest limit holds as long as there is one, and the last call to end restores what
    was there before the first.
    """
    control = _control()
    if control is None:
        yield
        return
    _change(control, _limits.append, count)
    try:
        yield
    finally:
        _change(control, _limits.remove, count)


def _change(control: tuple[Any, Any], change: Callable[[int], None], count: int) -> None:
    global _before
    get, put = control
    with _lock:
        if not _limits:
            _before = get()
        change(count)
        wanted = min(_limits, default=_before)
        if get() != min(wanted, _before):
            put(min(wanted, _before))


@functools.cache
def _control() -> tuple[Any, Any] | None:
    """Functions that get and set the number of threads."""
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(importlib.import_module("numpy._core._multiarray_umath").__file__)
        for prefix in ("scipy_openblas", "openblas"):
            for suffix in ("64_", ""):
                get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
                put = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
                if get is not None and put is not None:
                    put.argtypes, put.restype = [ctypes.c_int], None
                    return get, put
    return None


def _reset() -> None:
    """For a forked process, in which no other thread goes on: none will release the lock, or end its limit."""
    global _lock
    _lock = threading.Lock()
    if _limits and (control := _control()) is not None:
        _limits.clear()
        control[1](_before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
