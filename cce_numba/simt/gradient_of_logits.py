"""G, the gradient of the loss with respect to the logits: the surviving logits are computed again, and G follows from each.

    G[n, v] = softmax weight[n] * p[n, v] + entropy weight[n] * p[n, v] * log(p[n, v])
              - sum over k of target weight[n, k] * (v == target[n, k]) - uniform weight[n] * class weight[v]

times the derivative of the softcap, with p the softmax. The last term exists only where label smoothing goes through a softcap;
then all logits survive. The unbiased filter multiplies columns of G, some of them by 0, as their largest probabilities in the
block say. A CTA has all tokens of a block, so it knows these.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from cce_numba.launch.array_kernel import ArrayKernel
from cce_numba.launch.inlined import slope_of_cap
from cce_numba.launch.kernel import kernel_factory
from cce_numba.simt.chance import make_decide
from cce_numba.simt.logits import make_products_tile, make_terms
from cce_numba.simt.numbers import conversions, real_of
from cce_numba.simt.product import make_product
from cce_numba.simt.records import takes_part
from cce_numba.simt.staging import ALIGNMENT, Operand
from cce_numba.simt.tiles import SimtTiles


class OfToken(NamedTuple):
    """What G takes from a token, read once for all of its columns; numbers of the compute dtype if nothing else is said."""

    max_logit: Any
    log_sum: Any
    token: Any  # int: its number
    target: Any  # int64, the first one; nobody reads it of several
    softmax_weight: Any  # NaN if a target is out of range: the loss is NaN then, and so is the gradient
    target_weight: Any  # of the first target, likewise
    entropy_weight: Any  # 0 without any
    uniform_weight: Any  # 0 without any
    takes_part: Any  # bool


@kernel_factory
def make_gradient_of_logits_kernel(
    tiles: SimtTiles,
    dtype: np.dtype,
    bias_dtype: np.dtype,
    uniform: bool,
    unbiased: bool,
    entropy: bool = False,
    several: bool = False,
) -> ArrayKernel:
    """The kernel for `e` and `c` of `dtype`.

    uniform, entropy: whether G has these terms. unbiased: whether by that filter. several: whether tokens have several targets.
    """
    real = real_of(dtype)
    decide = make_decide(tiles, real)
    load, _ = conversions(dtype)
    product, products_tile = make_product(tiles, real), make_products_tile(tiles, load, real)
    bias_of, scale_of, logit_of = make_terms(bias_dtype, real)
    column_of = product.column_of
    e_shape, c_shape, acc_shape = product.a_shape, product.b_shape, product.acc_shape
    block_n, block_v, threads, threads_v = tiles.block_n, tiles.block_v, tiles.threads, tiles.threads_v
    thread_n, thread_v, threads_n, alignment = tiles.thread_n, tiles.thread_v, tiles.threads_n, ALIGNMENT
    largest_shape, infinity = (threads_n, block_v), real(math.inf)

    @cuda.jit(device=True)
    def read_token(token: Any, found: Any, weights: Any) -> Any:
        """What G needs of a token, read once for all its columns."""
        softmax_weight = weights.softmax[token]
        for k in range(found.target_logit.shape[1]):
            if found.target_logit[token, k] != found.target_logit[token, k]:
                softmax_weight = real(math.nan)
        entropy_weight = weights.entropy[token] if entropy else real(0)
        uniform_weight = weights.uniform[token] if uniform else real(0)
        return OfToken(
            found.max_logit[token],
            found.log_sum[token],
            token,
            found.targets[token, 0],
            softmax_weight,
            weights.target[token, 0],
            entropy_weight,
            uniform_weight,
            takes_part(weights, token),
        )

    @cuda.jit(device=True)
    def is_target(v: Any, of_token: Any, found: Any) -> Any:
        """Whether the entry v is one of the token's targets."""
        if not several:
            return v == of_token.target
        result = False
        for k in range(found.targets.shape[1]):
            result = result or (found.targets[of_token.token, k] == v and v != found.padding)
        return result

    @cuda.jit(device=True)
    def gradient_of(z: Any, v: Any, of_token: Any, found: Any, weights: Any, softcap: Any) -> Any:
        """G of a token at the entry v, from its logit z."""
        log_p = (z - of_token.max_logit) - of_token.log_sum
        p = real(math.exp(log_p))
        gradient = of_token.softmax_weight * p
        if entropy and p > 0:
            gradient += of_token.entropy_weight * (p * log_p)
        if several:
            for k in range(found.targets.shape[1]):
                if found.targets[of_token.token, k] == v and v != found.padding:
                    gradient -= weights.target[of_token.token, k]
        elif v == of_token.target:
            gradient -= of_token.target_weight
        if uniform:
            class_weight = weights.class_weights[v] if weights.has_class_weights else real(1)
            gradient -= of_token.uniform_weight * class_weight
        if softcap > 0:
            gradient *= slope_of_cap(z / softcap)
        return gradient if of_token.takes_part else real(0)  # not even with a NaN in its row

    @cuda.jit(device=True)
    def probability_of(z: Any, v: Any, of_token: Any, found: Any) -> Any:
        """A token's say in the fate of column v: its probability; inf if v is its target or the token is lost; 0 if dead."""
        log_sum_exp = of_token.max_logit + of_token.log_sum
        probability = real(math.exp((z - of_token.max_logit) - of_token.log_sum))
        is_lost = of_token.softmax_weight != of_token.softmax_weight or log_sum_exp - log_sum_exp != 0
        if is_lost or is_target(v, of_token, found):
            probability = infinity
        return probability if of_token.takes_part else real(0)

    def gradient_of_logits_kernel(
        e: Any,  # (N, D)
        c: Any,  # (V, D)
        terms: Any,  # LogitTerms
        found: Any,  # Found
        tokens: Any,  # Tokens
        weights: Any,  # Weights
        columns: Any,  # Columns
        chance: Any,  # Chance
        g: Any,  # (entries of a chunk, N) real, to be written: row v - v0, at the token's position in the list
    ) -> None:
        """Grid (n_blocks, tiles of the chunk). Writes G where it survives, and nothing elsewhere."""
        e_smem = cuda.shared.array(e_shape, real, alignment)
        c_smem = cuda.shared.array(c_shape, real, alignment)
        e_rows = cuda.shared.array(block_n, np.uint32)
        c_rows = cuda.shared.array(block_v, np.uint32)
        acc = cuda.local.array(acc_shape, real)
        y = cuda.threadIdx.y
        t = y * threads_v + cuda.threadIdx.x
        n_block, first = cuda.blockIdx.x, cuda.blockIdx.y * block_v
        n0, n_valid, count = n_block * block_n, tokens.n_valid[0], columns.count[n_block]
        if n0 >= n_valid or first >= count:
            return
        for r in range(t, block_n, threads):
            e_rows[r] = tokens.listed[min(n0 + r, n_valid - 1)]
        for r in range(t, block_v, threads):
            c_rows[r] = columns.listed[n_block, min(first + r, count - 1)]
        products_tile(acc, Operand(e, e_rows, e_smem), Operand(c, c_rows, c_smem))

        if unbiased:
            # The largest probability of each column: each thread of its own rows, then across the threads of a column.
            largest = cuda.shared.array(largest_shape, real)
            scales = cuda.shared.array(block_v, real)
            for j in range(thread_v):
                largest[y, column_of(j)] = real(0)
            for i in range(thread_n):
                position = n0 + y * thread_n + i
                if position < n_valid:
                    token = tokens.listed[position]
                    scale, of_token = scale_of(terms, token), read_token(token, found, weights)
                    for j in range(thread_v):
                        v = columns.listed[n_block, min(first + column_of(j), count - 1)]
                        z = logit_of(acc[i, j], bias_of(terms, v), scale, terms)
                        largest[y, column_of(j)] = max(largest[y, column_of(j)], probability_of(z, v, of_token, found))
            decide(largest, scales, n_block, first, columns, chance)

        for i in range(thread_n):
            position = n0 + y * thread_n + i
            if position < n_valid:
                token = tokens.listed[position]
                scale, of_token = scale_of(terms, token), read_token(token, found, weights)
                for j in range(thread_v):
                    column = first + column_of(j)
                    if column < count:
                        v = columns.listed[n_block, column]
                        z = logit_of(acc[i, j], bias_of(terms, v), scale, terms)
                        gradient = gradient_of(z, v, of_token, found, weights, terms.softcap)
                        if unbiased:
                            gradient *= scales[column_of(j)]
                        g[v - columns.v0, position] = gradient

    return ArrayKernel(gradient_of_logits_kernel, block=(tiles.threads_v, tiles.threads_n), ctas=tiles.ctas)
