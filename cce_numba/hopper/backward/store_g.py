"""A tile of logits in registers becomes G in the inputs' dtype, and leaves for the workspace column by column."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.records import GTile
from cce_numba.hopper.backward.tiles import G_BOX, PANEL
from cce_numba.launch.record import kind_of
from cce_numba.ptx import arithmetic, control, memory
from cce_numba.tensor_core.backward.divergence import make_divergence_gradients
from cce_numba.tensor_core.backward.form import GradientForm
from cce_numba.tensor_core.backward.records import G_ROW_BYTES, PARTS, ListColumns
from cce_numba.tensor_core.backward.row_weights import class_weight_of
from cce_numba.tensor_core.fragment import visit_chunks
from cce_numba.tensor_core.gradient import make_gradient
from cce_numba.tensor_core.records import F32, U64, DivergenceRow, RowWeights
from cce_numba.tensor_core.sums import sums_of_rows

_ROW_BYTES = np.uint32(2 * PANEL)
_BOX_BYTES = np.uint32(G_BOX * 2 * PANEL)

store_if_4, load_shared_4 = memory.store_if_4_u32, memory.load_shared_4_u32


@cuda.jit(device=True, forceinline=True)
def store_words(address: Any, words: Any) -> None:
    """Stores four words to global memory."""
    store_if_4(address, words[0], words[1], words[2], words[3], np.uint32(1))


@functools.cache
def make_gradients(form: GradientForm, finished: bool) -> Any:
    """`(g_00, g_01, g_10, g_11) = gradients(x, column, columns, row_0, row_1, softcap, beside)`; see `make_store_g`.

    It takes the thread's four numbers in the eight columns from `column` on, two of each of its rows.
    """
    smoothed = form.smoothed
    gradient = make_gradient(form.capped, form.scaled, smoothed, finished=finished, entropic=form.entropic)

    @cuda.jit(device=True, forceinline=True)
    def gradients(x: Any, column: Any, columns: Any, row_0: Any, row_1: Any, softcap: Any, class_weights: Any) -> Any:
        place = np.uint32(4 * (column + 2 * (np.int32(cuda.threadIdx.x & 31) & 3)))
        v = memory.load_shared_2_i32_freely(columns.ids + place)
        bias = (np.float32(0), np.float32(0))
        if not finished:
            bias = memory.load_shared_2_f32_freely(columns.biases + place)
        weight_0 = weight_1 = np.float32(1)
        if smoothed:
            weight_0, weight_1 = class_weight_of(v[0], class_weights), class_weight_of(v[1], class_weights)
        return (
            gradient(x[0] + bias[0], v[0], row_0, softcap, weight_0),
            gradient(x[1] + bias[1], v[1], row_0, softcap, weight_1),
            gradient(x[2] + bias[0], v[0], row_1, softcap, weight_0),
            gradient(x[3] + bias[1], v[1], row_1, softcap, weight_1),
        )

    return gradients


@functools.cache
def make_store_g(n: int, dtype: np.dtype, form: GradientForm, finished: bool) -> Any:
    """The function `store_g(x, columns, to, row_0, row_1, softcap, beside)` for a fragment of 64 tokens x n columns.

    x holds products of rows of e and of c, without biases; logits if finished. `columns` is a `ListColumns`, whose addresses
    must come out of an ordered instruction (see `memory.load_shared_2_i32_freely`). `to` is a `GTile`. row_0 and row_1 are the
    `RowWeights` of the thread's two rows. beside: address of (V,) float32, the class weights, or 0 if all are 1.

    With a teacher (`backward.divergence`), row_0 and row_1 are `DivergenceRow`, and beside is where its logarithms are parked.

    G_BOX columns at a time are transposed in shared memory, and stored in rows of 128 bytes while the next ones are computed.

    By the form, the sum of each column of G over the 16 tokens of a warp is stored, for the gradient of the bias, and columns
    are multiplied by `columns.scales`, where chance decides. finished: the function is given logits.
    """
    by_chance, with_sums = form.by_chance, form.with_sums
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16
    if form.teacher is None:
        gradients, row = make_gradients(form, finished), kind_of(RowWeights)
    else:
        gradients, row = make_divergence_gradients(form.teacher, form.capped, form.scaled), kind_of(DivergenceRow)

    @cuda.jit(device=True, forceinline=True)
    def eight_columns(
        x: Any, column: Any, columns: Any, sums: Any, row_0: Any, row_1: Any, softcap: Any, beside: Any
    ) -> Any:  # fmt: skip
        """The thread's four numbers of G in the eight columns from `column` on, as two words, one for each of its rows.

        x: four products. sums: address, as in `GTile`.
        """
        lane = np.int32(cuda.threadIdx.x & 31)
        g_00, g_01, g_10, g_11 = gradients(x, column, columns, row_0, row_1, softcap, beside)
        if by_chance:
            scale = memory.load_shared_2_f32_freely(columns.scales + np.uint32(4 * (column + 2 * (lane & 3))))
            g_00, g_01, g_10, g_11 = g_00 * scale[0], g_01 * scale[1], g_10 * scale[0], g_11 * scale[1]
        if with_sums:
            sum_0, sum_1 = sums_of_rows(g_00 + g_10, g_01 + g_11)
            own = np.int32(column + 2 * lane)
            if lane < 4 and own < columns.stored:  # `stored` is even
                memory.store_global_f32(sums + np.uint64(4 * PARTS * own), sum_0)
                memory.store_global_f32(sums + np.uint64(4 * PARTS * (own + 1)), sum_1)
        return pack(g_00, g_01), pack(g_10, g_11)

    def store(
        x: Any, first: Any, columns: Any, to: Any, row_0: Any, row_1: Any, softcap: Any, beside: Any
    ) -> Any:  # fmt: skip
        """Stores the G_BOX columns from `first` on."""
        if first < columns.stored:
            thread = np.int32(cuda.threadIdx.x & 127)
            lane, warp = np.uint32(thread & 31), np.uint32(thread >> 5)
            # There are two boxes: while some threads still read one, others fill the next.
            box = np.uint32(to.staging + (np.uint32(first // G_BOX) & np.uint32(1)) * _BOX_BYTES)
            # Matrices 0 and 1 are tokens 0-7 and 8-15 of this warp, of eight columns; 2 and 3 are the same of the next eight.
            column = np.uint32((lane & np.uint32(7)) + np.uint32(8) * (lane >> np.uint32(4)))
            sixteen_bytes = np.uint32(np.uint32(2) * warp + ((lane >> np.uint32(3)) & np.uint32(1)))
            swizzled = np.uint32((sixteen_bytes ^ (lane & np.uint32(7))) << np.uint32(4))
            place = np.uint32(box + column * _ROW_BYTES + swizzled)
            word_0, word_1 = eight_columns(x[0:4], first, columns, to.sums, row_0, row_1, softcap, beside)
            word_2, word_3 = eight_columns(x[4:8], first + 8, columns, to.sums, row_0, row_1, softcap, beside)
            memory.store_matrices_transposed(place, word_0, word_1, word_2, word_3)
            word_0, word_1 = eight_columns(x[8:12], first + 16, columns, to.sums, row_0, row_1, softcap, beside)
            word_2, word_3 = eight_columns(x[12:16], first + 24, columns, to.sums, row_0, row_1, softcap, beside)
            memory.store_matrices_transposed(place + np.uint32(16) * _ROW_BYTES, word_0, word_1, word_2, word_3)
            control.barrier_sync(np.uint32(1 + to.consumer), np.uint32(128))
            column = np.uint32(thread >> 3)
            place = np.uint32(box + column * _ROW_BYTES)
            place = np.uint32(place + (((lane & np.uint32(7)) ^ (column & np.uint32(7))) << np.uint32(4)))
            address = np.uint64(to.g + np.uint64(G_ROW_BYTES * (first + (thread >> 3)) + 16 * (thread & 7)))
            store_words(address, load_shared_4(place))
            store_words(address + np.uint64(16 * G_ROW_BYTES), load_shared_4(place + np.uint32(16) * _ROW_BYTES))
        return np.int32(0)

    return visit_chunks(n, G_BOX, store, kind_of(ListColumns), kind_of(GTile), row, row, F32, U64)
