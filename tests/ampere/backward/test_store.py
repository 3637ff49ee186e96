"""How tiles leave through shared memory: what warps write, followed by hand to what threads read."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.ampere.backward.store import g_place, g_source, tile_place, tile_source
from cce_numba.ampere.backward.tiles import BackwardTiles
from cce_numba.ampere.tiles import ROW_BYTES, SLABS, THREADS, WARP_COLUMNS

TILES = BackwardTiles()
N, V, WIDE = TILES.block_n, TILES.block_v, TILES.warp_v
I32 = np.int32


def parts_of_tile():
    """(warp row, slab, the warp's first column, eight) of all pieces of eight columns of all warps."""
    for warp_row in range(2):
        for warp_column in range(WARP_COLUMNS):
            for slab in range(SLABS):
                for eight in range(WIDE // 8):
                    yield warp_row, slab, WIDE * warp_column, eight


def test_g_leaves_column_by_column():
    half_bytes = np.uint32(V * ROW_BYTES)
    memory = np.full((2 * V * ROW_BYTES // 4, 2), -1)  # words of two numbers
    g = np.arange(N * V).reshape(N, V)  # tokens, columns
    for warp_row, slab, first, eight in parts_of_tile():
        for lane in range(32):
            column, token = first + 8 * eight + lane // 4, 64 * warp_row + 16 * slab + 2 * (lane % 4)
            place = int(g_place.py_func(I32(lane), I32(warp_row), I32(slab), I32(first + 8 * eight), half_bytes))
            for at, t in ((place, token), (place ^ 16, token + 8)):
                assert (memory[at // 4] == -1).all(), "each word has a place of its own"
                memory[at // 4] = g[t : t + 2, column]
    numbers = memory.reshape(-1)
    for thread in range(THREADS):
        source = int(g_source.py_func(I32(thread), half_bytes)) // 2
        for turn in range(V // 16):
            column, token = thread // 16 + 16 * turn, 8 * (thread % 16)
            at = source + 16 * turn * ROW_BYTES // 2
            np.testing.assert_array_equal(numbers[at : at + 8], g[token : token + 8, column])


def test_gradients_leave_row_by_row():
    panel_bytes = np.uint32(N * ROW_BYTES)
    memory = np.full((V // 64 * N * ROW_BYTES // 4, 2), -1)
    tile = np.arange(N * V).reshape(N, V)
    for warp_row, slab, first, eight in parts_of_tile():
        for lane in range(32):
            row, column = 64 * warp_row + 16 * slab + lane // 4, first + 8 * eight + 2 * (lane % 4)
            place = int(tile_place.py_func(I32(lane), I32(warp_row), I32(slab), I32(first // 8 + eight), panel_bytes))
            for at, r in ((place, row), (place + 8 * ROW_BYTES, row + 8)):
                assert (memory[at // 4] == -1).all(), "each word has a place of its own"
                memory[at // 4] = tile[r, column : column + 2]
    numbers = memory.reshape(-1)
    for thread in range(THREADS):
        source = int(tile_source.py_func(I32(thread))) // 2
        for turn in range(N // 32):
            for panel in range(V // 64):
                row, column = thread // 8 + 32 * turn, 64 * panel + 8 * (thread % 8)
                at = source + (32 * turn * ROW_BYTES + panel * int(panel_bytes)) // 2
                np.testing.assert_array_equal(numbers[at : at + 8], tile[row, column : column + 8])


@pytest.mark.parametrize("place", [g_place, tile_place])
def test_a_warps_words_are_in_different_banks(place):
    banks = {int(place.py_func(I32(lane), I32(1), I32(2), I32(8), np.uint32(16384))) // 4 % 32 for lane in range(32)}
    assert len(banks) == 32
