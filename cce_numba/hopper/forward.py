"""The forward on tensor cores: log-sum-exp and survivor bits (paper section 4.2).

    producer warpgroup      one thread fetches tiles of e and c into a ring of stages (bulk copies by tensor maps); if the tokens of
                            a block are not neighbours, two more warps fetch their rows of e instead
    consumer warpgroups     two, each with a tile of 128 tokens x 192 vocabulary entries in registers. They take turns: one
                            multiplies while the other folds its tile into each row's (max, sum) and notes the survivors

CTAs of a cluster own neighbouring blocks of tokens and meet the same vocabulary at the same time, so each fetches a part of a tile
of c and multicasts it. Clusters are persistent workers; `schedule` says which tiles each takes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.arguments import Problem
from cce_numba.hopper import indexed_dot as dot
from cce_numba.hopper import merge, schedule, tensor_map
from cce_numba.hopper.schedule import NO_SLOT
from cce_numba.hopper.fold import NEGATIVE_INFINITY, log_add_exp, log_sum_exp, make_bias_fragment, make_fold, threshold_of
from cce_numba.hopper.launch import Kernel, pointer_to
from cce_numba.hopper.indexed_dot import make_indexed_dot_kernel
from cce_numba.hopper.merge import make_merge_kernel
from cce_numba.hopper.prepare import make_prepare_kernel
from cce_numba.hopper.ring import make_ring
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.plan import Statistics
from cce_numba.ptx import arithmetic, cluster, control, mbarrier, memory, tma, wgmma
from cce_numba.survivors import log_threshold

_OUT_OF_REACH = np.float32(3e38)


def make_who_am_i(tiles: HopperTiles) -> Any:
    """The device function that gives this CTA's place in the schedule: `(worker, workers, groups, rank in the cluster)`."""
    ctas, group_n, quotient = tiles.cluster, tiles.group_n, schedule.quotient

    @cuda.jit(device=True, forceinline=True)
    def who_am_i(n_valid: Any) -> Any:
        workers, groups = quotient(cuda.gridDim.x, ctas), quotient(n_valid + group_n - 1, group_n)
        return quotient(cuda.blockIdx.x, ctas), workers, groups, np.int32(cluster.cta_rank())

    return who_am_i


def make_produce(tiles: HopperTiles) -> Any:
    """The device function of the thread that fetches tiles with the bulk copy engine."""
    ring_ = make_ring(tiles)
    wait_empty, stage_of, full, e_smem, c_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem, ring_.c_smem
    block_n, block_v, block_d, ctas = tiles.block_n, tiles.block_v, tiles.block_d, tiles.cluster
    part_v, part_bytes = block_v // ctas, np.uint32(tiles.c_bytes // ctas)
    e_bytes, c_bytes = np.uint32(tiles.e_bytes), np.uint32(tiles.c_bytes)
    everyone = np.uint32((1 << ctas) - 1)
    segment, are_neighbours, who_am_i = schedule.segment, _are_neighbours, make_who_am_i(tiles)

    @cuda.jit(device=True, forceinline=True)
    def produce(
        ring: Any, e_map: Any, c_map: Any, tokens: Any, n_valid: Any, per_round: Any, first_v: Any, n_tiles: Any, k_steps: Any
    ) -> None:  # fmt: skip
        worker, workers, groups, rank = who_am_i(n_valid)
        tma.fence_tensor_map(e_map)
        tma.fence_tensor_map(c_map)
        use, index = np.uint32(0), np.int32(0)
        while True:
            group, first, last, step, slot = segment(index, worker, workers, groups, per_round, n_tiles)
            if slot == NO_SLOT:
                break
            n0 = np.int32((group * ctas + rank) * block_n)
            gathered = n0 < n_valid and not are_neighbours(tokens, n0, n_valid)
            first_row = 0
            if n0 < n_valid:
                first_row = tokens[n0]
            fetches_e = n0 < n_valid and not gathered
            expected = c_bytes
            if fetches_e:
                expected += e_bytes
            for v_tile in range(first, last, step):
                v = first_v + v_tile * block_v + rank * part_v
                for k in range(k_steps):
                    wait_empty(ring, use)
                    stage = stage_of(use)
                    barrier = full(ring, stage)
                    mbarrier.arrive_expect_tx(barrier, expected)
                    if fetches_e:
                        tma.load_2d(e_smem(ring, stage), e_map, barrier, k * block_d, first_row)
                    if ctas == 1:
                        tma.load_2d(c_smem(ring, stage), c_map, barrier, k * block_d, v)
                    else:
                        c_part = c_smem(ring, stage) + np.uint32(rank) * part_bytes
                        tma.load_2d_multicast(c_part, c_map, barrier, k * block_d, v, everyone)
                    use = np.uint32(use + np.uint32(1))
            index = np.int32(index + 1)

    return produce


