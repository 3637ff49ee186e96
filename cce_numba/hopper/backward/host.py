"""The launches of a backward: the survey of what survives, then one persistent kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba import gpu
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.hopper import tensor_map
from cce_numba.hopper.backward.begin import make_begin_kernel
from cce_numba.hopper.backward.kernel import make_backward_kernel
from cce_numba.hopper.backward.records import Outputs, Shape
from cce_numba.hopper.backward.tiles import PANEL, BackwardTiles
from cce_numba.hopper.backward.workspace import layout_of
from cce_numba.integers import ceil_div
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.backward.form import GradientForm
from cce_numba.tensor_core.backward.passes import Call, in_passes, output_of, place_targets, run_survey, take_targets_from
from cce_numba.tensor_core.distillation import Taught
from cce_numba.tensor_core.kept import bytes_of
from cce_numba.tensor_core.problem import matrix_of, terms_of
from cce_numba.tensor_core.survey import Products

TILES, CLUSTER_TILES = BackwardTiles(cluster=1), BackwardTiles(cluster=2)


def backward(
    p: Problem, statistics: Statistics, weights: Weights, into: Gradients, adds: bool, taught: Taught | None = None
) -> None:  # fmt: skip
    """See `backend.Backend`. Where dE and dC have filters of their own, each takes a pass of its own. taught: see `Call`."""
    in_passes(p, statistics, weights, into, adds, _pass, taught)


def _pass(call: Call, into: Gradients, keep_all: bool, *, leaves_dense: Any = None, e_if: Any = None) -> None:
    """Makes gradients that share a filter; see `passes.in_passes`. Rows of dE of tokens that take no part stay as they are."""
    p, weights, adds, taught = call.p, call.weights, call.adds, call.taught
    d_e = None if into.e is None else matrices.whole_chunks(into.e, with_values=True)
    d_c = None if into.c is None else matrices.whole_chunks(into.c, with_values=adds)
    d_bias = None if into.bias is None else p.xp.zeros(p.V, np.float32)
    tiles_of_row = ceil_div(p.D, TILES.block_v)
    d_tiles_e = 0 if d_e is None else tiles_of_row
    # The bias alone takes one job for each tile of columns.
    d_tiles_c = int(d_bias is not None) if d_c is None else tiles_of_row
    outputs = Outputs(
        e=output_of(d_e, d_tiles_e), c=output_of(d_c, d_tiles_c), bias=0 if d_bias is None else d_bias.data.ptr, adds=adds
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
    teacher_maps: tuple[Any, ...] = ()
    if taught is not None:
        teacher_maps = tensor_map.encode(taught.e, PANEL, PANEL) + tensor_map.encode(taught.c, PANEL, PANEL)
        all_maps = p.xp.empty(6 * tensor_map.WORDS, np.uint64)
        maps = all_maps.data.ptr
    make_begin_kernel(taught is not None).launch(1, *a_map, teacher_maps, maps, counters, layout.counters)
    products = Products(d_tiles_c, d_tiles_e, d_tiles_c > 0 and not adds, 0 if e_if is None else e_if.data.ptr)
    run_survey(call, layout.survey, tables, keep_all, products, leaves_dense, layout.fixed_tiles)
    placed, bias_sums = place_targets(call, layout.survey, tables, d_bias)
    # The neighbouring jobs of a cluster must take equally many stages, so those of dE and dC must be tiles of the same rows.
    tiles = CLUSTER_TILES if d_tiles_c % 2 == 0 and d_tiles_e % 2 == 0 else TILES
    kept, kept_tiles = call.statistics.kept_logits, 0
    if kept is not None and keep_all:
        kept_tiles = kept.nbytes // bytes_of(layout.blocks, 1)
    workspace = layout.at(base, c_address, kept.data.ptr if kept_tiles else 0, kept_tiles)
    for by_chance, runs, chance in call.runs(keep_all, leaves_dense):
        teacher = None if taught is None else taught.form
        form = GradientForm.of(p, weights, with_sums=d_bias is not None, by_chance=by_chance, teacher=teacher)
        kernel = make_backward_kernel(tiles, p.dtype, form, kept_tiles > 0)
        kernel.launch(
            gpu.current().multiprocessors // tiles.cluster * tiles.cluster,
            maps,
            matrix_of(call.e),
            matrix_of(call.c),
            terms_of(p, weights.uniform, weights.entropy),
            chance,
            call.statistics.n_valid.data.ptr,
            layout.survey.at(tables),
            runs,
            workspace,
            outputs,
            Shape(blocks=layout.blocks, V=p.V, D=p.D),
            placed.addresses if taught is None else taught.distillation(weights.softmax),
        )
    if bias_sums is not None:
        take_targets_from(d_bias, bias_sums, layout.survey.at(tables))
    for made, wanted in ((d_e, into.e), (d_c, into.c)):
        if wanted is not None and made is not wanted:
            wanted[...] = made
    if into.bias is not None:
        into.bias[...] = d_bias + into.bias.astype(np.float32) if adds else d_bias
