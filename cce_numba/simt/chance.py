"""The unbiased filter in the backward: what a column of G is multiplied by. `cce_numba/survivors.py` has the rule."""

from __future__ import annotations

import functools
from typing import Any

from numba import cuda

from cce_numba.simt.draws import draw
from cce_numba.simt.tiles import SimtTiles
from cce_numba.survivors import make_scale


@functools.cache
def make_decide(tiles: SimtTiles, real: Any) -> Any:
    """The device function `decide(largest, scales, n_block, first, columns, chance)`, by all threads of a CTA."""
    block_v, threads, threads_v, threads_n = tiles.block_v, tiles.threads, tiles.threads_v, tiles.threads_n
    scale_of_column = cuda.jit(device=True)(make_scale(real))

    @cuda.jit(device=True)
    def decide(largest: Any, scales: Any, n_block: Any, first: Any, columns: Any, chance: Any) -> None:
        """Writes to scales (block_v,) what the columns from `first` on in the block's list are multiplied by; 0 drops one.

        largest (threads_n, block_v): the largest probability that a row of threads has found of each, inf for a column that is
        kept as it is. Both are in shared memory. Starts and ends with a barrier. columns: `Columns`, chance: `Chance`.
        """
        cuda.syncthreads()
        for r in range(cuda.threadIdx.y * threads_v + cuda.threadIdx.x, block_v, threads):
            most = largest[0, r]
            for other in range(1, threads_n):
                most = max(most, largest[other, r])
            v = columns.listed[n_block, min(first + r, columns.count[n_block] - 1)]
            scales[r] = scale_of_column(most, chance.eps, real(draw(n_block, v, chance.draw_seed[0])))
        cuda.syncthreads()

    return decide
