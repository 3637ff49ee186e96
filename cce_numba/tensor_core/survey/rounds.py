"""The survey's second half: rounds that fit the workspace, where each list goes in its round, and the jobs of each phase."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.kernel import Kernel, kernel_factory
from cce_numba.ptx import memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.records import I32, U64, WeightedTokens
from cce_numba.tensor_core.sums import THREADS, sum_before
from cce_numba.tensor_core.survey.tables import K_STEP, LIST_TILE, Sizes, Tables, tiles_of_dense_round


@kernel_factory
def make_rounds_kernel(fixed_tiles: int = 0) -> Kernel:
    """A CTA for each block sums the block's counts of columns; one more CTA cuts the rounds.

    fixed_tiles: how many tiles a round of a dense survey has, whatever else there is; 0 if as many as there is room for.
    """
    threads, dense_tiles = THREADS, cuda.jit(device=True, forceinline=True)(tiles_of_dense_round)

    @cuda.jit(device=True, forceinline=True)
    def sum_counts(before: Any, row: Any, column_tiles: Any, sums: Any) -> None:
        """By a CTA: replaces each count of a row by the sum of the counts before it, and puts the sum of all after the last.

        before: pointer to (blocks, column_tiles + 1) int32. row: where the block's row begins. sums: see `sum_before`.
        """
        t, so_far = cuda.threadIdx.x, np.int64(0)
        for first in range(0, column_tiles, threads):
            tile = first + t
            earlier, total = sum_before(np.int64(before[row + tile]) if tile < column_tiles else np.int64(0), sums)
            if tile < column_tiles:
                before[row + tile] = so_far + earlier
            so_far += total
        if t == 0:
            before[row + column_tiles] = so_far

    @cuda.jit(device=True, forceinline=True)
    def cut_rounds(d_tiles_e: Any, tables: Any, sizes: Any, sums: Any) -> None:
        """By a CTA: fills n_rounds, n_borrowed and first_tile. sums: see `sum_before`. d_tiles_e: as in `Tables`.

        A tile is in round p // cap, where p is the number of surviving pairs of the tiles before it. No tile has more pairs
        than cap, so each round has tiles. In a dense problem all tiles have equally many, and rounds are cut evenly.
        """
        tile_pairs, first_tile, cap = tables.tile_pairs, tables.first_tile, sizes.cap
        t, so_far, n_live = cuda.threadIdx.x, np.int64(0), tables.n_live_tiles[0]
        if tables.dense[0] != 0:
            blocks = max(np.int64(1), np.int64(tables.n_active[0]))
            tiles, more_tiles = dense_tiles(sizes.dense_cap, blocks), dense_tiles(sizes.borrowed_cap, blocks)
            borrowed = np.int64(0)
            if d_tiles_e != 0:
                tiles = dense_tiles(sizes.large_cap, blocks)
                if fixed_tiles > 0:
                    tiles = fixed_tiles
                elif more_tiles > tiles:
                    borrowed = np.int64(min(sizes.borrowed_tiles, n_live)) // more_tiles
            for round_ in range(t, sizes.rounds_max + 1, threads):
                first = min(round_, borrowed) * more_tiles + max(np.int64(0), round_ - borrowed) * tiles
                first_tile[round_] = min(first, np.int64(n_live))
            if t == 0:
                others = (n_live - borrowed * more_tiles + tiles - 1) // tiles
                tables.n_rounds[0], tables.n_borrowed[0] = max(np.int64(1), borrowed + others), borrowed
            return
        for first in range(0, n_live, threads):
            tile = first + t
            earlier, total = sum_before(np.int64(tile_pairs[tile]) if tile < n_live else np.int64(0), sums)
            if tile < n_live:
                earlier += so_far
                round_ = earlier // cap
                if tile == 0 or (earlier - tile_pairs[tile - 1]) // cap != round_:
                    first_tile[round_] = tile
            so_far += total
        rounds = np.int64(0)
        if n_live > 0:
            rounds = (so_far - tile_pairs[n_live - 1]) // cap + 1
        for round_ in range(rounds + t, sizes.rounds_max + 1, threads):
            first_tile[round_] = n_live
        if t == 0:
            tables.n_rounds[0], tables.n_borrowed[0] = max(rounds, 1), 0

    def rounds_kernel(
        d_tiles_e: Any,  # jobs for the rows of dE of a block
        e_gate: Any,  # address of (1,) int32, or 0: dE takes jobs only if this is not 0
        sizes: Any,
        tables: Any,
    ) -> None:
        """Turns the counts in `before`, which `sort` left there, into sums.

        Fills d_tiles_e, n_rounds, n_borrowed and first_tile.
        """
        sums = cuda.shared.array(32, np.int64)
        b = cuda.blockIdx.x
        if b < sizes.blocks:
            sum_counts(tables.before, b * (sizes.column_tiles + 1), sizes.column_tiles, sums)
        else:
            if e_gate != 0 and memory.load_global_i32(e_gate) == 0:
                d_tiles_e = np.int32(0)
            if cuda.threadIdx.x == 0:
                tables.d_tiles_e[0] = d_tiles_e
            cut_rounds(d_tiles_e, tables, sizes, sums)

    return Kernel(rounds_kernel, (I32, U64, Sizes, Tables), threads=THREADS)


@kernel_factory
def make_slots_kernel() -> Kernel:
    """A CTA for each round."""
    threads, step, list_tile = THREADS, K_STEP, LIST_TILE

    def slots_kernel(sizes: Any, tables: Any) -> None:
        """Fills the rows of first_slot and first_job, as far as there are rounds.

        In a dense problem a block's list has the same slots in all rounds of a buffer's size, those of the first, the longest.
        """
        before, first_slot, first_job = tables.before, tables.first_slot, tables.first_job
        blocks, column_tiles = sizes.blocks, sizes.column_tiles
        sums = cuda.shared.array(32, np.int64)
        t, round_ = cuda.threadIdx.x, cuda.blockIdx.x
        if round_ >= tables.n_rounds[0]:
            return
        first, last, row = tables.first_tile[round_], tables.first_tile[round_ + 1], round_ * (blocks + 1)
        slots, jobs, is_dense = np.int64(0), np.int64(0), tables.dense[0] != 0
        longest = np.int32(0 if round_ < tables.n_borrowed[0] else tables.n_borrowed[0])
        longest_first, longest_last = tables.first_tile[longest], tables.first_tile[longest + 1]
        for first_block in range(0, blocks, threads):
            b, count, room = first_block + t, np.int64(0), np.int64(0)
            if b < blocks:
                count = np.int64(before[b * (column_tiles + 1) + last] - before[b * (column_tiles + 1) + first])
                row_of_block = b * (column_tiles + 1)
                longest_count = np.int64(before[row_of_block + longest_last] - before[row_of_block + longest_first])
                room = longest_count if is_dense else count
            slots_before, slots_here = sum_before((room + step - 1) // step * step, sums)
            jobs_before, jobs_here = sum_before((count + list_tile - 1) // list_tile, sums)
            if b < blocks:
                first_slot[row + b], first_job[row + b] = slots + slots_before, jobs + jobs_before
            slots += slots_here
            jobs += jobs_here
        if t == 0:
            first_slot[row + blocks], first_job[row + blocks] = slots, jobs + jobs % 2  # pairs of CTAs take jobs

    return Kernel(slots_kernel, (Sizes, Tables), threads=THREADS)


@kernel_factory
def make_phases_kernel() -> Kernel:
    """One CTA."""
    threads, block_n = THREADS, SURVIVOR_BLOCK

    def phases_kernel(
        tokens: Any,
        d_tiles_c: Any,  # jobs for the rows of dC of a tile
        zero_fill: Any,  # whether empty tiles take jobs, too
        dense: Any,  # address of (1,) int32, or 0: where to say whether the survey is dense
        sizes: Any,
        tables: Any,
    ) -> None:
        """phase_end = sums of the jobs of the phases, in their order: G(0), G(1), P(0), G(2), P(1), ..., P(last)."""
        first_tile, first_job, phase_end, blocks = tables.first_tile, tables.first_job, tables.phase_end, sizes.blocks
        sums = cuda.shared.array(32, np.int64)
        t, rounds = cuda.threadIdx.x, np.int64(tables.n_rounds[0])
        if t == 0 and dense != 0:
            memory.store_global_u32(dense, np.uint32(tables.dense[0]))
        e_jobs = (tokens.n_valid[0] + block_n - 1) // block_n * tables.d_tiles_e[0]
        n_empty = np.int64(sizes.column_tiles - tables.n_live_tiles[0]) if zero_fill else np.int64(0)
        so_far = np.int64(0)
        for first in range(0, 2 * rounds, threads):
            phase, jobs = first + t, np.int64(0)
            if phase == 0 or (phase % 2 == 1 and phase < 2 * rounds - 1):
                jobs = np.int64(first_job[(phase + 1) // 2 * (blocks + 1) + blocks])
            elif phase < 2 * rounds:
                r = rounds - 1 if phase == 2 * rounds - 1 else phase // 2 - 1
                # Empty tiles are shared out among the rounds evenly.
                tiles = first_tile[r + 1] - first_tile[r] + (r + 1) * n_empty // rounds - r * n_empty // rounds
                jobs = tiles * d_tiles_c + e_jobs
            before, total = sum_before(jobs, sums)
            if phase < 2 * rounds:
                phase_end[phase] = so_far + before + jobs
            so_far += total

    return Kernel(phases_kernel, (WeightedTokens, I32, I32, U64, Sizes, Tables), threads=THREADS)
