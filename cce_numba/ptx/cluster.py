"""CTAs of a cluster run together and reach each other's shared memory. ISA 5.1.3, 9.7.13.3, 10."""

from __future__ import annotations

from cce_numba.ptx.instruction import U32, instruction

cta_rank = instruction("mov.u32 $0, %cluster_ctarank;", (), U32, ordered=False, name="cluster_ctarank", doc="This CTA's rank.")
map_shared = instruction(
    "mapa.shared::cluster.u32 $0, $1, $2;",
    (U32, U32),
    U32,
    ordered=False,
    doc="(shared address, rank): the same place in that CTA, as an address in the cluster's window. ISA 9.7.9, mapa.",
)
store_async = instruction(
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [$0], $1, [$2];",
    (U32, U32, U32),
    name="st.async",
    doc="(address, value, barrier), both of one CTA in the cluster's window: stores, and counts 4 bytes. ISA 9.7.9.12.",
)
sync = instruction(
    # Not ".aligned": lanes of a warp may come one by one, from loops that only some of them were in.
    "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;",
    doc="Waits for all threads of the cluster. ISA 9.7.13.3.",
)