@cuda.jit(device=True, forceinline=True)
def _are_neighbours(tokens: Any, n0: Any, n_valid: Any) -> Any:
    """Whether the 128 listed tokens from n0 on (or as many as there are) are consecutive rows of e."""
    last = min(n0 + 127, n_valid - 1)
    return tokens[last] - tokens[n0] == last - n0


def make_gather(tiles: HopperTiles) -> Any:
    """The device function of the warps that fetch rows of e one by one, 16 bytes a lane, and swizzle them by hand."""
    ring_ = make_ring(tiles)
    wait_empty, stage_of, full, e_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem
    block_n, ctas, quotient = tiles.block_n, tiles.cluster, schedule.quotient
    rows_at_once = 4 * tiles.gatherers  # 8 lanes for the 128 bytes of a row
    opaque = arithmetic.opaque_i32
    segment, are_neighbours, who_am_i = schedule.segment, _are_neighbours, make_who_am_i(tiles)
    wait_all_but_two, wait_all = memory.copy_async_wait(2), memory.copy_async_wait(0)

    @cuda.jit(device=True, forceinline=True)
    def arrive(ring: Any, use: Any, thread: Any) -> None:
        """One arrival for the warp, once what all its lanes copied is visible to the tensor cores."""
        memory.fence_proxy_async()
        cuda.syncwarp()
        if thread & 31 == 0:
            mbarrier.arrive(full(ring, stage_of(use)))

    @cuda.jit(device=True, forceinline=True)
    def gather(
        ring: Any, thread: Any, e: Any, e_pitch_bytes: Any, tokens: Any, n_valid: Any, per_round: Any, n_tiles: Any,
        k_steps: Any, D: Any,
    ) -> None:  # fmt: skip
        worker, workers, groups, rank = who_am_i(n_valid)
        part, first_row = np.int32(thread & 7), np.int32(thread >> 3)
        e += np.uint64(16 * part)
        row_bytes = np.int32(2 * D - 16 * part)
        swizzled = np.uint32((part ^ (first_row & 7)) << 4)  # rows of this thread are 8 apart: the same in all of them
        use, index = np.uint32(0), np.int32(0)
        while True:
            group, first, last, step, slot = segment(index, worker, workers, groups, per_round, n_tiles)
            if slot == NO_SLOT:
                break
            n0 = np.int32((group * ctas + rank) * block_n)
            n_tiles_here = quotient(last - first + step - 1, step)
            rows, under_way = np.int32(0), np.int32(0)
            if n0 < n_valid and not are_neighbours(tokens, n0, n_valid):
                rows = np.int32(min(block_n, n_valid - n0))
            for i in range(n_tiles_here):
                for k in range(k_steps):
                    wait_empty(ring, use)
                    if rows > 0:
                        stage_smem = np.uint32(e_smem(ring, stage_of(use)) + swizzled)
                        present_bytes = np.uint32(min(16, max(0, row_bytes - 128 * k)))
                        row = first_row
                        while row < rows:
                            source = e + np.uint64(np.int64(tokens[n0 + row]) * e_pitch_bytes + 128 * k)
                            memory.copy_async_16(np.uint32(stage_smem + np.uint32(row * 128)), source, present_bytes)
                            row = opaque(np.int32(row + rows_at_once))  # unrolled, this takes more registers than there are
                        memory.copy_async_commit()
                        wait_all_but_two()  # two stages stay under way; what came before has landed
                        if under_way < 2:
                            under_way = np.int32(under_way + 1)
                        else:
                            arrive(ring, use - np.uint32(2), thread)
                    else:
                        arrive(ring, use, thread)
                    use = np.uint32(use + np.uint32(1))
            wait_all()
            while under_way > 0:
                arrive(ring, use - np.uint32(under_way), thread)
                under_way = np.int32(under_way - 1)
            index = np.int32(index + 1)

    return gather


