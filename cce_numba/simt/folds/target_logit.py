"""The targets' logits of each token, as they stand in their tiles: rounded as all are, so differences keep digits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import cuda

from cce_numba import folds
from cce_numba.parallel.shard import ELSEWHERE
from cce_numba.simt.folds.fold import Functions, Given
from cce_numba.simt.product import make_product
from cce_numba.simt.tiles import SimtTiles


class State(NamedTuple):
    """Of the rows of a block, in shared memory, (block_n,) int64 each."""

    target: Any  # -1 for a row beyond the last token; of several targets the first
    token: Any


class Arrays(NamedTuple):
    """In global memory."""

    targets: Any  # (N, K) int64
    padding: Any  # int: a target that is this number is none
    target_logit: Any  # (N, K) real: the result


@dataclass(frozen=True)
class TargetLogit:
    """The fold. A row has nothing to merge: one thread meets a target of a token, and stores its logit.

    Attributes:
        several: whether tokens have several targets.
        in_shards: whether other ranks have other entries, so that a target may be `ELSEWHERE`.
    """

    several: bool = False
    in_shards: bool = False
    name: ClassVar[str] = folds.TARGET_LOGIT
    Row: ClassVar[Any] = None

    def row_dtypes(self, real: np.dtype) -> tuple[np.dtype, ...]:
        """See `fold.Fold`."""
        return ()

    def arrays(self, given: Given) -> Arrays:
        """See `fold.Fold`."""
        p = given.problem
        return Arrays(given.targets, p.options.ignore_index, p.xp.zeros(given.targets.shape, p.compute_dtype))

    def results(self, arrays: Arrays) -> dict[str, Any]:
        """See `fold.Fold`."""
        return {"target_logit": arrays.target_logit if self.several else arrays.target_logit[:, 0]}

    def functions(self, tiles: SimtTiles, real: np.dtype) -> Functions:
        """See `fold.Fold`."""
        return _functions(tiles, real.type, self.several, self.in_shards)


def _functions(tiles: SimtTiles, real: Any, several: bool, in_shards: bool) -> Functions:
    block_n, block_v, threads, threads_v = tiles.block_n, tiles.block_v, tiles.threads, tiles.threads_v
    thread_n, thread_v, column_of, nan = tiles.thread_n, tiles.thread_v, make_product(tiles, real).column_of, real(math.nan)
    minus_infinity = real(-math.inf)

    @cuda.jit(device=True)
    def begin(arrays: Any, first_arrays: Any, block: Any) -> Any:
        """The numbers and the targets of the block's tokens."""
        target = cuda.shared.array(block_n, np.int64)
        token = cuda.shared.array(block_n, np.int64)
        for r in range(cuda.threadIdx.y * threads_v + cuda.threadIdx.x, block_n, threads):
            target[r], token[r] = -1, -1
            if block.n0 + r < block.tokens.n_valid[0]:
                token[r] = block.tokens.listed[block.n0 + r]
                target[r] = arrays.targets[token[r], 0]
        return State(target, token)

    @cuda.jit(device=True)
    def store_several(row: Any, i: Any, state: Any, arrays: Any, tile: Any) -> None:
        """Stores the logits of a row's targets that this thread has; rows beyond the last token have none."""
        if state.token[row] == -1:
            return
        for k in range(arrays.targets.shape[1]):
            target = arrays.targets[state.token[row], k]
            if target != arrays.padding and target >= tile.v0 and target < min(tile.v0 + block_v, tile.V):
                for j in range(thread_v):
                    if tile.v0 + column_of(j) == target:
                        arrays.target_logit[state.token[row], k] = tile.logits[i, j]

    @cuda.jit(device=True)
    def step(state: Any, first_state: Any, arrays: Any, tile: Any) -> None:
        """By the thread that holds it: stores the logit of each target that is in this tile."""
        for i in range(thread_n):
            row = cuda.threadIdx.y * thread_n + i
            if several:
                store_several(row, i, state, arrays, tile)
            else:
                for j in range(thread_v):
                    v = tile.v0 + column_of(j)
                    if state.target[row] == v and v < tile.V:
                        arrays.target_logit[state.token[row], 0] = tile.logits[i, j]
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
        """Writes NaN for a target out of range, which is in no tile, and -inf for one that another rank has."""
        if place.exists:
            for k in range(arrays.targets.shape[1]):
                target = arrays.targets[place.token, k]
                if in_shards and target == ELSEWHERE:
                    arrays.target_logit[place.token, k] = minus_infinity
                elif target != arrays.padding and (target < 0 or target >= place.V):
                    arrays.target_logit[place.token, k] = nan

    return Functions(begin, step, row, merge, store)
