"""A student's head that is trained on a teacher's distribution, from stored logits of both.

Two heads give a token logits over the same vocabulary; their hidden sizes may differ. Let P be the teacher's probabilities and
Q the student's, both of logits divided by the temperature. Let `KL(A || B) = sum_v A_v * log(A_v / B_v)`, in which an entry
with A_v = 0 counts as 0. The loss of a token is

    forward_kl    KL(P || Q)
    reverse_kl    KL(Q || P)
    jsd           beta * KL(P || M) + (1 - beta) * KL(Q || M),   M = beta * P + (1 - beta) * Q,   0 < beta < 1

`jsd` is the generalised Jensen-Shannon divergence of Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024,
arXiv 2306.13649, equation 1. The conventions are those of TRL's `GKDTrainer` and of Liger's `LigerFusedLinearJSD`. These
write `beta = 0` for the forward and `beta = 1` for the reverse KL, which are kinds of their own here. As in both, the
temperature divides the finished logits, after any softcap, and the loss is not multiplied by anything. Hinton et al.,
"Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, multiply it by the temperature squared; that is left to
the caller.
"""

from dataclasses import dataclass

import numpy as np

from .building_blocks import log_softmax, logits, quiet, softcap_slope, weighted
from .loss import Gradients, input_gradients
from .tokens import counting, shifted

KINDS = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Head:
    """What gives logits: `softcap * tanh((e @ c.T + bias) / softcap)`."""

    e: np.ndarray  # (..., D)
    c: np.ndarray  # (V, D)
    bias: np.ndarray | None = None  # (V,)
    softcap: float | None = None


@dataclass(frozen=True)
class Distillation:
    """What `distillation` finds; `(...)` is the shape of the tokens after the shift."""

    per_token: np.ndarray  # (...), 0 where ignored
    loss: np.ndarray  # a scalar for reduction "mean" and "sum", per_token for "none"
    n_valid: int


def kl_terms(log_a, log_b):
    """`A * log(A / B)` of each entry, from logarithms `(..., V)`; 0 where A is 0, and inf where B alone is.

    >>> kl_terms(np.array([np.log(0.5), np.log(0.5), -np.inf]), np.log([0.25, 0.25, 0.5])).round(3).tolist()
    [0.347, 0.347, 0.0]
    """
    return weighted(np.exp(log_a), log_a - log_b)


