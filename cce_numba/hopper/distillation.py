"""A student's head and a teacher's on Hopper: what `cce_numba.distillation` asks of a backend.

Both heads' log-sum-exps are known, by a plain forward each. Then the kernel of the forward runs once more with the teacher: for
each tile of 128 tokens x 192 entries the teacher's products come first and are parked as logarithms of probabilities
(`tensor_core.parked`), and the student's follow in the same registers and are folded with them. The kernel of the backward does
the same where it computes logits again. All else is as without a teacher. Gradients are exact: nothing is filtered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cce_numba import gpu
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Weights
from cce_numba.hopper import tensor_map
from cce_numba.hopper.backward import host as backward_host
from cce_numba.hopper.backward.begin import make_begin_kernel
from cce_numba.hopper.forward.kernel import make_forward_kernel
from cce_numba.hopper.forward.layout import Layout
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.launch.divergence import Divergence
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.distillation import Head, Taught
from cce_numba.tensor_core.folds import divergence_of, number_count
from cce_numba.tensor_core.found import NO_SURVIVORS
from cce_numba.tensor_core.merge import Split, ctas_for, make_merge_kernel
from cce_numba.tensor_core.problem import matrix_of, terms_of
from cce_numba.tensor_core.records import FoundOfHeads, Parts, Tokens, Vocabulary

__all__ = ["Divergence", "Head", "backward", "divergence", "tiles_of"]


def tiles_of(student: Problem, teacher: Problem) -> HopperTiles:
    """Those of the forward, whatever the heads are."""
    return HopperTiles()


def divergence(
    student: Head, teacher: Head, which: Divergence, tiles: HopperTiles, record: bool = False
) -> tuple[Any, Any, Head]:
    """(N,) each token's divergence, and the sum of what is the student's in its gradient; 0 where ignored; and the student.

    The forward KL has no such sum; anything is returned for it. Nothing is recorded.
    """
    p = student.problem
    p, fold = replace(p, e=matrices.aligned(p.e), c=matrices.aligned(p.c)), divergence_of(which)
    results = p.xp.zeros((len(fold.results), p.N), np.float32)
    if p.N:
        _launch(replace(student, problem=p), teacher, which, tiles, results)
    return results[0], results[-1], student


def _launch(student: Head, teacher: Head, which: Divergence, tiles: HopperTiles, results: Any) -> None:
    p, found, folds = student.problem, student.statistics, (divergence_of(which),)
    layout = Layout.of(p, tiles, teacher.problem.D)
    taught = Taught.of(student, teacher, which, layout.workers * tiles.cluster, tiles.consumers)
    scratch = p.xp.empty(2 * layout.map_bytes + 4 * number_count(folds) * layout.part_numbers, np.uint8)
    maps, parts = scratch.data.ptr, Parts(scratch.data.ptr + 2 * layout.map_bytes, layout.part_numbers)
    make_begin_kernel().launch(
        1,
        tensor_map.encode(p.e, tiles.block_n, tiles.block_d),
        tensor_map.encode(p.c, tiles.block_v // tiles.cluster, tiles.block_d),
        tensor_map.encode(taught.e, tiles.block_n, tiles.block_d),
        tensor_map.encode(taught.c, tiles.block_v // tiles.cluster, tiles.block_d),
        (),
        maps,
        maps,
        0,
    )
    bias_dtype = None if p.bias is None else np.dtype(p.bias.dtype)
    capped, scaled = p.options.softcap is not None, p.logit_scale is not None
    kernel = make_forward_kernel(tiles, p.dtype, bias_dtype, capped, scaled, folds, layout.fixed, taught.form)
    merge_kernel = make_merge_kernel(tiles.group_n, folds, layout.fixed)
    of_heads = FoundOfHeads(results.data.ptr, p.N, taught.heads)
    for (_, first_tile, last_tile), (first_token, n_tokens) in layout.launches(False):
        batch = Tokens(found.tokens.data.ptr + 4 * first_token, found.n_valid.data.ptr, first_token, n_tokens)
        kernel.launch(
            layout.workers * tiles.cluster,
            maps,
            matrix_of(p.e),
            batch,
            layout.per_round,
            terms_of(p),
            of_heads,
            False,
            parts,
            NO_SURVIVORS,
            Vocabulary(first_tile, last_tile - first_tile, 0, p.V),
            p.D,
            taught.teacher,
        )
        split = Split(layout.workers, layout.per_round, last_tile - first_tile, p.V)
        merge_kernel.launch(ctas_for(n_tokens), parts, split, batch, of_heads, NO_SURVIVORS)


def backward(
    student: Head,
    teacher: Head,
    which: Divergence,
    of_student: Any,
    d_token: Any,
    tiles: HopperTiles,
    into: Gradients,
    adds: bool,
) -> None:
    """Writes the student's gradients, or adds them, as `backend.Backend.backward` does.

    of_student: of `divergence`. d_token (N,): what flows into each token's divergence, times its logit scale.
    """
    p = student.problem
    weight = p.xp.ascontiguousarray(d_token)
    weights = Weights(weight, p.xp.zeros_like(weight))
    taught = Taught.of(student, teacher, which, gpu.current().multiprocessors, tiles.consumers, of_student)
    backward_host.backward(p, student.statistics, weights, into, adds, taught)
