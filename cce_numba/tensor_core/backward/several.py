"""Several targets of a token: what they give to G is written over what the rest of a job has made of their entries.

A thread's part of a tile of G is in registers, which have no index at run time, and targets may stand anywhere. So a tile is
made as if tokens had no targets. Then each row's few entries that are targets are made once more, from the logits that the
forward has stored, and overwrite their places in the workspace. `place` says beforehand where in its block's list of columns
each target stands. The gradient of the bias is a sum of the first kind of G, so what targets give to it is added apart.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.inlined import slope_of_cap
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.launch.record import Record
from cce_numba.ptx import arithmetic, memory
from cce_numba.ptx.pointers import address_of
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.backward.chance import INFINITY
from cce_numba.tensor_core.backward.row_weights import ROW_BYTES, class_weight_of, make_row_weights
from cce_numba.tensor_core.gradient import make_gradient
from cce_numba.tensor_core.records import F32, I32, U32, U64, PlacedTargets, RowWeights, SeveralTargets
from cce_numba.tensor_core.survey.tables import COLUMN_TILE, LIST_TILE, Sizes, Tables

AT_ONCE = 4  # ordinals that a thread loads together, so that it does not wait for each
THREADS = 256
# What targets give to the gradient of the bias is added up in integers, whose sums do not depend on the order. Scaled weights
# are below 2^14 (`survey.weigh`), so 2^29 of them fit, and the steps are 2^-33 of the largest weight or less.
BIAS_UNIT = 2.0**-20
load_i32, load_f32, opaque = memory.load_global_i32, memory.load_global_f32, arithmetic.opaque_i32


class JobColumns(Record):
    """The columns of a job that computes G, as its rows' targets are looked up among them."""

    ids = U32  # address in shared memory of (192,) int32: vocabulary entries, -1 past the list's end
    first_ordinal = I32  # how many of the sorted columns before the job's first survive in the block
    block = I32


# ---- before the kernel


@kernel_factory
def make_invert_kernel() -> Kernel:
    """The kernel that says of each vocabulary entry which of the sorted columns it is."""

    def invert_kernel(
        sizes: Any,  # the survey's Sizes
        tables: Any,  # its Tables, filled
        column_of: Any,  # (V,) int32, to be written
    ) -> None:
        """Grid: a thread for each sorted column."""
        j = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if j < sizes.column_tiles * COLUMN_TILE:
            v = tables.order[j]
            if v >= 0:
                column_of[v] = np.int32(j)

    return Kernel(invert_kernel, (Sizes, Tables, pointer_to(np.int32)), threads=THREADS)


