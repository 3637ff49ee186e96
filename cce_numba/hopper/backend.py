"""What the tensor-core kernels offer to `backend.Backend`."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cce_numba import gpu, terms
from cce_numba.arguments import DISTILLATION, SEVERAL_TARGETS, Outline, Problem
from cce_numba.backend import Gradients, Statistics, StatisticsForm, Weights
from cce_numba.hopper.tiles import HopperTiles
from cce_numba.interchange import BFLOAT16
from cce_numba.plan import Plan
from cce_numba.survivors import coarse_eps_of
from cce_numba.tensor_core import matrices

EXTRAS: frozenset[str] = frozenset({"entropy", "sum_squares", "top_k", "batch_invariant", SEVERAL_TARGETS, DISTILLATION})
ON_REQUEST: frozenset[np.dtype] = frozenset()
_DTYPES = (np.dtype(np.float16), BFLOAT16)
_LARGEST = 2**31 - 2**10
MOST_BEST = 64  # entries of a token: `tensor_core.top_k` has room for so many
_TILES = HopperTiles()
_FORM = StatisticsForm(
    np.dtype(np.int32),
    _TILES.survivor_block,
    planes=1,
    row_unit_bytes=_TILES.block_v // 8,
    kept_entries=_TILES.block_v,
    kept_tile_bytes=2 * _TILES.survivor_block * (_TILES.block_v + 2),  # 16 bits a logit, and a float32 a token
)
_FORM_WITH_COARSE_PLANE = replace(_FORM, planes=2)


def why_not(p: Outline | Problem) -> str | None:
    """It takes 16-bit CuPy arrays on a GPU of compute capability 9.x."""
    if gpu.SIMULATED:
        return "Numba's simulator knows no tensor cores"
    if (reason := gpu.why_not(p.on_device)) is not None:
        return reason
    if p.dtype not in _DTYPES:
        return f"its tensor cores take float16 and bfloat16, and the arrays are {p.dtype}"
    major, minor = gpu.current().compute_capability
    if major != 9:
        return f"it needs compute capability 9.x (Hopper: H100, H200), and {p.device} has {major}.{minor}"
    if max(p.N, p.V, p.D) > _LARGEST:
        return f"it numbers tokens, entries and terms with 32 bits: N, V and D must be at most {_LARGEST:,}"
    if p.options.top_k > MOST_BEST:
        return f"it finds up to {MOST_BEST} best entries, and top_k is {p.options.top_k}"
    return None


def statistics_form(p: Outline | Problem) -> StatisticsForm:
    """See `backend.Backend`. A row has the bits of whole tiles of the vocabulary."""
    return _FORM if coarse_eps_of(p.options) is None else _FORM_WITH_COARSE_PLANE


@dataclass(frozen=True, eq=False)
class HopperPlan(Plan):
    """layout: how the forward cuts the problem (`forward.layout.Layout`)."""

    layout: Any = None


_plans: dict[Any, HopperPlan] = {}  # made so far: training asks for the same one again and again


def plan(p: Problem) -> HopperPlan:
    """Tiles and bytes."""
    layout = _module("hopper.forward.layout").Layout.of(p, _TILES)
    key = layout, p.dtype, p.device, p.options, p.bias is not None, p.targets is not None, p.K
    if (known := _plans.get(key)) is not None:
        return known
    if len(_plans) >= 256:
        _plans.clear()
    return _plans.setdefault(key, _make_plan(p, layout))


def _make_plan(p: Problem, layout: Any) -> HopperPlan:
    folds, filters, K = _module("tensor_core.folds"), p.options.filters, p.K or 0
    chosen = _module("tensor_core.found").folds_of(p, filters)
    # The tokens' list, the folds' results and, where survivors are recorded, the bound that they begin with: 4 bytes each.
    of_tokens_bytes = 4 * (1 + len(folds.result_names(chosen)) + filters + K + 3 * p.options.top_k) * p.N
    how = f"forward and backward on the tensor cores of {p.device}"
    if layout.e_copied:
        how += f"; e is copied, since {layout.e_copied}"
    if layout.c_copied:
        how += f"; c is copied, {layout.c_rows} rows at a time, since {layout.c_copied}"
    by_rows = [f"{name}, since {why}" for name, x in (("e", p.e), ("c", p.c)) if (why := matrices.why_not_by_rows(x))]
    if by_rows:
        how += f"; for the backward whole copies: {' and '.join(by_rows)}"
    how += f"; {2 * p.N * p.V * p.D / 1e12:.3g} TFLOP of products in the forward, in the backward three times as many, "
    how += "less what the filter leaves out"
    kept_bytes = _FORM.kept_bytes(p.N, p.V, p.options.workspace_bytes) if p.options.keeps_logits(("e", "c")) else 0
    if kept_bytes:
        share = _FORM.kept_tiles(p.N, p.V, p.options.workspace_bytes) * _FORM.kept_entries / p.V
        how += f"; {min(share, 1):.0%} of the logits are kept for the backward, 16 bits each"
    coarse_eps = coarse_eps_of(p.options)
    if coarse_eps is not None:
        how += "; the gradients of c and of the bias leave out 128 sorted entries for 128 tokens at once where all are below "
        how += f"{coarse_eps:.3g}"
    return HopperPlan(
        backend="hopper",
        how=how,
        tiles=_TILES,
        layout=layout,
        stored_logits_bytes=p.logits_bytes,
        forward_bytes=layout.scratch_bytes(folds.number_count(chosen))
        + layout.copy_bytes
        + layout.best_bytes
        + of_tokens_bytes,
        survivor_bytes=statistics_form(p).survivor_bytes(p.N, p.V) if filters else 0,
        backward_bytes=_module("hopper.backward.workspace").workspace_bytes(p)
        + _module("tensor_core.backward.passes").bytes_beside(p),
        coarse_eps=coarse_eps,
        kept_bytes=kept_bytes,
    )


def indexed_dot(p: Problem, plan: Any) -> Any:
    """See `backend.Backend`."""
    return _module("hopper.forward.host").indexed_dot(p, plan.layout)


def forward(p: Problem, plan: Any, *, record_survivors: bool, keep_logits: bool = False) -> Statistics:
    """See `backend.Backend`."""
    tiles = _FORM.kept_tiles(p.N, p.V, p.options.workspace_bytes) if keep_logits else 0
    host = _module("hopper.forward.host")
    launch = functools.partial(host.forward, layout=plan.layout, record=record_survivors, kept_tiles=tiles)
    return _module("tensor_core.programs").forward(p, plan, record_survivors, tiles, launch)


def reduced_nll(p: Problem, statistics: Statistics) -> Any:
    """See `backend.Backend`."""
    return _module("tensor_core.reduction").reduced_nll(p, statistics)


def nll_weight(p: Problem, statistics: Statistics, d_loss: Any) -> Any:
    """See `backend.Backend`."""
    return _module("tensor_core.reduction").nll_weight(p, statistics, d_loss)


def backward(p: Problem, plan: Plan, statistics: Statistics, weights: Weights, into: Gradients, adds: bool) -> None:
    """See `backend.Backend`."""
    adds = terms.write_outer(p, weights.outer, into, adds)
    launch = _module("hopper.backward.host").backward
    _module("tensor_core.programs").backward(p, plan, statistics, weights, into, adds, launch)


@functools.cache
def _module(name: str) -> Any:
    """A module of cce_numba, imported when it is needed: not in the simulator, whose `jit` takes none of what these ask."""
    return importlib.import_module(f"cce_numba.{name}")
