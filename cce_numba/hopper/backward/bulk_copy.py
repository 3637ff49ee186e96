"""The copying thread: fetches rows that are neighbours in memory, a panel of 64 rows of 128 bytes at a time.

A stage holds the operands of 64 terms of a job's sums, A and B. These are:

    kind     A, two panels                                B, three panels
    LOGITS   rows of e: 128 tokens x 64 hidden entries    rows of c: 192 columns of a list x 64 hidden entries
    D_E      G: 64 columns of a list x 128 tokens         rows of c: these columns x 192 hidden entries
    D_C      G: 128 columns of a tile x 64 tokens         rows of e: these tokens x 192 hidden entries

The bulk copy engine fetches panels whose rows are neighbours: rows of e of a whole block; G for D_E; and in a dense problem
rows of c, and G for D_C. If both CTAs of a cluster multiply such an A at the same time, each fetches one of its panels for
both. The gathering warps copy all other rows (`gather`).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.jobs import D_E, END, LOGITS, make_job_ring
from cce_numba.hopper.backward.records import WORD
from cce_numba.hopper.backward.tiles import LEAD, PANEL, BackwardTiles
from cce_numba.hopper.ring import make_ring
from cce_numba.hopper.tensor_map import MAP_BYTES
from cce_numba.ptx import mbarrier, memory, tma
from cce_numba.ptx.wgmma import PANEL_BYTES
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP

_A_BYTES, _B_BYTES, _PANEL_BYTES = np.uint32(2 * PANEL_BYTES), np.uint32(3 * PANEL_BYTES), np.uint32(PANEL_BYTES)


@cuda.jit(device=True, forceinline=True)
def has_bit(words: Any, i: Any) -> Any:
    """Whether bit i is set; words: pointer to uint32."""
    return (words[i >> 5] >> np.uint32(i & 31)) & np.uint32(1) != 0


@cuda.jit(device=True, forceinline=True)
def next_block(needed: Any, row: Any, block_words: Any, word: Any, left: Any) -> Any:
    """`(word, left, block)`: the next block for which dC needs a tile, -1 if there is none.

    needed: pointer to the survey's table. row: where the tile's words begin. word, left: what the call before returned, a
    word's number and those of its bits that are still to come; at first -1 and 0.
    """
    while left == 0:
        word = np.int32(word + 1)
        if word >= block_words:
            return word, np.uint32(0), np.int32(-1)
        left = np.uint32(needed[row + word])
    bit = np.int32(cuda.ffs(np.int32(left)) - 1)
    return word, np.uint32(left & (left - np.uint32(1))), np.int32(32 * word + bit)


@functools.cache
def make_copy(tiles: BackwardTiles, has_teacher: bool = False) -> Any:
    """The device function of the copying thread."""
    ring_, jobs_ = make_ring(tiles), make_job_ring(tiles)
    wait_empty, stage_of, full, a_smem, b_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem, ring_.c_smem
    field, wait_job, job_empty, wanted = jobs_.field, jobs_.wait_full, jobs_.empty, jobs_.wanted
    ctas, everyone = tiles.cluster, np.uint32((1 << tiles.cluster) - 1)

    # Below, `barrier` is the shared address of the barrier of a stage, and `x` and `y` are the column and the row of a panel in
    # the matrix of a tensor map, whose address is `tensor_map`.

    @cuda.jit(device=True, forceinline=True)
    def begin(smem: Any, use: Any, left: Any, expected_bytes: Any) -> Any:
        """Waits until the stage of a use is free, and tells its barrier how many bytes will come; returns the stage.

        left: stages of the job that are still to come, this one among them. If `left` is LEAD, it asks for the next job.
        """
        if left == LEAD:
            mbarrier.arrive(wanted(smem.jobs))
        wait_empty(smem.ring, use)
        stage = stage_of(use)
        mbarrier.arrive_expect_tx(full(smem.ring, stage), expected_bytes)
        return stage

    @cuda.jit(device=True, forceinline=True)
    def panels_of_a(
        smem: Any, tensor_map: Any, barrier: Any, x: Any, y: Any, x_step: Any, y_step: Any, shared: Any, rank: Any
    ) -> None:  # fmt: skip
        """Fetches both panels of A; if the cluster's CTAs share A, one of them for both CTAs.

        smem: address of A in shared memory. x_step, y_step: from the first panel to the second.
        """
        if ctas > 1 and shared:
            own, x, y = np.uint32(smem + np.uint32(rank) * _PANEL_BYTES), x + rank * x_step, y + rank * y_step
            tma.load_2d_multicast(own, tensor_map, barrier, np.int32(x), np.int32(y), everyone)
        else:
            tma.load_2d(np.uint32(smem), tensor_map, barrier, np.int32(x), np.int32(y))
            tma.load_2d(np.uint32(smem + _PANEL_BYTES), tensor_map, barrier, np.int32(x + x_step), np.int32(y + y_step))

    @cuda.jit(device=True, forceinline=True)
    def panels_of_b(smem: Any, tensor_map: Any, barrier: Any, x: Any, y: Any, x_step: Any, y_step: Any) -> None:
        """Fetches the three panels of B. smem: address of B in shared memory. x_step, y_step: from a panel to the next."""
        for p in range(3):
            place = np.uint32(smem + np.uint32(p) * _PANEL_BYTES)
            tma.load_2d(place, tensor_map, barrier, np.int32(x + x_step * p), np.int32(y + y_step * p))

    @cuda.jit(device=True, forceinline=True)
    def copy_logits(
        smem: Any, use: Any, k_steps: Any, later: Any, e_map: Any, c_map: Any, is_whole: Any, row: Any, is_dense: Any,
        first_column: Any, shared: Any, rank: Any,
    ) -> Any:  # fmt: skip
        """Fetches k_steps stages of a job LOGITS, from use `use` on, and returns the use after them.

        later: stages of the job that follow these. row: the row of e with which the block begins, if it is whole.
        """
        ring, expected = smem.ring, np.uint32(0)
        if is_whole:
            expected += _A_BYTES
        if is_dense:
            expected += _B_BYTES
        for k in range(k_steps):
            stage = begin(smem, use, later + k_steps - k, expected)
            if is_whole:
                panels_of_a(
                    a_smem(ring, stage), e_map, full(ring, stage), k * K_STEP, row, 0, PANEL, shared, rank
                )  # fmt: skip
            if is_dense:
                panels_of_b(b_smem(ring, stage), c_map, full(ring, stage), k * K_STEP, first_column, 0, PANEL)
            use = np.uint32(use + np.uint32(1))
        return use

    @cuda.jit(device=True, forceinline=True)
    def copy(smem: Any, rank: Any, maps: Any, tables: Any, dims: Any, k_teacher: Any) -> None:
        """By one thread: fetches, for each job of this CTA, what the bulk copy engine can fetch.

        smem: a `SharedMemory`. rank: of this CTA in its cluster. maps: address of the tensor maps of e, c and g, and of the
        teacher's e and c. tables: the survey's. dims: a `Dimensions`. k_teacher: stages of a teacher's product.
        """
        jobs, ring = smem.jobs, smem.ring
        e_map, c_map = maps, maps + MAP_BYTES
        g_map, borrowed_map = maps + np.uint64(2) * MAP_BYTES, maps + np.uint64(3) * MAP_BYTES
        whole, row_of, needed, block_words = tables.whole, tables.row_of, tables.needed, dims.block_words
        tma.fence_tensor_map(e_map)
        tma.fence_tensor_map(c_map)
        tma.fence_tensor_map(g_map)
        tma.fence_tensor_map(borrowed_map)
        teacher_e_map, teacher_c_map = maps + np.uint64(4) * MAP_BYTES, maps + np.uint64(5) * MAP_BYTES
        if has_teacher:
            tma.fence_tensor_map(teacher_e_map)
            tma.fence_tensor_map(teacher_c_map)
        is_dense, n_borrowed = tables.dense[0] != 0, tables.n_borrowed[0]
        s, use = np.uint32(0), np.uint32(0)
        while True:
            wait_job(jobs, s)
            kind = field(jobs, s, WORD.kind)
            if kind == END:
                break
            k_steps, block_or_tile = field(jobs, s, WORD.k_steps), field(jobs, s, WORD.block_or_tile)
            d0, slot, first_column = field(jobs, s, WORD.d0), field(jobs, s, WORD.slot), field(jobs, s, WORD.first_column)
            r, shared = field(jobs, s, WORD.round), field(jobs, s, WORD.shares_a) != 0
            mbarrier.arrive(job_empty(jobs, s))
            round_map = borrowed_map if r < n_borrowed else g_map
            if k_steps < LEAD:
                mbarrier.arrive(wanted(jobs))
            memory.fence_proxy_async_all()  # the engine reads G, which ordinary stores wrote
            if kind == LOGITS:
                is_whole = has_bit(whole, block_or_tile)
                row = row_of[block_or_tile * COLUMN_TILE]
                if has_teacher:
                    k_steps = np.int32(k_steps - k_teacher)
                    use = copy_logits(
                        smem, use, k_teacher, k_steps, teacher_e_map, teacher_c_map, is_whole, row, is_dense, first_column,
                        shared, rank,
                    )  # fmt: skip
                use = copy_logits(
                    smem, use, k_steps, np.int32(0), e_map, c_map, is_whole, row, is_dense, first_column, shared, rank
                )  # fmt: skip
            elif kind == D_E:
                expected = _A_BYTES
                if is_dense:
                    expected += _B_BYTES
                for k in range(k_steps):
                    stage = begin(smem, use, k_steps - k, expected)
                    panels_of_a(
                        a_smem(ring, stage), round_map, full(ring, stage), 0, slot + k * K_STEP, PANEL, 0, shared, rank
                    )  # fmt: skip
                    if is_dense:
                        panels_of_b(b_smem(ring, stage), c_map, full(ring, stage), d0, first_column + k * K_STEP, PANEL, 0)
                    use = np.uint32(use + np.uint32(1))
            elif k_steps > 0:
                slots = np.int64(r) * (dims.blocks + 1)
                left = k_steps
                # In a dense problem a block's list has all columns: counted from its first slot, the tile's begin here.
                offset = np.int32(slot + COLUMN_TILE * (block_or_tile - tables.first_tile[r]))
                row_of_bits = np.int64(block_or_tile) * block_words
                word, bits_left, block = next_block(needed, row_of_bits, block_words, np.int32(-1), np.uint32(0))
                while block >= 0:
                    is_whole = has_bit(whole, block)
                    expected, row, g_row = np.uint32(0), np.int32(0), np.int32(0)
                    if is_whole:
                        expected += _B_BYTES
                        row = row_of[block * COLUMN_TILE]
                    if is_dense:
                        expected += _A_BYTES
                        g_row = np.int32(offset + tables.first_slot[slots + block])
                    for half in range(2):
                        stage = begin(smem, use, left, expected)
                        left = np.int32(left - 1)
                        if is_dense:
                            panels_of_a(
                                a_smem(ring, stage), round_map, full(ring, stage), half * PANEL, g_row, 0, PANEL, shared, rank
                            )  # fmt: skip
                        if is_whole:
                            panels_of_b(b_smem(ring, stage), e_map, full(ring, stage), d0, row + half * PANEL, PANEL, 0)
                        use = np.uint32(use + np.uint32(1))
                    word, bits_left, block = next_block(needed, row_of_bits, block_words, word, bits_left)
            s = np.uint32(s + np.uint32(1))

    return copy
