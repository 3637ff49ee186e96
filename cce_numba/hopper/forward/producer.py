"""The producer warpgroup: one thread fetches tiles by the bulk copy engine, two warps fetch scattered rows of e one by one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.forward.batch import make_who_am_i
from cce_numba.hopper.ring import make_ring
from cce_numba.hopper.tensor_map import MAP_BYTES
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.ptx import arithmetic, mbarrier, memory, tma
from cce_numba.tensor_core.schedule import NO_SLOT, fixed_segment, quotient, segment
from cce_numba.tensor_core.tokens import are_neighbours, token_at


@functools.cache
def make_produce(tiles: HopperTiles, fixed: bool, has_teacher: bool = False) -> Any:
    """The device function of the thread that fetches tiles with the bulk copy engine.

    `produce(ring, maps, batch, first_v, n_tiles, k_teacher, k_steps)`: ring is the ring's shared address; maps is the address
    of the tensor maps of e (N, D) and c (V, D), and where there is a teacher of its e and c; batch is a `Batch`. first_v is the
    row of c, counted from the first that its map reaches, with which the launch's part of the vocabulary begins. That part has
    n_tiles tiles, of k_steps stages each, ceil(D / 64), after k_teacher stages of the teacher. fixed: by a fixed schedule.
    """
    ring_ = make_ring(tiles)
    wait_empty, stage_of, full, e_smem, c_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem, ring_.c_smem
    block_n, block_v, block_d, ctas = tiles.block_n, tiles.block_v, tiles.block_d, tiles.cluster
    part_v, part_bytes = block_v // ctas, np.uint32(tiles.c_bytes // ctas)
    e_bytes, c_bytes = np.uint32(tiles.e_bytes), np.uint32(tiles.c_bytes)
    everyone = np.uint32((1 << ctas) - 1)
    who_am_i, segment_of = make_who_am_i(tiles), fixed_segment if fixed else segment

    @cuda.jit(device=True, inline="always")  # as if it were written out
    def fetch(
        ring: Any, use: Any, e_map: Any, c_map: Any, fetches_e: Any, first_row: Any, v: Any, k_steps: Any, expected: Any,
        rank: Any,
    ) -> Any:  # fmt: skip
        """Fetches the k_steps stages of a tile from use `use` on, and returns the use after them.

        first_row: row of e with which the block begins, if its rows are fetched here. v: row of c with which this CTA's part
        begins. expected: bytes that come to this CTA in each stage.
        """
        k = np.int32(0)
        while k < k_steps:
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
            use, k = np.uint32(use + np.uint32(1)), arithmetic.opaque_i32(np.int32(k + 1))
        return use

    @cuda.jit(device=True, forceinline=True)
    def produce(
        ring: Any, maps: Any, batch: Any, first_v: Any, n_tiles: Any, k_teacher: Any, k_steps: Any
    ) -> None:  # fmt: skip
        """By one thread: fetches this CTA's part of all tiles that its cluster takes, a stage of 64 terms at a time."""
        worker, workers, groups, rank = who_am_i(batch)
        tokens, n_listed = batch.tokens, batch.n_listed
        e_map, c_map = maps, maps + MAP_BYTES
        teacher_e_map, teacher_c_map = maps + np.uint64(2) * MAP_BYTES, maps + np.uint64(3) * MAP_BYTES
        tma.fence_tensor_map(e_map)
        tma.fence_tensor_map(c_map)
        if has_teacher:
            tma.fence_tensor_map(teacher_e_map)
            tma.fence_tensor_map(teacher_c_map)
        use, index = np.uint32(0), np.int32(0)
        while True:
            group, first, last, step, slot = segment_of(index, worker, workers, groups, batch.per_round, n_tiles)
            if slot == NO_SLOT:
                break
            n0 = np.int32((group * ctas + rank) * block_n)
            gathered = n0 < n_listed and not are_neighbours(tokens, n0, n_listed)
            first_row = 0
            if n0 < n_listed:
                first_row = token_at(tokens, n0)
            fetches_e = n0 < n_listed and not gathered
            expected = c_bytes
            if fetches_e:
                expected += e_bytes
            for v_tile in range(first, last, step):
                v = first_v + v_tile * block_v + rank * part_v
                if has_teacher:
                    use = fetch(
                        ring, use, teacher_e_map, teacher_c_map, fetches_e, first_row, v, k_teacher, expected, rank
                    )  # fmt: skip
                use = fetch(ring, use, e_map, c_map, fetches_e, first_row, v, k_steps, expected, rank)
            index = np.int32(index + 1)

    return produce


