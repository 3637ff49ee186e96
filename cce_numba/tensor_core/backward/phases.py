"""The order of phases, and how CTAs wait for them:

    G(0)  G(1) P(0)  G(2) P(1)  ...  P(R-1)

G(r) recomputes the logits of round r and writes G to the round's buffer. P(r) multiplies this G: first come the jobs of the
round's rows of dC, then those that add to dE. A job waits for the jobs that it depends on:

    of P(r)                 all of G(r)
    of P(r) that adds to dE those of the round before for the same block
    of G(r)                 those of P that read the buffer before: in a dense problem, where a block's list has the same slots
                            in each round, those of dC and those of dE of the same block; else all of them

Other jobs stand between the two, about as many as a phase has, which gives the first time to finish. So jobs that are done are
counted by phase, and those of dE by block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ptx import memory

RUNS_ALWAYS, RUNS_IF_FILTERED, RUNS_IF_DENSE = np.int32(0), np.int32(1), np.int32(2)  # for which surveys a kernel has jobs


@cuda.jit(device=True, forceinline=True)
def has_jobs_for(runs: Any, is_dense: Any) -> Any:
    """Whether a kernel does anything. runs: RUNS_ALWAYS, RUNS_IF_FILTERED or RUNS_IF_DENSE. is_dense: what the survey found."""
    return runs == RUNS_ALWAYS or (runs == RUNS_IF_DENSE) == is_dense


@cuda.jit(device=True, forceinline=True)
def phase_of_logits(r: Any) -> Any:
    """The number of the phase G(r)."""
    return np.int32(max(0, 2 * r - 1))


@cuda.jit(device=True, forceinline=True)
def phase_of_products(r: Any, rounds: Any) -> Any:
    """The number of the phase P(r)."""
    return np.int32(2 * rounds - 1 if r == rounds - 1 else 2 * r + 2)


@cuda.jit(device=True, forceinline=True)
def is_of_products(phase: Any, rounds: Any) -> Any:
    """Whether the phase is P(r) for some r."""
    return phase == 2 * rounds - 1 or (phase > 0 and phase % 2 == 0)


@cuda.jit(device=True, forceinline=True)
def round_of(phase: Any, rounds: Any, is_products: Any) -> Any:
    """The r of the phase, which is P(r) if is_products, else G(r)."""
    r = np.int32(phase // 2 if phase == 2 * rounds - 1 or phase % 2 == 0 else (phase + 1) // 2)
    if is_products and phase < 2 * rounds - 1:
        r = np.int32(r - 1)
    return r


@cuda.jit(device=True, forceinline=True)
def wait_for_jobs(counter: Any, expected: Any) -> None:
    """By one thread: waits until so many jobs are done and what they wrote is visible. counter: address of a uint32."""
    while np.int32(memory.load_acquire_u32(counter)) < expected:
        cuda.nanosleep(np.uint32(100))


@cuda.jit(device=True, forceinline=True)
def wait_for_blocks(first: Any, end: Any, expected: Any, done_e: Any, lane: Any) -> None:
    """By a warp: waits until so many jobs of dE are done for each block from first to end - 1. done_e: as in `Workspace`."""
    for block in range(first + lane, end, 32):
        wait_for_jobs(done_e + np.uint64(4 * block), expected)
    cuda.syncwarp()


@cuda.jit(device=True, forceinline=True)
def wait_for_phase(phase: Any, apart: Any, phase_end: Any, done: Any) -> None:
    """By one thread: waits until all jobs of the phase are done but the last ones, so many as `apart`, which others count.

    phase_end: pointer to the survey's table. done: address of the counters of jobs that are done.
    """
    expected = np.int32(phase_end[phase] - apart)
    if phase > 0:
        expected -= phase_end[phase - 1]
    wait_for_jobs(done + np.uint64(4 * phase), expected)
