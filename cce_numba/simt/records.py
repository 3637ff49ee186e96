"""What kernels take together, each declared once: records of arrays and numbers.

Their fields are arrays in global memory (CuPy's on a GPU, NumPy's in the simulator) and plain numbers. Numba knows the dtype of
each from what a kernel is launched with. *real* is the dtype that is computed in: float64 for float64 inputs, else float32.

An array that a problem does not have (no bias, say) is replaced by some other array of the right dtype, which nobody reads, and
a flag beside it says so. So kernels need not be compiled anew for each combination of what a problem has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from cce_numba import backend
from cce_numba.arguments import Problem
from cce_numba.backend import Statistics


class Tokens(NamedTuple):
    """The tokens that count, in a list: kernels take their rows from it, so that ignored tokens cost nothing."""

    listed: Any  # (N,) int64: the numbers of the tokens that count, ascending, then anything
    n_valid: Any  # (1,) int64: how many count


class LogitTerms(NamedTuple):
    """What turns a product into a logit: `logit.finish`."""

    bias: Any  # (V,) of e's dtype or float32
    has_bias: Any  # bool
    logit_scale: Any  # (N,) real
    has_scale: Any  # bool
    softcap: Any  # real; 0 for none

    @staticmethod
    def of(p: Problem) -> LogitTerms:
        """Those of a problem."""
        real: Any = p.compute_dtype.type
        return LogitTerms(
            bias=p.xp.empty(1, p.dtype) if p.bias is None else p.bias,
            has_bias=p.bias is not None,
            logit_scale=p.xp.empty(1, real) if p.logit_scale is None else p.logit_scale,
            has_scale=p.logit_scale is not None,
            softcap=real(p.options.softcap or 0),
        )


def bias_dtype_of(p: Problem) -> np.dtype:
    """The dtype of `LogitTerms.bias`."""
    return p.dtype if p.bias is None else np.dtype(p.bias.dtype)


class Found(NamedTuple):
    """What the forward found of each token."""

    targets: Any  # (N, K) int64
    padding: Any  # int: a target that is this number is none
    target_logit: Any  # (N, K) real, NaN for a target out of range
    max_logit: Any  # (N,) real, the largest logit
    log_sum: Any  # (N,) real, natural log of the sum of exp(logit - max_logit)

    @staticmethod
    def of(p: Problem, statistics: Statistics) -> Found:
        """Of a problem with targets."""
        targets, target_logit = by_target(p.targets), by_target(statistics.target_logit)
        return Found(targets, p.options.ignore_index, target_logit, statistics.max_logit, statistics.log_sum)


def by_target(array: Any) -> Any:
    """(N, K) as it is, (N,) as (N, 1), None as it is: kernels take targets, and what is said of each, with an axis for them."""
    return array if array is None or array.ndim == 2 else array[:, None]


class Weights(NamedTuple):
    """The factors of G, the gradient of the loss with respect to the logits; see `backend.Weights`."""

    softmax: Any  # (N,) real: of the softmax
    target: Any  # (N, K) real: of the one-hot targets
    entropy: Any  # (N,) real: of p * log(p)
    has_entropy: Any  # bool
    uniform: Any  # (N,) real: of the class weights
    has_uniform: Any  # bool
    class_weights: Any  # (V,) real
    has_class_weights: Any  # bool: without, all are 1

    @staticmethod
    def of(p: Problem, given: backend.Weights) -> Weights:
        """Of a problem, with the weights that its backward was given."""
        class_weights = p.xp.empty(1, p.compute_dtype) if p.class_weights is None else p.class_weights
        return Weights(
            softmax=given.softmax,
            target=by_target(given.target),
            entropy=p.xp.empty(1, p.compute_dtype) if given.entropy is None else given.entropy,
            has_entropy=given.entropy is not None,
            uniform=p.xp.empty(1, p.compute_dtype) if given.uniform is None else given.uniform,
            has_uniform=given.uniform is not None,
            class_weights=class_weights,
            has_class_weights=p.class_weights is not None,
        )


@cuda.jit(device=True)
def takes_part(weights: Any, token: Any) -> Any:
    """Whether any gradient comes from a token. One with no weight takes no part, not even with a NaN in its row."""
    if weights.softmax[token] != 0:
        return True
    for k in range(weights.target.shape[1]):
        if weights.target[token, k] != 0:
            return True
    if weights.has_entropy and weights.entropy[token] != 0:
        return True
    return weights.has_uniform and weights.uniform[token] != 0


class Survivors(NamedTuple):
    """Which vocabulary entries each block of tokens keeps."""

    bits: Any  # (n_blocks, ceil(V / 8)) uint8: little-endian bits over the vocabulary
    keep_all: Any  # bool: all are kept, whatever the bits are


@cuda.jit(device=True)
def survives(survivors: Any, n_block: Any, v: Any) -> Any:
    """Whether a block of tokens keeps the vocabulary entry v."""
    return survivors.keep_all or (survivors.bits[n_block, v >> 3] >> (v & 7)) & 1 != 0


class Chance(NamedTuple):
    """What the unbiased filter decides by; see `cce_numba/survivors.py`."""

    draw_seed: Any  # (1,) int64
    eps: Any  # real

    @staticmethod
    def of(p: Problem, statistics: Statistics) -> Chance:
        """That of a problem whose forward has drawn; else of the right types, for nobody to read."""
        seed = statistics.n_valid if statistics.draw_seed is None else statistics.draw_seed
        real: Any = p.compute_dtype.type
        return Chance(seed.reshape(1), real(p.options.filter_eps or 0))


class Columns(NamedTuple):
    """The vocabulary entries [v0, v1), a chunk, and those of them that each block of tokens keeps, as a list."""

    v0: Any  # int
    v1: Any  # int
    listed: Any  # (n_blocks, entries of a chunk) int64: those that survive, ascending, then anything
    count: Any  # (n_blocks,) int64: how many survive
