"""The loss and its gradients from stored logits: what `cce_numba.forward` and `cce_numba.backward` must equal.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025, arXiv 2411.09009, section 3.
The options have the names and meanings of `cut_cross_entropy.linear_cross_entropy`; label smoothing and class weights are
those of `torch.nn.functional.cross_entropy`. With all of them, the loss of a token with logits `z (V,)` and their lse is

    token_weight * (sum_v q_v * (lse - z_v) + z_loss * lse^2)
    q = class_weights * ((1 - label_smoothing) * onehot + label_smoothing / V)

and a mean divides by the sum of `token_weight * class_weights[target]`.
"""

from dataclasses import dataclass

import numpy as np

from .building_blocks import (
    log_softmax,
    logit_gradient,
    logits,
    logsumexp,
    onehot,
    quiet,
    softcap_slope,
    target_logit,
    weighted,
)


@dataclass(frozen=True)
class Forward:
    """What the forward computes; arrays are float64, `(...)` is the shape of the targets after the shift."""

    logits: np.ndarray  # (n_valid, V), of the valid tokens alone, after bias, scale and softcap
    lse: np.ndarray  # (...), 0 at ignored tokens, as in the next two
    target_logit: np.ndarray  # (...)
    nll: np.ndarray  # (...), lse - target_logit
    loss: np.ndarray  # a scalar for reduction "mean" and "sum", per token for "none"
    n_valid: int
    total_weight: float  # what a mean divides by: n_valid without weights


@dataclass(frozen=True)
class Gradients:
    """Gradients in float64, each of the shape of what it belongs to."""

    e: np.ndarray  # (..., D), rows of 0 where ignored or shifted away
    c: np.ndarray  # (V, D)
    bias: np.ndarray | None  # (V,), None without a bias


def shifted(e, targets, shift):
    """Views of e without its last, and of targets without its first `shift` tokens: token t predicts token t + shift.

    >>> e, targets = shifted(np.zeros((2, 5, 3)), np.array([[10, 11, 12, 13, 14]] * 2), shift=1)
    >>> e.shape, targets[0].tolist()
    ((2, 4, 3), [11, 12, 13, 14])
    """
    shift = int(shift)
    if shift == 0:
        return e, targets
    return e[..., : max(targets.shape[-1] - shift, 0), :], targets[..., shift:]


def weights(targets, vocabulary, class_weights=None, token_weights=None):
    """`(n,)` the token weights, `(n,)` those times the class weight of the target, `(V,)` the class weights; 1 where not given.

    A target outside `[0, vocabulary)` counts as 1: its token is lost, but not the mean's denominator.

    >>> of_token, of_target, _ = weights(np.array([1, 0]), 2, np.array([3.0, 4.0]), np.array([0.5, 1.0]))
    >>> of_token.tolist(), of_target.tolist()
    ([0.5, 1.0], [2.0, 3.0])
    """
    of_class = np.ones(vocabulary) if class_weights is None else np.asarray(class_weights, np.float64)
    of_token = np.ones(targets.shape) if token_weights is None else np.asarray(token_weights, np.float64)
    inside = (targets >= 0) & (targets < vocabulary)
    return of_token, of_token * np.where(inside, of_class[np.where(inside, targets, 0)], 1.0), of_class


@quiet
def forward(
    e,
    c,
    targets,
    *,
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

    logit_scale: a number or `(...)`, one for each token of e. class_weights `(V,)`. token_weights `(...)` go with the targets.
    Ignored tokens are taken out before anything is computed, so nothing in their rows of `e` matters.
    A target outside `[0, V)` that is not `ignore_index` makes its token's nll NaN. "mean" is over the valid tokens,
    by their weights: NaN when there are none.

    >>> result = forward(np.zeros((3, 2)), np.zeros((4, 2)), np.array([0, -100, 3]), reduction="sum")
    >>> result.nll.round(3).tolist(), float(result.loss.round(3)), result.n_valid
    ([1.386, 0.0, 1.386], 2.773, 2)
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}, but must be "mean", "sum" or "none"')
    scale, token_weights = per_token(logit_scale, token_weights, np.asarray(targets).shape, shift)
    e, targets = shifted(np.asarray(e, np.float64), np.asarray(targets), shift)
    valid = targets != ignore_index
    n_valid = int(np.sum(valid))

    z = logits(e[valid], c, bias, softcap, scale[valid])
    lse, target, log_p = logsumexp(z), target_logit(z, targets[valid]), log_softmax(z)
    nll = -target_logit(log_p, targets[valid])

    vocabulary = z.shape[-1]
    of_token, of_target, of_class = weights(targets[valid], vocabulary, class_weights, token_weights[valid])
    q = of_class * ((1 - label_smoothing) * onehot(targets[valid], vocabulary) + label_smoothing / vocabulary)
    per_valid = weighted(of_token, np.sum(weighted(q, -log_p), axis=-1) + weighted(z_loss, lse**2))
    total_weight = np.sum(of_target)

    def everywhere(values):
        full = np.zeros(valid.shape)
        full[valid] = values
        return full

    loss = everywhere(per_valid) if reduction == "none" else np.sum(per_valid)
    if reduction == "mean":
        loss = loss / total_weight if total_weight else np.float64(np.nan)
    return Forward(z, everywhere(lse), everywhere(target), everywhere(nll), loss, n_valid, total_weight)


