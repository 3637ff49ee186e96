"""All launches of a forward: the list of tokens, target logits, then tiles of logits and their merge, part by part."""

from __future__ import annotations

from typing import Any

import numpy as np

from cce_numba.ampere.forward.kernel import make_forward_kernel
from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.tensor_core import found as tensor_core_found
from cce_numba.tensor_core.folds import Fold, number_count
from cce_numba.tensor_core.found import Arrays, begin
from cce_numba.tensor_core.launches import Part, launch_parts
from cce_numba.tensor_core.layout import Layout
from cce_numba.tensor_core.problem import matrix_of, terms_of
from cce_numba.tensor_core.records import Parts


def forward(p: Problem, layout: Layout, record: bool, folds: tuple[Fold, ...] | None = None) -> Statistics:
    """What the folds find of each token; by default those that the problem wants, with survivors if `record`."""
    return tensor_core_found.forward(p, layout, record, folds, _launch)


def indexed_dot(p: Problem, layout: Layout) -> Any:
    """(N,) float32: the target's logit, a dot product by itself; 0 where ignored, NaN for a target out of range."""
    return tensor_core_found.indexed_dot(p, layout)


def _launch(p: Problem, layout: Layout, folds: tuple[Fold, ...], arrays: Arrays) -> None:
    tiles, found = layout.tiles, arrays.found
    e, c = layout.e_in_reach(p), layout.c_in_reach(p)
    scratch = p.xp.empty(layout.scratch_bytes(number_count(folds)), np.uint8)
    parts = Parts(scratch.data.ptr, layout.part_numbers)
    begin(p, arrays, e)
    terms, e_rows, c_rows = terms_of(p), matrix_of(e), matrix_of(c)
    bias_dtype = None if p.bias is None else np.dtype(p.bias.dtype)
    capped, scaled, whole = p.options.softcap is not None, p.logit_scale is not None, p.D * p.dtype.itemsize % 16 == 0
    tf32 = p.options.allow_tf32
    kernel = make_forward_kernel(tiles, p.dtype, bias_dtype, capped, scaled, whole, folds, layout.fixed, tf32)

    def launch(part: Part) -> None:
        kernel.launch(
            layout.workers,
            e_rows,
            c_rows,
            part.batch,
            layout.per_round,
            terms,
            found,
            part.has_earlier,
            parts,
            part.survivors,
            part.vocabulary,
            p.D,
        )

    launch_parts(p, layout, folds, arrays, e, c, parts, launch)
