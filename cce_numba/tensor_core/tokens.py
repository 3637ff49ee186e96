"""The list of tokens that count, made on the device: kernels take their rows from it, so ignored tokens cost nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.arguments import Problem
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.parallel.shard import ELSEWHERE
from cce_numba.ptx import memory
from cce_numba.survivors import SURVIVOR_BLOCK
from cce_numba.tensor_core.records import I32, I64, U64, Found, FoundOfMore
from cce_numba.tensor_core.sums import THREADS, sum_before

_TOKENS = 8  # neighbours, of each thread


@cuda.jit(device=True, forceinline=True)
def token_at(tokens: Any, position: Any) -> Any:
    """The row of e at a position of the list; tokens: the address of a list of int32."""
    return memory.load_global_i32(tokens + np.uint64(4 * position))


@cuda.jit(device=True, forceinline=True)
def are_neighbours(tokens: Any, n0: Any, listed: Any) -> Any:
    """Whether the block of 128 tokens from position n0 on (or as many as are listed) are consecutive rows of e.

    tokens: the address of a list of int32.
    """
    last = np.int32(min(n0 + SURVIVOR_BLOCK - 1, listed - 1))
    first_row, last_row = token_at(tokens, n0), token_at(tokens, last)
    return last_row - first_row == last - n0


@cuda.jit(device=True, forceinline=True)
def has_target(n: Any, several: Any) -> Any:
    """Whether any of a token's targets is not padding. several: `SeveralTargets`."""
    result = False
    for k in range(several.K):
        result = result or several.ids[np.int64(n) * several.K + k] != several.padding
    return result


@cuda.jit(device=True, forceinline=True)
def mark_targets(n: Any, V: Any, several: Any, in_shards: Any) -> None:
    """Writes the logits of a token's targets that have none here.

    0 for padding, -inf for a target that another rank has (`in_shards`), and NaN for one out of range.
    """
    for k in range(several.K):
        place = np.int64(n) * several.K + k
        target = several.ids[place]
        if target == several.padding:
            several.logits[place] = np.float32(0)
        elif in_shards and target == ELSEWHERE:
            several.logits[place] = np.float32(-math.inf)
        elif target < 0 or target >= V:
            several.logits[place] = np.float32(math.nan)


@kernel_factory
def make_list_tokens_kernel(n_constants: int = 0, several: bool = False, more: bool = False, in_shards: bool = False) -> Kernel:
    """The kernel: one CTA. On its way it writes `n_constants` 64-bit words to memory, for kernels that must read them there.

    several: tokens have several targets. more: it takes a `FoundOfMore`, as with several targets. in_shards: other ranks have
    other entries, so a target may be `ELSEWHERE`.
    """
    threads, tokens_per_thread = THREADS, _TOKENS

    @cuda.jit(device=True, forceinline=True)
    def counts(n: Any, found: Any, has_targets: Any, ignore_index: Any) -> Any:
        """Whether a token counts."""
        if several:
            return has_target(n, found.several)
        return not has_targets or found.targets[n] != ignore_index

    def list_tokens_kernel(
        constants: Any,  # n_constants words
        constants_to: Any,  # (n_constants,)
        found: Any,  # Found, or FoundOfMore
        has_targets: Any,
        ignore_index: Any,
        N: Any,
        V: Any,
        tokens: Any,  # (N,)
        n_valid: Any,  # (1,)
        n_results: Any,
        target_result: Any,  # place of the target logits among them, -1 if there are none
    ) -> None:
        """tokens[:n_valid[0]] = those with a target that is not ignore_index, ascending. Results of all others become 0.

        The target logit of a listed token becomes NaN if its target is out of range, and -inf if another rank has it. Other
        results of listed tokens stay.
        """
        sums = cuda.shared.array(32, np.int64)
        t = cuda.threadIdx.x
        targets = found.targets
        if n_constants > 0 and t < n_constants:
            constants_to[t] = constants[t]
        listed = np.int64(0)  # so far
        for first in range(0, N, threads * tokens_per_thread):
            n0 = first + t * tokens_per_thread
            count = np.int64(0)
            for n in range(n0, min(n0 + tokens_per_thread, N)):
                if counts(n, found, has_targets, ignore_index):
                    count += np.int64(1)
            before, total = sum_before(count, sums)
            position = listed + before
            listed += total
            for n in range(n0, min(n0 + tokens_per_thread, N)):
                if counts(n, found, has_targets, ignore_index):
                    tokens[position] = n
                    position += np.int64(1)
                    if target_result >= 0 and (targets[n] < 0 or targets[n] >= V):
                        logit = np.float32(math.nan)
                        if in_shards and targets[n] == ELSEWHERE:
                            logit = np.float32(-math.inf)
                        found.results[target_result * found.pitch + n] = logit
                else:
                    for k in range(n_results):
                        found.results[k * found.pitch + n] = np.float32(0)
                if several:
                    mark_targets(n, V, found.several, in_shards)
        if t == 0:
            n_valid[0] = listed

    p_i64, p_i32 = pointer_to(np.int64), pointer_to(np.int32)
    constants = types.UniTuple(U64, n_constants), pointer_to(np.uint64)
    parameters = *constants, FoundOfMore if several or more else Found, I32, I64, I32, I32, p_i32, p_i64, I32, I32
    return Kernel(list_tokens_kernel, parameters, threads=THREADS)


def list_tokens(
    p: Problem,
    tokens: int,
    n_valid: int,
    found: Found | FoundOfMore,
    results: tuple[str, ...],
    constants: tuple[int, ...] = (),
    constants_to: int = 0,
) -> None:
    """Lists the tokens of p that count; tokens (N,) int32, n_valid (1,) int64 and constants_to are addresses.

    results: the names of `found.results`.
    """
    target_result = results.index("target_logit") if "target_logit" in results else -1
    is_more = isinstance(found, FoundOfMore)
    make_list_tokens_kernel(len(constants), p.K is not None, is_more, p.shard is not None).launch(
        1, constants, constants_to, found, p.targets is not None, p.options.ignore_index, p.N, p.V, tokens, n_valid,
        len(results), target_result,
    )  # fmt: skip
