"""The launches of a backward: the survey of what survives, then one persistent kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba import gpu, survivors, terms
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.hopper import tensor_map
from cce_numba.hopper.backward.begin import make_begin_kernel
from cce_numba.hopper.backward.kernel import make_backward_kernel
from cce_numba.hopper.backward.records import Outputs, Shape
from cce_numba.hopper.backward.scheduler import RUNS_ALWAYS, RUNS_IF_DENSE, RUNS_IF_FILTERED
from cce_numba.hopper.backward.tiles import PANEL, BackwardTiles
from cce_numba.hopper.backward.workspace import layout_of
from cce_numba.integers import ceil_div
from cce_numba.survivors import coarse_eps_of
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.problem import matrix_of, terms_of
from cce_numba.tensor_core.records import Chance, Output, SurvivorBits, WeightedTokens
from cce_numba.tensor_core.survey import Products, survey

TILES, CLUSTER_TILES = BackwardTiles(cluster=1), BackwardTiles(cluster=2)


def backward(p: Problem, statistics: Statistics, weights: Weights, into: Gradients, adds: bool) -> None:
    """See `backend.Backend`. Where dE and dC have filters of their own, each takes a pass of its own.

    One case does better: if dC is exact and so much survives that computing all of dE is faster than picking, which the device
    finds out, then the first pass does nothing, and the second computes both.
    """
    call = _Call(p, statistics, weights, matrices.aligned(p.e), matrices.aligned(p.c), adds)
    filtered = statistics.survivors is not None
    e_filtered, c_filtered = filtered and p.options.filter_eps_e is not None, filtered and p.options.filter_eps_c is not None
    if e_filtered == c_filtered or into.e is None or (into.c is None and into.bias is None):
        keep_all = not (c_filtered if into.e is None else e_filtered)
        _pass(call, into, keep_all)
    elif e_filtered:
        is_dense = p.xp.empty(1, np.int32)
        _pass(call, Gradients(e=into.e), keep_all=False, leaves_dense=is_dense)
        _pass(call, into, keep_all=True, e_if=is_dense)
    else:
        _pass(call, Gradients(e=into.e), keep_all=True)
        _pass(call, Gradients(c=into.c, bias=into.bias), keep_all=False)


@dataclass(frozen=True, eq=False)
class _Call:
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


def _pass(call: _Call, into: Gradients, keep_all: bool, *, leaves_dense: Any = None, e_if: Any = None) -> None:
    """Makes gradients that share a filter.

    Args:
        call: what is known of the backward.
        into: where the gradients go. The rows of `into.e` of tokens that take no part are left as they are.
        keep_all: whether all columns survive, whatever the forward recorded.
        leaves_dense: (1,) int32, which says afterwards whether the survey was dense; the pass did nothing then.
        e_if: (1,) int32: dE is computed only if this is not 0.
    """
    p, statistics, weights, adds = call.p, call.statistics, call.weights, call.adds
    d_e = None if into.e is None else matrices.whole_chunks(into.e, with_values=True)
    d_c = None if into.c is None else matrices.whole_chunks(into.c, with_values=adds)
    d_bias = None if into.bias is None else p.xp.zeros(p.V, np.float32)
    tiles_of_row = ceil_div(p.D, TILES.block_v)
    d_tiles_e = 0 if d_e is None else tiles_of_row
    # The bias alone takes one job for each tile of columns.
    d_tiles_c = int(d_bias is not None) if d_c is None else tiles_of_row
    outputs = Outputs(
        e=_output(d_e, d_tiles_e), c=_output(d_c, d_tiles_c), bias=0 if d_bias is None else d_bias.data.ptr, adds=adds
    )
    c_address = 0 if d_c is None else d_c.data.ptr
    layout = layout_of(p, into, 0 if d_c is None or adds else p.V * outputs.c.pitch_bytes)
    scratch = p.xp.empty(layout.nbytes, np.uint8)
    base = scratch.data.ptr
    maps, counters, tables = (base + layout.offsets[part] for part in ("maps", "counters", "survey"))
    a_map = (
        tensor_map.encode(call.e, PANEL, PANEL),
        tensor_map.encode(call.c, PANEL, PANEL),
        *layout.g_maps(base, c_address, p.dtype),
    )
    make_begin_kernel().launch(1, *a_map, maps, counters, layout.counters)
    products = Products(d_tiles_c, d_tiles_e, d_tiles_c > 0 and not adds, 0 if e_if is None else e_if.data.ptr)
    _survey(p, statistics, weights, layout.survey, tables, keep_all, products, leaves_dense)
    scaled, smoothed, entropic = p.logit_scale is not None, weights.uniform is not None, weights.entropy is not None
    # The neighbouring jobs of a cluster must take equally many stages, so those of dE and dC must be tiles of the same rows.
    tiles = CLUSTER_TILES if d_tiles_c % 2 == 0 and d_tiles_e % 2 == 0 else TILES
    by_chance = p.options.is_unbiased and not keep_all
    capped, with_sums = p.options.softcap is not None, d_bias is not None
    # If nearly all survives, all do: nothing is left to chance then, and the kernel is another.
    runs = [(by_chance, RUNS_IF_FILTERED)] if by_chance or leaves_dense is not None else [(False, RUNS_ALWAYS)]
    if by_chance and leaves_dense is None:
        runs.append((False, RUNS_IF_DENSE))
    for chance_decides, when in runs:
        eps, seed = (p.options.filter_eps, statistics.draw_seed.data.ptr) if chance_decides else (0.0, 0)
        kernel = make_backward_kernel(tiles, p.dtype, capped, with_sums, scaled, smoothed, chance_decides, entropic)
        kernel.launch(
            gpu.current().multiprocessors // tiles.cluster * tiles.cluster,
            maps,
            matrix_of(call.e),
            matrix_of(call.c),
            terms_of(p, weights.uniform, weights.entropy),
            Chance(eps=eps, seed=seed),
            statistics.n_valid.data.ptr,
            layout.survey.at(tables),
            when,
            layout.at(base, c_address),
            outputs,
            Shape(blocks=layout.blocks, V=p.V, D=p.D),
        )
    for made, wanted in ((d_e, into.e), (d_c, into.c)):
        if wanted is not None and made is not wanted:
            wanted[...] = made
    if into.bias is not None:
        into.bias[...] = d_bias + into.bias.astype(np.float32) if adds else d_bias


def _survey(
    p: Problem,
    statistics: Statistics,
    weights: Weights,
    layout: Any,
    base: int,
    keep_all: bool,
    products: Products,
    leaves_dense: Any,
) -> None:
    """Launches the survey, whose tables begin at address `base`. leaves_dense: as in `_pass`."""
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


def _output(gradient: Any, tiles: int) -> Any:
    """The `Output` of a gradient, or of None."""
    if gradient is None:
        return Output(address=0, pitch_bytes=0, is_float32=False, tiles=tiles)
    pitch_bytes, is_float32 = matrices.pitch_bytes(gradient), gradient.dtype == np.float32
    return Output(address=gradient.data.ptr, pitch_bytes=pitch_bytes, is_float32=is_float32, tiles=tiles)
