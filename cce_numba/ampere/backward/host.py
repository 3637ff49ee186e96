"""The launches of a backward: the survey of what survives, then one persistent kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba import gpu, interchange
from cce_numba.ampere.backward.kernel import make_backward_kernel
from cce_numba.ampere.backward.records import Outputs, Shape
from cce_numba.ampere.backward.tiles import backward_tiles_for
from cce_numba.ampere.backward.workspace import layout_of
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.integers import ceil_div
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.backward.form import GradientForm
from cce_numba.tensor_core.backward.passes import Call, in_passes, output_of, place_targets, run_survey, take_targets_from
from cce_numba.tensor_core.problem import matrix_of, terms_of
from cce_numba.tensor_core.survey import Products


def backward(p: Problem, statistics: Statistics, weights: Weights, into: Gradients, adds: bool) -> None:
    """See `backend.Backend`. Where dE and dC have filters of their own, each takes a pass of its own."""
    in_passes(p, statistics, weights, into, adds, _pass)


def _pass(call: Call, into: Gradients, keep_all: bool, *, leaves_dense: Any = None, e_if: Any = None) -> None:
    """Makes gradients that share a filter; see `passes.in_passes`. Rows of dE of tokens without weight stay as they are."""
    p, weights, adds = call.p, call.weights, call.adds
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
    interchange.write_zeros(scratch[: 4 * layout.counters])  # they are the first
    base = scratch.data.ptr
    tables = base + layout.offsets["survey"]
    products = Products(d_tiles_c, d_tiles_e, d_tiles_c > 0 and not adds, 0 if e_if is None else e_if.data.ptr)
    run_survey(call, layout.survey, tables, keep_all, products, leaves_dense)
    placed, bias_sums = place_targets(call, layout.survey, tables, d_bias)
    for by_chance, runs, chance in call.runs(keep_all, leaves_dense):
        form = GradientForm.of(p, weights, with_sums=d_bias is not None, by_chance=by_chance)
        kernel = make_backward_kernel(tiles, p.dtype, form, p.options.allow_tf32)
        kernel.launch(
            device.multiprocessors,
            matrix_of(call.e),
            matrix_of(call.c),
            terms_of(p, weights.uniform, weights.entropy),
            chance,
            call.statistics.n_valid.data.ptr,
            layout.survey.at(tables),
            runs,
            layout.at(base),
            outputs,
            Shape(blocks=layout.blocks, V=p.V, D=p.D),
            placed.addresses,
        )
    if bias_sums is not None:
        take_targets_from(d_bias, bias_sums, layout.survey.at(tables))
    for made, wanted in ((d_e, into.e), (d_c, into.c)):
        if wanted is not None and made is not wanted:
            wanted[...] = made
    if into.bias is not None:
        into.bias[...] = d_bias + into.bias.astype(np.float32) if adds else d_bias