@quiet
def divergence_and_gradient(log_p, log_q, kind="forward_kl", beta=0.5):
    """The divergence `(n,)` of teacher `log_p (n, V)` and student `log_q (n, V)`, and its gradient `(n, V)`.

    The gradient is with respect to the logits that log_q is the `log_softmax` of. A divergence D with the derivative
    `s_v = d D / d Q_v` has there `Q_v * (s_v - sum_w Q_w * s_w)`:

        forward_kl    s = -P / Q                              so it is  Q - P
        reverse_kl    s = log(Q / P) + 1                                Q * (log(Q / P) - KL(Q || P))
        jsd           s = (1 - beta) * log(Q / M)                       (1 - beta) * Q * (log(Q / M) - KL(Q || M))

    >>> p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    >>> [x.round(3).tolist() for x in divergence_and_gradient(p, q)]
    [[0.144], [[-0.25, 0.25]]]
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, but must be between 0 and 1; at these, take forward_kl and reverse_kl")
    q = np.exp(log_q)
    if kind == "forward_kl":
        return np.sum(kl_terms(log_p, log_q), axis=-1), q - np.exp(log_p)
    if kind == "reverse_kl":
        terms = kl_terms(log_q, log_p)
        divergence = np.sum(terms, axis=-1)
        return divergence, terms - weighted(q, divergence[:, None])
    log_m = np.logaddexp(np.log(beta) + log_p, np.log1p(-beta) + log_q)
    terms = kl_terms(log_q, log_m)
    of_student = np.sum(terms, axis=-1)
    divergence = beta * np.sum(kl_terms(log_p, log_m), axis=-1) + (1 - beta) * of_student
    return divergence, (1 - beta) * (terms - weighted(q, of_student[:, None]))


@quiet
def union(log_p, log_q, kind="forward_kl", beta=0.5):
    """What a filter compares with its threshold, `(n, V)`: the larger of both probabilities; NaN for a lost token.

    A token is lost if its gradient has a number that is not finite. The filters of `filters` and `roulette` take this in the
    place of probabilities, without targets. A filter drops entries where it is below eps, and it bounds the gradient g there::

        forward_kl    |g| = |Q - P| <= union
        jsd           |g| <= 2 / e * union, whatever beta is
        reverse_kl    |g| <= Q * (|log(Q / P)| + KL(Q || P)), of which the first factor alone is at most union

    For jsd, with L = -log(1 - beta): log(Q / M) <= L, KL(Q || M) <= L, and Q * log(M / Q) <= M / e, since x * log(1 / x) is at
    most 1 / e. So abs(g) is at most (1 - beta) * (Q * L + M / e), and (1 - beta) * L is at most 1 / e too.

    >>> union(np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])).round(3).tolist()
    [[0.5, 0.75]]
    """
    _, g = divergence_and_gradient(log_p, log_q, kind, beta)
    lost = ~np.isfinite(g).all(axis=-1, keepdims=True)
    return np.where(lost, np.nan, np.exp(np.maximum(log_p, log_q)))


def heads(student, teacher, targets, temperature, shift, ignore_index):
    """The tokens that take part, the student's logits, and the log-probabilities of both, student and teacher, `(n_valid, V)`.

    A temperature t that divides `softcap * tanh(x / softcap)` is a scale 1 / t of x with a softcap of `softcap / t`.

    >>> one = Head(np.ones((1, 1)), np.array([[0.0], [4.0]]), softcap=4.0)
    >>> heads(one, one, None, 2.0, 0, -100)[1].round(3).tolist()  # 4 * tanh(1) / 2
    [[0.0, 1.523]]
    """
    shape = np.shape(student.e)[:-1]
    tokens = counting(
        student.e, np.full(shape, ignore_index + 1) if targets is None else targets, shift=shift, ignore_index=ignore_index
    )
    teacher_e = shifted(np.asarray(teacher.e, np.float64), np.zeros(shape), shift)[0][tokens.valid]
    z_student, z_teacher = (
        logits(e, head.c, head.bias, None if head.softcap is None else head.softcap / temperature, 1 / temperature)
        for e, head in ((tokens.e, student), (teacher_e, teacher))
    )
    return tokens, z_student, log_softmax(z_student), log_softmax(z_teacher)


def distillation(
    student,
    teacher,
    targets=None,
    *,
    kind="forward_kl",
    beta=0.5,
    temperature=1.0,
    reduction="mean",
    shift=0,
    ignore_index=-100,
):
    """The divergence of the student's distribution from the teacher's: two heads (`Head`) of the same tokens and vocabulary.

    targets `(...)` only say which tokens are ignored: those with `ignore_index`. None ignores none. "mean" is over the others,
    and NaN when there are none.

    >>> student, teacher = Head(np.ones((1, 1)), np.zeros((2, 1))), Head(np.ones((1, 2)), np.log([[0.25, 1.0], [0.75, 1.0]]))
    >>> float(distillation(student, teacher).loss.round(3))  # 0.25 * log(0.25 / 0.5) + 0.75 * log(0.75 / 0.5)
    0.131
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}, but must be "mean", "sum" or "none"')
    tokens, _, log_q, log_p = heads(student, teacher, targets, temperature, shift, ignore_index)
    divergence, _ = divergence_and_gradient(log_p, log_q, kind, beta)
    per_token, n_valid = tokens.everywhere(divergence), len(divergence)
    if reduction == "none":
        return Distillation(per_token, per_token, n_valid)
    total = np.sum(divergence)
    mean = total / n_valid if n_valid else np.float64(np.nan)
    return Distillation(per_token, mean if reduction == "mean" else total, n_valid)


@quiet
def distillation_backward(
    student,
    teacher,
    targets=None,
    *,
    d_loss=None,
    keep_e=None,
    keep_c=None,
    kind="forward_kl",
    beta=0.5,
    temperature=1.0,
    reduction="mean",
    shift=0,
    ignore_index=-100,
):
    """Gradients of `sum(d_loss * loss)` with respect to the student's e, c and bias; the teacher gets none.

    d_loss: a scalar, or for "none" also of the shape of the loss; None is 1. A token to which nothing flows back takes no part.
    keep_e, keep_c `(n_valid, V)`: see `loss.backward`. What a filter keeps follows from `union`.

    >>> student, teacher = Head(np.ones((1, 1)), np.zeros((2, 1))), Head(np.ones((1, 2)), np.log([[0.25, 1.0], [0.75, 1.0]]))
    >>> distillation_backward(student, teacher).c.round(3).tolist()
    [[0.25], [-0.25]]
    """
    tokens, z, log_q, log_p = heads(student, teacher, targets, temperature, shift, ignore_index)
    _, g = divergence_and_gradient(log_p, log_q, kind, beta)
    d_token = np.asarray(1.0 if d_loss is None else d_loss, np.float64)
    d_token = tokens.select(d_token / max(len(z), 1) if reduction == "mean" else d_token)
    part = d_token != 0  # who takes part
    slope = softcap_slope(z, None if student.softcap is None else student.softcap / temperature)
    g = (d_token[:, None] * g * slope / temperature)[part]
    keep = (None if mask is None else mask[part] for mask in (keep_e, keep_c))
    d_rows = np.zeros(tokens.e.shape)
    d_rows[part], d_c, d_bias = input_gradients(g, tokens.e[part], np.asarray(student.c, np.float64), *keep)
    d_e = tokens.gradient_of_e(d_rows, np.shape(student.e), shift)
    return Gradients(d_e, d_c, None if student.bias is None else d_bias)
