"""Where operands of a warp's products are in a stage: each lane's addresses, followed by hand through `ldmatrix` and `mma`."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.ampere.copies import ROWS_AT_ONCE, ROWS_BYTES, place_of
from cce_numba.ampere.product import (
    PANEL_BYTES,
    make_a_address,
    make_b_address,
    moves,
    own_word,
    row_of_term,
    term_of_row,
    wide_moves,
)
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


# ---- 32-bit numbers across K, which lanes load one by one. Others along K lie as pairs of 16-bit ones do

WIDE_K = 32


def plainly(function, monkeypatch):
    """The device function in Python, with what it calls."""
    monkeypatch.setitem(function.py_func.__globals__, "own_word", own_word.py_func)
    return function.py_func


def wide_stage(indices):
    """A stage's words across K, filled as 256 threads do; and the matrix (indices, 32 terms) that lies there, row by row."""
    matrix = np.arange(indices * WIDE_K).reshape(indices, WIDE_K)
    stage = np.full(indices * WIDE_K, -1, np.int64)
    for number in range(indices // 32):
        for thread in range(THREADS):
            at, part, row = int(place_of.py_func(np.int32(thread))) // 4, thread & 7, thread >> 3
            first = 32 * number + 4 * part
            stage[1024 * number + at : 1024 * number + at + 4] = matrix[first : first + 4, row]
    assert sorted(stage) == list(range(indices * WIDE_K)), "each number has a place"
    return stage, matrix


def test_the_rows_of_terms_are_inverse():
    assert [term_of_row(row_of_term(term)) for term in range(WIDE_K)] == list(range(WIDE_K))


@pytest.mark.parametrize("warp_row", [0, 1])
def test_wide_operands_of_a_across(warp_row, monkeypatch):
    """The terms lane % 4 and + 4 of a step come from the rows 2 * (lane % 4) and the next; a word's lanes use all banks."""
    stage, matrix = wide_stage(M)
    address, lanes = plainly(make_a_address(True, wide=True), monkeypatch), np.arange(32)
    for step in range(4):
        for slab in range(SLABS):
            for word in range(4):
                flips, adds = wide_moves(slab, step, word & 1, word >> 1)
                places = np.array([(int(address(np.int32(lane), np.int32(warp_row))) ^ flips) + adds for lane in lanes])
                row = 64 * warp_row + 16 * slab + lanes // 4 + 8 * (word & 1)
                np.testing.assert_array_equal(stage[places // 4], matrix[row, 8 * step + 2 * (lanes % 4) + (word >> 1)])
                assert len(set(places // 4 % 32)) == 32


@pytest.mark.parametrize("n", [32, 48])
def test_wide_operands_of_b_across(n, monkeypatch):
    stage, matrix = wide_stage(WARP_COLUMNS * n)
    address, lanes = plainly(make_b_address(n, True, wide=True), monkeypatch), np.arange(32)
    for warp_column in range(WARP_COLUMNS):
        for step in range(4):
            for pair in range(n // 16):
                own = [int(address(np.int32(lane), np.int32(warp_column), np.uint32(pair))) for lane in lanes]
                for word in range(4):
                    flips, adds = wide_moves(0, step, word >> 1, word & 1)
                    places = np.array([(a ^ flips) + adds for a in own])
                    column = n * warp_column + 16 * pair + 8 * (word >> 1) + lanes // 4
                    np.testing.assert_array_equal(stage[places // 4], matrix[column, 8 * step + 2 * (lanes % 4) + (word & 1)])
                    assert len(set(places // 4 % 32)) == 32
