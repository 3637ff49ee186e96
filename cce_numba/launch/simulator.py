"""Numba's simulator, which runs kernels without a GPU: made reliable, and as fast as it can be.

It runs each CUDA thread of a CTA as a Python thread, one CTA after the other, while a manager polls the threads for having
reached a barrier. Kernels see plain NumPy arrays.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from numba import cuda

from cce_numba.interchange import BFLOAT16

_allocating = threading.Lock()


def kernel(function: Callable[..., None]) -> Any:
    """The simulator's kernel of a Python function."""
    return cuda.jit(function)


def launch(kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    """Runs a kernel; the arrays among its arguments, and in its records, are of `array_argument`."""
    with _running():
        kernel[grid, block](*map(_outermost, arguments))


def array_argument(array: Any) -> Any:
    """A NumPy array as kernels see it; bfloat16, which numba has not, by its bits."""
    return array.view(np.uint16) if array.dtype == BFLOAT16 else array


def _outermost(argument: Any) -> Any:
    """An argument in the simulator's wrapper for arrays on a device.

    The simulator copies host arrays in and out, and only takes contiguous ones. What is in such a wrapper, or in a record, it
    uses where it is.
    """
    return _device_array_class()(argument) if isinstance(argument, np.ndarray) else argument


@functools.cache
def _device_array_class() -> Any:
    return importlib.import_module("numba.cuda.simulator.cudadrv.devicearray").FakeCUDAArray


@contextlib.contextmanager
def _running() -> Iterator[None]:
    """For the duration of a simulated launch: threads take turns quickly, and shared arrays are really shared.

    Turns every 0.1 ms instead of Python's 5 ms make it about eight times faster. But the simulator looks up a CTA's shared
    array by the line that asks for it, and makes one if there is none, without a lock: two threads that take turns in between
    get one each. (Seen with numba-cuda 0.30; the kernel's results are then wrong now and then.) Since the line is the key, no
    two shared arrays of a kernel may be made by the same line.
    """
    kernelapi = importlib.import_module("numba.cuda.simulator.kernelapi")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with mock.patch.object(kernelapi.FakeCUDAShared, "array", _shared_array):
            yield
    finally:
        sys.setswitchinterval(interval)


def _shared_array(shared: Any, shape: Any, dtype: Any, alignment: None = None) -> np.ndarray:
    caller = sys._getframe(1)
    line = (caller.f_code.co_filename, caller.f_lineno)
    with _allocating:
        if line not in shared._allocations:
            shared._allocations[line] = np.empty(shape, dtype)
        return shared._allocations[line]