@kernel_factory
def make_place_kernel(capped: bool) -> Kernel:
    """The kernel that fills `PlacedTargets`. capped: logits have a softcap."""

    @cuda.jit(device=True, forceinline=True)
    def ordinal_of(block: Any, j: Any, sizes: Any, tables: Any) -> Any:
        """How many sorted columns before j survive in the block; -1 if j does not."""
        tile, bit = np.int64(j >> 7), np.uint32(1) << np.uint32(j & 31)
        first_word = (np.int64(block) * sizes.column_tiles + tile) * 4
        word = np.int32((j & 127) >> 5)
        own = np.uint32(tables.bits[first_word + word])
        ordinal = np.int32(tables.before[np.int64(block) * (sizes.column_tiles + 1) + tile])
        for i in range(word):
            ordinal = np.int32(ordinal + cuda.popc(np.uint32(tables.bits[first_word + i])))
        ordinal = np.int32(ordinal + cuda.popc(np.uint32(own & np.uint32(bit - np.uint32(1)))))
        return ordinal if own & bit else np.int32(-1)

    def place_kernel(
        targets: Any,  # SeveralTargets
        target_weights: Any,  # (N, K) float32, by row of e
        column_of: Any,  # (V,) int32: which of the sorted columns each entry is
        softcap: Any,
        sizes: Any,  # the survey's Sizes
        tables: Any,  # its Tables, filled
        placed: Any,  # PlacedTargets, to be written
        bias_sums: Any,  # address of (V,) int64, zeros, to which what targets give to the gradient of the bias is added; or 0
    ) -> None:
        """Grid: a thread for each place of `placed`."""
        at = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        row, k = np.int32(at & (SURVIVOR_BLOCK - 1)), np.int32((at >> 7) % placed.K)
        block = np.int32((at >> 7) // placed.K)
        if block >= sizes.blocks:
            return
        n = np.int64(tables.row_of[np.int64(block) * SURVIVOR_BLOCK + row])
        ordinal, entry, total, z = np.int32(-1), np.int32(-1), np.float32(0), np.float32(0)
        if n >= 0 and k < targets.K:
            first = n * targets.K
            v = targets.ids[first + k]
            if v != targets.padding and v >= 0 and v < sizes.V:
                is_first: Any = True
                for other in range(targets.K):
                    if targets.ids[first + other] == v:
                        is_first = is_first and other >= k
                        total += target_weights[first + other]
                if is_first:
                    entry, z = np.int32(v), targets.logits[first + k]
                    ordinal = ordinal_of(block, column_of[v], sizes, tables)
                    total *= tables.weight_scale[0]
                    if bias_sums != 0:
                        given = slope_of_cap(z / softcap) * total if capped else total
                        steps = np.int64(round(np.float64(given) / BIAS_UNIT))
                        memory.add_global_s64(bias_sums + np.uint64(8 * np.int64(entry)), steps)
        offset = np.uint64(4 * at)
        memory.store_global_u32(placed.ordinals + offset, np.uint32(ordinal))
        memory.store_global_u32(placed.entries + offset, np.uint32(entry))
        memory.store_global_f32(placed.weights + offset, total)
        memory.store_global_f32(placed.logits + offset, z)

    numbers, integers = pointer_to(np.float32), pointer_to(np.int32)
    parameters = SeveralTargets, numbers, integers, F32, Sizes, Tables, PlacedTargets, U64
    return Kernel(place_kernel, parameters, threads=THREADS)


@kernel_factory
def make_take_from_bias_kernel() -> Kernel:
    """The kernel that takes what targets give from the gradient of the bias."""

    def take_from_bias_kernel(
        bias_sums: Any,  # (V,) int64, as `place_kernel` leaves them
        tables: Any,  # the survey's Tables
        V: Any,
        d_bias: Any,  # (V,) float32
    ) -> None:
        """Grid: a thread for each entry."""
        v = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if v < V:
            d_bias[v] -= np.float32(tables.weight_scale[1] * (BIAS_UNIT * bias_sums[v]))

    return Kernel(take_from_bias_kernel, (pointer_to(np.int64), Tables, I32, pointer_to(np.float32)), threads=THREADS)


# ---- in the kernel


@cuda.jit(device=True, forceinline=True)
def first_ordinal(block: Any, round_number: Any, skipped: Any, tables: Any, dims: Any) -> Any:
    """How many sorted columns before a job's first survive in its block. skipped: columns of the list before the job's."""
    tile = np.int64(tables.first_tile[round_number])
    return np.int32(tables.before[np.int64(block) * (dims.column_tiles + 1) + tile] + skipped)


@cuda.jit(device=True, forceinline=True)
def ordinal_at(at: Any, i: Any, placed: Any) -> Any:
    """The ordinal i places after this one, of the same row."""
    return load_i32(placed.ordinals + np.uint64(4 * (at + SURVIVOR_BLOCK * i)))


@cuda.jit(device=True, forceinline=True)
def is_near(ordinal: Any, first: Any) -> Any:
    """Whether a target may be among the 192 columns from that ordinal on; -1 never is, since ordinals are at least 0."""
    return ordinal >= first and ordinal < first + LIST_TILE


@cuda.jit(device=True, forceinline=True)
def any_near(at: Any, first: Any, placed: Any) -> Any:
    """Whether one of the next AT_ONCE targets may be."""
    a, b = ordinal_at(at, 0, placed), ordinal_at(at, 1, placed)
    c, d = ordinal_at(at, 2, placed), ordinal_at(at, 3, placed)
    return is_near(a, first) or is_near(b, first) or is_near(c, first) or is_near(d, first)


@cuda.jit(device=True, forceinline=True)
def column_at(at: Any, columns: Any, placed: Any) -> Any:
    """The job's column that is the target of this place, -1 if none is."""
    column = np.int32(ordinal_at(at, 0, placed) - columns.first_ordinal)
    if column < 0 or column >= LIST_TILE:
        return np.int32(-1)
    entry = load_i32(placed.entries + np.uint64(4 * at))
    # The list may end before, and the columns of the next round have the next ordinals.
    return column if memory.load_shared_i32(np.uint32(columns.ids + np.uint32(4 * column))) == entry else np.int32(-1)


@functools.cache
def make_mark_targets(n: int) -> Any:
    """The function `mark(columns, row, maxima, placed)`, by a thread for each of a block's 128 rows, once maxima are found.

    To the maxima of `chance.make_find_maxima` goes inf where a column is a target of the row. columns: a `JobColumns`. maxima:
    shared address of (8, n) float32, where the 16 rows of a part follow each other.
    """

    @cuda.jit(device=True, forceinline=True)
    def mark(columns: Any, row: Any, maxima: Any, placed: Any) -> None:
        own = np.uint32(maxima + np.uint32(4 * n) * np.uint32(row >> 4))
        at, k = np.int64(columns.block) * placed.K * SURVIVOR_BLOCK + row, np.int32(0)
        while k < placed.K:
            if any_near(at, columns.first_ordinal, placed):
                i = np.int32(0)
                while i < AT_ONCE:
                    column = column_at(at + SURVIVOR_BLOCK * i, columns, placed)
                    if column >= 0:
                        memory.store_shared_f32(np.uint32(own + np.uint32(4 * column)), INFINITY)
                    i = opaque(np.int32(i + 1))  # written out, this loop would be four times as long
            at += AT_ONCE * SURVIVOR_BLOCK
            k = np.int32(k + AT_ONCE)

    return mark


@functools.cache
def make_write_targets(dtype: np.dtype, capped: bool, smoothed: bool, entropic: bool) -> Any:
    """The function `write(columns, row, g, terms, tables, placed)`, by a thread for each of a block's 128 rows.

    Writes the entries of G that are targets of the row, over what is there. columns: a `JobColumns`. g: address of the job's
    first column of G. Options: see `gradient.make_gradient`.
    """
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16
    itemsize, in_float32 = dtype.itemsize, dtype == np.float32
    g_row_bytes = SURVIVOR_BLOCK * itemsize
    gradient = make_gradient(capped, False, smoothed, finished=True, entropic=entropic)
    further_of, row_weights = make_row_weights(False, smoothed, entropic)

    @cuda.jit(device=True, forceinline=True)
    def write_one(at: Any, column: Any, columns: Any, row: Any, g: Any, terms: Any, tables: Any, placed: Any) -> None:
        """By one thread: the entry of G in a column of the job. at: the target's place in `placed`."""
        position, place = np.int64(columns.block) * SURVIVOR_BLOCK + row, np.uint64(4 * at)
        own = row_weights(
            np.uint64(address_of(tables.rows) + np.uint64(ROW_BYTES * position)), further_of(position, terms, tables)
        )
        entry = load_i32(placed.entries + place)
        token = RowWeights(
            softmax=own.softmax, shift=own.shift, target_weight=load_f32(placed.weights + place), target=entry, scale=own.scale,
            uniform=own.uniform, entropy=own.entropy,
        )  # fmt: skip
        class_weight = class_weight_of(entry, terms.class_weights) if smoothed else np.float32(1)
        x = gradient(load_f32(placed.logits + place), entry, token, terms.softcap, class_weight)
        to = np.uint64(g + np.uint64(g_row_bytes * column + itemsize * row))
        if in_float32:
            memory.store_global_f32(to, x)
        else:
            memory.store_global_u16(to, pack(x, np.float32(0)))

    @cuda.jit(device=True, forceinline=True)
    def write(columns: Any, row: Any, g: Any, terms: Any, tables: Any, placed: Any) -> None:
        """By a thread for each of a block's 128 rows."""
        at, k = np.int64(columns.block) * placed.K * SURVIVOR_BLOCK + row, np.int32(0)
        while k < placed.K:
            if any_near(at, columns.first_ordinal, placed):
                i = np.int32(0)
                while i < AT_ONCE:
                    column = column_at(at + SURVIVOR_BLOCK * i, columns, placed)
                    if column >= 0:
                        write_one(at + SURVIVOR_BLOCK * i, column, columns, row, g, terms, tables, placed)
                    i = opaque(np.int32(i + 1))  # written out, this loop would be four times as long
            at += AT_ONCE * SURVIVOR_BLOCK
            k = np.int32(k + AT_ONCE)

    return write
