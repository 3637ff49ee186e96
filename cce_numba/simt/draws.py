"""The draws of the unbiased filter (`cce_numba/survivors.py`): device functions, and the kernel that makes their seed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.gpu import SIMULATED
from cce_numba.launch.array_kernel import ArrayKernel
from cce_numba.launch.kernel import kernel_factory
from cce_numba.simt.records import Tokens, by_target
from cce_numba.survivors import low_word, make_draw, make_mix

_THREADS = 4 if SIMULATED else 256
_WORD = low_word if SIMULATED else np.uint32

mix = cuda.jit(device=True)(make_mix(_WORD))
draw_of_hash = cuda.jit(device=True)(make_draw(_WORD))


@cuda.jit(device=True)
def draw(n_block: Any, v: Any, seed: Any) -> Any:
    """u of a block of tokens and a vocabulary entry: float32 in (0, 1). The seed's high word is added to v."""
    return draw_of_hash(n_block, mix((v + (seed >> 32)) ^ seed))


class FilterSeed(NamedTuple):
    """The caller's part of the seed, of which the lower 32 bits count."""

    number: Any  # int
    array: Any  # (1,) int64
    is_array: Any  # bool: the array has it, else the number

    @staticmethod
    def of(p: Problem, any_array: Any) -> FilterSeed:
        """That of a problem; `any_array` is of int64, and stands where there is none."""
        if isinstance(p.filter_seed, int):
            return FilterSeed(p.filter_seed, any_array, False)
        return FilterSeed(0, p.filter_seed, True)


@kernel_factory
def make_draw_seed_kernel() -> ArrayKernel:
    """One CTA. The threads share the tokens; sums of integers do not depend on who has which."""
    threads = _THREADS

    def draw_seed_kernel(
        targets: Any,  # (N, K) int64
        padding: Any,  # int: a target that is this number is none
        tokens: Any,  # Tokens
        filter_seed: Any,  # FilterSeed
        seed: Any,  # (1,) int64, to be written: in [0, 2**32)
    ) -> None:
        """Hashes the targets of the tokens that count, and the caller's number."""
        partial = cuda.shared.array(threads, np.int64)
        t, total = cuda.threadIdx.x, 0
        for position in range(t, tokens.n_valid[0], threads):
            for k in range(targets.shape[1]):
                target = targets[tokens.listed[position], k]
                if target != padding:
                    total += mix(target)
        partial[t] = total
        cuda.syncthreads()
        if t == 0:
            total = mix(filter_seed.array[0] if filter_seed.is_array else filter_seed.number)
            for other in range(threads):
                total += partial[other]
            seed[0] = mix(total)

    return ArrayKernel(draw_seed_kernel, block=_THREADS)


def draw_seed(p: Problem, tokens: Tokens) -> Any:
    """(1,) int64: the seed of a problem's draws, with the shard's first entry in its high word."""
    seed = p.xp.empty(1, np.int64)
    targets = by_target(p.targets if p.shard is None else p.shard.targets), p.options.ignore_index
    make_draw_seed_kernel().launch(1, *targets, tokens, FilterSeed.of(p, tokens.n_valid), seed)
    return seed if p.shard is None else seed + p.shard.of_seed
