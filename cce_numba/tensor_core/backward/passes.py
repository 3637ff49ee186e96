"""The host's part of a backward that does not depend on its kernel: which passes there are, and the survey of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba import survivors, terms
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.survivors import coarse_eps_of
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.backward.phases import RUNS_ALWAYS, RUNS_IF_DENSE, RUNS_IF_FILTERED
from cce_numba.tensor_core.records import Chance, Output, SurvivorBits, WeightedTokens
from cce_numba.tensor_core.survey import Products, survey


@dataclass(frozen=True, eq=False)
class Call:
    """What all passes of a backward share.

    Attributes:
        p: the problem.
        statistics: of its forward.
        weights: of its tokens.
        e: (N, D) as the kernel reads it: p.e, or a copy in rows that can be copied 16 bytes at a time.
        c: (V, D) as the kernel reads it.
        adds: whether gradients are added to what is there.
    """

    p: Problem
    statistics: Statistics
    weights: Weights
    e: Any
    c: Any
    adds: bool

    def runs(self, keep_all: bool, leaves_dense: Any) -> Iterator[tuple[bool, Any, Chance]]:
        """The launches of a pass: whether chance decides, for which surveys the kernel has jobs (`phases`), and a `Chance`.

        If nearly all survives, all do: nothing is left to chance then, and the kernel is another.
        """
        options = self.p.options
        if options.is_unbiased and not keep_all:
            yield True, RUNS_IF_FILTERED, Chance(eps=options.filter_eps, seed=self.statistics.draw_seed.data.ptr)
            if leaves_dense is None:
                yield False, RUNS_IF_DENSE, Chance(eps=0.0, seed=0)
        else:
            yield False, RUNS_ALWAYS if leaves_dense is None else RUNS_IF_FILTERED, Chance(eps=0.0, seed=0)


def in_passes(
    p: Problem, statistics: Statistics, weights: Weights, into: Gradients, adds: bool, make: Callable[..., None]
) -> None:  # fmt: skip
    """Makes all gradients by calls of `make`. Where dE and dC have filters of their own, each takes a pass of its own.

    One case does better: if dC is exact and so much survives that computing all of dE is faster than picking, which the device
    finds out, then the first pass does nothing, and the second computes both.

    make: `make(call, into, keep_all, leaves_dense=None, e_if=None)` makes gradients that share a filter. call: a `Call`.
        keep_all: whether all columns survive, whatever is recorded. leaves_dense: (1,) int32, which says afterwards whether the
        survey was dense; the pass did nothing then. e_if: (1,) int32: dE is computed only if this is not 0.
    """
    call = Call(p, statistics, weights, matrices.aligned(p.e), matrices.aligned(p.c), adds)
    filtered = statistics.survivors is not None
    e_filtered, c_filtered = filtered and p.options.filter_eps_e is not None, filtered and p.options.filter_eps_c is not None
    if e_filtered == c_filtered or into.e is None or (into.c is None and into.bias is None):
        make(call, into, not (c_filtered if into.e is None else e_filtered))
    elif e_filtered:
        is_dense = p.xp.empty(1, np.int32)
        make(call, Gradients(e=into.e), False, leaves_dense=is_dense)
        make(call, into, True, e_if=is_dense)
    else:
        make(call, Gradients(e=into.e), True)
        make(call, Gradients(c=into.c, bias=into.bias), False)


def run_survey(call: Call, layout: Any, base: int, keep_all: bool, products: Products, leaves_dense: Any) -> None:
    """Launches the survey, whose tables begin at address `base`; keep_all, leaves_dense: as in `in_passes`."""
    p, statistics, weights = call.p, call.statistics, call.weights
    bits, largest = statistics.survivors, weights.softmax
    has_more = weights.uniform is not None or weights.entropy is not None
    if has_more:
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
        smoothed=has_more,
        dense=0 if leaves_dense is None else leaves_dense.data.ptr,
    )


def _largest_weight(p: Problem, weights: Weights) -> Any:
    """(N,): the largest magnitude of a token's softmax weight, entropy weight, and uniform weight times largest class weight.

    The largest class weight is taken to be at least 1.
    """
    result = abs(weights.softmax)
    if weights.uniform is not None:
        largest = 1 if p.class_weights is None else p.xp.maximum(p.class_weights.max(), 1)
        result = p.xp.maximum(result, terms.times(abs(weights.uniform), largest))
    return result if weights.entropy is None else p.xp.maximum(result, abs(weights.entropy))


def output_of(gradient: Any, tiles: int) -> Any:
    """The `Output` of a gradient, or of None."""
    if gradient is None:
        return Output(address=0, pitch_bytes=0, is_float32=False, tiles=tiles)
    pitch_bytes, is_float32 = matrices.pitch_bytes(gradient), gradient.dtype == np.float32
    return Output(address=gradient.data.ptr, pitch_bytes=pitch_bytes, is_float32=is_float32, tiles=tiles)
