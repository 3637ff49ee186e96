"""The folds' states of a warp's rows: two rows of each of its four slabs, of which the lane has a part of the columns."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ampere.tiles import WARP_COLUMNS, AmpereTiles
from cce_numba.launch.record import Record
from cce_numba.ptx import arithmetic
from cce_numba.tensor_core.folds import Fold, RowPair, Tile, chain, number_count
from cce_numba.tensor_core.folds.rows import make_load_shared_numbers, make_store_numbers, make_store_shared_numbers
from cce_numba.tensor_core.records import I32, U32, U64


class Me(Record):
    """Which part of a tile this thread has."""

    lane = I32
    warp_row = I32  # 0: rows 0 to 63; 1: rows 64 to 127
    warp_column = I32  # which fourth of the columns


class Place(Record):
    """Where a CTA's segment of work is, and what it keeps in shared memory."""

    block = I32  # of tokens, in the batch
    tokens = U64  # address of the batch's tokens, int32
    n_listed = I32
    targets_smem = U32  # shared address of an int32 for each row
    columns_smem = U32  # of a float32 for each of the warp's columns
    V = I32


@functools.cache
def make_states(tiles: AmpereTiles, folds: tuple[Fold, ...]) -> SimpleNamespace:
    """Device functions for the states of a warp's four slabs, a tuple of four."""
    folded, count, block_n = chain(folds, tiles.warp_v), number_count(folds), tiles.block_n
    begin_pair, step_pair, numbers, merge_numbers = folded.begin, folded.step, folded.numbers, folded.merge
    store = make_store_numbers(count)
    load_shared = make_load_shared_numbers(count, 4 * block_n)
    store_shared = make_store_shared_numbers(count, 4 * block_n)
    warp_bytes = np.uint32(4 * block_n * count)
    others = WARP_COLUMNS - 1

    @cuda.jit(device=True, forceinline=True)
    def begin_slab(slab: Any, me: Any, place: Any, has_earlier: Any, resumes: Any, found: Any) -> Any:
        row = np.int32(64 * me.warp_row + 16 * slab + (me.lane >> 2))
        position = np.int32(place.block * block_n + row)
        rows = RowPair(
            position_0=position, position_1=np.int32(position + 8), tokens=place.tokens, n_listed=place.n_listed, row=row,
            rows_smem=place.targets_smem, V=place.V, has_earlier=has_earlier, resumes=resumes,
        )  # fmt: skip
        return begin_pair(rows, found)

    @cuda.jit(device=True, forceinline=True)
    def begin(me: Any, place: Any, has_earlier: Any, resumes: Any, found: Any) -> Any:
        """The states before the first tile. resumes: see `RowPair`."""
        return (
            begin_slab(0, me, place, has_earlier, resumes, found),
            begin_slab(1, me, place, has_earlier, resumes, found),
            begin_slab(2, me, place, has_earlier, resumes, found),
            begin_slab(3, me, place, has_earlier, resumes, found),
        )

    @cuda.jit(device=True, forceinline=True)
    def step(state: Any, z: Any, slab: Any, v_tile: Any, me: Any, place: Any, terms: Any, survivors: Any, found: Any) -> Any:
        """The state of a slab after its logits z of a tile. v_tile: the tile's number, of tiles of the warp's columns."""
        # `opaque` hides the lane from LLVM, which would otherwise keep what follows from it in registers.
        tile = Tile(
            v_tile=v_tile, V=place.V, block=place.block, half=me.warp_row, consumer=np.int32(0),
            thread=np.int32(32 * slab + arithmetic.opaque_i32(me.lane)), tokens=place.tokens, rows_smem=place.targets_smem,
            columns_smem=place.columns_smem, class_weights=terms.class_weights, survivors=survivors, keepers=np.int32(32),
        )  # fmt: skip
        return step_pair(state, z, tile, found)

    @cuda.jit(device=True, forceinline=True)
    def write(mine: Any, row: Any, smem: Any, parts: Any, at: Any) -> None:
        """Merges a row's numbers with those that the three other warps left, and stores them."""
        for other in range(others):
            mine = merge_numbers(mine, load_shared(np.uint32(smem + np.uint32(other) * warp_bytes + np.uint32(4 * row))))
        store(mine, parts.numbers + np.uint64(4 * np.int64(at + row)), 4 * parts.pitch)

    @cuda.jit(device=True, forceinline=True)
    def write_slab(state: Any, row: Any, first: Any, smem: Any, parts: Any, at: Any) -> None:
        """Merges and stores the numbers of a slab's two rows, by the first of the four lanes that share them."""
        # All four lanes that share a row must compute the numbers, since these are sums over the four.
        row_0, row_1 = numbers(state)
        if first:
            write(row_0, row, smem, parts, at)
            write(row_1, row + 8, smem, parts, at)

    @cuda.jit(device=True, forceinline=True)
    def leave_slab(state: Any, row: Any, first: Any, smem: Any) -> None:
        """Puts the numbers of a slab's two rows into shared memory, for the warp of the first columns."""
        row_0, row_1 = numbers(state)
        if first:
            store_shared(row_0, np.uint32(smem + np.uint32(4 * row)))
            store_shared(row_1, np.uint32(smem + np.uint32(4 * (row + 8))))

    @cuda.jit(device=True, forceinline=True)
    def merge(states: Any, me: Any, smem: Any, parts: Any, at: Any) -> None:
        """By all warps: what the four warps that share rows have found becomes one, in `parts`, row 0 of it at place `at`.

        smem: shared memory that nothing else uses. The order of a merge is always the same, and so are its bits.
        """
        row, first = np.int32(64 * me.warp_row + (me.lane >> 2)), (me.lane & 3) == 0
        if me.warp_column > 0:
            own = np.uint32(smem + np.uint32(me.warp_column - 1) * warp_bytes)
            leave_slab(states[0], row, first, own)
            leave_slab(states[1], row + 16, first, own)
            leave_slab(states[2], row + 32, first, own)
            leave_slab(states[3], row + 48, first, own)
        cuda.syncthreads()
        if me.warp_column == 0:
            write_slab(states[0], row, first, smem, parts, at)
            write_slab(states[1], row + 16, first, smem, parts, at)
            write_slab(states[2], row + 32, first, smem, parts, at)
            write_slab(states[3], row + 48, first, smem, parts, at)
        cuda.syncthreads()  # nobody writes to smem before it was read

    return SimpleNamespace(begin=begin, step=step, merge=merge)
