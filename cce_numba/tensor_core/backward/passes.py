"""The host's part of a backward that does not depend on its kernel: which passes there are, and the survey of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cce_numba import survivors, terms
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.integers import ceil_div
from cce_numba.survivors import SURVIVOR_BLOCK, coarse_eps_of
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.backward.phases import RUNS_ALWAYS, RUNS_IF_DENSE, RUNS_IF_FILTERED
from cce_numba.tensor_core.backward.several import (
    AT_ONCE,
    THREADS,
    make_invert_kernel,
    make_place_kernel,
    make_take_from_bias_kernel,
)
from cce_numba.tensor_core.distillation import Taught
from cce_numba.tensor_core.records import (
    Chance,
    NoTargets,
    Output,
    PlacedTargets,
    SeveralTargets,
    SurvivorBits,
    WeightedTokens,
)
from cce_numba.tensor_core.survey import Products, survey
from cce_numba.tensor_core.survey.tables import COLUMN_TILE


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
        taught: the teacher, if the loss is a divergence from one (`tensor_core.distillation.Taught`).
    """

    p: Problem
    statistics: Statistics
    weights: Weights
    e: Any
    c: Any
    adds: bool
    taught: Taught | None = None

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
    p: Problem,
    statistics: Statistics,
    weights: Weights,
    into: Gradients,
    adds: bool,
    make: Callable[..., None],
    taught: Taught | None = None,
) -> None:
    """Makes all gradients by calls of `make`. Where dE and dC have filters of their own, each takes a pass of its own.

    One case does better: if dC is exact and so much survives that computing all of dE is faster than picking, which the device
    finds out, then the first pass does nothing, and the second computes both.

    make: `make(call, into, keep_all, leaves_dense=None, e_if=None)` makes gradients that share a filter. call: a `Call`.
        keep_all: whether all columns survive, whatever is recorded. leaves_dense: (1,) int32, which says afterwards whether the
        survey was dense; the pass did nothing then. e_if: (1,) int32: dE is computed only if this is not 0.
    taught: see `Call`.
    """
    call = Call(p, statistics, weights, matrices.aligned(p.e), matrices.aligned(p.c), adds, taught)
    if p.options.batch_invariant and p.dtype == np.float16 and into.e is not None:
        _make_e_by_token(call, into.e, make)
        into = Gradients(c=into.c, bias=into.bias)
        if into.c is None and into.bias is None:
            return
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


def _make_e_by_token(call: Call, d_e: Any, make: Callable[..., None]) -> None:
    """Makes an exact dE such that no token's row depends on the weights of others, for float16.

    G is rounded to float16 with the scale of the largest weight of all, by which small numbers keep more digits or fewer. Here
    each token's weights are multiplied by a power of two of its own before, so that the largest is always in [1, 2), and its
    row is divided by that in float32.
    """
    p, xp = call.p, call.p.xp
    largest = xp.maximum(_largest_weight(p, call.weights), _target_weight(call.weights))
    _, exponent = xp.frexp(xp.where((largest > 0) & (largest < np.inf), largest, np.float32(1)))
    down, up = (xp.ldexp(xp.ones(p.N, np.float32), sign * (exponent - 1)) for sign in (-1, 1))
    scaled = replace(
        call.weights,
        softmax=call.weights.softmax * down,
        target=call.weights.target * (down if p.K is None else down[:, None]),
        uniform=None if call.weights.uniform is None else call.weights.uniform * down,
        entropy=None if call.weights.entropy is None else call.weights.entropy * down,
    )
    rows = xp.zeros((p.N, p.D), np.float32)
    make(replace(call, weights=scaled, adds=False), Gradients(e=rows), True)
    rows *= up[:, None]
    if call.adds:
        rows += d_e.astype(np.float32)
    d_e[...] = rows


def _target_weight(weights: Weights) -> Any:
    """(N,): the magnitude of what a token's target gives to G, of several targets the sum, as the survey takes it."""
    return abs(weights.target) if weights.target.ndim == 1 else abs(weights.target).sum(axis=1)


