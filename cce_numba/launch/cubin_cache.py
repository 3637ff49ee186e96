"""Compiled kernels, kept on disk: machine code in a file whose name is a digest of all that it depends on.

A file is one line of JSON, with the kernel's name in the machine code (numba numbers them, so it is not known beforehand) and
the digest of what follows, then the machine code. Files are safe to delete at any time. No launch fails for want of one: what
cannot be read is compiled, and what cannot be written is compiled again by the next process; the log, at level debug, says why.

The environment's CCE_CACHE_DIR is the directory, `~/.cache/cce_numba` if it is not set; set to nothing, it turns the cache off.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from numba import cuda

if TYPE_CHECKING:
    from cce_numba.launch.kernel import Kernel

MAX_BYTES = 256 * 2**20  # of all files; the oldest go first
_SUFFIX = ".cce-cubin"  # nobody else's, as files that end so are deleted
_PACKAGE = __name__.partition(".")[0]
_ROOT = Path(__file__).parents[1]
_IMPORTED = time.time()
_log = logging.getLogger(__name__)


def identity(factory: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """A function of this package and its arguments, told apart from all others; None if that cannot be made sure."""
    if not _is_ours(factory):
        return None
    bound = inspect.signature(factory).bind(*args, **kwargs)
    bound.apply_defaults()
    try:
        arguments = ", ".join(f"{name}={_spelled(value)}" for name, value in bound.arguments.items())
    except TypeError as reason:
        _log.debug("kernels of %s are not kept: %s", factory.__qualname__, reason)
        return None
    return f"{factory.__module__}.{factory.__qualname__}({arguments})"


def path_of(kernel: Kernel, cc: tuple[int, int]) -> Path | None:
    """The file of a kernel's machine code for a compute capability; None if it is not kept.

    The name is made of the package's sources, since a kernel is a function and all that it calls; what its factory was told;
    how it is launched; and what compiles. Of the latter, numba-cuda writes the code, so any release of it counts; of numba,
    from which it takes little but registries of types, the first two numbers do. NVVM and nvJitLink count by their major
    version: what any of their releases makes of the source is right, but a driver may not load what the next major one makes.
    """
    directory, sources = _directory(), _sources()
    if directory is None or sources is None or kernel.identity is None:
        return None
    told = {
        "sources": sources,
        "kernel": kernel.identity,
        "signature": str(kernel.signature),
        "launch": [kernel.threads, kernel.cluster, kernel.smem_bytes],
        "cc": list(cc),
        "compiler": _compiler(),
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return directory / f"{kernel.function.__name__}-{digest}{_SUFFIX}"


def load(path: Path | None) -> Any:
    """The kernel in a file, loaded by numba for the current device; None if there is none that can be loaded."""
    if path is None or (found := _read(path)) is None:
        return None
    symbol, image = found
    try:
        code = importlib.import_module("cuda.core").ObjectCode.from_cubin(image)
        return cuda.current_context().create_module_image(code).get_function(symbol)
    except Exception as error:  # of the driver, of whatever class: a fault of the file costs a compilation, never a launch
        _log.debug("%s does not load, so it is compiled again: %s", path, error)
        _delete(path)
        return None


def store(path: Path | None, symbol: str, image: bytes) -> None:
    """Writes a kernel's file, if it can be written, and deletes the oldest files beyond MAX_BYTES."""
    if path is None:
        return
    try:
        _write(path, symbol, image)
    except OSError as error:
        _log.debug("%s cannot be written: %s", path, error)


def precompile(kernel: Kernel, cc: tuple[int, int] = (9, 0)) -> Path:
    """Compiles a kernel without a GPU, as for a device of a compute capability, which then finds it in the cache's directory.

    Not while other threads compile: to numba the device seems to be there.

    Args:
        kernel: of a `launch.kernel_factory`.
        cc: major and minor number.

    Returns:
        The file, which may have been there before.

    Raises:
        ValueError: the kernel is not kept: the cache is off, sources are newer than this process, or the kernel is of no
            `kernel_factory` of this package, or of one that was told what `identity` cannot tell apart.
        OSError: the file cannot be written.
    """
    path = path_of(kernel, cc)
    if path is None:
        raise ValueError(f"kernel must be one that is kept, with the cache on (CCE_CACHE_DIR); {kernel.identity} is not")
    if _read(path) is None:
        with _as_on_a_device(cc):
            _write(path, *machine_code(kernel.build()))
    return path


