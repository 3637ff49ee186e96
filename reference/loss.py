"""The loss and its gradients from stored logits: what `cce_numba.forward` and `cce_numba.backward` must equal.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025, arXiv 2411.09009, section 3.
The options have the names and meanings of `cut_cross_entropy.linear_cross_entropy`; label smoothing and class weights are
those of `torch.nn.functional.cross_entropy`. With all of them, the loss of a token with logits `z (V,)` and their lse is

    token_weight * (sum_v q_v * (lse - z_v) + z_loss * lse^2)
    q = class_weights * ((1 - label_smoothing) * onehot + label_smoothing / V)

and a mean divides by the sum of `token_weight * class_weights[target]`.

Soft targets are K targets of a token, `targets (..., K)`, with the probabilities `t_k` of `target_probs (..., K)`, whose sum
need not be 1. Then

    q = class_weights * ((1 - label_smoothing) * sum_k t_k * onehot_k + label_smoothing / V * sum_k t_k)

and a mean divides by the sum of `token_weight * sum_k t_k * class_weights[target_k]`. So a token with K targets is the same as
K tokens that share its row of `e`, have one target each, and weigh `token_weight * t_k`. Only the z-loss is the token's own and
counts once. One target of probability 1 is the loss above.

Where probabilities sum to 1, the loss of a token is that of `torch.nn.functional.cross_entropy` with the targets written out
over the vocabulary. That function differs in two ways. Its mean divides by the number of tokens even where classes have
weights; ours divides by the weights, as with one target. And it smooths with `label_smoothing / V` whatever the probabilities
sum to; ours smooths half as much where they sum to a half.
"""

from dataclasses import dataclass

import numpy as np

from .building_blocks import (
    distribution_gradient,
    log_softmax,
    logits,
    logsumexp,
    onehot,
    quiet,
    softcap_slope,
    target_logit,
    weighted,
)
from .tokens import counting, per_token, shifted


@dataclass(frozen=True)
class Forward:
    """What the forward computes; arrays are float64, `(...)` is the shape of the tokens after the shift."""

    logits: np.ndarray  # (n_valid, V), of the valid tokens alone, after bias, scale and softcap
    lse: np.ndarray  # (...), 0 at ignored tokens, as in the next two
    target_logit: np.ndarray  # (...), or (..., K) of soft targets, 0 where padded
    nll: np.ndarray  # (...), lse - target_logit, or of soft targets the sum of these times their probabilities
    loss: np.ndarray  # a scalar for reduction "mean" and "sum", per token for "none"
    n_valid: int
    total_weight: float  # what a mean divides by: n_valid without weights


@dataclass(frozen=True)
class Gradients:
    """Gradients in float64, each of the shape of what it belongs to."""

    e: np.ndarray  # (..., D), rows of 0 where ignored or shifted away
    c: np.ndarray  # (V, D)
    bias: np.ndarray | None  # (V,), None without a bias


def weights(targets, vocabulary, class_weights=None, token_weights=None, target_probs=None):
    """`(n,)` the token weights, `(n,)` those times the class weight of the target, `(V,)` the class weights; 1 where not given.

    A target outside `[0, vocabulary)` counts as 1: its token is lost, but not the mean's denominator. With targets and
    target_probs `(n, K)` the second is `(n, K)`, times the probabilities.

    >>> of_token, of_target, _ = weights(np.array([1, 0]), 2, np.array([3.0, 4.0]), np.array([0.5, 1.0]))
    >>> of_token.tolist(), of_target.tolist()
    ([0.5, 1.0], [2.0, 3.0])
    """
    of_class = np.ones(vocabulary) if class_weights is None else np.asarray(class_weights, np.float64)
    of_token = np.ones(len(targets)) if token_weights is None else np.asarray(token_weights, np.float64)
    inside = (targets >= 0) & (targets < vocabulary)
    of_target = np.where(inside, of_class[np.where(inside, targets, 0)], 1.0)
    if target_probs is None:
        return of_token, of_token * of_target, of_class
    return of_token, weighted(of_token[:, None], target_probs * of_target), of_class


