"""Sums over warps and CTAs: of the terms' own type, by as few shuffles as there are steps; on a GPU, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda

from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator knows no warps", allow_module_level=True)

from cce_numba.launch.kernel import Kernel, pointer_to
from cce_numba.tensor_core.sums import THREADS, make_warp_reduce, sum_before, sum_up_to, sums_of_rows, warp_sum

FUNCTIONS = {"warp_sum": warp_sum, "sum_up_to": sum_up_to}
DTYPES = [np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float32)]


@cuda.jit(device=True)
def larger(x, y):
    return max(x, y)


def make_warp_kernel(function, dtype):
    """out[i] = function(x[i])."""

    def warp_kernel(x, out):
        out[cuda.threadIdx.x] = function(x[cuda.threadIdx.x])

    return Kernel(warp_kernel, (pointer_to(dtype), pointer_to(dtype)), threads=64)


def make_rows_kernel(dtype):
    """out[i], out[64 + i] = the sums of x and of twice x over the lanes that are i, modulo 4."""

    def rows_kernel(x, out):
        i = cuda.threadIdx.x
        first, second = sums_of_rows(x[i], x[i] + x[i])
        out[i] = first
        out[64 + i] = second

    return Kernel(rows_kernel, (pointer_to(dtype), pointer_to(dtype)), threads=64)


def make_cta_kernel():
    """before[i] and total[i] = the sums of x before i and of all; twice, so that one call follows another."""

    def cta_kernel(x, before, total):
        sums = cuda.shared.array(32, np.int64)
        i = cuda.threadIdx.x
        for turn in range(2):
            before[THREADS * turn + i], total[THREADS * turn + i] = sum_before(x[THREADS * turn + i], sums)

    return Kernel(cta_kernel, (pointer_to(np.int64),) * 3, threads=THREADS)


# ---- compiled


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_sum_takes_five_shuffles_of_each_32_bits(name, dtype):
    compiled = offline.compile_hopper(make_warp_kernel(FUNCTIONS[name], dtype))
    assert compiled.count(r"shfl\.sync\.\w+\.b32") == 5 * (dtype.itemsize // 4)
    assert compiled.count(r"add\.(s32|s64|f32)") >= 5
    assert compiled.count(rf"add\.{'f32' if dtype == np.float32 else f's{8 * dtype.itemsize}'}") >= 5
    assert compiled.count(r"call(\.uni)?") == 0
    assert compiled.stack_bytes == 0


@pytest.mark.usefixtures("compiler")
def test_any_device_function_may_combine_lanes():
    compiled = offline.compile_hopper(make_warp_kernel(make_warp_reduce(larger), np.int32))
    assert compiled.count(r"shfl\.sync\.bfly\.b32") == 5
    assert compiled.count(r"max\.s32") == 5


@pytest.mark.usefixtures("compiler")
def test_the_kernels_of_the_gpu_tests_compile():
    for kernel in (make_rows_kernel(np.float32), make_cta_kernel()):
        assert offline.compile_hopper(kernel).spilled_bytes == 0


# ---- on a GPU


@pytest.fixture
def cupy(gpu):
    return pytest.importorskip("cupy")


def numbers(dtype, length, seed=0):
    """Of either sign; floats are whole, so that no order of a sum rounds."""
    return np.random.default_rng(seed).integers(-1000, 1000, length).astype(dtype)


def run(cupy, kernel, x, *shapes):
    """What the kernel leaves in arrays of these shapes."""
    given, out = cupy.asarray(x), [cupy.zeros(shape, x.dtype) for shape in shapes]
    kernel.launch(1, *(array.data.ptr for array in (given, *out)))
    return [array.get() for array in out]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_warps(cupy, dtype):
    x = numbers(dtype, 64)
    (total,) = run(cupy, make_warp_kernel(warp_sum, dtype), x, 64)
    (up_to,) = run(cupy, make_warp_kernel(sum_up_to, dtype), x, 64)
    warps = x.reshape(2, 32)
    np.testing.assert_array_equal(total, np.repeat(warps.sum(axis=1), 32))
    np.testing.assert_array_equal(up_to, warps.cumsum(axis=1).ravel())


@pytest.mark.gpu
def test_lanes_are_combined(cupy):
    x = numbers(np.int32, 64)
    (largest,) = run(cupy, make_warp_kernel(make_warp_reduce(larger), np.int32), x, 64)
    np.testing.assert_array_equal(largest, np.repeat(x.reshape(2, 32).max(axis=1), 32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_the_rows_of_a_fragment(cupy, dtype):
    x = numbers(dtype, 64)
    (sums,) = run(cupy, make_rows_kernel(dtype), x, 128)
    once = np.tile(x.reshape(2, 8, 4).sum(axis=1)[:, None], (1, 8, 1)).ravel()
    np.testing.assert_array_equal(sums, np.concatenate([once, 2 * once]))


@pytest.mark.gpu
def test_sums_of_a_cta(cupy):
    x = numbers(np.int64, 2 * THREADS)
    before, total = run(cupy, make_cta_kernel(), x, 2 * THREADS, 2 * THREADS)
    turns = x.reshape(2, THREADS)
    np.testing.assert_array_equal(before, (turns.cumsum(axis=1) - turns).ravel())
    np.testing.assert_array_equal(total, np.repeat(turns.sum(axis=1), THREADS))
