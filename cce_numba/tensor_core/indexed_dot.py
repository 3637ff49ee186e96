"""The target's logit of each token, a dot product by one warp (paper section 4.1); the target's column survives in any case."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.arguments import Problem
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx import arithmetic, control, memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.fold import make_load

_WARPS = 4  # of a CTA, each with a token


@kernel_factory
def make_indexed_dot_kernel(dtype: np.dtype, bias_dtype: np.dtype | None, aligned: bool, scaled: bool = False) -> Kernel:
    """The kernel for 16-bit `dtype`. If rows start at multiples of 8 bytes and are contiguous, it reads 4 numbers at a time.

    scaled: with a logit scale for each token.
    """
    widen = arithmetic.widen_f16 if dtype == np.float16 else arithmetic.widen_bf16
    load_bias, bias_bytes = make_load(bias_dtype or dtype), (bias_dtype or dtype).itemsize
    has_bias, warps, shuffle_xor = bias_dtype is not None, _WARPS, control.shuffle_xor_f32

    @cuda.jit(device=True, forceinline=True)
    def dot_of_four(x: Any, y: Any, total: Any) -> Any:
        for i in range(4):
            shift = np.uint64(16 * i)
            total += widen(x >> shift & np.uint64(0xFFFF)) * widen(y >> shift & np.uint64(0xFFFF))
        return total

    def indexed_dot_kernel(
        e: Any,  # address
        e_pitch_bytes: Any,
        c: Any,  # address
        c_pitch_bytes: Any,
        c_step_bytes: Any,  # from one number of a row to the next
        bias: Any,  # address of (V,)
        softcap: Any,  # 0 for none
        targets: Any,  # (N,)
        tokens: Any,  # (N,), the first n_valid[0] count
        n_valid: Any,  # (1,)
        V: Any,
        D: Any,
        target_logit: Any,  # (N,)
        survivors: Any,  # address of (blocks, pitch_words) words
        pitch_words: Any,  # 0 if survivors are not recorded
        coarse_words: Any,  # from a word to that of the coarser bits, 0 for none
        logit_scale: Any,  # (address of (N,),), or () if not scaled
    ) -> None:
        """target_logit[n] of each listed token n, NaN for a target out of range; sets the bit of its target in its block."""
        lane, position = cuda.threadIdx.x & 31, cuda.blockIdx.x * warps + (cuda.threadIdx.x >> 5)
        if position >= n_valid[0]:
            return
        n = np.int64(tokens[position])
        target = targets[n]
        if target < 0 or target >= V:
            if lane == 0:
                target_logit[n] = np.float32(math.nan)
            return
        e_row, c_row = e + np.uint64(n * e_pitch_bytes), c + np.uint64(target * c_pitch_bytes)
        total = np.float32(0)
        in_fours = D // 4 if aligned else 0
        for i in range(lane, in_fours, 32):
            x = memory.load_global_u64(e_row + np.uint64(8 * i))
            total = dot_of_four(x, memory.load_global_u64(c_row + np.uint64(8 * i)), total)
        for d in range(4 * in_fours + lane, D, 32):
            x = widen(memory.load_global_u16(e_row + np.uint64(2 * d)))
            total += x * widen(memory.load_global_u16(c_row + np.uint64(c_step_bytes * d)))
        for mask in (16, 8, 4, 2, 1):
            total += shuffle_xor(total, mask)
        if lane == 0:
            if has_bias:
                total += load_bias(bias + np.uint64(bias_bytes * target))
            if scaled:
                total *= memory.load_global_f32(logit_scale[0] + np.uint64(4 * n))
            if softcap > 0:
                total = softcap * math.tanh(total / softcap)
            target_logit[n] = total
            if pitch_words > 0:
                word = position // SURVIVOR_BLOCK * pitch_words + target // 32
                bit = np.uint32(1) << np.uint32(target & 31)
                memory.or_global_u32(survivors + np.uint64(4 * word), bit)
                if coarse_words != 0:
                    memory.or_global_u32(survivors + np.uint64(4 * (word + coarse_words)), bit)

    p_i64, p_i32, p_f32 = pointer_to(np.int64), pointer_to(np.int32), pointer_to(np.float32)
    u64, i64, i32, f32 = types.uint64, types.int64, types.int32, types.float32
    signature = types.void(
        *(u64, i64, u64, i64, i64, u64, f32, p_i64, p_i32, p_i64, i32, i32, p_f32, u64, i64, i64),
        types.UniTuple(u64, int(scaled)),
    )
    return Kernel(indexed_dot_kernel, signature, threads=32 * _WARPS)


def launch_indexed_dot(
    p: Problem, e: Any, tokens: int, n_valid: int, target_logit: int, survivors: int, pitch_words: int, coarse_words: int
) -> None:
    """Fills target_logit (an address, as the others) for listed tokens; `e` is p.e or a copy of it in rows that are aligned."""
    bias_dtype, bias = (None, 0) if p.bias is None else (np.dtype(p.bias.dtype), p.bias.data.ptr)
    aligned = matrices.why_not(p.c) is None
    scale = () if p.logit_scale is None else (p.logit_scale.data.ptr,)
    make_indexed_dot_kernel(p.dtype, bias_dtype, aligned, bool(scale)).launch(
        -(-p.N // _WARPS),
        e.data.ptr,
        matrices.pitch_bytes(e),
        p.c.data.ptr,
        *p.c.strides,
        bias,
        p.options.softcap or 0.0,
        p.targets.data.ptr,
        tokens,
        n_valid,
        p.V,
        p.D,
        target_logit,
        survivors,
        pitch_words,
        coarse_words,
        *scale,
    )
