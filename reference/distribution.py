"""Everything about a token's distribution over the vocabulary, and gradients through it, from stored logits.

Let `z (V,)` be a token's logits and `p = exp(z - lse)` its probabilities. Asked for are

    logprobs       z[id] - lse, for one id or many
    entropy        -sum_v p_v * log(p_v), in nats; 0 * log(0) is 0
    sum_squares    sum_v p_v^2, the probability that two draws are the same entry: 1 / V for a uniform p, 1 for a certain one
    top_logprobs   the k largest of z - lse, in descending order, equal logits by ascending id; top_ids says which they are

`distribution_backward` is the way back from logprobs, lse and entropy. There is none from the other two.
"""

from dataclasses import dataclass

import numpy as np

from .building_blocks import (
    distribution_gradient,
    entropy_terms,
    log_softmax,
    logits,
    logsumexp,
    quiet,
    softmax,
    target_logit,
    weighted,
)
from .loss import Gradients, input_gradients
from .tokens import counting


@dataclass(frozen=True)
class Distribution:
    """What `distribution` finds; float64. `(...)` is the shape of the tokens after the shift; 0 where a token is ignored."""

    logits: np.ndarray  # (n_valid, V), of the tokens that take part, after bias, scale and softcap
    logprobs: np.ndarray  # in the shape of the ids after the shift; 0 where padded, NaN for an id outside [0, V)
    lse: np.ndarray  # (...)
    entropy: np.ndarray  # (...)
    sum_squares: np.ndarray  # (...)
    top_logprobs: np.ndarray  # (..., top_k)
    top_ids: np.ndarray  # (..., top_k) int64; any ids where top_logprobs are NaN
    n_valid: int  # how many tokens take part


@quiet
def distribution(e, c, ids, *, bias=None, softcap=None, logit_scale=None, shift=0, ignore_index=-100, top_k=0):
    """The distribution of each token: `e (..., D)`, `c (V, D)`, ids `(...)` or `(..., K)`, `bias (V,)`, top_k at most V.

    An id that is `ignore_index` is padding. A token takes part if it has another one, and is ignored otherwise: then nothing in
    its row of e matters. logit_scale: a number or `(...)`, one for each token of e. ids shift as targets do.

    >>> found = distribution(np.zeros((2, 3)), np.zeros((4, 3)), np.array([[0, 1, -100], [-100, -100, -100]]), top_k=2)
    >>> found.logprobs.round(3).tolist(), found.entropy.round(3).tolist(), found.sum_squares.tolist()
    ([[-1.386, -1.386, 0.0], [0.0, 0.0, 0.0]], [1.386, 0.0], [0.25, 0.0])
    >>> found.top_ids.tolist()
    [[0, 1], [0, 0]]
    """
    if not 0 <= top_k <= len(c):
        raise ValueError(f"top_k is {top_k}, but must be between 0 and the {len(c)} entries of the vocabulary")
    tokens = counting(e, ids, ignore_index=ignore_index, shift=shift, logit_scale=logit_scale)
    z = logits(tokens.e, c, bias, softcap, tokens.scale)
    log_p = log_softmax(z)
    top_ids = np.argsort(-z, axis=-1, kind="stable")[:, :top_k]
    return Distribution(
        logits=z,
        logprobs=tokens.ids_everywhere(target_logit(log_p, tokens.ids)),
        lse=tokens.everywhere(logsumexp(z)),
        entropy=tokens.everywhere(-np.sum(entropy_terms(z), axis=-1)),
        sum_squares=tokens.everywhere(np.sum(softmax(z) ** 2, axis=-1)),
        top_logprobs=tokens.everywhere(np.take_along_axis(log_p, top_ids, axis=-1)),
        top_ids=tokens.everywhere(top_ids),
        n_valid=len(z),
    )


@quiet
def distribution_backward(
    e,
    c,
    ids,
    *,
    d_logprobs=None,
    d_lse=None,
    d_entropy=None,
    keep_e=None,
    keep_c=None,
    bias=None,
    softcap=None,
    logit_scale=None,
    shift=0,
    ignore_index=-100,
):
    """Gradients of `sum(d_logprobs * logprobs) + sum(d_lse * lse) + sum(d_entropy * entropy)` with respect to e, c and bias.

    Upstream gradients are scalars, or in the shape of what they belong to; None is 0. keep_e, keep_c `(n_valid, V)`: see
    `loss.backward`. A token to which nothing flows back takes no part, so that a NaN in it stays there. Of one that does, an id
    outside `[0, V)` makes all gradients NaN.

    The gradient with respect to a token's logits follows from three derivatives. Let H be its entropy, and `onehot_k` the row
    of its k-th id:

        d lse / d z_v         =  p_v
        d logprobs_k / d z_v  =  onehot_k[v] - p_v
        d H / d z_v           = -p_v * (log(p_v) + H)

    Their sum, each times its upstream gradient, is `G = p * (alpha + beta * (z - lse)) - sum_k gamma_k * onehot_k` with

        alpha    =  d_lse - sum_k d_logprobs_k - d_entropy * H
        beta     = -d_entropy
        gamma_k  = -d_logprobs_k

    where `p * (z - lse)` is 0 for an entry whose p is 0. The softcap's derivative and the logit scale multiply G.

    >>> grads = distribution_backward(np.ones((1, 1)), np.zeros((2, 1)), np.array([0]), d_logprobs=1.0, d_entropy=1.0)
    >>> grads.c.tolist()  # a uniform distribution has the largest entropy, so its gradient is 0 there
    [[0.5], [-0.5]]
    """
    tokens = counting(e, ids, ignore_index=ignore_index, shift=shift, logit_scale=logit_scale)
    c = np.asarray(c, np.float64)
    z = logits(tokens.e, c, bias, softcap, tokens.scale)
    d_logprobs = tokens.select_ids(0.0 if d_logprobs is None else d_logprobs)
    d_lse, d_entropy = (tokens.select(0.0 if d is None else d) for d in (d_lse, d_entropy))

    entropy = -np.sum(entropy_terms(z), axis=-1)
    alpha, beta, gamma = d_lse - np.sum(d_logprobs, axis=-1) - weighted(d_entropy, entropy), -d_entropy, -d_logprobs
    part = (alpha != 0) | (beta != 0) | (gamma != 0).any(axis=-1)  # who takes part
    alpha, beta, gamma, rows = alpha[part], beta[part], gamma[part], tokens.e[part]
    g = tokens.scale[part, None] * distribution_gradient(z[part], tokens.ids[part], alpha, beta, gamma, softcap)
    keep = (None if mask is None else mask[part] for mask in (keep_e, keep_c))
    d_rows = np.zeros(tokens.e.shape)
    d_rows[part], d_c, d_bias = input_gradients(g, rows, c, *keep)
    return Gradients(tokens.gradient_of_e(d_rows, np.shape(e), shift), d_c, None if bias is None else d_bias)