@functools.cache
def make_gather(tiles: HopperTiles, fixed: bool, has_teacher: bool = False) -> Any:
    """The device function of the warps that fetch rows of e one by one, 16 bytes a lane, and swizzle them by hand.

    `gather(ring, thread, e, teacher, batch, n_tiles, k_teacher, k_steps, D)`: thread is 0 to 63 among those of these warps, e
    is a `Matrix` (N, D), and teacher a `Teacher` or `NoTeacher`; the others are as in `make_produce`. In a block whose tokens
    are neighbours there is nothing to fetch, and the warps only arrive at the stages' barriers.
    """
    ring_ = make_ring(tiles)
    wait_empty, stage_of, full, e_smem = ring_.wait_empty, ring_.stage_of, ring_.full, ring_.e_smem
    block_n, ctas = tiles.block_n, tiles.cluster
    rows_at_once = 4 * tiles.gatherers  # 8 lanes for the 128 bytes of a row
    who_am_i, segment_of = make_who_am_i(tiles), fixed_segment if fixed else segment
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
        ring: Any, thread: Any, e: Any, teacher: Any, batch: Any, n_tiles: Any, k_teacher: Any, k_steps: Any, D: Any
    ) -> None:  # fmt: skip
        """By two warps: fetches (128, 64) numbers of e for each stage, in blocks whose tokens are not neighbours."""
        worker, workers, groups, rank = who_am_i(batch)
        tokens, n_listed = batch.tokens, batch.n_listed
        part, first_row = np.int32(thread & 7), np.int32(thread >> 3)
        source_0 = e.address + np.uint64(16 * part)
        row_bytes: Any = np.int32(2 * D - 16 * part)
        swizzled = np.uint32((part ^ (first_row & 7)) << 4)  # rows of this thread are 8 apart: the same in all of them
        use, index = np.uint32(0), np.int32(0)
        while True:
            group, first, last, step, slot = segment_of(index, worker, workers, groups, batch.per_round, n_tiles)
            if slot == NO_SLOT:
                break
            n0 = np.int32((group * ctas + rank) * block_n)
            # Of a tile the teacher's stages come first, for which k is negative.
            uses, k = np.int32(quotient(last - first + step - 1, step) * (k_teacher + k_steps)), np.int32(-k_teacher)
            rows, under_way, listed = np.int32(0), np.int32(0), tokens + np.uint64(4 * n0)
            if n0 < n_listed and not are_neighbours(tokens, n0, n_listed):
                rows = np.int32(min(block_n, n_listed - n0))
            while uses > 0:
                wait_empty(ring, use)
                if rows > 0:
                    stage_smem = np.uint32(e_smem(ring, stage_of(use)) + swizzled)
                    source, pitch_bytes, of_row_bytes, stage_k = source_0, e.pitch_bytes, row_bytes, k
                    if has_teacher and k < 0:
                        source, pitch_bytes = teacher.e.address + np.uint64(16 * part), teacher.e.pitch_bytes
                        of_row_bytes, stage_k = np.int32(2 * teacher.D - 16 * part), np.int32(k + k_teacher)
                    present_bytes = np.uint32(min(16, max(0, of_row_bytes - 128 * stage_k)))
                    row = first_row
                    while row < rows:
                        token = memory.load_global_i32(listed + np.uint64(4 * row))
                        row_source = source + np.uint64(np.int64(token) * pitch_bytes + 128 * stage_k)
                        memory.copy_async_16(np.uint32(stage_smem + np.uint32(row * 128)), row_source, present_bytes)
                        # Unrolled, this loop would take more registers than there are.
                        row = arithmetic.opaque_i32(np.int32(row + rows_at_once))
                    memory.copy_async_commit()
                    wait_all_but_two()  # two stages stay under way; what came before has landed
                    if under_way < 2:
                        under_way = np.int32(under_way + 1)
                    else:
                        arrive(ring, use - np.uint32(2), thread)
                else:
                    arrive(ring, use, thread)
                use, uses, k = np.uint32(use + np.uint32(1)), np.int32(uses - 1), np.int32(k + 1)
                if k == k_steps:
                    k = np.int32(-k_teacher)
            wait_all()
            while under_way > 0:
                arrive(ring, use - np.uint32(under_way), thread)
                under_way = np.int32(under_way - 1)
            index = np.int32(index + 1)

    return gather
