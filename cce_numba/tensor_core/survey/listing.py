"""The survey's list kernel, whose CTAs do one of two things: they list tokens, or they give columns their keys (`keys`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.launch.kernel import Kernel, kernel_factory
from cce_numba.ptx.pointers import view_as
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.exponentials import LOG2E, exp2, fma, residual_of, shift_of
from cce_numba.tensor_core.records import I32, SurvivorBits, WeightedTokens
from cce_numba.tensor_core.sums import FULL, THREADS
from cce_numba.tensor_core.survey.keys import make_give_keys
from cce_numba.tensor_core.survey.tables import Sizes, Tables


@kernel_factory
def make_list_kernel(smoothed: bool = False) -> Kernel:
    """CTAs of the first kind take 8 blocks of tokens each, CTAs of the second 4096 columns. Neither kind needs the other.

    smoothed: there are weights beside those of the softmax and of the target, so a token may have weight though both are 0.
    """
    list_tokens, give_keys = _make_list_tokens(smoothed), make_give_keys()

    def list_kernel(
        token_ctas: Any,  # CTAs of the first kind
        tokens: Any,
        survivors: Any,
        sizes: Any,
        tables: Any,
    ) -> None:
        """The first kind fills rows, row_of and whole; the second keys, key_counts and pairs."""
        cta = cuda.blockIdx.x
        if cta < token_ctas:
            list_tokens(cta, tokens, sizes, tables)
        else:
            give_keys(cta - token_ctas, tokens, survivors, sizes, tables)

    return Kernel(list_kernel, (I32, WeightedTokens, SurvivorBits, Sizes, Tables), threads=THREADS)


def _make_list_tokens(smoothed: bool) -> Any:
    """The device function of CTAs of the first kind; smoothed: as in `make_list_kernel`."""
    threads, block_n, log2e, infinity, nan = THREADS, SURVIVOR_BLOCK, LOG2E, np.float32(math.inf), np.float32(math.nan)
    as_int32, as_bytes = view_as(types.int32), view_as(types.uint8)

    @cuda.jit(device=True, forceinline=True)
    def list_tokens(cta: Any, tokens: Any, sizes: Any, tables: Any) -> None:
        """By a CTA: fills rows, row_of and whole for the cta-th 1024 listed tokens, of which a thread has one."""
        listed, rows, weight_scale = tokens.listed, tables.rows, tables.weight_scale
        all_of_warp = cuda.shared.array(32, np.int32)
        t = cuda.threadIdx.x
        position = cta * threads + t
        row, target, is_next = np.int32(-1), np.int32(-1), False
        of_softmax, of_target, shift = np.float32(0), np.float32(0), infinity
        if position < tokens.n_valid[0]:
            n = listed[position]
            x, y = tokens.softmax_weight[n], tokens.target_weight[n]
            if x != 0 or y != 0 or (smoothed and tokens.largest_weight[n] != 0):
                row, given = np.int32(n), tokens.targets[n]
                if given == np.int32(given):
                    target = np.int32(given)
                of_target, shift = y * weight_scale[0], shift_of(tokens.max_logit[n])
                # Divided by the sum of 2^(log2(e) * z - shift).
                log_sum = fma(tokens.log_sum[n], log2e, residual_of(tokens.max_logit[n]))
                of_softmax = x * weight_scale[0] * exp2(-log_sum)
                if tokens.target_logit[n] != tokens.target_logit[n]:
                    of_softmax = nan  # the target is out of range: this token's gradient is lost
                is_next = position % block_n == 0 or listed[position - 1] + 1 == n
        if position < sizes.blocks * block_n:
            rows[4 * position] = of_softmax
            rows[4 * position + 1] = of_target
            rows[4 * position + 2] = shift
            as_int32(rows)[4 * position + 3] = target
            tables.row_of[position] = row
        all_next = cuda.all_sync(FULL, is_next)
        if t & 31 == 0:
            all_of_warp[t >> 5] = 1 if all_next else 0
        cuda.syncthreads()
        if t == 0:
            bits = 0
            for block in range(threads // block_n):
                warps = 0
                for i in range(block_n // 32):
                    warps += all_of_warp[block * (block_n // 32) + i]
                if warps == block_n // 32:
                    bits |= 1 << block
            as_bytes(tables.whole)[cta] = bits

    return list_tokens
