"""dbias: the sum of G over the tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.array_kernel import ArrayKernel
from cce_numba.launch.kernel import kernel_factory
from cce_numba.simt.numbers import conversions
from cce_numba.simt.records import survives
from cce_numba.simt.tiles import SimtTiles


@kernel_factory
def make_d_bias_kernel(tiles: SimtTiles, real: np.dtype, gradient_dtype: np.dtype) -> ArrayKernel:
    """The kernel for G of dtype `real`, a thread for each vocabulary entry."""
    load_gradient, store = conversions(gradient_dtype)
    block_n, zero = tiles.block_n, real.type(0)

    def d_bias_kernel(
        g: Any,  # (entries of a chunk, N) real: see gradient_of_logits_kernel
        columns: Any,  # Columns
        survivors: Any,  # Survivors: of dbias, which may be fewer than G has
        tokens: Any,  # Tokens
        adds: Any,  # bool: to what is in d_bias
        d_bias: Any,  # (V,), of which the chunk's entries are to be written, zero where nothing survives
    ) -> None:
        """Grid: enough CTAs for the chunk."""
        v, n_valid = columns.v0 + cuda.grid(1), tokens.n_valid[0]
        if v < columns.v1:
            total = zero
            for n0 in range(0, n_valid, block_n):
                n_block = n0 // block_n
                if columns.count[n_block] > 0 and survives(survivors, n_block, v):
                    block_total = zero  # sums of sums: rounding grows with the length of each, not with N
                    for position in range(n0, min(n0 + block_n, n_valid)):
                        block_total += g[v - columns.v0, position]
                    total += block_total
            if adds:
                total += load_gradient(d_bias[v])
            d_bias[v] = store(total)

    return ArrayKernel(d_bias_kernel, block=tiles.block_n)
