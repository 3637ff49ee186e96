"""What becomes of a job's sums: G in the workspace, sums of dE that are not complete, and rows of dE and dC.

Tiles of 16-bit numbers leave through the memory of the ring, which a job is done with by then: warps write what they have, with
the swizzle of `ampere.product`, and then all threads store whole rows, 16 bytes at a time.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ampere.backward.loop import meet
from cce_numba.ampere.backward.tiles import BackwardTiles
from cce_numba.ampere.elements import elements_of
from cce_numba.ampere.tiles import ROW_BYTES, THREADS
from cce_numba.launch.record import Record, kind_of
from cce_numba.ptx import arithmetic, memory, mma
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.backward.form import GradientForm
from cce_numba.tensor_core.backward.gradient_rows import make_add_rows, make_store_rows_in_float32
from cce_numba.tensor_core.backward.partial_sums import SUMS_STEP, make_add_sums, make_store_sums
from cce_numba.tensor_core.backward.records import G_ROW_BYTES, PARTS, ListColumns
from cce_numba.tensor_core.backward.row_weights import class_weight_of
from cce_numba.tensor_core.fragment import visit_chunks
from cce_numba.tensor_core.gradient import make_gradient
from cce_numba.tensor_core.records import F32, I32, U32, U64, RowWeights
from cce_numba.tensor_core.sums import sums_of_rows

_ROW = np.uint32(ROW_BYTES)
load_shared_4, store_word = memory.load_shared_4_u32, memory.store_shared_i32


class GPlace(Record):
    """Where the G of a warp's slab goes."""

    staging = U32  # shared address of a tile of G: for each half of the tokens, rows of 64 tokens for each of 192 columns
    g = U64  # of 32-bit numbers, which are stored at once: global address of the job's first column, from the slab's token on
    sums = U64  # address of the part of the sum of the job's first column that is of the slab's 16 tokens
    slab = I32  # 0 to 3
    first = I32  # the warp's first column


# ---- places in shared memory. All of them begin at multiples of 128 bytes


@cuda.jit(device=True, forceinline=True)
def g_place(lane: Any, warp_row: Any, slab: Any, column: Any, half_bytes: Any) -> Any:
    """Where in a tile of G a lane's word of the first eight tokens of a slab goes; the next eight's is at that place ^ 16.

    G is transposed by then: the lane has tokens 2 * (lane % 4) and the next, of column + lane // 4. column: a multiple of 8.
    """
    in_eight, part = np.uint32(lane >> 2), np.uint32(2 * slab)
    row = np.uint32(np.uint32(column) + in_eight)
    place = np.uint32(np.uint32(warp_row) * half_bytes + row * _ROW + ((part ^ in_eight) << np.uint32(4)))
    return np.uint32(place + np.uint32(4 * (lane & 3)))


@cuda.jit(device=True, forceinline=True)
def g_source(thread: Any, half_bytes: Any) -> Any:
    """Where in a tile of G the 16 bytes number thread % 16 of column thread // 16 are, and so on every 16 columns."""
    part, column = np.uint32(thread & 7), np.uint32(thread >> 4)
    swizzled = np.uint32((part ^ (column & np.uint32(7))) << np.uint32(4))
    return np.uint32(np.uint32((thread >> 3) & 1) * half_bytes + column * _ROW + swizzled)


@cuda.jit(device=True, forceinline=True)
def tile_place(lane: Any, warp_row: Any, slab: Any, eight: Any, panel_bytes: Any) -> Any:
    """Where in a tile of a gradient a lane's word goes, of a slab's row lane // 4; that 8 rows on is 8 * 128 bytes further.

    The word is of columns 2 * (lane % 4) and the next one, of the eight columns of that number.
    """
    in_eight = np.uint32(lane >> 2)
    panel, part = np.uint32(np.uint32(eight) >> np.uint32(3)), np.uint32(np.uint32(eight) & np.uint32(7))
    row = np.uint32(np.uint32(64 * warp_row + 16 * slab) + in_eight)
    place = np.uint32(panel * panel_bytes + row * _ROW + ((part ^ in_eight) << np.uint32(4)))
    return np.uint32(place + np.uint32(4 * (lane & 3)))


@cuda.jit(device=True, forceinline=True)
def tile_source(thread: Any) -> Any:
    """Where in a panel of a tile the 16 bytes number thread % 8 of row thread // 8 are, and so on every 32 rows."""
    part, row = np.uint32(thread & 7), np.uint32(thread >> 3)
    return np.uint32(row * _ROW + ((part ^ (row & np.uint32(7))) << np.uint32(4)))


