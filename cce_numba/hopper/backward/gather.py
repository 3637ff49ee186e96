"""Rows that are not neighbours on their way to shared memory, one by one, 16 bytes a lane, swizzled by hand.

By two warps, into the stages and panels that `load` describes: rows of c that a list names, rows of e where tokens are
scattered, columns of G that a tile has in a block. Rows of nobody become zeros.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.jobs import D0, D_E, END, K_STEPS, KIND, LOGITS, PLACE, ROUND, SLOT, make_job_ring
from cce_numba.hopper.backward.load import has_bit
from cce_numba.hopper.backward.tiles import G_ROW_BYTES, PANEL, BackwardTiles
from cce_numba.hopper.ring import make_ring
from cce_numba.ptx import arithmetic, control, mbarrier, memory
from cce_numba.ptx.wgmma import PANEL_BYTES
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP

_PANEL_BYTES, _ROW_BYTES = np.uint32(PANEL_BYTES), 2 * PANEL


@functools.cache
def make_gather(tiles: BackwardTiles) -> Any:
    """The device function of the warps that copy rows one by one, and swizzle them by hand.

    Eight threads share a row, 16 bytes each; so a thread's rows are 8 apart, and it copies eight of them at a time.
    """
    ring_, jobs_ = make_ring(tiles), make_job_ring(tiles)
    wait_empty, stage_of, full, a_smem, b_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem, ring_.c_smem
    field, wait_job, job_empty, columns_smem = jobs_.field, jobs_.wait_full, jobs_.empty, jobs_.columns_smem
    load_id, opaque, load_if = memory.load_shared_i32_freely, arithmetic.opaque_u32, memory.load_if_u32
    load_if_4, shuffle = memory.load_if_4_u32, control.shuffle_i32
    copy_16, copy_16_of_row = memory.copy_async_16_or_zeros, memory.copy_async_16_of_row

    @cuda.jit(device=True, forceinline=True)
    def copy_row(smem: Any, id: Any, source: Any, pitch_bytes: Any, present: Any) -> None:
        """16 bytes of a row, or zeros if they are not `present`. smem and source are those of this thread's part of a row."""
        # One instruction, as factors of 32 bits.
        offset = np.uint64(np.uint32(id)) * np.uint64(np.uint32(pitch_bytes))
        copy_16(np.uint32(smem), np.uint64(source + offset), np.uint32(present))

    @cuda.jit(device=True, forceinline=True)
    def copy_row_or_zeros(smem: Any, id: Any, source: Any, pitch_bytes: Any, present: Any) -> None:
        """The same; zeros for row -1, which is nobody's."""
        copy_16_of_row(np.uint32(smem), source, np.int32(id) if present != 0 else np.int32(-1), np.uint32(pitch_bytes))

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
            max(np.int32(load_id(address)), np.int32(0)),
            max(np.int32(load_id(address + step)), np.int32(0)),
            max(np.int32(load_id(address + np.uint32(2) * step)), np.int32(0)),
            max(np.int32(load_id(address + np.uint32(3) * step)), np.int32(0)),
            max(np.int32(load_id(address + np.uint32(4) * step)), np.int32(0)),
            max(np.int32(load_id(address + np.uint32(5) * step)), np.int32(0)),
            max(np.int32(load_id(address + np.uint32(6) * step)), np.int32(0)),
            max(np.int32(load_id(address + np.uint32(7) * step)), np.int32(0)),
        )

    @cuda.jit(device=True, forceinline=True)
    def ids_in_list(address: Any, wanted: Any) -> Any:
        """Eight of a list that other CTAs have written, which lie together (`jobs.listed_place`), if they are wanted."""
        wanted = np.uint32(1) if wanted else np.uint32(0)
        return load_if_4(address, wanted) + load_if_4(address + np.uint64(16), wanted)

    @cuda.jit(device=True, forceinline=True)
    def ids_in_table(table: Any, first: Any) -> Any:
        """Eight of a table that is older than this kernel, 8 apart."""
        return (
            table[first], table[first + 8], table[first + 16], table[first + 24],
            table[first + 32], table[first + 40], table[first + 48], table[first + 56],
        )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def slots_of(words: Any, first: Any, block: Any, slot: Any, thread: Any) -> Any:
        """Whether a block is whole; sixteen of a tile's columns' slots in it, 8 apart, -1 for what does not survive.

        Out of what `in_32_blocks` gives. The eight threads that share a row compute two of its slots each, and tell each other.
        """
        holder = np.uint32(block & 31)
        word_0, word_1 = np.uint32(shuffle(np.int32(words[0]), holder)), np.uint32(shuffle(np.int32(words[1]), holder))
        word_2, word_3 = np.uint32(shuffle(np.int32(words[2]), holder)), np.uint32(shuffle(np.int32(words[3]), holder))
        first = shuffle(np.int32(first), holder)
        is_whole, first = first & 1 != 0, np.int32(slot + (first >> 1))
        part, bit = np.uint32(thread & 7), np.uint32((thread >> 3) + 8 * (thread & 3))
        below = np.uint32((np.uint32(1) << bit) - np.uint32(1))
        before_1, before_3 = cuda.popc(word_0), cuda.popc(word_2)
        before_2 = np.int32(before_1 + cuda.popc(word_1))
        is_second = part >= np.uint32(4)
        upper, lower = word_1 if is_second else word_0, word_3 if is_second else word_2
        own = np.int32(first + (before_1 if is_second else 0) + cuda.popc(np.uint32(upper & below)))
        own = own if (upper >> bit) & np.uint32(1) != 0 else np.int32(-1)
        next_own = np.int32(first + before_2 + (before_3 if is_second else 0) + cuda.popc(np.uint32(lower & below)))
        next_own = next_own if (lower >> bit) & np.uint32(1) != 0 else np.int32(-1)
        lane = np.uint32(thread & 24)
        return is_whole, slots_told(own, lane), slots_told(next_own, lane)

    @cuda.jit(device=True, forceinline=True)
    def slots_told(own: Any, lane: Any) -> Any:
        one = np.uint32(1)
        return (
            shuffle(own, lane),
            shuffle(own, lane + one),
            shuffle(own, lane + np.uint32(2)),
            shuffle(own, lane + np.uint32(3)),
            shuffle(own, lane + np.uint32(4)),
            shuffle(own, lane + np.uint32(5)),
            shuffle(own, lane + np.uint32(6)),
            shuffle(own, lane + np.uint32(7)),
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
    def in_32_blocks(
        group: Any, lane: Any, bits: Any, before: Any, slot0: Any, slots: Any, tile: Any, first: Any, n_ctiles: Any,
        blocks: Any, wholes: Any,
    ) -> Any:  # fmt: skip
        """What tells a tile's slots in 32 blocks, one a lane: four words of bits; twice its first slot, 1 more if whole."""
        block = np.int64(min(np.int32(32 * group + lane), np.int32(blocks - 1)))
        one, row = np.uint32(1), np.uint64(before + np.uint64(4 * (block * (n_ctiles + 1))))
        words = load_if_4(np.uint64(bits + np.uint64(16 * (block * n_ctiles + tile))), one)
        of_block = load_if(np.uint64(slot0 + np.uint64(4 * (slots + block))), one)
        of_tile, of_round = load_if(row + np.uint64(4 * tile), one), load_if(row + np.uint64(4 * first), one)
        return words, np.int32(2 * np.int32(of_block + of_tile - of_round) + np.int32((wholes >> np.uint32(lane)) & one))

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
    def gather_stage(ring: Any, use: Any, mine: Any, ids: Any, source: Any, pitch_bytes: Any, left_bytes: Any) -> Any:
        """B for D_E; the next use."""
        wait_empty(ring, use)
        copy_across(np.uint32(b_smem(ring, stage_of(use)) + mine), ids, source, pitch_bytes, left_bytes)
        memory.copy_async_arrive(full(ring, stage_of(use)))
        return np.uint32(use + np.uint32(1))

    @cuda.jit(device=True, forceinline=True)
    def gather_e(
        ring: Any, use: Any, mine: Any, row_of: Any, token: Any, source: Any, pitch_bytes: Any, left_bytes: Any
    ) -> None:  # fmt: skip
        """A for LOGITS, of tokens that are not neighbours."""
        smem, present = np.uint32(a_smem(ring, stage_of(use)) + mine), is_some(left_bytes)
        copy_rows_or_zeros(smem, ids_in_table(row_of, token), source, pitch_bytes, present)
        smem = np.uint32(smem + _PANEL_BYTES)
        copy_rows_or_zeros(smem, ids_in_table(row_of, token + PANEL), source, pitch_bytes, present)

    @cuda.jit(device=True, forceinline=True)
    def copy_row_to_two(
        smem: Any, next_smem: Any, id: Any, source: Any, pitch_bytes: Any, present: Any, next_present: Any
    ) -> None:  # fmt: skip
        row = np.uint64(source + np.uint64(np.uint32(id)) * np.uint64(np.uint32(pitch_bytes)))
        copy_16(np.uint32(smem), row, present)
        copy_16(np.uint32(next_smem), np.uint64(row + np.uint64(_ROW_BYTES)), next_present)

    @cuda.jit(device=True, forceinline=True)
    def copy_rows_to_two(
        smem: Any, next_smem: Any, ids: Any, source: Any, pitch_bytes: Any, left_bytes: Any
    ) -> None:  # fmt: skip
        """Eight rows' 16 bytes to a panel, and those that are 128 bytes further on to another."""
        step, here, there = np.uint32(8 * _ROW_BYTES), is_some(left_bytes), is_some(left_bytes - _ROW_BYTES)
        copy_row_to_two(smem, next_smem, ids[0], source, pitch_bytes, here, there)
        smem, next_smem = smem + step, next_smem + step
        copy_row_to_two(smem, next_smem, ids[1], source, pitch_bytes, here, there)
        smem, next_smem = smem + step, next_smem + step
        copy_row_to_two(smem, next_smem, ids[2], source, pitch_bytes, here, there)
        smem, next_smem = smem + step, next_smem + step
        copy_row_to_two(smem, next_smem, ids[3], source, pitch_bytes, here, there)
        smem, next_smem = smem + step, next_smem + step
        copy_row_to_two(smem, next_smem, ids[4], source, pitch_bytes, here, there)
        smem, next_smem = smem + step, next_smem + step
        copy_row_to_two(smem, next_smem, ids[5], source, pitch_bytes, here, there)
        smem, next_smem = smem + step, next_smem + step
        copy_row_to_two(smem, next_smem, ids[6], source, pitch_bytes, here, there)
        smem, next_smem = smem + step, next_smem + step
        copy_row_to_two(smem, next_smem, ids[7], source, pitch_bytes, here, there)

    @cuda.jit(device=True, forceinline=True)
    def gather(
        jobs: Any, ring: Any, thread: Any, e: Any, e_pitch_bytes: Any, c: Any, c_pitch_bytes: Any, g: Any, lists: Any,
        row_of: Any, whole: Any, live: Any, bits_at: Any, before_at: Any, slot0_at: Any, n_ctiles: Any,
        block_words: Any, first_tile: Any, blocks: Any, dense: Any, D: Any,
    ) -> None:  # fmt: skip
        is_dense = dense[0] != 0
        s, use = np.uint32(0), np.uint32(0)
        while True:
            wait_job(jobs, s)
            kind = field(jobs, s, KIND)
            if kind == END:
                break
            # Unknown in each job, or all that follows from it would be kept in registers that are not there.
            own = arithmetic.opaque_i32(thread)
            lane, part, row = np.int32(own & 31), np.uint32(own & 7), np.uint32(own >> 3)
            part_bytes = np.uint64(np.uint32(16) * part)
            row_bytes = np.int32(16 * ((D + 7) // 8 - part))
            # Rows that are 8 apart have the same place in the swizzle.
            mine = np.uint32(np.uint32(_ROW_BYTES) * row + ((part ^ row) << np.uint32(4)))
            k_steps, place, d0 = field(jobs, s, K_STEPS), field(jobs, s, PLACE), field(jobs, s, D0)
            slot = field(jobs, s, SLOT)
            if kind == LOGITS:
                is_whole = has_bit(whole, place)
                if is_dense and is_whole:
                    use = pass_by(ring, use, k_steps, lane)
                else:
                    ids = opaque(np.uint32(columns_smem(jobs, s) + np.uint32(4) * row))
                    ids_0 = ids_in_smem(ids)
                    ids_1 = ids_in_smem(np.uint32(ids + np.uint32(4 * PANEL)))
                    ids_2 = ids_in_smem(np.uint32(ids + np.uint32(8 * PANEL)))
                    token, source = np.int32(place * COLUMN_TILE + row), np.uint64(c + part_bytes)
                    k = np.int32(0)
                    while k + 1 < k_steps:
                        # Two stages at a time: a row is found once for both.
                        left_bytes, next_use = np.int32(row_bytes - _ROW_BYTES * k), np.uint32(use + np.uint32(1))
                        wait_empty(ring, use)
                        wait_empty(ring, next_use)
                        if not is_whole:
                            e_source = np.uint64(e + part_bytes + np.uint64(_ROW_BYTES * k))
                            gather_e(ring, use, mine, row_of, token, e_source, e_pitch_bytes, left_bytes)
                            e_source, next_bytes = (
                                np.uint64(e_source + np.uint64(_ROW_BYTES)),
                                np.int32(left_bytes - _ROW_BYTES),
                            )
                            gather_e(ring, next_use, mine, row_of, token, e_source, e_pitch_bytes, next_bytes)
                        if not is_dense:
                            smem, next_smem = b_smem(ring, stage_of(use)) + mine, b_smem(ring, stage_of(next_use)) + mine
                            # Unknown in each step, or products with it would be kept in registers that are not there.
                            pitch = opaque(np.uint32(c_pitch_bytes))
                            copy_rows_to_two(smem, next_smem, ids_0, source, pitch, left_bytes)
                            smem, next_smem = np.uint32(smem + _PANEL_BYTES), np.uint32(next_smem + _PANEL_BYTES)
                            copy_rows_to_two(smem, next_smem, ids_1, source, pitch, left_bytes)
                            smem, next_smem = np.uint32(smem + _PANEL_BYTES), np.uint32(next_smem + _PANEL_BYTES)
                            copy_rows_to_two(smem, next_smem, ids_2, source, pitch, left_bytes)
                        source = np.uint64(source + np.uint64(2 * _ROW_BYTES))
                        memory.copy_async_arrive(full(ring, stage_of(use)))
                        memory.copy_async_arrive(full(ring, stage_of(next_use)))
                        use, k = np.uint32(use + np.uint32(2)), np.int32(k + 2)
                    if k < k_steps:
                        left_bytes = np.int32(row_bytes - _ROW_BYTES * k)
                        wait_empty(ring, use)
                        if not is_whole:
                            e_source = np.uint64(e + part_bytes + np.uint64(_ROW_BYTES * k))
                            gather_e(ring, use, mine, row_of, token, e_source, e_pitch_bytes, left_bytes)
                        if not is_dense:
                            smem, present = np.uint32(b_smem(ring, stage_of(use)) + mine), is_some(left_bytes)
                            copy_rows(smem, ids_0, source, c_pitch_bytes, present)
                            copy_rows(np.uint32(smem + _PANEL_BYTES), ids_1, source, c_pitch_bytes, present)
                            copy_rows(np.uint32(smem + np.uint32(2) * _PANEL_BYTES), ids_2, source, c_pitch_bytes, present)
                        memory.copy_async_arrive(full(ring, stage_of(use)))
                        use = np.uint32(use + np.uint32(1))
            elif kind == D_E:
                if is_dense:
                    use = pass_by(ring, use, k_steps, lane)
                else:
                    listed, one_step = lists + np.uint64(4 * (np.int64(slot) + 8 * row)), np.uint64(4 * K_STEP)
                    source, left_bytes = np.uint64(c + part_bytes + np.uint64(2 * d0)), np.int32(row_bytes - 2 * d0)
                    # Two stages ahead, since it takes them that long to come; and each in its place, since to move it would be
                    # to wait for it.
                    even, odd = ids_in_list(listed, k_steps > 0), ids_in_list(listed + one_step, k_steps > 1)
                    k = np.int32(0)
                    while k < k_steps:
                        use = gather_stage(ring, use, mine, even, source, c_pitch_bytes, left_bytes)
                        listed += np.uint64(2) * one_step
                        even = ids_in_list(listed, k + 2 < k_steps)
                        if k + 1 < k_steps:
                            use = gather_stage(ring, use, mine, odd, source, c_pitch_bytes, left_bytes)
                            odd = ids_in_list(listed + one_step, k + 3 < k_steps)
                        k = np.int32(k + 2)
            elif k_steps > 0:
                for group in range(block_words):
                    # Asked for again each time, or all that follows from it would be kept in registers that are not there.
                    r, place = field(jobs, s, ROUND), field(jobs, s, PLACE)
                    words, first = in_32_blocks(
                        group, lane, bits_at, before_at, slot0_at, np.int64(r) * (blocks + 1), place, first_tile[r], n_ctiles,
                        blocks, np.uint32(whole[group]),
                    )  # fmt: skip
                    left = np.uint32(live[np.int64(place) * block_words + group])
                    while left != 0:
                        block = np.int32(32 * group + cuda.ffs(np.int32(left)) - 1)
                        left = np.uint32(left & (left - np.uint32(1)))
                        is_whole, upper, lower = slots_of(words, first, block, slot, own)
                        if is_dense and is_whole:
                            use = pass_by(ring, use, 2, lane)
                        else:
                            half = np.int32(0)
                            while half < 2:
                                wait_empty(ring, use)
                                if not is_dense:
                                    smem, source = (
                                        np.uint32(a_smem(ring, stage_of(use)) + mine),
                                        g + part_bytes + np.uint64(_ROW_BYTES * half),
                                    )
                                    # As above.
                                    pitch, present = opaque(np.uint32(G_ROW_BYTES)), np.uint32(1)
                                    copy_rows_or_zeros(smem, upper, source, pitch, present)
                                    copy_rows_or_zeros(np.uint32(smem + _PANEL_BYTES), lower, source, pitch, present)
                                if not is_whole:
                                    smem = np.uint32(b_smem(ring, stage_of(use)) + mine)
                                    ids, source = (
                                        ids_in_table(row_of, np.int32(block * COLUMN_TILE + row + PANEL * half)),
                                        np.uint64(e + part_bytes + np.uint64(2 * d0)),
                                    )
                                    copy_across_or_zeros(smem, ids, source, e_pitch_bytes, row_bytes - 2 * d0)
                                memory.copy_async_arrive(full(ring, stage_of(use)))
                                use, half = np.uint32(use + np.uint32(1)), np.int32(half + 1)
            cuda.syncwarp()
            if lane == 0:
                mbarrier.arrive(job_empty(jobs, s))
            s = np.uint32(s + np.uint32(1))

    return gather
