"""Registers, barriers of some warps of a CTA, and reductions over a warp."""

from __future__ import annotations

import functools
from typing import Any

from cce_numba.ptx.instruction import F32, I32, U32, instruction


@functools.cache
def raise_registers(count: int) -> Any:
    """The instruction that gives each thread of the warpgroup `count` registers, once others let go of theirs. ISA 9.7.19.5."""
    return _set_registers("inc", count)


@functools.cache
def lower_registers(count: int) -> Any:
    """The instruction that leaves each thread of the warpgroup `count` registers. ISA 9.7.19.5."""
    return _set_registers("dec", count)


def _set_registers(how: str, count: int) -> Any:
    if not (24 <= count <= 256 and count % 8 == 0):
        raise ValueError(f"setmaxnreg: must be a multiple of 8 in [24, 256], got {count}")
    return instruction(f"setmaxnreg.{how}.sync.aligned.u32 {count};")


barrier_sync = instruction(
    "bar.sync $0, $1;", (U32, U32), doc="(number, threads): waits for so many threads at barrier 1 to 15. ISA 9.7.13.1."
)
barrier_mask = instruction(
    "{ .reg .pred all; setp.eq.u32 all, $1, $1; bar.red.and.pred all, $1, $2, all; selp.u32 $0, 0xffffffff, 0, all; }",
    (U32, U32),
    U32,
    name="bar.red.and.pred",
    doc="(number, threads): waits as `barrier_sync`, and gives all bits, which no assembler knows: what is made with them "
    "stands after the barrier. ISA 9.7.13.1.",
)
warp_sync = instruction(
    "bar.warp.sync 0xffffffff;", (), doc="(): waits for all lanes; no access to memory moves across it. ISA 9.7.13.2."
)
or_of_warp = instruction(
    "redux.sync.or.b32 $0, $1, 0xffffffff;", (U32,), U32, doc="(bits): their union over the warp, in all lanes. ISA 9.7.13.10."
)
shuffle_i32 = instruction(
    "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;",
    (I32, U32),
    I32,
    name="shfl.sync.idx",
    doc="(value, lane): the value of that lane. ISA 9.7.9, shfl.sync.",
)
shuffle_xor_f32 = instruction(
    "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;",
    (F32, U32),
    F32,
    doc="(value, mask): the value of the lane whose number differs in the bits of the mask. ISA 9.7.9, shfl.sync.",
)
max_of_warp = instruction(
    "redux.sync.max.u32 $0, $1, 0xffffffff;", (U32,), U32, doc="(number): the largest of the warp, in all lanes. ISA 9.7.13.10."
)
