"""Where operands of a warp's products are in a stage: each lane's addresses, followed by hand through `ldmatrix` and `mma`."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.ampere.copies import ROWS_AT_ONCE, ROWS_BYTES, place_of
from cce_numba.ampere.product import PANEL_BYTES, make_a_address, make_b_address, moves
from cce_numba.ampere.tiles import ROW_BYTES, SLABS, THREADS, WARP_COLUMNS

M, K = 128, 64


def stage_of(matrix, across):
    """A stage's bytes as 16-bit numbers, filled as 256 threads do; matrix: (indices, 64 terms)."""
    indices = matrix.shape[0]
    rows = matrix.T if across else matrix  # of which a thread copies 8 numbers at a time
    panels = [rows[:, 64 * p : 64 * p + 64] for p in range(indices // 64)] if across else [rows]
    stage = np.full(indices * ROW_BYTES // 2, -1, np.int64)
    for number, panel in enumerate(panels):
        for thread in range(THREADS):
            place, part, first = int(place_of.py_func(np.int32(thread))), thread & 7, thread >> 3
            for turn in range(panel.shape[0] // ROWS_AT_ONCE):
                at = (place + ROWS_BYTES * turn + PANEL_BYTES * number) // 2
                stage[at : at + 8] = panel[first + ROWS_AT_ONCE * turn, 8 * part : 8 * part + 8]
    return stage


def load_matrices(stage, addresses, transposed):
    """(4 words, 32 lanes, 2 numbers): `ldmatrix.x4` of the rows that the lanes' addresses give (ISA 9.7.14.5.15)."""
    matrices = np.stack([stage[a // 2 : a // 2 + 8] for a in addresses]).reshape(4, 8, 8)
    if transposed:
        matrices = matrices.transpose(0, 2, 1)
    return matrices.reshape(4, 32, 2)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("warp_row", [0, 1])
def test_operands_of_a(across, warp_row):
    """Words 0 to 3: rows lane // 4 and + 8, of the first eight terms, then of the next (ISA 9.7.14.5.8)."""
    matrix = np.arange(M * K).reshape(M, K)
    stage, address = stage_of(matrix, across), make_a_address(across).py_func
    assert sorted(stage) == list(range(M * K)), "each number has a place"
    lanes = np.arange(32)
    for step in range(4):
        for slab in range(SLABS):
            flips, adds = moves(slab, step, across)
            addresses = [(int(address(np.int32(lane), np.int32(warp_row))) ^ flips) + adds for lane in lanes]
            words = load_matrices(stage, addresses, across)
            for word in range(4):
                row = 64 * warp_row + 16 * slab + lanes // 4 + 8 * (word & 1)
                term = 16 * step + 2 * (lanes % 4) + 8 * (word >> 1)
                np.testing.assert_array_equal(words[word], np.stack([matrix[row, term], matrix[row, term + 1]], axis=1))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("n", [32, 48, 64])
def test_operands_of_b(across, n):
    """Two words for each eight columns: the first eight terms, and the next."""
    columns = WARP_COLUMNS * n
    matrix = np.arange(columns * K).reshape(columns, K)
    stage, address = stage_of(matrix, across), make_b_address(n, across).py_func
    lanes = np.arange(32)
    for warp_column in range(WARP_COLUMNS):
        for step in range(4):
            flips, adds = moves(0, step, across)
            for pair in range(n // 16):
                own = [int(address(np.int32(lane), np.int32(warp_column), np.uint32(pair))) for lane in lanes]
                words = load_matrices(stage, [(a ^ flips) + adds for a in own], across)
                for word in range(4):
                    column = n * warp_column + 16 * pair + 8 * (word >> 1) + lanes // 4
                    term = 16 * step + 2 * (lanes % 4) + 8 * (word & 1)
                    expected = np.stack([matrix[column, term], matrix[column, term + 1]], axis=1)
                    np.testing.assert_array_equal(words[word], expected)


@pytest.mark.parametrize("across", [False, True])
def test_eight_lanes_read_different_banks(across):
    """The rows of a matrix, 16 bytes each, lie in 32 different banks of 4 bytes."""
    for address in (make_a_address(across).py_func, lambda lane, w: make_b_address(48, across).py_func(lane, w, np.uint32(1))):
        for matrix in range(4):
            places = {int(address(np.int32(8 * matrix + i), np.int32(1))) % 128 for i in range(8)}
            assert len(places) == 8
