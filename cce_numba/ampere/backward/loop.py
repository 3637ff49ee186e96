"""A job's products: its stages are filled several units ahead, and multiplied one after the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.ampere.backward.tiles import BackwardTiles
from cce_numba.ampere.elements import Elements
from cce_numba.ampere.product import make_a_address, make_b_address, make_hold_back, make_load_operands, make_multiply
from cce_numba.ampere.tiles import THREADS
from cce_numba.ptx import arithmetic, control, memory

EIGHT_WARPS, ALL_OF_THEM = np.uint32(1), np.uint32(THREADS)  # the barrier of the warps that multiply


@cuda.jit(device=True, forceinline=True)
def meet() -> None:
    """Waits for the eight warps that multiply."""
    control.barrier_sync(EIGHT_WARPS, ALL_OF_THEM)


def make_loop(tiles: BackwardTiles, elements: Elements, source: SimpleNamespace, a_across: bool, b_across: bool) -> Any:
    """`sums = loop(sums, ring, units, filling, workspace, tables, dims, me)`: adds a job's products to a warp's sums.

    By the eight warps, which are then done with the ring. source: one of `fill.make_fill`. a_across, b_across: whether A
    and B lie across K in a stage, see `ampere.product`. me: a `Thread`.
    """
    n, stages = tiles.warp_v, tiles.stages
    begin, fill = source.begin, source.fill
    stage_bytes, a_bytes, ring_bytes = np.uint32(tiles.stage_bytes), np.uint32(tiles.a_bytes), np.uint32(tiles.ring_bytes)
    wide, ahead = elements.wide, not elements.split
    load_0, load_1, load_2, load_3 = (make_load_operands(n, step, a_across, b_across, wide) for step in range(4))
    multiply, hold_back = make_multiply(n, elements.name), make_hold_back(n)
    a_address, b_address = make_a_address(a_across, wide), make_b_address(n, b_across, wide)
    wait_for_first, wait_for_next = memory.copy_async_wait(stages - 1), memory.copy_async_wait(stages - 2)
    wait_for_all = memory.copy_async_wait(0)

    @cuda.jit(device=True, forceinline=True)
    def loop(
        sums: Any, ring: Any, units: Any, filling: Any, workspace: Any, tables: Any, dims: Any, me: Any
    ) -> Any:  # fmt: skip
        thread = me.number
        a_place = a_address(me.lane, me.warp_row)
        b_0 = np.uint32(a_bytes + b_address(me.lane, me.warp_column, np.uint32(0)))
        b_1 = np.uint32(a_bytes + b_address(me.lane, me.warp_column, np.uint32(1)))
        b_2 = np.uint32(a_bytes + b_address(me.lane, me.warp_column, np.uint32(2)))
        state = begin(filling, workspace, tables, dims, thread, units)
        coming, stage = np.int32(0), np.uint32(ring)
        turn = np.int32(0)
        while turn < stages:
            if coming < units:
                state = fill(state, coming, stage, filling, workspace, tables, dims, thread, units)
                coming = np.int32(coming + 1)
            memory.copy_async_commit()
            stage = np.uint32(stage + stage_bytes)
            turn = arithmetic.opaque_i32(np.int32(turn + 1))
        stage = np.uint32(ring)
        wait_for_first()
        meet()
        b = np.uint32(stage + b_0), np.uint32(stage + b_1), np.uint32(stage + b_2)
        if ahead:
            operands = load_0(np.uint32(stage + a_place), b)
        unit = np.int32(0)
        while unit < units:
            a, b = np.uint32(stage + a_place), (np.uint32(stage + b_0), np.uint32(stage + b_1), np.uint32(stage + b_2))
            if ahead:
                operands_1 = load_1(a, b)
                sums = multiply(sums, operands)
                operands_2 = load_2(a, b)
                sums = multiply(sums, operands_1)
                operands_3 = load_3(a, b)
            else:
                sums = multiply(sums, load_0(a, b))
                sums = multiply(sums, load_1(a, b))
                sums = multiply(sums, load_2(a, b))
                operands_3 = load_3(a, b)
            # The next stage has arrived, and nobody reads this one any more, once all are here. Two steps (of split numbers
            # one) are still to be multiplied, so that tensor cores do not wait for the next stage's operands.
            wait_for_next()
            mask = control.barrier_mask(EIGHT_WARPS, ALL_OF_THEM)
            filled = stage
            stage = np.uint32(stage + stage_bytes)
            if stage == np.uint32(ring + ring_bytes):
                stage = np.uint32(ring)
            if ahead:
                b = np.uint32(stage + b_0), np.uint32(stage + b_1), np.uint32(stage + b_2)
                operands = load_0(np.uint32(stage + a_place), b)
            if coming < units:
                state = fill(state, coming, filled, filling, workspace, tables, dims, thread, units)
                coming = np.int32(coming + 1)
            memory.copy_async_commit()
            if ahead:
                sums = multiply(sums, hold_back(operands_2, mask))
            sums = multiply(sums, hold_back(operands_3, mask))
            unit = arithmetic.opaque_i32(np.int32(unit + 1))
        wait_for_all()
        meet()
        return sums

    return loop
