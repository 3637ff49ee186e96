"""A consumer warpgroup: multiplies a tile while the other consumer folds its own, then they change places."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.forward.batch import make_who_am_i
from cce_numba.hopper.operands import NEXT_PANEL, descriptor, form_of, step_of
from cce_numba.hopper.ring import make_ring
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.launch.record import Record
from cce_numba.ptx import arithmetic, control, mbarrier, memory, wgmma
from cce_numba.ptx import fragment as fragments
from cce_numba.tensor_core.divergence import TeacherForm
from cce_numba.tensor_core.folds import Fold, RowPair, Tile, chain, number_count
from cce_numba.tensor_core.folds.divergence import make_park
from cce_numba.tensor_core.folds.rows import make_load_shared_numbers, make_store_numbers, make_store_shared_numbers
from cce_numba.tensor_core.logits import make_bias_fragment, make_finish_logits
from cce_numba.tensor_core.records import I32
from cce_numba.tensor_core.schedule import NO_SLOT, fixed_segment, quotient, segment
from cce_numba.tensor_core.tokens import token_at

_MERGE_BARRIER = np.uint32(1)  # of both consumers; those of each alone are 2 and 3 (`folds.mean_logit`)


class Consumer(Record):
    """Which thread this is."""

    number = I32  # of the warpgroup among the consumers
    thread = I32  # of the warpgroup, 0 to 127


@functools.cache
def make_multiply(tiles: HopperTiles, dtype: str) -> Any:
    """`upper, lower = multiply(upper, lower, e_smem, accumulate)`: the products of one stage of the ring, 64 terms.

    upper, lower: sums of the tile's first and last 64 tokens. e_smem: shared address of the stage: rows of c follow those of e.
    accumulate: 0 if the sums begin with this stage. The products run on after it returns.
    """
    mma, form = wgmma.mma(tiles.block_v, dtype), form_of(transposed=False)
    to_lower, step = NEXT_PANEL, step_of(transposed=False)
    second, third = np.uint64(2) * step, np.uint64(3) * step
    e_bytes = np.uint32(tiles.e_bytes)

    @cuda.jit(device=True, forceinline=True)
    def multiply(upper: Any, lower: Any, e_smem: Any, accumulate: Any) -> Any:
        """Four products of 16 terms, 32 bytes of a row, for the upper 64 tokens, and for the lower."""
        one, a, b = np.uint32(1), descriptor(form, e_smem), descriptor(form, e_smem + e_bytes)
        upper = mma(upper, a, b, accumulate)
        lower = mma(lower, a + to_lower, b, accumulate)
        upper = mma(upper, a + step, b + step, one)
        lower = mma(lower, a + to_lower + step, b + step, one)
        upper = mma(upper, a + second, b + second, one)
        lower = mma(lower, a + to_lower + second, b + second, one)
        upper = mma(upper, a + third, b + third, one)
        lower = mma(lower, a + to_lower + third, b + third, one)
        return upper, lower

    return multiply


@functools.cache
def make_merge_consumers(tiles: HopperTiles, folds: tuple[Fold, ...]) -> Any:
    """`merge_consumers(upper, lower, row, me, smem, parts, place)`: the states of both consumers become one, in `parts`.

    upper, lower: states of the lane's rows `row`, `row + 8`, and `row + 64`, `row + 72`. smem: shared address of `row_numbers`
    float32 for each of 128 rows. place: of row 0 in `parts`. The order of a merge is always the same, and so are its bits.
    """
    folded, count, block_n = chain(folds, tiles.block_v), number_count(folds), tiles.block_n
    numbers, merge, store = folded.numbers, folded.merge, make_store_numbers(count)
    load_shared = make_load_shared_numbers(count, 4 * block_n)
    store_shared = make_store_shared_numbers(count, 4 * block_n)
    both_consumers = np.uint32(128 * tiles.consumers)

    @cuda.jit(device=True, forceinline=True)
    def write(mine: Any, row: Any, smem: Any, parts: Any, place: Any) -> None:
        """Merges one row's numbers of consumer 0, `mine`, with those that consumer 1 left in shared memory, and stores them."""
        other = load_shared(np.uint32(smem + np.uint32(4 * row)))
        store(merge(mine, other), parts.numbers + np.uint64(4 * np.int64(place + row)), 4 * parts.pitch)

    @cuda.jit(device=True, forceinline=True)
    def merge_consumers(upper: Any, lower: Any, row: Any, me: Any, smem: Any, parts: Any, place: Any) -> None:
        """By both consumers: consumer 1 puts its numbers of each row into shared memory, consumer 0 merges and stores."""
        row_0, row_1 = numbers(upper)
        row_2, row_3 = numbers(lower)
        is_first_of_row = me.thread & 3 == 0
        if me.number == 1 and is_first_of_row:
            store_shared(row_0, np.uint32(smem + np.uint32(4 * row)))
            store_shared(row_1, np.uint32(smem + np.uint32(4 * (row + 8))))
            store_shared(row_2, np.uint32(smem + np.uint32(4 * (row + 64))))
            store_shared(row_3, np.uint32(smem + np.uint32(4 * (row + 72))))
        control.barrier_sync(_MERGE_BARRIER, both_consumers)
        if me.number == 0 and is_first_of_row:
            write(row_0, row, smem, parts, place)
            write(row_1, row + 8, smem, parts, place)
            write(row_2, row + 64, smem, parts, place)
            write(row_3, row + 72, smem, parts, place)
        control.barrier_sync(_MERGE_BARRIER, both_consumers)  # nobody writes to smem before it was read

    return merge_consumers


