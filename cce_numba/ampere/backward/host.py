"""The launches of a backward: the survey of what survives, then one persistent kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba import gpu
from cce_numba.ampere.backward.kernel import make_backward_kernel
from cce_numba.ampere.backward.records import Outputs, Shape
from cce_numba.ampere.backward.tiles import backward_tiles_for
from cce_numba.ampere.backward.workspace import layout_of
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.integers import ceil_div
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.backward.passes import in_passes, output_of, run_survey
from cce_numba.tensor_core.problem import matrix_of, terms_of
from cce_numba.tensor_core.records import Chance
from cce_numba.tensor_core.survey import Products


def backward(p: Problem, statistics: Statistics, weights: Weights, into: Gradients, adds: bool) -> None:
    """See `backend.Backend`. Where dE and dC have filters of their own, each takes a pass of its own."""
    in_passes(p, statistics, weights, into, adds, _pass)


def _pass(
    p: Problem,
    statistics: Statistics,
    weights: Weights,
    e: Any,
    c: Any,
    into: Gradients,
    adds: bool,
    keep_all: bool,
) -> None:
    """Makes gradients that share a filter; see `passes.in_passes`. Rows of dE of tokens without weight stay as they are."""
    d_e = None if into.e is None else matrices.whole_chunks(into.e, with_values=True)
    d_c = None if into.c is None else matrices.whole_chunks(into.c, with_values=adds)
    d_bias = None if into.bias is None else p.xp.zeros(p.V, np.float32)
    device = gpu.current()
    tiles = backward_tiles_for(device.compute_capability)
    tiles_of_row = ceil_div(p.D, tiles.block_v)
    d_tiles_e = 0 if d_e is None else tiles_of_row
    # The bias alone takes one job for each tile of columns.
    d_tiles_c = int(d_bias is not None) if d_c is None else tiles_of_row
    outputs = Outputs(
        e=output_of(d_e, d_tiles_e), c=output_of(d_c, d_tiles_c), bias=0 if d_bias is None else d_bias.data.ptr, adds=adds
    )
    layout = layout_of(p, into)
    scratch = p.xp.empty(layout.nbytes, np.uint8)
    scratch[: 4 * layout.counters] = 0  # they are the first
    base = scratch.data.ptr
    tables, products = base + layout.offsets["survey"], Products(d_tiles_c, d_tiles_e, d_tiles_c > 0 and not adds)
    run_survey(p, statistics, weights, layout.survey, tables, keep_all, products)
    capped, scaled, smoothed = p.options.softcap is not None, p.logit_scale is not None, weights.uniform is not None
    by_chance = p.options.is_unbiased and not keep_all
    chance = Chance(eps=p.options.filter_eps, seed=statistics.draw_seed.data.ptr) if by_chance else Chance(eps=0.0, seed=0)
    kernel = make_backward_kernel(tiles, p.dtype, capped, d_bias is not None, scaled, smoothed, by_chance)
    kernel.launch(
        device.multiprocessors,
        matrix_of(e),
        matrix_of(c),
        terms_of(p, weights.uniform),
        chance,
        statistics.n_valid.data.ptr,
        layout.survey.at(tables),
        layout.at(base),
        outputs,
        Shape(blocks=layout.blocks, V=p.V, D=p.D),
    )
    for made, wanted in ((d_e, into.e), (d_c, into.c)):
        if wanted is not None and made is not wanted:
            wanted[...] = made
    if into.bias is not None:
        into.bias[...] = d_bias + into.bias.astype(np.float32) if adds else d_bias
