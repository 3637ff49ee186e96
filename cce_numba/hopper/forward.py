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
from cce_numba.hopper.fold import NEGATIVE_INFINITY, log_sum_exp, make_add_bias, make_fold, threshold_of
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


def make_produce(tiles: HopperTiles) -> Any:
    """The device function of the thread that fetches tiles with the bulk copy engine."""
    ring_ = make_ring(tiles)
    wait_empty, stage_of, full, e_smem, c_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem, ring_.c_smem
    block_n, block_v, block_d, ctas = tiles.block_n, tiles.block_v, tiles.block_d, tiles.cluster
    part_v, part_bytes = block_v // ctas, np.uint32(tiles.c_bytes // ctas)
    e_bytes, c_bytes = np.uint32(tiles.e_bytes), np.uint32(tiles.c_bytes)
    everyone = np.uint32((1 << ctas) - 1)
    segment, are_neighbours, DONE = schedule.segment, _are_neighbours, schedule.DONE

    @cuda.jit(device=True, forceinline=True)
    def produce(
        ring: Any, e_map: Any, c_map: Any, tokens: Any, n_valid: Any, first_v: Any, n_tiles: Any, k_steps: Any
    ) -> None:  # fmt: skip
        worker, workers, rank = cuda.blockIdx.x // ctas, cuda.gridDim.x // ctas, np.int32(cluster.cta_rank())
        groups = (n_valid + block_n * ctas - 1) // (block_n * ctas)
        tma.fence_tensor_map(e_map)
        tma.fence_tensor_map(c_map)
        use, index = 0, 0
        while True:
            group, first, last, step, slot = segment(index, worker, workers, groups, n_tiles)
            if slot == DONE:
                break
            n0 = (group * ctas + rank) * block_n
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
                    use += 1
            index += 1

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
    block_n, ctas = tiles.block_n, tiles.cluster
    rows_at_once = 4 * tiles.gatherers  # 8 lanes for the 128 bytes of a row
    segment, are_neighbours, DONE = schedule.segment, _are_neighbours, schedule.DONE
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
        ring: Any, thread: Any, e: Any, e_pitch_bytes: Any, tokens: Any, n_valid: Any, n_tiles: Any, k_steps: Any, D: Any
    ) -> None:  # fmt: skip
        worker, workers, rank = cuda.blockIdx.x // ctas, cuda.gridDim.x // ctas, np.int32(cluster.cta_rank())
        groups = (n_valid + block_n * ctas - 1) // (block_n * ctas)
        part, first_row = thread & 7, thread >> 3
        swizzled = np.uint32((part ^ (first_row & 7)) << 4)  # rows of this thread are 8 apart: the same in all of them
        use, index = 0, 0
        while True:
            group, first, last, step, slot = segment(index, worker, workers, groups, n_tiles)
            if slot == DONE:
                break
            n0 = (group * ctas + rank) * block_n
            last_use = use + (last - first + step - 1) // step * k_steps
            if n0 < n_valid and not are_neighbours(tokens, n0, n_valid):
                rows = min(block_n, n_valid - n0)
                first_use, k = use, 0
                while use < last_use:
                    wait_empty(ring, use)
                    stage_smem = e_smem(ring, stage_of(use)) + swizzled
                    offset_bytes = k * 128 + part * 16
                    present_bytes = min(16, max(0, 2 * D - offset_bytes))
                    first_byte = e + np.uint64(offset_bytes if present_bytes > 0 else 0)
                    for row in range(first_row, rows, rows_at_once):
                        source = first_byte + np.uint64(np.int64(tokens[n0 + row]) * e_pitch_bytes)
                        memory.copy_async_16(stage_smem + np.uint32(row * 128), source, np.uint32(present_bytes))
                    memory.copy_async_commit()
                    if use >= first_use + 2:  # two stages are under way; what came before has landed
                        wait_all_but_two()
                        arrive(ring, use - 2, thread)
                    use += 1
                    k = k + 1 if k + 1 < k_steps else 0
                wait_all()
                for landed in range(max(first_use, last_use - 2), last_use):
                    arrive(ring, landed, thread)
            else:
                while use < last_use:
                    wait_empty(ring, use)
                    arrive(ring, use, thread)
                    use += 1
            index += 1

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
    segment, DONE, WHOLE = schedule.segment, schedule.DONE, schedule.WHOLE
    maximum, or_of_warp, barrier_sync = arithmetic.maximum, control.or_of_warp, control.barrier_sync
    has_bias = bias_dtype is not None
    add_bias = make_add_bias(block_v, bias_dtype) if has_bias else None
    both_consumers, stages = np.uint32(256), np.uint32(tiles.stages)
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
    def finish_logits(z: Any, column: Any, bias: Any, softcap: Any, V: Any, is_last: Any) -> Any:
        """Products become logits; padding is masked last, so that no bias or cap can lift it."""
        if has_bias:
            z = add_bias(z, column, bias, V)
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
        ring: Any, merge_smem: Any, consumer: Any, thread: Any, tokens: Any, n_valid: Any, target_logit: Any, bias: Any,
        softcap: Any, lse: Any, has_lse: Any, part: Any, survivors: Any, pitch_words: Any, log_eps: Any, first_v_tile: Any,
        n_tiles: Any, k_steps: Any, V: Any,
    ) -> None:  # fmt: skip
        worker, workers, rank = cuda.blockIdx.x // ctas, cuda.gridDim.x // ctas, np.int32(cluster.cta_rank())
        groups = (n_valid + block_n * ctas - 1) // (block_n * ctas)
        lane = thread & 31
        row = (thread >> 5) * 16 + (lane >> 2)  # and 8, 64, 72 further down
        upper, lower = zeros(), zeros()
        use, index, turns = 0, 0, np.uint32(0)
        while True:
            group, first, last, step, slot = segment(index, worker, workers, groups, n_tiles)
            if slot == DONE:
                break
            n0 = (group * ctas + rank) * block_n
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

            n_turns = (last - first + step - 1) // step
            for i in range(consumer, n_turns, 2):
                v_tile = first + i * step
                first_use = np.uint32(use + i * k_steps)
                if i > 0:
                    mbarrier.wait(turn(ring, consumer), turns & np.uint32(1))
                    turns += np.uint32(1)
                stage, parity = stage_of(first_use), parity_of(first_use)
                for k in range(k_steps):
                    mbarrier.wait(full(ring, stage), parity)
                    a = descriptor(e_smem(ring, stage))
                    fence()
                    upper, lower = multiply(upper, lower, a, a + e_descriptors, np.uint32(k))
                    commit_group()
                    wait_all_but_one()
                    if k > 0:
                        release(ring, first_use + np.uint32(k - 1), thread)
                    stage += np.uint32(1)
                    if stage == stages:
                        stage = np.uint32(0)
                        parity ^= np.uint32(1)
                if thread == 0 and i + 1 < n_turns:  # the other's products may queue up behind these
                    mbarrier.arrive(turn(ring, 1 - consumer))
                wait_all()
                release(ring, first_use + np.uint32(k_steps - 1), thread)

                v0 = (first_v_tile + v_tile) * block_v
                column, is_last = np.int32(v0 + 2 * (lane & 3)), v0 + block_v > V
                upper = finish_logits(upper, column, bias, softcap, V, is_last)
                lower = finish_logits(lower, column, bias, softcap, V, is_last)
                max_0, max_1, sum_0, sum_1 = update_rows(upper, max_0, max_1, sum_0, sum_1)
                max_2, max_3, sum_2, sum_3 = update_rows(lower, max_2, max_3, sum_2, sum_3)
                if record:
                    threshold_0 = threshold_of(maximum(bound_0, log_sum_exp(max_0, sum_0)), log_eps)
                    threshold_1 = threshold_of(maximum(bound_1, log_sum_exp(max_1, sum_1)), log_eps)
                    threshold_2 = threshold_of(maximum(bound_2, log_sum_exp(max_2, sum_2)), log_eps)
                    threshold_3 = threshold_of(maximum(bound_3, log_sum_exp(max_3, sum_3)), log_eps)
                    mine = np.uint32(0)
                    above, below = survivor_words(upper, threshold_0, threshold_1), survivor_words(lower, threshold_2, threshold_3)
                    for w in range(words):
                        bits = or_of_warp((above[w] | below[w]) << np.uint32(2 * (lane & 3)))
                        if lane == w:
                            mine = bits
                    columns = V - v0 - 32 * lane
                    if columns < 32:
                        mine &= (np.uint32(1) << np.uint32(max(columns, 0))) - np.uint32(1)
                    if lane < words and mine != 0:
                        word = np.int64(group * ctas + rank) * pitch_words + (first_v_tile + v_tile) * words + lane
                        memory.or_global_u32(survivors + np.uint64(4 * word), mine)
            use += n_turns * k_steps

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
                    write(log_sum_exp(max_0, sum_0), row, merge_smem, part, lse, slot, rank, n0, tokens, n_valid)
                    write(log_sum_exp(max_1, sum_1), row + 8, merge_smem, part, lse, slot, rank, n0, tokens, n_valid)
                    write(log_sum_exp(max_2, sum_2), row + 64, merge_smem, part, lse, slot, rank, n0, tokens, n_valid)
                    write(log_sum_exp(max_3, sum_3), row + 72, merge_smem, part, lse, slot, rank, n0, tokens, n_valid)
            barrier_sync(1, both_consumers)  # nobody writes to merge_smem before it was read
            index += 1

    @cuda.jit(device=True, forceinline=True)
    def write(
        mine: Any, row: Any, merge_smem: Any, part: Any, lse: Any, slot: Any, rank: Any, n0: Any, tokens: Any, n_valid: Any
    ) -> None:
        """The log-sum-exp of a row, out of both consumers': into the result if this worker has all tiles, else into its slot."""
        merged = log_add_exp(mine, memory.load_shared_f32(merge_smem + np.uint32(4 * row)))
        if slot != WHOLE:
            part[(slot * ctas + rank) * block_n + row] = merged
        elif n0 + row < n_valid:
            lse[tokens[n0 + row]] = merged

    return consume


