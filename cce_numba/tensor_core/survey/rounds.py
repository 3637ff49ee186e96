"""The survey's second half: rounds that fit the workspace, where each block's columns go in them, each phase's jobs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.sums import THREADS, sum_before
from cce_numba.tensor_core.survey.tables import K_STEP, LIST_TILE


@kernel_factory
def make_rounds_kernel() -> Kernel:
    """A CTA for each block's columns, and one for the rounds."""
    threads = THREADS

    @cuda.jit(device=True, forceinline=True)
    def sum_counts(before: Any, row: Any, n_ctiles: Any, sums: Any) -> None:
        """In place of a count for each tile of a row, the sum of the counts before it; after the last, the sum of all."""
        t, so_far = cuda.threadIdx.x, np.int64(0)
        for first in range(0, n_ctiles, threads):
            tile = first + t
            earlier, total = sum_before(np.int64(before[row + tile]) if tile < n_ctiles else np.int64(0), sums)
            if tile < n_ctiles:
                before[row + tile] = so_far + earlier
            so_far += total
        if t == 0:
            before[row + n_ctiles] = so_far

    @cuda.jit(device=True, forceinline=True)
    def cut_rounds(tile_pairs: Any, n_live: Any, cap: Any, rounds_max: Any, n_rounds: Any, first_tile: Any, sums: Any) -> None:
        """A tile is in round T // cap, T the pairs of tiles before it. No tile has more than cap, so no round is empty."""
        t, so_far = cuda.threadIdx.x, np.int64(0)
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
        for round_ in range(rounds + t, rounds_max + 1, threads):
            first_tile[round_] = n_live
        if t == 0:
            n_rounds[0] = max(rounds, 1)

    def rounds_kernel(
        blocks: Any,
        n_ctiles: Any,
        before: Any,  # (blocks, n_ctiles + 1), counts as `sort` leaves them
        tile_pairs: Any,  # (n_ctiles,)
        n_live_tiles: Any,  # (1,)
        cap: Any,
        rounds_max: Any,
        n_rounds: Any,  # (1,)
        first_tile: Any,  # (rounds_max + 1,)
    ) -> None:
        """Fills before, n_rounds and first_tile."""
        sums = cuda.shared.array(32, np.int64)
        b = cuda.blockIdx.x
        if b < blocks:
            sum_counts(before, b * (n_ctiles + 1), n_ctiles, sums)
        else:
            cut_rounds(tile_pairs, n_live_tiles[0], cap, rounds_max, n_rounds, first_tile, sums)

    p_i32, i32 = pointer_to(np.int32), types.int32
    signature = types.void(i32, i32, p_i32, p_i32, p_i32, types.int64, i32, p_i32, p_i32)
    return Kernel(rounds_kernel, signature, threads=THREADS)


@kernel_factory
def make_slots_kernel() -> Kernel:
    """A CTA for each round."""
    threads, step, list_tile = THREADS, K_STEP, LIST_TILE

    def slots_kernel(
        blocks: Any,
        n_ctiles: Any,
        before: Any,  # (blocks, n_ctiles + 1)
        n_rounds: Any,  # (1,)
        first_tile: Any,  # (rounds_max + 1,)
        slot0: Any,  # (rounds_max, blocks + 1)
        first_g: Any,  # (rounds_max, blocks + 1)
    ) -> None:
        """Fills the rows of slot0 and first_g that are rounds."""
        sums = cuda.shared.array(32, np.int64)
        t, round_ = cuda.threadIdx.x, cuda.blockIdx.x
        if round_ >= n_rounds[0]:
            return
        first, last, row = first_tile[round_], first_tile[round_ + 1], round_ * (blocks + 1)
        slots, jobs = np.int64(0), np.int64(0)
        for first_block in range(0, blocks, threads):
            b, count = first_block + t, np.int64(0)
            if b < blocks:
                count = np.int64(before[b * (n_ctiles + 1) + last] - before[b * (n_ctiles + 1) + first])
            slots_before, slots_here = sum_before((count + step - 1) // step * step, sums)
            jobs_before, jobs_here = sum_before((count + list_tile - 1) // list_tile, sums)
            if b < blocks:
                slot0[row + b], first_g[row + b] = slots + slots_before, jobs + jobs_before
            slots += slots_here
            jobs += jobs_here
        if t == 0:
            slot0[row + blocks], first_g[row + blocks] = slots, jobs + jobs % 2  # pairs of CTAs take them

    p_i32, i32 = pointer_to(np.int32), types.int32
    return Kernel(slots_kernel, types.void(i32, i32, p_i32, p_i32, p_i32, p_i32, p_i32), threads=THREADS)


@kernel_factory
def make_phases_kernel() -> Kernel:
    """One CTA."""
    threads, block_n = THREADS, SURVIVOR_BLOCK

    def phases_kernel(
        blocks: Any,
        n_valid: Any,  # (1,)
        n_ctiles: Any,
        n_live_tiles: Any,  # (1,)
        n_rounds: Any,  # (1,)
        first_tile: Any,  # (rounds_max + 1,)
        first_g: Any,  # (rounds_max, blocks + 1)
        d_tiles_c: Any,
        d_tiles_e: Any,
        zero_fill: Any,
        phase_end: Any,  # (2 * rounds_max,)
    ) -> None:
        """phase_end = sums of the jobs of G(0), G(1), P(0), G(2), P(1), ..., P(last): logits of a round, its products."""
        sums = cuda.shared.array(32, np.int64)
        t, rounds = cuda.threadIdx.x, np.int64(n_rounds[0])
        e_jobs = (n_valid[0] + block_n - 1) // block_n * d_tiles_e
        n_dead = np.int64(n_ctiles - n_live_tiles[0]) if zero_fill else np.int64(0)
        so_far = np.int64(0)
        for first in range(0, 2 * rounds, threads):
            phase, jobs = first + t, np.int64(0)
            if phase == 0 or (phase % 2 == 1 and phase < 2 * rounds - 1):
                jobs = np.int64(first_g[(phase + 1) // 2 * (blocks + 1) + blocks])
            elif phase < 2 * rounds:
                r = rounds - 1 if phase == 2 * rounds - 1 else phase // 2 - 1
                # The zeros of tiles without survivors are shared out evenly.
                tiles = first_tile[r + 1] - first_tile[r] + (r + 1) * n_dead // rounds - r * n_dead // rounds
                jobs = tiles * d_tiles_c + e_jobs
            before, total = sum_before(jobs, sums)
            if phase < 2 * rounds:
                phase_end[phase] = so_far + before + jobs
            so_far += total

    p_i32, p_i64, i32 = pointer_to(np.int32), pointer_to(np.int64), types.int32
    signature = types.void(i32, p_i64, i32, p_i32, p_i32, p_i32, p_i32, i32, i32, i32, p_i32)
    return Kernel(phases_kernel, signature, threads=THREADS)