# ---- G


@functools.cache
def make_write_g(tiles: BackwardTiles, dtype: np.dtype, form: GradientForm) -> Any:
    """`write_g(x, columns, place, row_0, row_1, softcap, class_weights)`: a slab's products become G, in shared memory.

    x, a fragment of the warp's columns, holds products of rows of e and of c, without biases; logits if by_chance. `columns` is
    a `ListColumns` of the job, whose addresses must come out of an ordered instruction (see `memory.load_shared_2_i32_freely`).
    `place` is a `GPlace`. row_0 and row_1 are the `RowWeights` of the thread's two rows. class_weights: address of (V,)
    float32, or 0 if all are 1.

    By the form, the sum of each column of G over the slab's 16 tokens is stored, for the gradient of the bias, and columns are
    multiplied by `columns.scales`, where chance decides. dtype: of G.
    """
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16
    elements = elements_of(dtype)
    wide, g_row_bytes, store_number = elements.wide, elements.g_row_bytes, memory.store_global_f32
    smoothed, by_chance, with_sums = form.smoothed, form.by_chance, form.with_sums
    gradient = make_gradient(form.capped, form.scaled, smoothed, finished=by_chance, entropic=form.entropic)
    half_bytes = np.uint32(tiles.block_v * ROW_BYTES)  # of 64 of the tokens
    transpose = mma.transpose_matrix

    def write(
        x: Any, first: Any, columns: Any, place: Any, row_0: Any, row_1: Any, softcap: Any, class_weights: Any
    ) -> Any:  # fmt: skip
        """Eight columns, from the warp's `first` on; x: four products."""
        lane, warp = np.int32(cuda.threadIdx.x & 31), np.int32(cuda.threadIdx.x >> 5)
        column = np.int32(place.first + first)  # of the job
        at = np.uint32(4 * (column + 2 * (lane & 3)))
        v = memory.load_shared_2_i32_freely(columns.ids + at)
        bias = (np.float32(0), np.float32(0))
        if not by_chance:
            bias = memory.load_shared_2_f32_freely(columns.biases + at)
        weight_0 = weight_1 = np.float32(1)
        if smoothed:
            weight_0, weight_1 = class_weight_of(v[0], class_weights), class_weight_of(v[1], class_weights)
        g_00 = gradient(x[0] + bias[0], v[0], row_0, softcap, weight_0)
        g_01 = gradient(x[1] + bias[1], v[1], row_0, softcap, weight_1)
        g_10 = gradient(x[2] + bias[0], v[0], row_1, softcap, weight_0)
        g_11 = gradient(x[3] + bias[1], v[1], row_1, softcap, weight_1)
        if by_chance:
            scale = memory.load_shared_2_f32_freely(columns.scales + at)
            g_00, g_01, g_10, g_11 = g_00 * scale[0], g_01 * scale[1], g_10 * scale[0], g_11 * scale[1]
        if with_sums:
            sum_0, sum_1 = sums_of_rows(g_00 + g_10, g_01 + g_11)
            own = np.int32(column + 2 * lane)
            if lane < 4 and own < columns.stored:  # `stored` is even
                memory.store_global_f32(place.sums + np.uint64(4 * PARTS * own), sum_0)
                memory.store_global_f32(place.sums + np.uint64(4 * PARTS * (own + 1)), sum_1)
        if wide:  # eight lanes have neighbouring tokens of a column: 32 bytes, as memory has them
            own = np.int32(column + 2 * (lane & 3))
            if own < columns.stored:  # `stored` is even
                in_memory = np.uint64(place.g + np.uint64(g_row_bytes * own + 4 * (lane >> 2)))
                store_number(in_memory, g_00)
                store_number(in_memory + np.uint64(32), g_10)
                store_number(in_memory + np.uint64(g_row_bytes), g_01)
                store_number(in_memory + np.uint64(g_row_bytes + 32), g_11)
            return np.int32(0)
        # Transposed, a lane has one column, and two neighbouring tokens of the first eight and of the last eight of the slab.
        word_0, word_1 = transpose(pack(g_00, g_01)), transpose(pack(g_10, g_11))
        to = np.uint32(place.staging + g_place(lane, warp & 1, place.slab, column, half_bytes))
        store_word(to, np.int32(word_0))
        store_word(np.uint32(to ^ np.uint32(16)), np.int32(word_1))
        return np.int32(0)

    row = kind_of(RowWeights)
    return visit_chunks(tiles.warp_v, 8, write, kind_of(ListColumns), kind_of(GPlace), row, row, F32, U64)


