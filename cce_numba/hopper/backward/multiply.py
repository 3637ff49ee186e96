"""A consumer's products: a job's loop over the stages of the ring, and the turns that the two consumers take."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.hopper.backward.tiles import BackwardTiles
from cce_numba.hopper.operands import NEXT_PANEL, descriptor, form_of, step_of
from cce_numba.hopper.ring import make_ring
from cce_numba.ptx import control, mbarrier, memory, wgmma

ONE_CONSUMER = np.uint32(128)  # threads


@functools.cache
def make_multiply(tiles: BackwardTiles, dtype: str, *, a_m_major: bool, b_n_major: bool) -> Any:
    """The device function `upper, lower = multiply(upper, lower, ring, first_use, k_steps, thread)` of a consumer.

    It adds the products of a job's stages to upper and lower, fragments of the first and last 64 rows of a tile. It returns
    while the products of the last stage are under way, and has let go of all stages but the last. ring: address of the ring of
    stages. first_use: number of the use of the ring with which the job begins. k_steps: stages of the job. thread: 0 to 127.

    Args:
        tiles: the tile sizes.
        dtype: "bf16" or "f16".
        a_m_major: rows of A in shared memory run along M, not along the terms of the sum.
        b_n_major: rows of B in shared memory run along N, not along the terms of the sum.
    """
    ring_ = make_ring(tiles)
    stage_of, parity_of, full, release, a_smem = ring_.stage_of, ring_.parity_of, ring_.full, ring_.release, ring_.e_smem
    mma = wgmma.mma(tiles.block_v, dtype, a_m_major=a_m_major, b_n_major=b_n_major)
    fence_proxy_async = memory.fence_proxy_async
    fence, commit_group, wait_all_but_one = wgmma.fence, wgmma.commit_group, wgmma.wait_group(1)
    a_form, b_form, a_step, b_step = form_of(a_m_major), form_of(b_n_major), step_of(a_m_major), step_of(b_n_major)
    to_b, to_lower, stages = np.uint32(tiles.e_bytes), NEXT_PANEL, np.uint32(tiles.stages)

    @cuda.jit(device=True, forceinline=True)
    def multiply(upper: Any, lower: Any, ring: Any, first_use: Any, k_steps: Any, thread: Any) -> Any:
        """See `make_multiply`. Shapes: upper and lower (64, block_v), a stage 64 terms of A (128, 64) and B (block_v, 64)."""
        one = np.uint32(1)
        stage, parity = stage_of(first_use), parity_of(first_use)
        for k in range(k_steps):
            mbarrier.wait(full(ring, stage), parity)
            fence_proxy_async()  # makes rows that were copied one by one visible to the tensor cores
            smem = np.uint32(a_smem(ring, stage))
            a, b = descriptor(a_form, smem), descriptor(b_form, smem + to_b)
            fence()
            upper = mma(upper, a, b, one)
            lower = mma(lower, a + to_lower, b, one)
            upper = mma(upper, a + a_step, b + b_step, one)
            lower = mma(lower, a + to_lower + a_step, b + b_step, one)
            upper = mma(upper, a + a_step + a_step, b + b_step + b_step, one)
            lower = mma(lower, a + to_lower + a_step + a_step, b + b_step + b_step, one)
            upper = mma(upper, a + a_step + a_step + a_step, b + b_step + b_step + b_step, one)
            lower = mma(lower, a + to_lower + a_step + a_step + a_step, b + b_step + b_step + b_step, one)
            commit_group()
            wait_all_but_one()
            if k > 0:
                release(ring, first_use + np.uint32(k - 1), thread)
            stage = np.uint32(stage + one)
            if stage == stages:
                stage = np.uint32(0)
                parity = np.uint32(parity ^ one)
        return upper, lower

    return multiply


@functools.cache
def make_turns(tiles: BackwardTiles) -> SimpleNamespace:
    """Device functions by which the two consumers take turns at the tensor cores; consumer is 0 or 1, ring an address."""
    ring_ = make_ring(tiles)
    turn, release, wait_all = ring_.turn, ring_.release, wgmma.wait_group(0)

    @cuda.jit(device=True, forceinline=True)
    def await_turn(ring: Any, consumer: Any, s: Any, turns: Any) -> Any:
        """Waits until all products of the CTA's job s - 1 are under way; returns how many turns the consumer has awaited."""
        if s > 0:
            mbarrier.wait(turn(ring, consumer), turns & np.uint32(1))
            turns = np.uint32(turns + np.uint32(1))
        # All four warps must see the barrier's phase before one of them hands the turn over, which may be at once: a job may
        # have nothing to multiply.
        control.barrier_sync(np.uint32(1 + consumer), ONE_CONSUMER)
        return turns

    @cuda.jit(device=True, forceinline=True)
    def await_products(ring: Any, first_use: Any, k_steps: Any, thread: Any) -> None:
        """Waits for this consumer's products, and lets go of the last stage; see `hand_over`."""
        wait_all()
        if k_steps > 0:
            release(ring, first_use + np.uint32(k_steps - 1), thread)

    @cuda.jit(device=True, forceinline=True)
    def hand_over(ring: Any, consumer: Any, first_use: Any, k_steps: Any, thread: Any) -> None:
        """Gives the other consumer its turn, then waits for this one's products, and lets go of the last stage.

        first_use, k_steps: the job's stages. thread: 0 to 127.
        """
        if thread == 0:
            mbarrier.arrive(turn(ring, np.int32(1 - consumer)))
        await_products(ring, first_use, k_steps, thread)

    return SimpleNamespace(await_turn=await_turn, await_products=await_products, hand_over=hand_over)
