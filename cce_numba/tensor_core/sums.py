"""Sums over the threads before one: of a warp, and of a CTA of `THREADS`."""

from __future__ import annotations

from typing import Any

from numba import cuda

THREADS = 1024
FULL = 0xFFFFFFFF  # all lanes of a warp


@cuda.jit(device=True, forceinline=True)
def sum_up_to(x: Any) -> Any:
    """The sum over the warp's lanes up to this one."""
    lane = cuda.threadIdx.x & 31
    for step in (1, 2, 4, 8, 16):
        before = cuda.shfl_up_sync(FULL, x, step)
        if lane >= step:
            x += before
    return x


@cuda.jit(device=True, forceinline=True)
def sum_before(x: Any, sums: Any) -> Any:
    """`(sum over the CTA's threads before this one, sum over all)`; sums: 32 int64 numbers in shared memory, for this alone."""
    lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
    up_to = sum_up_to(x)
    cuda.syncthreads()  # all have read what an earlier call left here
    if lane == 31:
        sums[warp] = up_to
    cuda.syncthreads()
    warps_up_to = sum_up_to(sums[lane])
    before, total = up_to - x, cuda.shfl_sync(FULL, warps_up_to, 31)
    warps_before = cuda.shfl_sync(FULL, warps_up_to, max(warp - 1, 0))
    if warp > 0:
        before += warps_before
    return before, total
