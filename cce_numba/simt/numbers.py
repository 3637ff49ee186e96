"""How numbers are read from arrays and written to them: 16-bit ones are computed with in float32.

Numba has no bfloat16, so kernels see its bits, as uint16. `x.view(dtype)` reinterprets the bits of a scalar, in a kernel as in
NumPy, so the simulator runs all of this too.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.interchange import BFLOAT16


@cuda.jit(device=True)
def _widen_bfloat16(bits: Any) -> Any:
    """The float32 whose upper half is the 16 bits of a bfloat16."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@cuda.jit(device=True)
def _narrow_bfloat16(x: Any) -> Any:
    """Rounds to nearest, ties to even."""
    if x != x:
        return np.uint16(0x7FC0)
    bits = np.float32(x).view(np.uint32)
    ties_to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + ties_to_even) >> np.uint32(16))


def real_of(dtype: np.dtype) -> Any:
    """The type that is computed in, for arrays of `dtype`: `numpy.float64` for float64, else `numpy.float32`."""
    return np.float64 if dtype == np.float64 else np.float32


@functools.cache
def conversions(dtype: np.dtype) -> tuple[Any, Any]:
    """`(load, store)`, device functions: an element of an array of `dtype` becomes one of `real_of(dtype)`, and back."""
    if dtype == BFLOAT16:
        return _widen_bfloat16, _narrow_bfloat16
    stored, real = dtype.type, real_of(dtype)

    @cuda.jit(device=True)
    def load(x: Any) -> Any:
        """An element of an array as a number that is computed with."""
        return real(x)

    @cuda.jit(device=True)
    def store(x: Any) -> Any:
        """A number as an element of an array."""
        return stored(x)

    return load, store
