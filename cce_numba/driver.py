"""The one way through a call, for arrays and for PyTorch: forward, combine, terms of the loss, and back.

    prepared        checks what the caller gave, chooses a backend, makes its device and stream current
    forward         the backend's forward, on each device
      combine         what devices found of their parts of the vocabulary becomes what is true of all of it
      terms_of        the terms of the loss
    ForwardPass     what is kept until the backward
      loss            the loss, of the caller's kind
      backward        upstream gradients become weights per token, and the backend's backward makes gradients of them

The algebra of the loss is in `terms.py`; a backend (`backend.Backend`) knows log-sum-exps, target logits and weights per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cce_numba import arguments, interchange, recurring
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights, backend_module
from cce_numba.destination import Destination
from cce_numba.interchange import Kind
from cce_numba.options import DEFAULTS
from cce_numba.plan import Plan
from cce_numba.terms import Nll, Terms, terms_of, times


@contextlib.contextmanager
def prepared(
    e: Any,
    c: Any,
    targets: Any,
    given: Mapping[str, Any],
    only: Iterable[str] = DEFAULTS,
    *,
    kind: Kind | None = None,
    backend: str | None = None,
    plan: Plan | None = None,
) -> Iterator[tuple[Problem, Plan]]:
    """The checked problem and its plan; inside, the device and the stream that the caller's arrays are on are current.

    Args:
        e, c, targets: as in `linear_cross_entropy`; `arguments.NO_TARGETS` for none.
        given: the options that the caller gave, by name.
        only: the options that mean something to the function that was called.
        kind: how to give results back; that of `e`, if left out.
        backend: the one to take if `given` names none; None chooses.
        plan: that of the same arguments, if it was made before.

    Raises TypeError, ValueError and BackendUnavailable, as `linear_cross_entropy` says.
    """
    native_e = interchange.take("e", e)
    if kind is None:
        kind = interchange.kind_of(e, native_e)
    with kind.current():
        yield recurring.prepare(native_e, c, targets, given, only, kind, backend, plan)


def forward(problem: Problem, plan: Plan, wrt: Collection[str] = ()) -> ForwardPass:
    """Goes forward, inside `prepared`. `wrt` names the gradients that a backward may be asked for, out of "e", "c", "bias"."""
    record_survivors = problem.options.records_survivors(wrt)
    part = backend_module(plan.backend).forward(problem, plan, record_survivors=record_survivors)
    return ForwardPass.of(problem, plan, combine([part]))


def indexed_dot(problem: Problem, plan: Plan) -> Any:
    """(N,) the target's logit per token and nothing else; see `backend.Backend`."""
    return backend_module(plan.backend).indexed_dot(problem, plan)


def combine(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of the whole vocabulary, out of those that each device found of its part of it.

    Today one device has the whole vocabulary, so there is one part, and it is the result. With several devices this is where
    their results meet. The terms of the loss and the backward rely on what it returns: lse, max_logit, log_sum, target_logit
    and mean_logit of the whole vocabulary, the same on each device; tokens and n_valid, which do not depend on the vocabulary;
    survivors of the device's own part, which no other device needs; and draw_seed, which does not depend on the vocabulary.
    Draws do: by the number that an entry has in all of it.

    Raises ValueError for any other number of parts.
    """
    if len(parts) != 1:
        raise ValueError(f"parts: must be those of one device, got {len(parts)}")
    return parts[0]


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """A forward that has been done: what it found, the loss that follows, and the way back. Used inside `prepared` or its like.

    Attributes:
        problem: the checked inputs.
        plan: how it ran.
        statistics: what was found of each token, of the whole vocabulary.
        terms: the loss made of these.
    """

    problem: Problem
    plan: Plan
    statistics: Statistics
    terms: Nll | Terms

    @staticmethod
    def of(problem: Problem, plan: Plan, statistics: Statistics) -> ForwardPass:
        """The one that has left these statistics."""
        return ForwardPass(problem, plan, statistics, terms_of(problem, plan, statistics))

    def loss(self) -> Any:
        """The loss, an array of the caller's kind: 0-d, or per token for reduction "none"."""
        if self.problem.options.reduction == "none":
            return self.problem.exported(self.terms.per_token())
        return self.problem.kind.export(self.terms.reduced())

    def backward(self, d_loss: Any, d_lse: Any, destination: Destination) -> Gradients:
        """Gradients of `sum(d_loss * loss) + sum(d_lse * lse)`, in the caller's arrays and fresh ones of the caller's kind.

        Args:
            d_loss: a scalar, or for "none" also an array in the shape of the loss; None is 1.
            d_lse: a scalar or an array in the shape of the lse, `Problem.per_token`; None is 0.
            destination: where gradients go, and which.

        Raises TypeError or ValueError, naming the argument, for an upstream gradient that does not fit, before anything is
        written.
        """
        p = self.problem
        weights, from_mean_logit = self._weights(d_loss, d_lse)
        into, adds = destination.arrays(p), destination.accumulate
        if from_mean_logit is not None:
            if p.options.smooths_capped:
                weights = replace(weights, uniform=from_mean_logit / p.compute_dtype.type(p.V))
            else:
                assert isinstance(self.terms, Terms), "no other loss has a mean logit"
                weights = replace(weights, outer=self.terms.outer_products(from_mean_logit, destination.wanted))
        if not adds and into.e is not None:
            interchange.write_zeros(into.e)
        if p.N:
            backend_module(self.plan.backend).backward(p, self.plan, self.statistics, weights, into, adds)
        elif not adds:
            for gradient in (into.c, into.bias):
                if gradient is not None:
                    interchange.write_zeros(gradient)
        return destination.returned(p, into)

    def _weights(self, d_loss: Any, d_lse: Any) -> tuple[Weights, Any]:
        """The weights per token but for the uniform one; and (N,) what is taken from each token's mean logit, or None."""
        p = self.problem
        if d_lse is None and p.logit_scale is None and isinstance(self.terms, Nll) and p.options.reduction != "none":
            return self.terms.weights_of_scalar(arguments.upstream_scalar("d_loss", 1.0 if d_loss is None else d_loss, p)), None
        per_token_shape = tuple(p.per_token(self.statistics.lse).shape)
        loss_shape = per_token_shape if p.options.reduction == "none" else ()
        d_token = arguments.upstream("d_loss", 1.0 if d_loss is None else d_loss, p, loss_shape)
        weights, from_mean_logit = self.terms.gradient_weights(d_token)
        if d_lse is not None:  # it reaches the log-sum-exp alone, whose gradient is the softmax
            softmax = weights.softmax + arguments.upstream("d_lse", d_lse, p, per_token_shape)
            weights = replace(weights, softmax=softmax)
        if (scale := p.logit_scale) is not None:  # what flows into a logit flows on through its scale
            weights = Weights(times(weights.softmax, scale), times(weights.target, scale))
            from_mean_logit = None if from_mean_logit is None else times(from_mean_logit, scale)
        return weights, from_mean_logit