@functools.cache
def make_store_g(tiles: BackwardTiles) -> Any:
    """`store_g(staging, g, stored, thread)`, by the eight warps: stores the first `stored` columns of a tile of G.

    staging: shared address, as in `GPlace`. g: global address of the first column.
    """
    half_bytes, turns = np.uint32(tiles.block_v * ROW_BYTES), tiles.block_v * 2 * SURVIVOR_BLOCK // 16 // THREADS
    columns_at_once = THREADS * 16 // G_ROW_BYTES

    @cuda.jit(device=True, forceinline=True)
    def store_g(staging: Any, g: Any, stored: Any, thread: Any) -> None:
        """Sixteen threads share a column."""
        first, source = np.int32(thread >> 4), np.uint32(staging + g_source(thread, half_bytes))
        to = np.uint64(g + np.uint64(G_ROW_BYTES * first + 16 * (thread & 15)))
        for i in range(turns):
            words = load_shared_4(np.uint32(source + np.uint32(ROW_BYTES * columns_at_once * i)))
            wanted = np.uint32(1) if first + columns_at_once * i < stored else np.uint32(0)
            at = np.uint64(to + np.uint64(G_ROW_BYTES * columns_at_once * i))
            memory.store_if_4_u32(at, words[0], words[1], words[2], words[3], wanted)

    return store_g


# ---- sums of dE


