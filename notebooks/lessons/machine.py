"""Where a lesson's kernels run: on the GPU if there is one, else in Numba's simulator. To be imported before Numba.

The simulator is chosen by NUMBA_ENABLE_CUDASIM=1 when Numba is imported; who has set it keeps what they chose.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

_VARIABLE = "NUMBA_ENABLE_CUDASIM"
_for_good = contextlib.ExitStack()


@functools.cache
def has_gpu() -> bool:
    """There is an NVIDIA GPU with a driver, CuPy for its arrays, and nobody has chosen to do without.

    Who wants to sets NUMBA_ENABLE_CUDASIM=1, or LESSONS_WITHOUT_GPU=1.
    """
    if any(os.environ.get(name, "0") not in ("", "0") for name in (_VARIABLE, "LESSONS_WITHOUT_GPU")):
        return False
    if importlib.util.find_spec("cupy") is None:
        return False
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def choose(simulator_instead: bool = True) -> None:
    """Sets the simulator where there is no GPU. Raises RuntimeError if Numba came first, and differently."""
    os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")  # tiny grids are on purpose here
    if not has_gpu() and simulator_instead:
        if "numba" in sys.modules and not importlib.import_module("numba").config.ENABLE_CUDASIM:
            raise RuntimeError(
                "Numba was imported before `lessons`, without its simulator: restart the kernel, import `lessons` first"
            )
        os.environ[_VARIABLE] = "1"
        _for_good.enter_context(importlib.import_module("cce_numba.launch.simulator").steady())
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # as on a GPU, which says nothing when a number overflows


def array_module() -> Any:
    """CuPy on a GPU, else NumPy."""
    return importlib.import_module("cupy" if has_gpu() else "numpy")


def to_host(array: Any) -> Any:
    """A NumPy array of what may be on the GPU."""
    return array.get() if hasattr(array, "get") else array


def name() -> str:
    """Of the GPU, or of what stands in for it."""
    if not has_gpu():
        return "Numba's simulator, on the CPU"
    cupy = array_module()
    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()


def capability() -> tuple[int, int]:
    """The GPU's compute capability, such as (9, 0) of an H100; (0, 0) without a GPU."""
    if not has_gpu():
        return 0, 0
    digits = array_module().cuda.Device().compute_capability
    return int(digits[:-1]), int(digits[-1])


def gpu_ms(function: Callable[[], Any], runs: int = 20) -> float | None:
    """Median milliseconds that the GPU takes for a call, after one that compiles; None without a GPU."""
    if not has_gpu():
        return None
    function()
    events = array_module().cuda.Event
    times = []
    for _ in range(runs):
        start, stop = events(), events()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(array_module().cuda.get_elapsed_time(start, stop))
    return statistics.median(times)


def cpu_ms(function: Callable[[], Any], runs: int = 5) -> float:
    """Median milliseconds that the CPU takes for a call, after one that does not count."""
    function()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)
