"""Matrix products of a warpgroup, 128 threads, on tensor cores. ISA 9.7.15.

`D (64, n) += A (64, 16) @ B (n, 16).T`: A and B lie in shared memory, D in float32 in the registers of the four warps, each of
which holds 16 rows of it as a `fragment` (`ptx.fragment`).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir

from cce_numba.ptx.fragment import fragment_type
from cce_numba.ptx.instruction import U32, U64, as_intrinsic, check_operands, emit, instruction

# Operands whose rows are 128 bytes (64 16-bit numbers) with the 128-byte swizzle, as a tensor map with that swizzle leaves
# them: layout type 1 in bits 62-63, 1024 bytes from one group of 8 rows to the next in bits 32-45, in units of 16 bytes.
# ISA 9.7.15.5.1.
SWIZZLE_128B = np.uint64((1 << 62) | ((1024 >> 4) << 32) | (1 << 16))

# The same for operands whose rows run along M or N, not K: a panel is 64 of those by 64 k, a row of it one k; the next 64 of M
# or N are in the next panel, `PANEL_BYTES` further (bits 16-29).
PANEL_BYTES = 64 * 128
SWIZZLE_128B_PANELS = np.uint64((1 << 62) | ((1024 >> 4) << 32) | ((PANEL_BYTES >> 4) << 16))

fence = instruction(
    "wgmma.fence.sync.aligned;", doc="Before the first product, and wherever registers of its operands were touched."
)
commit_group = instruction("wgmma.commit_group.sync.aligned;", doc="The products so far make a group.")


@functools.cache
def wait_group(pending: int) -> Any:
    """The instruction that waits until at most `pending` groups of products are under way."""
    if not 0 <= pending <= 7:
        raise ValueError(f"wgmma.wait_group: pending must be in [0, 7], got {pending}")
    return instruction(f"wgmma.wait_group.sync.aligned {pending};")


@functools.cache
def mma(n: int, dtype: str, *, a_m_major: bool = False, b_n_major: bool = False) -> Any:
    """The product for n columns, of "bf16" or "f16" operands: `fragment = mma(n, dtype)(fragment, a, b, accumulate)`.

    a and b are shared-memory descriptors of A (64, 16) and B (n, 16), K-major: rows of consecutive k; or, with `a_m_major` or
    `b_n_major`, panels (see `SWIZZLE_128B_PANELS`) whose rows run along M or N. With accumulate == 0 the fragment that came in
    is not added. It runs asynchronously: `fence` before, `commit_group` and `wait_group` after. Raises ValueError for an n that
    the hardware lacks, and for other dtypes.
    """
    if n % 8 or not 8 <= n <= 256:
        raise ValueError(f"wgmma: n must be a multiple of 8 in [8, 256], got {n}")
    if dtype not in ("bf16", "f16"):
        raise ValueError(f"wgmma: dtype must be 'bf16' or 'f16', got {dtype!r}")
    count, fragment = n // 2, fragment_type(n)
    mnemonic = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype}"
    registers = ", ".join(f"${i}" for i in range(count))
    # The operands after D: two descriptors, whether to add D, no negation of A or B, which of them are transposed.
    a, b, accumulate = (f"${2 * count + i}" for i in range(3))
    forms = f"{int(a_m_major)}, {int(b_n_major)}"
    template = f"{{ .reg .pred p; setp.ne.b32 p, {accumulate}, 0; {mnemonic} {{{registers}}}, {a}, {b}, p, 1, 1, {forms}; }}"
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["l", "l", "r", "~{memory}"]

    def define(_: Any, *given: Any) -> Any:
        operands = (fragment, U64, U64, U32)
        check_operands(mnemonic, operands, given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            accumulators = [builder.extract_value(values[0], i) for i in range(count)]
            result = ir.LiteralStructType([ir.FloatType()] * count)
            product = emit(builder, result, template, constraints, [*accumulators, *values[1:]])
            packed = ir.Constant(values[0].type, ir.Undefined)
            for i in range(count):
                packed = builder.insert_value(packed, builder.extract_value(product, i), i)
            return packed

        return fragment(*operands), generate

    return as_intrinsic(define, 4, mnemonic)
