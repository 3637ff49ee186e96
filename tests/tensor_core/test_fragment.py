"""What is done with a tile in registers: once for each element, without memory, and to the right rows and columns."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numba import cuda
from numba.core.errors import TypingError
from numba.cuda import types

from cce_numba.launch.kernel import Kernel, pointer_to
from cce_numba.ptx import arithmetic, control, memory, wgmma
from cce_numba.ptx import fragment as fragments
from cce_numba.tensor_core.fragment import (
    best_two_of_rows,
    change_chunks,
    collect_bits,
    column_of,
    fill_columns,
    fold_rows,
    map_elements,
    row_of,
    visit_chunks,
)
from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

WIDTHS = [32, 64, 192, 256]
CHUNKS = [8, 16, 32]  # columns that are handled at a time
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


def times_four_numbers(numbers, _, factor):
    return numbers[0] * factor, numbers[1] * factor, numbers[2] * factor, numbers[3] * factor


def store_four_numbers(numbers, first, out, place, factor):
    """Where the fragment has them, from out[place] on."""
    place += first >> 1
    out[place] = numbers[0] * factor
    out[place + 1] = numbers[1] * factor
    out[place + 2] = numbers[2] * factor
    out[place + 3] = numbers[3] * factor
    return np.int32(0)


def change_ends(numbers, first, factor):
    """The first and the last number of a chunk of any width, and nothing else."""
    return (numbers[0] * factor + np.float32(first), *numbers[1:-1], numbers[-1] * factor)


def store_ends(numbers, first, out, place, factor):
    """At the chunk's place in (chunks, 2), from out[place] on."""
    place += first // len(numbers)
    out[place] = numbers[0] * factor
    out[place + 1] = numbers[-1] * factor
    return np.int32(0)


def store_first_column(numbers, first, address):
    memory.store_global_u32(address, np.uint32(first))
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


def make_best_kernel(n):
    best = best_two_of_rows(n)

    def best_kernel(fragments, numbers, places):
        """numbers (threads, 4), places (threads, 2): what each thread finds of its fragment."""
        t = cuda.threadIdx.x
        found, at = best(fragments[t])
        for i in range(4):
            numbers[4 * t + i] = found[i]
        places[2 * t], places[2 * t + 1] = at[0], at[1]

    return Kernel(best_kernel, (fragments_of(n), F32_ARRAY, pointer_to(np.int32)), threads=32)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("n", [32, 192])
