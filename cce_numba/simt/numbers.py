"""How elements are read and written: 16-bit inputs are widened to float32, bfloat16 by its bits, since Numba has no such dtype.

`x.view(dtype)` reinterprets the bits of a scalar, in a kernel as in NumPy, so all of this runs in the simulator too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.interchange import BFLOAT16


@cuda.jit(device=True)
def _widen_bfloat16(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@cuda.jit(device=True)
def _narrow_bfloat16(x: Any) -> Any:
    """Rounds to nearest, ties to even."""
    if x != x:
        return np.uint16(0x7FC0)
    bits = np.float32(x).view(np.uint32)
    ties_to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + ties_to_even) >> np.uint32(16))


def conversions(dtype: np.dtype) -> tuple[Any, Any]:
    """`(load, store)` device functions: element of an array of `dtype` to the compute dtype, and back."""
    if dtype == BFLOAT16:
        return _widen_bfloat16, _narrow_bfloat16
    stored, real = dtype.type, np.float64 if dtype == np.float64 else np.float32

    @cuda.jit(device=True)
    def load(x: Any) -> Any:
        return real(x)

    @cuda.jit(device=True)
    def store(x: Any) -> Any:
        return stored(x)

    return load, store
