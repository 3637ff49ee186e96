"""Gradients on tensor cores: the survey of what survives, then one persistent kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba import gpu, survivors, terms
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.hopper import tensor_map
from cce_numba.hopper.backward.kernel import make_backward_kernel
from cce_numba.hopper.backward.tiles import PANEL, BackwardTiles
from cce_numba.hopper.backward.workspace import Workspace
from cce_numba.integers import ceil_div
from cce_numba.launch.kernel import Kernel, kernel_factory, pointer_to
from cce_numba.survivors import coarse_eps_of
from cce_numba.tensor_core import matrices
from cce_numba.tensor_core.survey.survey import survey

TILES, PAIRED_TILES = BackwardTiles(cluster=1), BackwardTiles(cluster=2)
_THREADS = 1024


@kernel_factory
def make_begin_kernel() -> Kernel:
    """One CTA."""
    threads, words = _THREADS, tensor_map.WORDS

    def begin_kernel(e_map: Any, c_map: Any, g_map: Any, maps: Any, counters: Any, n_counters: Any) -> None:
        """maps (48,) = e_map, c_map, g_map of 16 words each; counters[:n_counters] = 0."""
        t = cuda.threadIdx.x
        if t < words:
            maps[t] = e_map[t]
            maps[words + t] = c_map[t]
            maps[2 * words + t] = g_map[t]
        for i in range(t, n_counters, threads):
            counters[i] = np.int32(0)

    a_map = types.UniTuple(types.uint64, tensor_map.WORDS)
    signature = types.void(a_map, a_map, a_map, pointer_to(np.uint64), pointer_to(np.int32), types.int32)
    return Kernel(begin_kernel, signature, threads=_THREADS)


def backward(p: Problem, statistics: Statistics, weights: Weights, into: Gradients, adds: bool) -> None:
    """See `backend.Backend`. Where dE and dC have filters of their own, each takes a pass of its own."""
    e, c = matrices.aligned(p.e), matrices.aligned(p.c)
    filtered = statistics.survivors is not None
    e_filtered, c_filtered = filtered and p.options.filter_eps_e is not None, filtered and p.options.filter_eps_c is not None
    if e_filtered == c_filtered or into.e is None or (into.c is None and into.bias is None):
        keep_all = not (c_filtered if into.e is None else e_filtered)
        _pass(p, statistics, weights, e, c, into, adds, keep_all)
    else:
        _pass(p, statistics, weights, e, c, Gradients(e=into.e), adds, not e_filtered)
        _pass(p, statistics, weights, e, c, Gradients(c=into.c, bias=into.bias), adds, not c_filtered)


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
    xp: Any = p.xp
    d_e = None if into.e is None else matrices.whole_chunks(into.e, with_values=True)
    d_c = None if into.c is None else matrices.whole_chunks(into.c, with_values=adds)
    d_bias = None if into.bias is None else xp.zeros(p.V, np.float32)
    e_in_float32, c_in_float32 = (x is not None and x.dtype == np.float32 for x in (d_e, d_c))
    workspace = workspace_of(p, into, keep_all)
    scratch = xp.empty(workspace.nbytes, np.uint8)
    base = scratch.data.ptr
    at = {name: base + offset for name, offset in workspace.offsets.items()}
    box = PANEL, PANEL
    make_begin_kernel().launch(
        1,
        *tensor_map.encode(e, *box),
        *tensor_map.encode(c, *box),
        *workspace.g_map(at["g"], p.dtype),
        at["maps"],
        at["counters"],
        workspace.counters,
    )
    d_tiles = ceil_div(p.D, TILES.block_v)
    d_tiles_c = d_tiles if d_c is not None else int(d_bias is not None)
    d_tiles_e = d_tiles if d_e is not None else 0
    bits = statistics.survivors
    scale: tuple[int, ...] = () if p.logit_scale is None else (p.logit_scale.data.ptr,)
    smoothing: tuple[int, ...] = ()
    marks = None
    if weights.uniform is not None:
        smoothing = weights.uniform.data.ptr, 0 if p.class_weights is None else p.class_weights.data.ptr
        marks = _marks(p, weights.softmax, weights.uniform)
    survey(
        workspace.survey,
        at["survey"],
        survivors_pointer=0 if keep_all else bits.data.ptr,
        pitch_words=0 if keep_all else bits.strides[0] // 4,
        coarse_rows=0 if keep_all or coarse_eps_of(p.options) is None else workspace.blocks,
        keep_all=keep_all,
        dense_share=survivors.DENSE_SHARE,
        tokens=statistics.tokens.data.ptr,
        n_valid=statistics.n_valid.data.ptr,
        softmax_weight=weights.softmax.data.ptr,
        target_weight=weights.target.data.ptr,
        lse=statistics.lse.data.ptr,
        target_logit=statistics.target_logit.data.ptr,
        targets=p.targets.data.ptr,
        d_tiles_c=d_tiles_c,
        d_tiles_e=d_tiles_e,
        zero_fill=d_tiles_c > 0 and not adds,
        marks=0 if marks is None else marks.data.ptr,
    )
    t = workspace.survey.at(at["survey"])
    capped, with_sums = p.options.softcap is not None, d_bias is not None
    # A pair's jobs must have equally many stages: those of dE and dC, which are neighbours, must be tiles of one row.
    tiles = PAIRED_TILES if d_tiles_c % 2 == 0 and d_tiles_e % 2 == 0 else TILES
    kernel = make_backward_kernel(tiles, p.dtype, capped, with_sums, bool(scale), bool(smoothing))
    kernel.launch(
        gpu.current().multiprocessors // tiles.cluster * tiles.cluster,
        at["maps"],
        e.data.ptr,
        matrices.pitch_bytes(e),
        c.data.ptr,
        matrices.pitch_bytes(c),
        0 if p.bias is None else p.bias.data.ptr,
        0 if p.bias is None else p.bias.itemsize,
        p.options.softcap or 0.0,
        statistics.n_valid.data.ptr,
        t.rows,
        t.row_of,
        t.whole,
        t.scale,
        t.order,
        t.dense,
        t.bits,
        t.live,
        t.before,
        t.n_live_tiles,
        t.n_rounds,
        t.first_tile,
        t.slot0,
        t.first_g,
        t.phase_end,
        t.bits,
        t.before,
        t.slot0,
        at["counters"],
        at["counters"] + 4,
        at["lists"],
        at["g"],
        at["sums"],
        workspace.buffers,
        workspace.buffer_slots,
        0 if d_e is None else d_e.data.ptr,
        0 if d_e is None else matrices.pitch_bytes(d_e),
        e_in_float32,
        at["sums_e"],
        0 if d_c is None else d_c.data.ptr,
        0 if d_c is None else matrices.pitch_bytes(d_c),
        c_in_float32,
        0 if d_bias is None else d_bias.data.ptr,
        d_tiles_c,
        d_tiles_e,
        adds,
        workspace.blocks,
        p.V,
        p.D,
        *scale,
        *smoothing,
    )
    for mine, theirs in ((d_e, into.e), (d_c, into.c)):
        if theirs is not None and mine is not theirs:
            theirs[...] = mine
    if into.bias is not None:
        into.bias[...] = d_bias + into.bias.astype(np.float32) if adds else d_bias


def _marks(p: Problem, softmax_weight: Any, uniform_weight: Any) -> Any:
    """(N,) see `survey`: the larger of the softmax weight and of what is uniform, times the largest class weight above 1."""
    largest = 1 if p.class_weights is None else p.xp.maximum(p.class_weights.max(), 1)
    return p.xp.maximum(abs(softmax_weight), terms.times(abs(uniform_weight), largest))


def workspace_of(p: Problem, into: Gradients, keep_all: bool) -> Workspace:
    """For these gradients, of a pass."""
    return _workspace(p, with_e=into.e is not None, with_sums=into.bias is not None, keep_all=keep_all)


def workspace_bytes(p: Problem) -> int:
    """For all gradients, in arrays of the backward's own: with copies of what the copy engine cannot read as it lies."""
    copied = (x for x in (p.e, p.c) if matrices.why_not_by_rows(x) is not None)
    copies = sum(2 * x.shape[0] * matrices.padded_columns(p.D) for x in copied)
    if matrices.padded_columns(p.D) != p.D:  # and of gradients that cannot be stored 16 bytes at a time
        itemsizes = 4 if p.options.accum_e_fp32 else 2, 4 if p.options.accum_c_fp32 else 2
        copies += sum(n * rows * matrices.padded_columns(p.D) for n, rows in zip(itemsizes, (p.N, p.V), strict=True))
    modes = {eps is None for eps in (p.options.filter_eps_e, p.options.filter_eps_c)}
    passes = (_workspace(p, with_e=True, with_sums=p.bias is not None, keep_all=keep_all).nbytes for keep_all in modes)
    return copies + max(passes) if p.N else 0


def _workspace(p: Problem, *, with_e: bool, with_sums: bool, keep_all: bool) -> Workspace:
    columns = matrices.padded_columns(p.D)
    return Workspace.of(p.N, p.V, columns, with_e=with_e, with_sums=with_sums, keep_all=keep_all)
