"""The target's logit of each token: one dot product instead of a row of logits (paper section 4.1); of several, the largest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.gpu import SIMULATED
from cce_numba.integers import ceil_div
from cce_numba.launch.array_kernel import ArrayKernel
from cce_numba.launch.kernel import kernel_factory
from cce_numba.parallel.shard import ELSEWHERE
from cce_numba.simt.logits import make_terms
from cce_numba.simt.numbers import conversions, real_of
from cce_numba.simt.records import LogitTerms, Tokens, bias_dtype_of, by_target

# Threads that share a token's dot product, and tokens of a CTA.
_LANES, _TOKENS = (2, 2) if SIMULATED else (32, 4)


@kernel_factory
def make_indexed_dot_kernel(dtype: np.dtype, bias_dtype: np.dtype, in_shards: bool = False) -> ArrayKernel:
    """The kernel for `e` and `c` of `dtype`. in_shards: other ranks have other entries, so a target may be `ELSEWHERE`."""
    real = real_of(dtype)
    load, _ = conversions(dtype)
    bias_of, scale_of, logit_of = make_terms(bias_dtype, real)
    shape, lanes, tokens_per_block, minus_infinity = (_TOKENS, _LANES), _LANES, _TOKENS, real(-math.inf)

    def indexed_dot_kernel(
        e: Any,  # (N, D)
        c: Any,  # (V, D)
        terms: Any,  # LogitTerms
        targets: Any,  # (N, K) int64
        padding: Any,  # int: a target that is this number is none
        tokens: Any,  # Tokens
        target_logit: Any,  # (N,) real, to be written for listed tokens
    ) -> None:
        """Grid: enough CTAs for all tokens. target_logit[n] = logit of <e[n], c[targets[n, 0]]>; NaN for a target out of range.

        Of several targets it is the largest of their logits, NaN if any is out of range; -inf where other ranks have them.
        """
        partial = cuda.shared.array(shape, real)
        lane, slot = cuda.threadIdx.x, cuda.threadIdx.y
        position = cuda.blockIdx.x * tokens_per_block + slot
        counts = position < tokens.n_valid[0]
        largest = minus_infinity
        for k in range(targets.shape[1]):
            target = -1
            if counts:
                target = targets[tokens.listed[position], k]
            in_range = target >= 0 and target < c.shape[0]

            # Each lane sums every _LANES-th term; then the first adds up what the lanes have.
            total = real(0)
            if in_range:
                n = tokens.listed[position]
                for d in range(lane, e.shape[1], lanes):
                    total += load(e[n, d]) * load(c[target, d])
            cuda.syncthreads()  # the first lane has read the terms of the target before
            partial[slot, lane] = total
            cuda.syncthreads()
            is_elsewhere = in_shards and target == ELSEWHERE
            if lane == 0 and counts and target != padding and not is_elsewhere:
                n = tokens.listed[position]
                z = real(math.nan)
                if in_range:
                    z = real(0)
                    for other in range(lanes):
                        z += partial[slot, other]
                    z = logit_of(z, bias_of(terms, target), scale_of(terms, n), terms)
                if not (z <= largest) and largest == largest:  # a NaN stays
                    largest = z
        if lane == 0 and counts:
            target_logit[tokens.listed[position]] = largest

    return ArrayKernel(indexed_dot_kernel, block=(_LANES, _TOKENS))


def indexed_dot(p: Problem, tokens: Tokens, terms: LogitTerms) -> Any:
    """(N,) of the compute dtype: the target's logit, 0 for tokens that are not listed, NaN for a target out of range.

    Of several targets the largest logit, NaN if any is out of range.
    """
    target_logit = p.xp.zeros(p.N, p.compute_dtype)
    kernel = make_indexed_dot_kernel(p.dtype, bias_dtype_of(p), p.shard is not None)
    targets = by_target(p.targets), p.options.ignore_index
    kernel.launch(ceil_div(p.N, _TOKENS), p.e, p.c, terms, *targets, tokens, target_logit)
    return target_logit
