"""The list of tokens that count, made on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.gpu import SIMULATED
from cce_numba.launch.array_kernel import ArrayKernel
from cce_numba.launch.kernel import kernel_factory
from cce_numba.simt.records import Tokens, by_target

_THREADS = 4 if SIMULATED else 256


@cuda.jit(device=True)
def has_target(targets: Any, n: Any, ignore_index: Any) -> Any:
    """Whether any of the token's targets is not ignore_index; targets: (N, K)."""
    found = False
    for k in range(targets.shape[1]):
        found = found or targets[n, k] != ignore_index
    return found


@kernel_factory
def make_list_tokens_kernel() -> ArrayKernel:
    """One CTA. Each thread lists a contiguous part of the tokens, so that the whole list is in order."""
    threads = _THREADS

    def list_tokens_kernel(
        targets: Any,  # (N, K) int64
        ignore_index: Any,  # int
        tokens: Any,  # Tokens, to be written
    ) -> None:
        """Lists the tokens that have a target other than ignore_index."""
        counts = cuda.shared.array(threads, np.int64)
        t, N = cuda.threadIdx.x, targets.shape[0]
        part = (N + threads - 1) // threads
        first, last = min(t * part, N), min(t * part + part, N)
        count = 0
        for n in range(first, last):
            if has_target(targets, n, ignore_index):
                count += 1
        counts[t] = count
        cuda.syncthreads()
        position = 0
        for other in range(t):
            position += counts[other]
        for n in range(first, last):
            if has_target(targets, n, ignore_index):
                tokens.listed[position] = n
                position += 1
        if t == threads - 1:
            tokens.n_valid[0] = position

    return ArrayKernel(list_tokens_kernel, block=_THREADS)


def list_tokens(p: Problem) -> Tokens:
    """The tokens of a problem that count; without targets all do."""
    xp = p.xp
    if p.targets is None:
        return Tokens(xp.arange(p.N, dtype=np.int64), xp.full(1, p.N, np.int64))
    tokens = Tokens(listed=xp.empty(p.N, np.int64), n_valid=xp.zeros(1, np.int64))
    if p.N:
        make_list_tokens_kernel().launch(1, by_target(p.targets), p.options.ignore_index, tokens)
    return tokens
