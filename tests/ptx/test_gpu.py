"""What instructions compute: one tile, one box or one warp at a time, against NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cce_numba.hopper import tensor_map
from cce_numba.ptx import arithmetic, memory
from tests.helpers.harness import SimulatorHarness
from tests.ptx import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("gpu"),
    pytest.mark.skipif(SimulatorHarness.is_active(), reason="about a real GPU"),
]

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}
ULP = 2.0**-23  # of float32


@pytest.fixture
def cupy(gpu):
    cupy = pytest.importorskip("cupy")
    if (capability := cupy.cuda.Device().compute_capability)[:-1] != "9":
        pytest.skip(f"instructions of compute capability 9.0a; this GPU has {capability}")
    return cupy


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def elementwise(cupy, function, *arrays):
    """function(x, y, z) of each element, on the GPU; arrays that are left out are the first one."""
    length = -(-len(arrays[0]) // 128) * 128
    given = [cupy.asarray(np.resize(x, length)) for x in (*arrays, *arrays[:1] * (3 - len(arrays)))]
    out = cupy.empty(length, np.float32)
    kernel = kernels.make_elementwise(function, arrays[0].dtype)
    kernel.launch(length // 128, *(x.data.ptr for x in (out, *given)))
    return out.get()[: len(arrays[0])]


def encoded(cupy, matrix, box_rows):
    """The tensor map of a matrix, in device memory."""
    return cupy.asarray(np.array(tensor_map.encode(matrix, box_rows, 64), np.uint64))


def without_swizzle(raw):
    """(..., rows, 64) 16-bit numbers out of the bytes of a box, where 16-byte part p of row r lies at part p ^ (r % 8)."""
    parts = raw.view(np.uint16).reshape(*raw.shape[:-1], -1, 8, 8)
    row, part = np.ogrid[: parts.shape[-3], :8]
    return parts[..., row, part ^ (row % 8), :].reshape(*parts.shape[:-2], 64)


# ---- arithmetic


def test_exp2(cupy, rng):
    """Within 2^-22 for all results that are normal numbers (ISA 9.7.3, ex2.approx.ftz)."""
    x = rng.uniform(-125.99, 127.99, 2**16).astype(np.float32)
    y = elementwise(cupy, lambda x, y, z: arithmetic.exp2(x), x)
    np.testing.assert_allclose(y, np.exp2(x.astype(np.float64)), rtol=2.0**-22)


def test_exp2_of_special_numbers(cupy):
    """A row's first maximum is -inf, so exp2(-inf) must be 0; and what is lost must stay lost."""
    x = np.float32([-np.inf, -150, -126.5, 0, 128, np.inf, np.nan])
    y = elementwise(cupy, lambda x, y, z: arithmetic.exp2(x), x)
    np.testing.assert_array_equal(y, np.float32([0, 0, 0, 1, np.inf, np.inf, np.nan]))


def test_log2(cupy, rng):
    """Within 2^-22, of the result or, near 1 where that is small, absolute (ISA 9.7.3, lg2.approx)."""
    x = np.exp2(rng.uniform(-125, 127, 2**16)).astype(np.float32)
    x[::2] = rng.uniform(0.5, 2, 2**15)
    exact = np.log2(x.astype(np.float64))
    y = elementwise(cupy, lambda x, y, z: arithmetic.log2(x), x)
    assert (np.abs(y - exact) <= 2.0**-22 * np.maximum(1, np.abs(exact))).all()


def test_log2_of_special_numbers(cupy):
    x = np.float32([0, 1, 2, np.inf, -1, np.nan])
    y = elementwise(cupy, lambda x, y, z: arithmetic.log2(x), x)
    np.testing.assert_array_equal(y, np.float32([-np.inf, 0, 1, np.inf, np.nan, np.nan]))


