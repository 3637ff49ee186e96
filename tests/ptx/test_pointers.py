"""Pointers as addresses and as views: no instruction of their own, and nothing else is taken for a pointer."""

from __future__ import annotations

import numpy as np
import pytest
from numba.core.errors import TypingError
from numba.cuda import types

from cce_numba.launch.kernel import pointer_to
from cce_numba.ptx.pointers import address_of, view_as
from tests.helpers import offline

pytestmark = pytest.mark.usefixtures("compiler")

F32_ARRAY, I32_ARRAY, U64_ARRAY = pointer_to(np.float32), pointer_to(np.int32), pointer_to(np.uint64)


def test_an_address_is_the_pointers_own_64_bits():
    def kernel(x, out):
        out[0] = address_of(x)

    compiled = offline.compile_function(kernel, types.void(F32_ARRAY, U64_ARRAY))
    assert compiled.count(r"st\.global\.u64") == 1
    assert compiled.count(r"(add|sub|shl|or|and|mul)\S*") == 0


@pytest.mark.parametrize(
    ("number", "bits"),
    [(types.uint8, 8), (types.int32, 32), (types.uint32, 32), (types.float32, 32), (types.int64, 64)],
    ids=str,
)
def test_a_view_reads_numbers_of_its_type(number, bits):
    """At their own distance, in global memory still, as the compiler knows of pointers that a kernel takes."""
    view = view_as(number)

    def kernel(x, out):
        out[0] = view(x)[3]

    compiled = offline.compile_function(kernel, types.void(F32_ARRAY, types.CPointer(number)))
    kind = "f" if number == types.float32 else "[us]"
    assert compiled.count(rf"ld\.global\.{kind}{bits}") == 1
    assert f"+{3 * bits // 8}]" in compiled.ptx
    assert view_as(number) is view  # a function that numba has typed before


@pytest.mark.parametrize("wrong", [types.uint64, types.float32, types.Array(types.float32, 1, "C")], ids=str)
@pytest.mark.parametrize(("function", "name"), [(address_of, "address_of"), (view_as(types.int32), r"view_as\(int32\)")])
def test_nothing_else_is_taken_for_a_pointer(function, name, wrong):
    def kernel(x):
        function(x)

    with pytest.raises(TypingError, match=rf"{name}: operand 0 must be a pointer, got "):
        offline.compile_function(kernel, types.void(wrong))