def machine_code(compiled: Any) -> tuple[str, bytes]:
    """A kernel's name, and the file that the driver loads, out of what numba has compiled for the current device."""
    return compiled.entry_name, compiled.library.get_cubin().code


@contextmanager
def _as_on_a_device(cc: tuple[int, int]) -> Iterator[None]:
    """Numba compiles for a device as if there were one, and loads nothing."""
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    library = importlib.import_module("numba.cuda.codegen").CUDACodeLibrary
    full = (*cc, "a" if cc >= (9, 0) else "")  # as numba for a device
    with (
        mock.patch.object(dispatcher, "get_current_device", return_value=SimpleNamespace(compute_capability=cc)),
        mock.patch.object(dispatcher._Kernel, "bind"),
        mock.patch.object(library, "_ensure_cc", lambda self, asked: asked or full),
    ):
        yield


def _directory() -> Path | None:
    if (chosen := os.environ.get("CCE_CACHE_DIR")) is not None:
        return Path(chosen) if chosen else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cce_numba"
    except RuntimeError as error:  # there is no home
        _log.debug("no kernels are kept: %s", error)
        return None


def _sources() -> str | None:
    """A digest of the package's sources; None if one has changed since, so that what runs may be older than what is read."""
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
    """What numba's code depends on besides the source: versions, see `path_of`, and settings in the environment."""
    config = importlib.import_module("numba.cuda.core.config")
    return (
        _version("numba_cuda", 3),
        _version("numba", 2),
        _version("cuda.bindings", 1),  # which loads the NVVM and nvJitLink of its own major version
        f"debug {bool(config.CUDA_DEBUGINFO_DEFAULT)}, optimised {bool(config.OPT != 0)}, cc {config.FORCE_CUDA_CC}",
    )


def _version(module: str, numbers: int) -> str:
    return f"{module} {'.'.join(importlib.import_module(module).__version__.split('.')[:numbers])}"


def _is_ours(thing: Any) -> bool:
    """Whether the digest of sources says all of a function or class."""
    return str(thing.__module__).partition(".")[0] == _PACKAGE and "<" not in thing.__qualname__


def _spelled(value: Any) -> str:
    """A value told apart from all others, whatever their kind; TypeError for kinds of which that is not known."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str) or isinstance(value, np.dtype):
        return repr(value)
    if kind is tuple:
        return f"({''.join(f'{_spelled(item)}, ' for item in value)})"
    if dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen and _is_ours(kind):  # type: ignore[attr-defined]
        fields = ", ".join(f"{field.name}={_spelled(getattr(value, field.name))}" for field in dataclasses.fields(kind))
        return f"{kind.__module__}.{kind.__qualname__}({fields})"
    if callable(value) and hasattr(value, "__qualname__") and _is_ours(value):  # a function, remembered results or not
        return f"{value.__module__}.{value.__qualname__}"
    raise TypeError(
        "what is told must be None, bool, int, float, str, a dtype, a tuple, or a function or frozen dataclass of "
        f"{_PACKAGE}, not {kind}"
    )


def _read(path: Path) -> tuple[str, bytes] | None:
    """`(symbol, machine code)`, or None; a file that is damaged is deleted."""
    try:
        header, _, image = path.read_bytes().partition(b"\n")
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
    _delete(path)
    return None


def _write(path: Path, symbol: str, image: bytes) -> None:
    """Whole or not at all, since others may read or write it at the same time."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    header = json.dumps({"symbol": symbol, "sha256": hashlib.sha256(image).hexdigest()})
    place, name = tempfile.mkstemp(suffix=_SUFFIX, dir=path.parent)
    try:
        with open(place, "wb") as file:
            file.write(header.encode() + b"\n" + image)
        os.replace(name, path)
    except BaseException:
        _delete(Path(name))
        raise
    _bound(path)


def _bound(newest: Path) -> None:
    """Deletes the oldest files of the directory, but not `newest`, until all have at most MAX_BYTES."""
    files = []
    for path in newest.parent.glob(f"*{_SUFFIX}"):
        with suppress(OSError):  # another process deletes as well
            files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total > MAX_BYTES and path != newest:
            _delete(path)
            total -= size


def _delete(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
