"""The scheduling warp: takes jobs, works out what they are, and describes them to the CTA's other warps."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.jobs import D_C, D_E, END, LOGITS, make_job_ring
from cce_numba.hopper.backward.records import WORD, Extent, Job, Round
from cce_numba.hopper.backward.tiles import BUFFERS, LARGE_BUFFERS, BackwardTiles
from cce_numba.ptx import memory
from cce_numba.tensor_core.backward.lists import expand, largest_at_most, listed_place
from cce_numba.tensor_core.backward.phases import (
    has_jobs_for,
    is_of_products,
    phase_of_logits,
    phase_of_products,
    round_of,
    wait_for_blocks,
    wait_for_phase,
)
from cce_numba.tensor_core.numbers import make_load
from cce_numba.tensor_core.schedule import quotient
from cce_numba.tensor_core.sums import warp_sum
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP, LIST_TILE

GROUP = np.int32(12)  # rows of tiles whose jobs run at about the same time (benchmarks/NOTES.md)

_LIST_TILE, _K_STEP = np.int32(LIST_TILE), np.int32(K_STEP)

# In this file `tables` is the survey's `Tables`; `dims`, `round_` and `extent` are a `Dimensions`, a `Round` and an `Extent` of
# `records`; `lane` is 0 to 31; `index` is the number of a job among those of its phase that are of its kind.


@cuda.jit(device=True, forceinline=True)
def in_groups(index: Any, rows: Any, of_row: Any) -> Any:
    """`(row, place)` of job `index` of rows * of_row jobs: their order, by which jobs that run together share their operands.

    Rows are taken GROUP at a time. Of these, jobs of the same place follow each other. If each row has evenly many jobs, two
    neighbours of a row do, which a cluster takes: the two multiply the same A.
    """
    pair = np.int32(2 - (of_row & 1))
    first = np.int32(quotient(index, np.int32(GROUP * of_row)) * GROUP)
    at_once = np.int32(pair * min(GROUP, np.int32(rows - first)))
    index = np.int32(index - first * of_row)
    pairs = quotient(index, at_once)
    index = np.int32(index - pairs * at_once)
    row = quotient(index, pair)
    return np.int32(first + row), np.int32(pair * pairs + index - pair * row)


@cuda.jit(device=True, forceinline=True)
def kept_tile(first_column: Any, rank: Any, workspace: Any) -> Any:
    """The number among those of its block of the tile that begins with a column, if the forward kept its logits; else -1.

    A cluster's CTAs take neighbouring tiles, and equally many stages for them. So both were kept, or both are computed again.
    """
    first_of_pair = np.int32(first_column - LIST_TILE * rank)
    tile = quotient(first_of_pair, _LIST_TILE)
    is_kept = tile * _LIST_TILE == first_of_pair and tile + 1 < workspace.kept_tiles
    return np.int32(tile + rank if is_kept else -1)


@functools.cache
def make_logits_job(keeps: bool) -> Any:
    """The device function `logits_job`; keeps: whether the forward may have kept logits (`tensor_core.kept`)."""

    @cuda.jit(device=True, forceinline=True)
    def logits_job(
        index: Any, round_: Any, rank: Any, lane: Any, extent: Any, k_steps: Any, tables: Any, workspace: Any, dims: Any
    ) -> Any:  # fmt: skip
        """By a warp: `(job, columns, skipped)` of a job of the phase G(r).

        The job, a `Job`, passes over `skipped` columns of a block's list, and computes the logits of the next `columns`. The
        last job of a phase may have no columns: it is there because a cluster takes two jobs at a time.

        rank: of this CTA in its cluster. k_steps: stages that a sum over the hidden size takes.
        """
        before, first_job, t0, t1 = tables.before, tables.first_job, round_.first_tile, round_.end_tile
        row = np.int64(round_.number) * (dims.blocks + 1)
        of_block = np.int32(first_job[row + 1])  # jobs of the first block
        in_pairs = extent.is_dense and of_block % 2 == 0 and first_job[row + extent.n_blocks] == of_block * extent.n_blocks
        if in_pairs:
            block, place = in_groups(index, extent.n_blocks, of_block)
            index = np.int32(block * of_block + place)
        block = largest_at_most(first_job, row, extent.n_blocks, index, lane)
        skipped = np.int32(LIST_TILE * (index - first_job[row + block]))
        counts = np.int64(block) * (dims.column_tiles + 1)
        n_list = np.int32(before[counts + t1] - before[counts + t0])
        columns = max(np.int32(0), min(_LIST_TILE, np.int32(n_list - skipped)))
        rounded = np.int32((n_list + K_STEP - 1) // K_STEP * K_STEP)
        stored = max(np.int32(0), min(_LIST_TILE, np.int32(rounded - skipped)))
        if rank == 0:
            shares_a = block + 1 == extent.n_blocks or index + 1 < first_job[row + block + 1]
        else:
            shares_a = index > first_job[row + block]
        first_column, kept = np.int32(round_.first_column + skipped), np.int32(-1)
        if keeps and in_pairs:
            kept = kept_tile(first_column, rank, workspace)
            if kept >= 0:
                k_steps = np.int32(0)
        job = Job(
            kind=LOGITS,
            k_steps=k_steps,
            block_or_tile=block,
            d0=np.int32(0),
            stored=stored,
            slot=np.int32(round_.first_slot + tables.first_slot[row + block] + skipped),
            first_column=first_column,
            shares_a=shares_a,
            kept=kept,
        )
        return job, columns, skipped

    return logits_job


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


@cuda.jit(device=True, forceinline=True)
def publish_list(ids: Any, columns: Any, stored: Any, slot: Any, lane: Any, lists: Any) -> None:
    """By a warp: lists the vocabulary entries of `stored` slots, by which other CTAs multiply G by rows of c.

    ids: address in shared memory of (columns,) int32, the entries. lists: address of `Workspace.lists`. Slots past the list's
    end hold zeros, and get the list's last entry: its row of c takes part anyway, and zero times that row is NaN only if the
    row makes NaNs anyway.
    """
    cuda.syncwarp()
    last = np.int32(columns - 1)
    for at in range(lane, stored, 32):
        entry = memory.load_shared_i32(np.uint32(ids + np.uint32(4 * (at if at < last else last))))
        memory.store_global_u32(lists + np.uint64(4 * np.int64(listed_place(slot + at))), np.uint32(entry))


@cuda.jit(device=True, forceinline=True)
def d_c_job(index: Any, round_: Any, lane: Any, extent: Any, tiles_of_row: Any, tables: Any, dims: Any) -> Any:
    """By a warp: the `Job` of a job of the phase P(r) that computes dC. Each tile of columns takes `tiles_of_row` jobs.

    Jobs of empty tiles write zeros, and keep the memory busy but not the tensor cores. So they are spread evenly among the
    others.
    """
    live, empty, block_words = np.int32(round_.end_tile - round_.first_tile), round_.empty_tiles, dims.block_words
    i, place = in_groups(index, np.int32(live + empty), tiles_of_row)  # of the round's tiles, live and empty
    d0 = np.int32(place * LIST_TILE)
    empties = np.int32(np.int64(i) * empty // (live + empty))  # before this tile
    k_steps = np.int32(0)
    if np.int64(i + 1) * empty // (live + empty) > empties:
        tile = np.int32(dims.column_tiles - extent.empty_tiles + round_.first_empty + empties)
    else:
        tile = np.int32(round_.first_tile + i - empties)
        for word in range(lane, block_words, 32):
            k_steps = np.int32(k_steps + 2 * cuda.popc(tables.needed[np.int64(tile) * block_words + word]))
        k_steps = warp_sum(k_steps)
    return Job(
        kind=D_C,
        k_steps=k_steps,
        block_or_tile=tile,
        d0=d0,
        stored=np.int32(0),
        slot=round_.first_slot,
        first_column=round_.first_column,
        shares_a=True,
        kept=np.int32(-1),
    )


@cuda.jit(device=True, forceinline=True)
def d_e_job(index: Any, round_: Any, extent: Any, tiles_of_row: Any, tables: Any, dims: Any) -> Any:
    """The `Job` of a job of the phase P(r) that adds to dE. Each block of tokens takes `tiles_of_row` jobs."""
    before = tables.before
    block, place = in_groups(index, extent.n_blocks, tiles_of_row)
    d0 = np.int32(place * LIST_TILE)
    counts = np.int64(block) * (dims.column_tiles + 1)
    columns = np.int32(before[counts + round_.end_tile] - before[counts + round_.first_tile])
    first_slot = tables.first_slot[np.int64(round_.number) * (dims.blocks + 1) + block]
    return Job(
        kind=D_E,
        k_steps=quotient(columns + K_STEP - 1, _K_STEP),
        block_or_tile=block,
        d0=d0,
        stored=np.int32(0),
        slot=np.int32(round_.first_slot + first_slot),
        first_column=round_.first_column,
        shares_a=True,
        kept=np.int32(-1),
    )


@functools.cache
def make_schedule(tiles: BackwardTiles, dtype: np.dtype, keeps: bool) -> Any:
    """The device function of the scheduling warp; keeps: see `make_logits_job`."""
    logits_job = make_logits_job(keeps)
    ring = make_job_ring(tiles)
    take, wait_empty, publish, describe, set_field = ring.take, ring.wait_empty, ring.publish, ring.describe, ring.set_field
    columns_smem, bias_smem = ring.columns_smem, ring.bias_smem
    load_narrow, load_wide = make_load(dtype), make_load(np.dtype(np.float32))

    @cuda.jit(device=True, forceinline=True)
    def write_columns(
        jobs: Any, s: Any, columns: Any, first_column: Any, lane: Any, is_dense: Any, terms: Any, order: Any
    ) -> None:  # fmt: skip
        """By a warp: writes the vocabulary entries and the biases of the columns of job s; -1 and 0 past the list's end.

        The entries take the place of the columns' numbers, as sorted, which `find_survivors` wrote. In a dense problem nobody
        wrote these: the columns are first_column and those after it, and their numbers are the entries.

        columns: how many there are. terms: a `LogitTerms`. order: pointer to the survey's table.
        """
        ids = columns_smem(jobs, s)
        for q in range(LIST_TILE // 32):
            position = np.int32(32 * q + lane)
            v = np.int32(-1)
            if position < columns:
                v = np.int32(first_column + position)
                if not is_dense:
                    v = order[memory.load_shared_i32(np.uint32(ids + np.uint32(4 * position)))]
            memory.store_shared_i32(np.uint32(ids + np.uint32(4 * position)), np.int32(v))
            b = np.float32(0)
            if v >= 0 and terms.bias_bytes == 4:
                b = load_wide(terms.bias + np.uint64(4 * v))
            elif v >= 0 and terms.bias_bytes == 2:
                b = load_narrow(terms.bias + np.uint64(2 * v))
            memory.store_shared_f32(np.uint32(bias_smem(jobs, s) + np.uint32(4 * position)), b)

    @cuda.jit(device=True, forceinline=True)
    def schedule(
        jobs: Any, lane: Any, rank: Any, terms: Any, n_blocks: Any, tables: Any, runs: Any, workspace: Any, outputs: Any,
        dims: Any, k_teacher: Any,
    ) -> None:  # fmt: skip
        """By a warp: takes and describes jobs until none is left, then describes that.

        jobs: address of the job ring. rank: of this CTA in its cluster. terms: a `LogitTerms`. n_blocks: of listed tokens.
        runs: see `phases.has_jobs_for`. k_teacher: stages that a job LOGITS takes beside those of its own product.
        """
        done, done_e, phase_end, buffers = workspace.done, workspace.done_e, tables.phase_end, np.int32(BUFFERS)
        d_tiles_c, d_tiles_e = outputs.c.tiles, tables.d_tiles_e[0]
        zero_fill = d_tiles_c > 0 and not outputs.adds
        k_steps_d = np.int32(k_teacher + quotient(dims.D + K_STEP - 1, _K_STEP))
        rounds, is_dense, live_tiles = tables.n_rounds[0], tables.dense[0] != 0, tables.n_live_tiles[0]
        n_borrowed, slots = tables.n_borrowed[0], workspace.buffer_slots
        if is_dense and d_tiles_e > 0:
            buffers, slots = np.int32(LARGE_BUFFERS), workspace.large_slots
        empty_tiles = np.int32(0)
        if zero_fill:
            empty_tiles = np.int32(dims.column_tiles - live_tiles)
        extent = Extent(n_blocks=n_blocks, rounds=rounds, empty_tiles=empty_tiles, is_dense=is_dense)
        phase, phase_first, entered, e_jobs = np.int32(0), np.int32(0), np.int32(-1), np.int32(n_blocks * d_tiles_e)
        s, use = np.uint32(0), np.uint32(0)
        has_jobs = has_jobs_for(runs, is_dense)
        while has_jobs:
            number = take(jobs, s, workspace.next_job, rank, lane)
            while phase < 2 * rounds and number >= phase_end[phase]:
                phase_first = phase_end[phase]
                phase = np.int32(phase + 1)
            wait_empty(jobs, s)
            if phase >= 2 * rounds:
                break
            index = np.int32(number - phase_first)
            are_products = is_of_products(phase, rounds)
            r = round_of(phase, rounds, are_products)
            if phase != entered:
                if lane == 0:
                    if are_products:
                        wait_for_phase(phase_of_logits(r), np.int32(0), phase_end, done)
                    elif r >= buffers:
                        wait_for_phase(phase_of_products(np.int32(r - buffers), rounds), e_jobs, phase_end, done)
                cuda.syncwarp()
                if are_products and r >= n_borrowed and n_borrowed > 0:  # it may write rows of dC that held G
                    if lane == 0:
                        wait_for_phase(phase_of_products(np.int32(n_borrowed - 1), rounds), e_jobs, phase_end, done)
                    wait_for_blocks(np.int32(0), n_blocks, np.int32(n_borrowed * d_tiles_e), done_e, lane)
                if not are_products and r >= buffers and not is_dense:
                    wait_for_blocks(np.int32(0), n_blocks, np.int32((r - buffers + 1) * d_tiles_e), done_e, lane)
                entered = phase
            first_tile, end_tile = tables.first_tile[r], tables.first_tile[r + 1]
            first_slot = np.int32((r % buffers) * (workspace.borrowed_slots if r < n_borrowed else slots))
            first_column = np.int32(COLUMN_TILE * first_tile)
            if not are_products:
                round_ = Round(
                    number=r, phase=phase, first_tile=first_tile, end_tile=end_tile, first_slot=first_slot,
                    first_column=first_column, first_empty=np.int64(0), empty_tiles=np.int32(0),
                )  # fmt: skip
                job, columns, skipped = logits_job(index, round_, rank, lane, extent, k_steps_d, tables, workspace, dims)
                if is_dense and r >= buffers:
                    block = job.block_or_tile
                    wait_for_blocks(block, np.int32(block + 1), np.int32((r - buffers + 1) * d_tiles_e), done_e, lane)
                ids = columns_smem(jobs, s)
                if not is_dense and columns > 0:
                    find_survivors(ids, columns, skipped, job.block_or_tile, round_, lane, tables, dims)
                write_columns(jobs, s, columns, job.first_column, lane, is_dense, terms, tables.order)
                if d_tiles_e > 0 and not is_dense:
                    publish_list(ids, columns, job.stored, job.slot, lane, workspace.lists)
            else:
                live, empty, first_empty = np.int32(end_tile - first_tile), np.int32(0), np.int64(0)
                if d_tiles_c > 0:
                    first_empty = np.int64(empty_tiles) * r // rounds
                    empty = np.int32(np.int64(empty_tiles) * (r + 1) // rounds - first_empty)
                round_ = Round(
                    number=r, phase=phase, first_tile=first_tile, end_tile=end_tile, first_slot=first_slot,
                    first_column=first_column, first_empty=first_empty, empty_tiles=empty,
                )  # fmt: skip
                n_d_c = np.int32((live + empty) * d_tiles_c)
                if index < n_d_c:
                    job = d_c_job(index, round_, lane, extent, d_tiles_c, tables, dims)
                else:
                    job = d_e_job(np.int32(index - n_d_c), round_, extent, d_tiles_e, tables, dims)
                    block = job.block_or_tile
                    wait_for_blocks(block, np.int32(block + 1), np.int32(r * d_tiles_e), done_e, lane)  # the sums so far
            if lane == 0:
                describe(jobs, s, job, use, round_, rounds)
            publish(jobs, s)
            use = np.uint32(use + np.uint32(job.k_steps))
            s = np.uint32(s + np.uint32(1))
        # Two entries say that there is no further job, one for each consumer. All others stop at the first.
        for _ in range(2):
            wait_empty(jobs, s)
            if lane == 0:
                set_field(jobs, s, WORD.kind, END)
            publish(jobs, s)
            s = np.uint32(s + np.uint32(1))

    return schedule