@functools.cache
def make_partial_sums(tiles: BackwardTiles) -> Any:
    """`(load, store)` of a tile of dE that is not complete: `sums = load(sums, address)` adds it, `store(sums, address)`.

    address: that of the thread's first 16 bytes of its first slab, given by `partial_sums_offset`.
    """
    add_sums, store_sums = make_add_sums(tiles.warp_v), make_store_sums(tiles.warp_v)
    slab_bytes = np.uint64(SUMS_STEP * (tiles.warp_v // 8))  # of 128 threads

    @cuda.jit(device=True, forceinline=True)
    def load(sums: Any, address: Any) -> Any:
        return (
            add_sums(sums[0], address),
            add_sums(sums[1], address + slab_bytes),
            add_sums(sums[2], address + np.uint64(2) * slab_bytes),
            add_sums(sums[3], address + np.uint64(3) * slab_bytes),
        )

    @cuda.jit(device=True, forceinline=True)
    def store(sums: Any, address: Any) -> None:
        store_sums(sums[0], address)
        store_sums(sums[1], address + slab_bytes)
        store_sums(sums[2], address + np.uint64(2) * slab_bytes)
        store_sums(sums[3], address + np.uint64(3) * slab_bytes)

    return load, store


def partial_sums_offset(tiles: BackwardTiles) -> tuple[int, int]:
    """Bytes of a tile of sums, and from the first 128 threads' part to that of the others."""
    tile_bytes = 4 * tiles.block_n * tiles.block_v
    return tile_bytes, tile_bytes // 2


# ---- rows of dE and dC


@functools.cache
def make_write_tile(tiles: BackwardTiles, dtype: np.dtype) -> Any:
    """`write_tile(x, staging, slab, first, factor)`: a slab's sums times factor become 16-bit numbers in shared memory.

    x: a fragment of the warp's columns. staging: shared address of three panels of 64 columns, with a row for each of 128 rows
    of the tile. first: number of the warp's first eight columns among all of the tile.
    """
    pack = arithmetic.pack_f16 if dtype == np.float16 else arithmetic.pack_bf16
    panel_bytes = np.uint32(tiles.block_n * ROW_BYTES)

    def write(x: Any, column: Any, staging: Any, slab: Any, first: Any, factor: Any) -> Any:
        """Eight columns, from the warp's `column` on; x: four sums."""
        lane, warp = np.int32(cuda.threadIdx.x & 31), np.int32(cuda.threadIdx.x >> 5)
        to = np.uint32(staging + tile_place(lane, warp & 1, slab, np.int32(first + (column >> 3)), panel_bytes))
        store_word(to, np.int32(pack(x[0] * factor, x[1] * factor)))
        store_word(np.uint32(to + np.uint32(8 * ROW_BYTES)), np.int32(pack(x[2] * factor, x[3] * factor)))
        return np.int32(0)

    return visit_chunks(tiles.warp_v, 8, write, U32, I32, I32, F32)


@functools.cache
def make_finish_rows(tiles: BackwardTiles, dtype: np.dtype) -> Any:
    """The device function by which the eight warps store a finished tile, or add it to what a gradient holds."""
    n = tiles.warp_v
    add_rows, store_rows_in_float32 = make_add_rows(n, dtype), make_store_rows_in_float32(n)
    write_tile = make_write_tile(tiles, dtype)
    panels, row_turns, rows_at_once = tiles.block_v // 64, tiles.block_n // 32, 32
    wide = elements_of(dtype).wide
    panel_bytes = np.uint32(tiles.block_n * ROW_BYTES)

    @cuda.jit(device=True, forceinline=True)
    def address_of_row(output: Any, row: Any, offset_bytes: Any) -> Any:
        """The address in an `Output`, so many bytes into a row; 0 for row -1, which is nobody's."""
        if row < 0:
            return np.uint64(0)
        return np.uint64(output.address + np.uint64(np.int64(row) * output.pitch_bytes + offset_bytes))

    @cuda.jit(device=True, forceinline=True)
    def two_rows(output: Any, rows: Any, position: Any, offset_bytes: Any) -> Any:
        """Addresses in the rows that a thread's fragment has: rows[position], and 8 further down."""
        return (
            address_of_row(output, rows[position], offset_bytes),
            address_of_row(output, rows[position + 8], offset_bytes),
        )

    @cuda.jit(device=True, forceinline=True)
    def finish_rows(
        sums: Any, staging: Any, me: Any, output: Any, rows: Any, first: Any, d0: Any, D: Any, factor: Any, adds: Any
    ) -> None:  # fmt: skip
        """By the eight warps: stores a tile of sums times factor to an `Output`, or adds it.

        staging: shared memory that nothing else uses. rows: pointer to the row of the gradient of each listed token or sorted
        column, -1 for none; the tile's are from `first` on. d0: the tile's first hidden entry.
        """
        x_0, x_1, x_2, x_3 = sums[0], sums[1], sums[2], sums[3]
        d = np.int32(d0 + n * me.warp_column + 2 * (me.lane & 3))
        position, columns = np.int64(first + 64 * me.warp_row + (me.lane >> 2)), np.int32(D - d)
        if adds:
            offset = np.int64(d) << (1 + output.is_float32)
            x_0 = add_rows(x_0, two_rows(output, rows, position, offset), columns, output.is_float32, factor)
            x_1 = add_rows(x_1, two_rows(output, rows, position + 16, offset), columns, output.is_float32, factor)
            x_2 = add_rows(x_2, two_rows(output, rows, position + 32, offset), columns, output.is_float32, factor)
            x_3 = add_rows(x_3, two_rows(output, rows, position + 48, offset), columns, output.is_float32, factor)
            factor = np.float32(1)
        if wide or output.is_float32 != 0:
            offset = np.int64(4 * np.int64(d))
            store_rows_in_float32(x_0, two_rows(output, rows, position, offset), columns, factor)
            store_rows_in_float32(x_1, two_rows(output, rows, position + 16, offset), columns, factor)
            store_rows_in_float32(x_2, two_rows(output, rows, position + 32, offset), columns, factor)
            store_rows_in_float32(x_3, two_rows(output, rows, position + 48, offset), columns, factor)
        else:
            eights = np.int32(n // 8 * me.warp_column)
            write_tile(x_0, staging, np.int32(0), eights, factor)
            write_tile(x_1, staging, np.int32(1), eights, factor)
            write_tile(x_2, staging, np.int32(2), eights, factor)
            write_tile(x_3, staging, np.int32(3), eights, factor)
            meet()
            row, source = np.int32(me.number >> 3), np.uint32(staging + tile_source(me.number))
            d = np.int32(d0 + 8 * (me.number & 7))
            for i in range(row_turns):
                own = rows[np.int64(first + row + rows_at_once * i)]
                to = address_of_row(output, own, np.int64(2 * np.int64(d)))
                for panel in range(panels):
                    from_ = np.uint32(source + np.uint32(ROW_BYTES * rows_at_once * i) + np.uint32(panel) * panel_bytes)
                    words = load_shared_4(from_)
                    wanted = np.uint32(1) if to != 0 and d + 64 * panel < D else np.uint32(0)
                    at = np.uint64(to + np.uint64(ROW_BYTES * panel))
                    memory.store_once_if_4_u32(at, words[0], words[1], words[2], words[3], wanted)

    return finish_rows