def soft_targets(e, targets, target_probs=None, token_weights=None, *, shift=0, **options):
    """The tokens that take part, `tokens.Tokens`, and of these the probabilities `(n, K)` of their targets, 0 where padded.

    And their token weights `(n,)`. Without target_probs there is one target a token, of probability 1.

    >>> tokens, t, _ = soft_targets(np.zeros((2, 3)), np.array([[5, 6], [7, -100]]), np.array([[0.5, 0.5], [1.0, np.nan]]))
    >>> t.tolist()
    [[0.5, 0.5], [1.0, 0.0]]
    """
    e, targets = np.asarray(e), np.asarray(targets)
    t = np.ones(targets.shape) if target_probs is None else np.asarray(target_probs, np.float64)
    if targets.shape != t.shape or targets.ndim != e.ndim - (target_probs is None):
        raise ValueError(f"shapes do not fit: e {e.shape}, targets {targets.shape}, target_probs {np.shape(target_probs)}")
    tokens = counting(e, targets, shift=shift, **options)
    _, token_weights = per_token(None, token_weights, e.shape[:-1], shift)
    return tokens, tokens.select_ids(shifted(e, t, shift)[1]), tokens.select(token_weights)


@quiet
def forward(
    e,
    c,
    targets,
    *,
    target_probs=None,
    bias=None,
    ignore_index=-100,
    softcap=None,
    logit_scale=None,
    reduction="mean",
    shift=0,
    label_smoothing=0.0,
    z_loss=0.0,
    class_weights=None,
    token_weights=None,
):
    """Loss of a linear layer and cross-entropy: `e (..., D)`, `c (V, D)`, `targets (...)` int, `bias (V,)`.

    target_probs: `(..., K)`, then targets too is `(..., K)`, padded by `ignore_index`; a token of padding alone is ignored.
    logit_scale: a number or `(...)`, one for each token of e. class_weights `(V,)`. token_weights `(...)` go with the targets.
    Ignored tokens are taken out before anything is computed, so nothing in their rows of `e` matters.
    A target outside `[0, V)` that is not `ignore_index` makes its token's nll NaN, whatever its probability. "mean" is over the
    valid tokens, by their weights: NaN when there are none.

    >>> result = forward(np.zeros((3, 2)), np.zeros((4, 2)), np.array([0, -100, 3]), reduction="sum")
    >>> result.nll.round(3).tolist(), float(result.loss.round(3)), result.n_valid
    ([1.386, 0.0, 1.386], 2.773, 2)
    >>> soft = {"targets": np.array([[0, 3, -100]]), "target_probs": np.array([[0.5, 0.25, 0.0]])}
    >>> forward(np.zeros((1, 2)), np.zeros((4, 2)), **soft, reduction="none").loss.round(3).tolist()  # log(4) * 0.75
    [1.04]
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}, but must be "mean", "sum" or "none"')
    options = {"ignore_index": ignore_index, "shift": shift, "logit_scale": logit_scale}
    tokens, t, token_weights = soft_targets(e, targets, target_probs, token_weights, **options)
    z = logits(tokens.e, c, bias, softcap, tokens.scale)
    lse, log_p, vocabulary = logsumexp(z), log_softmax(z), z.shape[-1]

    of_token, of_target, of_class = weights(tokens.ids, vocabulary, class_weights, token_weights, t)
    hot, mass = np.sum(t[..., None] * onehot(tokens.ids, vocabulary), axis=1), np.sum(t, axis=-1)
    q = of_class * ((1 - label_smoothing) * hot + label_smoothing / vocabulary * mass[:, None])
    per_valid = weighted(of_token, np.sum(weighted(q, -log_p), axis=-1) + weighted(z_loss, lse**2))
    total_weight = np.sum(of_target)

    loss = tokens.everywhere(per_valid) if reduction == "none" else np.sum(per_valid)
    if reduction == "mean":
        loss = loss / total_weight if total_weight else np.float64(np.nan)
    return Forward(
        logits=z,
        lse=tokens.everywhere(lse),
        target_logit=tokens.ids_everywhere(target_logit(z, tokens.ids)),
        nll=tokens.everywhere(np.sum(weighted(hot, -log_p), axis=-1)),
        loss=loss,
        n_valid=len(z),
        total_weight=total_weight,
    )


@quiet
def kept_product(g, x, keep=None):
    """`g (n, k) @ x (k, D)` over the entries of g that `keep (n, k)` keeps; None keeps all.

    Keep is bool, or numbers that multiply g, of which 0 drops an entry. Row by row, because a dropped entry must add nothing at
    all, and 0 * inf is NaN.

    >>> kept_product(np.array([[2.0, np.nan]]), np.array([[3.0], [np.inf]]), np.array([[True, False]])).tolist()
    [[6.0]]
    """
    if keep is None:
        return g @ x
    product = np.zeros((len(g), x.shape[-1]))
    for row, kept in enumerate(keep != 0):
        product[row] = (g[row, kept] * keep[row, kept]) @ x[kept]
    return product


def input_gradients(g, e, c, keep_e=None, keep_c=None):
    """What G `(n, V)` gives to n rows of e, to c and to the bias: `(n, D)`, `(V, D)`, `(V,)`. The masks: see `kept_product`.

    >>> [x.tolist() for x in input_gradients(np.array([[2.0, -2.0]]), np.array([[3.0]]), np.array([[4.0], [5.0]]))]
    [[[-2.0]], [[6.0], [-6.0]], [2.0, -2.0]]
    """
    keep_c = None if keep_c is None else keep_c.T
    d_bias = kept_product(g.T, np.ones((len(g), 1)), keep_c)[:, 0]  # the column of c whose e is always 1
    return kept_product(g, c, keep_e), kept_product(g.T, e, keep_c), d_bias


def backward(
    e,
    c,
    targets,
    *,
    d_loss=None,
    d_lse=None,
    keep_e=None,
    keep_c=None,
    target_probs=None,
    bias=None,
    ignore_index=-100,
    softcap=None,
    logit_scale=None,
    reduction="mean",
    shift=0,
    label_smoothing=0.0,
    z_loss=0.0,
    class_weights=None,
    token_weights=None,
):
    """Gradients of `sum(d_loss * loss) + sum(d_lse * lse)` with respect to `e`, `c` and `bias`.

    d_loss: upstream gradient of the loss, a scalar, or for "none" also of the shape of nll; None is 1.
    d_lse: upstream gradient of lse, a scalar or of the shape of nll; None is 0.
    keep_e, keep_c: `(n_valid, V)`, the entries of G that dE, and that dC and dbias, are made of: bool, or numbers that multiply
    them; None keeps all. What label smoothing takes from all entries alike is never left out nor multiplied.
    A token to which nothing flows back takes no part, so that a NaN in it stays there.

    >>> grads = backward(np.ones((1, 2)), np.zeros((2, 2)), np.array([0]), bias=np.zeros(2))
    >>> grads.c.tolist(), grads.bias.tolist()
    ([[-0.5, -0.5], [0.5, 0.5]], [-0.5, 0.5])
    """
    options = {"ignore_index": ignore_index, "shift": shift, "logit_scale": logit_scale}
    tokens, t, token_weights = soft_targets(e, targets, target_probs, token_weights, **options)
    c, vocabulary, scale = np.asarray(c, np.float64), len(c), tokens.scale
    z = logits(tokens.e, c, bias, softcap, scale)
    of_token, of_target, of_class = weights(tokens.ids, vocabulary, class_weights, token_weights, t)
    total_weight = np.sum(of_target)

    # What flows into each valid token's loss and lse. Where the weights sum to nothing, "mean" is NaN and nothing flows.
    d_token = np.asarray(1.0 if d_loss is None else d_loss, np.float64)
    if reduction == "mean":
        d_token = d_token / total_weight if total_weight else d_token * 0.0
    d_token, d_lse = tokens.select(d_token), tokens.select(0.0 if d_lse is None else d_lse)

    # The loss is linear in the logits but for the lse: a flows into that, b out of the target logits, u out of every logit.
    b = weighted(of_target, d_token[:, None]) * (1 - label_smoothing)
    u = weighted(weighted(of_token, np.sum(t, axis=-1)), d_token) * label_smoothing / vocabulary
    of_z_loss = weighted(weighted(of_token, d_token) * z_loss, 2 * logsumexp(z))
    a = np.sum(b, axis=-1) + u * np.sum(of_class) + of_z_loss + d_lse
    part = (a != 0) | (b != 0).any(axis=-1) | (u != 0)  # who takes part
    a, b, u, z, scale, rows = a[part], b[part], u[part], z[part], scale[part, None], tokens.e[part]
    g = scale * distribution_gradient(z, tokens.ids[part], a, np.zeros_like(a), b, softcap)
    d_rows, d_c, d_bias = input_gradients(g, rows, c, *(None if keep is None else keep[part] for keep in (keep_e, keep_c)))
    if label_smoothing:
        g = -scale * softcap_slope(z, softcap) * u[:, None] * of_class
        # A class of weight 0 takes no part.
        more = input_gradients(g, rows, c, keep_e=np.broadcast_to(of_class != 0, g.shape))
        d_rows, d_c, d_bias = d_rows + more[0], d_c + more[1], d_bias + more[2]
    d_valid = np.zeros(tokens.e.shape)
    d_valid[part] = d_rows
    return Gradients(tokens.gradient_of_e(d_valid, np.shape(e), shift), d_c, None if bias is None else d_bias)
