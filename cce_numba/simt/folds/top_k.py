"""The k largest logits and their entries: by descending logit, and by ascending entry where logits are equal.

Each split keeps a list of its own for each token, in global memory, since k is not known to the compiler. The thread that owns
a row inserts into it. Most tiles hold nothing for any list once the first tiles have passed, and are passed by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.simt.folds.fold import Functions, Given
from cce_numba.simt.product import make_product
from cce_numba.simt.tiles import SimtTiles


class State(NamedTuple):
    """Of the rows of a block, in shared memory, and where their lists are."""

    least: Any  # (block_n,) real: what a logit must reach to come into the list; inf for a row beyond the last token
    wanted: Any  # (1,) uint8: whether a tile has something for a list; 0 between steps
    split: Any  # int
    n0: Any  # position of the first row's token in the list of tokens


class Arrays(NamedTuple):
    """In global memory. Lists of splits are at the positions of their tokens in the list of tokens."""

    logits: Any  # (splits, N, k) real: the best of those that a split has seen so far, in order
    ids: Any  # (splits, N, k) int64: their entries
    count: Any  # (splits, N) int64: how many there are; all k once k entries have been seen
    top_logits: Any  # (N, k) real: a result
    top_ids: Any  # (N, k) int64: a result


@dataclass(frozen=True)
class TopK:
    """The fold. What splits have found is in arrays of its own, so a row has nothing to merge."""

    name: ClassVar[str] = folds.TOP_K
    Row: ClassVar[Any] = None

    def row_dtypes(self, real: np.dtype) -> tuple[np.dtype, ...]:
        """See `fold.Fold`."""
        return ()

    def arrays(self, given: Given) -> Arrays:
        """See `fold.Fold`."""
        p, xp = given.problem, given.problem.xp
        of_token, of_split = (p.N, p.options.top_k), (given.splits, p.N)
        lists = (*of_split, p.options.top_k)
        return Arrays(
            logits=xp.empty(lists, p.compute_dtype),
            ids=xp.empty(lists, np.int64),
            count=xp.zeros(of_split, np.int64),
            top_logits=xp.zeros(of_token, p.compute_dtype),
            top_ids=xp.zeros(of_token, np.int64),
        )

    def results(self, arrays: Arrays) -> dict[str, Any]:
        """See `fold.Fold`."""
        return {"top_logits": arrays.top_logits, "top_ids": arrays.top_ids}

    def functions(self, tiles: SimtTiles, real: np.dtype) -> Functions:
        """See `fold.Fold`."""
        return _functions(tiles, real.type)


def _functions(tiles: SimtTiles, real: Any) -> Functions:
    block_n, threads, threads_v, vector = tiles.block_n, tiles.threads, tiles.threads_v, tiles.vector
    thread_n, thread_v, column_of = tiles.thread_n, tiles.thread_v, make_product(tiles, real).column_of
    infinity, minus_infinity = real(math.inf), real(-math.inf)

    @cuda.jit(device=True)
    def insert(z: Any, v: Any, logits: Any, ids: Any, have: Any) -> Any:
        """Puts the logit z of the entry v where it belongs in a list (k,) that has so many; returns how many it has then."""
        k = logits.shape[0]
        if have == k and not (z > logits[k - 1] or (z == logits[k - 1] and v < ids[k - 1])):
            return have
        place = min(have, k - 1)
        while place > 0 and (z > logits[place - 1] or (z == logits[place - 1] and v < ids[place - 1])):
            logits[place], ids[place] = logits[place - 1], ids[place - 1]
            place -= 1
        logits[place], ids[place] = z, v
        return min(have + 1, k)

    @cuda.jit(device=True)
    def begin(arrays: Any, first_arrays: Any, block: Any) -> Any:
        """The state before the first tile: lists are empty, and all logits come into them."""
        least = cuda.shared.array(block_n, real)
        wanted = cuda.shared.array(1, np.uint8)
        t = cuda.threadIdx.y * threads_v + cuda.threadIdx.x
        for r in range(t, block_n, threads):
            least[r] = minus_infinity if block.n0 + r < block.tokens.n_valid[0] else infinity
        if t == 0:
            wanted[0] = 0
        return State(least, wanted, block.split, block.n0)

    @cuda.jit(device=True)
    def step(state: Any, first_state: Any, arrays: Any, tile: Any) -> None:
        """Inserts what a tile of (block_n, block_v) logits has for the lists."""
        x, y = cuda.threadIdx.x, cuda.threadIdx.y
        t = y * threads_v + x
        for i in range(thread_n):
            for j in range(thread_v):
                if tile.v0 + column_of(j) < tile.V and not (tile.logits[i, j] < state.least[y * thread_n + i]):
                    state.wanted[0] = 1
        cuda.syncthreads()
        is_wanted = state.wanted[0] != 0
        cuda.syncthreads()
        if t == 0:
            state.wanted[0] = 0
        if is_wanted:
            # A column of each thread at a time goes to shared memory, where the threads that own rows read it.
            for j in range(thread_v):
                for i in range(thread_n):
                    tile.partial[x, y * thread_n + i] = tile.logits[i, j]
                cuda.syncthreads()
                for r in range(t, block_n, threads):
                    least = state.least[r]
                    if least < infinity:
                        position = state.n0 + r
                        logits, ids = arrays.logits[state.split, position], arrays.ids[state.split, position]
                        have = arrays.count[state.split, position]
                        for other in range(threads_v):
                            v = tile.v0 + (j // vector * threads_v + other) * vector + j % vector
                            if v < tile.V and not (tile.partial[other, r] < least):
                                have = insert(tile.partial[other, r], v, logits, ids, have)
                        arrays.count[state.split, position] = have
                        if have == logits.shape[0]:
                            state.least[r] = logits[have - 1]
                cuda.syncthreads()
        cuda.syncthreads()

    @cuda.jit(device=True)
    def row(state: Any, r: Any) -> Any:
        """Nothing: there is nothing to merge."""
        return ()

    @cuda.jit(device=True)
    def merge(row: Any, later: Any) -> Any:
        """Nothing: there is nothing to merge."""
        return ()

    @cuda.jit(device=True)
    def store(row: Any, first_row: Any, arrays: Any, place: Any) -> None:
        """Puts the lists of all splits so far together."""
        if place.exists:
            logits, ids, have = arrays.top_logits[place.token], arrays.top_ids[place.token], 0
            for split in range(place.splits):
                for i in range(arrays.count[split, place.position]):
                    z, v = arrays.logits[split, place.position, i], arrays.ids[split, place.position, i]
                    have = insert(z, v, logits, ids, have)

    return Functions(begin, step, row, merge, store)
