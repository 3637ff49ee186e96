"""What is done with a tile in registers: once for each element, without memory, and to the right rows and columns."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda
from numba.core.errors import TypingError
from numba.cuda import types

from cce_numba.hopper.fragment import (
    collect_bits,
    column_of,
    fill_columns,
    fill_pairs,
    fold_rows,
    map_elements,
    row_of,
    visit_groups,
    visit_pairs,
)
from cce_numba.hopper.launch import Kernel, pointer_to
from cce_numba.ptx import arithmetic, control, memory, wgmma
from tests import offline
from tests.harness import SimulatorHarness

WIDTHS = [32, 64, 192, 256]
F32, I32, U64 = types.float32, types.int32, types.uint64
F32_ARRAY, U32_ARRAY = pointer_to(np.float32), pointer_to(np.uint32)


def larger(so_far, z, _):
    return arithmetic.maximum(so_far, z)


def add_exp(so_far, z, shift):
    return so_far + arithmetic.exp2(z - shift)


def times_column(z, column, factor):
    return z * (np.float32(column) * factor)


def column_as_float(column):
    return np.float32(column)


def at_least(z, by_row):
    return z >= by_row


def load_two(row, column, factor):
    """Of a row of float32 at an address."""
    address = row + np.uint64(4 * column)
    return memory.load_global_f32(address) * factor, memory.load_global_f32(address + np.uint64(4)) * factor


def store_two(x, y, row, column, factor):
    address = row + np.uint64(4 * column)
    memory.store_global_f32(address, x * factor)
    memory.store_global_f32(address + np.uint64(4), y * factor)
    return np.int32(0)


def store_four(z_00, z_01, z_10, z_11, group, out, factor):
    """At the group's place in (groups, 2, 2)."""
    address = out + np.uint64(16 * group)
    memory.store_global_f32(address, z_00 * factor)
    memory.store_global_f32(address + np.uint64(4), z_01 * factor)
    memory.store_global_f32(address + np.uint64(8), z_10 * factor)
    memory.store_global_f32(address + np.uint64(12), z_11 * factor)
    return np.int32(0)


def fragments_of(n):
    """The type of an array of a fragment for each thread."""
    return types.CPointer(wgmma.fragment_type(n))


