"""Device functions of a divergence, of one entry: P is the teacher's probability and Q the student's, by their logarithms.

`reference/distillation.py` has the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from numba import cuda


@dataclass(frozen=True)
class Divergence:
    """Which one: "forward_kl", "reverse_kl" or "jsd", and the weight of the teacher in the mixture of the last."""

    kind: str
    beta: float

    @property
    def has_own(self) -> bool:
        """Whether the gradient takes off a mean under Q, so that a sum of the student's own is needed."""
        return self.kind != "forward_kl"


class Functions(NamedTuple):
    """Device functions of log_p, the teacher's, and log_q."""

    terms: Any  # what is summed up to the divergence; and what is, times Q, in the gradient, whose sum is `of_student`
    gradient: Any  # gradient(log_p, log_q, of_student): the derivative with respect to the student's logits


def functions(which: Divergence, real: Any, exp: Any = math.exp, log: Any = math.log, **how: Any) -> Functions:
    """Those of a divergence, on numbers of type `real`; exp and log may be device functions; how: options of `cuda.jit`."""
    jit, kind, zero = cuda.jit(device=True, **how), which.kind, real(0)
    beta, rest = real(which.beta), real(1 - which.beta)
    log_beta, log_rest, minus_infinity = real(math.log(which.beta)), real(math.log1p(-which.beta)), real(-math.inf)

    @jit
    def times(probability: Any, x: Any) -> Any:
        """Their product, 0 where the probability is 0."""
        return probability if probability == zero else probability * x

    @jit
    def log_of_mixture(log_p: Any, log_q: Any) -> Any:
        of_p, of_q = log_beta + log_p, log_rest + log_q
        largest = max(of_p, of_q)
        if of_p != of_p or of_q != of_q:
            largest = of_p + of_q
        elif largest > minus_infinity:
            largest += real(log(exp(of_p - largest) + exp(of_q - largest)))
        return largest

    @jit
    def terms(log_p: Any, log_q: Any) -> Any:
        p, q = real(exp(log_p)), real(exp(log_q))
        if kind == "forward_kl":
            return times(p, log_p - log_q), zero
        if kind == "reverse_kl":
            own = times(q, log_q - log_p)
            return own, own
        log_m = log_of_mixture(log_p, log_q)
        own = times(q, log_q - log_m)
        return beta * times(p, log_p - log_m) + rest * own, own

    @jit
    def gradient(log_p: Any, log_q: Any, of_student: Any) -> Any:
        q = real(exp(log_q))
        if kind == "forward_kl":
            return q - real(exp(log_p))
        g = terms(log_p, log_q)[1] - times(q, of_student)
        return g if kind == "reverse_kl" else rest * g

    return Functions(terms, gradient)