def make_consume(tiles: HopperTiles, dtype: str, bias_dtype: np.dtype | None, capped: bool, record: bool) -> Any:
    """The device function of a consumer warpgroup."""
    ring_, fold = make_ring(tiles), make_fold(tiles.block_v)
    stage_of, parity_of, full, turn = ring_.stage_of, ring_.parity_of, ring_.full, ring_.turn
    release, e_smem = ring_.release, ring_.e_smem
    block_n, block_v, ctas = tiles.block_n, tiles.block_v, tiles.cluster
    words = block_v // 32
    mma, zeros = wgmma.mma(block_v, dtype), wgmma.zeros(block_v)
    fence, commit_group, wait_all, wait_all_but_one = wgmma.fence, wgmma.commit_group, wgmma.wait_group(0), wgmma.wait_group(1)
    update_rows, mask_padding, cap, survivor_words = fold.update_rows, fold.mask_padding, fold.cap, fold.survivor_words
    e_descriptors = np.uint64(tiles.e_bytes >> 4)  # from A to B
    second_half = np.uint64(64 * 128 >> 4)  # rows 64 to 127 of e
    segment, quotient, who_am_i = schedule.segment, schedule.quotient, make_who_am_i(tiles)
    maximum, or_of_warp, barrier_sync = arithmetic.maximum, control.or_of_warp, control.barrier_sync
    has_bias = bias_dtype is not None
    bias_fragment = make_bias_fragment(block_v, bias_dtype) if has_bias else None
    both_consumers, stages, consumers = np.uint32(256), np.uint32(tiles.stages), np.int32(2)
    opaque = arithmetic.opaque_i32
    minus_infinity, out_of_reach = NEGATIVE_INFINITY, _OUT_OF_REACH
    swizzle = wgmma.SWIZZLE_128B

    @cuda.jit(device=True, forceinline=True)
    def descriptor(address: Any) -> Any:
        return swizzle | np.uint64((np.uint32(address) & np.uint32(0x3FFFF)) >> np.uint32(4))

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
    def finish_logits(z: Any, column: Any, softcap: Any, V: Any, is_last: Any) -> Any:
        """Products become logits; padding is masked last, so that no bias or cap can lift it."""
        if capped:
            z = cap(z, column, softcap)
        if is_last:
            z = mask_padding(z, column, V)
        return z

    @cuda.jit(device=True, forceinline=True)
    def bound_of(n: Any, tokens: Any, n_valid: Any, target_logit: Any, lse: Any, has_lse: Any) -> Any:
        """A lower bound of the row's final log-sum-exp before any tile is seen; a row past the end flags nothing."""
        if n >= n_valid:
            return out_of_reach
        token = tokens[n]
        bound = target_logit[token]
        if has_lse:
            bound = maximum(bound, lse[token])
        return bound

    @cuda.jit(device=True, forceinline=True)
    def consume(
        ring: Any, merge_smem: Any, consumer: Any, thread: Any, tokens: Any, n_valid: Any, per_round: Any, target_logit: Any,
        bias: Any, softcap: Any, lse: Any, has_lse: Any, part: Any, survivors: Any, pitch_words: Any, log_eps: Any, first_v_tile: Any,
        n_tiles: Any, k_steps: Any, V: Any,
    ) -> None:  # fmt: skip
        worker, workers, groups, rank = who_am_i(n_valid)
        lane = np.int32(thread & 31)
        row = np.int32((thread >> 5) * 16 + (lane >> 2))  # and 8, 64, 72 further down
        upper, lower = zeros(), zeros()
        use, index, turns = np.uint32(0), np.int32(0), np.uint32(0)
        while True:
            group, first, last, step, slot = segment(index, worker, workers, groups, per_round, n_tiles)
            if slot == NO_SLOT:
                break
            n0 = np.int32((group * ctas + rank) * block_n)
            # The rows' running (max, sum). One of all that share the group goes on from where earlier launches came to.
            max_0 = max_1 = max_2 = max_3 = minus_infinity
            sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
            if has_lse and consumer == 0 and first == 0:
                sum_0 = sum_1 = sum_2 = sum_3 = np.float32(1)
                max_0 = lse[tokens[min(n0 + row, n_valid - 1)]]
                max_1 = lse[tokens[min(n0 + row + 8, n_valid - 1)]]
                max_2 = lse[tokens[min(n0 + row + 64, n_valid - 1)]]
                max_3 = lse[tokens[min(n0 + row + 72, n_valid - 1)]]
            bound_0 = bound_1 = bound_2 = bound_3 = out_of_reach
            if record:
                bound_0 = bound_of(n0 + row, tokens, n_valid, target_logit, lse, has_lse)
                bound_1 = bound_of(n0 + row + 8, tokens, n_valid, target_logit, lse, has_lse)
                bound_2 = bound_of(n0 + row + 64, tokens, n_valid, target_logit, lse, has_lse)
                bound_3 = bound_of(n0 + row + 72, tokens, n_valid, target_logit, lse, has_lse)

            n_turns = quotient(last - first + step - 1, step)
            for i in range(consumer, n_turns, consumers):
                v_tile = np.int32(first_v_tile + first + i * step)
                first_use = np.uint32(use + np.uint32(i * k_steps))
                v0 = np.int32(v_tile * block_v)
                column = np.int32(v0 + 2 * (lane & 3))
                if has_bias:  # products are added to it
                    upper = bias_fragment(column, bias, V)
                    # Not a copy, and not from the same addresses: there are no registers to hold either.
                    lower = bias_fragment(opaque(column), bias, V)
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
                upper = finish_logits(upper, column, softcap, V, is_last)
                max_0, max_1, sum_0, sum_1 = update_rows(upper, max_0, max_1, sum_0, sum_1)
                if record:
                    threshold_0 = threshold_of(maximum(bound_0, log_sum_exp(max_0, sum_0)), log_eps)
                    threshold_1 = threshold_of(maximum(bound_1, log_sum_exp(max_1, sum_1)), log_eps)
                    above = survivor_words(upper, threshold_0, threshold_1)
                lower = finish_logits(lower, column, softcap, V, is_last)
                max_2, max_3, sum_2, sum_3 = update_rows(lower, max_2, max_3, sum_2, sum_3)
                if record:
                    threshold_2 = threshold_of(maximum(bound_2, log_sum_exp(max_2, sum_2)), log_eps)
                    threshold_3 = threshold_of(maximum(bound_3, log_sum_exp(max_3, sum_3)), log_eps)
                    below = survivor_words(lower, threshold_2, threshold_3)
                    mine = np.uint32(0)
                    for w in range(words):
                        bits = or_of_warp((above[w] | below[w]) << np.uint32(2 * (lane & 3)))
                        if lane == w:
                            mine = np.uint32(bits)
                    columns = np.int32(V - v0 - 32 * lane)
                    if columns < 32:
                        mine = np.uint32(mine & ((np.uint32(1) << np.uint32(max(columns, 0))) - np.uint32(1)))
                    if lane < words and mine != 0:
                        word = np.int64(group * ctas + rank) * pitch_words + v_tile * words + lane
                        memory.or_global_u32(survivors + np.uint64(4 * word), mine)
            use = np.uint32(use + np.uint32(n_turns * k_steps))

            # The consumers' rows become one, in the order that always is.
            if consumer == 1:
                if lane & 3 == 0:
                    memory.store_shared_f32(merge_smem + np.uint32(4 * row), log_sum_exp(max_0, sum_0))
                    memory.store_shared_f32(merge_smem + np.uint32(4 * (row + 8)), log_sum_exp(max_1, sum_1))
                    memory.store_shared_f32(merge_smem + np.uint32(4 * (row + 64)), log_sum_exp(max_2, sum_2))
                    memory.store_shared_f32(merge_smem + np.uint32(4 * (row + 72)), log_sum_exp(max_3, sum_3))
                barrier_sync(1, both_consumers)
            else:
                barrier_sync(1, both_consumers)
                if lane & 3 == 0:
                    write(log_sum_exp(max_0, sum_0), row, merge_smem, part, slot, rank)
                    write(log_sum_exp(max_1, sum_1), row + 8, merge_smem, part, slot, rank)
                    write(log_sum_exp(max_2, sum_2), row + 64, merge_smem, part, slot, rank)
                    write(log_sum_exp(max_3, sum_3), row + 72, merge_smem, part, slot, rank)
            barrier_sync(1, both_consumers)  # nobody writes to merge_smem before it was read
            index = np.int32(index + 1)

    @cuda.jit(device=True, forceinline=True)
    def write(mine: Any, row: Any, merge_smem: Any, part: Any, slot: Any, rank: Any) -> None:
        """The log-sum-exp of a row, out of both consumers', goes to this worker's slot."""
        other = memory.load_shared_f32(merge_smem + np.uint32(4 * row))
        part[(slot * ctas + rank) * block_n + row] = log_add_exp(mine, other)

    return consume


