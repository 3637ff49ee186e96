"""The ring of stages in shared memory through which tiles travel from the producer to the consumers.

Each stage has two barriers. `full` completes when the stage's bytes have arrived. `empty` completes when the consumer of each
CTA of the cluster has let go of the stage, since each CTA's producer writes into the stages of all. The uses of the ring are
numbered. Use i is the (i // stages)-th of stage i % stages, so it waits for phases of parity (i // stages) % 2.

The consumers take turns. A waiting consumer must not look at a stage's `full` barrier while an earlier use of that stage is
still to complete: it would take an earlier phase of the same parity for its own. So each consumer has a barrier of its own,
which tells it that its turn has come.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.tiles import HopperTiles
from cce_numba.ptx import cluster, mbarrier


@functools.cache
def make_ring(tiles: HopperTiles) -> SimpleNamespace:
    """Device functions for a ring that starts at a shared address, and its addresses' arithmetic."""
    stages, stage_bytes, e_bytes = np.uint32(tiles.stages), np.uint32(tiles.stage_bytes), np.uint32(tiles.e_bytes)
    barriers, ctas = np.uint32(tiles.stages * tiles.stage_bytes), tiles.cluster
    full_arrivals, empty_arrivals = np.uint32(tiles.full_arrivals), np.uint32(tiles.cluster)
    turn_barriers = np.uint32(tiles.stages * (tiles.stage_bytes + 16))

    @cuda.jit(device=True, forceinline=True)
    def stage_of(use: Any) -> Any:
        """The stage, a uint32, that a use is of."""
        return np.uint32(use) % stages

    @cuda.jit(device=True, forceinline=True)
    def parity_of(use: Any) -> Any:
        """The parity of the phase that completes a stage's `full` barrier for a use."""
        return (np.uint32(use) // stages) & np.uint32(1)

    @cuda.jit(device=True, forceinline=True)
    def e_smem(ring: Any, stage: Any) -> Any:
        """Address of the stage's tile of e (block_n, block_d), or of A in the backward."""
        return ring + np.uint32(stage) * stage_bytes

    @cuda.jit(device=True, forceinline=True)
    def c_smem(ring: Any, stage: Any) -> Any:
        """Address of the stage's tile of c (block_v, block_d), or of B in the backward."""
        return ring + np.uint32(stage) * stage_bytes + e_bytes

    @cuda.jit(device=True, forceinline=True)
    def full(ring: Any, stage: Any) -> Any:
        """The barrier that completes when the stage's bytes have arrived."""
        return ring + barriers + np.uint32(stage) * np.uint32(8)

    @cuda.jit(device=True, forceinline=True)
    def empty(ring: Any, stage: Any) -> Any:
        """The barrier that completes when all consumers have let go of the stage."""
        return ring + barriers + (stages + np.uint32(stage)) * np.uint32(8)

    @cuda.jit(device=True, forceinline=True)
    def turn(ring: Any, consumer: Any) -> Any:
        """The barrier that tells a consumer, 0 or 1, that its turn has come."""
        return ring + turn_barriers + np.uint32(consumer) * np.uint32(8)

    @cuda.jit(device=True, forceinline=True)
    def init(ring: Any) -> None:
        """By one thread; a barrier of the cluster must follow."""
        for stage in range(stages):
            mbarrier.init(full(ring, stage), full_arrivals)
            mbarrier.init(empty(ring, stage), empty_arrivals)
        mbarrier.init(turn(ring, 0), np.uint32(1))
        mbarrier.init(turn(ring, 1), np.uint32(1))
        mbarrier.fence_init()

    @cuda.jit(device=True, forceinline=True)
    def wait_empty(ring: Any, use: Any) -> None:
        """Waits until the stage of a use is free."""
        mbarrier.wait(empty(ring, stage_of(use)), parity_of(use) ^ np.uint32(1))

    @cuda.jit(device=True, forceinline=True)
    def release(ring: Any, use: Any, thread: Any) -> None:
        """By a consumer warpgroup (thread 0 to 127): its products with this stage are done. It tells each CTA."""
        if thread & 31 == 0 and thread >> 5 < ctas:
            barrier = empty(ring, stage_of(use))
            if ctas == 1:
                mbarrier.arrive(barrier)
            else:
                mbarrier.arrive_cluster(cluster.map_shared(barrier, thread >> 5))

    return SimpleNamespace(**{k: v for k, v in locals().items() if hasattr(v, "py_func")})
