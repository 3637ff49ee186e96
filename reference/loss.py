"""The loss and its gradients from stored logits: what `cce_numba.forward` and `cce_numba.backward` must equal.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025, arXiv 2411.09009, section 3.
The options have the names and meanings of `cut_cross_entropy.linear_cross_entropy`.
"""

from dataclasses import dataclass

import numpy as np

from .building_blocks import logit_gradient, logits, logsumexp, quiet, target_logit


@dataclass(frozen=True)
class Forward:
    """What the forward computes; arrays are float64, `(...)` is the shape of the targets after the shift."""

    logits: np.ndarray  # (n_valid, V), of the valid tokens alone, after bias and softcap
    lse: np.ndarray  # (...), 0 at ignored tokens, as in the next two
    target_logit: np.ndarray  # (...)
    nll: np.ndarray  # (...), lse - target_logit
    loss: np.ndarray  # a scalar for reduction "mean" and "sum", nll itself for "none"
    n_valid: int


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


@quiet
def forward(e, c, targets, *, bias=None, ignore_index=-100, softcap=None, reduction="mean", shift=0):
    """Loss of a linear layer and cross-entropy: `e (..., D)`, `c (V, D)`, `targets (...)` int, `bias (V,)`.

    Ignored tokens are taken out before anything is computed, so nothing in their rows of `e` matters.
    A target outside `[0, V)` that is not `ignore_index` makes its token's nll NaN. "mean" is over the valid tokens:
    NaN when there are none.

    >>> result = forward(np.zeros((3, 2)), np.zeros((4, 2)), np.array([0, -100, 3]), reduction="sum")
    >>> result.nll.round(3).tolist(), float(result.loss.round(3)), result.n_valid
    ([1.386, 0.0, 1.386], 2.773, 2)
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}, but must be "mean", "sum" or "none"')
    e, targets = shifted(np.asarray(e, np.float64), np.asarray(targets), shift)
    valid = targets != ignore_index
    n_valid = int(np.sum(valid))

    z = logits(e[valid], c, bias, softcap)
    lse, target = logsumexp(z), target_logit(z, targets[valid])
    nll = lse - target

    def everywhere(values):
        full = np.zeros(valid.shape)
        full[valid] = values
        return full

    loss = everywhere(nll) if reduction == "none" else np.sum(nll)
    if reduction == "mean":
        loss = loss / n_valid if n_valid else np.float64(np.nan)
    return Forward(z, everywhere(lse), everywhere(target), everywhere(nll), loss, n_valid)


@quiet
def kept_product(g, x, keep=None):
    """`g (n, k) @ x (k, D)` over the entries of g that `keep (n, k)` keeps; None keeps all.

    Row by row, because a dropped entry must add nothing at all, and 0 * inf is NaN.

    >>> kept_product(np.array([[2.0, np.nan]]), np.array([[3.0], [np.inf]]), np.array([[True, False]])).tolist()
    [[6.0]]
    """
    if keep is None:
        return g @ x
    product = np.zeros((len(g), x.shape[-1]))
    for row, kept in enumerate(keep):
        product[row] = g[row, kept] @ x[kept]
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
    reduction="mean",
    shift=0,
):
    """Gradients of `sum(d_loss * loss) + sum(d_lse * lse)` with respect to `e`, `c` and `bias`.

    d_loss: upstream gradient of the loss, a scalar, or for "none" also of the shape of nll; None is 1.
    d_lse: upstream gradient of lse, a scalar or of the shape of nll; None is 0.
    keep_e, keep_c: bool `(n_valid, V)`, the entries of G that dE, and that dC and dbias, are made of; None keeps all.
    A token to which nothing flows back takes no part, so that a NaN in it stays there.

    >>> grads = backward(np.ones((1, 2)), np.zeros((2, 2)), np.array([0]), bias=np.zeros(2))
    >>> grads.c.tolist(), grads.bias.tolist()
    ([[-0.5, -0.5], [0.5, 0.5]], [-0.5, 0.5])
    """
    options = {"bias": bias, "ignore_index": ignore_index, "softcap": softcap, "shift": shift}
    result = forward(e, c, targets, reduction=reduction, **options)
    e, c, all_targets = np.asarray(e, np.float64), np.asarray(c, np.float64), np.asarray(targets)
    e_shifted, targets = shifted(e, all_targets, shift)
    valid = targets != ignore_index

    # What flows into the nll and the lse of each valid token. Without valid tokens, "mean" has nothing to divide.
    d_nll = np.asarray(1.0 if d_loss is None else d_loss, np.float64)
    if reduction == "mean":
        d_nll = d_nll / max(result.n_valid, 1)
    d_nll = np.broadcast_to(d_nll, valid.shape)[valid]
    d_lse = np.broadcast_to(np.asarray(0.0 if d_lse is None else d_lse, np.float64), valid.shape)[valid]

    a, b = d_nll + d_lse, d_nll
    part = (a != 0) | (b != 0)  # who takes part
    g = logit_gradient(result.logits[part], targets[valid][part], a[part], b[part], softcap)
    keep_e = None if keep_e is None else keep_e[part]
    keep_c = None if keep_c is None else keep_c[part].T

    d_valid = np.zeros((result.n_valid, e.shape[-1]))
    d_valid[part] = kept_product(g, c, keep_e)
    d_e = np.zeros(e.shape)
    shifted(d_e, all_targets, shift)[0][valid] = d_valid
    d_c = kept_product(g.T, e_shifted[valid][part], keep_c)
    d_bias = kept_product(g.T, np.ones((len(g), 1)), keep_c)[:, 0]  # the column of c whose e is always 1
    return Gradients(d_e, d_c, None if bias is None else d_bias)
