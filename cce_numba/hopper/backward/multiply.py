"""A consumer warpgroup: multiplies a job's tile while the other consumer stores its own, then they change places."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.epilogues import (
    PARTS,
    SUMS_STEP,
    make_add_rows,
    make_add_sums,
    make_add_to_sums,
    make_store_g,
    make_store_rows,
    make_store_rows_in_float32,
    make_store_sums,
)
from cce_numba.hopper.backward.jobs import (
    D0,
    D_E,
    END,
    FIRST_USE,
    IS_FIRST,
    IS_LAST,
    K_STEPS,
    KIND,
    LOGITS,
    PHASE,
    PLACE,
    ROUND,
    SLOT,
    STORED,
    make_job_ring,
)
from cce_numba.hopper.backward.tiles import G_ROW_BYTES, STAGING_BYTES, BackwardTiles
from cce_numba.hopper.ring import make_ring
from cce_numba.ptx import arithmetic, control, mbarrier, memory, wgmma
from cce_numba.ptx import fragment as fragments
from cce_numba.ptx.wgmma import PANEL_BYTES, SWIZZLE_128B, SWIZZLE_128B_PANELS
from cce_numba.tensor_core.schedule import quotient
from cce_numba.tensor_core.survey.tables import COLUMN_TILE

_LEAST_BITS = np.uint32(0x3FFFF)


@functools.cache
def make_multiply(tiles: BackwardTiles, dtype: str, *, a_m_major: bool, b_n_major: bool) -> Any:
    """The device function of a job's loop over the stages: `upper, lower = multiply(upper, lower, ring, use, k_steps, thread)`.

    upper and lower are the first and last 64 rows of what the products are added to, use the first stage's. It returns while
    the last products are under way.
    """
    ring_ = make_ring(tiles)
    stage_of, parity_of, full, release, a_smem = (
        ring_.stage_of,
        ring_.parity_of,
        ring_.full,
        ring_.release,
        ring_.e_smem,
    )
    mma = wgmma.mma(tiles.block_v, dtype, a_m_major=a_m_major, b_n_major=b_n_major)
    fence_proxy_async = memory.fence_proxy_async
    fence, commit_group, wait_all_but_one = wgmma.fence, wgmma.commit_group, wgmma.wait_group(1)
    # A step of 16 terms, in units of 16 bytes: within a row, or 16 rows of 128 bytes further down.
    a_step, b_step = (np.uint64(128 if major else 2) for major in (a_m_major, b_n_major))
    a_form, b_form = (SWIZZLE_128B_PANELS if major else SWIZZLE_128B for major in (a_m_major, b_n_major))
    to_b, to_lower = np.uint32(tiles.e_bytes), np.uint64(PANEL_BYTES >> 4)
    stages = np.uint32(tiles.stages)

    @cuda.jit(device=True, forceinline=True)
    def descriptor(form: Any, address: Any) -> Any:
        return form | np.uint64((np.uint32(address) & _LEAST_BITS) >> np.uint32(4))

    @cuda.jit(device=True, forceinline=True)
    def multiply(upper: Any, lower: Any, ring: Any, first_use: Any, k_steps: Any, thread: Any) -> Any:
        one = np.uint32(1)
        stage, parity = stage_of(first_use), parity_of(first_use)
        for k in range(k_steps):
            mbarrier.wait(full(ring, stage), parity)
            fence_proxy_async()  # rows that were copied one by one are there, but not yet for the tensor cores
            smem = np.uint32(a_smem(ring, stage))
            a, b = descriptor(a_form, smem), descriptor(b_form, smem + to_b)
            fence()
            upper = mma(upper, a, b, one)
            lower = mma(lower, a + to_lower, b, one)
            upper = mma(upper, a + a_step, b + b_step, one)
            lower = mma(lower, a + to_lower + a_step, b + b_step, one)
            upper = mma(upper, a + a_step + a_step, b + b_step + b_step, one)
            lower = mma(lower, a + to_lower + a_step + a_step, b + b_step + b_step, one)
            upper = mma(upper, a + a_step + a_step + a_step, b + b_step + b_step + b_step, one)
            lower = mma(lower, a + to_lower + a_step + a_step + a_step, b + b_step + b_step + b_step, one)
            commit_group()
            wait_all_but_one()
            if k > 0:
                release(ring, first_use + np.uint32(k - 1), thread)
            stage = np.uint32(stage + one)
            if stage == stages:
                stage = np.uint32(0)
                parity = np.uint32(parity ^ one)
        return upper, lower

    return multiply


@functools.cache
def make_work(tiles: BackwardTiles, dtype: np.dtype, capped: bool, with_sums: bool, scaled: bool, smoothed: bool) -> Any:
    """The device function of a consumer warpgroup; see `kernel.make_backward_kernel`."""
    ring_, jobs_ = make_ring(tiles), make_job_ring(tiles)
    turn, release = ring_.turn, ring_.release
    field, wait_job, job_empty = jobs_.field, jobs_.wait_full, jobs_.empty
    columns_smem, bias_smem = jobs_.columns_smem, jobs_.bias_smem
    name, block_v = "f16" if dtype == np.float16 else "bf16", tiles.block_v
    multiply_logits = make_multiply(tiles, name, a_m_major=False, b_n_major=False)
    multiply_d_e = make_multiply(tiles, name, a_m_major=True, b_n_major=True)
    multiply_d_c = make_multiply(tiles, name, a_m_major=False, b_n_major=True)
    store_g = make_store_g(block_v, dtype, capped, with_sums, scaled, smoothed)
    has_further = scaled or smoothed
    store_sums, add_to_sums, add_sums = make_store_sums(block_v), make_add_to_sums(block_v), make_add_sums(block_v)
    add_rows, half_bytes = make_add_rows(block_v, dtype), np.uint64(SUMS_STEP * (block_v // 8))
    store_rows, store_rows_in_float32 = make_store_rows(block_v, dtype), make_store_rows_in_float32(block_v)
    zeros, opaque = fragments.zeros(block_v), arithmetic.opaque_u32
    load_f32, load_i32, wait_all = memory.load_global_f32, memory.load_global_i32, wgmma.wait_group(0)
    float_of_bits = arithmetic.float_of_bits
    one_consumer = np.uint32(128)

    @cuda.jit(device=True, forceinline=True)
    def await_turn(ring: Any, consumer: Any, s: Any, turns: Any) -> Any:
        """Until the other's products are all under way; the number of turns so far."""
        if s > 0:
            mbarrier.wait(turn(ring, consumer), turns & np.uint32(1))
            turns = np.uint32(turns + np.uint32(1))
        # All four warps have seen it before the first can hand it over: a job may have nothing to multiply.
        control.barrier_sync(np.uint32(1 + consumer), one_consumer)
        return turns

    @cuda.jit(device=True, forceinline=True)
    def finish(ring: Any, consumer: Any, first_use: Any, k_steps: Any, thread: Any) -> None:
        """The other's products may queue up behind these; then these are awaited."""
        if thread == 0:
            mbarrier.arrive(turn(ring, np.int32(1 - consumer)))
        wait_all()
        if k_steps > 0:
            release(ring, first_use + np.uint32(k_steps - 1), thread)

    @cuda.jit(device=True, forceinline=True)
    def address_of(matrix: Any, pitch_bytes: Any, row: Any, offset: Any) -> Any:
        """0 for row -1: nobody's."""
        if row < 0:
            return np.uint64(0)
        return np.uint64(matrix + np.uint64(np.int64(row) * pitch_bytes + offset))

    @cuda.jit(device=True, forceinline=True)
    def add_to_rows(
        upper: Any, lower: Any, matrix: Any, pitch_bytes: Any, table: Any, position: Any, d: Any, D: Any, in_float32: Any,
        scale: Any,
    ) -> Any:  # fmt: skip
        """The sums times scale, plus what the gradient holds in this thread's places, the first table[position], column d."""
        offset, columns = np.int64(d) << (1 + in_float32), np.int32(D - d)
        row_0 = address_of(matrix, pitch_bytes, table[position], offset)
        row_1 = address_of(matrix, pitch_bytes, table[position + 8], offset)
        upper = add_rows(upper, row_0, row_1, columns, in_float32, scale)
        row_0 = address_of(matrix, pitch_bytes, table[position + 64], offset)
        row_1 = address_of(matrix, pitch_bytes, table[position + 72], offset)
        return upper, add_rows(lower, row_0, row_1, columns, in_float32, scale)

    @cuda.jit(device=True, forceinline=True)
    def finish_rows(
        upper: Any, lower: Any, staging: Any, matrix: Any, pitch_bytes: Any, table: Any, first: Any, thread: Any, d0: Any,
        D: Any, in_float32: Any, scale: Any, accumulate: Any,
    ) -> None:  # fmt: skip
        """Stores or adds a tile of a gradient: rows table[first], ..., from column d0 on; the sums are multiplied by scale."""
        lane, first = np.int32(thread & 31), np.int64(first + (thread >> 5) * 16)
        if accumulate:
            d = np.int32(d0 + 2 * (lane & 3))
            upper, lower = add_to_rows(
                upper, lower, matrix, pitch_bytes, table, first + (lane >> 2), d, D, in_float32, scale
            )  # fmt: skip
            scale = np.float32(1)
        if in_float32 != 0:
            d, position = np.int32(d0 + 2 * (lane & 3)), first + (lane >> 2)
            offset, columns = np.int64(4 * d), np.int32(D - d)
            row_0 = address_of(matrix, pitch_bytes, table[position], offset)
            row_1 = address_of(matrix, pitch_bytes, table[position + 8], offset)
            store_rows_in_float32(upper, row_0, row_1, columns, scale)
            row_0 = address_of(matrix, pitch_bytes, table[position + 64], offset)
            row_1 = address_of(matrix, pitch_bytes, table[position + 72], offset)
            store_rows_in_float32(lower, row_0, row_1, columns, scale)
        else:
            d, position = np.int32(d0 + 8 * (lane & 7)), first + (lane >> 3)
            offset, columns = np.int64(2 * d), np.int32(D - d)
            row_0 = address_of(matrix, pitch_bytes, table[position], offset)
            row_1 = address_of(matrix, pitch_bytes, table[position + 4], offset)
            row_2 = address_of(matrix, pitch_bytes, table[position + 8], offset)
            row_3 = address_of(matrix, pitch_bytes, table[position + 12], offset)
            store_rows(upper, staging, row_0, row_1, row_2, row_3, columns, scale)
            row_0 = address_of(matrix, pitch_bytes, table[position + 64], offset)
            row_1 = address_of(matrix, pitch_bytes, table[position + 68], offset)
            row_2 = address_of(matrix, pitch_bytes, table[position + 72], offset)
            row_3 = address_of(matrix, pitch_bytes, table[position + 76], offset)
            store_rows(lower, staging, row_0, row_1, row_2, row_3, columns, scale)

    @cuda.jit(device=True, forceinline=True)
    def sum_of_column(
        sums: Any, tile: Any, column: Any, slot: Any, slots: Any, first: Any, live: Any, bits: Any, before: Any, slot0: Any,
        n_ctiles: Any, block_words: Any,
    ) -> Any:  # fmt: skip
        """Of G, over all tokens: out of the partial sums of the blocks in which the tile's column survives."""
        total = np.float32(0)
        for word in range(block_words):
            blocks_left = live[tile * block_words + word]
            while blocks_left != 0:
                block = np.int64(32 * word + cuda.ffs(np.int32(blocks_left)) - 1)
                blocks_left = np.uint32(blocks_left & (blocks_left - np.uint32(1)))
                words, own = block * (4 * n_ctiles) + 4 * tile, np.int32(column >> 5)
                below = np.uint32((np.uint32(1) << np.uint32(column & 31)) - np.uint32(1))
                if bits[words + own] & np.uint32(below + np.uint32(1)) != 0:
                    counts = block * (n_ctiles + 1)
                    at = np.int64(slot + slot0[slots + block] + before[counts + tile] - before[counts + first])
                    for other in range(own):
                        at += cuda.popc(bits[words + other])
                    at += cuda.popc(np.uint32(bits[words + own] & below))
                    part = np.float32(0)
                    for i in range(PARTS):
                        bits_of_part = memory.load_if_u32(sums + np.uint64(4 * (at * PARTS + i)), np.uint32(1))
                        part += float_of_bits(bits_of_part)
                    total += part
        return total

    @cuda.jit(device=True, forceinline=True)
    def further_of(position: Any, row_of: Any, logit_scale: Any, smoothing: Any, scale: Any) -> Any:
        """A listed token's logit scale and uniform weight, the latter times the scale of the weights."""
        of_logits, uniform = np.float32(1), np.float32(0)
        if has_further:
            n = row_of[position]
            if n >= 0:
                if scaled:
                    of_logits = load_f32(logit_scale[0] + np.uint64(4 * np.int64(n)))
                if smoothed:
                    uniform = load_f32(smoothing[0] + np.uint64(4 * np.int64(n))) * scale[0]
        return of_logits, uniform

    @cuda.jit(device=True, forceinline=True)
    def work(
        jobs: Any, ring: Any, staging: Any, consumer: Any, thread: Any, rows: Any, row_of: Any, order: Any, scale: Any,
        softcap: Any, g: Any, sums: Any, d_e: Any, d_e_pitch_bytes: Any, e_in_float32: Any, sums_e: Any, d_tiles_e: Any,
        d_c: Any, d_c_pitch_bytes: Any, c_in_float32: Any, d_bias: Any, accumulate: Any, done: Any, live: Any, bits: Any,
        before: Any, slot0: Any, first_tile: Any, n_ctiles: Any, block_words: Any, blocks: Any, D: Any, logit_scale: Any,
        smoothing: Any,
    ) -> None:  # fmt: skip
        lane = np.int32(thread & 31)
        row = np.int32((thread >> 5) * 16 + (lane >> 2))  # and 8, 64, 72 further down
        unscale = scale[1]
        class_weights = np.uint64(0)
        if smoothed:
            class_weights = smoothing[1]
        staging = np.uint32(staging + np.uint32(consumer) * np.uint32(STAGING_BYTES))
        s, turns = np.uint32(consumer), np.uint32(0)
        while True:
            wait_job(jobs, s)
            kind = field(jobs, s, KIND)
            if kind == END:
                break
            first_use, k_steps = np.uint32(field(jobs, s, FIRST_USE)), field(jobs, s, K_STEPS)
            if kind == LOGITS:
                turns = await_turn(ring, consumer, s, turns)
                upper, lower = multiply_logits(zeros(), zeros(), ring, first_use, k_steps, thread)
                finish(ring, consumer, first_use, k_steps, thread)
                columns, biases, stored = opaque(columns_smem(jobs, s)), opaque(bias_smem(jobs, s)), field(jobs, s, STORED)
                slot = np.int64(field(jobs, s, SLOT))
                tile = np.uint64(g + np.uint64(slot * G_ROW_BYTES))
                sum_parts = np.uint64(sums + np.uint64(4 * (slot * PARTS + (thread >> 5))))
                position = np.int64(field(jobs, s, PLACE)) * COLUMN_TILE + row
                record = np.uint64(rows + np.uint64(16 * position))
                next_record = np.uint64(record + np.uint64(128))
                scale_0, uniform_0 = further_of(position, row_of, logit_scale, smoothing, scale)
                scale_1, uniform_1 = further_of(position + 8, row_of, logit_scale, smoothing, scale)
                store_g(
                    upper, columns, biases, stored, staging, tile, sum_parts, consumer,
                    load_f32(record), load_f32(record + np.uint64(8)), load_f32(record + np.uint64(4)),
                    load_i32(record + np.uint64(12)), scale_0, uniform_0,
                    load_f32(next_record), load_f32(next_record + np.uint64(8)), load_f32(next_record + np.uint64(4)),
                    load_i32(next_record + np.uint64(12)), scale_1, uniform_1, softcap, class_weights,
                )  # fmt: skip
                record, next_record = np.uint64(record + np.uint64(1024)), np.uint64(record + np.uint64(1152))
                scale_0, uniform_0 = further_of(position + 64, row_of, logit_scale, smoothing, scale)
                scale_1, uniform_1 = further_of(position + 72, row_of, logit_scale, smoothing, scale)
                store_g(
                    lower, columns, biases, stored, staging, tile + np.uint64(128), sum_parts + np.uint64(16), consumer,
                    load_f32(record), load_f32(record + np.uint64(8)), load_f32(record + np.uint64(4)),
                    load_i32(record + np.uint64(12)), scale_0, uniform_0,
                    load_f32(next_record), load_f32(next_record + np.uint64(8)), load_f32(next_record + np.uint64(4)),
                    load_i32(next_record + np.uint64(12)), scale_1, uniform_1, softcap, class_weights,
                )  # fmt: skip
                memory.fence_proxy_async_all()  # the bulk copy engine will read G
            elif kind == D_E:
                turns = await_turn(ring, consumer, s, turns)
                upper, lower = multiply_d_e(zeros(), zeros(), ring, first_use, k_steps, thread)
                finish(ring, consumer, first_use, k_steps, thread)
                d0, place = field(jobs, s, D0), np.int64(field(jobs, s, PLACE))
                is_first, is_last = field(jobs, s, IS_FIRST) != 0, field(jobs, s, IS_LAST) != 0
                tile = place * d_tiles_e + quotient(d0, np.int32(block_v))
                address = np.uint64(sums_e + np.uint64(tile) * np.uint64(2 * half_bytes) + np.uint64(16 * thread))
                if not is_last:
                    if is_first:
                        store_sums(upper, address)
                        store_sums(lower, address + half_bytes)
                    else:
                        add_to_sums(upper, address)
                        add_to_sums(lower, address + half_bytes)
                else:
                    if not is_first:
                        upper, lower = add_sums(upper, address), add_sums(lower, address + half_bytes)
                    finish_rows(
                        upper, lower, staging, d_e, d_e_pitch_bytes, row_of, place * COLUMN_TILE, thread, d0, D, e_in_float32,
                        unscale, accumulate,
                    )  # fmt: skip
            else:
                turns = await_turn(ring, consumer, s, turns)
                upper, lower = multiply_d_c(zeros(), zeros(), ring, first_use, k_steps, thread)
                finish(ring, consumer, first_use, k_steps, thread)
                d0, first = field(jobs, s, D0), np.int64(field(jobs, s, PLACE)) * COLUMN_TILE
                if d_c != 0:  # or the gradient of the bias alone is wanted
                    finish_rows(
                        upper, lower, staging, d_c, d_c_pitch_bytes, order, first, thread, d0, D, c_in_float32, unscale,
                        accumulate,
                    )  # fmt: skip
                if with_sums and field(jobs, s, D0) == 0:
                    place = np.int64(field(jobs, s, PLACE))
                    v = order[place * COLUMN_TILE + thread]
                    if v >= 0:
                        r = field(jobs, s, ROUND)
                        slots, first = np.int64(r) * (blocks + 1), first_tile[r]
                        d_bias[v] = unscale * sum_of_column(
                            sums, place, thread, field(jobs, s, SLOT), slots, first, live, bits, before, slot0, n_ctiles,
                            block_words,
                        )  # fmt: skip
            phase = field(jobs, s, PHASE)
            control.barrier_sync(np.uint32(1 + consumer), one_consumer)
            if thread == 0:
                mbarrier.arrive(job_empty(jobs, s))
                memory.add_release_u32(done + np.uint64(4 * phase), np.uint32(1))
            s = np.uint32(s + np.uint32(2))

    return work