def per_token(logit_scale, token_weights, shape, shift):
    """Both `(...)` as the loss sees them after the shift: the scale goes with e, the weight with the target; 1 where not given.

    >>> scale, weight = per_token(np.array([1.0, 2.0]), np.array([3.0, 4.0]), (2,), shift=1)
    >>> scale.tolist(), weight.tolist()
    ([1.0], [4.0])
    """
    scale = np.broadcast_to(np.asarray(1.0 if logit_scale is None else logit_scale, np.float64), shape)
    weight = np.broadcast_to(np.asarray(1.0 if token_weights is None else token_weights, np.float64), shape)
    scale, weight = shifted(scale[..., None], weight, shift)
    return scale[..., 0], weight


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


def backward(
    e,
    c,
    targets,
    *,
    d_loss=None,
    d_lse=None,
    keep_e=None,
    keep_c=None,
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
    options = {"bias": bias, "ignore_index": ignore_index, "softcap": softcap, "shift": shift, "logit_scale": logit_scale}
    result = forward(e, c, targets, reduction=reduction, class_weights=class_weights, token_weights=token_weights, **options)
    e, c, all_targets = np.asarray(e, np.float64), np.asarray(c, np.float64), np.asarray(targets)
    scale, token_weights = per_token(logit_scale, token_weights, all_targets.shape, shift)
    e_shifted, targets = shifted(e, all_targets, shift)
    valid = targets != ignore_index
    vocabulary, scale = len(c), scale[valid]

    # What flows into each valid token's loss and lse. Where the weights sum to nothing, "mean" is NaN and nothing flows.
    d_token = np.asarray(1.0 if d_loss is None else d_loss, np.float64)
    if reduction == "mean":
        d_token = d_token / result.total_weight if result.total_weight else d_token * 0.0
    d_token = np.broadcast_to(d_token, valid.shape)[valid]
    d_lse = np.broadcast_to(np.asarray(0.0 if d_lse is None else d_lse, np.float64), valid.shape)[valid]

    # The loss is linear in the logits but for the lse: a flows into that, b out of the target logit, u out of every logit.
    of_token, of_target, of_class = weights(targets[valid], vocabulary, class_weights, token_weights[valid])
    b = weighted(of_target, d_token) * (1 - label_smoothing)
    u = weighted(of_token, d_token) * label_smoothing / vocabulary
    a = b + u * np.sum(of_class) + weighted(weighted(of_token, d_token) * z_loss, 2 * result.lse[valid]) + d_lse
    part = (a != 0) | (b != 0) | (u != 0)  # who takes part
    a, b, u, scale = a[part], b[part], u[part], scale[part]
    z = result.logits[part]
    g = scale[:, None] * logit_gradient(z, targets[valid][part], a, b, softcap)
    keep_e = None if keep_e is None else keep_e[part]
    keep_c = None if keep_c is None else keep_c[part].T

    d_valid = np.zeros((result.n_valid, e.shape[-1]))
    d_valid[part] = kept_product(g, c, keep_e)
    d_c = kept_product(g.T, e_shifted[valid][part], keep_c)
    d_bias = kept_product(g.T, np.ones((len(g), 1)), keep_c)[:, 0]  # the column of c whose e is always 1
    if label_smoothing:
        g = -scale[:, None] * softcap_slope(z, softcap) * u[:, None] * of_class
        d_valid[part] += kept_product(g, c, np.broadcast_to(of_class != 0, g.shape))  # a class of weight 0 takes no part
        d_c += g.T @ e_shifted[valid][part]
        d_bias += g.sum(axis=0)
    d_e = np.zeros(e.shape)
    shifted(d_e, all_targets, shift)[0][valid] = d_valid
    return Gradients(d_e, d_c, None if bias is None else d_bias)
