"""What Numba's simulator needs to run these kernels reliably and in reasonable time.

It runs each CUDA thread of a block as a Python thread, while a manager polls them for having reached a barrier.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

_allocating = threading.Lock()


@contextlib.contextmanager
def running() -> Iterator[None]:
    """For the duration of a simulated launch: threads take turns quickly, and shared arrays are really shared.

    Turns every 0.1 ms instead of Python's 5 ms make it about eight times faster. But Numba looks up a block's shared array
    by the line that asks for it, and makes one if there is none, without a lock: two threads that take turns in between
    get one each. (Seen with numba-cuda 0.30; the kernel's results are then wrong now and then.)
    """
    kernelapi = importlib.import_module("numba.cuda.simulator.kernelapi")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with mock.patch.object(kernelapi.FakeCUDAShared, "array", _shared_array):
            yield
    finally:
        sys.setswitchinterval(interval)


@functools.cache
def device_array_class() -> Any:
    """The simulator's device array: around a NumPy array of any strides, in whose memory kernels read and write."""
    return importlib.import_module("numba.cuda.simulator.cudadrv.devicearray").FakeCUDAArray


def _shared_array(shared: Any, shape: Any, dtype: Any, alignment: None = None) -> np.ndarray:
    caller = sys._getframe(1)
    line = (caller.f_code.co_filename, caller.f_lineno)
    with _allocating:
        if line not in shared._allocations:
            shared._allocations[line] = np.empty(shape, dtype)
        return shared._allocations[line]