def test_the_best_two_take_two_comparisons_of_each_element(n):
    compiled = offline.compile_launched(make_best_kernel(n), (8, 0))
    compared = compiled.count(r"setp\.(gt|lt|leu|geu|le|ge|gtu|ltu)\.f32") + compiled.count(r"max\.f32")
    assert n // 2 <= compared <= 2 * n // 2
    assert compiled.spilled_bytes == 0


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.skipif(SimulatorHarness.is_active(), reason="about a real GPU")
@pytest.mark.parametrize("n", [32, 64, 192])
def test_the_best_two_of_rows(n):
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    z = rng.integers(-9, 10, (32, n // 2)).astype(np.float32)
    z[3, :], z[4, 5] = -np.inf, np.nan
    numbers, places = cupy.zeros((32, 4), np.float32), cupy.zeros((32, 2), np.int32)
    make_best_kernel(n).launch(1, cupy.asarray(z).data.ptr, numbers.data.ptr, places.data.ptr)
    for t in range(32):
        for row in range(2):
            own = np.array([z[t, i] for i in range(n // 2) if row_of(i) == row])
            own = np.where(np.isnan(own), -np.inf, own)
            assert numbers.get()[t, 2 * row : 2 * row + 2].tolist() == np.sort(own)[::-1][:2].tolist()
            assert places.get()[t, row] == own.argmax()


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


def places_of_stores(compiled):
    """Which numbers after an address are stored to, one for each instruction."""
    offsets = re.findall(r"st\.global\.f32 \s*\[%rd\d+(?:\+(\d+))?\]", compiled.ptx)
    return sorted(int(offset or 0) // 4 for offset in offsets)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("n", WIDTHS)
def test_each_number_of_each_chunk_is_visited_or_changed_once(n):
    changed, visited = change_chunks(n, 8, times_four_numbers, F32), visit_chunks(n, 8, store_four_numbers, F32_ARRAY, I32, F32)

    def changes(fragments, out, factor):
        fragments[0] = changed(fragments[0], factor)

    def visits(fragments, out, factor):
        visited(fragments[0], out, 0, factor)

    for kernel in (changes, visits):
        compiled = offline.compile_function(kernel, types.void(fragments_of(n), F32_ARRAY, F32))
        assert places_of_stores(compiled) == [*range(n // 2)]
        assert compiled.count(r"mul\.f32") == n // 2
        assert compiled.stack_bytes == 0
        assert compiled.count(r"call(\.uni)?") == 0


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("n", WIDTHS)
def test_chunks_of_any_width(n, chunk):
    """Two of their numbers are changed, or looked at; the others cost nothing."""
    changed, visited = change_chunks(n, chunk, change_ends, F32), visit_chunks(n, chunk, store_ends, F32_ARRAY, I32, F32)
    chunks = n // chunk

    def changes(fragments, out, factor):
        fragments[0] = changed(fragments[0], factor)

    def visits(fragments, out, factor):
        visited(fragments[0], out, 0, factor)

    signature = types.void(fragments_of(n), F32_ARRAY, F32)
    changes, visits = offline.compile_function(changes, signature), offline.compile_function(visits, signature)
    assert places_of_stores(visits) == [*range(2 * chunks)]
    assert visits.count(r"ld\.global\.f32") == 2 * chunks
    for compiled in (changes, visits):
        # The sum with a chunk's column is one instruction with the product.
        assert compiled.count(r"(mul|fma\.rn)\.f32") == 2 * chunks
        assert compiled.stack_bytes == 0
        assert compiled.count(r"call(\.uni)?") == 0


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_come_in_order(chunk):
    """By the constants that are stored, each by an instruction that stays where it is written."""
    visited = visit_chunks(192, chunk, store_first_column, U64)

    def visits(fragments, address):
        visited(fragments[0], address)

    ptx = offline.compile_function(visits, types.void(fragments_of(192), U64)).ptx
    constants = dict(re.findall(r"mov\.u32 \s*(%r\d+), (\d+);", ptx))
    stored = [int(constants[register]) for register in re.findall(r"st\.global\.u32 \[%rd\d+\], (%r\d+);", ptx)]
    assert stored == [*range(0, 192, chunk)]


@pytest.mark.usefixtures("compiler")
def test_fragments_of_another_width_are_refused():
    fold, changed = fold_rows(64, larger), map_elements(64, times_column, F32)
    bits, zeros, one = collect_bits(64, at_least), fragments.zeros(72), np.float32(1)
    chunks_changed, chunks_visited = change_chunks(64, 8, times_four_numbers, F32), visit_chunks(64, 8, store_first_column, U64)

    def folds():
        fold(zeros(), one, one, one, one)

    def changes():
        changed(zeros(), 0, one)

    def collects():
        bits(zeros(), one, one)

    def changes_chunks():
        chunks_changed(zeros(), one)

    def visits_chunks():
        chunks_visited(zeros(), np.uint64(0))

    message = r"operand 0 must be UniTuple\(float32 x 32\), got UniTuple\(float32 x 36\)"
    for kernel in (folds, changes, collects, changes_chunks, visits_chunks):
        with pytest.raises(TypingError, match=message):
            offline.compile_function(kernel, types.void())


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
    return Kernel(fragment_kernel, (fragments, fragments, fragments, F32_ARRAY, F32_ARRAY, U32_ARRAY), threads=32)


def make_chunks_kernel(n, chunk):
    """Of each thread's fragment: one with other ends of chunks, these ends, and all numbers."""
    changed, ends = change_chunks(n, chunk, change_ends, F32), visit_chunks(n, chunk, store_ends, F32_ARRAY, I32, F32)
    numbers, chunks = visit_chunks(n, 8, store_four_numbers, F32_ARRAY, I32, F32), n // chunk

    def chunks_kernel(fragments, changed_out, ends_out, numbers_out):
        lane = cuda.threadIdx.x
        fragment = fragments[lane]
        changed_out[lane] = changed(fragment, np.float32(2))
        ends(fragment, ends_out, 2 * chunks * lane, np.float32(4))
        numbers(fragment, numbers_out, n // 2 * lane, np.float32(8))

    return Kernel(chunks_kernel, (fragments_of(n), fragments_of(n), F32_ARRAY, F32_ARRAY), threads=32)


@pytest.mark.usefixtures("compiler")
def test_the_kernels_of_the_gpu_tests_compile():
    compiled = offline.compile_hopper(make_fragment_kernel(64))
    assert compiled.stack_bytes == 0
    assert compiled.count(r"redux\.sync\.or\.b32") == 2
    assert offline.compile_hopper(make_chunks_kernel(64, 16)).stack_bytes == 0


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
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("n", WIDTHS)
def test_chunks(n, chunk):
    """Each is told its first column; factors are powers of two, so that nothing is rounded twice."""
    cupy = pytest.importorskip("cupy")
    fragments = np.random.default_rng(n).standard_normal((32, n // chunk, chunk // 2)).astype(np.float32)
    given, changed = cupy.asarray(fragments), cupy.zeros(fragments.shape, np.float32)
    ends, numbers = cupy.zeros((32, n // chunk, 2), np.float32), cupy.zeros(fragments.shape, np.float32)
    make_chunks_kernel(n, chunk).launch(1, *(array.data.ptr for array in (given, changed, ends, numbers)))
    expected = fragments.copy()
    expected[..., 0] = 2 * fragments[..., 0] + np.arange(0, n, chunk, dtype=np.float32)
    expected[..., -1] = 2 * fragments[..., -1]
    np.testing.assert_array_equal(changed.get(), expected)
    np.testing.assert_array_equal(ends.get(), 4 * fragments[..., [0, -1]])
    np.testing.assert_array_equal(numbers.get(), 8 * fragments)
