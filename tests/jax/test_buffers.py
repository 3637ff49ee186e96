"""XLA's memory as arrays: on the host as XLA has it, and for a GPU what can be seen without one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed")
jnp = pytest.importorskip("jax.numpy")
buffer_callback = pytest.importorskip("jax.experimental.buffer_callback").buffer_callback
buffers = pytest.importorskip("cce_numba.jax.buffers")


def with_buffers(function, x):
    """What the function returns of XLA's buffers of `x` and of a result like it."""
    found = []

    def callback(context, out, given):
        found.append(function(context, out, given))

    buffer_callback(callback, jax.ShapeDtypeStruct(x.shape, x.dtype), has_side_effect=True)(x).block_until_ready()
    return found[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8"])
def test_on_the_host_nothing_is_copied(dtype):
    x = jnp.arange(24).reshape(4, 6).astype(dtype)

    def look(context, out, given):
        array, result = buffers.array_of(given), buffers.array_of(out)
        assert array.dtype == x.dtype
        np.testing.assert_array_equal(array, np.arange(24).reshape(4, 6).astype(x.dtype))
        assert buffers.kind_of(given).device is None
        addresses = [buffers.address(buffer) for buffer in (given, out)]
        assert addresses == [array.ctypes.data, result.ctypes.data]
        return addresses[0]

    assert with_buffers(look, x) == x.unsafe_buffer_pointer()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_on_a_gpu_an_array_lies_where_the_buffer_does(dtype):
    """CuPy makes arrays of addresses without a GPU."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    x = jnp.ones((4, 6), dtype)

    def look(context, out, given):
        on_gpu = SimpleNamespace(
            shape=given.shape, dtype=given.dtype, __dlpack__=given.__dlpack__, __dlpack_device__=lambda: (2, 0)
        )
        array = buffers.array_of(on_gpu)
        assert type(array).__module__.startswith("cupy")
        assert (array.shape, array.dtype, array.data.device_id) == ((4, 6), x.dtype, 0)
        assert array.flags.c_contiguous
        kind = buffers.kind_of(on_gpu)
        assert (kind.library, kind.device) == ("jax", 0)
        return array.data.ptr

    assert with_buffers(look, x) == x.unsafe_buffer_pointer()


def test_other_devices_are_refused():
    with pytest.raises(NotImplementedError, match="must be on the CPU or an NVIDIA GPU, got DLPack's device type 10"):
        buffers.kind_of(SimpleNamespace(__dlpack_device__=lambda: (10, 0)))
