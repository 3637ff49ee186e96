"""Tiles of dE that are not complete: kept in the workspace, in float32, from round to round.

Only the consumer that goes on with a tile reads it, so its sums stay in the threads' order: each thread has 16 bytes, four of
its numbers, for every eight columns of its fragment. All functions take the address of the thread's first 16 bytes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cce_numba.ptx import arithmetic, memory
from cce_numba.tensor_core.fragment import change_chunks, visit_chunks
from cce_numba.tensor_core.records import U64

SUMS_STEP = 16 * 128  # bytes from one of a thread's 16 bytes to its next: 16 bytes of each thread of a consumer


@functools.cache
def make_store_sums(n: int) -> Any:
    """`store_sums(sums, address)`: stores a fragment of n columns."""

    def store(z: Any, first: Any, address: Any) -> Any:
        memory.store_4_f32(np.uint64(address + np.uint64(SUMS_STEP // 8 * first)), z[0], z[1], z[2], z[3])
        return np.int32(0)

    return visit_chunks(n, 8, store, U64)


@functools.cache
def make_add_to_sums(n: int) -> Any:
    """`add_to_sums(sums, address)`: adds a fragment of n columns to what is there.

    One thread at a time adds to a number, a round after the other, so the order of the sum is always the same.
    """

    def add(z: Any, first: Any, address: Any) -> Any:
        memory.add_4_f32(np.uint64(address + np.uint64(SUMS_STEP // 8 * first)), z[0], z[1], z[2], z[3])
        return np.int32(0)

    return visit_chunks(n, 8, add, U64)


@functools.cache
def make_add_sums(n: int) -> Any:
    """`sums = add_sums(sums, address)`: a fragment of n columns, plus what the other two functions left in memory."""
    float_of_bits = arithmetic.float_of_bits

    def add(z: Any, first: Any, address: Any) -> Any:
        old = memory.load_if_4_u32(np.uint64(address + np.uint64(SUMS_STEP // 8 * first)), np.uint32(1))
        return (
            z[0] + float_of_bits(old[0]), z[1] + float_of_bits(old[1]),
            z[2] + float_of_bits(old[2]), z[3] + float_of_bits(old[3]),
        )  # fmt: skip

    return change_chunks(n, 8, add, U64)