def test_maximum(cupy, rng):
    x, y = rng.standard_normal((2, 1024)).astype(np.float32)
    x[:4], y[:4] = [np.nan, 1, -np.inf, np.nan], [1, np.nan, -3, np.nan]
    larger = elementwise(cupy, lambda x, y, z: arithmetic.maximum(x, y), x, y)
    np.testing.assert_array_equal(larger, np.fmax(x, y))
    smaller = elementwise(cupy, lambda x, y, z: arithmetic.minimum(x, y), x, y)
    np.testing.assert_array_equal(smaller, np.fmin(x, y))


def test_fma_rounds_once_and_multiply_before_a_sum(cupy, rng):
    """x * y has twice the digits of float32. With z its rounded negative, one rounding leaves the rest; two leave nothing."""
    x, y = rng.integers(2**23, 2**24, (2, 1024)).astype(np.float32)
    exact = x.astype(np.int64) * y.astype(np.int64)
    z = -exact.astype(np.float32)
    residual = exact + z.astype(np.int64)
    assert np.count_nonzero(residual) > 900
    np.testing.assert_array_equal(elementwise(cupy, lambda x, y, z: arithmetic.fma(x, y, z), x, y, z), residual)
    np.testing.assert_array_equal(elementwise(cupy, lambda x, y, z: arithmetic.multiply(x, y) + z, x, y, z), 0)


@pytest.mark.parametrize(("dtype", "widen"), [("bf16", arithmetic.widen_bf16), ("f16", arithmetic.widen_f16)])
def test_widening_every_16_bit_number(cupy, dtype, widen):
    """Subnormal, infinite and not a number as well; all are exact in float32."""
    bits = np.arange(2**16, dtype=np.uint16)
    wide = elementwise(cupy, lambda x, y, z: widen(x), bits.astype(np.uint32))
    np.testing.assert_array_equal(wide, bits.view(DTYPES[dtype]).astype(np.float32))


@pytest.mark.parametrize(("dtype", "pack"), [("bf16", arithmetic.pack_bf16), ("f16", arithmetic.pack_f16)])
def test_packing_rounds_two_numbers(cupy, rng, dtype, pack):
    """To the nearest, ties to even, of any size: what is too large becomes inf, and NaN stays NaN."""
    x, y = rng.integers(0, 2**32, (2, 2**16), np.uint32).view(np.float32)
    x[::2] = y[1::2] = rng.standard_normal(2**15)
    x[:4] = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11]  # halfway between two numbers of 16 bits
    packed = elementwise(cupy, lambda x, y, z: arithmetic.float_of_bits(pack(x, y)), x, y).view(np.uint16)
    for got, given in zip(packed.reshape(-1, 2).T, (x, y), strict=True):
        with np.errstate(over="ignore"):
            expected = given.astype(DTYPES[dtype])
        np.testing.assert_array_equal(got.view(DTYPES[dtype]).astype(np.float32), expected.astype(np.float32))


def test_floats_and_their_bits(cupy, rng):
    """A float32 of which the highest bit is turned around is its negative."""
    x = rng.standard_normal(1024).astype(np.float32)
    sign = np.uint32(0x80000000)
    got = elementwise(cupy, lambda x, y, z: arithmetic.float_of_bits(arithmetic.bits_of_float(x) ^ sign), x)
    np.testing.assert_array_equal(got, -x)


# ---- tensor maps, barriers, clusters


