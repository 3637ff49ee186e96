"""The list of tokens that count, made on the device: kernels take their rows from it, so ignored tokens cost nothing."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.gpu import SIMULATED
from cce_numba.simt.launch import launch

_THREADS = 4 if SIMULATED else 256


@functools.cache
def make_list_tokens_kernel() -> Any:
    """One CTA; each thread takes a contiguous part of the tokens, so that the list comes out in order."""
    threads = _THREADS

    @cuda.jit
    def list_tokens_kernel(targets: Any, ignore_index: Any, tokens: Any, n_valid: Any) -> None:
        """tokens[:n_valid[0]] = the tokens whose target is not ignore_index, ascending. targets, tokens (N,); n_valid (1,)."""
        counts = cuda.shared.array(threads, np.int64)
        t, N = cuda.threadIdx.x, targets.shape[0]
        part = (N + threads - 1) // threads
        first, last = min(t * part, N), min(t * part + part, N)
        count = 0
        for n in range(first, last):
            if targets[n] != ignore_index:
                count += 1
        counts[t] = count
        cuda.syncthreads()
        position = 0
        for other in range(t):
            position += counts[other]
        for n in range(first, last):
            if targets[n] != ignore_index:
                tokens[position] = n
                position += 1
        if t == threads - 1:
            n_valid[0] = position

    return list_tokens_kernel


def list_tokens(p: Problem) -> tuple[Any, Any]:
    """`(tokens, n_valid)`: (N,) int64, whose first n_valid[0] entries are the tokens that count, and (1,) int64."""
    xp = p.xp
    if p.targets is None:
        return xp.arange(p.N, dtype=np.int64), xp.full(1, p.N, np.int64)
    tokens, n_valid = xp.empty(p.N, np.int64), xp.zeros(1, np.int64)
    if p.N:
        launch(make_list_tokens_kernel(), (1,), (_THREADS,), p.targets, p.options.ignore_index, tokens, n_valid)
    return tokens, n_valid
