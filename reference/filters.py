"""Which entries of the gradient are too small to matter: the survivors, and how the forward knows them in advance.

Shapes: `probabilities (n, V)` are the softmax of n valid tokens, `targets (n,)` int or None, keep masks `(n, V)` bool.
Two distributions share a filter by the larger of their probabilities (`distillation.union`), which has no targets.
A NaN always survives, and so does all of a block with a target outside `[0, V)`: what is wrong must stay visible.
`eps=None` keeps everything. Source: the gradient filter of Wijmans et al., ICLR 2025, arXiv 2411.09009, section 4.3,
which keeps whole tiles (`tile_filter`). Keeping the columns of a token block (`column_filter`) drops far more.
"""

import numpy as np
from ml_dtypes import finfo  # NumPy's finfo, and bfloat16

from .building_blocks import blocks, logsumexp, onehot, quiet, target_logit
from .online import IDENTITY, fold, to_lse


def auto_eps(dtype, filter="unbiased"):
    """The threshold for gradients of a dtype: 2^-5 of its spacing at 1, or 2^-9 where `filter` is "drop".

    So what either filter costs hides behind rounding.

    >>> import ml_dtypes
    >>> float(np.log2(auto_eps(ml_dtypes.bfloat16))), float(np.log2(auto_eps(ml_dtypes.bfloat16, "drop")))
    (-12.0, -16.0)
    """
    return float(finfo(dtype).eps) * {"unbiased": 2.0**-5, "drop": 2.0**-9}[filter]


def column_flags(probabilities, targets, eps, block_n=128):
    """One flag per (block of block_n tokens, column), `(n_blocks, V)` bool: does the column survive there?

    It does if some token of the block has `p >= eps` in it, or has it as its target.

    >>> p = np.array([[0.7, 0.2, 0.1], [0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    >>> column_flags(p, np.array([0, 0, 1]), eps=0.15, block_n=2).tolist()
    [[True, True, False], [False, True, True]]
    """
    n, vocabulary = probabilities.shape
    survives = np.ones((n, vocabulary), bool)
    if eps is not None:
        survives = ~(probabilities < eps)  # true for NaN
        if targets is not None:
            survives |= onehot(targets, vocabulary) != 0  # likewise
    return np.logical_or.reduceat(survives, np.arange(0, n, block_n), axis=0)  # any() of each block of rows


def column_filter(probabilities, targets, eps, block_n=128):
    """`column_flags` as a keep mask `(n, V)`: every token of a block keeps the same columns.

    >>> column_filter(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]), eps=0.5, block_n=1).tolist()
    [[True, False], [True, True]]
    """
    flags = column_flags(probabilities, targets, eps, block_n)
    return np.repeat(flags, block_n, axis=0)[: len(probabilities)]


def tile_filter(probabilities, targets, eps, block_n=128, block_v=128):
    """The paper's filter as a keep mask `(n, V)`: a tile survives whole if any `|softmax - onehot| >= eps` in it.

    >>> tile_filter(np.array([[0.5, 0.4, 0.05, 0.05]]), np.array([0]), eps=0.1, block_v=2).tolist()
    [[True, True, False, False]]
    """
    n, vocabulary = probabilities.shape
    keep = np.ones((n, vocabulary), bool)
    if eps is not None:
        big = ~(np.abs(probabilities - onehot(targets, vocabulary)) < eps)
        for n_block in blocks(n, block_n):
            for v_block in blocks(vocabulary, block_v):
                keep[n_block, v_block] = big[n_block, v_block].any()
    return keep


def dropped_mass(probabilities, keep):
    """The probability `(n,)` of each token that a keep mask drops: what bounds the error of the filtered gradient.

    >>> dropped_mass(np.array([[0.5, 0.375, 0.125]]), np.array([[True, False, False]])).tolist()
    [0.5]
    """
    return np.sum(np.where(keep, 0.0, probabilities), axis=-1)


@quiet
def may_survive(tile, bound, eps):
    """Which logits of a tile `(n, block_v)` may reach `p >= eps`, given a lower bound `(n,)` of each token's lse.

    eps is a number, or `(n, block_v)`, one for each logit.
    `p = exp(z - lse) <= exp(z - bound)`, so what is below eps against the bound is below eps in the end.

    >>> may_survive(np.array([[0.0, 4.0]]), bound=np.array([5.0]), eps=0.1).tolist()
    [[False, True]]
    """
    if eps is None:
        return np.ones(tile.shape, bool)
    return ~(tile - bound[:, None] < np.log(eps))  # not >=, so that NaN survives


def forward_flags(logits, targets, eps, block_n=128, block_v=128, draws=None):
    """`column_flags` as the forward can set them, before lse is known: never fewer, `(n_blocks, V)` bool.

    With `draws (n_blocks, V)` in (0, 1) each column has the threshold eps * draw, and what `roulette` keeps is flagged.

    The bound is the target logit or the lse of the tiles so far, whichever is larger. It leaves out the column in
    question (a target is flagged anyway), so it lies below lse by at least p, hence by eps for a survivor: rounding
    cannot lose one.

    >>> z = np.log([[0.04, 0.90, 0.02, 0.04]])
    >>> forward_flags(z, np.array([3]), eps=0.05, block_v=2).tolist()  # 0.04 came before 0.90 was known
    [[True, True, False, True]]
    >>> column_flags(np.exp(z), np.array([3]), eps=0.05).tolist()
    [[False, True, False, True]]
    """
    n, vocabulary = logits.shape
    survives = onehot(targets, vocabulary) != 0
    target, state = target_logit(logits, targets), IDENTITY
    of_tokens = None if eps is None or draws is None else np.repeat(eps * draws, block_n, axis=0)[:n]
    for v_block in blocks(vocabulary, block_v):
        bound = np.maximum(target, to_lse(*state))
        survives[:, v_block] |= may_survive(logits[:, v_block], bound, eps if of_tokens is None else of_tokens[:, v_block])
        state = fold(state, logits[:, v_block])
    survives |= np.isnan(logsumexp(logits))[:, None]  # a late NaN or +inf makes every p of its token NaN
    return np.logical_or.reduceat(survives, np.arange(0, n, block_n), axis=0)  # any() of each block of rows
