"""Tensor-core products for every width: what is refused, what the assembler makes of them, and the operands' descriptors."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numba.core.errors import TypingError
from numba.cuda import types

from cce_numba.ptx import fragment as fragments
from cce_numba.ptx import wgmma
from tests.helpers import offline

pytestmark = pytest.mark.usefixtures("compiler")

WIDTHS = range(8, 257, 8)  # all that the hardware has, ISA 9.7.15.2


def make_product(n, dtype, **majors):
    """A kernel with one product, and its signature: every element of the fragment is stored."""
    zeros, mma, wait_all = fragments.zeros(n), wgmma.mma(n, dtype, **majors), wgmma.wait_group(0)

    def product(a, b, accumulate, out):
        fragment = zeros()
        wgmma.fence()
        fragment = mma(fragment, a, b, accumulate)
        wgmma.commit_group()
        wait_all()
        out[0] = fragment

    return product, types.void(types.uint64, types.uint64, types.uint32, types.CPointer(wgmma.fragment_type(n)))


def test_widths_that_the_hardware_lacks():
    for n in {*range(-8, 272)} - {*WIDTHS}:
        with pytest.raises(ValueError, match=rf"n must be a multiple of 8 in \[8, 256\], got {n}$"):
            wgmma.mma(n, "bf16")


@pytest.mark.parametrize("dtype", ["tf32", "float16", "f32", None])
def test_dtypes_that_have_another_k(dtype):
    """Products of 16-bit numbers have k = 16; others would need other descriptors."""
    with pytest.raises(ValueError, match=f"dtype must be 'bf16' or 'f16', got {dtype!r}"):
        wgmma.mma(64, dtype)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_all_widths_that_the_hardware_has(dtype):
    for n in WIDTHS:
        assert wgmma.mma(n, dtype) is wgmma.mma(n, dtype)  # a function that numba has typed before
        assert wgmma.fragment_type(n).count == 64 * n // 128  # 64 rows among 128 threads


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize("n", [8, 64, 96, 128, 160, 192, 224, 256])
def test_a_product_assembles(n, dtype):
    """At least as many registers as the fragment has, no spills, and no notice that it was serialised."""
    compiled = offline.compile_function(*make_product(n, dtype))
    assert compiled.count(rf"wgmma\.mma_async\.sync\.aligned\.m64n{n}k16\.f32\.{dtype}\.{dtype}") == 1
    assert compiled.count(r"wgmma\.\S+") == 4
    assert compiled.count(r"st\.global\.f32") == n // 2
    assert n // 2 <= compiled.registers <= n // 2 + 32
    assert compiled.spilled_bytes == 0
    assert compiled.notices == []


@pytest.mark.parametrize("b_n_major", [False, True])
@pytest.mark.parametrize("a_m_major", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_operands_whose_rows_do_not_run_along_k_are_transposed(dtype, a_m_major, b_n_major):
    """ISA 9.7.15.5.2: `d, a-desc, b-desc, scale-d, imm-scale-a, imm-scale-b, imm-trans-a, imm-trans-b`."""
    compiled = offline.compile_function(*make_product(64, dtype, a_m_major=a_m_major, b_n_major=b_n_major))
    flags = rf"{int(a_m_major)}, {int(b_n_major)};"
    assert len(re.findall(rf"m64n64k16\.f32\.{dtype}\.{dtype} {{[^}}]*}}, %rd\d+, %rd\d+, p, 1, 1, {flags}", compiled.ptx)) == 1
    assert compiled.notices == []


def test_the_fragment_must_be_of_the_products_width():
    mma, zeros = wgmma.mma(64, "bf16"), fragments.zeros(72)

    def kernel(a, b):
        mma(zeros(), a, b, 1)

    message = r"m64n64k16.*: operand 0 must be UniTuple\(float32 x 32\), got UniTuple\(float32 x 36\)"
    with pytest.raises(TypingError, match=message):
        offline.compile_function(kernel, types.void(types.uint64, types.uint64))


def fields_of(descriptor):
    """A descriptor's fields, ISA 9.7.15.5.1, "matrix descriptor format": lengths are in units of 16 bytes.

    bits  0-13  start address, which kernels add
    bits 16-29  leading dimension byte offset
    bits 32-45  stride dimension byte offset: from one group of 8 rows to the next
    bits 49-51  base offset: 0, as the pattern starts at a multiple of 1024 bytes
    bits 62-63  swizzle: 1 is that of 128 bytes
    """
    bits = int(descriptor)
    fields = {"start": (0, 14), "leading": (16, 14), "stride": (32, 14), "base": (49, 3), "swizzle": (62, 2)}
    values = {name: bits >> first & (1 << length) - 1 for name, (first, length) in fields.items()}
    assert bits == sum(values[name] << first for name, (first, _) in fields.items())  # nothing else is set
    assert isinstance(descriptor, np.uint64)  # a Python integer and a uint64 would make a float64 in numba
    return values


def test_the_descriptor_of_swizzled_rows():
    """For K-major operands the leading dimension is not used with a swizzle, by convention 1."""
    bytes_of_8_rows = 8 * 64 * 2  # of 64 16-bit numbers
    expected = {"start": 0, "leading": 1, "stride": bytes_of_8_rows // 16, "base": 0, "swizzle": 1}
    assert fields_of(wgmma.SWIZZLE_128B) == expected


def test_the_descriptor_of_panels():
    """For others it is the distance to the next 64 of M or N, in a panel of 64 rows."""
    bytes_of_8_rows, bytes_of_a_panel = 8 * 64 * 2, 64 * 64 * 2
    assert bytes_of_a_panel == wgmma.PANEL_BYTES
    expected = {"start": 0, "leading": bytes_of_a_panel // 16, "stride": bytes_of_8_rows // 16, "base": 0, "swizzle": 1}
    assert fields_of(wgmma.SWIZZLE_128B_PANELS) == expected
