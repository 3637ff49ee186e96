"""What kernels and plans need to know of a GPU, asked for once."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
from dataclasses import dataclass
from typing import Any

_MULTIPROCESSORS, _L2_BYTES, _MAJOR, _MINOR = 16, 38, 75, 76  # cudaDeviceAttr


@dataclass(frozen=True)
class Gpu:
    """compute_capability: (major, minor). multiprocessors: streaming multiprocessors. l2_bytes: of the L2 cache."""

    compute_capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int = 50 * 2**20  # an H100's


def __getattr__(name: str) -> Any:
    """`SIMULATED`: whether kernels run in Python, on NumPy arrays (NUMBA_ENABLE_CUDASIM).

    Numba knows, and is imported when somebody asks: `import cce_numba` would take half a second longer with it.
    """
    if name != "SIMULATED":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, bool(importlib.import_module("numba").config.ENABLE_CUDASIM))


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
    capability = attribute(_MAJOR, device), attribute(_MINOR, device)
    return Gpu(capability, attribute(_MULTIPROCESSORS, device), attribute(_L2_BYTES, device))


def why_not(on_device: bool) -> str | None:
    """Why no kernel can run on arrays that are on a GPU, or are not, or None if kernels can."""
    return _missing_compiler() if on_device else _on_the_host()


@functools.cache
def _on_the_host() -> str:
    """What to do with arrays that are not on a GPU; asked in every call, so it is looked for once."""
    if importlib.util.find_spec("cupy") is None:
        return "the arrays are on the host, and CuPy, which GPU arrays need, is not installed: pip install 'cce_numba[cuda13]'"
    if not importlib.import_module("numba.cuda").is_available():
        return "the arrays are on the host, and no NVIDIA GPU with a working driver was found"
    return "the arrays are on the host: move them with cupy.asarray(...)"


@functools.cache
def _missing_compiler() -> str | None:
    """Why Numba cannot compile kernels here, or None."""
    try:
        importlib.import_module("numba.cuda.cudadrv.nvvm").NVVM()
    except Exception as error:
        return (
            f"numba-cuda finds no compiler ({type(error).__name__}): pip install 'cce_numba[cuda13]' (or cuda12, to match the "
            "driver)"
        )
    return None
