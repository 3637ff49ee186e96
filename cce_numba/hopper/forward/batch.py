"""The tokens of a launch, and which of them a CTA has: what every warp of the forward asks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.tiles import HopperTiles
from cce_numba.launch.record import Record
from cce_numba.ptx import cluster
from cce_numba.tensor_core.records import I32, U64
from cce_numba.tensor_core.schedule import quotient


class Batch(Record):
    """The tokens of a launch."""

    tokens = U64  # address of int32: rows of e, ascending
    n_listed = I32  # how many
    per_round = I32  # groups of them, see `tensor_core.schedule`


@functools.cache
def make_who_am_i(tiles: HopperTiles) -> Any:
    """The device function `(worker, workers, groups, rank) = who_am_i(batch)`.

    This CTA's cluster is `worker`, one of `workers`; the batch has `groups` groups of tokens; rank is the CTA's in the cluster.
    """
    ctas, group_n = tiles.cluster, tiles.group_n

    @cuda.jit(device=True, forceinline=True)
    def who_am_i(batch: Any) -> Any:
        workers, groups = quotient(cuda.gridDim.x, ctas), quotient(batch.n_listed + group_n - 1, group_n)
        return quotient(cuda.blockIdx.x, ctas), workers, groups, np.int32(cluster.cta_rank())

    return who_am_i
