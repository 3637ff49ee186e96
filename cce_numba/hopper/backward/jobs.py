"""Jobs: what a CTA computes next. One warp takes them off the GPU's queue and describes them in shared memory for the others.

All CTAs take jobs off one queue, in the order of `survey`'s phases:

    G(0)  G(1) P(0)  G(2) P(1)  ...  P(R-1)

With clusters of two, a pair takes neighbouring jobs, and often both multiply the same A. A stage is free once both CTAs have
let go of it, so both must go through equally many, or they wait for each other forever: phases have even numbers of jobs, and
those of dE and dC come in rows of an even number of tiles (see `run`). The pair's first CTA takes two numbers off the queue,
and mails one to the second, once this has read the one before.

G(r) recomputes the logits of round r and writes G to the workspace; P(r) multiplies it: dC of the round's vocabulary entries,
and what they add to dE. A phase begins when those that it depends on are done, which the phase in between gives them time for.
Each output tile of a phase has one owner, and the phases of a tile follow each other, so the sums are the same in every run,
whichever CTA computes them.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.tiles import HEADER_WORDS, BackwardTiles
from cce_numba.ptx import cluster, control, mbarrier, memory
from cce_numba.tensor_core.numbers import make_load
from cce_numba.tensor_core.schedule import quotient
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, K_STEP, LIST_TILE

# Kinds of jobs.
LOGITS, D_E, D_C, END = np.int32(0), np.int32(1), np.int32(2), np.int32(3)

# Words of a job's header.
KIND, FIRST_USE, K_STEPS = 0, 1, 2
PLACE = 3  # the block of tokens (LOGITS, D_E) or the tile of columns (D_C)
D0 = 4  # first hidden entry of the tile (D_E, D_C)
STORED = 5  # columns of G to store (LOGITS): those of the list, and zeros up to a whole step of the sum
SLOT = 6  # of G's first column in the workspace (LOGITS: of this tile; D_E: of the block; D_C: of the buffer)
FIRST = 7  # the first column's place in sorted order, of this tile (LOGITS) or of the round
PHASE = 8
ROUND = 9
IS_FIRST, IS_LAST = 10, 11  # round
SHARED = 12  # whether the pair's other CTA multiplies the same A


@functools.cache
def make_job_ring(tiles: BackwardTiles) -> SimpleNamespace:
    """Addresses and barriers of the job slots. Job number s of a CTA is in slot s % slots."""
    slots, job_bytes = np.uint32(tiles.job_slots), np.uint32(tiles.job_bytes)
    barriers = np.uint32(tiles.job_slots * tiles.job_bytes)
    readers = np.uint32(2 + tiles.gatherers)  # the copying thread, the gathering warps, one consumer
    load, store, ctas = memory.load_shared_i32, memory.store_shared_i32, np.uint32(tiles.cluster)

    @cuda.jit(device=True, forceinline=True)
    def slot_of(jobs: Any, s: Any) -> Any:
        return np.uint32(jobs + (np.uint32(s) % slots) * job_bytes)

    @cuda.jit(device=True, forceinline=True)
    def full(jobs: Any, s: Any) -> Any:
        return np.uint32(jobs + barriers + (np.uint32(s) % slots) * np.uint32(8))

    @cuda.jit(device=True, forceinline=True)
    def empty(jobs: Any, s: Any) -> Any:
        return np.uint32(jobs + barriers + (slots + np.uint32(s) % slots) * np.uint32(8))

    @cuda.jit(device=True, forceinline=True)
    def hungry(jobs: Any) -> Any:
        """The barrier by which the copying thread asks for its next job."""
        return np.uint32(jobs + barriers + slots * np.uint32(16))

    @cuda.jit(device=True, forceinline=True)
    def mail_full(jobs: Any) -> Any:
        """The barrier at which the pair's second CTA learns of its next job."""
        return np.uint32(jobs + barriers + slots * np.uint32(16) + np.uint32(8))

    @cuda.jit(device=True, forceinline=True)
    def mail_read(jobs: Any) -> Any:
        """The barrier at which the first learns that it has."""
        return np.uint32(jobs + barriers + slots * np.uint32(16) + np.uint32(16))

    @cuda.jit(device=True, forceinline=True)
    def mail(jobs: Any, s: Any) -> Any:
        """Two places, so that what is in one has been used by the time that it is written to again."""
        return np.uint32(jobs + barriers + slots * np.uint32(16) + np.uint32(24) + np.uint32(4) * (np.uint32(s) & np.uint32(1)))

    @cuda.jit(device=True, forceinline=True)
    def parity_of(s: Any) -> Any:
        return (np.uint32(s) // slots) & np.uint32(1)

    @cuda.jit(device=True, forceinline=True)
    def init(jobs: Any) -> None:
        """By one thread."""
        for s in range(slots):
            mbarrier.init(full(jobs, s), np.uint32(32))
            mbarrier.init(empty(jobs, s), readers)
        mbarrier.init(hungry(jobs), np.uint32(1))
        mbarrier.init(mail_full(jobs), np.uint32(1))
        mbarrier.init(mail_read(jobs), np.uint32(1))
        mbarrier.fence_init()

    @cuda.jit(device=True, forceinline=True)
    def wait_full(jobs: Any, s: Any) -> None:
        mbarrier.wait(full(jobs, s), parity_of(s))

    @cuda.jit(device=True, forceinline=True)
    def wait_empty(jobs: Any, s: Any) -> None:
        mbarrier.wait(empty(jobs, s), parity_of(s) ^ np.uint32(1))

    @cuda.jit(device=True, forceinline=True)
    def take(jobs: Any, s: Any, next_job: Any, rank: Any, lane: Any) -> Any:
        """By a warp: the number of this CTA's next job, s, once it is hungry; of a pair, the first takes two, and tells."""
        job = np.int32(0)
        if s > 0:
            mbarrier.wait(hungry(jobs), (s - np.uint32(1)) & np.uint32(1))
        if rank == 0:
            if lane == 0:
                job = np.int32(memory.fetch_add_u32(next_job, ctas))
                if ctas > 1:
                    if s > 0:
                        mbarrier.wait(mail_read(jobs), (s - np.uint32(1)) & np.uint32(1))
                    other = np.uint32(1)
                    there = cluster.map_shared(mail(jobs, s), other)
                    cluster.store_async(there, np.uint32(job), cluster.map_shared(mail_full(jobs), other))
        else:
            if lane == 0:
                mbarrier.arrive_expect_tx(mail_full(jobs), np.uint32(4))
                mbarrier.wait(mail_full(jobs), s & np.uint32(1))
                job = np.int32(load(mail(jobs, s)) + 1)
                mbarrier.arrive_cluster(cluster.map_shared(mail_read(jobs), np.uint32(0)))
        return np.int32(control.shuffle_i32(job, np.uint32(0)))

    @cuda.jit(device=True, forceinline=True)
    def field(jobs: Any, s: Any, word: Any) -> Any:
        return np.int32(load(slot_of(jobs, s) + np.uint32(4 * word)))

    @cuda.jit(device=True, forceinline=True)
    def set_field(jobs: Any, s: Any, word: Any, value: Any) -> None:
        store(slot_of(jobs, s) + np.uint32(4 * word), np.int32(value))

    @cuda.jit(device=True, forceinline=True)
    def columns_smem(jobs: Any, s: Any) -> Any:
        """(LIST_TILE,) int32: vocabulary entries of the list, -1 past its end."""
        return np.uint32(slot_of(jobs, s) + np.uint32(4 * HEADER_WORDS))

    @cuda.jit(device=True, forceinline=True)
    def bias_smem(jobs: Any, s: Any) -> Any:
        """(LIST_TILE,) float32: their biases."""
        return np.uint32(slot_of(jobs, s) + np.uint32(4 * (HEADER_WORDS + LIST_TILE)))

    return SimpleNamespace(**{k: v for k, v in locals().items() if hasattr(v, "py_func")})


@cuda.jit(device=True, forceinline=True)
def largest_at_most(prefix: Any, first: Any, count: Any, value: Any, lane: Any) -> Any:
    """By a warp: the largest i < count with prefix[first + i] <= value, of an ascending table that begins with such a one."""
    i = np.int32(0)
    while True:
        probe = np.int32(i + lane + 1)
        holds = probe < count and prefix[first + probe] <= value
        more = np.int32(cuda.popc(np.uint32(cuda.ballot_sync(0xFFFFFFFF, holds))))
        i = np.int32(i + more)
        if more < 32:
            return i


@cuda.jit(device=True, forceinline=True)
def listed_place(slot: Any) -> Any:
    """Where a slot's column is listed: of 64 slots, those that are 8 apart lie together, since one thread copies their rows."""
    return np.int32((slot & -64) | ((slot & 7) << 3) | ((slot >> 3) & 7))


@cuda.jit(device=True, forceinline=True)
def phase_of_logits(r: Any) -> Any:
    """The place of G(r) in the order of phases."""
    return np.int32(max(0, 2 * r - 1))


@cuda.jit(device=True, forceinline=True)
def phase_of_products(r: Any, rounds: Any) -> Any:
    """The place of P(r)."""
    return np.int32(2 * rounds - 1 if r == rounds - 1 else 2 * r + 2)


@cuda.jit(device=True, forceinline=True)
def wait_for_phase(phase: Any, phase_end: Any, done: Any) -> None:
    """By one thread: until all jobs of the phase are done, and what they wrote is visible."""
    expected = phase_end[phase]
    if phase > 0:
        expected -= phase_end[phase - 1]
    while np.int32(memory.load_acquire_u32(done + np.uint64(4 * phase))) < expected:
        cuda.nanosleep(np.uint32(100))


@functools.cache
def make_schedule(tiles: BackwardTiles, dtype: np.dtype) -> Any:
    """The device function of the warp that takes jobs and describes them."""
    jobs_ = make_job_ring(tiles)
    take, wait_empty, full, set_field, columns_smem, bias_smem = (
        jobs_.take,
        jobs_.wait_empty,
        jobs_.full,
        jobs_.set_field,
        jobs_.columns_smem,
        jobs_.bias_smem,
    )
    load_smem, store_smem, store_float = memory.load_shared_i32, memory.store_shared_i32, memory.store_shared_f32
    load_narrow, load_wide = make_load(dtype), make_load(np.dtype(np.float32))
    list_tile, column_tile, block_v = LIST_TILE, COLUMN_TILE, tiles.block_v
    arrive = mbarrier.arrive

    @cuda.jit(device=True, forceinline=True)
    def publish(jobs: Any, s: Any) -> None:
        """By all lanes, each of which wrote parts of the list."""
        arrive(full(jobs, s))

    @cuda.jit(device=True, forceinline=True)
    def expand(columns: Any, wanted: Any, ordinal: Any, bits: Any, row: Any, first_word: Any, end_word: Any, lane: Any) -> None:
        """Sorted places of `wanted` survivors, of a row of bits from a word on; `ordinal` more come before them."""
        word, found = np.int32(first_word), np.int32(-ordinal)
        while found < wanted:
            mine = np.uint32(0)
            if word + lane < end_word:
                mine = bits[row + word + lane]
            count = np.int32(cuda.popc(mine))
            upto = count
            for step in (1, 2, 4, 8, 16):
                before = cuda.shfl_up_sync(0xFFFFFFFF, upto, step)
                if lane >= step:
                    upto = np.int32(upto + before)
            position = np.int32(found + upto - count)
            while mine != 0 and position < wanted:
                if position >= 0:
                    place = 32 * (word + lane) + cuda.ffs(np.int32(mine)) - 1
                    store_smem(np.uint32(columns + np.uint32(4 * position)), np.int32(place))
                mine = np.uint32(mine & (mine - np.uint32(1)))
                position = np.int32(position + 1)
            found = np.int32(found + control.shuffle_i32(np.int32(upto), np.uint32(31)))
            word = np.int32(word + 32)

    @cuda.jit(device=True, forceinline=True)
    def schedule(
        jobs: Any, lane: Any, rank: Any, next_job: Any, done: Any, t: Any, n_blocks: Any, blocks: Any, n_ctiles: Any,
        block_words: Any, zero_fill: Any, d_tiles_c: Any, d_tiles_e: Any, k_steps_d: Any, buffers: Any, buffer_slots: Any,
        lists: Any, bias: Any, bias_bytes: Any,
    ) -> None:  # fmt: skip
        """t: the survey's tables, see `kernel`; d_tiles_c, d_tiles_e: tiles of a row of dC and dE, 0 if it is not wanted;
        bias_bytes: of a bias, 0 for none."""
        (n_rounds, first_tile, first_g, slot0, phase_end, before, bits, live, order, dense, n_live_tiles) = t
        rounds, is_dense, live_tiles = n_rounds[0], dense[0] != 0, n_live_tiles[0]
        zero_tiles = np.int32(0)
        if zero_fill:
            zero_tiles = np.int32(n_ctiles - live_tiles)
        phase, phase_first, entered, added = np.int32(0), np.int32(0), np.int32(-1), np.int32(0)
        s, use = np.uint32(0), np.uint32(0)
        while True:
            job = take(jobs, s, next_job, rank, lane)
            while phase < 2 * rounds and job >= phase_end[phase]:
                phase_first = phase_end[phase]
                phase = np.int32(phase + 1)
            wait_empty(jobs, s)
            if phase >= 2 * rounds:
                break
            index = np.int32(job - phase_first)
            is_products = phase == 2 * rounds - 1 or (phase > 0 and phase % 2 == 0)
            r = np.int32(phase // 2 if phase == 2 * rounds - 1 or phase % 2 == 0 else (phase + 1) // 2)
            if is_products and phase < 2 * rounds - 1:
                r = np.int32(r - 1)
            if phase != entered:
                if lane == 0:
                    if is_products:
                        wait_for_phase(phase_of_logits(r), phase_end, done)
                    elif r >= buffers:
                        wait_for_phase(phase_of_products(np.int32(r - buffers), rounds), phase_end, done)
                cuda.syncwarp()
                entered = phase
            t0, t1 = first_tile[r], first_tile[r + 1]
            buffer = np.int32((r % buffers) * buffer_slots)
            kind, place, d0, columns, stored = LOGITS, np.int32(0), np.int32(0), np.int32(0), np.int32(0)
            slot, first, k_steps, shared = buffer, np.int32(column_tile * t0), np.int32(k_steps_d), True
            if not is_products:
                row = np.int64(r) * (blocks + 1)
                place = largest_at_most(first_g, row, n_blocks, index, lane)
                skipped = np.int32(list_tile * (index - first_g[row + place]))
                counts = np.int64(place) * (n_ctiles + 1)
                n_list = np.int32(before[counts + t1] - before[counts + t0])
                # A phase's last job may be there for the sake of a pair, and have no columns.
                columns = max(np.int32(0), min(np.int32(list_tile), np.int32(n_list - skipped)))
                rounded = np.int32((n_list + K_STEP - 1) // K_STEP * K_STEP)
                stored = max(np.int32(0), min(np.int32(list_tile), np.int32(rounded - skipped)))
                if rank == 0:
                    shared = place + 1 == n_blocks or index + 1 < first_g[row + place + 1]
                else:
                    shared = index > first_g[row + place]
                slot = np.int32(buffer + slot0[row + place] + skipped)
                first = np.int32(first + skipped)
                ids = columns_smem(jobs, s)
                if not is_dense and columns > 0:
                    ordinal = np.int32(before[counts + t0] + skipped)
                    tile = np.int32(t0 + largest_at_most(before, counts + t0, t1 - t0, ordinal, lane))
                    words = np.int64(place) * (4 * n_ctiles)
                    ordinal = np.int32(ordinal - before[counts + tile])
                    expand(ids, columns, ordinal, bits, words, np.int32(4 * tile), np.int32(4 * t1), lane)
                    cuda.syncwarp()
                for q in range(list_tile // 32):
                    position = np.int32(32 * q + lane)
                    v = np.int32(-1)
                    if position < columns:
                        v = np.int32(first + position)
                        if not is_dense:
                            v = order[load_smem(np.uint32(ids + np.uint32(4 * position)))]
                    store_smem(np.uint32(ids + np.uint32(4 * position)), np.int32(v))
                    b = np.float32(0)
                    if v >= 0 and bias_bytes == 4:
                        b = load_wide(bias + np.uint64(4 * v))
                    elif v >= 0 and bias_bytes == 2:
                        b = load_narrow(bias + np.uint64(2 * v))
                    store_float(np.uint32(bias_smem(jobs, s) + np.uint32(4 * position)), b)
                if d_tiles_e > 0:
                    cuda.syncwarp()
                    last = np.int32(columns - 1)
                    for at in range(lane, stored, 32):
                        # Past the end, G is zero; times a row that counts, which cannot make a NaN where there is none.
                        listed = load_smem(np.uint32(ids + np.uint32(4 * (at if at < last else last))))
                        memory.store_global_u32(lists + np.uint64(4 * np.int64(listed_place(slot + at))), np.uint32(listed))
            else:
                own, share = np.int32(t1 - t0), np.int32(0)
                zero_first = np.int64(0)
                if d_tiles_c > 0:
                    zero_first = np.int64(zero_tiles) * r // rounds
                    share = np.int32(np.int64(zero_tiles) * (r + 1) // rounds - zero_first)
                n_products = np.int32((own + share) * d_tiles_c)
                if index < n_products:
                    kind = D_C
                    i = quotient(index, d_tiles_c)
                    d0 = np.int32((index - i * d_tiles_c) * block_v)
                    # Tiles without survivors, which take memory alone, evenly among those that take the tensor cores.
                    zeros = np.int32(np.int64(i) * share // (own + share))
                    if np.int64(i + 1) * share // (own + share) > zeros:
                        place, k_steps = np.int32(n_ctiles - zero_tiles + zero_first + zeros), np.int32(0)
                    else:
                        place = np.int32(t0 + i - zeros)
                        k_steps = np.int32(0)
                        for word in range(lane, block_words, 32):
                            k_steps = np.int32(k_steps + 2 * cuda.popc(live[np.int64(place) * block_words + word]))
                        for mask in (16, 8, 4, 2, 1):
                            k_steps = np.int32(k_steps + cuda.shfl_xor_sync(0xFFFFFFFF, k_steps, mask))
                else:
                    kind = D_E
                    if r > added:
                        # Only these go on from where the round before has come to.
                        if lane == 0:
                            wait_for_phase(phase_of_products(np.int32(r - 1), rounds), phase_end, done)
                        cuda.syncwarp()
                        added = r
                    index = np.int32(index - n_products)
                    place = quotient(index, d_tiles_e)
                    d0 = np.int32((index - place * d_tiles_e) * block_v)
                    counts = np.int64(place) * (n_ctiles + 1)
                    columns = np.int32(before[counts + t1] - before[counts + t0])
                    slot = np.int32(buffer + slot0[np.int64(r) * (blocks + 1) + place])
                    k_steps = quotient(columns + K_STEP - 1, np.int32(K_STEP))
            if lane == 0:
                set_field(jobs, s, KIND, kind)
                set_field(jobs, s, FIRST_USE, np.int32(use))
                set_field(jobs, s, K_STEPS, k_steps)
                set_field(jobs, s, PLACE, place)
                set_field(jobs, s, D0, d0)
                set_field(jobs, s, STORED, stored)
                set_field(jobs, s, SLOT, slot)
                set_field(jobs, s, FIRST, first)
                set_field(jobs, s, PHASE, phase)
                set_field(jobs, s, ROUND, r)
                set_field(jobs, s, IS_FIRST, np.int32(r == 0))
                set_field(jobs, s, IS_LAST, np.int32(r == rounds - 1))
                set_field(jobs, s, SHARED, np.int32(shared))
            publish(jobs, s)
            use = np.uint32(use + np.uint32(k_steps))
            s = np.uint32(s + np.uint32(1))
        # Both consumers are told, and whoever else reads the first of the two.
        for _ in range(2):
            wait_empty(jobs, s)
            if lane == 0:
                set_field(jobs, s, KIND, END)
            publish(jobs, s)
            s = np.uint32(s + np.uint32(1))

    return schedule
