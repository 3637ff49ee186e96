"""Kernels for arrays: one for each combination of dtypes and layouts, and the same source in the simulator."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from numba import cuda

from cce_numba.interchange import BFLOAT16
from cce_numba.launch.array_kernel import ArrayKernel, argument
from tests.helpers.harness import SimulatorHarness

simulated = pytest.mark.skipif(not SimulatorHarness.is_active(), reason="about the simulator; tests/simt runs it there")
compiled = pytest.mark.skipif(SimulatorHarness.is_active(), reason="the simulator compiles nothing")


class Pair(NamedTuple):
    values: Any
    scale: Any


class Nested(NamedTuple):
    pair: Any
    arrays: Any


def add_kernel(out, nested, first):
    """out[i, j] += scale * values[i, j] + arrays[0][j], for rows from `first` on."""
    i, j = cuda.blockIdx.x + first, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if j < out.shape[1]:
        out[i, j] += nested.pair.scale * nested.pair.values[i, j] + nested.arrays[0][j]


def on_device(host):
    """What is asked of a CuPy array."""
    return SimpleNamespace(
        dtype=host.dtype,
        ndim=host.ndim,
        size=host.size,
        itemsize=host.itemsize,
        shape=host.shape,
        strides=host.strides,
        flags=host.flags,
        data=SimpleNamespace(ptr=host.ctypes.data),
    )


@pytest.fixture
def launched(monkeypatch):
    """What came to `Kernel.launch_flat`: kernel, grid, numbers."""
    from cce_numba.launch.kernel import Kernel

    seen = []
    monkeypatch.setattr(Kernel, "launch_flat", lambda kernel, grid, numbers: seen.append((kernel, grid, numbers)))
    return seen


@compiled
def test_a_kernel_for_each_combination_of_dtypes_and_layouts(launched):
    kernel = ArrayKernel(add_kernel, block=(32, 2), ctas=3)
    kernel.identity = "its factory"
    matrix, row = np.zeros((4, 6), np.float32), np.zeros(6, np.float32)
    variants = [
        (matrix, Nested(Pair(matrix, np.float32(2)), (row,)), 1),
        (matrix[:, ::2], Nested(Pair(matrix, np.float32(2)), (row,)), 1),
        (matrix, Nested(Pair(matrix.astype(BFLOAT16), np.float32(2)), (row,)), 1),
        (matrix, Nested(Pair(matrix, np.float64(2)), (row,)), 1),
        (matrix, Nested(Pair(matrix, np.float32(2)), (row, row)), 1),
        (matrix, Pair(Pair(matrix, np.float32(2)), (row,)), 1),
        (matrix, Nested(Pair(matrix, np.float32(2)), (row,)), True),
    ]
    for _ in range(2):
        for values in variants:
            kernel.launch((4, 1), *device(values))
    kernels = [item[0] for item in launched]
    assert kernels[: len(variants)] == kernels[len(variants) :]
    assert len(set(kernels)) == len(variants)
    assert len({str(item.signature) for item in kernels}) == len(variants)
    for item in kernels:
        assert (item.identity, item.block, item.threads, item.ctas) == ("its factory", (32, 2, 1), 64, 3)
    assert list(map(str, kernels[0].signature.args)) == [
        "array(float32, 2d, C)",
        "Nested(Pair(array(float32, 2d, C), float32), UniTuple(array(float32, 1d, C) x 1))",
        "int64",
    ]


def device(values):
    """Arrays of tuples of tuples as on a device."""
    if isinstance(values, tuple):
        items = map(device, values)
        return type(values)(*items) if hasattr(values, "_fields") else tuple(items)
    return on_device(values) if isinstance(values, np.ndarray) else values


@compiled
def test_arrays_that_are_described_before_are_passed_as_others(launched):
    kernel = ArrayKernel(add_kernel, block=32)
    matrix, row = np.zeros((4, 6), np.float32), np.zeros(6, np.float32)
    values = device((matrix, Nested(Pair(matrix, np.float32(2)), (row,)), 1))
    kernel.launch(1, *values)
    kernel.launch(1, *argument(values))
    kernel.launch((0, 7), *values)
    (first, grid, numbers), second = launched
    assert (first, grid, numbers) == second
    assert grid == (1, 1, 1)
    pointers = matrix.ctypes.data, row.ctypes.data
    a_matrix, a_row = [0, 0, 24, 4, pointers[0], 4, 6, 24, 4], [0, 0, 6, 4, pointers[1], 6, 4]
    assert numbers == [*a_matrix, *a_matrix, 2, *a_row, 1]


@compiled
@pytest.mark.parametrize("value", [1.5, "text", None, np.int32(3)])
def test_other_arguments_are_refused(launched, value):
    with pytest.raises(KeyError):
        ArrayKernel(lambda x: None, block=32).launch(1, value)


def test_in_the_simulator_kernels_write_to_the_arrays_that_they_get():
    if not SimulatorHarness.is_active():
        pytest.skip("about the simulator; tests/simt runs this file there")
    kernel = ArrayKernel(add_kernel, block=4)
    base, values, row = np.zeros((3, 12), np.float32), np.arange(18, dtype=np.float32).reshape(3, 6), np.ones(6, np.float32)
    out = base[:, ::2]
    for nested in (Nested(Pair(values, np.float32(2)), (row,)), argument(Nested(Pair(values, np.float32(2)), (row,)))):
        kernel.launch((2, 2), out, nested, 1)
    np.testing.assert_array_equal(out[0], 0)
    np.testing.assert_array_equal(out[1:], 2 * (2 * values[1:] + 1))
    np.testing.assert_array_equal(base[:, 1::2], 0)


def mirrored_kernel(out, waits):
    """out[t] = the number of the thread that mirrors t, through shared memory; -1 if it has not written it yet."""
    smem = cuda.shared.array(16, np.int64)
    t = cuda.threadIdx.x
    smem[t] = -1
    cuda.syncthreads()
    smem[t] = t
    if waits:
        cuda.syncthreads()
    out[cuda.blockIdx.x, t] = smem[15 - t]


def uneven_kernel(out):
    """Thread t waits at t barriers, and counts them."""
    for _ in range(cuda.threadIdx.x):
        cuda.syncthreads()
        out[cuda.threadIdx.x] += 1


def failing_kernel(out):
    """Thread 3 fails while others wait."""
    if cuda.threadIdx.x == 3:
        raise ValueError("three")
    cuda.syncthreads()
    out[cuda.threadIdx.x] = 1


@simulated
def test_in_the_simulator_threads_meet_at_barriers():
    kernel, out = ArrayKernel(mirrored_kernel, block=16), np.zeros((2, 16), np.int64)
    kernel.launch(2, out, True)
    np.testing.assert_array_equal(out, [np.arange(15, -1, -1)] * 2)
    counts = np.zeros(5, np.int64)
    ArrayKernel(uneven_kernel, block=5).launch(1, counts)
    np.testing.assert_array_equal(counts, np.arange(5))


@simulated
def test_in_the_simulator_a_missing_barrier_shows_every_time_alike():
    kernel, out = ArrayKernel(mirrored_kernel, block=16), np.zeros((2, 16), np.int64)
    kernel.launch(2, out, False)
    np.testing.assert_array_equal(out[0], out[1])
    early = out[0] == -1
    np.testing.assert_array_equal(early, ~early[::-1])  # of two threads, one comes too early
    assert 0 < early[:8].sum() < 8  # the order is not that of their numbers


@simulated
def test_in_the_simulator_a_thread_that_fails_is_named_and_ends_the_others():
    before, out = threading.active_count(), np.zeros(8, np.int64)
    with pytest.raises(ValueError, match=r"tid=\[3, 0, 0\] ctaid=\[0, 0, 0\]: three"):
        ArrayKernel(failing_kernel, block=8).launch(1, out)
    assert not out.any()
    assert threading.active_count() == before


@pytest.mark.gpu
@compiled
@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_kernels_write_to_the_arrays_that_they_get():
    import cupy

    kernel = ArrayKernel(add_kernel, block=4)
    base, row = cupy.zeros((3, 12), np.float32), cupy.ones(6, np.float32)
    values = cupy.arange(18, dtype=np.float32).reshape(3, 6)
    out = base[:, ::2]
    for _ in range(2):
        kernel.launch((2, 2), out, Nested(Pair(values, np.float32(2)), (row,)), 1)
    np.testing.assert_array_equal(out[0].get(), 0)
    np.testing.assert_array_equal(out[1:].get(), 2 * (2 * values[1:] + 1).get())
    np.testing.assert_array_equal(base[:, 1::2].get(), 0)
