"""Compiled kernels, kept on disk: machine code in a file whose name is a digest of all that the code depends on.

A file is one line of JSON, then the machine code. The JSON holds the kernel's name within the machine code (numba numbers its
functions, so the name is not known beforehand), the SHA-256 of the machine code, and what `info` tells of the file. Files may
be deleted at any time. No launch fails for want of a file: what cannot be read is compiled, and what cannot be written is
compiled again by the next process. The log says why, at level debug.

`cce_numba/disk.py` says which directory that is, and whose files are loaded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numba import cuda

from cce_numba import disk

MAX_BYTES = 256 * 2**20  # of all files together; beyond that the oldest are deleted
_SUFFIX = ".cce-cubin"  # nobody else's, since files that end so are deleted
_MAX_HEADER_BYTES = 64 * 2**10
_ROOT = Path(__file__).parents[1]
_IMPORTED = time.time()
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A file of the cache.

    Attributes:
        path: where it is.
        nbytes: its size.
        kernel: the `identity` of its kernel; empty if the file does not say.
        compute_capability: of the devices that load it, like "9.0"; empty if the file does not say.
        is_current: whether it was made of the package's sources as they are now. Others are never read again.
    """

    path: Path
    nbytes: int
    kernel: str
    compute_capability: str
    is_current: bool

    @property
    def package(self) -> str:
        """The subpackage that the kernel comes from, like "simt"; empty if the file does not say."""
        parts = self.kernel.partition("(")[0].split(".")
        return parts[1] if len(parts) > 2 else ""


def why_unusable() -> str | None:
    """Why no kernel is kept here, or None if kernels are."""
    place = disk.directory()
    if place is None:
        return "CCE_CACHE_DIR is empty, or there is no home directory"
    if (reason := disk.why_untrusted(place)) is not None:
        return reason
    if _sources() is None:
        return "the package's sources cannot be read, or one has changed since this process imported them"
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written to; kernels that are there already are loaded"
    return None


def entries() -> list[Entry]:
    """The files of the cache, by name."""
    place, sources = disk.directory(), _sources()
    found = []
    for path in sorted(place.glob(f"*{_SUFFIX}")) if place is not None else ():
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # one that was just deleted, or is none
            with open(path, "rb") as file:
                told = json.loads(file.readline(_MAX_HEADER_BYTES))
            is_current = sources is not None and told.get("sources") == sources
            kernel, cc = str(told.get("kernel", "")), str(told.get("compute_capability", ""))
            found.append(Entry(path, path.stat().st_size, kernel, cc, is_current))
    return found


def path_of(name: str, facts: Mapping[str, Any], cc: tuple[int, int]) -> Path | None:
    """The file for a kernel's machine code; None if no files are kept, and none are shared.

    The name is made of the package's sources, since a kernel is a function and all that it calls; of `facts`; of the compute
    capability; and of what compiles. numba-cuda writes the code, so each of its releases counts. numba-cuda takes little but
    registries of types from numba, so of numba's version the first two numbers count. NVVM and nvJitLink count by their major
    version: what any of their releases makes of the source is right, but a driver may not load what the next major one makes.

    Args:
        name: of the kernel's function, which the file's name begins with.
        facts: what else the machine code depends on, as JSON can hold it.
        cc: the compute capability.
    """
    place, sources = disk.directory() or disk.shared_directory(), _sources()
    if place is None or sources is None:
        return None
    told = {"sources": sources, "facts": dict(facts), "cc": list(cc), "compiler": _compiler()}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return place / f"{name}-{digest}{_SUFFIX}"


def load(path: Path | None) -> Any:
    """The kernel in a file, or in the shared file of its name, loaded by numba for the current device; None if none can be."""
    for place, shared in disk.places(path):
        if (found := read(place, shared=shared)) is None:
            continue
        symbol, image = found
        try:
            code = importlib.import_module("cuda.core").ObjectCode.from_cubin(image)
            return cuda.current_context().create_module_image(code).get_function(symbol)
        except Exception as error:  # of the driver, of whatever class: a fault of the file costs a compilation, never a launch
            _log.debug("%s does not load, so it is compiled again: %s", place, error)
            _delete(place, shared)
    return None


