"""A warp takes jobs off the queue, works out what they are, and describes them to the CTA's other warps in shared memory.

The jobs of all phases are numbered, in the order of the phases, and CTAs take the numbers in order. Within a phase each tile of
the result has one job, and the phases that add to a tile of dE follow each other. So sums are made in the same order in every
run, whichever CTAs make them. A CTA waits for jobs with lower numbers alone, which others have taken before.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ampere.backward.records import WORD, Round
from cce_numba.ampere.backward.tiles import HEADER_WORDS
from cce_numba.ampere.elements import elements_of
from cce_numba.ptx import memory
from cce_numba.tensor_core.backward.lists import expand, largest_at_most
from cce_numba.tensor_core.backward.phases import is_of_products, phase_of_logits, phase_of_products, round_of
from cce_numba.tensor_core.numbers import make_load
from cce_numba.tensor_core.schedule import quotient
from cce_numba.tensor_core.sums import warp_sum
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP, LIST_TILE

# Kinds of jobs: G of some columns of a list; a tile of dE, of dC; and no job any more.
LOGITS, D_E, D_C, END = np.int32(0), np.int32(1), np.int32(2), np.int32(3)

_LIST_TILE, _K_STEP = np.int32(LIST_TILE), np.int32(K_STEP)
_IDS, _BIASES, _ROWS = 4 * HEADER_WORDS, 4 * (HEADER_WORDS + LIST_TILE), 4 * (HEADER_WORDS + 2 * LIST_TILE)

# In this file `tables` is the survey's `Tables`; `dims` and `round_` are a `Dimensions` and a `Round` of `records`; `lane` is 0
# to 31; `job` is the shared address of the job's description; `index` is the number of a job among those of its phase that are
# of its kind.


@cuda.jit(device=True, forceinline=True)
def ids_smem(job: Any) -> Any:
    """Address of (192,) int32: the vocabulary entries of the job's columns, -1 past the list's end."""
    return np.uint32(job + np.uint32(_IDS))


@cuda.jit(device=True, forceinline=True)
def biases_smem(job: Any) -> Any:
    """Address of (192,) float32: the biases of the job's columns."""
    return np.uint32(job + np.uint32(_BIASES))


@cuda.jit(device=True, forceinline=True)
def rows_smem(job: Any) -> Any:
    """Address of (128,) int32: the rows of e of the job's block, -1 for those without weight."""
    return np.uint32(job + np.uint32(_ROWS))


@cuda.jit(device=True, forceinline=True)
def field(job: Any, word: Any) -> Any:
    """A word of a job's header, an int32: `field(job, WORD.kind)`."""
    return np.int32(memory.load_shared_i32(np.uint32(job + np.uint32(4 * word))))


@cuda.jit(device=True, forceinline=True)
def set_field(job: Any, word: Any, value: Any) -> None:
    """Writes a word of a job's header, an int32."""
    memory.store_shared_i32(np.uint32(job + np.uint32(4 * word)), np.int32(value))


@cuda.jit(device=True, forceinline=True)
def wait_for_phase(phase: Any, phase_end: Any, done: Any, lane: Any) -> None:
    """By a warp: waits until all jobs of the phase are done and what they wrote is visible.

    phase_end: pointer to the survey's table. done: address of the counters of jobs that are done.
    """
    if lane == 0:
        expected = phase_end[phase]
        if phase > 0:
            expected -= phase_end[phase - 1]
        while np.int32(memory.load_acquire_u32(done + np.uint64(4 * phase))) < expected:
            cuda.nanosleep(np.uint32(100))
    cuda.syncwarp()


