"""How numbers are read: 16-bit ones are widened to float32."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import arithmetic, memory


def widen(dtype: np.dtype) -> Any:
    """The instruction that gives the value, a float32, of the 16 bits of a float16 or bfloat16."""
    return arithmetic.widen_f16 if dtype == np.float16 else arithmetic.widen_bf16


@functools.cache
def make_load(dtype: np.dtype) -> Any:
    """The device function that reads a number of `dtype` (float16, bfloat16, float32) at an address, as float32."""
    wide, is_float32 = widen(dtype), dtype == np.float32

    @cuda.jit(device=True, forceinline=True)
    def load(address: Any) -> Any:
        """A number as float32; address: in global memory."""
        if is_float32:
            return memory.load_global_f32(address)
        return wide(memory.load_global_u16(address))

    return load
