"""The draws of the unbiased filter (`cce_numba/survivors.py`): a device function, and the kernel that makes their seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from cce_numba.arguments import Problem
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.ptx.pointers import address_of
from cce_numba.survivors import make_draw, make_mix
from cce_numba.tensor_core.records import I32, I64, Tokens
from cce_numba.tensor_core.sums import THREADS, sum_before
from cce_numba.tensor_core.tokens import token_at

mix = cuda.jit(device=True, forceinline=True)(make_mix(np.uint32))
_draw_of_hash = cuda.jit(device=True, forceinline=True)(make_draw(np.uint32))


@cuda.jit(device=True, forceinline=True)
def draw(block: Any, entry: Any, seed: Any) -> Any:
    """u of a block of 128 listed tokens and a vocabulary entry, float32 in (0, 1).

    seed: an integer of 64 bits, whose high word is added to the entry.
    """
    in_all = np.int64(entry) + (np.int64(seed) >> np.int64(32))
    return _draw_of_hash(np.int64(block), np.int64(mix(in_all ^ np.int64(seed))))


@kernel_factory
def make_draw_seed_kernel(several: bool = False) -> Kernel:
    """The kernel: one CTA, whose threads share the tokens. Sums of integers do not depend on who has which.

    several: tokens have several targets, targets (N, K), and the kernel takes K and the number that is padding, too.
    """
    threads = THREADS
    if several:
        return _make_draw_seed_kernel_of_several()

    def draw_seed_kernel(
        tokens: Tokens,  # all of them
        targets: Any,  # (N,) int64
        number: Any,  # the caller's `filter_seed`
        array: Any,  # (1,) int64, where that is on the device; else null
        first_entry: Any,  # of the shard
        seed: Any,  # (1,) int64, to be written: the seed in the low word, first_entry in the high one
    ) -> None:
        """Hashes the targets of the listed tokens, and the caller's number."""
        sums = cuda.shared.array(32, np.int64)
        total = np.int64(0)
        for position in range(cuda.threadIdx.x, tokens.n_valid[0], threads):
            total += np.int64(mix(targets[token_at(tokens.listed, position)]))
        _, total = sum_before(total, sums)
        if cuda.threadIdx.x == 0:
            given = number if address_of(array) == 0 else array[0]
            seed[0] = np.int64(mix(np.int64(mix(given)) + total)) + (np.int64(first_entry) << np.int64(32))

    p_i64 = pointer_to(np.int64)
    return Kernel(draw_seed_kernel, (Tokens, p_i64, I64, p_i64, I64, p_i64), threads=THREADS)


def _make_draw_seed_kernel_of_several() -> Kernel:
    threads = THREADS

    def draw_seed_kernel(
        tokens: Tokens,  # all of them
        targets: Any,  # (N, K) int64
        number: Any,  # the caller's `filter_seed`
        array: Any,  # (1,) int64, where that is on the device; else null
        first_entry: Any,  # as above
        seed: Any,  # (1,) int64, to be written
        K: Any,
        padding: Any,  # a target that is this number is none
    ) -> None:
        """Hashes the targets of the listed tokens, and the caller's number."""
        sums = cuda.shared.array(32, np.int64)
        total = np.int64(0)
        for position in range(cuda.threadIdx.x, tokens.n_valid[0], threads):
            first = np.int64(token_at(tokens.listed, position)) * K
            for k in range(K):
                if targets[first + k] != padding:
                    total += np.int64(mix(targets[first + k]))
        _, total = sum_before(total, sums)
        if cuda.threadIdx.x == 0:
            given = number if address_of(array) == 0 else array[0]
            seed[0] = np.int64(mix(np.int64(mix(given)) + total)) + (np.int64(first_entry) << np.int64(32))

    p_i64 = pointer_to(np.int64)
    return Kernel(draw_seed_kernel, (Tokens, p_i64, I64, p_i64, I64, p_i64, I32, I64), threads=THREADS)


def write_draw_seed(p: Problem, tokens: Tokens, seed: int) -> None:
    """Writes the seed of a problem's draws, an int64, to the address `seed`. tokens: all that are listed."""
    given, first_entry = p.filter_seed, 0 if p.shard is None else p.shard.start
    number, array = (0, given.data.ptr) if hasattr(given, "data") else (given, 0)
    targets = p.targets if p.shard is None else p.shard.targets
    several = () if p.K is None else (p.K, p.options.ignore_index)
    make_draw_seed_kernel(p.K is not None).launch(1, tokens, targets.data.ptr, number, array, first_entry, seed, *several)