# 104 columns: rows are a multiple of 16 bytes apart, as the copy engine wants them, but no multiple of a box.
@pytest.mark.parametrize(
    ("row", "column"),
    [(0, 0), (100, 40), (0, 64), (250, 0), (-3, -8), (300, 104)],
    ids=["first", "inside", "past the columns", "past the rows", "before both", "outside"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_box_is_swizzled_and_zero_outside_of_the_matrix(cupy, rng, dtype, row, column):
    matrix = rng.standard_normal((300, 104)).astype(DTYPES[dtype])
    on_device = cupy.asarray(matrix)
    out = cupy.full(kernels.BOX_BYTES // 4, np.nan, np.float32)
    box_map = encoded(cupy, on_device, kernels.BOX_ROWS)
    kernels.make_load_box().launch(1, box_map.data.ptr, out.data.ptr, row, column)
    surrounded = np.pad(matrix.view(np.uint16), 128)
    box = surrounded[128 + row :, 128 + column :][:128, :64]
    np.testing.assert_array_equal(without_swizzle(out.get()), box)


def test_ctas_of_a_cluster_fetch_for_each_other(cupy, rng):
    matrix = cupy.asarray(rng.standard_normal((128, 64)).astype(np.float16))
    out = cupy.full((4, kernels.BOX_BYTES // 4), np.nan, np.float32)
    half_map = encoded(cupy, matrix, kernels.BOX_ROWS // 2)
    kernels.make_multicast().launch(4, half_map.data.ptr, out.data.ptr)
    for box in without_swizzle(out.get()):
        np.testing.assert_array_equal(box, matrix.get().view(np.uint16))


def test_ctas_of_a_cluster_arrive_at_each_others_barriers(cupy):
    out = cupy.full(6, 9, np.uint32)
    kernels.make_cluster().launch(6, out.data.ptr)
    np.testing.assert_array_equal(out.get(), [0, 1] * 3)


def test_ctas_of_a_cluster_store_in_each_others_memory(cupy):
    out = cupy.full(6, 99, np.uint32)
    kernels.make_mail().launch(6, out.data.ptr)
    np.testing.assert_array_equal(out.get(), [8, 7] * 3)


def test_a_barrier_orders_what_warps_write_and_read(cupy):
    """In each of many rounds: 5 are enough for both parities of both barriers, twice."""
    out = cupy.full((5, 32), np.nan, np.float32)
    kernels.make_handover(5).launch(1, out.data.ptr)
    np.testing.assert_array_equal(out.get(), 100 * np.arange(5)[:, None] + np.arange(31, -1, -1))


@pytest.mark.parametrize("masked", [False, True])
def test_a_named_barrier_waits_for_its_warps_alone(cupy, masked):
    out = cupy.full(64, np.nan, np.float32)
    kernels.make_named_barrier(masked).launch(1, out.data.ptr)
    np.testing.assert_array_equal(out.get(), np.arange(63, -1, -1))


def test_warpgroups_exchange_registers(cupy):
    """Three at once in a CTA that has all registers: two raise to 232 what one lets go of."""
    out = cupy.full(384, 999, np.uint32)
    kernels.make_register_exchange().launch(1, out.data.ptr)
    np.testing.assert_array_equal(out.get(), np.arange(384))


# ---- tensor cores


def tile_of(fragments):
    """The (64, n) tile of 128 threads' fragments, with the layout that `ptx.wgmma` describes."""
    thread, i = np.ogrid[: fragments.shape[0], : fragments.shape[1]]
    warp, lane = thread // 32, thread % 32
    tile = np.full((64, 2 * fragments.shape[1]), np.nan)
    tile[16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = fragments
    return tile


@pytest.mark.parametrize("accumulate", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 128, 192, 256])
def test_a_product(cupy, rng, n, dtype, accumulate):
    """Each sum of float32 numbers, however it is rounded, is off by at most an ulp of the sum of their magnitudes."""
    a, b = (rng.standard_normal((rows, 64)).astype(DTYPES[dtype]) for rows in (64, n))
    on_device = cupy.asarray(a), cupy.asarray(b)
    a_map, b_map = encoded(cupy, on_device[0], 64), encoded(cupy, on_device[1], n)
    out = cupy.full((128, n // 2), np.nan, np.float32)
    kernels.make_product(n, dtype).launch(1, a_map.data.ptr, b_map.data.ptr, accumulate, out.data.ptr)
    a, b = a.astype(np.float64), b.astype(np.float64)
    terms = 64 * (1 + accumulate)
    bound = terms * ULP * (1 + accumulate) * np.abs(a) @ np.abs(b).T
    error = np.abs(tile_of(out.get()) - (1 + accumulate) * (a @ b.T))
    assert (error <= bound).all(), f"{np.max(error / bound)} of the bound"


@pytest.mark.parametrize(("a_m_major", "b_n_major"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_operands_whose_rows_run_along_m_or_n(cupy, rng, dtype, a_m_major, b_n_major):
    """The three that the backward has: of logits, of dE, of dC."""
    n = 192
    a, b = rng.standard_normal((64, 64)).astype(DTYPES[dtype]), rng.standard_normal((64, n)).astype(DTYPES[dtype])
    on_device = cupy.asarray(a.T.copy() if a_m_major else a), cupy.asarray(b if b_n_major else b.T.copy())
    a_map, b_map = encoded(cupy, on_device[0], 64), encoded(cupy, on_device[1], 64 if b_n_major else n)
    out = cupy.full((128, n // 2), np.nan, np.float32)
    product = kernels.make_product(n, dtype, a_m_major, b_n_major)
    product.launch(1, a_map.data.ptr, b_map.data.ptr, 0, out.data.ptr)
    a, b = a.astype(np.float64), b.astype(np.float64)
    error, bound = np.abs(tile_of(out.get()) - a @ b), 64 * ULP * np.abs(a) @ np.abs(b)
    assert (error <= bound).all(), f"{np.max(error / bound)} of the bound"


# ---- memory, warps


@pytest.mark.parametrize("whole", [False, True], ids=["of 0 to 16 bytes", "all or nothing"])
def test_asynchronous_copies_zero_what_they_do_not_copy(cupy, rng, whole):
    source = rng.integers(1, 256, (32, 16)).astype(np.uint8)
    counts = (np.arange(32) % 17 * (np.arange(32) % 3 > 0 if whole else 1)).astype(np.uint32)
    on_device, counts_on_device, out = cupy.asarray(source), cupy.asarray(counts), cupy.full(128, np.nan, np.float32)
    copy = memory.copy_async_16_or_zeros if whole else memory.copy_async_16
    kernels.make_copy_async(copy).launch(1, on_device.data.ptr, counts_on_device.data.ptr, out.data.ptr)
    expected = np.where(np.arange(16) < (16 * (counts[:, None] > 0) if whole else counts[:, None]), source, 0)
    np.testing.assert_array_equal(out.get().view(np.uint8).reshape(32, 16), expected)


@pytest.mark.parametrize("first", [0, 2**27 - 5, 2**31 - 16])
def test_asynchronous_copies_of_rows(cupy, rng, first):
    """Rows far from the start have offsets of more than 32 bits; negative ones are nobody's."""
    pitch_bytes = 80
    source = rng.integers(0, 256, (16, pitch_bytes)).astype(np.uint8)
    rows = (first + rng.integers(0, 16, 32)).astype(np.int32)
    rows[::5] = -1
    rows[1] = -(2**31)
    on_device, rows_on_device, out = cupy.asarray(source), cupy.asarray(rows), cupy.zeros((32, 4), np.int32)
    row_0 = (on_device.data.ptr + 16 - first * pitch_bytes) % 2**64
    kernels.make_copy_async_of_row().launch(1, row_0, pitch_bytes, rows_on_device.data.ptr, out.data.ptr)
    expected = np.where(rows[:, None] < 0, 0, source[np.maximum(rows.astype(np.int64) - first, 0), 16:32])
    np.testing.assert_array_equal(out.get().view(np.uint8), expected)


def test_a_barrier_tells_when_copies_are_there(cupy, rng):
    source = rng.integers(-(2**31), 2**31, (32, 4)).astype(np.int32)
    on_device, out = cupy.asarray(source), cupy.zeros((32, 4), np.int32)
    kernels.make_copy_async_arrive().launch(1, on_device.data.ptr, out.data.ptr)
    np.testing.assert_array_equal(out.get(), source[::-1])


def test_loads_from_shared_memory_that_stay_and_that_may_move(cupy, rng):
    x_i32, x_f32 = rng.integers(-(2**31), 2**31, 64).astype(np.int32), rng.standard_normal(64).astype(np.float32)
    given = cupy.asarray(x_i32), cupy.asarray(x_f32)
    out = [cupy.zeros(64, dtype) for dtype in (np.int32, np.int32, np.float32)]
    kernels.make_shared().launch(1, *(array.data.ptr for array in (*given, *out)))
    for got, expected in zip(out, (x_i32, x_i32, x_f32), strict=True):
        np.testing.assert_array_equal(got.get(), expected[::-1])


def test_vectors_from_shared_memory(cupy, rng):
    x = rng.integers(0, 2**32, (32, 4), np.uint32), rng.integers(-(2**31), 2**31, (32, 2)).astype(np.int32)
    x = *x, rng.standard_normal((32, 2)).astype(np.float32)
    given, out = [cupy.asarray(array) for array in x], [cupy.zeros(array.shape, array.dtype) for array in x]
    kernels.make_shared_vectors().launch(1, *(array.data.ptr for array in (*given, *out)))
    for expected, got in zip(x, out, strict=True):
        np.testing.assert_array_equal(got.get(), expected[::-1])


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_a_warp_are_stored(cupy, rng, transposed):
    """Lane l holds row l // 4 of each from column 2 * (l % 4) on, and says where row l % 8 of matrix l // 8 goes."""
    matrices, places = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8), rng.permutation(32).astype(np.int32)
    words = np.ascontiguousarray(matrices.view(np.uint32).reshape(4, 32).T)
    given, out = (cupy.asarray(words), cupy.asarray(places)), cupy.zeros((32, 4), np.int32)
    store = memory.store_matrices_transposed if transposed else memory.store_matrices
    kernels.make_store_matrices(store).launch(1, *(array.data.ptr for array in (*given, out)))
    stored = matrices.transpose(0, 2, 1) if transposed else matrices
    np.testing.assert_array_equal(out.get().view(np.uint16)[places], stored.reshape(32, 8))


def sums_of_warp(out):
    """(16, 8): what a warp's lanes hold of a tile (`ptx.fragment`)."""
    lane, i = np.ogrid[:32, :4]
    tile = np.full((16, 8), np.nan, np.float32)
    tile[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = out.get().reshape(32, 4)
    return tile


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_of_a_warp(cupy, rng, dtype):
    """Small integers, so that every sum is exact."""
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (8, 16))
    given = [cupy.asarray(x.astype(DTYPES[dtype]).view(np.int32)) for x in (a, b)]
    out = cupy.empty(128, np.float32)
    kernels.make_warp_product(dtype).launch(1, *(x.data.ptr for x in (*given, out)))
    np.testing.assert_array_equal(sums_of_warp(out), a @ b.T + 1)


def test_a_product_of_a_warp_in_tf32(cupy, rng):
    a, b = rng.integers(-100, 101, (16, 8)), rng.integers(-100, 101, (8, 8))
    given = [cupy.asarray(x.astype(np.float32).view(np.uint32)) for x in (a, b)]
    out = cupy.empty(128, np.float32)
    kernels.make_warp_product_tf32().launch(1, *(x.data.ptr for x in (*given, out)))
    np.testing.assert_array_equal(sums_of_warp(out), a @ b.T)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_of_a_warp_are_loaded(cupy, rng, count, transposed):
    x = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    out = cupy.zeros(32 * count, np.uint32)
    given = cupy.asarray(x.reshape(-1).view(np.int32))
    kernels.make_load_matrices(count, transposed).launch(1, given.data.ptr, out.data.ptr)
    expected = x[:count].transpose(0, 2, 1) if transposed else x[:count]
    words = out.get().reshape(32, count).T.copy().view(np.uint16).reshape(count, 8, 8)
    np.testing.assert_array_equal(words, expected)


def test_a_matrix_of_a_warp_is_transposed(cupy, rng):
    x = rng.integers(0, 2**16, (8, 8)).astype(np.uint16)
    out = cupy.zeros(32, np.uint32)
    given = cupy.asarray(x.reshape(-1).view(np.uint32))
    kernels.make_transpose_matrix().launch(1, given.data.ptr, out.data.ptr)
    np.testing.assert_array_equal(out.get().view(np.uint16).reshape(8, 8), x.T)


def test_the_union_of_a_warps_bits(cupy, rng):
    bits = np.uint32(1) << rng.integers(0, 32, (2, 32)).astype(np.uint32)
    on_device, out = cupy.asarray(bits), cupy.empty((2, 32), np.uint32)
    kernels.make_or_of_warp().launch(1, on_device.data.ptr, out.data.ptr)
    np.testing.assert_array_equal(out.get(), np.broadcast_to(np.bitwise_or.reduce(bits, axis=1)[:, None], (2, 32)))


def test_the_largest_of_a_warp(cupy, rng):
    """Of numbers without a sign: the highest bit counts."""
    x = rng.integers(0, 2**32, (2, 32), np.uint32)
    on_device, out = cupy.asarray(x), cupy.empty((2, 32), np.uint32)
    kernels.make_max_of_warp().launch(1, on_device.data.ptr, out.data.ptr)
    np.testing.assert_array_equal(out.get(), np.broadcast_to(x.max(axis=1)[:, None], (2, 32)))


@pytest.mark.parametrize("lane", [0, 7, 31])
def test_a_lanes_value_reaches_all(cupy, lane):
    x = np.arange(-32, 32, dtype=np.int32)
    on_device, out = cupy.asarray(x), cupy.empty(64, np.int32)
    kernels.make_shuffle_of_lane().launch(1, on_device.data.ptr, lane, out.data.ptr)
    np.testing.assert_array_equal(out.get(), x[[lane] * 32 + [32 + lane] * 32])


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 31])
def test_lanes_exchange_values(cupy, mask):
    x = np.arange(64, dtype=np.float32)
    on_device, out = cupy.asarray(x), cupy.empty(64, np.float32)
    kernels.make_shuffle().launch(1, on_device.data.ptr, mask, out.data.ptr)
    np.testing.assert_array_equal(out.get(), x[np.arange(64) ^ mask])


def test_bits_are_set_by_many_threads_at_once(cupy, rng):
    """And those that were set stay set."""
    bits = np.uint32(1) << rng.integers(0, 16, 1024).astype(np.uint32)
    words = np.uint32([0x80000000, 0x40000000])
    on_device, words_on_device = cupy.asarray(bits), cupy.asarray(words)
    kernels.make_or_global().launch(8, words_on_device.data.ptr, on_device.data.ptr)
    np.testing.assert_array_equal(words_on_device.get(), [words[i] | np.bitwise_or.reduce(bits[i::2]) for i in (0, 1)])


def test_loads_from_global_memory(cupy, rng):
    """All bits, the highest as well, and zeros above the 16."""
    x = [rng.integers(0, 256, 32 * size, np.uint8).view(f"u{size}") for size in (8, 4, 4, 2)]
    x[1:3] = rng.standard_normal(32).astype(np.float32), x[2].view(np.int32)
    given = [cupy.asarray(array) for array in x]
    out = [cupy.empty(32, dtype) for dtype in (np.uint64, np.float32, np.int32, np.uint32)]
    kernels.make_load_global().launch(1, *(array.data.ptr for array in (*given, *out)))
    for expected, got in zip(x, out, strict=True):
        np.testing.assert_array_equal(got.get(), expected)


def test_pointers_are_addresses_and_views(cupy, rng):
    x = rng.standard_normal(32).astype(np.float32)
    given, out = cupy.asarray(x), [cupy.empty(32, dtype) for dtype in (np.float32, np.uint32, np.float32)]
    kernels.make_pointers().launch(1, *(array.data.ptr for array in (given, *out)))
    for expected, got in zip((x, x.view(np.uint32), x), out, strict=True):
        np.testing.assert_array_equal(got.get(), expected)


def test_loads_on_a_condition(cupy, rng):
    """Without it nothing is touched, not even an address that is nobody's."""
    x, wanted = rng.integers(1, 2**32, 32, np.uint32), (np.arange(32) % 3 == 0).astype(np.uint32)
    given = cupy.asarray(x), cupy.asarray(wanted)
    loaded = cupy.full(32, 9, np.uint32)
    kernels.make_conditional().launch(1, *(array.data.ptr for array in (*given, loaded)))
    np.testing.assert_array_equal(loaded.get(), np.where(wanted, x, 0))


@pytest.mark.parametrize("store", [memory.store_if_4_u32, memory.store_once_if_4_u32], ids=["to stay", "to leave first"])
def test_vectors_on_a_condition(cupy, rng, store):
    """The same, 16 and 8 bytes at a time."""
    x, wanted = rng.integers(1, 2**32, (32, 4), np.uint32), (np.arange(32) % 3 == 0).astype(np.uint32)
    x[:, :2] = rng.standard_normal((32, 2)).astype(np.float32).view(np.uint32)  # no NaN, whose bits may change
    given = cupy.asarray(x), cupy.asarray(wanted)
    loaded, out, out_f32 = cupy.full((32, 4), 9, np.uint32), cupy.full((32, 4), 7, np.uint32), cupy.full((32, 2), 7, np.float32)
    kernels.make_conditional_vectors(store).launch(1, *(array.data.ptr for array in (*given, loaded, out, out_f32)))
    np.testing.assert_array_equal(loaded.get(), np.where(wanted[:, None], x, 0))
    np.testing.assert_array_equal(out.get(), np.where(wanted[:, None], x, 7))
    expected = np.where(wanted[:, None], np.ascontiguousarray(x[:, :2]).view(np.float32), 7)
    np.testing.assert_array_equal(out_f32.get(), expected)


def test_stores_to_global_memory(cupy, rng):
    x = rng.integers(0, 2**32, 32, np.uint32), rng.standard_normal(32).astype(np.float32)
    given, out = [cupy.asarray(array) for array in x], [cupy.zeros(32, array.dtype) for array in (*x, x[1])]
    kernels.make_stores_to_global().launch(1, *(array.data.ptr for array in (*given, *out)))
    for expected, got in zip((*x, x[1]), out, strict=True):
        np.testing.assert_array_equal(got.get(), expected)


def test_vectors_are_added_by_many_threads_at_once(cupy, rng):
    """To what was there before. Sums of small integers are the same in any order."""
    x, sums = rng.integers(-999, 1000, (1024, 4)).astype(np.float32), rng.integers(-999, 1000, (2, 4)).astype(np.float32)
    on_device, sums_on_device = cupy.asarray(x), cupy.asarray(sums)
    kernels.make_add_vectors().launch(8, sums_on_device.data.ptr, on_device.data.ptr)
    np.testing.assert_array_equal(sums_on_device.get(), sums + x.reshape(-1, 2, 4).sum(axis=0))


def test_integers_are_added_in_any_order_and_stored_by_half(cupy, rng):
    x = rng.integers(-(2**50), 2**50, 1024)
    sums, out = cupy.asarray([5, -7]), cupy.zeros(1024, np.uint16)
    kernels.make_add_integers().launch(8, sums.data.ptr, cupy.asarray(x).data.ptr, out.data.ptr)
    np.testing.assert_array_equal(sums.get(), np.array([5, -7]) + x.reshape(-1, 2).sum(axis=0))
    np.testing.assert_array_equal(out.get(), x & 0xFFFF)


def test_ctas_count_and_see_what_others_stored_before(cupy):
    counters, stored = cupy.zeros(2, np.uint32), cupy.zeros(64, np.uint32)
    tickets, out = cupy.zeros(64, np.uint32), cupy.zeros(64, np.uint32)
    kernels.make_counters().launch(64, *(array.data.ptr for array in (counters, stored, tickets, out)))
    np.testing.assert_array_equal(np.sort(tickets.get()), np.arange(64))
    np.testing.assert_array_equal(out.get(), 100 + np.arange(64))
    assert counters.get().tolist() == [64, 64]
