"""The kernel of the forward: log-sum-exp, survivor bits and whatever else is folded from tiles of logits (paper section 4.2).

Eight warps compute a tile of 128 tokens x 256 (or 128) vocabulary entries. All of them copy rows of e and of c into a ring of
stages, several stages ahead of the products; then all of them fold the tile, while the next one's first stages arrive. CTAs are
persistent workers; `tensor_core.schedule` says which tiles each takes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ampere.copies import ROWS_AT_ONCE, ROWS_BYTES, make_copy_row, place_of
from cce_numba.ampere.elements import elements_of
from cce_numba.ampere.forward.states import Me, Place, make_states
from cce_numba.ampere.product import make_a_address, make_b_address, make_hold_back, make_load_operands, make_multiply
from cce_numba.ampere.tiles import ALIGNMENT_BYTES, ROW_BYTES, THREADS, AmpereTiles
from cce_numba.launch.kernel import Kernel, kernel_factory
from cce_numba.launch.record import Record
from cce_numba.ptx import arithmetic, control, memory
from cce_numba.ptx import fragment as fragments
from cce_numba.tensor_core.folds import Fold, found_class, number_count
from cce_numba.tensor_core.logits import make_bias_fragment, make_finish_logits
from cce_numba.tensor_core.records import I32, U32, LogitTerms, Matrix, Parts, Survivors, Tokens, Vocabulary
from cce_numba.tensor_core.schedule import NO_SLOT, fixed_segment, quotient, segment
from cce_numba.tensor_core.tokens import token_at

PARTS = 4  # in which a stage is copied
BARRIER, ALL_THREADS = np.uint32(0), np.uint32(THREADS)  # that of `cuda.syncthreads`


class Coming(Record):
    """The stage whose copies are still to begin."""

    smem = U32  # shared address
    left = I32  # how many there are, this one included
    k = I32  # which 128 bytes of the rows
    v = I32  # the first row of c


@kernel_factory
def make_forward_kernel(
    tiles: AmpereTiles,
    dtype: np.dtype,
    bias_dtype: np.dtype | None,
    capped: bool,
    scaled: bool,
    whole: bool,
    folds: tuple[Fold, ...],
    fixed: bool = False,
    allow_tf32: bool = False,
) -> Kernel:
    """The kernel for `dtype`, with what a problem asks for, so that nobody pays for what others need.

    bias_dtype: of the bias, or None without one. capped: with a softcap. scaled: with a logit scale for each token. whole:
    rows are a multiple of 16 bytes long. folds: what is made of the tiles; the first is `max_sum`. fixed: by a fixed schedule
    (`schedule`). allow_tf32: float32 numbers may be rounded to tf32. Raises ValueError if a row's folds have more numbers than
    `tiles.row_numbers`.
    """
    if (numbers := number_count(folds)) > tiles.row_numbers:
        raise ValueError(
            f"folds: their workers tell each other {numbers} numbers of a row, and shared memory has room for "
            f"{tiles.row_numbers}: fewer folds, or a larger `AmpereTiles.row_numbers`"
        )
    block_n, block_v, n, stages = tiles.block_n, tiles.block_v, tiles.warp_v, tiles.stages
    elements = elements_of(dtype, allow_tf32)
    itemsize, terms_of_stage, wide_numbers, ahead = elements.itemsize, elements.terms, elements.wide, not elements.split
    stage_bytes, a_bytes, ring_bytes = np.uint32(tiles.stage_bytes), np.uint32(tiles.a_bytes), np.uint32(tiles.ring_bytes)
    row_words_bytes = np.uint32(tiles.row_words_bytes)
    load_0, load_1, load_2, load_3 = (make_load_operands(n, step, False, False, wide_numbers) for step in range(4))
    hold_back = make_hold_back(n)
    multiply, zeros, copy_row = make_multiply(n, elements.name), fragments.zeros(n), make_copy_row(whole)
    a_address, b_address = make_a_address(False), make_b_address(n, False)
    states_, finish_logits = make_states(tiles, folds), make_finish_logits(n, capped, scaled)
    begin, step_slab, merge = states_.begin, states_.step, states_.merge
    has_bias = bias_dtype is not None
    bias_fragment: Any = make_bias_fragment(n, bias_dtype) if bias_dtype is not None else None
    wait_for_next, wait_for_all = memory.copy_async_wait(stages - 2), memory.copy_async_wait(0)
    load_row = memory.load_shared_i32
    alignment = np.uint32(ALIGNMENT_BYTES - 1)
    a_turns, b_turns = block_n // ROWS_AT_ONCE // PARTS, block_v // ROWS_AT_ONCE // PARTS
    wide = n == 64

    @cuda.jit(device=True, forceinline=True)
    def b_addresses(b: Any) -> Any:
        """The addresses of all pairs of eight columns."""
        if wide:
            return b, np.uint32(b + np.uint32(2048)), np.uint32(b + np.uint32(4096)), np.uint32(b + np.uint32(6144))
        return b, np.uint32(b + np.uint32(2048))

    @cuda.jit(device=True, forceinline=True)
    def copy_part(part: Any, coming: Any, rows_smem: Any, thread: Any, e: Any, c: Any, last_row: Any, row_bytes: Any) -> None:
        """By all threads: copies a fourth of the rows of the stage `coming`, or zeros if none is.

        rows_smem: shared address of the block's rows of e. last_row: of c, in place of those past it.
        """
        row, offset = np.int32(thread >> 3), np.int32(ROW_BYTES * coming.k + 16 * (thread & 7))
        left_bytes = np.int32(row_bytes - offset) if coming.left > 0 else np.int32(0)
        place, source = np.uint32(coming.smem + place_of(thread)), np.uint64(e.address + np.uint64(offset))
        for i in range(part * a_turns, part * a_turns + a_turns):
            token = load_row(np.uint32(rows_smem + np.uint32(4 * (row + ROWS_AT_ONCE * i))))
            copy_row(np.uint32(place + np.uint32(ROWS_BYTES * i)), source, token, e.pitch_bytes, left_bytes)
        place, source = np.uint32(place + a_bytes), np.uint64(c.address + np.uint64(offset))
        first = np.int32(coming.v + row)
        for i in range(part * b_turns, part * b_turns + b_turns):
            # In 64 bits it would take three times the instructions.
            entry = min(np.int32(first + ROWS_AT_ONCE * i), last_row)
            copy_row(np.uint32(place + np.uint32(ROWS_BYTES * i)), source, entry, c.pitch_bytes, left_bytes)

    @cuda.jit(device=True, forceinline=True)
    def after(coming: Any, ring: Any, k_steps: Any, v_step: Any) -> Any:
        """The stage that comes after this one; v_step: columns from one tile of the worker to the next."""
        smem, k, v = np.uint32(coming.smem + stage_bytes), np.int32(coming.k + 1), coming.v
        if smem == np.uint32(ring + ring_bytes):
            smem = np.uint32(ring)
        if k == k_steps:
            k, v = np.int32(0), np.int32(v + v_step)
        return Coming(smem, np.int32(coming.left - 1), k, v)

    segment_of = fixed_segment if fixed else segment

    def forward_kernel(
        e: Matrix,
        c: Matrix,  # from vocabulary.first_row on
        tokens: Tokens,  # a batch, which begins at a multiple of 128
        per_round: Any,  # groups of tokens, see `schedule`
        terms: LogitTerms,
        found: Any,  # Found, or FoundOfMore
        has_earlier: Any,  # whether results of earlier parts of the vocabulary are there, to go on from
        parts: Parts,
        survivors: Survivors,  # from the batch's first block on
        vocabulary: Vocabulary,
        D: Any,
    ) -> None:
        """Grid of workers. Writes parts, in the slots that `schedule` gives, and sets bits of survivors."""
        ring = np.uint32((memory.shared_address(cuda.shared.array(0, np.uint8)) + alignment) & ~alignment)
        rows_smem = np.uint32(ring + ring_bytes)
        targets_smem, scales_smem = np.uint32(rows_smem + np.uint32(512)), np.uint32(rows_smem + np.uint32(1024))
        thread = np.int32(cuda.threadIdx.x)
        warp, lane = np.int32(thread >> 5), np.int32(thread & 31)
        me = Me(lane, np.int32(warp & 1), np.int32(warp >> 1))
        columns_smem = np.uint32(rows_smem + row_words_bytes + np.uint32(4 * n * warp))
        n_listed = np.int32(min(max(tokens.n_valid[0] - tokens.first, 0), tokens.most))
        workers, worker = np.int32(cuda.gridDim.x), np.int32(cuda.blockIdx.x)
        groups, k_steps = quotient(n_listed + block_n - 1, block_n), quotient(D + terms_of_stage - 1, terms_of_stage)
        row_bytes, V, last_row = np.int32(itemsize * D), vocabulary.V, np.int32(vocabulary.V - 1 - vocabulary.first_row)
        copying_half = np.int32(warp >> 2)  # warps w and w + 4 share tensor cores
        a_place, b_place = a_address(lane, me.warp_row), np.uint32(a_bytes + b_address(lane, me.warp_column, 0))
        own_scale = np.uint32(scales_smem + np.uint32(4 * (64 * me.warp_row + (lane >> 2))))
        index = np.int32(0)
        while True:
            block, first, last, tile_step, slot = segment_of(index, worker, workers, groups, per_round, vocabulary.n_tiles)
            if slot == NO_SLOT:
                break
            if thread < block_n:
                token = token_at(tokens.listed, min(block * block_n + thread, n_listed - 1))
                memory.store_shared_i32(np.uint32(rows_smem + np.uint32(4 * thread)), token)
                if scaled:
                    scale = memory.load_global_f32(terms.scale + np.uint64(4 * np.int64(token)))
                    memory.store_shared_f32(np.uint32(scales_smem + np.uint32(4 * thread)), scale)
            place = Place(block, tokens.listed, n_listed, targets_smem, columns_smem, V)
            # Of all workers that share the rows, one goes on from where earlier launches have come to.
            resumes = np.int32(1) if has_earlier and me.warp_column == 0 and first == 0 else np.int32(0)
            states = begin(me, place, has_earlier, resumes, found)
            state_0, state_1, state_2, state_3 = states[0], states[1], states[2], states[3]
            cuda.syncthreads()

            # The ring is filled but for its last stage, which is copied while the first is multiplied.
            n_turns = quotient(last - first + tile_step - 1, tile_step)
            v_step = np.int32(tile_step * block_v)
            v = np.int32((vocabulary.first_tile + first) * block_v - vocabulary.first_row)
            coming = Coming(np.uint32(ring), np.int32(n_turns * k_steps), np.int32(0), v)
            turn = np.int32(0)
            while turn < stages - 1:
                for part in range(PARTS):
                    copy_part(part, coming, rows_smem, thread, e, c, last_row, row_bytes)
                memory.copy_async_commit()
                coming = after(coming, ring, k_steps, v_step)
                turn = arithmetic.opaque_i32(np.int32(turn + 1))  # `opaque` keeps LLVM from writing the loop out
            stage = np.uint32(ring)
            wait_for_next()
            cuda.syncthreads()
            if ahead:
                operands = load_0(np.uint32(stage + a_place), b_addresses(np.uint32(stage + b_place)))

            turn = np.int32(0)
            while turn < n_turns:
                v_tile = np.int32(vocabulary.first_tile + first + turn * tile_step)
                v = np.int32(v_tile * block_v + n * me.warp_column)
                column = np.int32(v + 2 * (lane & 3))
                if has_bias:  # products are added to it
                    biases = bias_fragment(column, terms.bias, V)
                    sums = (biases, biases, biases, biases)
                else:
                    sums = (zeros(), zeros(), zeros(), zeros())
                k = np.int32(0)
                while k < k_steps:
                    # Nobody needs the stage before any more, so its memory is that of the stage that is copied. Copies are
                    # spread among the products: where they stand together, tensor cores wait for their instructions.
                    a, b = np.uint32(stage + a_place), b_addresses(np.uint32(stage + b_place))
                    if ahead:
                        operands_1 = load_1(a, b)
                        copy_part(0, coming, rows_smem, thread, e, c, last_row, row_bytes)
                        sums = multiply(sums, operands)
                        operands_2 = load_2(a, b)
                        copy_part(1, coming, rows_smem, thread, e, c, last_row, row_bytes)
                        copy_part(2, coming, rows_smem, thread, e, c, last_row, row_bytes)
                        sums = multiply(sums, operands_1)
                        operands_3 = load_3(a, b)
                        copy_part(3, coming, rows_smem, thread, e, c, last_row, row_bytes)
                    else:
                        # Registers do not suffice for copies among products, so these are two turns of a loop. Of two warps
                        # that share tensor cores one multiplies while the other copies, and then the other way round.
                        half = arithmetic.opaque_i32(np.int32(0))
                        while half < 2:
                            if half != copying_half:
                                sums = multiply(sums, load_0(a, b))
                            else:
                                for part in range(PARTS):
                                    copy_part(part, coming, rows_smem, thread, e, c, last_row, row_bytes)
                            half = arithmetic.opaque_i32(np.int32(half + 1))
                        sums = multiply(sums, load_1(a, b))
                        sums = multiply(sums, load_2(a, b))
                        operands_3 = load_3(a, b)
                    memory.copy_async_commit()
                    coming = after(coming, ring, k_steps, v_step)
                    # The next stage has arrived, and nobody reads this one any more, once all are here. Two steps (of split
                    # numbers one) are still to be multiplied, so that tensor cores do not wait for the next stage's operands.
                    wait_for_next()
                    mask = control.barrier_mask(BARRIER, ALL_THREADS)
                    stage = np.uint32(stage + stage_bytes)
                    if stage == np.uint32(ring + ring_bytes):
                        stage = np.uint32(ring)
                    if ahead:
                        sums = multiply(sums, operands_2)
                        operands = load_0(np.uint32(stage + a_place), b_addresses(np.uint32(stage + b_place)))
                    sums = multiply(sums, hold_back(operands_3, mask))
                    k = arithmetic.opaque_i32(np.int32(k + 1))

                warp_tile, is_last = np.int32(4 * v_tile + me.warp_column), v + n > V
                cap = terms.softcap
                z = finish_logits(sums[0], own_scale, column, cap, V, is_last)
                state_0 = step_slab(state_0, z, 0, warp_tile, me, place, terms, survivors, found)
                z = finish_logits(sums[1], np.uint32(own_scale + np.uint32(64)), column, cap, V, is_last)
                state_1 = step_slab(state_1, z, 1, warp_tile, me, place, terms, survivors, found)
                z = finish_logits(sums[2], np.uint32(own_scale + np.uint32(128)), column, cap, V, is_last)
                state_2 = step_slab(state_2, z, 2, warp_tile, me, place, terms, survivors, found)
                z = finish_logits(sums[3], np.uint32(own_scale + np.uint32(192)), column, cap, V, is_last)
                state_3 = step_slab(state_3, z, 3, warp_tile, me, place, terms, survivors, found)
                turn = arithmetic.opaque_i32(np.int32(turn + 1))

            wait_for_all()
            cuda.syncthreads()
            merge((state_0, state_1, state_2, state_3), me, ring, parts, slot * block_n)
            index = np.int32(index + 1)

    parameters = Matrix, Matrix, Tokens, I32, LogitTerms, found_class(folds), I32, Parts, Survivors, Vocabulary, I32
    return Kernel(forward_kernel, parameters, threads=THREADS, smem_bytes=tiles.smem_bytes)