def store(path: Path | None, symbol: str, image: bytes, kernel: str = "", cc: tuple[int, int] = (0, 0)) -> None:
    """Writes a kernel's file, if it can be written, and deletes the oldest files beyond MAX_BYTES; arguments as of `write`."""
    if path is None or path.parent == disk.shared_directory():
        return
    try:
        write(path, symbol, image, kernel, cc)
    except disk.Untrusted as error:
        _warn(path, error)
    except OSError as error:
        _log.debug("%s cannot be written: %s", path, error)


def read(path: Path, *, shared: bool = False) -> tuple[str, bytes] | None:
    """`(name within the machine code, machine code)`, or None; a file that is damaged is deleted, unless it is shared."""
    try:
        header, _, image = disk.read(path, shared=shared).partition(b"\n")
    except disk.Untrusted as error:
        _warn(path, error)
        return None
    except OSError as error:
        _log.debug("%s is not read: %s", path, error)
        return None
    try:
        told = json.loads(header)
        if hashlib.sha256(image).hexdigest() == told["sha256"]:
            return str(told["symbol"]), image
    except (ValueError, LookupError, TypeError):
        pass
    _log.debug("%s is damaged, so it is compiled again", path)
    _delete(path, shared)
    return None


def write(path: Path, symbol: str, image: bytes, kernel: str, cc: tuple[int, int]) -> None:
    """Writes a file whole or not at all, since other processes may read or write it at the same time. Raises OSError.

    Args:
        path: of `path_of`.
        symbol: the kernel's name within the machine code.
        image: the machine code.
        kernel: the kernel's `identity`, for `entries`.
        cc: the compute capability, for `entries`.
    """
    about = {"kernel": kernel, "compute_capability": f"{cc[0]}.{cc[1]}", "sources": _sources()}
    header = json.dumps({"symbol": symbol, "sha256": hashlib.sha256(image).hexdigest(), **about})
    disk.write(path, (header.encode() + b"\n", image))
    disk.delete_oldest(path, MAX_BYTES)


def _sources() -> str | None:
    """A digest of the package's sources; None if one has changed since the import, so that older code may be running."""
    try:
        # The time of the last change of whatever kind as well: copies may carry the original's time of modification.
        newest = max(max(status.st_mtime, status.st_ctime) for status in (path.stat() for path in _ROOT.rglob("*.py")))
        if newest <= _IMPORTED:
            return _digest_of_sources()
        _log.debug("no kernels are kept: sources in %s are newer than this process", _ROOT)
    except (OSError, ValueError) as error:  # ValueError: there are none
        _log.debug("no kernels are kept: sources in %s cannot be read: %s", _ROOT, error)
    return None


@functools.cache
def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(_ROOT.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


@functools.cache
def _compiler() -> tuple[str, ...]:
    """What machine code depends on besides the source: versions, see `path_of`, and numba's settings in the environment."""
    config = importlib.import_module("numba.cuda.core.config")
    return (
        _version("numba_cuda", 3),
        _version("numba", 2),
        _version("cuda.bindings", 1),  # which loads the NVVM and nvJitLink of its own major version
        f"debug {bool(config.CUDA_DEBUGINFO_DEFAULT)}, optimised {bool(config.OPT != 0)}, cc {config.FORCE_CUDA_CC}",
    )


def _version(module: str, numbers: int) -> str:
    return f"{module} {'.'.join(importlib.import_module(module).__version__.split('.')[:numbers])}"


def _delete(path: Path, shared: bool) -> None:
    if not shared:
        disk.delete(path)


def _warn(path: Path, reason: OSError) -> None:
    disk.warn_once(path.parent, f"compiled kernels are neither loaded nor kept: {reason}")
