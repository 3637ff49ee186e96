"""The backward: for each chunk of the vocabulary, three products with one owner per output tile, hence no atomics.

    columns       of each block of tokens that survive in the chunk, as a list
    G             the surviving logits again, and from them the gradient of the loss with respect to each
    dC = G.T @ E  of the chunk, complete: all tokens, rounded once, written once
    dE += G @ C   accumulated over chunks, rounded with the last

Gradients that are added to an array begin with what is in it, or meet it in the sum that is rounded.

G is stored column by column, each at its place in the chunk, so both products can pick from it: what did not survive is
neither written nor read. Where the unbiased filter drops a column that the forward has flagged, zeros are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cce_numba import backend
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics
from cce_numba.gpu import SIMULATED
from cce_numba.integers import ceil_div
from cce_numba.launch.array_kernel import argument
from cce_numba.simt.columns import make_list_columns_kernel
from cce_numba.simt.gradient_of_bias import make_d_bias_kernel
from cce_numba.simt.gradient_of_c import make_d_c_kernel
from cce_numba.simt.gradient_of_e import Destination, make_d_e_kernel
from cce_numba.simt.gradient_of_logits import make_gradient_of_logits_kernel
from cce_numba.simt.records import Chance, Columns, Found, LogitTerms, Survivors, Tokens, Weights, bias_dtype_of
from cce_numba.simt.tiles import SimtTiles

WORKSPACE_BYTES = 64 * 2**20  # for G
_MAX_CHUNK = 2**21  # a grid has at most 65535 tiles in its second dimension
# Where a token's row of dE must not depend on its batch.
# G of 16384 tokens then fills the workspace, and that of more exceeds it.
_INVARIANT_CHUNK = 1024


def chunk_of(p: Problem, tiles: SimtTiles) -> int:
    """Vocabulary entries whose G fits in the workspace; at least one tile, whatever N is.

    With `Options.batch_invariant` it does not depend on N: dE is a sum over chunks of sums over their entries.
    """
    tile = max(tiles.block_n, tiles.block_v)
    if p.options.batch_invariant and not SIMULATED:
        return min(_INVARIANT_CHUNK, ceil_div(p.V, tile) * tile)
    fitting = min(WORKSPACE_BYTES // (p.compute_dtype.itemsize * max(1, p.N)), _MAX_CHUNK) // tile * tile
    return min(max(tile, 4 * tile if SIMULATED else fitting), ceil_div(p.V, tile) * tile)


def backward(
    p: Problem,
    tiles: SimtTiles,
    statistics: Statistics,
    given: backend.Weights,
    into: Gradients,
    adds: bool,
    fill: Callable[[Columns, Any], None] | None = None,
) -> None:
    """Writes the gradients `into` arrays, or adds to what is in there; see `backend.Backend`.

    fill: `fill(columns, g)` writes G of a chunk where it survives, in place of the kernel of a cross-entropy. Both are as in
    `gradient_of_logits_kernel`.
    """
    xp: Any = p.xp
    d_e, d_c, d_bias = into.e, into.c, into.bias
    n_blocks, chunk = ceil_div(p.N, tiles.block_n), chunk_of(p, tiles)
    keep_all_e, keep_all_c = p.options.filter_eps_e is None, p.options.filter_eps_c is None
    if p.options.is_unbiased and keep_all_e != keep_all_c and d_e is not None and not (d_c is None and d_bias is None):
        for part in (Gradients(e=d_e), Gradients(c=d_c, bias=d_bias)):  # G is multiplied for one of them, not for the other
            backward(p, tiles, statistics, given, part, adds)
        return
    keep_all_g = (d_e is not None and keep_all_e) or ((d_c is not None or d_bias is not None) and keep_all_c)

    # Kernels take these again and again.
    e, c, terms, found = argument((p.e, p.c, LogitTerms.of(p), Found.of(p, statistics)))
    tokens = argument(Tokens(statistics.tokens, statistics.n_valid.reshape(1)))
    weights = argument(Weights.of(p, given))
    chance = argument(Chance.of(p, statistics))
    unbiased = statistics.draw_seed is not None and not keep_all_g
    bits = argument(xp.empty((1, 1), np.uint8) if statistics.survivors is None else statistics.survivors)
    kept_g, kept_e, kept_c = (Survivors(bits, keep_all) for keep_all in (keep_all_g, keep_all_e, keep_all_c))
    g = argument(xp.empty((chunk, p.N), p.compute_dtype))
    lists = [argument((xp.empty((n_blocks, chunk), np.int64), xp.zeros(n_blocks, np.int64)))]
    if d_e is not None and keep_all_e != keep_all_g:  # dE is filtered and dC is not
        lists.append(argument((xp.empty((n_blocks, chunk), np.int64), xp.zeros(n_blocks, np.int64))))
    into_e = None if d_e is None else _destination(p, d_e, chunk, adds)
    D_tiles = ceil_div(p.D, tiles.block_v)

    for v0 in range(0, p.V, chunk):
        v1 = min(v0 + chunk, p.V)
        columns, columns_e = Columns(v0, v1, *lists[0]), Columns(v0, v1, *lists[-1])
        list_columns_kernel = make_list_columns_kernel(tiles)
        list_columns_kernel.launch(n_blocks, kept_g, tokens, weights, columns)
        if len(lists) > 1:
            list_columns_kernel.launch(n_blocks, kept_e, tokens, weights, columns_e)
        if fill is not None:
            fill(columns, g)
        else:
            terms_of_g = given.uniform is not None, unbiased, given.entropy is not None, p.K is not None
            g_kernel = make_gradient_of_logits_kernel(tiles, p.dtype, bias_dtype_of(p), *terms_of_g)
            g_grid = n_blocks, ceil_div(v1 - v0, tiles.block_v)
            g_kernel.launch(g_grid, e, c, terms, found, tokens, weights, columns, chance, g)
        if d_e is not None and into_e is not None:
            d_e_kernel = make_d_e_kernel(tiles, p.dtype, np.dtype(d_e.dtype))
            first, last = v0 == 0, v1 == p.V
            now = into_e._replace(starts=into_e.starts and first, rounds=into_e.rounds and last)
            d_e_kernel.launch((n_blocks, D_tiles), g, c, columns_e, tokens, weights, now)
        tiles_v = ceil_div(v1 - v0, tiles.block_n)
        if d_c is not None:
            d_c_kernel = make_d_c_kernel(tiles, p.dtype, np.dtype(d_c.dtype))
            d_c_kernel.launch((tiles_v, D_tiles), g, e, columns, kept_c, tokens, weights, adds, d_c)
        if d_bias is not None:
            d_bias_kernel = make_d_bias_kernel(tiles, p.compute_dtype, np.dtype(d_bias.dtype))
            d_bias_kernel.launch(tiles_v, g, columns, kept_c, tokens, adds, d_bias)


def _destination(p: Problem, d_e: Any, chunk: int, adds: bool) -> Destination:
    """A gradient of the compute dtype is its own sum. One that must be rounded has a sum beside it, if there are chunks."""
    absent = p.xp.empty((1, 1), p.compute_dtype)
    if d_e.dtype == p.compute_dtype:
        return argument(Destination(sum=d_e, d_e=absent, starts=not adds, rounds=False, adds=adds))
    total = p.xp.empty((p.N, p.D), p.compute_dtype) if chunk < p.V else absent
    return argument(Destination(sum=total, d_e=d_e, starts=True, rounds=True, adds=adds))
