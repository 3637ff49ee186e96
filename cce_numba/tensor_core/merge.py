"""Puts together what several workers found for the same tokens, and keeps every column of a block where a token is lost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.hopper.tiles import HopperTiles
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx import control
from cce_numba.tensor_core import schedule
from cce_numba.tensor_core.fold import log_add_exp

_WARPS = 4  # of a CTA, each with a token


@kernel_factory
def make_merge_kernel(tiles: HopperTiles, smoothed: bool = False) -> Kernel:
    """A warp for each token. smoothed: logits were added up as well."""
    warps, group_n, block_n = _WARPS, tiles.group_n, tiles.block_n
    slots_of, quotient, shuffle_xor = schedule.slots_of, schedule.quotient, control.shuffle_xor_f32
    minus_infinity = np.float32(-math.inf)

    def merge_kernel(
        part: Any,  # (slots, group_n) log-sum-exps
        workers: Any,
        per_round: Any,
        n_tiles: Any,
        tokens: Any,  # (N,)
        n_valid: Any,  # (1,)
        first_token: Any,
        most_tokens: Any,
        target_logit: Any,  # (N,)
        lse: Any,  # (N,)
        survivors: Any,  # (blocks, pitch_words)
        pitch_words: Any,  # 0 if this is not to be looked after
        coarse_words: Any,  # from a word to that of the coarser bits, 0 for none
        V: Any,
        totals: Any,  # (in the order of part, (N,) to add them to) if smoothed, or ()
    ) -> None:
        """lse[n] = log of the sum of exp(part) over the slots of the token's group. tokens, survivors begin at first_token."""
        lane, position = cuda.threadIdx.x & 31, np.int32(cuda.blockIdx.x * warps + (cuda.threadIdx.x >> 5))
        n_listed = np.int32(min(max(n_valid[0] - first_token, 0), most_tokens))
        if position >= n_listed:
            return
        token, group, row = tokens[position], quotient(position, group_n), position % group_n
        first, step, count, extra = slots_of(group, workers, quotient(n_listed + group_n - 1, group_n), per_round, n_tiles)
        mine, others = minus_infinity, count + 1 if extra >= 0 else count
        for i in range(lane, others, 32):
            slot = first + i * step if i < count else extra
            mine = log_add_exp(mine, part[slot * group_n + row])
        for mask in (16, 8, 4, 2, 1):
            mine = log_add_exp(mine, shuffle_xor(mine, mask))
        result = mine
        if lane == 0:
            lse[token] = result
        if smoothed:
            total = np.float32(0)
            for i in range(lane, others, 32):
                slot = first + i * step if i < count else extra
                total += totals[0][slot * group_n + row]
            for mask in (16, 8, 4, 2, 1):
                total += shuffle_xor(total, mask)
            if lane == 0:
                totals[1][token] += total
        # A lost token's gradient is NaN in every column, so all must survive.
        if pitch_words > 0 and (result != result or target_logit[token] != target_logit[token]):
            first_word = position // block_n * pitch_words
            for word in range(lane, (V + 31) // 32, 32):
                all_of_word = np.uint32(0xFFFFFFFF) >> np.uint32(max(0, 32 * word + 32 - V))
                survivors[first_word + word] = all_of_word
                survivors[first_word + word + coarse_words] = all_of_word

    p_u32, p_i64, p_i32, p_f32 = pointer_to(np.uint32), pointer_to(np.int64), pointer_to(np.int32), pointer_to(np.float32)
    i32 = types.int32
    signature = types.void(
        *(p_f32, i32, i32, i32, p_i32, p_i64, types.int64, i32, p_f32, p_f32, p_u32, types.int64, types.int64, i32),
        types.UniTuple(p_f32, 2 * smoothed),
    )
    return Kernel(merge_kernel, signature, threads=32 * _WARPS)


def ctas_for(N: int) -> int:
    """Enough for a warp a token."""
    return -(-N // _WARPS)