@cuda.jit(device=True, forceinline=True)
def log_add_exp(x: Any, y: Any) -> Any:
    """log(exp(x) + exp(y)); NaN if either is."""
    largest, difference = arithmetic.maximum(x, y), -abs(x - y)
    if x == y:  # both may be -inf
        difference = np.float32(0)
    total = np.float32(1) + arithmetic.exp2(difference * np.float32(1.4426950408889634))
    return largest + np.float32(0.6931471805599453) * arithmetic.log2(total)


@functools.cache
def make_lse_kernel(tiles: HopperTiles, dtype: np.dtype, bias_dtype: np.dtype | None, capped: bool, record: bool) -> Kernel:
    """The kernel for 16-bit `dtype`; with or without bias, softcap and survivors, so that nobody pays for what others need."""
    produce, gather = make_produce(tiles), make_gather(tiles)
    consume = make_consume(tiles, "f16" if dtype == np.float16 else "bf16", bias_dtype, capped, record)
    init, ring_bytes = make_ring(tiles).init, np.uint32(tiles.ring_bytes)
    lower_registers = control.lower_registers(tiles.producer_registers)
    raise_registers = control.raise_registers(tiles.consumer_registers)
    block_v, block_d, first_gatherer = tiles.block_v, tiles.block_d, 128 - 32 * tiles.gatherers

    def lse_kernel(
        maps: Any,  # tensor maps of e and c, 128 bytes each
        e: Any,  # address of e, for rows that are fetched one by one
        e_pitch_bytes: Any,
        tokens: Any,  # (N,) rows of e, the first n_valid[0] count
        n_valid: Any,  # (1,)
        bias: Any,  # (V,)
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
        """Grid of workers * cluster CTAs. Writes lse or part (see `schedule`), and sets bits of survivors."""
        ring = (memory.shared_address(cuda.shared.array(0, np.uint8)) + np.uint32(1023)) & np.uint32(0xFFFFFC00)
        thread = np.int32(cuda.threadIdx.x)
        warpgroup = thread >> 7
        n_listed = np.int32(n_valid[0])
        k_steps = (D + block_d - 1) // block_d
        if thread == 0:
            init(ring)
        cluster.sync()
        if warpgroup == 0:
            lower_registers()
            if thread == 0:
                produce(
                    ring, maps, maps + np.uint64(128), tokens, n_listed, first_v_tile * block_v - first_row, n_tiles, k_steps
                )
            elif thread >= first_gatherer:
                gather(ring, thread - first_gatherer, e, e_pitch_bytes, tokens, n_listed, n_tiles, k_steps, D)
        else:
            raise_registers()
            consume(
                ring, ring + ring_bytes, warpgroup - 1, thread & 127, tokens, n_listed, target_logit, bias, softcap, lse, has_lse,
                part, survivors, pitch_words, log_eps, first_v_tile, n_tiles, k_steps, V,
            )  # fmt: skip
        cuda.syncwarp()
        cluster.sync()  # nobody leaves while others still write to its shared memory

    f32, i32, i64, u64 = types.float32, types.int32, types.int64, types.uint64
    p_f32, p_i32 = pointer_to(np.float32), pointer_to(np.int32)
    signature = types.void(
        *(u64, u64, i64, p_i32, pointer_to(np.int64), pointer_to(bias_dtype or dtype), f32, p_f32, p_f32, i32, p_f32, u64, i64, f32),
        *(i32, i32, i32, i32, i32),
    )
    return Kernel(lse_kernel, signature, threads=tiles.threads, cluster=tiles.cluster, smem_bytes=tiles.smem_bytes)


# With survivors, the vocabulary goes in these parts, and each gives the next a bound of the log-sum-exp, where else each consumer of
# each worker would only know its own tiles. Tokenizers give the frequent entries the first numbers. See benchmarks/NOTES.md.
_PHASE_ENDS = (1 / 16, 1 / 4, 1)
COPY_BYTES = 64 * 2**20  # at most, for rows of c that the copy engine cannot read as they lie


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
    rows = rows_at_once(p, tiles)
    in_place = tensor_map.why_not(p.c) is None
    c = p.c if in_place else xp.empty((rows, tensor_map.padded_columns(D)), p.dtype)[:, :D]
    workers = count_workers(p, tiles)
    part = xp.empty(slots(workers) * tiles.group_n, np.float32)
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
        lse_kernel.launch(
            workers * tiles.cluster,
            maps.data.ptr,
            e.data.ptr,
            tensor_map.pitch_bytes(e),
            tokens.data.ptr,
            n_valid.data.ptr,
            bias_pointer,
            softcap,
            target_logit.data.ptr,
            lse.data.ptr,
            first_tile > 0,
            part.data.ptr,
            survivors.data.ptr,
            pitch_words,
            log_threshold(options.filter_eps),
            first_tile,
            last_tile - first_tile,
            first_row,
            V,
            D,
        )
        merge_kernel.launch(
            merge.ctas_for(N),
            part.data.ptr,
            workers,
            last_tile - first_tile,
            tokens.data.ptr,
            n_valid.data.ptr,
            target_logit.data.ptr,
            lse.data.ptr,
            survivors.data.ptr,
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
    fitting = COPY_BYTES // (2 * tensor_map.padded_columns(p.D)) // tiles.block_v * tiles.block_v
    return min(p.V, max(tiles.block_v, fitting))


def count_workers(p: Problem, tiles: HopperTiles) -> int:
    """Clusters that run at the same time."""
    return cuda.get_current_device().MULTIPROCESSOR_COUNT // tiles.cluster


def slots(workers: int) -> int:
    """Partial results of a launch: one for each worker, and one for each group that workers share (see `schedule.segment`)."""
    return 2 * workers


def pitch_of(V: int, tiles: HopperTiles) -> int:
    """Words of a block's survivor bits: whole tiles."""
    return ceil_div(V, tiles.block_v) * (tiles.block_v // 32)


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)
