"""The target's logit of each token: one dot product instead of a row of logits (paper section 4.1)."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.gpu import SIMULATED
from cce_numba.integers import ceil_div
from cce_numba.simt.launch import launch
from cce_numba.simt.numbers import conversions
from cce_numba.simt.product import finish_logit

# Threads that share a token's dot product, and tokens of a CTA.
_LANES, _TOKENS = (2, 2) if SIMULATED else (32, 4)


@functools.cache
def make_indexed_dot_kernel(dtype: np.dtype, bias_dtype: np.dtype, real: Any) -> Any:
    """The kernel for `e` and `c` of `dtype`, computing in `real`."""
    load, _ = conversions(dtype)
    load_bias, _ = conversions(bias_dtype)
    shape, lanes, tokens_per_block = (_TOKENS, _LANES), _LANES, _TOKENS

    @cuda.jit
    def indexed_dot_kernel(
        e: Any,
        c: Any,
        bias: Any,
        has_bias: Any,
        targets: Any,
        tokens: Any,
        n_valid: Any,
        logit_scale: Any,
        has_scale: Any,
        softcap: Any,
        target_logit: Any,
    ) -> None:
        """target_logit[n] (N,) = finish_logit(<e[n], c[targets[n]]>) for listed tokens; NaN for a target out of range."""
        partial = cuda.shared.array(shape, real)
        lane, slot = cuda.threadIdx.x, cuda.threadIdx.y
        position = cuda.blockIdx.x * tokens_per_block + slot
        counts = position < n_valid[0]
        target = -1
        if counts:
            target = targets[tokens[position]]
        in_range = target >= 0 and target < c.shape[0]
        total = real(0)
        if in_range:
            n = tokens[position]
            for d in range(lane, e.shape[1], lanes):
                total += load(e[n, d]) * load(c[target, d])
        partial[slot, lane] = total
        cuda.syncthreads()
        if lane == 0 and counts:
            z = real(math.nan)
            if in_range:
                z = real(0)
                for other in range(lanes):
                    z += partial[slot, other]
                offset = real(0)
                if has_bias:
                    offset = real(load_bias(bias[target]))
                scale = real(1)
                if has_scale:
                    scale = logit_scale[n]
                z = finish_logit(z, offset, scale, softcap)
            target_logit[tokens[position]] = z

    return indexed_dot_kernel


def indexed_dot(p: Problem, tokens: Any, n_valid: Any) -> Any:
    """(N,) of the compute dtype: the target's logit, 0 for tokens that are not listed, NaN for a target out of range."""
    real: Any = p.compute_dtype.type
    bias = p.xp.zeros(1, p.dtype) if p.bias is None else p.bias
    target_logit = p.xp.zeros(p.N, p.compute_dtype)
    logit_scale = target_logit if p.logit_scale is None else p.logit_scale
    launch(
        make_indexed_dot_kernel(p.dtype, np.dtype(bias.dtype), real),
        (ceil_div(p.N, _TOKENS),),
        (_LANES, _TOKENS),
        *(p.e, p.c, bias, p.bias is not None, p.targets, tokens, n_valid, logit_scale, p.logit_scale is not None),
        *(real(p.options.softcap or 0), target_logit),
    )
    return target_logit
