"""The target's logit of each token, a dot product by one warp (paper section 4.1); targets' columns survive in any case."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.integers import ceil_div
from cce_numba.launch.inlined import finish
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.parallel.shard import ELSEWHERE
from cce_numba.ptx import arithmetic, memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.exponentials import NEGATIVE_INFINITY
from cce_numba.tensor_core.numbers import make_load, widen
from cce_numba.tensor_core.records import I32, I64, LogitTerms, Matrix, Survivors, Tokens
from cce_numba.tensor_core.sums import warp_sum
from cce_numba.tensor_core.tokens import token_at

_WARPS = 4  # of a CTA, each with a token


@functools.cache
def make_dot(dtype: np.dtype, bias_dtype: np.dtype | None, aligned: bool, scaled: bool) -> tuple[Any, Any]:
    """`(product_of, logit_of)`, device functions; arguments are those of `make_indexed_dot_kernel`."""
    wide = widen(dtype)
    load_bias, bias_bytes = make_load(bias_dtype or dtype), (bias_dtype or dtype).itemsize
    has_bias = bias_dtype is not None
    in_float32 = dtype == np.float32

    @cuda.jit(device=True, forceinline=True)
    def dot_of_four(x: Any, y: Any, total: Any) -> Any:
        """total plus the dot product of four 16-bit numbers in x, a uint64, and four in y."""
        for i in range(4):
            shift = np.uint64(16 * i)
            total += wide(x >> shift & np.uint64(0xFFFF)) * wide(y >> shift & np.uint64(0xFFFF))
        return total

    @cuda.jit(device=True, forceinline=True)
    def product_of(e: Any, c: Any, c_step_bytes: Any, n: Any, target: Any, D: Any, lane: Any) -> Any:
        """By a warp: the dot product of a token's row of e and an entry's row of c."""
        e_row, c_row = e.address + np.uint64(n * e.pitch_bytes), c.address + np.uint64(target * c.pitch_bytes)
        total = np.float32(0)
        in_fours = D // 4 if aligned else 0
        for i in range(lane, in_fours, 32):
            x = memory.load_global_u64(e_row + np.uint64(8 * i))
            total = dot_of_four(x, memory.load_global_u64(c_row + np.uint64(8 * i)), total)
        for d in range(4 * in_fours + lane, D, 32):
            if in_float32:
                x = memory.load_global_f32(e_row + np.uint64(4 * d))
                total += x * memory.load_global_f32(c_row + np.uint64(c_step_bytes * d))
            else:
                x = wide(memory.load_global_u16(e_row + np.uint64(2 * d)))
                total += x * wide(memory.load_global_u16(c_row + np.uint64(c_step_bytes * d)))
        return warp_sum(total)

    @cuda.jit(device=True, forceinline=True)
    def logit_of(product: Any, terms: Any, n: Any, target: Any) -> Any:
        """What a product becomes."""
        bias, scale, softcap = np.float32(0), np.float32(1), terms.softcap
        if has_bias:
            bias = load_bias(terms.bias + np.uint64(bias_bytes * target))
        if scaled:
            scale = memory.load_global_f32(terms.scale + np.uint64(4 * n))
        return finish(product, bias, scale, softcap) if softcap > 0 else finish(product, bias, scale, None)

    return product_of, logit_of


@kernel_factory
def make_indexed_dot_kernel(
    dtype: np.dtype,
    bias_dtype: np.dtype | None,
    aligned: bool,
    scaled: bool = False,
    several: bool = False,
    in_shards: bool = False,
) -> Kernel:
    """The kernel for `dtype`. If rows start at multiples of 8 bytes and are contiguous, it reads 4 16-bit numbers at a time.

    scaled: with a logit scale for each token. several: tokens have several targets, targets (N, K), and the kernel takes K and
    the number that is padding, too. in_shards: other ranks have other entries, so a target may be `ELSEWHERE`.
    """
    maximum = arithmetic.maximum_or_nan
    product_of, logit_of = make_dot(dtype, bias_dtype, aligned, scaled)
    warps = _WARPS

    @cuda.jit(device=True, forceinline=True)
    def set_bit(position: Any, target: Any, survivors: Any) -> None:
        """By one thread: the entry survives in the block of the token at this position of the list."""
        if survivors.pitch_words > 0:
            word = position // SURVIVOR_BLOCK * survivors.pitch_words + target // 32
            bit = np.uint32(1) << np.uint32(target & 31)
            memory.or_global_u32(survivors.bits + np.uint64(4 * word), bit)
            if survivors.coarse_words != 0:
                memory.or_global_u32(survivors.bits + np.uint64(4 * (word + survivors.coarse_words)), bit)

    def indexed_dots_kernel(
        e: Matrix,
        c: Matrix,
        c_step_bytes: Any,  # from one number of a row of c to the next
        terms: LogitTerms,
        targets: Any,  # (N, K)
        tokens: Tokens,
        V: Any,
        D: Any,
        target_logit: Any,  # (N,)
        survivors: Survivors,
        K: Any,
        padding: Any,  # a target that is this number is none
    ) -> None:
        """target_logit[n] of each listed token n: the largest logit of a target, NaN if one is out of range.

        Sets the bits of its targets in its block. A target that another rank has bounds nothing.
        """
        lane, position = cuda.threadIdx.x & 31, cuda.blockIdx.x * warps + (cuda.threadIdx.x >> 5)
        if position >= tokens.n_valid[0]:
            return
        n = np.int64(token_at(tokens.listed, position))
        largest = NEGATIVE_INFINITY
        for k in range(K):
            target = targets[n * K + k]
            if target != padding:
                z = np.float32(math.nan)
                if target >= 0 and target < V:
                    product = product_of(e, c, c_step_bytes, n, target, D, lane)
                    if lane == 0:
                        z = logit_of(product, terms, n, target)
                        set_bit(position, target, survivors)
                elif in_shards and target == ELSEWHERE:
                    z = NEGATIVE_INFINITY
                largest = maximum(largest, z)
        if lane == 0:
            target_logit[n] = largest

    def indexed_dot_kernel(
        e: Matrix,
        c: Matrix,
        c_step_bytes: Any,  # from one number of a row of c to the next
        terms: LogitTerms,
        targets: Any,  # (N,)
        tokens: Tokens,
        V: Any,
        D: Any,
        target_logit: Any,  # (N,)
        survivors: Survivors,
    ) -> None:
        """target_logit[n] of each listed token n, NaN for a target out of range; sets the bit of its target in its block.

        -inf for a target that another rank has, which bounds nothing.
        """
        lane, position = cuda.threadIdx.x & 31, cuda.blockIdx.x * warps + (cuda.threadIdx.x >> 5)
        if position >= tokens.n_valid[0]:
            return
        n = np.int64(token_at(tokens.listed, position))
        target = targets[n]
        if target < 0 or target >= V:
            if lane == 0:
                target_logit[n] = np.float32(-math.inf) if in_shards and target == ELSEWHERE else np.float32(math.nan)
            return
        product = product_of(e, c, c_step_bytes, n, target, D, lane)
        if lane == 0:
            target_logit[n] = logit_of(product, terms, n, target)
            set_bit(position, target, survivors)

    numbers = pointer_to(np.float32)
    parameters = Matrix, Matrix, I64, LogitTerms, pointer_to(np.int64), Tokens, I32, I32, numbers, Survivors
    if several:
        return Kernel(indexed_dots_kernel, (*parameters, I32, I64), threads=32 * _WARPS)
    return Kernel(indexed_dot_kernel, parameters, threads=32 * _WARPS)


def launch_indexed_dot(
    p: Problem, e: Matrix, terms: LogitTerms, tokens: Tokens, target_logit: int, survivors: Survivors
) -> None:
    """Fills target_logit, the address of (N,) float32, for listed tokens. e: that of p, or a copy in aligned rows.

    Of several targets it is the largest logit.
    """
    bias_dtype = None if p.bias is None else np.dtype(p.bias.dtype)
    aligned = matrices.why_not(p.c) is None and p.dtype.itemsize == 2
    c_pitch_bytes, c_step_bytes = p.c.strides
    kernel = make_indexed_dot_kernel(
        p.dtype, bias_dtype, aligned, p.logit_scale is not None, p.K is not None, p.shard is not None
    )
    c, targets = Matrix(p.c.data.ptr, c_pitch_bytes), p.targets.data.ptr
    several = () if p.K is None else (p.K, p.options.ignore_index)
    kernel.launch(
        ceil_div(p.N, _WARPS), e, c, c_step_bytes, terms, targets, tokens, p.V, p.D, target_logit, survivors, *several
    )  # fmt: skip
