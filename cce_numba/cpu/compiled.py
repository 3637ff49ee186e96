"""`compiled`: Numba's `njit` for the CPU, with machine code that is kept on disk by the rules of `cce_numba/disk.py`.

Numba's own cache (`cache=True`) is not used. It loads pickles that anybody may have put there, and it stops a call if its
directory cannot be written to, or one of its files is damaged. Here such a file costs a compilation and a warning.

A file is one line, the SHA-256 of the rest, and then a pickle of what Numba compiled for one signature of one function. Its
name is a digest of all that the code depends on. Files are in the directory that CCE_CACHE_DIR names; without that variable in
NUMBA_CACHE_DIR, if this is set; else where `disk.directory` says. With NUMBA_DISABLE_JIT=1 functions stay what they are: they
compute the same in plain Python, slowly.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import caching, compiler, serialize

from cce_numba import disk

_SUFFIX = ".cce-compiled"
_MAX_BYTES = 64 * 2**20  # of all files together; a function takes some 30 KiB
_ROOT = Path(__file__).parents[1]
_log = logging.getLogger(__name__)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the function as `numba.njit(**options)` makes it, compiled at its first call or taken from the disk."""

    def decorate(function: Callable[..., Any]) -> Any:
        if numba.config.DISABLE_JIT:
            return function
        dispatcher = numba.njit(**options)(function)
        dispatcher._cache = _Kept(function, options)
        return dispatcher

    return decorate


class _Kept(caching.NullCache):
    """What a dispatcher asks before it compiles, and tells when it has."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        facts = repr(sorted((name, sorted(x) if isinstance(x, set) else x) for name, x in options.items()))
        self._name = function.__name__
        # What a function made by another has of it, like the dtype that it is for, is compiled in.
        made_of = serialize.dumps(tuple(cell.cell_contents for cell in function.__closure__ or ()))
        code = function.__code__.co_code
        self._facts = f"{function.__module__}.{function.__qualname__} {facts}".encode() + code + made_of

    @property
    def cache_path(self) -> str | None:
        place = _directory()
        return None if place is None else str(place)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What was compiled for these types, or None."""
        target_context.refresh()
        for path, shared in disk.places(self._path(sig, target_context.codegen())):
            if (content := _read(path, shared)) is None:
                continue
            try:
                return compiler.CompileResult._rebuild(target_context, *pickle.loads(content))
            except Exception as error:  # of whatever class: a fault of the file costs a compilation, never a call
                _warn(path, f"{path} cannot be loaded, so its function is compiled again: {type(error).__name__}: {error}")
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Writes what was compiled, if it can be written."""
        if data.library.has_dynamic_globals or any(not lifted.can_cache for lifted in data.lifted):
            return
        path = self._path(sig, data.codegen)
        if path is None or path.parent == disk.shared_directory():
            return
        content = serialize.dumps(data._reduce())
        try:
            disk.write(path, (hashlib.sha256(content).hexdigest().encode() + b"\n", content))
        except OSError as error:
            _warn(
                path.parent,
                f"compiled functions are not kept, so each process compiles them again, which takes some seconds: {error}; "
                "name a directory of your own in CCE_CACHE_DIR, or nothing, as in CCE_CACHE_DIR= , to go on without files",
            )
        else:
            disk.delete_oldest(path, _MAX_BYTES)

    def _path(self, sig: Any, codegen: Any) -> Path | None:
        """The file for these types; None if nothing is kept."""
        place, environment = _directory() or disk.shared_directory(), _environment()
        if place is None or environment is None:
            return None
        key = self._facts + repr((str(sig), codegen.magic_tuple(), environment)).encode()
        return place / f"{self._name}-{hashlib.sha256(key).hexdigest()}{_SUFFIX}"


def _directory() -> Path | None:
    if "CCE_CACHE_DIR" not in os.environ and (numbas := os.environ.get("NUMBA_CACHE_DIR")):
        return Path(numbas)
    return disk.directory()


def _read(path: Path, shared: bool) -> bytes | None:
    """The pickle in a file, or None; one that is damaged is deleted, unless it is shared."""
    try:
        digest, _, content = disk.read(path, shared=shared).partition(b"\n")
    except disk.Untrusted as error:
        _warn(path.parent, f"compiled functions are neither loaded nor kept: {error}")
        return None
    except OSError as error:
        _log.debug("%s is not read: %s", path, error)
        return None
    if digest == hashlib.sha256(content).hexdigest().encode():
        return content
    _warn(path, f"{path} is damaged, so its function is compiled again")
    if not shared:
        disk.delete(path)
    return None


@functools.cache
def _environment() -> tuple[str, ...] | None:
    """What machine code depends on besides its own source: other sources, and versions; None if sources cannot be read."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):
        for path in (*sorted(_ROOT.glob("cpu/**/*.py")), _ROOT / "survivors.py"):  # whose constants are compiled in
            content = path.read_bytes()
            digest.update(f"{path.relative_to(_ROOT).as_posix()} {len(content)}\n".encode() + content)
        versions = numba.__version__, llvmlite.__version__, np.__version__
        return digest.hexdigest(), str(sys.implementation.cache_tag), *versions
    return None


def _warn(about: Path, message: str) -> None:
    disk.warn_once(f"compiled functions: {about}", message)
