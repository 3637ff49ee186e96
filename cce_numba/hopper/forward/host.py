"""All launches of a forward: the list of tokens, target logits, then tiles of logits and their merge, part by part."""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.hopper import tensor_map
from cce_numba.hopper.forward.kernel import make_forward_kernel
from cce_numba.hopper.forward.layout import Layout
from cce_numba.tensor_core import found as tensor_core_found
from cce_numba.tensor_core.folds import Fold, number_count
from cce_numba.tensor_core.found import NO_SURVIVORS, Arrays, batch_of, begin, launches_of
from cce_numba.tensor_core.layout import copy_rows
from cce_numba.tensor_core.merge import Split, ctas_for, make_merge_kernel
from cce_numba.tensor_core.problem import matrix_of, terms_of
from cce_numba.tensor_core.records import NoTeacher, Parts, Vocabulary
from cce_numba.tensor_core.top_k import find_best


def forward(
    p: Problem, layout: Layout, record: bool, folds: tuple[Fold, ...] | None = None, kept_tiles: int = 0
) -> Statistics:  # fmt: skip
    """What the folds find of each token; by default those that the problem wants, with survivors if `record`.

    kept_tiles: of each block of tokens, whose logits are kept for the backward.
    """
    return tensor_core_found.forward(p, layout, record, folds, _launch, kept_tiles)


def indexed_dot(p: Problem, layout: Layout) -> Any:
    """(N,) float32: the target's logit, a dot product by itself; 0 where ignored, NaN for a target out of range."""
    return tensor_core_found.indexed_dot(p, layout)


def _launch(p: Problem, layout: Layout, folds: tuple[Fold, ...], arrays: Arrays) -> None:
    tiles, found = layout.tiles, arrays.found
    e, c = layout.e_in_reach(p), layout.c_in_reach(p)
    scratch = p.xp.empty(layout.scratch_bytes(number_count(folds)), np.uint8)  # tensor maps, then partial results
    maps, parts = scratch.data.ptr, Parts(scratch.data.ptr + layout.map_bytes, layout.part_numbers)
    e_map = tensor_map.encode(e, tiles.block_n, tiles.block_d)
    c_map = tensor_map.encode(c, tiles.block_v // tiles.cluster, tiles.block_d)
    begin(p, arrays, e, (*e_map, *c_map), maps)
    terms, e_rows = terms_of(p), matrix_of(e)
    bias_dtype = None if p.bias is None else np.dtype(p.bias.dtype)
    capped, scaled = p.options.softcap is not None, p.logit_scale is not None
    kernel = make_forward_kernel(tiles, p.dtype, bias_dtype, capped, scaled, folds, layout.fixed)
    merge_kernel = make_merge_kernel(tiles.group_n, folds, layout.fixed)
    in_reach = None
    for (first_row, first_tile, last_tile), (first_token, n_tokens) in launches_of(p, layout, arrays):
        if c is not p.c and first_row != in_reach:
            copy_rows(p.c[first_row : first_row + layout.c_rows], c)
            in_reach = first_row
        vocabulary = Vocabulary(first_tile, last_tile - first_tile, first_row, p.V)
        split = Split(layout.workers, layout.per_round, last_tile - first_tile, p.V)
        batch, kept = batch_of(arrays, first_token, n_tokens, tiles.block_n)
        kernel.launch(
            layout.workers * tiles.cluster,
            maps,
            e_rows,
            batch,
            layout.per_round,
            terms,
            found,
            first_tile > 0,
            parts,
            kept,
            vocabulary,
            p.D,
            NoTeacher(),
        )
        # What is lost is only known once all of the vocabulary is in.
        at_last = kept if last_tile == layout.n_tiles else NO_SURVIVORS
        merge_kernel.launch(ctas_for(n_tokens), parts, split, batch, found, at_last)
        if layout.with_best and last_tile == layout.n_tiles:
            find_best(p, layout, e, terms, batch, arrays)
