"""Operands on their way to shared memory, a panel of 64 rows of 128 bytes at a time.

    job      A, 2 panels                              B, 3 panels
    LOGITS   rows of e: 128 tokens x 64 hidden        rows of c: 192 columns of the list x 64 hidden
    D_E      G: 64 columns of the list x 128 tokens   rows of c: those columns x 192 hidden
    D_C      G: 128 columns of a tile x 64 tokens     rows of e: those tokens x 192 hidden

Panels of consecutive rows are fetched by the bulk copy engine: rows of e of a block in which every token counts, G for D_E, and
if nothing is filtered (dense) rows of c, and G for D_C. Where both CTAs of a pair multiply such an A, each fetches one of its
panels for both. Other rows are copied one by one, see `gather`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.jobs import (
    D0,
    D_E,
    END,
    FIRST,
    K_STEPS,
    KIND,
    LOGITS,
    PLACE,
    ROUND,
    SHARED,
    SLOT,
    make_job_ring,
)
from cce_numba.hopper.backward.tiles import LEAD, PANEL, BackwardTiles
from cce_numba.hopper.ring import make_ring
from cce_numba.ptx import mbarrier, memory, tma
from cce_numba.ptx.wgmma import PANEL_BYTES
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP

_A_BYTES, _B_BYTES, _PANEL_BYTES = np.uint32(2 * PANEL_BYTES), np.uint32(3 * PANEL_BYTES), np.uint32(PANEL_BYTES)


@cuda.jit(device=True, forceinline=True)
def has_bit(words: Any, i: Any) -> Any:
    """Bit i of a row of 32-bit words."""
    return (words[i >> 5] >> np.uint32(i & 31)) & np.uint32(1) != 0


@cuda.jit(device=True, forceinline=True)
def next_block(live: Any, row: Any, block_words: Any, word: Any, left: Any) -> Any:
    """`(word, left, block)`: the next block in a row of bits, -1 if there is none; `left` of a word are still to come."""
    while left == 0:
        word = np.int32(word + 1)
        if word >= block_words:
            return word, np.uint32(0), np.int32(-1)
        left = np.uint32(live[row + word])
    bit = np.int32(cuda.ffs(np.int32(left)) - 1)
    return word, np.uint32(left & (left - np.uint32(1))), np.int32(32 * word + bit)


@functools.cache
def make_copy(tiles: BackwardTiles) -> Any:
    """The device function of the thread that uses the bulk copy engine."""
    ring_, jobs_ = make_ring(tiles), make_job_ring(tiles)
    wait_empty, stage_of, full, a_smem, b_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem, ring_.c_smem
    field, wait_job, job_empty, hungry = jobs_.field, jobs_.wait_full, jobs_.empty, jobs_.hungry
    ctas, everyone = tiles.cluster, np.uint32((1 << tiles.cluster) - 1)

    @cuda.jit(device=True, forceinline=True)
    def begin(jobs: Any, ring: Any, use: Any, left: Any, expected: Any) -> Any:
        """Waits for the stage, and tells its barrier how many bytes will come. `left`: stages of the job, with this one."""
        if left == LEAD:
            mbarrier.arrive(hungry(jobs))
        wait_empty(ring, use)
        stage = stage_of(use)
        mbarrier.arrive_expect_tx(full(ring, stage), expected)
        return stage

    @cuda.jit(device=True, forceinline=True)
    def panels_of_a(
        smem: Any, tensor_map: Any, barrier: Any, x: Any, y: Any, x_step: Any, y_step: Any, shared: Any, rank: Any
    ) -> None:  # fmt: skip
        """Both, x_step and y_step apart; of what a pair shares, each fetches one for both."""
        if ctas > 1 and shared:
            own, x, y = np.uint32(smem + np.uint32(rank) * _PANEL_BYTES), x + rank * x_step, y + rank * y_step
            tma.load_2d_multicast(own, tensor_map, barrier, np.int32(x), np.int32(y), everyone)
        else:
            tma.load_2d(np.uint32(smem), tensor_map, barrier, np.int32(x), np.int32(y))
            tma.load_2d(np.uint32(smem + _PANEL_BYTES), tensor_map, barrier, np.int32(x + x_step), np.int32(y + y_step))

    @cuda.jit(device=True, forceinline=True)
    def rows_down(smem: Any, panels: Any, tensor_map: Any, barrier: Any, x: Any, y: Any) -> None:
        """Panels below each other."""
        for p in range(panels):
            tma.load_2d(
                np.uint32(smem + np.uint32(p) * _PANEL_BYTES), tensor_map, barrier, np.int32(x), np.int32(y + PANEL * p)
            )

    @cuda.jit(device=True, forceinline=True)
    def rows_across(smem: Any, panels: Any, tensor_map: Any, barrier: Any, x: Any, y: Any) -> None:
        """Panels beside each other."""
        for p in range(panels):
            tma.load_2d(
                np.uint32(smem + np.uint32(p) * _PANEL_BYTES), tensor_map, barrier, np.int32(x + PANEL * p), np.int32(y)
            )

    @cuda.jit(device=True, forceinline=True)
    def copy(
        jobs: Any, ring: Any, rank: Any, e_map: Any, c_map: Any, g_map: Any, row_of: Any, whole: Any, live: Any,
        block_words: Any, slot0: Any, first_tile: Any, blocks: Any, dense: Any,
    ) -> None:  # fmt: skip
        tma.fence_tensor_map(e_map)
        tma.fence_tensor_map(c_map)
        tma.fence_tensor_map(g_map)
        is_dense = dense[0] != 0
        s, use = np.uint32(0), np.uint32(0)
        while True:
            wait_job(jobs, s)
            kind = field(jobs, s, KIND)
            if kind == END:
                break
            k_steps, place, d0 = field(jobs, s, K_STEPS), field(jobs, s, PLACE), field(jobs, s, D0)
            slot, first, r = field(jobs, s, SLOT), field(jobs, s, FIRST), field(jobs, s, ROUND)
            shared = field(jobs, s, SHARED) != 0
            mbarrier.arrive(job_empty(jobs, s))
            if k_steps < LEAD:
                mbarrier.arrive(hungry(jobs))
            memory.fence_proxy_async_all()  # G was written by ordinary stores
            if kind == LOGITS:
                is_whole = has_bit(whole, place)
                row = row_of[place * COLUMN_TILE]
                expected = np.uint32(0)
                if is_whole:
                    expected += _A_BYTES
                if is_dense:
                    expected += _B_BYTES
                for k in range(k_steps):
                    stage = begin(jobs, ring, use, k_steps - k, expected)
                    if is_whole:
                        panels_of_a(
                            a_smem(ring, stage), e_map, full(ring, stage), k * K_STEP, row, 0, PANEL, shared, rank
                        )  # fmt: skip
                    if is_dense:
                        rows_down(b_smem(ring, stage), 3, c_map, full(ring, stage), k * K_STEP, first)
                    use = np.uint32(use + np.uint32(1))
            elif kind == D_E:
                expected = _A_BYTES
                if is_dense:
                    expected += _B_BYTES
                for k in range(k_steps):
                    stage = begin(jobs, ring, use, k_steps - k, expected)
                    panels_of_a(
                        a_smem(ring, stage), g_map, full(ring, stage), 0, slot + k * K_STEP, PANEL, 0, shared, rank
                    )  # fmt: skip
                    if is_dense:
                        rows_across(b_smem(ring, stage), 3, c_map, full(ring, stage), d0, first + k * K_STEP)
                    use = np.uint32(use + np.uint32(1))
            elif k_steps > 0:
                slots = np.int64(r) * (blocks + 1)
                left = k_steps
                offset = np.int32(slot + COLUMN_TILE * (place - first_tile[r]))  # of the tile in each block's part
                live_row = np.int64(place) * block_words
                word, blocks_left, block = next_block(live, live_row, block_words, np.int32(-1), np.uint32(0))
                while block >= 0:
                    is_whole = has_bit(whole, block)
                    expected, row, g_row = np.uint32(0), np.int32(0), np.int32(0)
                    if is_whole:
                        expected += _B_BYTES
                        row = row_of[block * COLUMN_TILE]
                    if is_dense:
                        expected += _A_BYTES
                        g_row = np.int32(offset + slot0[slots + block])
                    for half in range(2):
                        stage = begin(jobs, ring, use, left, expected)
                        left = np.int32(left - 1)
                        if is_dense:
                            panels_of_a(
                                a_smem(ring, stage), g_map, full(ring, stage), half * PANEL, g_row, 0, PANEL, shared, rank
                            )  # fmt: skip
                        if is_whole:
                            rows_across(b_smem(ring, stage), 3, e_map, full(ring, stage), d0, row + half * PANEL)
                        use = np.uint32(use + np.uint32(1))
                    word, blocks_left, block = next_block(live, live_row, block_words, word, blocks_left)
            s = np.uint32(s + np.uint32(1))

    return copy
