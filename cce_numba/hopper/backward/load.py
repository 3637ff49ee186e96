"""Operands on their way to shared memory, a panel of 64 rows of 128 bytes at a time.

    job      A, 2 panels                              B, 3 panels
    LOGITS   rows of e: 128 tokens x 64 hidden        rows of c: 192 columns of the list x 64 hidden
    D_E      G: 64 columns of the list x 128 tokens   rows of c: those columns x 192 hidden
    D_C      G: 128 columns of a tile x 64 tokens     rows of e: those tokens x 192 hidden

Panels of consecutive rows are fetched by the bulk copy engine: rows of e of a block in which every token counts, G for D_E, and
if nothing is filtered (dense) rows of c, and G for D_C. Other rows are copied one by one by two warps, 16 bytes a lane; rows of
nobody become zeros.
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
    SLOT,
    make_job_ring,
)
from cce_numba.hopper.backward.tiles import COLUMN_TILE, K_STEP, LEAD, PANEL, BackwardTiles
from cce_numba.hopper.ring import make_ring
from cce_numba.ptx import arithmetic, mbarrier, memory, tma
from cce_numba.ptx.wgmma import PANEL_BYTES

_A_BYTES, _B_BYTES, _PANEL_BYTES = np.uint32(2 * PANEL_BYTES), np.uint32(3 * PANEL_BYTES), np.uint32(PANEL_BYTES)
_ROW_BYTES = 2 * PANEL
G_ROW_BYTES = 2 * COLUMN_TILE  # a column of G: 128 tokens


@cuda.jit(device=True, forceinline=True)
def has_bit(words: Any, i: Any) -> Any:
    """Bit i of a row of 32-bit words."""
    return (words[i >> 5] >> np.uint32(i & 31)) & np.uint32(1) != 0


@functools.cache
def make_copy(tiles: BackwardTiles) -> Any:
    """The device function of the thread that uses the bulk copy engine."""
    ring_, jobs_ = make_ring(tiles), make_job_ring(tiles)
    wait_empty, stage_of, full, a_smem, b_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem, ring_.c_smem
    field, wait_job, job_empty, hungry = jobs_.field, jobs_.wait_full, jobs_.empty, jobs_.hungry

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
        jobs: Any, ring: Any, e_map: Any, c_map: Any, g_map: Any, row_of: Any, whole: Any, live: Any, block_words: Any,
        slot0: Any, first_tile: Any, blocks: Any, dense: Any,
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
                        rows_down(a_smem(ring, stage), 2, e_map, full(ring, stage), k * K_STEP, row)
                    if is_dense:
                        rows_down(b_smem(ring, stage), 3, c_map, full(ring, stage), k * K_STEP, first)
                    use = np.uint32(use + np.uint32(1))
            elif kind == D_E:
                expected = _A_BYTES
                if is_dense:
                    expected += _B_BYTES
                for k in range(k_steps):
                    stage = begin(jobs, ring, use, k_steps - k, expected)
                    rows_across(a_smem(ring, stage), 2, g_map, full(ring, stage), 0, slot + k * K_STEP)
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
                            rows_down(a_smem(ring, stage), 2, g_map, full(ring, stage), half * PANEL, g_row)
                        if is_whole:
                            rows_across(b_smem(ring, stage), 3, e_map, full(ring, stage), d0, row + half * PANEL)
                        use = np.uint32(use + np.uint32(1))
                    word, blocks_left, block = next_block(live, live_row, block_words, word, blocks_left)
            s = np.uint32(s + np.uint32(1))

    return copy


@functools.cache
def make_gather(tiles: BackwardTiles) -> Any:
    """The device function of the warps that copy rows one by one, and swizzle them by hand.

    Eight threads share a row, 16 bytes each; so a thread's rows are 8 apart, and it copies eight of them at a time.
    """
    ring_, jobs_ = make_ring(tiles), make_job_ring(tiles)
    wait_empty, stage_of, full, a_smem, b_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem, ring_.c_smem
    field, wait_job, job_empty, columns_smem = jobs_.field, jobs_.wait_full, jobs_.empty, jobs_.columns_smem
    load_id, opaque, load_if = memory.load_shared_i32_freely, arithmetic.opaque_u32, memory.load_if_u32

    @cuda.jit(device=True, forceinline=True)
    def copy_row(smem: Any, id: Any, source: Any, pitch_bytes: Any, present: Any) -> None:
        """16 bytes of a row, or zeros if they are not `present`. smem and source are those of this thread's part of a row."""
        # One instruction, as factors of 32 bits.
        offset = np.uint64(np.uint32(id)) * np.uint64(np.uint32(pitch_bytes))
        memory.copy_async_16_or_zeros(np.uint32(smem), np.uint64(source + offset), np.uint32(present))

    @cuda.jit(device=True, forceinline=True)
    def copy_row_or_zeros(smem: Any, id: Any, source: Any, pitch_bytes: Any, present: Any) -> None:
        """The same; zeros for row -1, which is nobody's."""
        here = np.uint32(present) if id >= 0 else np.uint32(0)
        copy_row(smem, np.uint32(max(np.int32(id), np.int32(0))), source, pitch_bytes, here)

    def make_copy_rows(copy_one: Any) -> Any:
        """Eight rows to a panel."""

        @cuda.jit(device=True, forceinline=True)
        def copy_eight(smem: Any, ids: Any, source: Any, pitch_bytes: Any, present: Any) -> None:
            step = np.uint32(8 * _ROW_BYTES)
            copy_one(smem, ids[0], source, pitch_bytes, present)
            copy_one(smem + step, ids[1], source, pitch_bytes, present)
            copy_one(smem + np.uint32(2) * step, ids[2], source, pitch_bytes, present)
            copy_one(smem + np.uint32(3) * step, ids[3], source, pitch_bytes, present)
            copy_one(smem + np.uint32(4) * step, ids[4], source, pitch_bytes, present)
            copy_one(smem + np.uint32(5) * step, ids[5], source, pitch_bytes, present)
            copy_one(smem + np.uint32(6) * step, ids[6], source, pitch_bytes, present)
            copy_one(smem + np.uint32(7) * step, ids[7], source, pitch_bytes, present)

        return copy_eight

    copy_rows, copy_rows_or_zeros = make_copy_rows(copy_row), make_copy_rows(copy_row_or_zeros)

    @cuda.jit(device=True, forceinline=True)
    def ids_in_smem(address: Any) -> Any:
        """Eight of a list, 8 apart; past its end any row will do, since what comes of it is not looked at."""
        step = np.uint32(32)
        return (
            max(load_id(address), 0),
            max(load_id(address + step), 0),
            max(load_id(address + np.uint32(2) * step), 0),
            max(load_id(address + np.uint32(3) * step), 0),
            max(load_id(address + np.uint32(4) * step), 0),
            max(load_id(address + np.uint32(5) * step), 0),
            max(load_id(address + np.uint32(6) * step), 0),
            max(load_id(address + np.uint32(7) * step), 0),
        )

    @cuda.jit(device=True, forceinline=True)
    def ids_in_list(address: Any, wanted: Any) -> Any:
        """Eight of a list that other CTAs have written, 8 apart, if they are wanted."""
        step = np.uint64(32)
        return (
            np.int32(load_if(address, wanted)),
            np.int32(load_if(address + step, wanted)),
            np.int32(load_if(address + np.uint64(2) * step, wanted)),
            np.int32(load_if(address + np.uint64(3) * step, wanted)),
            np.int32(load_if(address + np.uint64(4) * step, wanted)),
            np.int32(load_if(address + np.uint64(5) * step, wanted)),
            np.int32(load_if(address + np.uint64(6) * step, wanted)),
            np.int32(load_if(address + np.uint64(7) * step, wanted)),
        )

    @cuda.jit(device=True, forceinline=True)
    def ids_in_table(table: Any, first: Any) -> Any:
        """Eight of a table that is older than this kernel, 8 apart."""
        return (
            table[first], table[first + 8], table[first + 16], table[first + 24],
            table[first + 32], table[first + 40], table[first + 48], table[first + 56],
        )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def slot_in(word: Any, bit: Any, base: Any) -> Any:
        """The slot of a column, if its bit is set in the word whose columns' slots begin at `base`."""
        before = np.int32(base + cuda.popc(np.uint32(word & np.uint32((np.uint32(1) << bit) - np.uint32(1)))))
        return before if (word >> bit) & np.uint32(1) != 0 else np.int32(-1)

    @cuda.jit(device=True, forceinline=True)
    def slots_in(word: Any, next_word: Any, base: Any, row: Any) -> Any:
        """Eight columns' slots, 8 apart, out of two words of bits."""
        eight, next_base = np.uint32(8), np.int32(base + cuda.popc(word))
        return (
            slot_in(word, row, base),
            slot_in(word, row + eight, base),
            slot_in(word, row + np.uint32(16), base),
            slot_in(word, row + np.uint32(24), base),
            slot_in(next_word, row, next_base),
            slot_in(next_word, row + eight, next_base),
            slot_in(next_word, row + np.uint32(16), next_base),
            slot_in(next_word, row + np.uint32(24), next_base),
        )

    def make_copy_across(copy_eight: Any) -> Any:
        """Eight rows of each of three panels beside each other; row_bytes are left in a row from source on."""

        @cuda.jit(device=True, forceinline=True)
        def copy_across(smem: Any, ids: Any, source: Any, pitch_bytes: Any, row_bytes: Any) -> None:
            copy_eight(smem, ids, source, pitch_bytes, is_some(row_bytes))
            smem, source = np.uint32(smem + _PANEL_BYTES), np.uint64(source + np.uint64(_ROW_BYTES))
            copy_eight(smem, ids, source, pitch_bytes, is_some(row_bytes - _ROW_BYTES))
            smem, source = np.uint32(smem + _PANEL_BYTES), np.uint64(source + np.uint64(_ROW_BYTES))
            copy_eight(smem, ids, source, pitch_bytes, is_some(row_bytes - 2 * _ROW_BYTES))

        return copy_across

    @cuda.jit(device=True, forceinline=True)
    def survivors_of(
        bits: Any, before: Any, slot0: Any, slots: Any, block: Any, tile: Any, first: Any, n_ctiles: Any
    ) -> Any:  # fmt: skip
        """A block's survivors of a tile of columns: three numbers that tell their first slot, and four words of bits."""
        counts, at = np.int64(block) * (n_ctiles + 1), np.int64(block) * (4 * n_ctiles) + 4 * tile
        return (
            slot0[slots + block], before[counts + tile], before[counts + first],
            bits[at], bits[at + 1], bits[at + 2], bits[at + 3],
        )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def pass_by(ring: Any, use: Any, stages: Any, lane: Any) -> Any:
        """Arrives, for its warp, in stages in which nothing is gathered; the next use.

        It must not be left out: a thread that does not keep up with the ring takes one of its phases for another.
        """
        if lane == 0:
            for i in range(stages):
                wait_empty(ring, use + np.uint32(i))
                mbarrier.arrive_many(full(ring, stage_of(use + np.uint32(i))), np.uint32(32))
        cuda.syncwarp()
        return np.uint32(use + np.uint32(stages))

    @cuda.jit(device=True, forceinline=True)
    def is_some(left_bytes: Any) -> Any:
        """Whether a row has anything left; if so, it is 16 bytes at least."""
        return np.uint32(1) if left_bytes > 0 else np.uint32(0)

    copy_across, copy_across_or_zeros = make_copy_across(copy_rows), make_copy_across(copy_rows_or_zeros)

    @cuda.jit(device=True, forceinline=True)
    def gather(
        jobs: Any, ring: Any, thread: Any, e: Any, e_pitch_bytes: Any, c: Any, c_pitch_bytes: Any, g: Any, lists: Any,
        row_of: Any, whole: Any, live: Any, bits: Any, before: Any, n_ctiles: Any, block_words: Any, slot0: Any,
        first_tile: Any, blocks: Any, dense: Any, D: Any,
    ) -> None:  # fmt: skip
        is_dense, lane = dense[0] != 0, np.int32(thread & 31)
        part, row = np.uint32(thread & 7), np.uint32(thread >> 3)
        e += np.uint64(16 * part)
        c += np.uint64(16 * part)
        g += np.uint64(16 * part)
        row_bytes = np.int32(16 * ((D + 7) // 8 - part))
        # Rows that are 8 apart have the same place in the swizzle.
        mine = np.uint32(np.uint32(_ROW_BYTES) * row + ((part ^ row) << np.uint32(4)))
        s, use = np.uint32(0), np.uint32(0)
        while True:
            wait_job(jobs, s)
            kind = field(jobs, s, KIND)
            if kind == END:
                break
            k_steps, place, d0 = field(jobs, s, K_STEPS), field(jobs, s, PLACE), field(jobs, s, D0)
            slot = field(jobs, s, SLOT)
            if kind == LOGITS:
                is_whole = has_bit(whole, place)
                if is_dense and is_whole:
                    use = pass_by(ring, use, k_steps, lane)
                else:
                    ids = np.uint32(columns_smem(jobs, s) + np.uint32(4) * row)
                    token = np.int32(place * COLUMN_TILE + row)
                    for k in range(k_steps):
                        offset, present = np.uint64(_ROW_BYTES * k), is_some(row_bytes - _ROW_BYTES * k)
                        wait_empty(ring, use)
                        if not is_whole:
                            smem = np.uint32(a_smem(ring, stage_of(use)) + mine)
                            copy_rows_or_zeros(smem, ids_in_table(row_of, token), e + offset, e_pitch_bytes, present)
                            smem = np.uint32(smem + _PANEL_BYTES)
                            copy_rows_or_zeros(smem, ids_in_table(row_of, token + PANEL), e + offset, e_pitch_bytes, present)
                        if not is_dense:
                            smem = np.uint32(b_smem(ring, stage_of(use)) + mine)
                            # Read again in each step: there are no registers to keep them in.
                            list_smem = opaque(ids)
                            for p in range(3):
                                panel_ids = ids_in_smem(np.uint32(list_smem + np.uint32(4 * PANEL * p)))
                                copy_rows(smem, panel_ids, c + offset, c_pitch_bytes, present)
                                smem = np.uint32(smem + _PANEL_BYTES)
                        memory.copy_async_arrive(full(ring, stage_of(use)))
                        use = np.uint32(use + np.uint32(1))
            elif kind == D_E:
                if is_dense:
                    use = pass_by(ring, use, k_steps, lane)
                else:
                    listed = lists + np.uint64(4 * (np.int64(slot) + row))
                    source = c + np.uint64(2 * d0)
                    following = ids_in_list(listed, np.uint32(1) if k_steps > 0 else np.uint32(0))
                    for k in range(k_steps):
                        ids = following
                        listed += np.uint64(4 * K_STEP)
                        following = ids_in_list(listed, np.uint32(1) if k + 1 < k_steps else np.uint32(0))
                        wait_empty(ring, use)
                        smem = np.uint32(b_smem(ring, stage_of(use)) + mine)
                        copy_across(smem, ids, source, c_pitch_bytes, row_bytes - 2 * d0)
                        memory.copy_async_arrive(full(ring, stage_of(use)))
                        use = np.uint32(use + np.uint32(1))
            elif k_steps > 0:
                r = field(jobs, s, ROUND)
                live_row, slots, first = np.int64(place) * block_words, np.int64(r) * (blocks + 1), first_tile[r]
                word, left, block = next_block(live, live_row, block_words, np.int32(-1), np.uint32(0))
                wholes = whole[word]
                found = survivors_of(bits, before, slot0, slots, block, place, first, n_ctiles)
                while block >= 0:
                    token, is_whole = np.int32(block * COLUMN_TILE + row), (wholes >> np.uint32(block & 31)) & np.uint32(1) != 0
                    base = np.int32(slot + found[0] + found[1] - found[2])
                    upper = slots_in(found[3], found[4], base, row)
                    base = np.int32(base + cuda.popc(found[3]) + cuda.popc(found[4]))
                    lower = slots_in(found[5], found[6], base, row)
                    # Of the next block, in time: nothing is computed of it here, which would wait for it.
                    word, left, block = next_block(live, live_row, block_words, word, left)
                    if block >= 0:
                        wholes = whole[word]
                        found = survivors_of(bits, before, slot0, slots, block, place, first, n_ctiles)
                    if is_dense and is_whole:
                        use = pass_by(ring, use, 2, lane)
                    else:
                        for half in range(2):
                            wait_empty(ring, use)
                            if not is_dense:
                                smem, source = np.uint32(a_smem(ring, stage_of(use)) + mine), g + np.uint64(_ROW_BYTES * half)
                                pitch, present = np.uint32(G_ROW_BYTES), np.uint32(1)
                                copy_rows_or_zeros(smem, upper, source, pitch, present)
                                copy_rows_or_zeros(np.uint32(smem + _PANEL_BYTES), lower, source, pitch, present)
                            if not is_whole:
                                smem = np.uint32(b_smem(ring, stage_of(use)) + mine)
                                ids = ids_in_table(row_of, token + PANEL * half)
                                copy_across_or_zeros(smem, ids, e + np.uint64(2 * d0), e_pitch_bytes, row_bytes - 2 * d0)
                            memory.copy_async_arrive(full(ring, stage_of(use)))
                            use = np.uint32(use + np.uint32(1))
            cuda.syncwarp()
            if lane == 0:
                mbarrier.arrive(job_empty(jobs, s))
            s = np.uint32(s + np.uint32(1))

    return gather


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