@functools.cache
def make_products(tiles: HopperTiles, dtype: np.dtype, has_bias: bool) -> SimpleNamespace:
    """Device functions for the products of a tile.

    `upper, lower = begin(upper, lower, ring, first_use, k_steps, thread)`: those of k_steps stages of the ring, from use
    `first_use` on. They are added to upper and lower, which hold biases, if has_bias. It returns while the products of the last
    stage are under way, and has let go of all stages but the last. `end(ring, first_use, k_steps, thread)` waits for these.
    """
    ring_ = make_ring(tiles)
    stage_of, parity_of, full, release, e_smem = ring_.stage_of, ring_.parity_of, ring_.full, ring_.release, ring_.e_smem
    multiply, stages = make_multiply(tiles, "f16" if dtype == np.float16 else "bf16"), np.uint32(tiles.stages)
    fence, commit_group = wgmma.fence, wgmma.commit_group
    wait_all, wait_all_but_one = wgmma.wait_group(0), wgmma.wait_group(1)

    @cuda.jit(device=True, inline="always")  # as if it were written out: LLVM copies fragments of a loop that it inlines itself
    def begin(upper: Any, lower: Any, ring: Any, first_use: Any, k_steps: Any, thread: Any) -> Any:
        stage, parity = stage_of(first_use), parity_of(first_use)
        for k in range(k_steps):
            mbarrier.wait(full(ring, stage), parity)
            fence()
            accumulate = np.uint32(1) if has_bias else np.uint32(k)
            upper, lower = multiply(upper, lower, e_smem(ring, stage), accumulate)
            commit_group()
            wait_all_but_one()
            if k > 0:
                release(ring, first_use + np.uint32(k - 1), thread)
            stage = np.uint32(stage + np.uint32(1))
            if stage == stages:
                stage = np.uint32(0)
                parity = np.uint32(parity ^ np.uint32(1))
        return upper, lower

    @cuda.jit(device=True, forceinline=True)
    def end(ring: Any, first_use: Any, k_steps: Any, thread: Any) -> None:
        wait_all()
        release(ring, first_use + np.uint32(k_steps - 1), thread)

    return SimpleNamespace(begin=begin, end=end)


@functools.cache
def make_teach(tiles: HopperTiles, teacher: TeacherForm, scaled: bool) -> Any:
    """`teach(ring, first_use, k_steps, own_scale, column, upper_half, lower_half, taught, found)`, of a consumer.

    It multiplies the teacher's k_steps stages of a tile, from use `first_use` of the ring on, and parks the logarithms of
    probabilities that these come to (`tensor_core.parked`). own_scale, column: as in `logits.make_finish_logits`. upper_half,
    lower_half: `Tile`. taught: a `Teacher`. found: a `FoundOfHeads`.
    """
    has_bias, n = teacher.bias_dtype is not None, tiles.block_v
    bias_fragment: Any = make_bias_fragment(n, teacher.bias_dtype) if teacher.bias_dtype is not None else None
    products, finish_logits = make_products(tiles, teacher.dtype, has_bias), make_finish_logits(n, teacher.capped, scaled)
    begin, end, park, zeros = products.begin, products.end, make_park(n), fragments.zeros(n)

    @cuda.jit(device=True, forceinline=True)
    def teach(
        ring: Any, first_use: Any, k_steps: Any, own_scale: Any, column: Any, upper_half: Any, lower_half: Any, taught: Any,
        found: Any,
    ) -> None:  # fmt: skip
        V, thread = upper_half.V, upper_half.thread
        is_last = np.int32(n * (upper_half.v_tile + 1)) > V
        upper, lower = zeros(), zeros()
        if has_bias:
            upper = bias_fragment(arithmetic.opaque_i32(column), taught.bias, V)
            lower = bias_fragment(arithmetic.opaque_i32(column), taught.bias, V)
        upper, lower = begin(upper, lower, ring, first_use, k_steps, thread)
        end(ring, first_use, k_steps, thread)
        park(finish_logits(upper, own_scale, column, taught.softcap, V, is_last), upper_half, found)
        park(finish_logits(lower, own_scale + np.uint32(256), column, taught.softcap, V, is_last), lower_half, found)

    return teach


