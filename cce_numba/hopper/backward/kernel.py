"""The kernel of the backward: persistent CTAs that take jobs until none is left (see `jobs`).

The CTAs of a pair, a cluster of two, take neighbouring jobs, and fetch together what both multiply.

producer warpgroup      warp 0: one thread fetches tiles with the bulk copy engine
                        warp 1: takes jobs off the queue and describes them
                        warps 2, 3: copy rows that are not neighbours
consumer warpgroups     two, each with a 128 x 192 tile of sums in registers. They take turns: one multiplies while the
                        other stores its tile
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.hopper.backward.gather import make_gather
from cce_numba.hopper.backward.jobs import make_job_ring, make_schedule
from cce_numba.hopper.backward.load import make_copy
from cce_numba.hopper.backward.multiply import make_work
from cce_numba.hopper.backward.tiles import STAGING_BYTES, BackwardTiles
from cce_numba.hopper.ring import make_ring
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx import cluster, control, memory
from cce_numba.tensor_core.schedule import quotient
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP


@kernel_factory
def make_backward_kernel(
    tiles: BackwardTiles, dtype: np.dtype, capped: bool, with_sums: bool, scaled: bool = False, smoothed: bool = False
) -> Kernel:
    """The kernel for 16-bit `dtype`; with_sums: G's columns are summed, for the gradient of the bias.

    scaled: with a logit scale for each token. smoothed: G is less by a uniform weight of each token times class weights.
    """
    copy, gather, schedule = make_copy(tiles), make_gather(tiles), make_schedule(tiles, dtype)
    work = make_work(tiles, dtype, capped, with_sums, scaled, smoothed)
    staging_bytes = np.uint32(tiles.consumers * STAGING_BYTES)
    init_ring, init_jobs, ring_bytes = make_ring(tiles).init, make_job_ring(tiles).init, np.uint32(tiles.ring_bytes)
    lower_registers = control.lower_registers(tiles.producer_registers)
    raise_registers = control.raise_registers(tiles.consumer_registers)
    block_n, first_gatherer = tiles.block_n, 128 - 32 * tiles.gatherers

    def backward_kernel(
        maps: Any,  # tensor maps of e, c and g, 128 bytes each
        e: Any,  # address
        e_pitch_bytes: Any,
        c: Any,  # address
        c_pitch_bytes: Any,
        bias: Any,  # address of (V,)
        bias_bytes: Any,  # of a number of it: 4, 2, or 0 if there is none
        softcap: Any,
        n_valid: Any,  # (1,)
        # The survey's tables.
        rows: Any,  # address
        row_of: Any,
        whole: Any,
        scale: Any,
        order: Any,
        dense: Any,
        bits: Any,
        live: Any,
        before: Any,
        n_live_tiles: Any,
        n_rounds: Any,
        first_tile: Any,
        slot0: Any,
        first_g: Any,
        phase_end: Any,
        bits_at: Any,  # addresses of tables above
        before_at: Any,
        slot0_at: Any,
        # The workspace.
        next_job: Any,  # address of a counter, zeroed
        done: Any,  # address of counters for each phase, zeroed
        lists: Any,  # address of (buffers * buffer_slots,)
        g: Any,  # address of (buffers * buffer_slots, 128) of dtype
        sums: Any,  # address of (buffers * buffer_slots, PARTS)
        buffers: Any,
        buffer_slots: Any,
        # The gradients.
        d_e: Any,  # address
        d_e_pitch_bytes: Any,
        e_in_float32: Any,
        sums_e: Any,  # address of its sums that are not complete, in float32, a tile after the other
        d_c: Any,  # address
        d_c_pitch_bytes: Any,
        c_in_float32: Any,
        d_bias: Any,  # (V,)
        d_tiles_c: Any,  # tiles of a row of dC, 0 if it is not wanted
        d_tiles_e: Any,
        accumulate: Any,
        blocks: Any,
        V: Any,
        D: Any,
        logit_scale: Any,  # (address of (N,) by row of e,), or () if not scaled
        smoothing: Any,  # (address of (N,) uniform weights, of (V,) class weights or 0), or () if not smoothed
    ) -> None:
        """Any grid of clusters. Writes or adds to d_c, and to d_e's rows of listed tokens with weight; writes d_bias."""
        staging = (memory.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00)
        ring = np.uint32(staging + staging_bytes)
        jobs = np.uint32(ring + ring_bytes)
        thread = np.int32(cuda.threadIdx.x)
        warpgroup, rank = thread >> 7, np.int32(cluster.cta_rank())
        n_ctiles, block_words = quotient(V + COLUMN_TILE - 1, np.int32(COLUMN_TILE)), quotient(blocks + 31, np.int32(32))
        if thread == 0:
            init_ring(ring)
            init_jobs(jobs)
        cluster.sync()
        if warpgroup == 0:
            lower_registers()
            if thread == 0:
                c_map, g_map = maps + np.uint64(128), maps + np.uint64(256)
                copy(jobs, ring, rank, maps, c_map, g_map, row_of, whole, live, block_words, slot0, first_tile, blocks, dense)
            elif thread >= 32 and thread < 64:
                tables = n_rounds, first_tile, first_g, slot0, phase_end, before, bits, live, order, dense, n_live_tiles
                n_blocks = np.int32((n_valid[0] + block_n - 1) // block_n)
                schedule(
                    jobs, np.int32(thread & 31), rank, next_job, done, tables, n_blocks, blocks, n_ctiles, block_words,
                    d_tiles_c > 0 and not accumulate, d_tiles_c, d_tiles_e, quotient(D + K_STEP - 1, np.int32(K_STEP)),
                    buffers, buffer_slots, lists, bias, bias_bytes,
                )  # fmt: skip
            elif thread >= first_gatherer:
                gather(
                    jobs, ring, np.int32(thread - first_gatherer), e, e_pitch_bytes, c, c_pitch_bytes, g, lists, row_of, whole,
                    live, bits_at, before_at, slot0_at, n_ctiles, block_words, first_tile, blocks, dense, D,
                )  # fmt: skip
        else:
            raise_registers()
            work(
                jobs, ring, staging, np.int32(warpgroup - 1), np.int32(thread & 127), rows, row_of, order, scale, softcap,
                g, sums, d_e, d_e_pitch_bytes, e_in_float32, sums_e, d_tiles_e, d_c, d_c_pitch_bytes, c_in_float32, d_bias,
                accumulate, done, live, bits, before, slot0, first_tile, n_ctiles, block_words, blocks, D, logit_scale,
                smoothing,
            )  # fmt: skip
        cuda.syncwarp()
        cluster.sync()  # nobody leaves while the other still writes to its shared memory

    f32, i32, i64, u64 = types.float32, types.int32, types.int64, types.uint64
    p_i32, p_u32, p_f32 = pointer_to(np.int32), pointer_to(np.uint32), pointer_to(np.float32)
    signature = types.void(
        *(u64, u64, i64, u64, i64, u64, i32, f32, pointer_to(np.int64)),
        *(u64, p_i32, p_u32, p_f32, p_i32, p_i32, p_u32, p_u32, p_i32, p_i32, p_i32, p_i32, p_i32, p_i32, p_i32),
        *(u64, u64, u64),
        *(u64, u64, u64, u64, u64, i32, i32),
        *(u64, i64, i32, u64, u64, i64, i32, p_f32, i32, i32, i32, i32, i32, i32),
        *(types.UniTuple(u64, int(scaled)), types.UniTuple(u64, 2 * smoothed)),
    )
    return Kernel(backward_kernel, signature, threads=tiles.threads, cluster=tiles.cluster, smem_bytes=tiles.smem_bytes)
