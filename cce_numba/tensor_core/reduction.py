"""The loss out of each token's log-sum-exp and target logit, in one launch, and what flows back from it, in another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.integers import ceil_div
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx.pointers import address_of

_THREADS = 1024
_WEIGHTS = 256  # of a CTA


@kernel_factory
def make_reduce_kernel() -> Kernel:
    """One CTA, so that the order of the sum, and with it every bit, is always the same."""
    threads = _THREADS

    def reduce_kernel(
        tokens: Any,  # (N,), the first n_valid[0] count
        n_valid: Any,  # (1,)
        max_logit: Any,  # (N,)
        log_sum: Any,  # (N,)
        target_logit: Any,  # (N,)
        is_mean: Any,
        loss: Any,  # (1,)
    ) -> None:
        """loss[0] = sum or mean of the tokens' negative log-likelihoods, summed in float64; nan for the mean of none."""
        partial = cuda.shared.array(threads, np.float64)
        t, n_listed = cuda.threadIdx.x, n_valid[0]
        total = np.float64(0)
        for position in range(t, n_listed, threads):
            token = tokens[position]
            total += np.float64((max_logit[token] - target_logit[token]) + log_sum[token])
        partial[t] = total
        width = threads // 2
        while width > 0:
            cuda.syncthreads()
            if t < width:
                partial[t] += partial[t + width]
            width //= 2
        if t == 0:
            total = partial[0]
            if is_mean:
                total = total / np.float64(n_listed) if n_listed > 0 else np.float64(math.nan)
            loss[0] = np.float32(total)

    p_i64, p_i32, p_f32 = pointer_to(np.int64), pointer_to(np.int32), pointer_to(np.float32)
    return Kernel(reduce_kernel, (p_i32, p_i64, p_f32, p_f32, p_f32, types.int32, p_f32), threads=_THREADS)


@kernel_factory
def make_weight_kernel() -> Kernel:
    """A thread for each token."""

    def weight_kernel(
        number: Any,  # float64, what flows back into the loss, where the host knows it
        array: Any,  # (1,) the same, where it is on the device; else null
        n_valid: Any,  # (1,)
        is_mean: Any,
        N: Any,
        weight: Any,  # (N,)
    ) -> None:
        """weight[n] = what flows back into a token's negative log-likelihood, rounded once."""
        n = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if n < N:
            given = np.float32(number) if address_of(array) == 0 else array[0]
            weight[n] = np.float32(np.float64(given) / np.float64(n_valid[0])) if is_mean and n_valid[0] > 0 else given

    p_i64, p_f32 = pointer_to(np.int64), pointer_to(np.float32)
    return Kernel(weight_kernel, (types.float64, p_f32, p_i64, types.int32, types.int32, p_f32), threads=_WEIGHTS)


def reduced_nll(p: Problem, statistics: Statistics) -> Any:
    """See `backend.Backend`."""
    loss = p.xp.empty((), np.float32)
    arrays = (statistics.tokens, statistics.n_valid, statistics.max_logit, statistics.log_sum, statistics.target_logit)
    make_reduce_kernel().launch(1, *(x.data.ptr for x in arrays), p.options.reduction == "mean", loss.data.ptr)
    return loss


def nll_weight(p: Problem, statistics: Statistics, d_loss: Any) -> Any:
    """See `backend.Backend`."""
    weight = p.xp.empty(p.N, np.float32)
    number, array = (d_loss, 0) if isinstance(d_loss, float) else (0.0, d_loss.data.ptr)
    is_mean, n_valid = p.options.reduction == "mean", statistics.n_valid.data.ptr
    make_weight_kernel().launch(ceil_div(p.N, _WEIGHTS), number, array, n_valid, is_mean, p.N, weight.data.ptr)
    return weight
