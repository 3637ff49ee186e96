"""The teacher's logarithms of probabilities, parked in memory while the student's products take their place in registers.

Two heads give logits for the same tile of 128 tokens x 192 entries, and a consumer has registers for one of them. So the
teacher's products come first. What they come to is parked, and the thread that parked a number is the one that reads it, so
nobody waits for anybody. Each consumer of each CTA has one slot, which it uses again for every tile: all slots together stay in
the L2 cache.

In a slot there are both halves of a tile, of 64 tokens each; in a half, chunks of 8 columns; in a chunk, four float32 of each
thread, in the order in which it has them in registers.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.record import kind_of
from cce_numba.ptx import memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.fragment import visit_chunks
from cce_numba.tensor_core.kept import TILE_V
from cce_numba.tensor_core.records import U64, LogSum

CHUNK = 8  # columns of which a thread parks its four logarithms at a time, in 16 bytes
_CHUNK_BYTES = 16 * 128  # of all threads of a consumer
_HALF_BYTES = _CHUNK_BYTES * (TILE_V // CHUNK)
SLOT_BYTES = 2 * _HALF_BYTES

assert SLOT_BYTES == 4 * SURVIVOR_BLOCK * TILE_V


def bytes_of(ctas: int, consumers: int) -> int:
    """Bytes of the slots of so many CTAs."""
    return ctas * consumers * SLOT_BYTES


@cuda.jit(device=True, forceinline=True)
def place_of(parked: Any, slot: Any, half: Any, thread: Any) -> Any:
    """Address of what a thread, 0 to 127 of its consumer, parks of half a tile: of its first chunk. parked: `Heads.parked`."""
    place = np.uint64(parked + np.uint64(np.uint32(slot)) * np.uint64(SLOT_BYTES))
    return np.uint64(place + np.uint64(np.uint32(_HALF_BYTES * half + 16 * thread)))


@cuda.jit(device=True, forceinline=True)
def log_sum_of(n: Any, sums: Any) -> Any:
    """The `LogSum` of a row of e; sums: `LogSums`."""
    offset = np.uint64(4 * np.int64(n))
    return LogSum(memory.load_global_f32(sums.max_logit + offset), memory.load_global_f32(sums.log_sum + offset))


@cuda.jit(device=True, forceinline=True)
def log_probability(z: Any, sums: Any) -> Any:
    """The natural logarithm of the probability of a logit; sums: `LogSum`. In this order, so that no digits are lost."""
    return (z - sums.max_logit) - sums.log_sum


@cuda.jit(device=True, forceinline=True)
def park(place: Any, first: Any, z: Any, sums_0: Any, sums_1: Any) -> None:
    """Parks a thread's four logits of the chunk that begins at column `first`, two of each of its rows.

    place: as `place_of` gives it. sums_0, sums_1: `LogSum` of the rows.
    """
    memory.store_4_f32(
        np.uint64(place + np.uint64(_CHUNK_BYTES // CHUNK * first)),
        log_probability(z[0], sums_0),
        log_probability(z[1], sums_0),
        log_probability(z[2], sums_1),
        log_probability(z[3], sums_1),
    )


@cuda.jit(device=True, forceinline=True)
def parked_at(place: Any, first: Any) -> Any:
    """The four logarithms that `park` parked."""
    return memory.load_4_f32(np.uint64(place + np.uint64(_CHUNK_BYTES // CHUNK * first)))


@functools.cache
def make_park(n: int) -> Any:
    """The function `park_all(z, place, sums_0, sums_1)` for a fragment of 64 tokens x n logits; see `park`."""

    def park_chunk(z: Any, first: Any, place: Any, sums_0: Any, sums_1: Any) -> Any:
        park(place, first, z, sums_0, sums_1)
        return np.int32(0)

    row = kind_of(LogSum)
    return visit_chunks(n, CHUNK, park_chunk, U64, row, row)