@pytest.mark.parametrize("n", WIDTHS)
def test_rows_and_columns_are_those_of_the_accumulators_layout(n):
    """Element 4 * j + 2 * half + c: row 8 * half, column 8 * j + c (see `ptx.wgmma`)."""
    place = {4 * j + 2 * half + c: (half, 8 * j + c) for j in range(n // 8) for half in (0, 1) for c in (0, 1)}
    assert {i: (row_of(i), column_of(i)) for i in range(n // 2)} == place


# ---- compiled: as many instructions as elements, all in registers


def compiled_fold(n, step):
    fold = fold_rows(n, step)

    def kernel(fragments, start, by_row, out):
        row_0, row_1 = fold(fragments[0], start, start, by_row, by_row)
        out[0] = row_0
        out[1] = row_1

    return offline.compile_function(kernel, types.void(fragments_of(n), F32, F32, F32_ARRAY))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("n", WIDTHS)
def test_each_element_is_folded_once(n):
    maxima, sums = compiled_fold(n, larger), compiled_fold(n, add_exp)
    assert maxima.count(r"max\.f32") == n // 2
    assert sums.count(r"ex2\.approx\.ftz\.f32") == n // 2
    assert sums.count(r"add(\.rn)?\.f32") == n // 2
    for compiled in (maxima, sums):
        assert compiled.stack_bytes == 0
        assert compiled.count(r"call(\.uni)?") == 0


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("n", WIDTHS)
def test_each_element_is_changed_once(n):
    """By a function that branches, as masks do, each stays in its register."""

    def mask(z, column, columns):
        return z if column < columns else np.float32(-1)

    changed = map_elements(n, mask, I32)

    def kernel(fragments, first_column, columns):
        fragments[0] = changed(fragments[0], first_column, columns)

    compiled = offline.compile_function(kernel, types.void(fragments_of(n), I32, I32))
    assert compiled.count(r"st\.global\.f32") == n // 2
    assert compiled.count(r"selp\.f32") == n // 2
    assert compiled.stack_bytes == 0
    assert compiled.count(r"call(\.uni)?") == 0


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("n", WIDTHS)
def test_each_element_is_compared_once(n):
    bits = collect_bits(n, at_least)

    def kernel(fragments, by_row_0, by_row_1, out):
        words = bits(fragments[0], by_row_0, by_row_1)
        for w in range(n // 32):
            out[w] = words[w]

    compiled = offline.compile_function(kernel, types.void(fragments_of(n), F32, F32, U32_ARRAY))
    assert compiled.count(r"setp\.\w+\.f32") == n // 2
    assert compiled.count(r"st\.global\.u32") == n // 32
    assert compiled.stack_bytes == 0


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("n", WIDTHS)
def test_each_pair_and_each_group_is_visited_once(n):
    filled, paired, grouped = (
        fill_pairs(n, load_two, F32),
        visit_pairs(n, store_two, F32),
        visit_groups(n, store_four, U64, F32),
    )

    def fills(out, row_0, row_1, first_column, factor):
        out[0] = filled(first_column, row_0, row_1, factor)

    def visits_pairs(fragments, row_0, row_1, first_column, factor):
        paired(fragments[0], first_column, row_0, row_1, factor)

    def visits_groups(fragments, row_0, row_1, first_column, factor):
        grouped(fragments[0], row_0, factor)

    signature = types.void(fragments_of(n), U64, U64, I32, F32)
    loads, *stores = (offline.compile_function(kernel, signature) for kernel in (fills, visits_pairs, visits_groups))
    assert loads.count(r"ld\.global\.nc\.f32") == n // 2
    for compiled in stores:
        assert compiled.count(r"st\.global\.f32") == n // 2
    for compiled in (loads, *stores):
        assert compiled.count(r"mul\.f32") == n // 2
        assert compiled.stack_bytes == 0
        assert compiled.count(r"call(\.uni)?") == 0


@pytest.mark.usefixtures("compiler")
def test_fragments_of_another_width_are_refused():
    fold, changed = fold_rows(64, larger), map_elements(64, times_column, F32)
    bits, zeros, one = collect_bits(64, at_least), wgmma.zeros(72), np.float32(1)
    paired, grouped, row = visit_pairs(64, store_two, F32), visit_groups(64, store_four, U64, F32), np.uint64(0)

    def folds():
        fold(zeros(), one, one, one, one)

    def changes():
        changed(zeros(), 0, one)

    def collects():
        bits(zeros(), one, one)

    def visits_pairs():
        paired(zeros(), 0, row, row, one)

    def visits_groups():
        grouped(zeros(), row, one)

    message = r"operand 0 must be UniTuple\(float32 x 32\), got UniTuple\(float32 x 36\)"
    for kernel in (folds, changes, collects, visits_pairs, visits_groups):
        with pytest.raises(TypingError, match=message):
            offline.compile_function(kernel, types.void())


@pytest.mark.usefixtures("compiler")
def test_rows_without_an_address_are_refused():
    filled, one = fill_pairs(64, load_two, F32), np.float32(1)

    def fills(row):
        filled(0, np.uint64(0), row, one)

    with pytest.raises(TypingError, match="load_two: operand 2 must be an integer of at least 64 bits, got int32"):
        offline.compile_function(fills, types.void(I32))


# ---- on a GPU: against NumPy


def make_fragment_kernel(n):
    """A warp's (16, n) tile: `changed` and `filled` fragments, row results of each thread, and each column's bit."""
    fold, bits = fold_rows(n, larger), collect_bits(n, at_least)
    changed, filled = map_elements(n, times_column, F32), fill_columns(n, column_as_float)
    words = n // 32

    def fragment_kernel(fragments, changed_out, filled_out, maxima, thresholds, words_out):
        lane = cuda.threadIdx.x
        first_column, row = np.int32(2 * (lane & 3)), lane >> 2
        fragment = fragments[lane]
        changed_out[lane] = changed(fragment, first_column, np.float32(2))
        filled_out[lane] = filled(first_column)
        start = np.float32(-1e30)
        maxima[2 * lane], maxima[2 * lane + 1] = fold(fragment, start, start, start, start)
        own = bits(fragment, thresholds[row], thresholds[row + 8])
        for w in range(words):
            words_out[w] = control.or_of_warp(own[w] << np.uint32(first_column))

    fragments = fragments_of(n)
    return Kernel(fragment_kernel, types.void(fragments, fragments, fragments, F32_ARRAY, F32_ARRAY, U32_ARRAY), threads=32)


def make_rows_kernel(n):
    """A warp's (16, n) tile, from rows at addresses into fragments, and back: to rows, and to groups of 8 columns."""
    filled, paired, grouped = (
        fill_pairs(n, load_two, F32),
        visit_pairs(n, store_two, F32),
        visit_groups(n, store_four, U64, F32),
    )

    def rows_kernel(tile, pitch_bytes, fragments, rows_out, groups_out):
        lane = cuda.threadIdx.x
        first_column, row, next_row = np.int32(2 * (lane & 3)), np.uint64(lane >> 2), np.uint64((lane >> 2) + 8)
        fragment = filled(first_column, tile + row * pitch_bytes, tile + next_row * pitch_bytes, np.float32(2))
        fragments[lane] = fragment
        paired(fragment, first_column, rows_out + row * pitch_bytes, rows_out + next_row * pitch_bytes, np.float32(4))
        grouped(fragment, groups_out + np.uint64(2 * n * lane), np.float32(8))

    return Kernel(rows_kernel, types.void(U64, U64, fragments_of(n), U64, U64), threads=32)


@pytest.mark.usefixtures("compiler")
def test_the_kernels_of_the_gpu_tests_compile():
    compiled = offline.compile_hopper(make_fragment_kernel(64))
    assert compiled.stack_bytes == 0
    assert compiled.count(r"redux\.sync\.or\.b32") == 2
    assert offline.compile_hopper(make_rows_kernel(64)).stack_bytes == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.skipif(SimulatorHarness.is_active(), reason="about a real GPU")
@pytest.mark.parametrize("n", WIDTHS)
def test_rows_columns_and_bits(n):
    cupy = pytest.importorskip("cupy")
    tile = np.random.default_rng(n).standard_normal((16, n)).astype(np.float32)
    thresholds = np.linspace(1, 3, 16, dtype=np.float32)  # few columns have a bit, and each row its own
    lane, i = np.ogrid[:32, : n // 2]
    rows, columns = lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
    fragments, on_device = cupy.asarray(tile[rows, columns]), cupy.asarray(thresholds)
    changed, filled = cupy.empty_like(fragments), cupy.empty_like(fragments)
    maxima, words = cupy.empty((32, 2), np.float32), cupy.empty(n // 32, np.uint32)
    arrays = (fragments, changed, filled, maxima, on_device, words)
    make_fragment_kernel(n).launch(1, *(array.data.ptr for array in arrays))
    np.testing.assert_array_equal(changed.get(), tile[rows, columns] * (2 * columns).astype(np.float32))
    np.testing.assert_array_equal(filled.get(), np.broadcast_to(columns, (32, n // 2)))
    of_lanes = tile.reshape(2, 8, n // 8, 4, 2).max(axis=(2, 4))  # (half, row, lane % 4)
    np.testing.assert_array_equal(maxima.get(), of_lanes.reshape(2, 32).T)
    kept = (tile >= thresholds[:, None]).any(axis=0)
    assert 0 < kept.sum() < n
    np.testing.assert_array_equal(words.get(), np.packbits(kept, bitorder="little").view(np.uint32))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.skipif(SimulatorHarness.is_active(), reason="about a real GPU")
@pytest.mark.parametrize("n", WIDTHS)
def test_pairs_and_groups(n):
    """Rows are longer than what is taken of them; the rest stays as it is."""
    cupy = pytest.importorskip("cupy")
    tile = np.random.default_rng(n).standard_normal((16, n + 2)).astype(np.float32)
    lane, i = np.ogrid[:32, : n // 2]
    rows, columns = lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2
    on_device, rows_out = cupy.asarray(tile), cupy.full((16, n + 2), 7, np.float32)
    fragments, groups_out = cupy.zeros((32, n // 2), np.float32), cupy.zeros((32, n // 2), np.float32)
    addresses = (array.data.ptr for array in (fragments, rows_out, groups_out))
    make_rows_kernel(n).launch(1, on_device.data.ptr, 4 * (n + 2), *addresses)
    np.testing.assert_array_equal(fragments.get(), 2 * tile[rows, columns])
    np.testing.assert_array_equal(rows_out.get()[:, :n], 8 * tile[:, :n])
    assert (rows_out.get()[:, n:] == 7).all()
    np.testing.assert_array_equal(groups_out.get(), 16 * tile[rows, columns])
