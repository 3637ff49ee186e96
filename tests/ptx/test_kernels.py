"""The kernels of the GPU tests compile: so that a mistake in them shows without a GPU."""

from __future__ import annotations

import pytest

from cce_numba.ptx import arithmetic, memory
from tests.helpers import offline
from tests.ptx import kernels

pytestmark = pytest.mark.usefixtures("compiler")

ARGUMENTS = {
    "make_elementwise": (lambda x, y, z: arithmetic.fma(x, y, z),),
    "make_product": (256, "f16", True, True),
    "make_conditional_vectors": (memory.store_if_4_u32,),
    "make_copy_async": (memory.copy_async_16_or_zeros,),
    "make_handover": (5,),
    "make_named_barrier": (True,),
    "make_warp_product": ("bf16",),
    "make_load_matrices": (4, True),
    "make_store_matrices": (memory.store_matrices_transposed,),
}


@pytest.mark.parametrize("make", sorted(name for name in vars(kernels) if name.startswith("make_")))
def test_kernels_of_the_gpu_tests(make):
    compiled = offline.compile_hopper(getattr(kernels, make)(*ARGUMENTS.get(make, ())))
    assert compiled.spilled_bytes == 0
    assert compiled.notices == []
