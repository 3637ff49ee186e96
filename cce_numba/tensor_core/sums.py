"""Sums over the lanes of a warp, and over the threads of a CTA of `THREADS`.

Numbers are int32, int64 or float32. A sum is of its terms' type, where numba would make an int64 of the sum of two int32. Each
function is called by all threads that it sums over. Terms are added in the same order each time, so that a sum of floats has
the same bits each time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types
from numba.cuda.extending import overload

from cce_numba.ptx import control

THREADS = 1024
FULL = 0xFFFFFFFF  # all lanes of a warp
_NUMBERS = {types.int32: np.int32, types.int64: np.int64, types.float32: np.float32}
_INLINED = {"forceinline": True}


def add(x: Any, y: Any) -> Any:
    """x + y, a number of x's type."""
    return x + y


@overload(add, jit_options=_INLINED)
def _add(x: Any, y: Any) -> Any:
    """What numba compiles for `add`."""
    number = _NUMBERS[x]

    def add(x: Any, y: Any) -> Any:
        return number(x + y)

    return add


def shuffle_xor(x: Any, mask: Any) -> Any:
    """x of the lane whose number differs in the bits of the mask."""
    raise NotImplementedError("shuffle_xor is for kernels")


@overload(shuffle_xor, jit_options=_INLINED)
def _shuffle_xor(x: Any, mask: Any) -> Any:
    """What numba compiles for `shuffle_xor`."""

    def shuffle_float(x: Any, mask: Any) -> Any:
        return control.shuffle_xor_f32(x, mask)

    def shuffle_integer(x: Any, mask: Any) -> Any:
        return cuda.shfl_xor_sync(FULL, x, mask)

    return shuffle_float if x == types.float32 else shuffle_integer


@functools.cache
def make_warp_reduce(combine: Callable[..., Any]) -> Any:
    """The device function `result = reduce(x)`, which combines one number of each lane of a warp.

    combine: a device function of two numbers, whose result has the same bits whichever of the two comes first. So all lanes get
        the same result.
    """

    @cuda.jit(device=True, forceinline=True)
    def warp_reduce(x: Any) -> Any:
        """Combines x of the 32 lanes; each gets the result."""
        for mask in (16, 8, 4, 2, 1):
            x = combine(x, shuffle_xor(x, mask))
        return x

    return warp_reduce


warp_sum = make_warp_reduce(add)  # the sum over the lanes of the warp, which all of them get


@cuda.jit(device=True, forceinline=True)
def sum_up_to(x: Any) -> Any:
    """The sum over the warp's lanes up to this one."""
    lane = cuda.threadIdx.x & 31
    for step in (1, 2, 4, 8, 16):
        before = cuda.shfl_up_sync(FULL, x, step)
        if lane >= step:
            x = add(x, before)
    return x


@cuda.jit(device=True, forceinline=True)
def sums_of_rows(x: Any, y: Any) -> Any:
    """`(x, y)`, each summed over the eight lanes that hold the same columns of a fragment (`ptx.fragment`)."""
    for mask in (4, 8, 16):
        x, y = add(x, shuffle_xor(x, mask)), add(y, shuffle_xor(y, mask))
    return x, y


@cuda.jit(device=True, forceinline=True)
def sum_before(x: Any, sums: Any) -> Any:
    """`(sum over the CTA's threads before this one, sum over all threads)` of x, an int64.

    sums: an array of 32 int64 in shared memory, which nothing else uses.
    """
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    up_to = sum_up_to(x)
    cuda.syncthreads()  # all have read what an earlier call left in `sums`
    if lane == 31:
        sums[warp] = up_to
    cuda.syncthreads()
    warps_up_to = sum_up_to(sums[lane])
    before, total = up_to - x, cuda.shfl_sync(FULL, warps_up_to, 31)
    warps_before = cuda.shfl_sync(FULL, warps_up_to, max(warp - 1, 0))
    if warp > 0:
        before += warps_before
    return before, total
