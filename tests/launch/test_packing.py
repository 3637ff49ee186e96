"""Bytes of arguments: laid out as C would, and as the parameters of the compiled kernel are."""

from __future__ import annotations

import ctypes
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cce_numba.interchange import BFLOAT16
from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from numba.cuda import types

from cce_numba.launch.packing import array_type, array_values, layout_of, pointer_to

C = {
    types.boolean: ctypes.c_bool,
    types.int32: ctypes.c_int32,
    types.int64: ctypes.c_int64,
    types.uint64: ctypes.c_uint64,
    types.float32: ctypes.c_float,
    types.float64: ctypes.c_double,
}


def numbers_of(kinds):
    return [(i % 2 if kind == types.boolean else i + 1) for i, kind in enumerate(kinds)]


@given(kinds=st.lists(st.sampled_from(list(C)), min_size=1, max_size=20))
def test_numbers_lie_where_c_would_put_them(kinds):
    layout, numbers = layout_of(types.void(*kinds)), numbers_of(kinds)
    fields = [(f"f{i}", C[kind]) for i, kind in enumerate(kinds)]
    structure = type("Arguments", (ctypes.Structure,), {"_fields_": fields})
    packed = layout.pack(*numbers)
    assert len(packed) <= ctypes.sizeof(structure) < len(packed) + 8, "C pads at the end"
    seen = structure.from_buffer_copy(packed.ljust(ctypes.sizeof(structure), b"\0"))
    assert [getattr(seen, name) for name, _ in fields] == numbers


class Record(NamedTuple):
    array: Any
    flag: Any
    number: Any


@pytest.mark.usefixtures("compiler")
def test_records_and_arrays_lie_where_the_compiled_kernel_reads_them():
    """Its PTX names each parameter with its size, which is its alignment too; records are taken apart into parameters."""

    def kernel(flag, record, pair, pointer, more, last):
        record.array[0, 1] = record.number + pair[0][0] + pointer[2] + more if flag and record.flag else last

    record = types.NamedTuple([array_type(np.dtype("f4"), 2, True), types.boolean, types.float64], Record)
    pair = types.Tuple((array_type(BFLOAT16, 1, False), types.int32))
    signature = types.void(types.boolean, record, pair, pointer_to("f4"), types.int64, types.float32)
    compiled = offline.compile_function(kernel, signature)
    sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z]+(\d+) ", compiled.ptx.partition(")")[0])]
    place, places = 0, []
    for size in sizes:
        place = -(-place // size) * size
        places.append(place)
        place += size
    # A flag, then an array of 2 dimensions (9 numbers), a flag, a float64 number; 7 numbers, an int32; an address, two numbers.
    assert sizes == [1, *[8] * 9, 1, 8, *[8] * 7, 4, 8, 8, 4]
    layout = layout_of(signature)
    assert layout.size == place
    blank = [0] * len(sizes)
    for i, place in enumerate(places):
        marked = layout.pack(*(1 if j == i else number for j, number in enumerate(blank)))
        assert next(k for k, byte in enumerate(marked) if byte) // sizes[i] * sizes[i] == place


def test_the_numbers_of_an_array():
    host = np.zeros((4, 6), np.float32)[:, ::2]
    array = SimpleNamespace(size=12, itemsize=4, data=SimpleNamespace(ptr=4096), shape=host.shape, strides=host.strides)
    assert array_values(array) == (0, 0, 12, 4, 4096, 4, 3, 24, 8)
    assert layout_of(types.void(array_type(host.dtype, 2, False))).size == 9 * 8


def test_array_types_tell_dtype_dimensions_and_layout_apart():
    made = {array_type(np.dtype(dtype), ndim, c) for dtype in ("f2", "f4", "f8", "i8", "u1") for ndim in (1, 2) for c in (0, 1)}
    assert len(made) == 20
    assert array_type(BFLOAT16, 1, True).dtype == types.uint16
    assert array_type(np.dtype("f4"), 2, True) is array_type(np.dtype("f4"), 2, True)


@pytest.mark.parametrize("kind", [types.uint32, types.int8, types.complex64, types.none, types.unicode_type])
def test_other_types_are_refused_before_anything_is_compiled(kind):
    with pytest.raises(TypeError, match="kernels here take bool, int32, int64, uint64, float32, float64, pointers, arrays and"):
        layout_of(types.void(kind))
