"""The draws of the unbiased filter (`cce_numba/survivors.py`): a device function, and the kernel that makes their seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx.pointers import address_of
from cce_numba.survivors import make_draw, make_mix
from cce_numba.tensor_core.records import I64, Tokens
from cce_numba.tensor_core.sums import THREADS, sum_before
from cce_numba.tensor_core.tokens import token_at

mix = cuda.jit(device=True, forceinline=True)(make_mix(np.uint32))
_draw_of_hash = cuda.jit(device=True, forceinline=True)(make_draw(np.uint32))


@cuda.jit(device=True, forceinline=True)
def draw(block: Any, entry: Any, seed: Any) -> Any:
    """u of a block of 128 listed tokens and a vocabulary entry, float32 in (0, 1). seed: an integer in [0, 2**32)."""
    return _draw_of_hash(np.int64(block), np.int64(mix(np.int64(entry) ^ np.int64(seed))))


@kernel_factory
def make_draw_seed_kernel() -> Kernel:
    """The kernel: one CTA, whose threads share the tokens. Sums of integers do not depend on who has which."""
    threads = THREADS

    def draw_seed_kernel(
        tokens: Tokens,  # all of them
        targets: Any,  # (N,) int64
        number: Any,  # the caller's `filter_seed`
        array: Any,  # (1,) int64, where that is on the device; else null
        seed: Any,  # (1,) int64, to be written: in [0, 2**32)
    ) -> None:
        """Hashes the targets of the listed tokens, and the caller's number."""
        sums = cuda.shared.array(32, np.int64)
        total = np.int64(0)
        for position in range(cuda.threadIdx.x, tokens.n_valid[0], threads):
            total += np.int64(mix(targets[token_at(tokens.listed, position)]))
        _, total = sum_before(total, sums)
        if cuda.threadIdx.x == 0:
            given = number if address_of(array) == 0 else array[0]
            seed[0] = np.int64(mix(np.int64(mix(given)) + total))

    p_i64 = pointer_to(np.int64)
    return Kernel(draw_seed_kernel, (Tokens, p_i64, I64, p_i64, p_i64), threads=THREADS)


def write_draw_seed(p: Problem, tokens: Tokens, seed: int) -> None:
    """Writes the seed of a problem's draws, an int64, to the address `seed`. tokens: all that are listed."""
    given = p.filter_seed
    number, array = (0, given.data.ptr) if hasattr(given, "data") else (given, 0)
    make_draw_seed_kernel().launch(1, tokens, p.targets.data.ptr, number, array, seed)