def run_survey(
    call: Call, layout: Any, base: int, keep_all: bool, products: Products, leaves_dense: Any, fixed_tiles: int = 0
) -> None:  # fmt: skip
    """Launches the survey, whose tables begin at address `base`; keep_all, leaves_dense: as in `in_passes`.

    fixed_tiles: tiles of a round of a dense survey; 0 if as many as fit.
    """
    p, statistics, weights = call.p, call.statistics, call.weights
    bits, largest = statistics.survivors, weights.softmax
    has_more = weights.uniform is not None or weights.entropy is not None
    if has_more:
        largest = _largest_weight(p, weights)
    target_weight, target_logit, targets = weights.target, statistics.target_logit, p.targets
    if p.K is not None:
        target_weight, target_logit, targets = _in_place_of_targets(p, statistics, weights)
    tokens = WeightedTokens(
        listed=statistics.tokens.data.ptr,
        n_valid=statistics.n_valid.data.ptr,
        softmax_weight=weights.softmax.data.ptr,
        target_weight=target_weight.data.ptr,
        largest_weight=largest.data.ptr,
        max_logit=statistics.max_logit.data.ptr,
        log_sum=statistics.log_sum.data.ptr,
        target_logit=target_logit.data.ptr,
        targets=targets.data.ptr,
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
        fixed_tiles=fixed_tiles,
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


def _in_place_of_targets(p: Problem, statistics: Statistics, weights: Weights) -> tuple[Any, Any, Any]:
    """(N,) each, what the survey takes of several targets as of one: weight, logit and entry.

    The weight is the sum of magnitudes, as large as what the targets can give an entry of G. The logit is NaN if a target is
    out of range, else 0. The entry is -1: the kernel knows targets by `PlacedTargets`.
    """
    lost = p.xp.isnan(statistics.target_logit).any(axis=1)
    logit = p.xp.where(lost, np.float32(np.nan), np.float32(0))
    return _target_weight(weights), logit, p.xp.full(p.N, -1, np.int64)


@dataclass(frozen=True, eq=False)
class Placed:
    """Targets of tokens that have several, or none, as the backward's kernel takes them.

    Attributes:
        addresses: `PlacedTargets`, or `NoTargets`.
        arrays: what is at these addresses, which must live as long.
    """

    addresses: Any
    arrays: Any = None


def place_targets(call: Call, layout: Any, base: int, d_bias: Any) -> tuple[Placed, Any]:
    """Launches what places the targets of tokens that have several, after the survey; `(placed, sums)`.

    sums: (V,) int64, what the targets give to the gradient of the bias, if d_bias is wanted; else None.
    """
    p, xp = call.p, call.p.xp
    if p.K is None:
        return Placed(NoTargets()), None
    tables, sizes, K = layout.at(base), layout.sizes, ceil_div(p.K, AT_ONCE) * AT_ONCE
    places = layout.blocks * K * SURVIVOR_BLOCK
    of_place, column_of = xp.empty((4, places), np.int32), xp.empty(p.V, np.int32)
    placed = PlacedTargets(*(row.data.ptr for row in of_place), K)
    sums = None if d_bias is None else xp.zeros(p.V, np.int64)
    make_invert_kernel().launch(ceil_div(layout.column_tiles * COLUMN_TILE, THREADS), sizes, tables, column_of.data.ptr)
    make_place_kernel(p.options.softcap is not None).launch(
        ceil_div(places, THREADS),
        SeveralTargets(p.targets.data.ptr, p.K, p.options.ignore_index, call.statistics.target_logit.data.ptr),
        call.weights.target.data.ptr,
        column_of.data.ptr,
        p.options.softcap or 0.0,
        sizes,
        tables,
        placed,
        0 if sums is None else sums.data.ptr,
    )
    return Placed(placed, of_place), sums


def bytes_beside(p: Problem) -> int:
    """Memory that a backward takes beside its workspace.

    There are each token's largest weight, where there are weights beside those of softmax and target; of several targets what
    takes their place in the survey, and where they stand in G; and rows of `_make_e_by_token`.
    """
    size = 4 * p.N if p.options.smooths_capped or p.options.entropy else 0
    if p.K is not None:
        places = ceil_div(p.N, SURVIVOR_BLOCK) * SURVIVOR_BLOCK * ceil_div(p.K, AT_ONCE) * AT_ONCE
        size += 16 * places + 16 * p.N + 12 * p.V
    if p.options.batch_invariant and p.dtype == np.float16:
        size += 4 * p.N * p.D
    return size


def take_targets_from(d_bias: Any, sums: Any, tables: Any) -> None:
    """Launches what takes the targets' part from the gradient of the bias; sums: as `place_targets` gives them."""
    V = len(d_bias)
    make_take_from_bias_kernel().launch(ceil_div(V, THREADS), sums.data.ptr, tables, V, d_bias.data.ptr)


def output_of(gradient: Any, tiles: int) -> Any:
    """The `Output` of a gradient, or of None."""
    if gradient is None:
        return Output(address=0, pitch_bytes=0, is_float32=False, tiles=tiles)
    pitch_bytes, is_float32 = matrices.pitch_bytes(gradient), gradient.dtype == np.float32
    return Output(address=gradient.data.ptr, pitch_bytes=pitch_bytes, is_float32=is_float32, tiles=tiles)
