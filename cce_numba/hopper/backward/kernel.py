"""The kernel of the backward: persistent CTAs, which take jobs until none is left (`jobs`).

    producer warpgroup      warp 0: one thread fetches rows that are neighbours, with the bulk copy engine (`bulk_copy`)
                            warp 1: takes jobs off the queue and describes them (`scheduler`)
                            warps 2 and 3: copy rows that are not neighbours (`gather`)
    consumer warpgroups     two, each with a tile of 128 x 192 sums in registers. One multiplies while the other stores its
                            tile (`consumer`)

The CTAs of a cluster of two take neighbouring jobs, and fetch together what both multiply.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.bulk_copy import make_copy
from cce_numba.hopper.backward.consumer import make_consume
from cce_numba.hopper.backward.gather import make_gather
from cce_numba.hopper.backward.jobs import make_job_ring
from cce_numba.hopper.backward.records import Dimensions, Outputs, Shape, SharedMemory, Workspace
from cce_numba.hopper.backward.scheduler import make_schedule
from cce_numba.hopper.backward.tiles import STAGING_BYTES, BackwardTiles
from cce_numba.hopper.ring import make_ring
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx import cluster, control, memory
from cce_numba.tensor_core.backward.form import GradientForm
from cce_numba.tensor_core.records import (
    I32,
    U64,
    Chance,
    Distillation,
    LogitTerms,
    Matrix,
    NoTargets,
    PlacedTargets,
)
from cce_numba.tensor_core.schedule import quotient
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP, Tables


@cuda.jit(device=True, forceinline=True)
def dims_of(shape: Any) -> Any:
    """The `Dimensions` of a `Shape`."""
    column_tiles = quotient(shape.V + COLUMN_TILE - 1, np.int32(COLUMN_TILE))
    block_words = quotient(shape.blocks + 31, np.int32(32))
    return Dimensions(blocks=shape.blocks, block_words=block_words, column_tiles=column_tiles, D=shape.D)


@kernel_factory
def make_backward_kernel(tiles: BackwardTiles, dtype: np.dtype, form: GradientForm, keeps: bool = False) -> Kernel:
    """The kernel for 16-bit `dtype`, which looks at no option that it was not made for.

    Args:
        tiles: the tile sizes.
        dtype: of e and c.
        form: of G's entries.
        keeps: the forward may have kept logits (`tensor_core.kept`); chance decides nothing then.
    """
    has_teacher = form.teacher is not None
    copy, gather = make_copy(tiles, has_teacher), make_gather(tiles, has_teacher)
    schedule = make_schedule(tiles, dtype, keeps)
    consume = make_consume(tiles, dtype, form, keeps)
    staging_bytes = np.uint32(tiles.consumers * STAGING_BYTES)
    init_ring, init_jobs, ring_bytes = make_ring(tiles).init, make_job_ring(tiles).init, np.uint32(tiles.ring_bytes)
    jobs_bytes = np.uint32(tiles.jobs_bytes)
    lower_registers = control.lower_registers(tiles.producer_registers)
    raise_registers = control.raise_registers(tiles.consumer_registers)
    block_n, first_gatherer = tiles.block_n, 128 - 32 * tiles.gatherers

    def backward_kernel(
        maps: Any,  # address of the tensor maps of e, c and g, and of the teacher's e and c, 128 bytes each
        e: Any,  # Matrix (N, D)
        c: Any,  # Matrix (V, D)
        terms: Any,  # LogitTerms
        chance: Any,  # Chance
        n_valid: Any,  # pointer to (1,): how many tokens are listed
        tables: Any,  # the survey's Tables
        runs: Any,  # RUNS_ALWAYS, RUNS_IF_FILTERED or RUNS_IF_DENSE: for which surveys it does anything
        workspace: Any,  # Workspace, whose counters are zeros
        outputs: Any,  # Outputs
        shape: Any,  # Shape
        instead: Any,  # of one target a token: PlacedTargets or Distillation; or NoTargets
    ) -> None:
        """Any grid of clusters: writes or adds to the outputs; of dE, the rows of listed tokens with weight."""
        staging = (memory.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00)
        ring = np.uint32(staging + staging_bytes)
        jobs = np.uint32(ring + ring_bytes)
        smem = SharedMemory(staging=staging, ring=ring, jobs=jobs, scales=np.uint32(jobs + jobs_bytes))
        thread = np.int32(cuda.threadIdx.x)
        warpgroup, rank = thread >> 7, np.int32(cluster.cta_rank())
        dims, k_teacher = dims_of(shape), np.int32(0)
        if has_teacher:
            k_teacher = quotient(instead.teacher.D + K_STEP - 1, np.int32(K_STEP))
        if thread == 0:
            init_ring(ring)
            init_jobs(jobs)
        cluster.sync()
        if warpgroup == 0:
            lower_registers()
            if thread == 0:
                copy(smem, rank, maps, tables, dims, k_teacher)
            elif thread >= 32 and thread < 64:
                n_blocks = np.int32((n_valid[0] + block_n - 1) // block_n)
                schedule(
                    jobs, np.int32(thread & 31), rank, terms, n_blocks, tables, runs, workspace, outputs, dims, k_teacher
                )  # fmt: skip
            elif thread >= first_gatherer:
                thread = np.int32(thread - first_gatherer)
                gather(smem, thread, e, c, tables, workspace, dims, instead, k_teacher)
        else:
            raise_registers()
            number, thread = np.int32(warpgroup - 1), np.int32(thread & 127)
            consume(smem, number, thread, terms, chance, tables, workspace, outputs, dims, instead, k_teacher)
        cuda.syncwarp()
        cluster.sync()  # nobody leaves while the other still writes to its shared memory

    targets = Distillation if has_teacher else PlacedTargets if form.several else NoTargets
    return Kernel(
        backward_kernel,
        (U64, Matrix, Matrix, LogitTerms, Chance, pointer_to(np.int64), Tables, I32, Workspace, Outputs, Shape, targets),
        threads=tiles.threads,
        cluster=tiles.cluster,
        smem_bytes=tiles.smem_bytes,
    )
