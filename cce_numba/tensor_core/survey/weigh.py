"""The scale of the weights, by which G fits 16 bits, and the blocks that are active."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.launch.kernel import Kernel, kernel_factory
from cce_numba.ptx import control
from cce_numba.ptx.pointers import view_as
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.records import WeightedTokens
from cce_numba.tensor_core.sums import FULL, THREADS
from cce_numba.tensor_core.survey.tables import Sizes, Tables

WEIGHT_EXPONENT = 13  # the largest weight, scaled, is in [2^13, 2^14)
_LARGEST_EXPONENT = 100  # of the scale, either way, so that it and its inverse are normal numbers


@kernel_factory
def make_weigh_kernel() -> Kernel:
    """One CTA, which takes 32 blocks at a time, a warp for each."""
    block_n, or_of_warp, max_of_warp = SURVIVOR_BLOCK, control.or_of_warp, control.max_of_warp
    exponent, largest_exponent = 127 + WEIGHT_EXPONENT, _LARGEST_EXPONENT
    as_bits = view_as(types.uint32)
    # The bits of infinity as a float32. Without the sign, bits of floats are ordered as the numbers are, and NaNs come last.
    infinity = 0x7F800000

    def weigh_kernel(tokens: Any, sizes: Any, tables: Any) -> None:
        """Fills active, n_active and weight_scale.

        weight_scale[0] * the largest finite weight is in [2^13, 2^14), if a power of two from 2^-100 to 2^100 can do it.
        """
        largest_weight, target_weight = as_bits(tokens.largest_weight), as_bits(tokens.target_weight)
        weight_scale = as_bits(tables.weight_scale)
        of_warp = cuda.shared.array(32, np.uint32)
        t = cuda.threadIdx.x
        lane, warp, n_listed = t & 31, t >> 5, tokens.n_valid[0]
        largest, count = np.uint32(0), np.int32(0)
        for word in range(sizes.block_words):
            first, bits = (32 * word + warp) * block_n, np.uint32(0)
            for i in range(block_n // 32):
                position = first + 32 * i + lane
                if position < n_listed:
                    n = tokens.listed[position]
                    x, y = np.uint32(largest_weight[n] & 0x7FFFFFFF), np.uint32(target_weight[n] & 0x7FFFFFFF)
                    bits |= x | y
                    largest = max(largest, x if x < infinity else np.uint32(0), y if y < infinity else np.uint32(0))
            bits = or_of_warp(bits)
            if lane == 0:
                of_warp[warp] = bits
            cuda.syncthreads()
            active_of_word = np.uint32(cuda.ballot_sync(FULL, of_warp[lane] != 0))
            if t == 0:
                tables.active[word] = active_of_word
            count += np.int32(cuda.popc(active_of_word))
            cuda.syncthreads()
        largest = max_of_warp(largest)
        if lane == 0:
            of_warp[warp] = largest
        cuda.syncthreads()
        largest = max_of_warp(of_warp[lane])
        if t == 0:
            power = 0
            if largest > 0:
                power = min(max(exponent - int(largest >> np.uint32(23)), -largest_exponent), largest_exponent)
            weight_scale[0] = (127 + power) << 23
            weight_scale[1] = (127 - power) << 23
            tables.n_active[0] = count

    return Kernel(weigh_kernel, (WeightedTokens, Sizes, Tables), threads=THREADS)