def make_consume(
    tiles: HopperTiles,
    dtype: np.dtype,
    bias_dtype: np.dtype | None,
    capped: bool,
    scaled: bool,
    folds: tuple[Fold, ...],
    fixed: bool,
    teacher: TeacherForm | None = None,
) -> Any:
    """The device function of a consumer warpgroup, for the options of `kernel.make_forward_kernel`.

    `consume(ring, me, batch, terms, found, has_earlier, parts, survivors, vocabulary, taught, k_teacher, k_steps)`: ring is the
    ring's shared address, me a `Consumer`, batch a `Batch`, and k_steps the stages of a tile, ceil(D / 64), after k_teacher
    stages of the teacher; taught is the kernel's `teacher`, and the others are its parameters too. A tile is (128, 192) logits.
    A thread has two fragments of it: its part of the upper and of the lower 64 tokens.
    """
    ring_, folded = make_ring(tiles), chain(folds, tiles.block_v)
    turn = ring_.turn
    begin, fold_tile = folded.begin, folded.step
    products = make_products(tiles, dtype, bias_dtype is not None)
    begin_products, end_products = products.begin, products.end
    teach: Any = None if teacher is None else make_teach(tiles, teacher, scaled)
    has_teacher = teacher is not None
    finish_logits, merge_consumers = make_finish_logits(tiles.block_v, capped, scaled), make_merge_consumers(tiles, folds)
    zeros = fragments.zeros(tiles.block_v)
    who_am_i, segment_of = make_who_am_i(tiles), fixed_segment if fixed else segment
    has_bias = bias_dtype is not None
    bias_fragment: Any = make_bias_fragment(tiles.block_v, bias_dtype) if bias_dtype is not None else None
    # Zeros tell LLVM that the logits of the tile before are no longer needed. It would keep them in registers that scales, or
    # the teacher's products, need.
    clears = not has_bias and (scaled or has_teacher)
    block_n, block_v, ctas = tiles.block_n, tiles.block_v, tiles.cluster
    ring_bytes, scales_offset_bytes = np.uint32(tiles.ring_bytes), np.uint32(tiles.scales_offset_bytes)
    columns_offset_bytes, columns_bytes = np.uint32(tiles.columns_offset_bytes), np.uint32(4 * tiles.block_v)
    rows_offset_bytes, rows_bytes = np.uint32(tiles.rows_offset_bytes), np.uint32(4 * tiles.block_n)
    both_consumers, consumers = np.uint32(128 * tiles.consumers), np.int32(tiles.consumers)

    @cuda.jit(device=True, forceinline=True)
    def rows_at(n0: Any, row: Any, batch: Any, rows_smem: Any, V: Any, has_earlier: Any, resumes: Any) -> Any:
        """The `RowPair` of the lane's rows `row` and `row + 8` in the block that begins at position n0 of the batch."""
        position = np.int32(n0 + row)
        return RowPair(
            position_0=position, position_1=np.int32(position + 8), tokens=batch.tokens, n_listed=batch.n_listed, row=row,
            rows_smem=rows_smem, V=V, has_earlier=has_earlier, resumes=resumes,
        )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def half_of(
        half: Any, v_tile: Any, block: Any, me: Any, batch: Any, rows_smem: Any, columns_smem: Any, terms: Any, survivors: Any,
        V: Any,
    ) -> Any:  # fmt: skip
        """Half a tile, by 128 threads."""
        return Tile(
            v_tile=v_tile, V=V, block=block, half=half, consumer=me.number, thread=me.thread, tokens=batch.tokens,
            rows_smem=rows_smem, columns_smem=columns_smem, class_weights=terms.class_weights, survivors=survivors,
            keepers=np.int32(128),
        )  # fmt: skip

    @cuda.jit(device=True, forceinline=True)
    def await_turn(ring: Any, consumer: Any, i: Any, turns: Any) -> Any:
        """Waits, for tile i of a segment, until the other consumer's products are under way; returns the turns awaited."""
        if i > 0:
            mbarrier.wait(turn(ring, consumer), turns & np.uint32(1))
            turns = np.uint32(turns + np.uint32(1))
        return turns

    @cuda.jit(device=True, forceinline=True)
    def consume(
        ring: Any, me: Any, batch: Any, terms: Any, found: Any, has_earlier: Any, parts: Any, survivors: Any, vocabulary: Any,
        taught: Any, k_teacher: Any, k_steps: Any,
    ) -> None:  # fmt: skip
        """By a warpgroup: multiplies and folds every other tile that its cluster takes; then merges both consumers' states."""
        worker, workers, groups, rank = who_am_i(batch)
        consumer, thread = me.number, me.thread
        lane = np.int32(thread & 31)
        row = np.int32((thread >> 5) * 16 + (lane >> 2))  # and 8, 64, 72 further down
        merge_smem = np.uint32(ring + ring_bytes)
        scales = np.uint32(merge_smem + scales_offset_bytes)
        columns_smem = np.uint32(merge_smem + columns_offset_bytes + columns_bytes * np.uint32(consumer))
        rows_smem = np.uint32(merge_smem + rows_offset_bytes + rows_bytes * np.uint32(consumer))
        own_scale = np.uint32(scales + np.uint32(4 * row))
        upper, lower = zeros(), zeros()
        use, index, turns = np.uint32(0), np.int32(0), np.uint32(0)
        while True:
            group, first, last, step, slot = segment_of(index, worker, workers, groups, batch.per_round, vocabulary.n_tiles)
            if slot == NO_SLOT:
                break
            block = np.int32(group * ctas + rank)
            n0 = np.int32(block * block_n)
            # Of all workers that share the rows, one goes on from where earlier launches have come to.
            resumes = np.int32(1) if has_earlier and consumer == 0 and first == 0 else np.int32(0)
            V = vocabulary.V
            upper_states = begin(rows_at(n0, row, batch, rows_smem, V, has_earlier, resumes), found)
            lower_states = begin(rows_at(n0, np.int32(row + 64), batch, rows_smem, V, has_earlier, resumes), found)
            if scaled:  # in shared memory: there are no registers for them
                if consumer == 0:
                    token = token_at(batch.tokens, min(n0 + thread, batch.n_listed - 1))
                    scale = memory.load_global_f32(terms.scale + np.uint64(4 * token))
                    memory.store_shared_f32(scales + np.uint32(4 * thread), scale)
                control.barrier_sync(_MERGE_BARRIER, both_consumers)

            n_turns = quotient(last - first + step - 1, step)
            for i in range(consumer, n_turns, consumers):
                v_tile = np.int32(vocabulary.first_tile + first + i * step)
                first_use = np.uint32(use + np.uint32(i * (k_teacher + k_steps)))
                v0 = np.int32(v_tile * block_v)
                # `opaque` hides the thread's number from LLVM, which would otherwise keep what follows from it in registers.
                column = np.int32(v0 + 2 * (arithmetic.opaque_i32(thread) & 3))
                upper_half = half_of(np.int32(0), v_tile, block, me, batch, rows_smem, columns_smem, terms, survivors, V)
                lower_half = half_of(np.int32(1), v_tile, block, me, batch, rows_smem, columns_smem, terms, survivors, V)
                if has_teacher:  # its products come first in this consumer's turn
                    turns = await_turn(ring, consumer, i, turns)
                    teach(ring, first_use, k_teacher, own_scale, column, upper_half, lower_half, taught, found)
                    first_use = np.uint32(first_use + np.uint32(k_teacher))
                if has_bias:  # products are added to it
                    upper = bias_fragment(column, terms.bias, V)
                    # Loaded again, from addresses that LLVM takes for others: registers hold neither a copy nor addresses.
                    lower = bias_fragment(arithmetic.opaque_i32(column), terms.bias, V)
                elif clears:
                    upper, lower = zeros(), zeros()

                # This consumer's turn to multiply.
                if not has_teacher:
                    turns = await_turn(ring, consumer, i, turns)
                upper, lower = begin_products(upper, lower, ring, first_use, k_steps, thread)
                if thread == 0 and i + 1 < n_turns:  # the other's products may queue up behind these
                    mbarrier.arrive(turn(ring, 1 - consumer))
                end_products(ring, first_use, k_steps, thread)

                # The other multiplies; this one folds.
                is_last = v0 + block_v > V
                upper = finish_logits(upper, own_scale, column, terms.softcap, V, is_last)
                upper_states = fold_tile(upper_states, upper, upper_half, found)
                lower = finish_logits(lower, own_scale + np.uint32(256), column, terms.softcap, V, is_last)
                lower_states = fold_tile(lower_states, lower, lower_half, found)
            use = np.uint32(use + np.uint32(n_turns * (k_teacher + k_steps)))

            merge_consumers(upper_states, lower_states, row, me, merge_smem, parts, (slot * ctas + rank) * block_n)
            index = np.int32(index + 1)

    return consume
