"""What every warp of the forward asks: who am I, which tokens are mine."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.tiles import HopperTiles
from cce_numba.ptx import cluster, memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.schedule import quotient


@functools.cache
def make_who_am_i(tiles: HopperTiles) -> Any:
    """The device function that gives this CTA's place in the schedule: `(worker, workers, groups, rank in the cluster)`."""
    ctas, group_n = tiles.cluster, tiles.group_n

    @cuda.jit(device=True, forceinline=True)
    def who_am_i(n_valid: Any) -> Any:
        workers, groups = quotient(cuda.gridDim.x, ctas), quotient(n_valid + group_n - 1, group_n)
        return quotient(cuda.blockIdx.x, ctas), workers, groups, np.int32(cluster.cta_rank())

    return who_am_i


@cuda.jit(device=True, forceinline=True)
def are_neighbours(tokens: Any, n0: Any, n_valid: Any) -> Any:
    """Whether the block of listed tokens from n0 on (as many as there are) are consecutive rows of e; tokens is an address."""
    last = np.int32(min(n0 + SURVIVOR_BLOCK - 1, n_valid - 1))
    first_row, last_row = token_at(tokens, n0), token_at(tokens, last)
    return last_row - first_row == last - n0


@cuda.jit(device=True, forceinline=True)
def token_at(tokens: Any, position: Any) -> Any:
    """The token at this position of the list; tokens is an address."""
    return memory.load_global_i32(tokens + np.uint64(4 * position))
