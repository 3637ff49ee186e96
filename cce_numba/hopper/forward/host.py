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
from cce_numba.tensor_core.found import Arrays, begin
from cce_numba.tensor_core.launches import Part, launch_parts
from cce_numba.tensor_core.problem import matrix_of, terms_of
from cce_numba.tensor_core.records import NoTeacher, Parts


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

    def launch(part: Part) -> None:
        kernel.launch(
            layout.workers * tiles.cluster,
            maps,
            e_rows,
            part.batch,
            layout.per_round,
            terms,
            found,
            part.has_earlier,
            parts,
            part.survivors,
            part.vocabulary,
            p.D,
            NoTeacher(),
        )

    launch_parts(p, layout, folds, arrays, e, c, parts, launch)
