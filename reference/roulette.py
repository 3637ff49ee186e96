"""The unbiased filter: what is too small to matter is kept by chance, and then multiplied, so that nothing is lost on average.

Let `pmax` be the largest probability that a vocabulary entry has for the tokens of a block. If `pmax < eps`, and the entry is
the target of none of these tokens, it survives in the block if `pmax > eps * u`. Its column of G is then multiplied by `eps /
pmax`. The draw `u` is spread evenly over (0, 1), so the entry survives with probability `pmax / eps`, and its share of every
gradient is right on average ("Russian roulette" of Monte Carlo methods).

A draw is no state: it is a function of the block, the entry and a seed. The seed follows from the targets and from a number of
the caller's. So the same inputs give the same bits, wherever and how often they are computed.

Two distributions share a filter by the larger of their probabilities (`distillation.union`), which has no targets. Any seed
will do for them.

Shapes: `probabilities (n, V)`, `targets (n,)` int or None, draws and scales `(n_blocks, V)`.
"""

import numpy as np

from .building_blocks import blocks, onehot, quiet

GOLDEN = 2654435769  # 2^32 times the golden ratio's fraction, 0.6180339887


def mixed(x):
    """A hash of 32-bit integers, one to one: each bit of x may change every bit of the result.

    The constants are those of the search at https://github.com/skeeto/hash-prospector. Both fit in 31 bits, so that products
    fit in int64. The lower 32 bits of an integer count.

    >>> mixed(np.array([0, 1, 2])).tolist()
    [0, 2261973619, 229111015]
    """
    x = np.asarray(x, np.int64) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def draw_seed(targets, filter_seed=0):
    """The seed, an integer of 32 bits, of the targets of those tokens that count; their order does not matter.

    >>> draw_seed(np.array([3, 5])) == draw_seed(np.array([5, 3])) != draw_seed(np.array([3, 5]), filter_seed=1)
    True
    """
    return int(mixed(mixed(filter_seed) + np.sum(mixed(targets))))


def draws(n_blocks, vocabulary, seed):
    """The draws u, `(n_blocks, vocabulary)`: odd multiples of 2^-24, which float32 holds exactly.

    u is the fraction of `hash / 2^32 + block * 0.6180339887`. The hash is the entry's own, so the draws of different entries
    are independent. Those of one entry lie evenly spread over any run of blocks.

    >>> draws(3, 2, seed=7).round(4).tolist()
    [[0.9197, 0.855], [0.5377, 0.473], [0.1558, 0.091]]
    """
    word = mixed(np.arange(vocabulary) ^ seed) + np.arange(n_blocks)[:, None] * GOLDEN
    return ((word & 0xFFFFFFFF) >> 8 | 1) * 2.0**-24


@quiet
def roulette(probabilities, targets, eps, u, block_n=128, part=None):
    """What the columns of G are multiplied by, `(n_blocks, V)`: 0 where one is dropped, 1 where it is kept as it is, or more.

    Targets are kept as they are. So is everything in a block with a lost token, whose probabilities are NaN or whose target is
    outside `[0, V)`. `part (n,)` bool says which tokens take part; others have no say. `eps=None` keeps everything.

    >>> p = np.array([[0.9, 0.04, 0.01, 0.05], [0.9, 0.02, 0.03, 0.05]])
    >>> roulette(p, np.array([0, 3]), eps=0.1, u=np.array([[0.5, 0.2, 0.5, 0.99]])).round(3).tolist()
    [[1.0, 2.5, 0.0, 1.0]]
    """
    n, vocabulary = probabilities.shape
    scales = np.ones((len(blocks(n, block_n)), vocabulary))
    if eps is None:
        return scales
    hot = np.zeros((n, vocabulary)) if targets is None else onehot(targets, vocabulary)
    for scale, draw, n_block in zip(scales, u, blocks(n, block_n), strict=True):
        who = slice(None) if part is None else part[n_block]
        largest = np.max(probabilities[n_block][who] + 0 * hot[n_block][who], axis=0, initial=0.0)  # NaN for a lost token
        of_target = hot[n_block][who].any(axis=0)
        scale[(largest < eps) & ~of_target] = (eps / largest)[(largest < eps) & ~of_target]
        scale[(largest <= eps * draw) & ~of_target] = 0.0
    return scales


def of_tokens(scales, n, block_n=128):
    """Scales of blocks as those of n tokens, `(n, V)`.

    >>> of_tokens(np.array([[1.0], [0.0]]), 3, block_n=2).tolist()
    [[1.0], [1.0], [0.0]]
    """
    return np.repeat(scales, block_n, axis=0)[:n]
