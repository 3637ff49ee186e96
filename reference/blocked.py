"""Forward and backward in the kernels' own loop order: a tile of logits at a time, no more than that ever stored.

Read it beside the kernels: what is a loop over blocks here is a grid or a loop there, and what is an array of one tile
is registers and shared memory. Shapes: `e (n, D)`, `c (V, D)`, `bias (V,)`, `targets (n,)` of the valid tokens alone.
Source: Wijmans et al., ICLR 2025, arXiv 2411.09009, algorithms 1 to 3, with the filter known before any recomputation.
"""

import numpy as np

from .building_blocks import bias_and_softcap, blocks, quiet
from .filters import may_survive
from .loss import Gradients
from .online import IDENTITY, fold, to_lse


@quiet
def logits_tile(e, c, bias=None, softcap=None, block_d=16):
    """`logits` of the rows of a tile, accumulated over blocks of D; bias and softcap follow once the sum is complete.

    >>> logits_tile(np.ones((1, 5)), np.ones((2, 5)), bias=np.array([0.0, 1.0]), block_d=2).tolist()
    [[5.0, 6.0]]
    """
    z = np.zeros((len(e), len(c)))
    for d_block in blocks(e.shape[-1], block_d):
        z += e[:, d_block] @ c[:, d_block].T
    return bias_and_softcap(z, bias, softcap)


@quiet
def indexed_dot(e, c, targets, *, bias=None, softcap=None):
    """The target logit `(n,)` of each token, from one row of c each; NaN where the target is outside `[0, V)`.

    >>> indexed_dot(np.eye(2), np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 0])).tolist()
    [3.0, 2.0]
    """
    inside = (targets >= 0) & (targets < len(c))
    row = np.where(inside, targets, 0)
    z = bias_and_softcap(np.sum(e * c[row], axis=-1), None if bias is None else bias[row], softcap)
    return np.where(inside, z, np.nan)


def forward(e, c, targets, *, bias=None, softcap=None, eps=None, draws=None, block_n=4, block_v=8, block_d=16):
    """lse `(n,)`, target_logit `(n,)` and the survivor flags `(n_blocks, V)` of `filters.forward_flags`.

    draws: `(n_blocks, V)` for the unbiased filter, whose threshold is eps * draw; None for the one that drops.

    >>> e, c, targets = np.array([[1.0], [-9.0]]), np.arange(4.0)[:, None], np.array([3, 0])
    >>> lse, target_logit, flags = forward(e, c, targets, eps=1e-3, block_n=1, block_v=2)
    >>> lse.round(3).tolist(), target_logit.tolist(), flags.tolist()
    ([3.44, 0.0], [3.0, 0.0], [[True, True, True, True], [True, False, False, False]])
    """
    n, vocabulary = len(e), len(c)
    target = indexed_dot(e, c, targets, bias=bias, softcap=softcap)  # first, since it seeds the bound
    lse = np.zeros(n)
    flags = np.zeros((len(blocks(n, block_n)), vocabulary), bool)
    thresholds = np.full(flags.shape, 1.0 if eps is None else eps) * (1.0 if draws is None else draws)
    for flag, threshold, n_block in zip(flags, thresholds, blocks(n, block_n), strict=True):
        state = IDENTITY
        for v_block in blocks(vocabulary, block_v):
            tile = logits_tile(e[n_block], c[v_block], None if bias is None else bias[v_block], softcap, block_d)
            bound = np.maximum(target[n_block], to_lse(*state))
            flag[v_block] = may_survive(tile, bound, None if eps is None else threshold[v_block]).any(axis=0)
            state = fold(state, tile)
        lse[n_block] = to_lse(*state)
        # Late news: targets survive whatever their probability, and so does the whole block of a token gone NaN.
        flag |= np.isin(np.arange(vocabulary), targets[n_block]) | np.isnan(lse[n_block]).any()
    return lse, target, flags


@quiet
def backward(
    e, c, targets, lse, flags, d_nll, d_lse, *, bias=None, softcap=None, eps=None, draws=None, block_n=4, chunk_v=16, block_d=16
):
    """Gradients of `sum(d_nll * nll + d_lse * lse)`, both upstream gradients `(n,)`, from the flagged columns alone.

    With draws `(n_blocks, V)` the filter is the unbiased one. The forward has flagged some columns that it drops: here the
    probabilities are known, so that `roulette` decides, and says what the columns of G are multiplied by.

    For each chunk of chunk_v vocabulary entries: G of the survivors, then dC of the chunk, complete in one go, then
    its share of dE. Every product has one owner per output, so the order of the sums is always the same.

    >>> e, c, targets = np.ones((1, 2)), np.zeros((2, 2)), np.array([0])
    >>> lse, _, flags = forward(e, c, targets)
    >>> backward(e, c, targets, lse, flags, d_nll=np.ones(1), d_lse=np.zeros(1)).c.tolist()
    [[-0.5, -0.5], [0.5, 0.5]]
    """
    d_e, d_c, d_bias = np.zeros(e.shape), np.zeros(c.shape), np.zeros(len(c))
    a, b = d_nll + d_lse, d_nll
    outside = (targets < 0) | (targets >= len(c))
    for chunk in blocks(len(c), chunk_v):
        # 1. G of the chunk: per block of tokens a compact list of surviving columns, and the logits of these again.
        workspace = []
        for number, (flag, n_block) in enumerate(zip(flags, blocks(len(e), block_n), strict=True)):
            columns = chunk.start + np.flatnonzero(flag[chunk])
            n = n_block.start + np.flatnonzero((a[n_block] != 0) | (b[n_block] != 0))  # the others cost nothing
            z = logits_tile(e[n], c[columns], None if bias is None else bias[columns], softcap, block_d)
            g = a[n, None] * np.exp(z - lse[n, None]) - b[n, None] * (targets[n, None] == columns)
            if softcap is not None:
                g *= 1.0 - (z / softcap) ** 2
            g[outside[n]] = np.nan
            if draws is not None and len(n):
                p = np.where(outside[n, None], np.nan, np.exp(z - lse[n, None]))
                hot = (targets[n, None] == columns).any(axis=0)
                largest = p.max(axis=0)
                g *= np.where((largest < eps) & ~hot, eps / largest, 1.0)
                kept = ~(largest <= eps * draws[number, columns]) | hot
                columns, g = columns[kept], g[:, kept]
            workspace.append((n, columns, g))
        # 2. dC of the chunk: all tokens. Rows without survivors stay 0.
        for n, columns, g in workspace:
            d_c[columns] += g.T @ e[n]
            d_bias[columns] += g.sum(axis=0)
        # 3. dE: what this chunk adds.
        for n, columns, g in workspace:
            d_e[n] += g @ c[columns]
    return Gradients(d_e, d_c, None if bias is None else d_bias)
