"""Kernels with a line changed: broken on purpose, to see what a test, a record or a picture says of it."""

from __future__ import annotations

import inspect
import itertools
import linecache
import textwrap
from typing import Any

_numbers = itertools.count(1)


def edited(kernel: Any, old: str, new: str) -> Any:
    """A `cuda.jit` kernel like the given one, but for `new` in its source in place of `old`, which must stand there once."""
    function = kernel.py_func
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise ValueError(f"{old!r} stands {source.count(old)} times in {function.__name__}, not once")
    source = source.replace(old, new)
    file = f"{function.__name__}, edited {next(_numbers)}"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # where `inspect` looks for it
    scope = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    exec(compile(source, file, "exec"), scope)
    return scope[function.__name__]
