"""The gathering warps: copy rows that are not neighbours in memory, one by one, to the operands that `bulk_copy` describes.

These are rows of c, by a list of columns; rows of e, in blocks that are not whole; and columns of G, which are rows of the
workspace, of the columns of a tile that survive in a block. Rows that are nobody's become zeros.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.bulk_copy import has_bit
from cce_numba.hopper.backward.jobs import D_E, END, LOGITS, make_job_ring
from cce_numba.hopper.backward.records import WORD, Piece
from cce_numba.hopper.backward.rows import (
    PANEL_SMEM_BYTES,
    ROW_BYTES,
    copy_rows,
    copy_rows_across,
    copy_rows_or_zeros,
    copy_rows_or_zeros_across,
    copy_rows_to_two,
    ids_in_list,
    ids_in_smem,
    ids_in_table,
    ids_of_lanes,
    is_some,
)
from cce_numba.hopper.backward.tiles import PANEL, BackwardTiles
from cce_numba.hopper.ring import make_ring
from cce_numba.ptx import arithmetic, control, mbarrier, memory
from cce_numba.ptx.pointers import address_of
from cce_numba.tensor_core.backward.records import G_ROW_BYTES
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP

# In this file `tables` is the survey's `Tables`, `dims` a `records.Dimensions`, and `piece` a `records.Piece`.


@cuda.jit(device=True, forceinline=True)
def slots_in_32_blocks(word: Any, lane: Any, r: Any, tile: Any, tables: Any, dims: Any) -> Any:
    """`(bits, first)` of a tile of columns and the block 32 * word + lane: what `slots_of` needs of them.

    bits: four words, whose bits say which of the tile's 128 columns survive in the block. first: twice the slot of the first of
    these columns, counted from the buffer's first slot; and 1 more if the block is whole. r: the round.
    """
    column_tiles, first_tile, wholes = dims.column_tiles, tables.first_tile[r], np.uint32(tables.whole[word])
    slots = np.int64(r) * (dims.blocks + 1)
    block = np.int64(min(np.int32(32 * word + lane), np.int32(dims.blocks - 1)))
    one, row = np.uint32(1), np.uint64(address_of(tables.before) + np.uint64(4 * (block * (column_tiles + 1))))
    bits = memory.load_if_4_u32(np.uint64(address_of(tables.bits) + np.uint64(16 * (block * column_tiles + tile))), one)
    of_block = memory.load_if_u32(np.uint64(address_of(tables.first_slot) + np.uint64(4 * (slots + block))), one)
    of_tile = memory.load_if_u32(row + np.uint64(4 * tile), one)
    of_round = memory.load_if_u32(row + np.uint64(4 * first_tile), one)
    return bits, np.int32(2 * np.int32(of_block + of_tile - of_round) + np.int32((wholes >> np.uint32(lane)) & one))


@cuda.jit(device=True, forceinline=True)
def slots_of(bits: Any, first: Any, block: Any, slot: Any, thread: Any) -> Any:
    """By a warp: `(is_whole, upper, lower)`: whether a block is whole, and the slots that the thread copies rows of.

    upper and lower are eight slots each, of every eighth of a tile's first and last 64 columns, -1 where the column does not
    survive in the block. Eight threads share these rows; each computes two of the slots, and tells them to the others.

    bits, first: what `slots_in_32_blocks` gave each lane. slot: the buffer's first. thread: as in `Piece`.
    """
    shuffle, holder = control.shuffle_i32, np.uint32(block & 31)
    word_0, word_1 = np.uint32(shuffle(np.int32(bits[0]), holder)), np.uint32(shuffle(np.int32(bits[1]), holder))
    word_2, word_3 = np.uint32(shuffle(np.int32(bits[2]), holder)), np.uint32(shuffle(np.int32(bits[3]), holder))
    first = shuffle(np.int32(first), holder)
    is_whole, first = first & 1 != 0, np.int32(slot + (first >> 1))
    sharer, bit = np.uint32(thread & 7), np.uint32((thread >> 3) + 8 * (thread & 3))
    below = np.uint32((np.uint32(1) << bit) - np.uint32(1))
    before_1, before_3 = cuda.popc(word_0), cuda.popc(word_2)
    before_2 = np.int32(before_1 + cuda.popc(word_1))
    is_second = sharer >= np.uint32(4)
    upper, lower = word_1 if is_second else word_0, word_3 if is_second else word_2
    own = np.int32(first + (before_1 if is_second else 0) + cuda.popc(np.uint32(upper & below)))
    own = own if (upper >> bit) & np.uint32(1) != 0 else np.int32(-1)
    next_own = np.int32(first + before_2 + (before_3 if is_second else 0) + cuda.popc(np.uint32(lower & below)))
    next_own = next_own if (lower >> bit) & np.uint32(1) != 0 else np.int32(-1)
    lane = np.uint32(thread & 24)
    return is_whole, ids_of_lanes(own, lane), ids_of_lanes(next_own, lane)


@cuda.jit(device=True, forceinline=True)
def piece_of(thread: Any, D: Any) -> Any:
    """The `Piece` of a gathering thread, one of 64, for rows of D 16-bit numbers."""
    lane, sharer, row = np.int32(thread & 31), np.uint32(thread & 7), np.uint32(thread >> 3)
    return Piece(
        thread=thread,
        lane=lane,
        row=row,
        offset_bytes=np.uint64(np.uint32(16) * sharer),
        smem_bytes=np.uint32(np.uint32(ROW_BYTES) * row + ((sharer ^ row) << np.uint32(4))),
        row_bytes=np.int32(16 * ((D + 7) // 8 - sharer)),
    )


@functools.cache
def make_gather(tiles: BackwardTiles, has_teacher: bool = False) -> Any:
    """The device function of the gathering warps."""
    ring_, jobs_ = make_ring(tiles), make_job_ring(tiles)
    wait_empty, stage_of, full, a_smem, b_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem, ring_.c_smem
    field, wait_job, job_empty, columns_smem = jobs_.field, jobs_.wait_full, jobs_.empty, jobs_.columns_smem
    opaque = arithmetic.opaque_u32

    # Below, `smem` is a `records.SharedMemory`, `ring` the address of the ring of stages, `s` the number of a job of this CTA,
    # and `use` the number of a use of the ring. Functions that fill stages begin with this use, and return the next one.

    @cuda.jit(device=True, forceinline=True)
    def pass_by(ring: Any, use: Any, stages: Any, lane: Any) -> Any:
        """Arrives, for its warp, at so many stages that have nothing to gather.

        These must not be left out: a thread that falls behind the ring takes a phase of a barrier for an earlier one.
        """
        if lane == 0:
            for i in range(stages):
                wait_empty(ring, use + np.uint32(i))
                mbarrier.arrive_many(full(ring, stage_of(use + np.uint32(i))), np.uint32(32))
        cuda.syncwarp()
        return np.uint32(use + np.uint32(stages))

    @cuda.jit(device=True, forceinline=True)
    def gather_tokens(
        ring: Any, use: Any, piece: Any, row_of: Any, token: Any, source: Any, pitch_bytes: Any, left_bytes: Any
    ) -> None:  # fmt: skip
        """Copies the thread's part of A of a stage for LOGITS: rows of e of a block that is not whole.

        row_of: pointer to the survey's table. token: the first of the thread's listed tokens. source, pitch_bytes, left_bytes:
        of e, see `rows`.
        """
        smem, present = np.uint32(a_smem(ring, stage_of(use)) + piece.smem_bytes), is_some(left_bytes)
        copy_rows_or_zeros(smem, ids_in_table(row_of, token), source, pitch_bytes, present)
        smem = np.uint32(smem + PANEL_SMEM_BYTES)
        copy_rows_or_zeros(smem, ids_in_table(row_of, token + PANEL), source, pitch_bytes, present)

    @cuda.jit(device=True, forceinline=True)
    def gather_logits(
        smem: Any, s: Any, use: Any, piece: Any, k_steps: Any, block: Any, is_dense: Any, e: Any, c: Any, tables: Any
    ) -> Any:  # fmt: skip
        """Gathers A, in a block that is not whole, and B, unless the problem is dense, for a job LOGITS. e, c: `Matrix`."""
        ring, row_of = smem.ring, tables.row_of
        is_whole = has_bit(tables.whole, block)
        if is_dense and is_whole:
            return pass_by(ring, use, k_steps, piece.lane)
        ids = opaque(np.uint32(columns_smem(smem.jobs, s) + np.uint32(4) * piece.row))
        ids_0 = ids_in_smem(ids)
        ids_1 = ids_in_smem(np.uint32(ids + np.uint32(4 * PANEL)))
        ids_2 = ids_in_smem(np.uint32(ids + np.uint32(8 * PANEL)))
        token, source = np.int32(block * COLUMN_TILE + piece.row), np.uint64(c.address + piece.offset_bytes)
        k = np.int32(0)
        while k + 1 < k_steps:
            # Two stages are filled at a time, since the address of a row is then computed once for both.
            left_bytes, next_use = np.int32(piece.row_bytes - ROW_BYTES * k), np.uint32(use + np.uint32(1))
            wait_empty(ring, use)
            wait_empty(ring, next_use)
            if not is_whole:
                e_source = np.uint64(e.address + piece.offset_bytes + np.uint64(ROW_BYTES * k))
                gather_tokens(ring, use, piece, row_of, token, e_source, e.pitch_bytes, left_bytes)
                e_source, next_bytes = np.uint64(e_source + np.uint64(ROW_BYTES)), np.int32(left_bytes - ROW_BYTES)
                gather_tokens(ring, next_use, piece, row_of, token, e_source, e.pitch_bytes, next_bytes)
            if not is_dense:
                to = b_smem(ring, stage_of(use)) + piece.smem_bytes
                next_to = b_smem(ring, stage_of(next_use)) + piece.smem_bytes
                # `opaque` hides the pitch from LLVM, which would otherwise hoist its products with the ids out of the loop and
                # spill them.
                pitch = opaque(np.uint32(c.pitch_bytes))
                copy_rows_to_two(to, next_to, ids_0, source, pitch, left_bytes)
                to, next_to = np.uint32(to + PANEL_SMEM_BYTES), np.uint32(next_to + PANEL_SMEM_BYTES)
                copy_rows_to_two(to, next_to, ids_1, source, pitch, left_bytes)
                to, next_to = np.uint32(to + PANEL_SMEM_BYTES), np.uint32(next_to + PANEL_SMEM_BYTES)
                copy_rows_to_two(to, next_to, ids_2, source, pitch, left_bytes)
            source = np.uint64(source + np.uint64(2 * ROW_BYTES))
            memory.copy_async_arrive(full(ring, stage_of(use)))
            memory.copy_async_arrive(full(ring, stage_of(next_use)))
            use, k = np.uint32(use + np.uint32(2)), np.int32(k + 2)
        if k < k_steps:
            left_bytes = np.int32(piece.row_bytes - ROW_BYTES * k)
            wait_empty(ring, use)
            if not is_whole:
                e_source = np.uint64(e.address + piece.offset_bytes + np.uint64(ROW_BYTES * k))
                gather_tokens(ring, use, piece, row_of, token, e_source, e.pitch_bytes, left_bytes)
            if not is_dense:
                to, present = np.uint32(b_smem(ring, stage_of(use)) + piece.smem_bytes), is_some(left_bytes)
                copy_rows(to, ids_0, source, c.pitch_bytes, present)
                copy_rows(np.uint32(to + PANEL_SMEM_BYTES), ids_1, source, c.pitch_bytes, present)
                copy_rows(np.uint32(to + np.uint32(2) * PANEL_SMEM_BYTES), ids_2, source, c.pitch_bytes, present)
            memory.copy_async_arrive(full(ring, stage_of(use)))
            use = np.uint32(use + np.uint32(1))
        return use

    @cuda.jit(device=True, forceinline=True)
    def gather_listed(ring: Any, use: Any, piece: Any, ids: Any, source: Any, pitch_bytes: Any, left_bytes: Any) -> Any:
        """Gathers B of a stage for D_E: rows of c. source, pitch_bytes, left_bytes: of c, see `rows`."""
        wait_empty(ring, use)
        to = np.uint32(b_smem(ring, stage_of(use)) + piece.smem_bytes)
        copy_rows_across(to, ids, source, pitch_bytes, left_bytes)
        memory.copy_async_arrive(full(ring, stage_of(use)))
        return np.uint32(use + np.uint32(1))

    @cuda.jit(device=True, forceinline=True)
    def gather_d_e(
        ring: Any, use: Any, piece: Any, k_steps: Any, slot: Any, d0: Any, is_dense: Any, c: Any, lists: Any
    ) -> Any:  # fmt: skip
        """Gathers B, unless the problem is dense, for a job D_E: rows of c, from hidden entry d0 on.

        slot: the first slot of the block's list. c: a `Matrix`. lists: address of `Workspace.lists`.
        """
        if is_dense:
            return pass_by(ring, use, k_steps, piece.lane)
        listed, one_step = lists + np.uint64(4 * (np.int64(slot) + 8 * piece.row)), np.uint64(4 * K_STEP)
        source, left_bytes = (
            np.uint64(c.address + piece.offset_bytes + np.uint64(2 * d0)),
            np.int32(piece.row_bytes - 2 * d0),
        )
        # Ids are loaded two stages ahead, since they take that long to come. Ids of even and of odd stages have registers of
        # their own: moving ids from one register to another would wait for them.
        even, odd = ids_in_list(listed, k_steps > 0), ids_in_list(listed + one_step, k_steps > 1)
        k = np.int32(0)
        while k < k_steps:
            use = gather_listed(ring, use, piece, even, source, c.pitch_bytes, left_bytes)
            listed += np.uint64(2) * one_step
            even = ids_in_list(listed, k + 2 < k_steps)
            if k + 1 < k_steps:
                use = gather_listed(ring, use, piece, odd, source, c.pitch_bytes, left_bytes)
                odd = ids_in_list(listed + one_step, k + 3 < k_steps)
            k = np.int32(k + 2)
        return use

    @cuda.jit(device=True, forceinline=True)
    def gather_d_c(
        smem: Any, s: Any, use: Any, piece: Any, slot: Any, d0: Any, is_dense: Any, e: Any, g: Any, tables: Any, dims: Any
    ) -> Any:  # fmt: skip
        """Gathers A, unless the problem is dense, and B, in blocks that are not whole, for a job D_C, from hidden entry d0 on.

        slot: the buffer's first. e: a `Matrix`. g: address of `Workspace.g`.
        """
        jobs, ring, block_words = smem.jobs, smem.ring, dims.block_words
        for word in range(block_words):
            # The fields are read again for each word. Otherwise LLVM would hoist what follows from them out of the loop and
            # spill it.
            r, tile = field(jobs, s, WORD.round), field(jobs, s, WORD.block_or_tile)
            bits, first = slots_in_32_blocks(word, piece.lane, r, tile, tables, dims)
            left = np.uint32(tables.needed[np.int64(tile) * block_words + word])
            while left != 0:
                block = np.int32(32 * word + cuda.ffs(np.int32(left)) - 1)
                left = np.uint32(left & (left - np.uint32(1)))
                is_whole, upper, lower = slots_of(bits, first, block, slot, piece.thread)
                if is_dense and is_whole:
                    use = pass_by(ring, use, 2, piece.lane)
                else:
                    half = np.int32(0)
                    while half < 2:
                        wait_empty(ring, use)
                        if not is_dense:
                            to = np.uint32(a_smem(ring, stage_of(use)) + piece.smem_bytes)
                            source = g + piece.offset_bytes + np.uint64(ROW_BYTES * half)
                            # As above, `opaque` keeps products with the pitch in the loop.
                            pitch, present = opaque(np.uint32(G_ROW_BYTES)), np.uint32(1)
                            copy_rows_or_zeros(to, upper, source, pitch, present)
                            copy_rows_or_zeros(np.uint32(to + PANEL_SMEM_BYTES), lower, source, pitch, present)
                        if not is_whole:
                            to = np.uint32(b_smem(ring, stage_of(use)) + piece.smem_bytes)
                            ids = ids_in_table(tables.row_of, np.int32(block * COLUMN_TILE + piece.row + PANEL * half))
                            source = np.uint64(e.address + piece.offset_bytes + np.uint64(2 * d0))
                            copy_rows_or_zeros_across(to, ids, source, e.pitch_bytes, piece.row_bytes - 2 * d0)
                        memory.copy_async_arrive(full(ring, stage_of(use)))
                        use, half = np.uint32(use + np.uint32(1)), np.int32(half + 1)
        return use

    @cuda.jit(device=True, forceinline=True)
    def gather(
        smem: Any, thread: Any, e: Any, c: Any, tables: Any, workspace: Any, dims: Any, distillation: Any, k_teacher: Any
    ) -> None:  # fmt: skip
        """By the gathering warps, threads 0 to 63: copies, for each job of this CTA, what the bulk copy engine cannot fetch.

        e, c: `Matrix`. workspace: a `records.Workspace`. distillation: a `Distillation`, if there is a teacher. k_teacher: the
        stages of its products.
        """
        jobs, ring, is_dense = smem.jobs, smem.ring, tables.dense[0] != 0
        s, use = np.uint32(0), np.uint32(0)
        while True:
            wait_job(jobs, s)
            kind = field(jobs, s, WORD.kind)
            if kind == END:
                break
            # `opaque_i32` hides the thread's number from LLVM, which would otherwise compute what follows from it once for all
            # jobs, and spill it.
            piece = piece_of(arithmetic.opaque_i32(thread), dims.D)
            k_steps, block_or_tile = field(jobs, s, WORD.k_steps), field(jobs, s, WORD.block_or_tile)
            d0, slot = field(jobs, s, WORD.d0), field(jobs, s, WORD.slot)
            if kind == LOGITS:
                if has_teacher:
                    k_steps, teacher = np.int32(k_steps - k_teacher), distillation.teacher
                    use = gather_logits(
                        smem, s, use, piece_of(arithmetic.opaque_i32(thread), teacher.D), k_teacher, block_or_tile, is_dense,
                        teacher.e, teacher.c, tables,
                    )  # fmt: skip
                use = gather_logits(smem, s, use, piece, k_steps, block_or_tile, is_dense, e, c, tables)
            elif kind == D_E:
                use = gather_d_e(ring, use, piece, k_steps, slot, d0, is_dense, c, workspace.lists)
            elif k_steps > 0:
                use = gather_d_c(smem, s, use, piece, slot, d0, is_dense, e, workspace.g, tables, dims)
            cuda.syncwarp()
            if piece.lane == 0:
                mbarrier.arrive(job_empty(jobs, s))
            s = np.uint32(s + np.uint32(1))

    return gather
