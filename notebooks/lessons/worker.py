"""A process with Numba's simulator in it, to which recordings are sent: so they can be made beside a GPU, too.

The simulator is chosen when Numba is imported, so a process has it or has not.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import inspect
import linecache
import multiprocessing
import os
import signal
import textwrap
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import CodeType, ModuleType
from typing import Any
from unittest import mock

from .record import Record


@functools.cache
def _pool() -> ProcessPoolExecutor:
    # A notebook that is interrupted takes its worker along, which need not complain.
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    atexit.register(pool.shutdown)
    return pool


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns there. It and its arguments are pickled, so it must be importable."""
    with mock.patch.dict(os.environ, NUMBA_ENABLE_CUDASIM="1"):  # the process starts, and takes it over, with its first task
        return _pool().submit(function, *arguments).result()


def record(kernel: Any, grid: Any, block_dim: Any, arguments: dict[str, Any], block: tuple[int, ...]) -> Record:
    """`recording.of_kernel` there, for a kernel that stands in a notebook: its source is sent, and the constants it uses."""
    return run(_record_source, _packed(kernel.py_func), grid, block_dim, arguments, block)


def _packed(function: Any) -> tuple[str, str, dict[str, tuple[str, Any]]]:
    """`(name, source, what its global names stand for)`: modules by name, device functions by source, numbers as they are."""
    needed = {"cuda", *_names(function.__code__)}
    closure = inspect.getclosurevars(function)
    known = {**function.__globals__, **closure.nonlocals}
    packed: dict[str, tuple[str, Any]] = {}
    for name in sorted(needed & known.keys()):
        value = known[name]
        if isinstance(value, ModuleType):
            packed[name] = "module", value.__name__
        elif hasattr(value, "py_func"):
            packed[name] = "function", _packed(value.py_func)
        else:
            packed[name] = "value", value
    return function.__name__, textwrap.dedent(inspect.getsource(function)), packed


def _names(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {*code.co_names, *code.co_freevars}.union(*map(_names, inner))


def _unpacked(packed: tuple[str, str, dict[str, tuple[str, Any]]]) -> Any:
    name, source, needed = packed
    scope: dict[str, Any] = {}
    for other, (kind, value) in needed.items():
        if kind == "module":
            scope[other] = importlib.import_module(value)
        else:
            scope[other] = _unpacked(value) if kind == "function" else value
    file = f"{name}.py"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), scope)
    return scope[name]


def _record_source(packed: Any, grid: Any, block_dim: Any, arguments: dict[str, Any], block: tuple[int, ...]) -> Record:
    from . import recording

    return recording.of_kernel(_unpacked(packed), grid, block_dim, arguments, block)
