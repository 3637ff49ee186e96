"""What kernels and plans need to know of a GPU, asked for once."""

from __future__ import annotations

import functools
import importlib
import threading
from dataclasses import dataclass
from typing import Any

_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76  # cudaDeviceAttr


@dataclass(frozen=True)
class Gpu:
    """compute_capability: (major, minor). multiprocessors: streaming multiprocessors."""

    compute_capability: tuple[int, int]
    multiprocessors: int


@functools.cache
def cupy() -> Any:
    """CuPy, which not everybody has: imported when it is first needed, and looked up once."""
    return importlib.import_module("cupy")


def current() -> Gpu:
    """CuPy's current device."""
    return _facts(cupy().cuda.runtime.getDevice())


@functools.cache
def count() -> int:
    """Devices that this process can use."""
    return cupy().cuda.runtime.getDeviceCount()


_thread = threading.local()


def bind_context() -> None:
    """Makes the device's context current in this thread, which not every call of CuPy's does; once for each thread."""
    if not getattr(_thread, "bound", False):
        cupy().cuda.runtime.free(0)
        _thread.bound = True


@functools.cache
def _facts(device: int) -> Gpu:
    attribute = cupy().cuda.runtime.deviceGetAttribute
    return Gpu((attribute(_MAJOR, device), attribute(_MINOR, device)), attribute(_MULTIPROCESSORS, device))