@functools.cache
def make_lse_kernel(tiles: HopperTiles, dtype: np.dtype, bias_dtype: np.dtype | None, capped: bool, record: bool) -> Kernel:
    """The kernel for 16-bit `dtype`; with or without bias, softcap and survivors, so that nobody pays for what others need."""
    produce, gather = make_produce(tiles), make_gather(tiles)
    consume = make_consume(tiles, "f16" if dtype == np.float16 else "bf16", bias_dtype, capped, record)
    init, ring_bytes = make_ring(tiles).init, np.uint32(tiles.ring_bytes)
    lower_registers = control.lower_registers(tiles.producer_registers)
    raise_registers = control.raise_registers(tiles.consumer_registers)
    block_v, block_d, first_gatherer = tiles.block_v, tiles.block_d, 128 - 32 * tiles.gatherers
    quotient = schedule.quotient

    def lse_kernel(
        maps: Any,  # tensor maps of e and c, 128 bytes each
        e: Any,  # address of e, for rows that are fetched one by one
        e_pitch_bytes: Any,
        tokens: Any,  # (N,) rows of e, the first n_valid[0] count
        n_valid: Any,  # (1,)
        first_token: Any,  # of the list, at a multiple of group_n
        most_tokens: Any,
        per_round: Any,  # groups, see `schedule`
        bias: Any,  # address of (V,)
        softcap: Any,
        target_logit: Any,  # (N,) by row of e
        lse: Any,  # (N,) by row of e; what earlier launches have found, if has_lse
        has_lse: Any,
        part: Any,  # (slots, cluster, block_n) log-sum-exps
        survivors: Any,  # address of (blocks, pitch_words) words, zeroed
        pitch_words: Any,
        log_eps: Any,
        first_v_tile: Any,
        n_tiles: Any,
        first_row: Any,  # of c, that its tensor map begins with
        V: Any,
        D: Any,
    ) -> None:
        """Grid of workers * cluster CTAs. Writes part (see `schedule`), and sets bits of survivors.

        tokens, survivors begin with those of first_token.
        """
        ring = (memory.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00)
        thread = np.int32(cuda.threadIdx.x)
        warpgroup = thread >> 7
        n_listed = np.int32(min(max(n_valid[0] - first_token, 0), most_tokens))
        k_steps = quotient(D + block_d - 1, block_d)
        if thread == 0:
            init(ring)
        cluster.sync()
        if warpgroup == 0:
            lower_registers()
            if thread == 0:
                first_v = np.int32(first_v_tile * block_v - first_row)
                produce(ring, maps, maps + np.uint64(128), tokens, n_listed, per_round, first_v, n_tiles, k_steps)
            elif thread >= first_gatherer:
                gather(
                    ring, thread - first_gatherer, e, e_pitch_bytes, tokens, n_listed, per_round, n_tiles, k_steps, D
                )
        else:
            raise_registers()
            consume(
                ring, ring + ring_bytes, np.int32(warpgroup - 1), np.int32(thread & 127), tokens, n_listed, per_round, target_logit,
                bias, softcap, lse, has_lse, part, survivors, pitch_words, log_eps, first_v_tile, n_tiles, k_steps, V,
            )  # fmt: skip
        cuda.syncwarp()
        cluster.sync()  # nobody leaves while others still write to its shared memory

    f32, i32, i64, u64 = types.float32, types.int32, types.int64, types.uint64
    p_f32, p_i32 = pointer_to(np.float32), pointer_to(np.int32)
    signature = types.void(
        *(u64, u64, i64, p_i32, pointer_to(np.int64), i64, i32, i32, u64, f32, p_f32, p_f32, i32, p_f32, u64, i64, f32),
        *(i32, i32, i32, i32, i32),
    )
    return Kernel(lse_kernel, signature, threads=tiles.threads, cluster=tiles.cluster, smem_bytes=tiles.smem_bytes)


