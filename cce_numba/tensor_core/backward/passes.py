"""The host's part of a backward that does not depend on its kernel: which passes there are, and the survey of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cce_numba import survivors, terms
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.survivors import coarse_eps_of
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.records import Output, SurvivorBits, WeightedTokens
from cce_numba.tensor_core.survey import Products, survey


def in_passes(
    p: Problem, statistics: Statistics, weights: Weights, into: Gradients, adds: bool, make: Callable[..., None]
) -> None:  # fmt: skip
    """Makes all gradients by calls of `make`. Where dE and dC have filters of their own, each takes a pass of its own.

    make: `make(p, statistics, weights, e, c, into, adds, keep_all)` makes gradients that share a filter. e and c are those of
        p, or copies in rows that can be copied 16 bytes at a time. keep_all: whether all columns survive, whatever is recorded.
    """
    e, c = matrices.aligned(p.e), matrices.aligned(p.c)
    filtered = statistics.survivors is not None
    e_filtered, c_filtered = filtered and p.options.filter_eps_e is not None, filtered and p.options.filter_eps_c is not None
    if e_filtered == c_filtered or into.e is None or (into.c is None and into.bias is None):
        keep_all = not (c_filtered if into.e is None else e_filtered)
        make(p, statistics, weights, e, c, into, adds, keep_all)
    else:
        make(p, statistics, weights, e, c, Gradients(e=into.e), adds, not e_filtered)
        make(p, statistics, weights, e, c, Gradients(c=into.c, bias=into.bias), adds, not c_filtered)


def run_survey(
    p: Problem, statistics: Statistics, weights: Weights, layout: Any, base: int, keep_all: bool, products: Products
) -> None:
    """Launches the survey, whose tables begin at address `base`."""
    smoothed, bits, largest = weights.uniform is not None, statistics.survivors, weights.softmax
    if smoothed:
        largest = _largest_weight(p, weights)
    tokens = WeightedTokens(
        listed=statistics.tokens.data.ptr,
        n_valid=statistics.n_valid.data.ptr,
        softmax_weight=weights.softmax.data.ptr,
        target_weight=weights.target.data.ptr,
        largest_weight=largest.data.ptr,
        max_logit=statistics.max_logit.data.ptr,
        log_sum=statistics.log_sum.data.ptr,
        target_logit=statistics.target_logit.data.ptr,
        targets=p.targets.data.ptr,
    )
    kept = None
    if not keep_all:
        pitch_words = bits.strides[0] // 4
        coarse_words = 0 if coarse_eps_of(p.options) is None else layout.blocks * pitch_words  # dC's bits follow the filter's
        kept = SurvivorBits(words=bits.data.ptr, pitch_words=pitch_words, coarse_words=coarse_words)
    survey(
        layout,
        base,
        tokens=tokens,
        survivors=kept,
        dense_share=survivors.DENSE_SHARE,
        products=products,
        smoothed=smoothed,
    )


def _largest_weight(p: Problem, weights: Weights) -> Any:
    """(N,): the larger magnitude of a token's softmax weight and of its uniform weight times the largest class weight.

    The largest class weight is taken to be at least 1.
    """
    largest = 1 if p.class_weights is None else p.xp.maximum(p.class_weights.max(), 1)
    return p.xp.maximum(abs(weights.softmax), terms.times(abs(weights.uniform), largest))


def output_of(gradient: Any, tiles: int) -> Any:
    """The `Output` of a gradient, or of None."""
    if gradient is None:
        return Output(address=0, pitch_bytes=0, is_float32=False, tiles=tiles)
    pitch_bytes, is_float32 = matrices.pitch_bytes(gradient), gradient.dtype == np.float32
    return Output(address=gradient.data.ptr, pitch_bytes=pitch_bytes, is_float32=is_float32, tiles=tiles)
