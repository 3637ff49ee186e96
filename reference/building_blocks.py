"""The formulas that everything else is made of, one function each.

Shapes: `e (n, D)`, `c (V, D)`, `bias (V,)`, `targets (n,)` int, logits `z (n, V)`. Everything is float64.
The loss of a token is `nll = logsumexp(z) - z[target]` (Wijmans et al., ICLR 2025, arXiv 2411.09009, section 3).
"""

import numpy as np

# NaN and inf are data here, not accidents: they go through silently and end where the arithmetic puts them.
quiet = np.errstate(over="ignore", divide="ignore", invalid="ignore")


def blocks(length, size):
    """Cut `range(length)` into consecutive slices of `size` elements, the last one possibly shorter.

    >>> blocks(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def bias_and_softcap(z, bias=None, softcap=None, logit_scale=None):
    """Finish raw dot products `z (n, V)`: add `bias (V,)`, scale, then squash into (-softcap, softcap) by tanh.

    The scale is a number, or `(n,)`.

    >>> bias_and_softcap(np.array([[1.0, 99.0]]), bias=np.array([0.5, 1.0]), softcap=30.0).round(3).tolist()
    [[1.499, 29.924]]
    """
    if bias is not None:
        z = z + np.asarray(bias, np.float64)
    if logit_scale is not None:
        z = z * np.asarray(logit_scale, np.float64)[..., None]
    return z if softcap is None else softcap * np.tanh(z / softcap)


@quiet
def logits(e, c, bias=None, softcap=None, logit_scale=None):
    """The scores `z (n, V)` of every vocabulary entry for every token: `e @ c.T + bias`, scaled and softcapped.

    >>> logits([[1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).tolist()
    [[1.0, 2.0, 3.0]]
    """
    return bias_and_softcap(np.asarray(e, np.float64) @ np.asarray(c, np.float64).T, bias, softcap, logit_scale)


@quiet
def max_and_log_sum(logits):
    """The largest logit m and `log(sum(exp(z - m)))` over the last axis, both `(..., V) -> (...,)`; lse is their sum.

    Kept apart because lse, at the size of m, has lost the last digits of the other. m is 0 for a row of -inf.

    >>> m, log_sum = max_and_log_sum(np.array([[1e20, 1e20], [-np.inf, -np.inf]]))
    >>> m.tolist(), log_sum.round(3).tolist()
    ([1e+20, 0.0], [0.693, -inf])
    """
    m = np.max(logits, axis=-1)
    m = np.where(m == -np.inf, 0.0, m)  # a row of -inf: exp(-inf - 0) = 0, where -inf - -inf would be NaN
    return m, np.log(np.sum(np.exp(logits - m[..., None]), axis=-1))


@quiet
def logsumexp(logits):
    """`log(sum(exp(z)))` over the last axis `(..., V) -> (...,)`, without overflow; NaN if a +inf or NaN is in the row.

    >>> logsumexp(np.array([[1000.0, 1000.0], [-np.inf, -np.inf]])).round(3).tolist()
    [1000.693, -inf]
    """
    m, log_sum = max_and_log_sum(logits)
    return m + log_sum


@quiet
def log_softmax(logits):
    """Logarithms of the probabilities, `z - lse` over the last axis, `(..., V) -> (..., V)`, to the last digit.

    >>> log_softmax(np.array([[1e20, 1e20], [0.0, -np.inf]])).round(3).tolist()
    [[-0.693, -0.693], [0.0, -inf]]
    """
    m, log_sum = max_and_log_sum(logits)
    return (logits - m[..., None]) - log_sum[..., None]


@quiet
def softmax(logits):
    """Probabilities `exp(z - lse)` over the last axis, `(..., V) -> (..., V)`.

    >>> softmax(np.log([[1.0, 3.0]])).round(3).tolist()
    [[0.25, 0.75]]
    """
    return np.exp(log_softmax(logits))


@quiet
def entropy_terms(logits):
    """`p * log(p)` of each entry over the last axis, `(..., V) -> (..., V)`, 0 where p is 0; less their sum is the entropy.

    >>> entropy_terms(np.array([[0.0, 0.0, -np.inf]])).round(3).tolist()
    [[-0.347, -0.347, 0.0]]
    """
    log_p = log_softmax(logits)
    return weighted(np.exp(log_p), log_p)


def onehot(targets, vocabulary):
    """Rows `(..., V)` of 0 with a 1 at the target; a row of NaN where the target is outside `[0, V)`. targets: `(...)`.

    >>> onehot(np.array([2, 7]), 3).tolist()
    [[0.0, 0.0, 1.0], [nan, nan, nan]]
    """
    hot = (targets[..., None] == np.arange(vocabulary)).astype(np.float64)
    hot[(targets < 0) | (targets >= vocabulary)] = np.nan
    return hot


def target_logit(logits, targets):
    """The logits of each token's targets, `(n,)` or `(n, K)`, NaN where one is outside `[0, V)` (paper: section 4.1).

    >>> target_logit(np.array([[10.0, 11.0], [20.0, 21.0]]), np.array([1, 2])).tolist()
    [11.0, nan]
    """
    inside = (targets >= 0) & (targets < logits.shape[-1])
    token = np.arange(len(targets)).reshape(-1, *[1] * (targets.ndim - 1))
    return np.where(inside, logits[token, np.where(inside, targets, 0)], np.nan)


@quiet
def distribution_gradient(logits, ids, alpha, beta, gamma, softcap=None):
    """G `(n, V)`: `p * (alpha + beta * log(p)) - sum_k gamma_k * onehot(ids_k)`, times the softcap's derivative.

    ids and gamma are `(n, K)`, alpha and beta `(n,)`; `log(p) = z - lse`. Every function of a token's log-sum-exp, its entropy
    and the logits of its ids has a gradient of this form, with respect to the logits before the softcap. An entry of
    probability 0 adds 0 to the first part. An id outside `[0, V)` makes the row NaN, whatever its gamma is.

    >>> z, ids = np.log([[1.0, 3.0]]), np.array([[1, 1]])
    >>> distribution_gradient(z, ids, np.array([2.0]), np.array([0.0]), gamma=np.array([[0.5, 1.5]])).round(3).tolist()
    [[0.5, -0.5]]
    """
    picked = np.sum(gamma[..., None] * onehot(ids, logits.shape[-1]), axis=1)
    of_all = alpha[:, None] * softmax(logits) + beta[:, None] * entropy_terms(logits)
    return softcap_slope(logits, softcap) * (of_all - picked)


def logit_gradient(logits, targets, a, b, softcap=None):
    """G `(n, V)`: the gradient of `sum(b * nll + (a - b) * lse)` with respect to the logits before the softcap.

    `a (n,)` is all that flows into a token's lse, `b (n,)` what flows out of its target logit; plain nll: a = b.
    Softmax is the gradient of lse, one-hot that of the target logit (paper: section 4.3), and
    `d/dz softcap * tanh(z / softcap) = 1 - tanh(z / softcap)^2`.

    >>> logit_gradient(np.log([[1.0, 3.0]]), np.array([1]), a=np.ones(1), b=np.ones(1)).round(3).tolist()
    [[0.25, -0.25]]
    """
    return distribution_gradient(logits, targets[:, None], a, np.zeros_like(a), b[:, None], softcap)


def softcap_slope(logits, softcap=None):
    """The derivative `(n, V)` of softcapped logits with respect to what was capped: `1 - tanh^2`.

    >>> softcap_slope(np.array([[0.0, 4.0, 5.0]]), softcap=5.0).round(2).tolist()
    [[1.0, 0.36, 0.0]]
    """
    return np.ones(logits.shape) if softcap is None else 1.0 - (logits / softcap) ** 2


@quiet
def weighted(weight, x):
    """`weight * x`, but 0 where the weight is 0, whatever x is: what has no weight takes no part.

    >>> weighted(np.array([0.0, 2.0]), np.array([np.nan, 3.0])).tolist()
    [0.0, 6.0]
    """
    return np.where(weight == 0, 0.0, weight * x)
