"""What the eight warps copy to a stage: for each kind of job, its terms of A (128 rows of the tile) and of B (192 columns).

    kind     A                                                    B
    LOGITS   rows of e, along K                                   rows of c of the job's columns, along K
    D_E      columns of G of the block's list, across K           rows of c of these columns, across K
    D_C      columns of G of the tile, of part of a block, along  rows of e of that part, across K
             K

Part of a block is half of it, and a fourth if numbers have 32 bits.

A thread copies 16 of the 128 bytes of each of its rows, which are 32 apart (`ampere.copies`). For each kind of job there are
two functions: `begin(filling, workspace, tables, dims, thread, units)` gives a state, and `fill(state, unit, stage, filling,
workspace, tables, dims, thread, units)` fills the stage at a shared address with the unit-th terms, and gives the next
state. Units come in order. What rows to copy is looked up one unit or block ahead, since it takes as long to come as the rows
do.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ampere.backward.scheduler import ids_smem, rows_smem
from cce_numba.ampere.backward.tiles import BackwardTiles
from cce_numba.ampere.copies import ROWS_AT_ONCE, ROWS_BYTES, make_copy_row, place_of
from cce_numba.ampere.elements import Elements
from cce_numba.ampere.product import term_of_row
from cce_numba.ampere.tiles import ROW_BYTES
from cce_numba.launch.record import Record
from cce_numba.ptx import memory
from cce_numba.ptx.pointers import address_of
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.records import I32, U32
from cce_numba.tensor_core.survey.tables import COLUMN_TILE

load_row, load_if, load_if_4 = memory.load_shared_i32, memory.load_if_u32, memory.load_if_4_u32
copy_row = make_copy_row(whole=True)


class Listed(Record):
    """The state of D_E: the vocabulary entries of the thread's two rows of c in the next unit."""

    row_0 = I32
    row_1 = I32


class Blocks(Record):
    """The state of D_C: the thread's rows in the block at hand, and what is known of the next block that dC needs.

    Slots are of the thread's four columns, and tokens are its rows of e; -1 for nobody's.
    """

    slot_0 = I32
    slot_1 = I32
    slot_2 = I32
    slot_3 = I32
    token_1 = I32  # of the parts that are still to come
    token_2 = I32
    token_3 = I32
    word = I32  # where the search for blocks has come to: a word of the survey's table `needed`,
    left = U32  # and what is left of it
    next_bits_0 = U32  # columns of the tile that survive in the next block
    next_bits_1 = U32
    next_bits_2 = U32
    next_bits_3 = U32
    next_slot = I32  # of the first of them
    next_token_0 = I32
    next_token_1 = I32
    next_token_2 = I32
    next_token_3 = I32


