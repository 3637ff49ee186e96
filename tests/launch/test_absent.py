"""A GPU that is not there: arrays that behave as CuPy's do for host code, launches that are noted, and nothing left behind."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import cce_numba as cce
from cce_numba import gpu, interchange
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.launch.absent import absent_gpu


def test_arrays_are_views_where_cupys_are():
    with absent_gpu((9, 0)) as (cupy, _):
        array = cupy.zeros((4, 6), np.float32)
        assert interchange.library_of(array) == "cupy"
        assert interchange.device_of(array) == "cuda:0"
        assert array.data.ptr % 256 == 0
        part = array[1:, ::2]
        assert (part.shape, part.strides, part.flags.c_contiguous) == ((3, 3), (24, 8), False)
        assert part.data.ptr == array.data.ptr + 24
        part[...] = cupy.asarray(np.ones((3, 3)))
        assert array.get().sum() == 9
        assert array.view(np.uint32).data.ptr == array.reshape(-1).data.ptr == array.data.ptr
        assert (len(array), array.size, array.itemsize, array.dtype) == (4, 24, 4, np.float32)


def test_results_are_arrays_even_of_one_element():
    with absent_gpu((9, 0)) as (cupy, _):
        array = cupy.arange(6, dtype=np.int64)
        for one in (array[2], array.sum(), array[2] * 3, np.sqrt(array)[0], cupy.where(array > 2, array, 0)[5]):
            assert (interchange.library_of(one), one.ndim) == ("cupy", 0)
            assert one.data.ptr > 2**60, "an address that no device has"
        assert int((array * 2)[3].get()) == 6
        total = cupy.zeros(6, np.float32)
        assert np.tanh(total, out=total) is total
        total += 1
        assert total.get().tolist() == [1] * 6


@pytest.mark.parametrize(
    ("cc", "backend", "kernel"),
    [((9, 0), "hopper", "forward_kernel"), ((8, 0), "ampere", "forward_kernel"), ((7, 5), "simt", "lse_kernel")],
)
def test_a_call_launches_what_it_would_and_results_have_their_shapes(cc, backend, kernel):
    before = gpu.cupy, gpu.current, gpu.count, sys.modules.get("cupy")
    with absent_gpu(cc) as (cupy, launched):
        e, c, targets = cupy.zeros((3, 7, 24), np.float16), cupy.zeros((50, 24), np.float16), cupy.zeros((3, 7), np.int64)
        assert cce.explain(e, c, targets).backend == backend
        loss, grads = cce.linear_cross_entropy_with_grad(e, c, targets, reduction="none")
        assert (loss.shape, loss.dtype, grads.e.shape, grads.c.dtype) == ((3, 7), np.float32, (3, 7, 24), np.float16)
        names = {each.function.__name__ for each in launched}
        assert {kernel, "indexed_dot_kernel"} < names
        with pytest.raises(ValueError, match="c: must be on the device of e, cuda:0, got cpu"):
            cce.linear_cross_entropy(e, np.zeros((50, 24), np.float16), targets)
    assert before == (gpu.cupy, gpu.current, gpu.count, sys.modules.get("cupy")), "nothing pretends any more"
    assert cce.explain(np.ones((2, 4)), np.ones((8, 4)), np.array([1, 2])).backend == "cpu"
