"""Launches: on a GPU straight to the compiled kernel, on CuPy's current stream; in the simulator through Numba's own call.

Numba's own call works on a GPU, too, but it wraps each array and works out each argument's type: a forward took the host
2.1 ms, and takes it 0.9 ms this way. Here an array is described once, and its type is looked up.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

import numpy as np
from numba import cuda

from cce_numba import gpu
from cce_numba.gpu import SIMULATED
from cce_numba.interchange import BFLOAT16
from cce_numba.simt import simulator


class DeviceArgument:
    """A CuPy array as a compiled Numba kernel takes it; bfloat16 by its bits.

    Attributes:
        numba_type: its type in a kernel's signature.
        values: what the kernel is passed: two objects that only the CPU has, size, itemsize, address, shape, strides (bytes).
    """

    __slots__ = ("numba_type", "owner", "values")

    def __init__(self, array: Any) -> None:
        self.owner = array
        dtype = np.dtype(np.uint16) if array.dtype == BFLOAT16 else array.dtype
        self.numba_type = _array_type(dtype, array.ndim, "C" if array.flags.c_contiguous else "A")
        self.values = (0, 0, array.size, dtype.itemsize, array.data.ptr, *array.shape, *array.strides)


def argument(array: Any) -> Any:
    """A NumPy or CuPy array as a kernel's argument, without a copy; launches do this themselves where it was not done."""
    if not SIMULATED:
        return DeviceArgument(array)
    if not isinstance(array, np.ndarray):
        return array  # was one before
    # The simulator copies the host's arrays in and out, and only takes contiguous ones; its own it uses where they are.
    return simulator.device_array_class()(array.view(np.uint16) if array.dtype == BFLOAT16 else array)


def kernel_of(threads: int, ctas: int) -> Any:
    """`cuda.jit` for kernels launched with `threads` threads a CTA, `ctas` of which fit on a multiprocessor together.

    That bounds the registers of a thread. The simulator knows no such thing.
    """
    return cuda.jit if SIMULATED else cuda.jit(launch_bounds=(threads, ctas))


def launch(kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], *arguments: Any) -> None:
    """Launches a `cuda.jit` kernel, compiled for these arguments the first time. An empty grid launches nothing.

    Arguments are arrays (NumPy's in the simulator, CuPy's on a GPU), what `argument` made of them, bools, ints and NumPy
    scalars of float32 or float64.
    """
    if 0 in grid:
        return
    prepared = [argument(x) if getattr(x, "ndim", 0) else x for x in arguments]  # scalars and DeviceArgument have no ndim
    if SIMULATED:
        with simulator.running():
            kernel[grid, block](*prepared)
        return
    signature: list[Any] = []
    values: list[Any] = []
    for x in prepared:
        if type(x) is DeviceArgument:
            signature.append(x.numba_type)
            values.extend(x.values)
        else:
            numba_type, c_type = _scalars()[type(x)]
            signature.append(numba_type)
            values.append(c_type(x))
    compiled = kernel.overloads.get(tuple(signature)) or kernel.compile(tuple(signature))
    core = importlib.import_module("cuda.core")
    stream = _core_stream(importlib.import_module("cupy").cuda.get_current_stream().ptr)
    core.launch(stream, core.LaunchConfig(grid=grid, block=block), compiled._codelibrary.get_cufunc().kernel, *values)


@functools.cache
def _array_type(dtype: np.dtype, ndim: int, layout: str) -> Any:
    return cuda.types.Array(importlib.import_module("numba.cuda.np.numpy_support").from_dtype(dtype), ndim, layout)


@functools.cache
def _scalars() -> dict[type, tuple[Any, Any]]:
    types = cuda.types
    return {
        bool: (types.boolean, bool),
        int: (types.int64, ctypes.c_int64),
        np.float32: (types.float32, ctypes.c_float),
        np.float64: (types.float64, ctypes.c_double),
    }


@functools.lru_cache(maxsize=64)
def _core_stream(pointer: int) -> Any:
    return importlib.import_module("cuda.core").Stream.from_handle(pointer)


def multiprocessors() -> int:
    """Streaming multiprocessors of the current device; 1 in the simulator."""
    return 1 if SIMULATED else gpu.current().multiprocessors
