"""The judge of compiled kernels: that it sees spills and what the assembler ignores, and counts instructions right."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda
from numba.cuda import types

from cce_numba.ptx import arithmetic, wgmma
from cce_numba.ptx import fragment as fragments
from cce_numba.tensor_core.fragment import map_elements
from tests.helpers import offline
from tests.ptx import kernels

pytestmark = pytest.mark.usefixtures("compiler")


def test_an_ignored_exchange_of_registers_is_noticed():
    """The assembler must know the registers at the start, for which it needs the number of CTAs of a multiprocessor."""
    kernel = kernels.make_register_exchange()
    assert offline.compile_hopper(kernel).notices == []
    (notice,) = offline.compile_function(kernel.function, kernel.signature, None).notices
    assert "'setmaxnreg' ignored" in notice


def test_a_product_that_is_read_too_early_is_noticed():
    zeros, mma, wait_all = fragments.zeros(64), wgmma.mma(64, "bf16"), wgmma.wait_group(0)

    def kernel(a, b, out):
        wgmma.fence()
        fragment = mma(zeros(), a, b, 0)
        wgmma.commit_group()
        out[0] = fragment[0]
        wait_all()

    (notice,) = offline.compile_function(kernel, types.void(types.uint64, types.uint64, kernels.F32_ARRAY)).notices
    assert "wgmma.wait_group is injected" in notice


def test_spills_and_stacks_are_seen():
    """A fragment of 128 registers, where 1024 threads leave each 64 in all."""

    def halve(z, column):
        return z * np.float32(0.5)

    halved = map_elements(256, halve)

    def kernel(fragments, times):
        fragment = fragments[0]
        for _ in range(times):
            fragment = halved(fragment, 0)
        fragments[0] = fragment

    signature = types.void(types.CPointer(wgmma.fragment_type(256)), types.int32)
    compiled = offline.compile_function(kernel, signature, (128, 1))
    assert (compiled.spilled_bytes, compiled.stack_bytes) == (0, 0)
    compiled = offline.compile_function(kernel, signature, (1024, 1))
    assert compiled.registers == 64
    assert compiled.stack_bytes > 0
    assert compiled.spilled_bytes > compiled.stack_bytes  # stored and loaded


def test_an_array_with_an_index_at_run_time_is_no_spill_but_on_the_stack():
    def kernel(out, i):
        local = cuda.local.array(64, np.float32)
        for j in range(64):
            local[j] = out[j]
        for j in range(64):
            out[j] = local[(i + j) & 63]

    compiled = offline.compile_function(kernel, types.void(kernels.F32_ARRAY, types.int32))
    assert (compiled.stack_bytes, compiled.spilled_bytes) == (4 * 64, 0)


def test_what_cannot_be_assembled_says_why():
    wrong = wgmma.instruction("wgmma.no_such_thing;")

    def kernel():
        wrong()

    with pytest.raises(RuntimeError, match="no_such_thing"):
        offline.compile_function(kernel, types.void())


@pytest.mark.parametrize("cc", [(8, 0), (9, 0)])
def test_a_kernel_is_compiled_for_the_compute_capability_that_is_asked_for(cc):
    kernel = kernels.make_elementwise(lambda x, y, z: arithmetic.fma(x, y, z))
    compiled = offline.compile_launched(kernel, cc)
    assert f".target sm_{cc[0]}{cc[1]}{'a' if cc == (9, 0) else ''}\n" in compiled.ptx
    assert compiled.count(r"fma\.rn\.f32") == 1
    assert compiled.count(r"ld\.global\.f32") == 3
    assert (compiled.spilled_bytes, compiled.stack_bytes, compiled.notices) == (0, 0, [])


def test_counting_instructions():
    """At the start of a line or a statement, behind a label or a predicate; in full, and not as operands."""
    ptx = """
        add.s32 %r1, %r2, %r3;
        @%p1 add.s32 %r1, %r2, %r3;
        @!%p1 add.s32 %r1, %r2, %r3;
        { .reg .pred p; add.s32 %r1, %r2, %r3; @p add.s32 %r1, %r2, %r3; LABEL: add.s32 %r1, %r2, %r3; }
        add.s32.wrapped %r1, %r2, %r3;
        vadd.s32 %r1, %r2, %r3;
        call add.s32;
    """
    compiled = offline.Compiled(ptx, registers=0, spilled_bytes=0, stack_bytes=0, smem_bytes=0, log="")
    assert compiled.count(r"add\.s32") == 6
    assert compiled.count(r"add\.s32 %r1, %r2") == 6
    assert compiled.count(r"call") == 1
