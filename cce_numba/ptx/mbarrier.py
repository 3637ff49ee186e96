"""Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies. ISA 9.7.13.15.

A barrier runs through phases: it completes one when all expected arrivals and bytes are in. Waiters name the parity of the
phase that they wait for; a fresh barrier is in phase 0, and "phase 1", the one before, counts as complete.
Addresses are 32-bit ones of the shared window, see `memory.shared_address`.
"""

from __future__ import annotations

from cce_numba.ptx.instruction import U32, instruction

init = instruction("mbarrier.init.shared::cta.b64 [$0], $1;", (U32, U32), doc="(barrier, arrivals that complete a phase).")
fence_init = instruction(
    "fence.mbarrier_init.release.cluster;", doc="Makes `init` visible to the cluster and to asynchronous copies. ISA 9.7.13.4."
)
arrive = instruction("mbarrier.arrive.shared::cta.b64 _, [$0];", (U32,), doc="(barrier): one arrival.")
arrive_many = instruction("mbarrier.arrive.shared::cta.b64 _, [$0], $1;", (U32, U32), doc="(barrier, number of arrivals).")
arrive_expect_tx = instruction(
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;",
    (U32, U32),
    doc="(barrier, bytes): one arrival, and the phase completes only after so many bytes more have been copied.",
)
arrive_cluster = instruction(
    # Without ".release.cluster", which costs a fence of the whole GPU's memory: no data goes with this arrival.
    "mbarrier.arrive.shared::cluster.b64 _, [$0];",
    (U32,),
    doc="(address in the cluster's window, see `cluster.map_shared`): one arrival at another CTA's barrier.",
)
wait = instruction(
    "{ .reg .pred done; AGAIN_${:uid}: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra AGAIN_${:uid}; }",
    (U32, U32),
    name="mbarrier.try_wait",
    doc="(barrier, parity): waits until the phase of that parity is complete.",
)