# With survivors, the vocabulary goes in these parts, and each gives the next a bound of the log-sum-exp, where else each consumer of
# each worker would only know its own tiles. Tokenizers give the frequent entries the first numbers. See benchmarks/NOTES.md.
_PHASE_ENDS = (1 / 16, 1 / 4, 1)
_COPY_BYTES = 64 * 2**20  # at most, for rows of c that the copy engine cannot read as they lie
_CACHED_BYTES = 14 * 2**20  # of e, at a time: it stays in the L2 cache (50 MB, of which each half keeps its own copy)
_BATCH = 2**14  # tokens of a launch: bounds the partial results


def forward(p: Problem, tiles: HopperTiles, record: bool) -> Statistics:
    """Log-sum-exp, target logit and survivors of each token."""
    xp: Any = p.xp
    N, V, D, options = p.N, p.V, p.D, p.options
    lse, target_logit = xp.empty(N, np.float32), xp.empty(N, np.float32)
    tokens, n_valid = xp.empty(N, np.int32), xp.empty((), np.int64)
    pitch_words = pitch_of(V, tiles) if record else 0
    survivors = xp.zeros((ceil_div(N, tiles.block_n), pitch_words), np.uint32) if record else n_valid
    if N == 0:
        n_valid[...] = 0
        return _statistics(p, tiles, tokens, n_valid, lse, target_logit, survivors if record else None)
    e = p.e if tensor_map.why_not(p.e) is None else copy_rows(p.e, xp.empty((N, tensor_map.padded_columns(D)), p.dtype))
    rows, in_place = rows_at_once(p, tiles), tensor_map.why_not(p.c) is None
    c = p.c if in_place else xp.empty((rows, tensor_map.padded_columns(D)), p.dtype)[:, :D]
    workers = count_workers(p, tiles)
    per_round = schedule.groups_per_round(workers, int(_CACHED_BYTES) // (2 * D * tiles.group_n))
    batch_groups = ceil_div(min(N, _BATCH), tiles.group_n)
    part = xp.empty(schedule.count_slots(workers, batch_groups, per_round) * tiles.group_n, np.float32)
    maps = xp.empty(2 * tensor_map.WORDS, np.uint64)
    make_prepare_kernel().launch(
        1,
        tensor_map.encode(e, tiles.block_n, tiles.block_d),
        tensor_map.encode(c, tiles.block_v // tiles.cluster, tiles.block_d),
        maps.data.ptr,
        0 if p.targets is None else p.targets.data.ptr,
        p.targets is not None,
        options.ignore_index,
        N,
        tokens.data.ptr,
        n_valid.data.ptr,
        target_logit.data.ptr,
        lse.data.ptr,
    )
    bias_dtype, bias_pointer = (None, 0) if p.bias is None else (np.dtype(p.bias.dtype), p.bias.data.ptr)
    softcap = options.softcap or 0.0
    if p.targets is None:
        target_logit.fill(-math.inf)
    else:
        launch_indexed_dot(p, e, tokens, n_valid, target_logit, survivors, pitch_words)

    lse_kernel = make_lse_kernel(tiles, p.dtype, bias_dtype, options.softcap is not None, record)
    merge_kernel = make_merge_kernel(tiles)
    for first_row, first_tile, last_tile in phases(V, rows, tiles, record):
        if not in_place and first_tile * tiles.block_v == first_row:
            copy_rows(p.c[first_row : first_row + rows], c)
        for first_token in range(0, N, _BATCH):
            batch = (first_token, min(_BATCH, N - first_token))
            tokens_pointer = tokens.data.ptr + 4 * first_token
            survivors_pointer = survivors.data.ptr + 4 * pitch_words * (first_token // tiles.block_n)
            lse_kernel.launch(
                workers * tiles.cluster,
                maps.data.ptr,
                e.data.ptr,
                tensor_map.pitch_bytes(e),
                tokens_pointer,
                n_valid.data.ptr,
                *batch,
                per_round,
                bias_pointer,
                softcap,
                target_logit.data.ptr,
                lse.data.ptr,
                first_tile > 0,
                part.data.ptr,
                survivors_pointer,
                pitch_words,
                log_threshold(options.filter_eps),
                first_tile,
                last_tile - first_tile,
                first_row,
                V,
                D,
            )
            merge_kernel.launch(
                merge.ctas_for(batch[1]),
                part.data.ptr,
                workers,
                per_round,
                last_tile - first_tile,
                tokens_pointer,
                n_valid.data.ptr,
                *batch,
                target_logit.data.ptr,
                lse.data.ptr,
                survivors_pointer,
                pitch_words if last_tile * tiles.block_v >= V else 0,
                V,
            )
    return _statistics(p, tiles, tokens, n_valid, lse, target_logit, survivors if record else None)


def _statistics(
    p: Problem, tiles: HopperTiles, tokens: Any, n_valid: Any, lse: Any, target_logit: Any, survivors: Any
) -> Statistics:
    bits = None if survivors is None else survivors.view(np.uint8)[:, : ceil_div(p.V, 8)]
    return Statistics(tokens, n_valid, lse, None if p.targets is None else target_logit, bits, tiles.survivor_block)


def indexed_dot(p: Problem) -> Any:
    """(N,) float32: the target's logit, 0 for tokens that are ignored, NaN for a target out of range."""
    raise NotImplementedError


def launch_indexed_dot(
    p: Problem, e: Any, tokens: Any, n_valid: Any, target_logit: Any, survivors: Any, pitch_words: int
) -> None:
    """Fills target_logit, and sets the targets' bits."""
    bias_dtype, bias_pointer = (None, 0) if p.bias is None else (np.dtype(p.bias.dtype), p.bias.data.ptr)
    aligned = tensor_map.why_not(p.c) is None
    make_indexed_dot_kernel(p.dtype, bias_dtype, aligned).launch(
        dot.ctas_for(p.N),
        e.data.ptr,
        tensor_map.pitch_bytes(e),
        p.c.data.ptr,
        *p.c.strides,
        bias_pointer,
        p.options.softcap or 0.0,
        p.targets.data.ptr,
        tokens.data.ptr,
        n_valid.data.ptr,
        p.V,
        p.D,
        target_logit.data.ptr,
        survivors.data.ptr,
        pitch_words,
    )


def copy_rows(matrix: Any, into: Any) -> Any:
    """`into` with the rows of matrix, as a view of matrix's shape or of those rows of `into` that there are."""
    view = into[: matrix.shape[0], : matrix.shape[1]]
    view[...] = matrix
    return view


def phases(V: int, rows: int, tiles: HopperTiles, record: bool) -> list[tuple[int, int, int]]:
    """`(first row of c in memory, first tile, last tile)` of each launch, so that each begins with what those before have found."""
    n_tiles = ceil_div(V, tiles.block_v)
    ends = sorted({min(n_tiles, max(1, round(n_tiles * end))) for end in _PHASE_ENDS}) if record else [n_tiles]
    step = ceil_div(rows, tiles.block_v)
    cuts = sorted({*ends, *range(step, n_tiles, step)})
    return [(first // step * step * tiles.block_v, first, last) for first, last in zip([0, *cuts], cuts, strict=False)]


def rows_at_once(p: Problem, tiles: HopperTiles) -> int:
    """Rows of c that are in reach of the copy engine at a time: V, or as many as a copy may hold."""
    if tensor_map.why_not(p.c) is None:
        return p.V
    fitting = _COPY_BYTES // (2 * tensor_map.padded_columns(p.D)) // tiles.block_v * tiles.block_v
    return min(p.V, max(tiles.block_v, fitting))


def count_workers(p: Problem, tiles: HopperTiles) -> int:
    """Clusters that run at the same time."""
    return cuda.get_current_device().MULTIPROCESSOR_COUNT // tiles.cluster


def pitch_of(V: int, tiles: HopperTiles) -> int:
    """Words of a block's survivor bits: whole tiles."""
    return ceil_div(V, tiles.block_v) * (tiles.block_v // 32)


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)
