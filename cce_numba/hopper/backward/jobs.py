"""Jobs: how the CTAs of the GPU take them off one queue, and how the warps of a CTA learn of them.

The jobs of all phases are numbered, in the order of the phases, and CTAs take the numbers in order. Within a phase each tile of
the result has one job, and the phases that add to a tile of dE follow each other. So sums are made in the same order in every
run, whichever CTAs make them.

The scheduling warp of a CTA takes jobs (`scheduler`) and describes them in shared memory, in the job ring. Job s, the s-th of
this CTA, is in entry s % entries. Its readers are the copying thread, the gathering warps, and one of the two consumers; they
wait for the entry's `full` barrier, and arrive at its `empty` barrier when they are done with the entry.

CTAs work alone or in clusters of two. A cluster takes two neighbouring jobs at a time, and often both multiply the same A. A
stage of the ring is free once both CTAs have let go of it. So the two jobs must take equally many stages, or the CTAs would
wait for each other forever: phases have even numbers of jobs, and rows of dE and dC are cut into even numbers of tiles (see
`host`). CTA 0 of a cluster takes two numbers off the queue, and sends the first of them to CTA 1 once CTA 1 has read the number
before.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.records import WORD, Header
from cce_numba.hopper.backward.tiles import HEADER_WORDS, BackwardTiles
from cce_numba.ptx import cluster, control, mbarrier, memory
from cce_numba.tensor_core.survey.tables import LIST_TILE

# Kinds of jobs: G of some columns of a list; a tile of dE, of dC; and no job any more.
LOGITS, D_E, D_C, END = np.int32(0), np.int32(1), np.int32(2), np.int32(3)


@functools.cache
def make_job_ring(tiles: BackwardTiles) -> SimpleNamespace:
    """Device functions for the job ring that begins at the shared address `jobs`; s, a uint32, counts the jobs of this CTA."""
    entries, job_bytes = np.uint32(tiles.known_jobs), np.uint32(tiles.job_bytes)
    barriers = np.uint32(tiles.known_jobs * tiles.job_bytes)
    readers = np.uint32(2 + tiles.gatherers)
    load, store, ctas = memory.load_shared_i32, memory.store_shared_i32, np.uint32(tiles.cluster)

    # ---- addresses

    @cuda.jit(device=True, forceinline=True)
    def entry_of(jobs: Any, s: Any) -> Any:
        """Address of the entry of job s: its header, its columns, their biases."""
        return np.uint32(jobs + (np.uint32(s) % entries) * job_bytes)

    @cuda.jit(device=True, forceinline=True)
    def columns_smem(jobs: Any, s: Any) -> Any:
        """Address of (192,) int32: the vocabulary entries of the job's columns, -1 past the list's end."""
        return np.uint32(entry_of(jobs, s) + np.uint32(4 * HEADER_WORDS))

    @cuda.jit(device=True, forceinline=True)
    def bias_smem(jobs: Any, s: Any) -> Any:
        """Address of (192,) float32: the biases of the job's columns."""
        return np.uint32(entry_of(jobs, s) + np.uint32(4 * (HEADER_WORDS + LIST_TILE)))

    @cuda.jit(device=True, forceinline=True)
    def full(jobs: Any, s: Any) -> Any:
        """The barrier that completes when job s has been described."""
        return np.uint32(jobs + barriers + (np.uint32(s) % entries) * np.uint32(8))

    @cuda.jit(device=True, forceinline=True)
    def empty(jobs: Any, s: Any) -> Any:
        """The barrier that completes when all readers are done with job s."""
        return np.uint32(jobs + barriers + (entries + np.uint32(s) % entries) * np.uint32(8))

    @cuda.jit(device=True, forceinline=True)
    def wanted(jobs: Any) -> Any:
        """The barrier at which the copying thread asks for the next job."""
        return np.uint32(jobs + barriers + entries * np.uint32(16))

    @cuda.jit(device=True, forceinline=True)
    def mail_full(jobs: Any) -> Any:
        """The barrier at which CTA 1 learns that the number of its next job has come."""
        return np.uint32(jobs + barriers + entries * np.uint32(16) + np.uint32(8))

    @cuda.jit(device=True, forceinline=True)
    def mail_read(jobs: Any) -> Any:
        """The barrier at which CTA 0 learns that CTA 1 has read the number."""
        return np.uint32(jobs + barriers + entries * np.uint32(16) + np.uint32(16))

    @cuda.jit(device=True, forceinline=True)
    def mail(jobs: Any, s: Any) -> Any:
        """Address of the number that CTA 0 sends for job s. There are two, so that none is overwritten before it was used."""
        places = jobs + barriers + entries * np.uint32(16) + np.uint32(24)
        return np.uint32(places + np.uint32(4) * (np.uint32(s) & np.uint32(1)))

    # ---- barriers

    @cuda.jit(device=True, forceinline=True)
    def parity_of(s: Any) -> Any:
        """The parity of the phase that job s has of its entry's barriers."""
        return (np.uint32(s) // entries) & np.uint32(1)

    @cuda.jit(device=True, forceinline=True)
    def init(jobs: Any) -> None:
        """By one thread; a barrier of the cluster must follow."""
        for s in range(entries):
            mbarrier.init(full(jobs, s), np.uint32(32))
            mbarrier.init(empty(jobs, s), readers)
        mbarrier.init(wanted(jobs), np.uint32(1))
        mbarrier.init(mail_full(jobs), np.uint32(1))
        mbarrier.init(mail_read(jobs), np.uint32(1))
        mbarrier.fence_init()

    @cuda.jit(device=True, forceinline=True)
    def wait_full(jobs: Any, s: Any) -> None:
        """Waits until job s has been described."""
        mbarrier.wait(full(jobs, s), parity_of(s))

    @cuda.jit(device=True, forceinline=True)
    def wait_empty(jobs: Any, s: Any) -> None:
        """Waits until the entry of job s is free."""
        mbarrier.wait(empty(jobs, s), parity_of(s) ^ np.uint32(1))

    @cuda.jit(device=True, forceinline=True)
    def publish(jobs: Any, s: Any) -> None:
        """By all lanes of the scheduling warp, since each wrote some of the columns: job s has been described."""
        mbarrier.arrive(full(jobs, s))

    # ---- the queue

    @cuda.jit(device=True, forceinline=True)
    def take(jobs: Any, s: Any, next_job: Any, rank: Any, lane: Any) -> Any:
        """By the scheduling warp: waits until the copying thread asks for job s, then returns the job's number on the GPU.

        In a cluster of two, CTA 0 takes two numbers off the queue. It keeps the first, and sends it to CTA 1, whose job is the
        second.
        next_job: address of the queue's counter. rank: of this CTA in its cluster.
        """
        job = np.int32(0)
        if s > 0:
            mbarrier.wait(wanted(jobs), (s - np.uint32(1)) & np.uint32(1))
        if rank == 0:
            if lane == 0:
                job = np.int32(memory.fetch_add_u32(next_job, ctas))
                if ctas > 1:
                    if s > 0:
                        mbarrier.wait(mail_read(jobs), (s - np.uint32(1)) & np.uint32(1))
                    other = np.uint32(1)
                    there = cluster.map_shared(mail(jobs, s), other)
                    cluster.store_async(there, np.uint32(job), cluster.map_shared(mail_full(jobs), other))
        else:
            if lane == 0:
                mbarrier.arrive_expect_tx(mail_full(jobs), np.uint32(4))
                mbarrier.wait(mail_full(jobs), s & np.uint32(1))
                job = np.int32(load(mail(jobs, s)) + 1)
                mbarrier.arrive_cluster(cluster.map_shared(mail_read(jobs), np.uint32(0)))
        return np.int32(control.shuffle_i32(job, np.uint32(0)))

    # ---- descriptions

    @cuda.jit(device=True, forceinline=True)
    def field(jobs: Any, s: Any, word: Any) -> Any:
        """A word of the header of job s, an int32: `field(jobs, s, WORD.kind)`."""
        return np.int32(load(entry_of(jobs, s) + np.uint32(4 * word)))

    @cuda.jit(device=True, forceinline=True)
    def set_field(jobs: Any, s: Any, word: Any, value: Any) -> None:
        """Writes a word of the header of job s, an int32."""
        store(entry_of(jobs, s) + np.uint32(4 * word), np.int32(value))

    @cuda.jit(device=True, forceinline=True)
    def describe(jobs: Any, s: Any, job: Any, use: Any, round_: Any, rounds: Any) -> None:
        """By one lane of the scheduling warp: writes the header of job s.

        job: a `Job`. use: number of the use of the ring with which it begins. round_: its `Round`, out of `rounds`.
        """
        set_field(jobs, s, WORD.kind, job.kind)
        set_field(jobs, s, WORD.first_use, np.int32(use))
        set_field(jobs, s, WORD.k_steps, job.k_steps)
        set_field(jobs, s, WORD.block_or_tile, job.block_or_tile)
        set_field(jobs, s, WORD.d0, job.d0)
        set_field(jobs, s, WORD.stored, job.stored)
        set_field(jobs, s, WORD.slot, job.slot)
        set_field(jobs, s, WORD.first_column, job.first_column)
        set_field(jobs, s, WORD.phase, round_.phase)
        set_field(jobs, s, WORD.round, round_.number)
        set_field(jobs, s, WORD.is_first, np.int32(round_.number == 0))
        set_field(jobs, s, WORD.is_last, np.int32(round_.number == rounds - 1))
        set_field(jobs, s, WORD.shares_a, np.int32(job.shares_a))
        set_field(jobs, s, WORD.kept, job.kept)

    return SimpleNamespace(**{k: v for k, v in locals().items() if hasattr(v, "py_func")})


assert len(Header.declared) <= HEADER_WORDS, "a job's entry has no room for its header"
