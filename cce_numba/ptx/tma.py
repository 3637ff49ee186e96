"""Tensor maps, and the bulk copies that they describe (Tensor Memory Accelerator). ISA 9.7.9.25.5.

A tensor map is 128 opaque bytes in global memory that the host encodes (`hopper.tensor_map`). Reads outside the tensor give
zeros.
"""

from __future__ import annotations

from cce_numba.ptx.instruction import I32, U32, U64, instruction

load_2d = instruction(
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [$0], [$1, {$3, $4}], [$2];",
    (U32, U64, U32, I32, I32),
    doc="(shared address, tensor map, barrier, column, row): copies a box to shared memory, its bytes to the barrier's count.",
)
load_2d_multicast = instruction(
    "{ .reg .b16 ctas; cvt.u16.u32 ctas, $5; cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    ".multicast::cluster [$0], [$1, {$3, $4}], [$2], ctas; }",
    (U32, U64, U32, I32, I32, U32),
    name="cp.async.bulk.tensor.2d.multicast",
    doc="As `load_2d`, to the same place in each CTA of the cluster whose bit is set in the last operand, and to its barrier.",
)
fence_tensor_map = instruction(
    "fence.proxy.tensormap::generic.acquire.gpu [$0], 128;",
    (U64,),
    doc="(tensor map): before its first use in a CTA, if a kernel wrote it. ISA 9.7.13.4.",
)
