"""Small kernels whose accesses can be counted by hand, and broken ones. Their source is sent to the simulator."""

from __future__ import annotations

import numpy as np
from numba import cuda

T = 4


@cuda.jit
def tiled_kernel(e, c, z):
    """z (N, V) = e (N, D) @ c (V, D).T, a tile of T x T a block."""
    e_smem = cuda.shared.array((T, T), np.float32)
    c_smem = cuda.shared.array((T, T), np.float32)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    n, v, v_row = cuda.blockIdx.y * T + y, cuda.blockIdx.x * T + x, cuda.blockIdx.x * T + y
    total = np.float32(0)
    for d0 in range(0, e.shape[1], T):
        e_smem[y, x] = e[n, d0 + x] if n < e.shape[0] and d0 + x < e.shape[1] else np.float32(0)
        c_smem[y, x] = c[v_row, d0 + x] if v_row < c.shape[0] and d0 + x < c.shape[1] else np.float32(0)
        cuda.syncthreads()
        for k in range(T):
            total += e_smem[y, k] * c_smem[x, k]
        cuda.syncthreads()
    if n < e.shape[0] and v < c.shape[0]:
        z[n, v] = total


@cuda.jit
def no_first_barrier_kernel(e, c, z):
    """Reads the tile while others may still be writing it."""
    e_smem = cuda.shared.array((T, T), np.float32)
    c_smem = cuda.shared.array((T, T), np.float32)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    n, v, v_row = cuda.blockIdx.y * T + y, cuda.blockIdx.x * T + x, cuda.blockIdx.x * T + y
    total = np.float32(0)
    for d0 in range(0, e.shape[1], T):
        e_smem[y, x] = e[n, d0 + x] if n < e.shape[0] and d0 + x < e.shape[1] else np.float32(0)
        c_smem[y, x] = c[v_row, d0 + x] if v_row < c.shape[0] and d0 + x < c.shape[1] else np.float32(0)
        for k in range(T):
            total += e_smem[y, k] * c_smem[x, k]
        cuda.syncthreads()
    if n < e.shape[0] and v < c.shape[0]:
        z[n, v] = total


@cuda.jit
def no_second_barrier_kernel(e, c, z):
    """Overwrites the tile while others may still be reading it."""
    e_smem = cuda.shared.array((T, T), np.float32)
    c_smem = cuda.shared.array((T, T), np.float32)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    n, v, v_row = cuda.blockIdx.y * T + y, cuda.blockIdx.x * T + x, cuda.blockIdx.x * T + y
    total = np.float32(0)
    for d0 in range(0, e.shape[1], T):
        e_smem[y, x] = e[n, d0 + x] if n < e.shape[0] and d0 + x < e.shape[1] else np.float32(0)
        c_smem[y, x] = c[v_row, d0 + x] if v_row < c.shape[0] and d0 + x < c.shape[1] else np.float32(0)
        cuda.syncthreads()
        for k in range(T):
            total += e_smem[y, k] * c_smem[x, k]
    if n < e.shape[0] and v < c.shape[0]:
        z[n, v] = total


@cuda.jit
def wrong_tile_kernel(e, c, z):
    """Takes its rows of e by blockIdx.x, where blockIdx.y belongs."""
    e_smem = cuda.shared.array((T, T), np.float32)
    c_smem = cuda.shared.array((T, T), np.float32)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    n, v, v_row = cuda.blockIdx.y * T + y, cuda.blockIdx.x * T + x, cuda.blockIdx.x * T + y
    row = cuda.blockIdx.x * T + y
    total = np.float32(0)
    for d0 in range(0, e.shape[1], T):
        e_smem[y, x] = e[row, d0 + x] if row < e.shape[0] and d0 + x < e.shape[1] else np.float32(0)
        c_smem[y, x] = c[v_row, d0 + x] if v_row < c.shape[0] and d0 + x < c.shape[1] else np.float32(0)
        cuda.syncthreads()
        for k in range(T):
            total += e_smem[y, k] * c_smem[x, k]
        cuda.syncthreads()
    if n < e.shape[0] and v < c.shape[0]:
        z[n, v] = total


@cuda.jit
def divergent_kernel(out):
    """Half of the threads wait at one barrier, the others at another."""
    t = cuda.threadIdx.x
    if t % 2 == 0:
        cuda.syncthreads()
        out[t] = 1
    else:
        cuda.syncthreads()
        out[t] = 2


@cuda.jit
def banks_kernel(x, out):
    """A warp reads shared memory in six ways, each on a line of its own; then x and out in two."""
    square = cuda.shared.array((32, 32), np.float32)
    padded = cuda.shared.array((32, 33), np.float32)
    wide = cuda.shared.array(32, np.float64)
    t = cuda.threadIdx.x
    total = square[0, t]
    total += square[t, 0]
    total += square[0, 0]
    total += square[0, 2 * t % 32]
    total += padded[t, 0]
    total += wide[t]
    total += x[t, 0]
    out[t] = total + x[0, t]


@cuda.jit(device=True)
def doubled(x):
    return SCALE * x


SCALE = np.float32(2)


@cuda.jit
def calling_kernel(x):
    """Calls a device function that uses a constant."""
    i = cuda.grid(1)
    if i < x.shape[0]:
        x[i] = doubled(x[i])
