"""A tile of logits: first the products, E @ C.T, of rows that are picked by number, then what `logit.finish` makes of them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.inlined import finish
from cce_numba.simt.numbers import conversions
from cce_numba.simt.product import make_product
from cce_numba.simt.staging import make_row_stager
from cce_numba.simt.tiles import SimtTiles


@functools.cache
def make_products_tile(tiles: SimtTiles, load: Any, real: Any) -> Any:
    """The device function that computes a tile of E @ C.T; arguments are those of `staging.make_row_stager`."""
    product = make_product(tiles, real)
    e_stager = make_row_stager(tiles, tiles.block_n, load, real, masked=False)
    c_stager = make_row_stager(tiles, tiles.block_v, load, real, masked=False)
    clear, accumulate, block_k = product.clear, product.accumulate, tiles.block_k
    fetch_e, deposit_e, loads_e = e_stager.fetch, e_stager.deposit, e_stager.loads
    fetch_c, deposit_c, loads_c = c_stager.fetch, c_stager.deposit, c_stager.loads

    @cuda.jit(device=True)
    def products_tile(acc: Any, e: Any, c: Any) -> None:
        """acc (thread_n, thread_v) = <e.source[e.rows[n]], c.source[c.rows[v]]> for this thread's n and v.

        e, c: an `Operand` each, of (N, D) and (V, D), whose rows all exist. Starts and ends with a barrier.
        """
        e_next = cuda.local.array(loads_e, real)
        c_next = cuda.local.array(loads_c, real)
        D = e.source.shape[1]
        clear(acc)
        cuda.syncthreads()
        fetch_e(e_next, e, 0, D)
        fetch_c(c_next, c, 0, D)
        for d0 in range(0, D, block_k):
            cuda.syncthreads()
            deposit_e(e_next, e)
            deposit_c(c_next, c)
            cuda.syncthreads()
            if d0 + block_k < D:
                fetch_e(e_next, e, d0 + block_k, D)
                fetch_c(c_next, c, d0 + block_k, D)
            accumulate(acc, e.smem, c.smem)
        cuda.syncthreads()

    return products_tile


@functools.cache
def make_terms(bias_dtype: np.dtype, real: Any) -> tuple[Any, Any, Any]:
    """`(bias_of, scale_of, logit_of)`, device functions for `records.LogitTerms` with a bias of `bias_dtype`."""
    load_bias, _ = conversions(bias_dtype)

    @cuda.jit(device=True)
    def bias_of(terms: Any, v: Any) -> Any:
        """The bias of a vocabulary entry; 0 without any."""
        return real(load_bias(terms.bias[v])) if terms.has_bias else real(0)

    @cuda.jit(device=True)
    def scale_of(terms: Any, token: Any) -> Any:
        """The scale of a token's logits; 1 without any."""
        return terms.logit_scale[token] if terms.has_scale else real(1)

    @cuda.jit(device=True)
    def logit_of(product: Any, bias: Any, scale: Any, terms: Any) -> Any:
        """A product becomes a logit."""
        if terms.softcap > 0:
            return finish(product, bias, scale, terms.softcap)
        return finish(product, bias, scale, None)

    return bias_of, scale_of, logit_of
