"""Addresses of shared memory, vector loads, asynchronous copies of 16 bytes, and reductions in global memory."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core.errors import NumbaTypeError

from cce_numba.ptx.instruction import F32, I32, I64, U32, U64, as_intrinsic, emit, instruction

_FOUR = types.UniTuple(U32, 4)


def _define_shared_address(_: Any, array: Any) -> Any:
    if not isinstance(array, types.Array):
        raise NumbaTypeError(f"shared_address: operand 0 must be an array in shared memory, got {array}")

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        from numba.cuda.np import arrayobj  # not there in the simulator

        data = arrayobj.make_array(signature.args[0])(context, builder, values[0]).data
        template = "{ .reg .u64 window; cvta.to.shared.u64 window, $1; cvt.u32.u64 $0, window; }"
        pointer = builder.ptrtoint(data, ir.IntType(64))
        return emit(builder, ir.IntType(32), template, ["=r", "l"], [pointer], ordered=False)

    return U32(array), generate


shared_address = as_intrinsic(
    _define_shared_address,
    1,
    "shared_address",
    "(array): the 32-bit address of its start in the shared window. ISA 9.7.9, cvta.",
)
load_global_u64 = instruction("ld.global.nc.u64 $0, [$1];", (U64,), U64, ordered=False, doc="(address) of what nobody writes.")
# These two stay where they are written, since many of them at once, moved to the front, would take as many registers.
load_global_u16 = instruction(
    "{ .reg .u16 x; ld.global.nc.u16 x, [$1]; cvt.u32.u16 $0, x; }",
    (U64,),
    U32,
    name="ld.global.nc.u16",
    doc="(address) of what nobody writes.",
)
load_global_f32 = instruction("ld.global.nc.f32 $0, [$1];", (U64,), F32, doc="(address) of what nobody writes.")
load_global_i32 = instruction("ld.global.nc.s32 $0, [$1];", (U64,), I32, ordered=False, doc="(address) of what nobody writes.")
load_shared_f32 = instruction("ld.shared.f32 $0, [$1];", (U32,), F32, doc="(shared address). ISA 9.7.9, ld.")
store_shared_f32 = instruction("st.shared.f32 [$0], $1;", (U32, F32), doc="(shared address, value). ISA 9.7.9, st.")
copy_async_16 = instruction(
    "cp.async.cg.shared.global [$0], [$1], 16, $2;",
    (U32, U64, U32),
    doc="(shared address, global address, bytes): copies so many of 16 bytes and zeros the rest, later. ISA 9.7.9.25.3.",
)
copy_async_16_or_zeros = instruction(
    # Not a number of bytes: it takes five instructions more.
    "{ .reg .pred absent; setp.eq.u32 absent, $2, 0; cp.async.cg.shared.global [$0], [$1], 16, absent; }",
    (U32, U64, U32),
    name="cp.async.cg.shared.global (or zeros)",
    doc="(shared address, global address, condition): copies 16 bytes, later, or zeros if the condition is 0. ISA 9.7.9.25.3.",
)
copy_async_16_of_row = instruction(
    "{ .reg .pred absent; .reg .u64 row; setp.lt.s32 absent, $2, 0; mad.wide.u32 row, $2, $3, $1; "
    "cp.async.cg.shared.global [$0], [row], 16, absent; }",
    (U32, U64, I32, U32),
    name="cp.async.cg.shared.global (of a row)",
    doc="(shared address, address in row 0, row, bytes of a row): copies 16 bytes, later, or zeros if the row is negative.",
)
copy_async_commit = instruction("cp.async.commit_group;", doc="This thread's copies so far make a group. ISA 9.7.9.25.3.")

copy_async_arrive = instruction(
    "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];",
    (U32,),
    doc="(barrier): one arrival for this thread, once all that it has begun to copy is there. ISA 9.7.13.15.16.",
)


@functools.cache
def copy_async_wait(pending: int) -> Any:
    """The instruction that waits until at most `pending` of this thread's groups of copies are under way.

    ISA 9.7.9.25.3. Raises ValueError for a negative number.
    """
    if pending < 0:
        raise ValueError(f"cp.async.wait_group: pending must be at least 0, got {pending}")
    return instruction(f"cp.async.wait_group {pending};")


fence_proxy_async = instruction(
    "fence.proxy.async.shared::cta;",
    doc="What this thread wrote to shared memory becomes visible to tensor cores and bulk copies. ISA 9.7.13.4.",
)
or_global_u32 = instruction(
    "red.global.or.b32 [$0], $1;", (U64, U32), doc="(address, bits): sets bits, atomically. ISA 9.7.13."
)
load_shared_i32 = instruction("ld.shared.s32 $0, [$1];", (U32,), I32, doc="(shared address). ISA 9.7.9, ld.")
store_shared_i32 = instruction("st.shared.s32 [$0], $1;", (U32, I32), doc="(shared address, value). ISA 9.7.9, st.")

# These may move, and be dropped: for an address that comes out of an ordered instruction after whatever wrote there.
load_shared_f32_freely = instruction(
    "ld.shared.f32 $0, [$1];", (U32,), F32, ordered=False, name="ld.shared.f32 (freely)", doc="(shared address)."
)
load_shared_i32_freely = instruction(
    "ld.shared.s32 $0, [$1];", (U32,), I32, ordered=False, name="ld.shared.s32 (freely)", doc="(shared address)."
)
load_shared_2_f32_freely = instruction(
    "ld.shared.v2.f32 {$0, $1}, [$2];",
    (U32,),
    types.UniTuple(F32, 2),
    ordered=False,
    name="ld.shared.v2.f32 (freely)",
    doc="(shared address): two numbers.",
)
load_shared_2_i32_freely = instruction(
    "ld.shared.v2.s32 {$0, $1}, [$2];",
    (U32,),
    types.UniTuple(I32, 2),
    ordered=False,
    name="ld.shared.v2.s32 (freely)",
    doc="(shared address): two numbers.",
)

# Through shared memory, tiles in registers become rows. By all of a warp; lane 8 * i + j says where row j of matrix i goes.
load_shared_4_u32 = instruction(
    "ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];", (U32,), _FOUR, doc="(shared address): 16 bytes. ISA 9.7.9, ld."
)
store_matrices = instruction(
    "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};",
    (U32, U32, U32, U32, U32),
    doc="(shared address of a row, four words): four 8 x 8 matrices of 16-bit numbers, of each of which lane l holds row "
    "l // 4 from column 2 * (l % 4) on. ISA 9.7.15.5.16.",
)
store_matrices_transposed = instruction(
    "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
    (U32, U32, U32, U32, U32),
    name="stmatrix.trans",
    doc="As `store_matrices`; what are rows in shared memory are columns in registers.",
)

# What other CTAs write while this kernel runs: read from the L2 cache, which all share. With a condition in place of a branch,
# so that many of them are under way at a time.
load_if_u32 = instruction(
    "{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.u32 $0, 0; @p ld.global.cg.u32 $0, [$1]; }",
    (U64, U32),
    U32,
    name="ld.global.cg.u32",
    doc="(address, condition): 0 if the condition is 0. ISA 9.7.9, ld.",
)
load_if_4_u32 = instruction(
    "{ .reg .pred p; setp.ne.u32 p, $5, 0; mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; "
    "@p ld.global.cg.v4.u32 {$0, $1, $2, $3}, [$4]; }",
    (U64, U32),
    _FOUR,
    name="ld.global.cg.v4.u32",
    doc="(address, condition): 16 bytes, as four words; zeros if the condition is 0. ISA 9.7.9, ld.",
)
load_once_4_u32 = instruction(
    "ld.global.nc.L1::no_allocate.v4.u32 {$0, $1, $2, $3}, [$4];",
    (U64,),
    _FOUR,
    ordered=False,
    name="ld.global.nc.L1::no_allocate.v4.u32",
    doc="(address) of 16 bytes that nobody writes, and that are not read again. ISA 9.7.9, ld.global.nc.",
)
store_if_4_u32 = instruction(
    "{ .reg .pred p; setp.ne.u32 p, $5, 0; @p st.global.v4.u32 [$0], {$1, $2, $3, $4}; }",
    (U64, U32, U32, U32, U32, U32),
    name="st.global.v4.u32",
    doc="(address, four words, condition): nothing if the condition is 0. ISA 9.7.9, st.",
)
add_4_f32 = instruction(
    "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};",
    (U64, F32, F32, F32, F32),
    doc="(address, four numbers): adds, atomically, in the L2 cache; nothing comes back to be waited for. ISA 9.7.13, red.",
)
store_4_f32 = instruction(
    "st.global.v4.f32 [$0], {$1, $2, $3, $4};", (U64, F32, F32, F32, F32), doc="(address, four numbers). ISA 9.7.9, st."
)
load_4_f32 = instruction(
    "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];",
    (U64,),
    types.UniTuple(F32, 4),
    doc="(address): four numbers that this thread may have written itself. ISA 9.7.9, ld.",
)
store_once_if_4_u32 = instruction(
    "{ .reg .pred p; setp.ne.u32 p, $5, 0; @p st.global.cs.v4.u32 [$0], {$1, $2, $3, $4}; }",
    (U64, U32, U32, U32, U32, U32),
    name="st.global.cs.v4.u32",
    doc="As `store_if_4_u32`, of what is not read again: the first to leave the cache. ISA 9.7.9, st.",
)
store_if_2_f32 = instruction(
    "{ .reg .pred p; setp.ne.u32 p, $3, 0; @p st.global.v2.f32 [$0], {$1, $2}; }",
    (U64, F32, F32, U32),
    name="st.global.v2.f32",
    doc="(address, two numbers, condition): nothing if the condition is 0. ISA 9.7.9, st.",
)
store_global_u32 = instruction("st.global.u32 [$0], $1;", (U64, U32), doc="(address, value). ISA 9.7.9, st.")
store_global_u16 = instruction(
    "{ .reg .u16 x; cvt.u16.u32 x, $1; st.global.u16 [$0], x; }",
    (U64, U32),
    name="st.global.u16",
    doc="(address, value): the value's lower half. ISA 9.7.9, st.",
)
store_global_f32 = instruction("st.global.f32 [$0], $1;", (U64, F32), doc="(address, value). ISA 9.7.9, st.")

# Counters through which CTAs wait for each other.
load_acquire_u32 = instruction(
    "ld.acquire.gpu.global.u32 $0, [$1];",
    (U64,),
    U32,
    doc="(address): what others wrote before they released this value is visible after it. ISA 9.7.9, ld.",
)
add_release_u32 = instruction(
    "red.release.gpu.global.add.u32 [$0], $1;",
    (U64, U32),
    doc="(address, number): adds, atomically, once all that this thread saw is visible to the GPU. ISA 9.7.13, red.",
)
fetch_add_u32 = instruction(
    "atom.relaxed.gpu.global.add.u32 $0, [$1], $2;",
    (U64, U32),
    U32,
    doc="(address, number): adds, atomically; what was there before. ISA 9.7.13, atom.",
)
add_global_s64 = instruction(
    "red.relaxed.gpu.global.add.u64 [$0], $1;",
    (U64, I64),
    name="red.global.add.u64",
    doc="(address, number): adds, atomically, in any order. ISA 9.7.13, red.",
)
fence_proxy_async_all = instruction(
    "fence.proxy.async;",
    name="fence.proxy.async (all)",
    doc="Orders ordinary accesses, to global memory too, with those of tensor cores and bulk copies. ISA 9.7.13.4.",
)
