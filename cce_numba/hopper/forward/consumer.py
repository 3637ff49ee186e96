"""A consumer warpgroup: multiplies a tile while the other consumer folds its own, then they change places."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.forward.work import make_who_am_i, token_at
from cce_numba.hopper.ring import make_ring
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.ptx import arithmetic, control, mbarrier, memory, wgmma
from cce_numba.ptx import fragment as fragments
from cce_numba.ptx.arithmetic import maximum
from cce_numba.ptx.wgmma import SWIZZLE_128B
from cce_numba.tensor_core.fold import (
    NEGATIVE_INFINITY,
    log_add_exp,
    log_sum_exp,
    make_bias_fragment,
    make_fold,
    quad_sum,
    threshold_of,
)
from cce_numba.tensor_core.schedule import NO_SLOT, quotient, segment

# As a bound of the log-sum-exp: its threshold is NaN, which no logit reaches, whatever stands in rows that are nobody's.
OUT_OF_REACH = np.float32(math.inf)


def further_bytes(tiles: HopperTiles) -> int:
    """Of shared memory, after the tiles' own: scales of the tokens, and class weights of each consumer's columns."""
    return 4 * (tiles.block_n + tiles.consumers * tiles.block_v)


def make_consume(
    tiles: HopperTiles, dtype: str, bias_dtype: np.dtype | None, capped: bool, record: bool, scaled: bool, smoothed: bool
) -> Any:
    """The device function of a consumer warpgroup; see `forward.make_lse_kernel`."""
    ring_, fold = make_ring(tiles), make_fold(tiles.block_v)
    stage_of, parity_of, full, turn = ring_.stage_of, ring_.parity_of, ring_.full, ring_.turn
    release, e_smem = ring_.release, ring_.e_smem
    block_n, block_v, ctas = tiles.block_n, tiles.block_v, tiles.cluster
    words = block_v // 32
    mma, zeros = wgmma.mma(block_v, dtype), fragments.zeros(block_v)
    fence, commit_group, wait_all, wait_all_but_one = wgmma.fence, wgmma.commit_group, wgmma.wait_group(0), wgmma.wait_group(1)
    update_rows, mask_padding, cap, survivor_words = fold.update_rows, fold.mask_padding, fold.cap, fold.survivor_words
    scale_rows, add_to_totals, load_shared_f32 = fold.scale_rows, fold.add_to_totals, memory.load_shared_f32
    e_descriptors = np.uint64(tiles.e_bytes >> 4)  # from A to B
    second_half = np.uint64(64 * 128 >> 4)  # rows 64 to 127 of e
    who_am_i = make_who_am_i(tiles)
    has_bias = bias_dtype is not None
    bias_fragment: Any = make_bias_fragment(block_v, bias_dtype) if bias_dtype is not None else None
    both_consumers, stages, consumers = np.uint32(128 * tiles.consumers), np.uint32(tiles.stages), np.int32(tiles.consumers)
    one_consumer, opaque = np.uint32(128), arithmetic.opaque_u32

    @cuda.jit(device=True, forceinline=True)
    def descriptor(address: Any) -> Any:
        return SWIZZLE_128B | np.uint64((np.uint32(address) & np.uint32(0x3FFFF)) >> np.uint32(4))

    @cuda.jit(device=True, forceinline=True)
    def multiply(upper: Any, lower: Any, a: Any, b: Any, accumulate: Any) -> Any:
        """One stage: four products of 16 terms for the upper 64 tokens, and for the lower; k steps of 32 bytes."""
        one = np.uint32(1)
        upper = mma(upper, a, b, accumulate)
        lower = mma(lower, a + second_half, b, accumulate)
        upper = mma(upper, a + np.uint64(2), b + np.uint64(2), one)
        lower = mma(lower, a + second_half + np.uint64(2), b + np.uint64(2), one)
        upper = mma(upper, a + np.uint64(4), b + np.uint64(4), one)
        lower = mma(lower, a + second_half + np.uint64(4), b + np.uint64(4), one)
        upper = mma(upper, a + np.uint64(6), b + np.uint64(6), one)
        lower = mma(lower, a + second_half + np.uint64(6), b + np.uint64(6), one)
        return upper, lower

    @cuda.jit(device=True, forceinline=True)
    def finish_logits(z: Any, scales: Any, column: Any, softcap: Any, V: Any, is_last: Any) -> Any:
        """Products become logits; padding is masked last, so that no bias or cap can lift it.

        scales: shared address of the first row's.
        """
        if scaled:
            z = scale_rows(z, load_shared_f32(scales), load_shared_f32(scales + np.uint32(32)))
        if capped:
            z = cap(z, column, softcap)
        if is_last:
            z = mask_padding(z, column, V)
        return z

    @cuda.jit(device=True, forceinline=True)
    def bound_of(n: Any, tokens: Any, n_valid: Any, target_logit: Any, lse: Any, has_lse: Any) -> Any:
        """A lower bound of the row's final log-sum-exp before any tile is seen; a row past the end flags nothing."""
        if n >= n_valid:
            return OUT_OF_REACH
        token = token_at(tokens, n)
        bound = target_logit[token]
        if has_lse:
            bound = maximum(bound, lse[token])
        return bound

    @cuda.jit(device=True, forceinline=True)
    def set_bits(
        above: Any, below: Any, survivors: Any, block: Any, pitch_words: Any, v_tile: Any, V: Any, lane: Any
    ) -> None:  # fmt: skip
        """By a warp: of the tile's columns that either flags."""
        mine = np.uint32(0)
        for w in range(words):
            bits = control.or_of_warp((above[w] | below[w]) << np.uint32(2 * (lane & 3)))
            if lane == w:
                mine = np.uint32(bits)
        columns: Any = np.int32(V - v_tile * block_v - 32 * lane)
        if columns < 32:
            mine = np.uint32(mine & ((np.uint32(1) << np.uint32(max(columns, 0))) - np.uint32(1)))
        if lane < words and mine != 0:
            # Of an unknown block, or what it gives would be kept in registers that are not there.
            word = np.int64(arithmetic.opaque_i32(np.int32(block))) * pitch_words + v_tile * words + lane
            memory.or_global_u32(survivors + np.uint64(4 * word), mine)

    @cuda.jit(device=True, forceinline=True)
    def keep_weight(weights: Any, i: Any, v0: Any, class_weights: Any, V: Any) -> None:
        """That of the tile's column i, in shared memory; past the last 0."""
        if i < block_v:
            weight = np.float32(1 if v0 + i < V else 0)
            if class_weights != 0 and v0 + i < V:
                weight = memory.load_global_f32(class_weights + np.uint64(4 * (v0 + i)))
            memory.store_shared_f32(weights + np.uint32(4 * i), weight)

    @cuda.jit(device=True, forceinline=True)
    def consume(
        ring: Any, merge_smem: Any, consumer: Any, thread: Any, tokens: Any, n_valid: Any, per_round: Any, target_logit: Any,
        bias: Any, softcap: Any, lse: Any, has_lse: Any, part: Any, survivors: Any, pitch_words: Any, coarse_survivors: Any,
        log_eps: Any, log_coarser: Any, first_v_tile: Any, n_tiles: Any, k_steps: Any, V: Any, logit_scale: Any, smoothing: Any,
    ) -> None:  # fmt: skip
        worker, workers, groups, rank = who_am_i(n_valid)
        lane = np.int32(thread & 31)
        row = np.int32((thread >> 5) * 16 + (lane >> 2))  # and 8, 64, 72 further down
        scales = np.uint32(merge_smem + np.uint32(4 * block_n))  # of the tokens
        weights = np.uint32(scales + np.uint32(4 * block_n) + np.uint32(4 * block_v) * np.uint32(consumer))  # of the columns
        of_rows, own_column = np.uint32(scales + np.uint32(4 * row)), np.int32(2 * (lane & 3))
        upper, lower = zeros(), zeros()
        use, index, turns = np.uint32(0), np.int32(0), np.uint32(0)
        while True:
            group, first, last, step, slot = segment(index, worker, workers, groups, per_round, n_tiles)
            if slot == NO_SLOT:
                break
            n0 = np.int32((group * ctas + rank) * block_n)
            # The rows' running (max, sum). One of all that share the group goes on from where earlier launches came to.
            max_0 = max_1 = max_2 = max_3 = NEGATIVE_INFINITY
            sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
            if has_lse and consumer == 0 and first == 0:
                sum_0 = sum_1 = sum_2 = sum_3 = np.float32(1)
                max_0 = lse[token_at(tokens, min(n0 + row, n_valid - 1))]
                max_1 = lse[token_at(tokens, min(n0 + row + 8, n_valid - 1))]
                max_2 = lse[token_at(tokens, min(n0 + row + 64, n_valid - 1))]
                max_3 = lse[token_at(tokens, min(n0 + row + 72, n_valid - 1))]
            bound_0 = bound_1 = bound_2 = bound_3 = OUT_OF_REACH
            if record:
                bound_0 = bound_of(n0 + row, tokens, n_valid, target_logit, lse, has_lse)
                bound_1 = bound_of(n0 + row + 8, tokens, n_valid, target_logit, lse, has_lse)
                bound_2 = bound_of(n0 + row + 64, tokens, n_valid, target_logit, lse, has_lse)
                bound_3 = bound_of(n0 + row + 72, tokens, n_valid, target_logit, lse, has_lse)
            if scaled:  # in shared memory: there are no registers for them
                if consumer == 0:
                    token = token_at(tokens, min(n0 + thread, n_valid - 1))
                    own_scale = memory.load_global_f32(logit_scale[0] + np.uint64(4 * token))
                    memory.store_shared_f32(scales + np.uint32(4 * thread), own_scale)
                control.barrier_sync(1, both_consumers)
            total_0 = total_1 = total_2 = total_3 = np.float32(0)  # of class weight times logit, in this thread's columns

            n_turns = quotient(last - first + step - 1, step)
            for i in range(consumer, n_turns, consumers):
                v_tile = np.int32(first_v_tile + first + i * step)
                first_use = np.uint32(use + np.uint32(i * k_steps))
                v0 = np.int32(v_tile * block_v)
                column = np.int32(v0 + 2 * (lane & 3))
                if has_bias:  # products are added to it
                    upper = bias_fragment(column, bias, V)
                    # Not a copy, and not from the same addresses: there are no registers to hold either.
                    lower = bias_fragment(arithmetic.opaque_i32(column), bias, V)
                elif scaled or smoothed:  # what was folded would be kept until it is overwritten, in registers that these need
                    upper, lower = zeros(), zeros()
                if smoothed:
                    control.barrier_sync(np.uint32(2 + consumer), one_consumer)  # all have read those of the tile before
                    keep_weight(weights, np.int32(thread), v0, smoothing[0], V)
                    keep_weight(weights, np.int32(thread + 128), v0, smoothing[0], V)
                    control.barrier_sync(np.uint32(2 + consumer), one_consumer)
                if i > 0:
                    mbarrier.wait(turn(ring, consumer), turns & np.uint32(1))
                    turns = np.uint32(turns + np.uint32(1))
                stage, parity = stage_of(first_use), parity_of(first_use)
                for k in range(k_steps):
                    mbarrier.wait(full(ring, stage), parity)
                    a = descriptor(e_smem(ring, stage))
                    fence()
                    upper, lower = multiply(upper, lower, a, a + e_descriptors, np.uint32(1) if has_bias else np.uint32(k))
                    commit_group()
                    wait_all_but_one()
                    if k > 0:
                        release(ring, first_use + np.uint32(k - 1), thread)
                    stage = np.uint32(stage + np.uint32(1))
                    if stage == stages:
                        stage = np.uint32(0)
                        parity = np.uint32(parity ^ np.uint32(1))
                if thread == 0 and i + 1 < n_turns:  # the other's products may queue up behind these
                    mbarrier.arrive(turn(ring, 1 - consumer))
                wait_all()
                release(ring, first_use + np.uint32(k_steps - 1), thread)

                is_last = v0 + block_v > V
                upper = finish_logits(upper, of_rows, column, softcap, V, is_last)
                if smoothed:
                    total_0, total_1 = add_to_totals(upper, own_column, total_0, total_1, opaque(weights))
                max_0, max_1, sum_0, sum_1 = update_rows(upper, max_0, max_1, sum_0, sum_1)
                if record:
                    threshold_0 = threshold_of(maximum(bound_0, log_sum_exp(max_0, sum_0)), log_eps)
                    threshold_1 = threshold_of(maximum(bound_1, log_sum_exp(max_1, sum_1)), log_eps)
                    if coarse_survivors != 0:  # each half at once: there are no registers to keep its words
                        coarse = survivor_words(upper, threshold_0 + log_coarser, threshold_1 + log_coarser)
                        set_bits(coarse, coarse, coarse_survivors, group * ctas + rank, pitch_words, v_tile, V, lane)
                    above = survivor_words(upper, threshold_0, threshold_1)
                lower = finish_logits(lower, of_rows + np.uint32(256), column, softcap, V, is_last)
                if smoothed:
                    total_2, total_3 = add_to_totals(lower, own_column, total_2, total_3, opaque(weights))
                max_2, max_3, sum_2, sum_3 = update_rows(lower, max_2, max_3, sum_2, sum_3)
                if record:
                    threshold_2 = threshold_of(maximum(bound_2, log_sum_exp(max_2, sum_2)), log_eps)
                    threshold_3 = threshold_of(maximum(bound_3, log_sum_exp(max_3, sum_3)), log_eps)
                    below = survivor_words(lower, threshold_2, threshold_3)
                    set_bits(above, below, survivors, group * ctas + rank, pitch_words, v_tile, V, lane)
                    if coarse_survivors != 0:
                        coarse = survivor_words(lower, threshold_2 + log_coarser, threshold_3 + log_coarser)
                        set_bits(coarse, coarse, coarse_survivors, group * ctas + rank, pitch_words, v_tile, V, lane)
            use = np.uint32(use + np.uint32(n_turns * k_steps))

            # The consumers' rows become one, in the order that always is.
            if consumer == 1 and lane & 3 == 0:
                memory.store_shared_f32(merge_smem + np.uint32(4 * row), log_sum_exp(max_0, sum_0))
                memory.store_shared_f32(merge_smem + np.uint32(4 * (row + 8)), log_sum_exp(max_1, sum_1))
                memory.store_shared_f32(merge_smem + np.uint32(4 * (row + 64)), log_sum_exp(max_2, sum_2))
                memory.store_shared_f32(merge_smem + np.uint32(4 * (row + 72)), log_sum_exp(max_3, sum_3))
            control.barrier_sync(1, both_consumers)
            if consumer == 0 and lane & 3 == 0:
                write(log_sum_exp(max_0, sum_0), row, merge_smem, part, slot, rank)
                write(log_sum_exp(max_1, sum_1), row + 8, merge_smem, part, slot, rank)
                write(log_sum_exp(max_2, sum_2), row + 64, merge_smem, part, slot, rank)
                write(log_sum_exp(max_3, sum_3), row + 72, merge_smem, part, slot, rank)
            control.barrier_sync(1, both_consumers)  # nobody writes to merge_smem before it was read
            if smoothed:
                total_0, total_1, total_2, total_3 = quad_sum(total_0), quad_sum(total_1), quad_sum(total_2), quad_sum(total_3)
                if consumer == 1 and lane & 3 == 0:
                    memory.store_shared_f32(merge_smem + np.uint32(4 * row), total_0)
                    memory.store_shared_f32(merge_smem + np.uint32(4 * (row + 8)), total_1)
                    memory.store_shared_f32(merge_smem + np.uint32(4 * (row + 64)), total_2)
                    memory.store_shared_f32(merge_smem + np.uint32(4 * (row + 72)), total_3)
                control.barrier_sync(1, both_consumers)
                if consumer == 0 and lane & 3 == 0:
                    write_total(total_0, row, merge_smem, smoothing[1], slot, rank)
                    write_total(total_1, row + 8, merge_smem, smoothing[1], slot, rank)
                    write_total(total_2, row + 64, merge_smem, smoothing[1], slot, rank)
                    write_total(total_3, row + 72, merge_smem, smoothing[1], slot, rank)
                control.barrier_sync(1, both_consumers)
            index = np.int32(index + 1)

    @cuda.jit(device=True, forceinline=True)
    def write(mine: Any, row: Any, merge_smem: Any, part: Any, slot: Any, rank: Any) -> None:
        """The log-sum-exp of a row, out of both consumers', goes to this worker's slot."""
        other = memory.load_shared_f32(merge_smem + np.uint32(4 * row))
        part[(slot * ctas + rank) * block_n + row] = log_add_exp(mine, other)

    @cuda.jit(device=True, forceinline=True)
    def write_total(mine: Any, row: Any, merge_smem: Any, part: Any, slot: Any, rank: Any) -> None:
        """The same of a row's total."""
        other = memory.load_shared_f32(merge_smem + np.uint32(4 * row))
        place = np.int64((slot * ctas + rank) * block_n + row)
        memory.store_global_f32(part + np.uint64(4 * place), mine + other)

    return consume
