"""The online log-sum-exp: a running (max, sum) pair per token, into which tiles of logits are folded.

A state `(m, s)`, both `(n,)`, stands for `lse = log(s) + m`: m is the largest logit seen, s the sum of `exp(z - m)`.
States merge associatively, so tiles may be folded in any grouping, and several blocks may share a token's vocabulary.
Sources: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018, arXiv 1805.02867;
Wijmans et al., ICLR 2025, arXiv 2411.09009, section 4.2.
"""

import numpy as np

from .building_blocks import blocks, quiet

IDENTITY = (-np.inf, 0.0)  # the state of no logits at all


@quiet
def merge(left, right):
    """The state of all the logits of two states `(m, s)`.

    >>> m, s = merge((np.array([0.0]), np.array([1.0])), (np.array([2.0]), np.array([3.0])))
    >>> m.tolist(), s.round(3).tolist()
    ([2.0], [3.135])
    """
    (m_left, s_left), (m_right, s_right) = left, right
    m = np.maximum(m_left, m_right)  # NaN if either is
    anchor = np.where(m == -np.inf, 0.0, m)  # nothing but -inf so far: -inf - -inf would be NaN
    return m, s_left * np.exp(m_left - anchor) + s_right * np.exp(m_right - anchor)


@quiet
def fold(state, tile):
    """The state after a tile of logits `(n, block_v)`.

    >>> m, s = fold(IDENTITY, np.array([[1.0, 3.0, 3.0]]))
    >>> m.tolist(), s.round(3).tolist()
    ([3.0], [2.135])
    """
    m = np.max(tile, axis=-1)
    anchor = np.where(m == -np.inf, 0.0, m)
    return merge(state, (m, np.sum(np.exp(tile - anchor[..., None]), axis=-1)))


@quiet
def to_lse(m, s):
    """The log-sum-exp `(n,)` that a state stands for.

    >>> to_lse(np.array([2.0, -np.inf]), np.array([1.0, 0.0])).tolist()
    [2.0, -inf]
    """
    return np.log(s) + m


def online_logsumexp(logits, block_v, splits=1):
    """`logsumexp` in the kernels' order: `splits` ranges of v_blocks, each folded tile by tile, then merged in order.

    Every range has `ceil(n_v_blocks / splits)` v_blocks, so the last ones may have fewer, or none.

    >>> online_logsumexp(np.log([[1.0, 2.0, 3.0, 4.0]]), block_v=1, splits=3).round(6) == np.log(10.0).round(6)
    array([ True])
    """
    n, vocabulary = logits.shape
    total = (np.full(n, IDENTITY[0]), np.full(n, IDENTITY[1]))
    v_blocks = blocks(vocabulary, block_v)
    v_blocks_per_split = -(-len(v_blocks) // splits)
    for split in range(splits):
        state = IDENTITY
        for v_block in v_blocks[split * v_blocks_per_split : (split + 1) * v_blocks_per_split]:
            state = fold(state, logits[:, v_block])
        total = merge(total, state)
    return to_lse(*total)