@functools.cache
def make_fill(tiles: BackwardTiles, elements: Elements) -> SimpleNamespace:
    """`logits`, `d_e` and `d_c`, each with the device functions `begin` and `fill`."""
    a_bytes, a_turns, b_turns = np.uint32(tiles.a_bytes), tiles.block_n // ROWS_AT_ONCE, tiles.block_v // ROWS_AT_ONCE
    itemsize, terms, parts, wide, panel_bytes = (
        elements.itemsize, elements.terms, elements.parts, elements.wide, elements.panel_bytes
    )  # fmt: skip
    a_panels, b_panels, k_turns = tiles.block_n // terms, tiles.block_v // terms, terms // ROWS_AT_ONCE
    g_row_bytes = np.uint32(elements.g_row_bytes)
    none, last_part = np.int32(-1), parts - 1
    term_of_row_ = cuda.jit(device=True, forceinline=True)(term_of_row)

    @cuda.jit(device=True, forceinline=True)
    def begin_logits(filling: Any, workspace: Any, tables: Any, dims: Any, thread: Any, units: Any) -> Any:
        return np.int32(0)

    @cuda.jit(device=True, forceinline=True)
    def fill_logits(
        state: Any, unit: Any, stage: Any, filling: Any, workspace: Any, tables: Any, dims: Any, thread: Any, units: Any
    ) -> Any:  # fmt: skip
        e, c, row = filling.e, filling.c, np.int32(thread >> 3)
        offset = np.int32(ROW_BYTES * unit + 16 * (thread & 7))
        left_bytes = np.int32(itemsize * filling.D - offset)
        place, source = np.uint32(stage + place_of(thread)), np.uint64(e.address + np.uint64(offset))
        for i in range(a_turns):
            token = load_row(np.uint32(rows_smem(filling.job) + np.uint32(4 * (row + ROWS_AT_ONCE * i))))
            copy_row(np.uint32(place + np.uint32(ROWS_BYTES * i)), source, token, e.pitch_bytes, left_bytes)
        place, source = np.uint32(place + a_bytes), np.uint64(c.address + np.uint64(offset))
        for i in range(b_turns):
            entry = load_row(np.uint32(ids_smem(filling.job) + np.uint32(4 * (row + ROWS_AT_ONCE * i))))
            copy_row(np.uint32(place + np.uint32(ROWS_BYTES * i)), source, entry, c.pitch_bytes, left_bytes)
        return state

    @cuda.jit(device=True, forceinline=True)
    def fill_b_across(stage: Any, rows: Any, matrix: Any, filling: Any, thread: Any) -> None:
        """Fills B with all panels of the thread's two rows (or one) of a matrix, from hidden entry d0 on; -1 for zeros."""
        offset = np.int32(itemsize * filling.d0 + 16 * (thread & 7))
        left_bytes, place = np.int32(itemsize * filling.D - offset), np.uint32(stage + a_bytes + place_of(thread))
        source = np.uint64(matrix.address + np.uint64(offset))
        for panel in range(b_panels):
            to, from_ = np.uint32(place + np.uint32(panel_bytes * panel)), np.uint64(source + np.uint64(ROW_BYTES * panel))
            left = np.int32(left_bytes - ROW_BYTES * panel)
            copy_row(to, from_, rows[0], matrix.pitch_bytes, left)
            if not wide:
                copy_row(np.uint32(to + np.uint32(ROWS_BYTES)), from_, rows[1], matrix.pitch_bytes, left)

    # ---- D_E

    @cuda.jit(device=True, forceinline=True)
    def listed(unit: Any, filling: Any, workspace: Any, thread: Any, units: Any) -> Any:
        """The entries of the thread's two columns of a unit, which another CTA has listed; 0 past the last unit."""
        wanted = np.uint32(1) if unit < units else np.uint32(0)
        at = workspace.lists + np.uint64(4 * (np.int64(filling.slot) + terms * unit + (thread >> 3)))
        first = np.int32(load_if(at, wanted))
        return Listed(first, first if wide else np.int32(load_if(at + np.uint64(4 * ROWS_AT_ONCE), wanted)))

    @cuda.jit(device=True, forceinline=True)
    def begin_d_e(filling: Any, workspace: Any, tables: Any, dims: Any, thread: Any, units: Any) -> Any:
        return listed(np.int32(0), filling, workspace, thread, units)

    @cuda.jit(device=True, forceinline=True)
    def fill_d_e(
        state: Any, unit: Any, stage: Any, filling: Any, workspace: Any, tables: Any, dims: Any, thread: Any, units: Any
    ) -> Any:  # fmt: skip
        place, slot = np.uint32(stage + place_of(thread)), np.int32(filling.slot + terms * unit + (thread >> 3))
        source = np.uint64(workspace.g + np.uint64(16 * (thread & 7)))
        for panel in range(a_panels):
            for i in range(k_turns):
                to = np.uint32(place + np.uint32(panel_bytes * panel + ROWS_BYTES * i))
                from_ = np.uint64(source + np.uint64(ROW_BYTES * panel))
                memory.copy_async_16_of_row(to, from_, np.int32(slot + ROWS_AT_ONCE * i), g_row_bytes)
        fill_b_across(stage, (state.row_0, state.row_1), filling.c, filling, thread)
        return listed(np.int32(unit + 1), filling, workspace, thread, units)

    # ---- D_C

    @cuda.jit(device=True, forceinline=True)
    def next_block(word: Any, left: Any, filling: Any, tables: Any, dims: Any) -> Any:
        """`(block, word, left)`: the next block that dC needs, -1 if there is none."""
        row = np.int64(filling.tile) * dims.block_words
        while left == 0 and word + 1 < dims.block_words:
            word = np.int32(word + 1)
            left = np.uint32(tables.needed[row + word])
        block = none
        if left != 0:
            block = np.int32(32 * word + cuda.ffs(np.int32(left)) - 1)
            left = np.uint32(left & (left - np.uint32(1)))
        return block, np.int32(word), np.uint32(left)

    @cuda.jit(device=True, forceinline=True)
    def look_up(slots: Any, tokens: Any, word: Any, left: Any, filling: Any, tables: Any, dims: Any, thread: Any) -> Any:
        """The state with these slots and tokens of the block at hand, after looking for the next block from `left` on."""
        block, word, left = next_block(word, left, filling, tables, dims)
        wanted = np.uint32(1) if block >= 0 else np.uint32(0)
        b = np.int64(max(block, np.int32(0)))
        bits_at = np.uint64(address_of(tables.bits) + np.uint64(16 * (b * dims.column_tiles + filling.tile)))
        bits = load_if_4(bits_at, wanted)
        counts = np.uint64(address_of(tables.before) + np.uint64(4 * (b * (dims.column_tiles + 1))))
        of_tile = load_if(counts + np.uint64(4 * np.int64(filling.tile)), wanted)
        of_round = load_if(counts + np.uint64(4 * np.int64(tables.first_tile[filling.round])), wanted)
        in_round = np.int64(filling.round) * (dims.blocks + 1) + b
        of_block = load_if(np.uint64(address_of(tables.first_slot) + np.uint64(4 * in_round)), wanted)
        # `product` says in which order terms of 32 bits across K are loaded.
        token = term_of_row_(np.int32(thread >> 3)) if wide else np.int32(thread >> 3)
        rows = np.uint64(address_of(tables.row_of) + np.uint64(4 * (b * SURVIVOR_BLOCK + token)))
        step = np.uint64(4 * ROWS_AT_ONCE)
        return Blocks(
            slot_0=slots[0], slot_1=slots[1], slot_2=slots[2], slot_3=slots[3],
            token_1=tokens[0], token_2=tokens[1], token_3=tokens[2], word=word, left=left,
            next_bits_0=np.uint32(bits[0]), next_bits_1=np.uint32(bits[1]),
            next_bits_2=np.uint32(bits[2]), next_bits_3=np.uint32(bits[3]),
            next_slot=np.int32(filling.slot + np.int32(of_block) + np.int32(of_tile) - np.int32(of_round)),
            next_token_0=np.int32(load_if(rows, wanted)),
            next_token_1=np.int32(load_if(rows + step, wanted)),
            next_token_2=np.int32(load_if(rows + np.uint64(2) * step, wanted)),
            next_token_3=np.int32(load_if(rows + np.uint64(3) * step, wanted)),
        )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def begin_d_c(filling: Any, workspace: Any, tables: Any, dims: Any, thread: Any, units: Any) -> Any:
        left = np.uint32(0)
        if units > 0:
            left = np.uint32(tables.needed[np.int64(filling.tile) * dims.block_words])
        return look_up((none, none, none, none), (none, none, none), np.int32(0), left, filling, tables, dims, thread)

    @cuda.jit(device=True, forceinline=True)
    def slot_of(bits: Any, before: Any, bit: Any) -> Any:
        """The slot of the column of a bit, where `before` is that of the word's first; -1 if the column does not survive."""
        below = np.uint32((np.uint32(1) << bit) - np.uint32(1))
        slot = np.int32(before + cuda.popc(np.uint32(bits & below)))
        return slot if (bits >> bit) & np.uint32(1) != 0 else none

    @cuda.jit(device=True, forceinline=True)
    def fill_d_c(
        state: Any, unit: Any, stage: Any, filling: Any, workspace: Any, tables: Any, dims: Any, thread: Any, units: Any
    ) -> Any:  # fmt: skip
        # A unit is a part of a block; the first of its parts begins the next block.
        part = np.int32(unit & last_part)
        slots = (state.slot_0, state.slot_1, state.slot_2, state.slot_3)
        rows = (state.token_2, state.token_3)
        if wide:
            token = state.token_1 if part == 1 else state.token_2 if part == 2 else state.token_3
            rows = (token, token)
        if part == 0:
            bit = np.uint32(thread >> 3)  # the thread's rows are 32 apart: a column of each word
            first_1 = np.int32(state.next_slot + cuda.popc(state.next_bits_0))
            first_2 = np.int32(first_1 + cuda.popc(state.next_bits_1))
            first_3 = np.int32(first_2 + cuda.popc(state.next_bits_2))
            slots = (
                slot_of(state.next_bits_0, state.next_slot, bit),
                slot_of(state.next_bits_1, first_1, bit),
                slot_of(state.next_bits_2, first_2, bit),
                slot_of(state.next_bits_3, first_3, bit),
            )
            rows = (state.next_token_0, state.next_token_1)
        place = np.uint32(stage + place_of(thread))
        source = np.uint64(workspace.g + np.uint64(ROW_BYTES * part + 16 * (thread & 7)))
        memory.copy_async_16_of_row(place, source, slots[0], g_row_bytes)
        memory.copy_async_16_of_row(np.uint32(place + np.uint32(ROWS_BYTES)), source, slots[1], g_row_bytes)
        memory.copy_async_16_of_row(np.uint32(place + np.uint32(2 * ROWS_BYTES)), source, slots[2], g_row_bytes)
        memory.copy_async_16_of_row(np.uint32(place + np.uint32(3 * ROWS_BYTES)), source, slots[3], g_row_bytes)
        fill_b_across(stage, rows, filling.e, filling, thread)
        if part == 0:
            others = (state.next_token_1, state.next_token_2, state.next_token_3)
            state = look_up(slots, others, state.word, state.left, filling, tables, dims, thread)
        return state

    return SimpleNamespace(
        logits=SimpleNamespace(begin=begin_logits, fill=fill_logits),
        d_e=SimpleNamespace(begin=begin_d_e, fill=fill_d_e),
        d_c=SimpleNamespace(begin=begin_d_c, fill=fill_d_c),
    )


assert COLUMN_TILE == 4 * ROWS_AT_ONCE, "a thread has one column of each word of a tile's survivor bits"