@cuda.jit(device=True, forceinline=True)
def find_survivors(
    ids: Any, columns: Any, skipped: Any, block: Any, round_: Any, lane: Any, tables: Any, dims: Any
) -> None:  # fmt: skip
    """By a warp: passes over `skipped` columns of the block's list, and writes the numbers, as sorted, of `columns` more.

    ids: address in shared memory of (columns,) int32.
    """
    before, t0, t1 = tables.before, round_.first_tile, round_.end_tile
    counts = np.int64(block) * (dims.column_tiles + 1)
    ordinal = np.int32(before[counts + t0] + skipped)
    tile = np.int32(t0 + largest_at_most(before, counts + t0, t1 - t0, ordinal, lane))
    words = np.int64(block) * (4 * dims.column_tiles)
    ordinal = np.int32(ordinal - before[counts + tile])
    expand(ids, columns, ordinal, tables.bits, words, np.int32(4 * tile), np.int32(4 * t1), lane)
    cuda.syncwarp()


@functools.cache
def make_schedule(dtype: np.dtype) -> Any:
    """The device function of the scheduling warp, for e and c of `dtype`."""
    elements = elements_of(dtype)
    terms_of_stage, parts, steps = np.int32(elements.terms), elements.parts, K_STEP // elements.terms
    load_narrow, load_wide = make_load(dtype), make_load(np.dtype(np.float32))

    @cuda.jit(device=True, forceinline=True)
    def write_columns(job: Any, columns: Any, lane: Any, terms: Any, order: Any) -> None:
        """By a warp: turns columns' numbers, as sorted, into entries, and writes their biases; -1 and 0 past the list's end.

        columns: how many there are. terms: a `LogitTerms`. order: pointer to the survey's table.
        """
        ids = ids_smem(job)
        for q in range(LIST_TILE // 32):
            position = np.int32(32 * q + lane)
            v = np.int32(-1)
            if position < columns:
                v = np.int32(order[memory.load_shared_i32(np.uint32(ids + np.uint32(4 * position)))])
            memory.store_shared_i32(np.uint32(ids + np.uint32(4 * position)), v)
            b = np.float32(0)
            if v >= 0 and terms.bias_bytes == 4:
                b = load_wide(terms.bias + np.uint64(4 * np.int64(v)))
            elif v >= 0 and terms.bias_bytes == 2:
                b = load_narrow(terms.bias + np.uint64(2 * np.int64(v)))
            memory.store_shared_f32(np.uint32(biases_smem(job) + np.uint32(4 * position)), b)

    @cuda.jit(device=True, forceinline=True)
    def publish_list(job: Any, columns: Any, stored: Any, slot: Any, lane: Any, lists: Any) -> None:
        """By a warp: lists the vocabulary entries of `stored` slots, by which other CTAs multiply G by rows of c.

        Slots past the list's end hold zeros, and get the list's last entry: its row of c takes part anyway, and zero times that
        row is NaN only if the row makes NaNs anyway. lists: address of `Workspace.lists`.
        """
        cuda.syncwarp()
        last = np.int32(columns - 1)
        for at in range(lane, stored, 32):
            entry = memory.load_shared_i32(np.uint32(ids_smem(job) + np.uint32(4 * (at if at < last else last))))
            memory.store_global_u32(lists + np.uint64(4 * np.int64(slot + at)), np.uint32(entry))

    @cuda.jit(device=True, forceinline=True)
    def describe_logits(
        job: Any, index: Any, round_: Any, lane: Any, n_blocks: Any, terms: Any, tables: Any, lists: Any, dims: Any
    ) -> None:  # fmt: skip
        """By a warp: describes a job of the phase G(r). lists: address of `Workspace.lists`, 0 if nobody reads them.

        The last job of a phase may have no columns: the survey makes their number even.
        """
        before, first_job, t0, t1 = tables.before, tables.first_job, round_.first_tile, round_.end_tile
        row = np.int64(round_.number) * (dims.blocks + 1)
        block = largest_at_most(first_job, row, n_blocks, index, lane)
        skipped = np.int32(LIST_TILE * (index - first_job[row + block]))
        counts = np.int64(block) * (dims.column_tiles + 1)
        n_list = np.int32(before[counts + t1] - before[counts + t0])
        columns = max(np.int32(0), min(_LIST_TILE, np.int32(n_list - skipped)))
        rounded = np.int32((n_list + K_STEP - 1) // K_STEP * K_STEP)
        stored = max(np.int32(0), min(_LIST_TILE, np.int32(rounded - skipped)))
        slot = np.int32(round_.first_slot + tables.first_slot[row + block] + skipped)
        if columns > 0:
            find_survivors(ids_smem(job), columns, skipped, block, round_, lane, tables, dims)
        write_columns(job, columns, lane, terms, tables.order)
        if lists != 0 and columns > 0:
            publish_list(job, columns, stored, slot, lane, lists)
        for i in range(lane, COLUMN_TILE, 32):
            token = tables.row_of[np.int64(block) * COLUMN_TILE + i]
            memory.store_shared_i32(np.uint32(rows_smem(job) + np.uint32(4 * i)), np.int32(token))
        if lane == 0:
            set_field(job, WORD.kind, LOGITS)
            set_field(job, WORD.units, quotient(dims.D + terms_of_stage - 1, terms_of_stage) if columns > 0 else np.int32(0))
            set_field(job, WORD.block_or_tile, block)
            set_field(job, WORD.stored, stored)
            set_field(job, WORD.slot, slot)

    @cuda.jit(device=True, forceinline=True)
    def describe_d_c(
        job: Any, index: Any, round_: Any, lane: Any, tiles_of_row: Any, first_empty_tile: Any, empty: Any, tables: Any,
        dims: Any,
    ) -> None:  # fmt: skip
        """By a warp: describes a job of the phase P(r) that computes dC. Each tile of columns takes `tiles_of_row` jobs.

        Jobs of the `empty` tiles from first_empty_tile on write zeros, and keep the memory busy but not the tensor cores. So
        they are spread evenly among the others.
        """
        live, block_words = np.int32(round_.end_tile - round_.first_tile), dims.block_words
        i = quotient(index, tiles_of_row)  # of the round's tiles, live and empty
        d0 = np.int32((index - i * tiles_of_row) * LIST_TILE)
        empties = np.int32(np.int64(i) * empty // (live + empty))  # before this tile
        units = np.int32(0)
        if np.int64(i + 1) * empty // (live + empty) > empties:
            tile = np.int32(first_empty_tile + empties)
        else:
            tile = np.int32(round_.first_tile + i - empties)
            for word in range(lane, block_words, 32):
                units = np.int32(units + parts * cuda.popc(tables.needed[np.int64(tile) * block_words + word]))
            units = warp_sum(units)
        if lane == 0:
            set_field(job, WORD.kind, D_C)
            set_field(job, WORD.units, units)
            set_field(job, WORD.block_or_tile, tile)
            set_field(job, WORD.d0, d0)
            set_field(job, WORD.slot, round_.first_slot)

    @cuda.jit(device=True, forceinline=True)
    def describe_d_e(job: Any, index: Any, round_: Any, lane: Any, tiles_of_row: Any, tables: Any, dims: Any) -> None:
        """Describes a job of the phase P(r) that adds to dE. Each block of tokens takes `tiles_of_row` jobs."""
        before = tables.before
        block = quotient(index, tiles_of_row)
        counts = np.int64(block) * (dims.column_tiles + 1)
        columns = np.int32(before[counts + round_.end_tile] - before[counts + round_.first_tile])
        first_slot = tables.first_slot[np.int64(round_.number) * (dims.blocks + 1) + block]
        if lane == 0:
            set_field(job, WORD.kind, D_E)
            set_field(job, WORD.units, np.int32(steps * quotient(columns + K_STEP - 1, _K_STEP)))
            set_field(job, WORD.block_or_tile, block)
            set_field(job, WORD.d0, np.int32((index - block * tiles_of_row) * LIST_TILE))
            set_field(job, WORD.slot, np.int32(round_.first_slot + first_slot))

    @cuda.jit(device=True, forceinline=True)
    def schedule(
        job: Any, number: Any, lane: Any, terms: Any, n_blocks: Any, tables: Any, workspace: Any, outputs: Any, dims: Any
    ) -> None:  # fmt: skip
        """By a warp: describes the job of that number, once all that it needs is there; END if there is no such job.

        `begin` must have been called before the first job. terms: a `LogitTerms`. n_blocks: of listed tokens.
        """
        done, phase_end, buffers = workspace.done, tables.phase_end, workspace.buffers
        d_tiles_c, d_tiles_e, rounds = outputs.c.tiles, tables.d_tiles_e[0], tables.n_rounds[0]
        before = field(job, WORD.phase)
        phase = before
        while phase < 2 * rounds and number >= phase_end[phase]:
            phase = np.int32(phase + 1)
        if phase >= 2 * rounds:
            if lane == 0:
                set_field(job, WORD.kind, END)
            cuda.syncwarp()
            return
        phase_first = np.int32(0)
        if phase > 0:
            phase_first = phase_end[phase - 1]
        index, are_products = np.int32(number - phase_first), is_of_products(phase, rounds)
        r, added = round_of(phase, rounds, are_products), field(job, WORD.added)
        if phase != before or number == 0:
            if are_products:
                wait_for_phase(phase_of_logits(r), phase_end, done, lane)
            elif r >= buffers:
                wait_for_phase(phase_of_products(np.int32(r - buffers), rounds), phase_end, done, lane)
        round_ = Round(
            number=r, first_tile=tables.first_tile[r], end_tile=tables.first_tile[r + 1],
            first_slot=np.int32((r % buffers) * workspace.buffer_slots),
        )  # fmt: skip
        if not are_products:
            lists = workspace.lists if d_tiles_e > 0 else np.uint64(0)
            describe_logits(job, index, round_, lane, n_blocks, terms, tables, lists, dims)
        else:
            empty_tiles, empty, first_empty = np.int32(0), np.int32(0), np.int64(0)
            if d_tiles_c > 0 and outputs.adds == 0:
                empty_tiles = np.int32(dims.column_tiles - tables.n_live_tiles[0])
                first_empty = np.int64(empty_tiles) * r // rounds
                empty = np.int32(np.int64(empty_tiles) * (r + 1) // rounds - first_empty)
            n_d_c = np.int32((round_.end_tile - round_.first_tile + empty) * d_tiles_c)
            if index < n_d_c:
                first_empty_tile = np.int32(dims.column_tiles - empty_tiles + first_empty)
                describe_d_c(job, index, round_, lane, d_tiles_c, first_empty_tile, empty, tables, dims)
            else:
                if r > added:
                    # These jobs go on from the sums of the round before. Jobs that compute dC need not wait for it.
                    wait_for_phase(phase_of_products(np.int32(r - 1), rounds), phase_end, done, lane)
                    added = r
                describe_d_e(job, np.int32(index - n_d_c), round_, lane, d_tiles_e, tables, dims)
        if lane == 0:
            set_field(job, WORD.phase, phase)
            set_field(job, WORD.round, r)
            set_field(job, WORD.is_first, np.int32(r == 0))
            set_field(job, WORD.is_last, np.int32(r == rounds - 1))
            set_field(job, WORD.added, np.int32(added))
        cuda.syncwarp()

    return schedule


@cuda.jit(device=True, forceinline=True)
def begin(job: Any, lane: Any) -> None:
    """By a warp, before the first job is described."""
    if lane == 0:
        set_field(job, WORD.phase, 0)
        set_field(job, WORD.added, 0)
    cuda.syncwarp()


@cuda.jit(device=True, forceinline=True)
def take(next_job: Any, lane: Any) -> Any:
    """By a warp: the number, in lane 0, of the next job that nobody has taken. next_job: address of the queue's counter."""
    number = np.int32(0)
    if lane == 0:
        number = np.int32(memory.fetch_add_u32(next_job, np.uint32(1)))
    return number
