"""Arrays and streams as Numba's launches want them, on a GPU and in the simulator."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import config, cuda

from cce_numba.interchange import BFLOAT16
from cce_numba.simt import simulator

SIMULATED = bool(config.ENABLE_CUDASIM)


def argument(array: Any) -> Any:
    """A NumPy or CuPy array as a kernel argument, without a copy; bfloat16 by its bits.

    `sync=False`: the kernel is launched on the array's own stream, where Numba would otherwise make the host wait for it.
    """
    if array.dtype == BFLOAT16:
        array = array.view(np.uint16)
    # The simulator copies arrays in and out, and only takes contiguous ones; strided ones are always inputs.
    return np.ascontiguousarray(array) if SIMULATED else cuda.as_cuda_array(array, sync=False)


def _is_prepared(array: Any) -> bool:
    return hasattr(array, "copy_to_host")  # Numba's device arrays


def kernel_of(threads: int, ctas: int) -> Any:
    """`cuda.jit` for kernels launched with `threads` threads a CTA, `ctas` of which fit on a multiprocessor together.

    That bounds the registers of a thread. The simulator knows no such thing.
    """
    return cuda.jit if SIMULATED else cuda.jit(launch_bounds=(threads, ctas))


def launch(kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], *arguments: Any) -> None:
    """Launches on CuPy's current stream. Empty grids launch nothing.

    Arrays go through `argument` here, if they did not before: that takes the host some 30 us each, so loops prepare theirs.
    """
    if 0 in grid:
        return
    prepared = [argument(x) if hasattr(x, "dtype") and x.ndim and not _is_prepared(x) else x for x in arguments]
    if SIMULATED:
        with simulator.running():
            kernel[grid, block](*prepared)
    else:
        stream = cuda.external_stream(importlib.import_module("cupy").cuda.get_current_stream().ptr)
        with _small_grids_are_meant():
            configured = kernel[grid, block, stream]
        configured(*prepared)


@contextlib.contextmanager
def _small_grids_are_meant() -> Iterator[None]:
    """Numba warns of grids that leave multiprocessors idle, but small problems have small grids."""
    warns = config.CUDA_LOW_OCCUPANCY_WARNINGS
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0
    try:
        yield
    finally:
        config.CUDA_LOW_OCCUPANCY_WARNINGS = warns


def multiprocessors() -> int:
    """Streaming multiprocessors of the current device; 1 in the simulator."""
    return 1 if SIMULATED else cuda.get_current_device().MULTIPROCESSOR_COUNT


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)
