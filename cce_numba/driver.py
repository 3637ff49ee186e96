"""The one way through a call, for arrays and for PyTorch: forward, combine, terms of the loss, and back.

    prepared        checks what the caller gave, chooses a backend, makes its device and stream current
    forward         the backend's forward, of all rows of the classifier or of those that this rank has
      exchange        ranks that share a vocabulary tell each other what they have found: `parallel/`
      terms_of        the terms of the loss
    ForwardPass     what is kept until the backward
      loss            the loss, of the caller's kind
      backward        upstream gradients become weights per token, and the backend's backward makes gradients of them

The algebra of the loss is in `terms.py`; a backend (`backend.Backend`) knows log-sum-exps, target logits and weights per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cce_numba import arguments, interchange, recurring
from cce_numba.arguments import Problem, Rows
from cce_numba.backend import Gradients, Statistics, Weights, backend_module
from cce_numba.destination import Destination
from cce_numba.interchange import Kind
from cce_numba.options import DEFAULTS
from cce_numba.parallel import numbers
from cce_numba.parallel.agreement import Agreed
from cce_numba.parallel.communicator import Communicator
from cce_numba.parallel.lost import keep_all_of_lost
from cce_numba.parallel.merge import merged
from cce_numba.parallel.numbers import Numbers, of_no_rows
from cce_numba.parallel.tokens import TokenShards
from cce_numba.plan import Plan
from cce_numba.terms import Nll, NoLoss, Terms, mean_logit, mean_row, terms_of, times


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
    rows: Rows | None = None,
) -> Iterator[tuple[Problem, Plan]]:
    """The checked problem and its plan; inside, the device and the stream that the caller's arrays are on are current.

    Args:
        e, c, targets: as in `linear_cross_entropy`; `arguments.NO_TARGETS` for none, `arguments.Ids` for no loss.
        given: the options that the caller gave, by name.
        only: the options that mean something to the function that was called.
        kind: how to give results back; that of `e`, if left out.
        backend: the one to take if `given` names none; None chooses.
        plan: that of the same arguments, if it was made before.
        rows: which rows of the vocabulary c has, if not all.

    Raises TypeError, ValueError and BackendUnavailable, as `linear_cross_entropy` says.
    """
    native_e = interchange.take("e", e)
    if kind is None:
        kind = interchange.kind_of(e, native_e)
    with kind.current():
        yield recurring.prepare(native_e, c, targets, given, only, kind, backend, plan, rows)


def forward(problem: Problem, plan: Plan, wrt: Collection[str] = (), ranks: Ranks | None = None) -> ForwardPass:
    """Goes forward, inside `prepared`. `wrt` names the gradients that a backward may be asked for, out of "e", "c", "bias".

    `ranks`: those that share the vocabulary, if the problem is one of a shard.
    """
    part = Partial.of(problem, plan, wrt)
    if problem.shard is None:
        return ForwardPass.of(problem, plan, part.statistics)
    assert ranks is not None, "who has a shard alone has a partial, and no loss"
    return part.merged(ranks.communicator.all_gather(part.packed()), ranks)


@dataclass(frozen=True, eq=False)
class Ranks:
    """Those that share a vocabulary, and what becomes of the gradient of e, of which each of them has a part.

    Attributes:
        communicator: what carries arrays between them.
        tokens: how they share e, and the problem of this rank's part of it, in whose shape its gradient is; None where all
            ranks have all of e.
        sums_e_grad: whether the parts of the gradient of e are summed; else each rank keeps its own.
        agreed: what they have told each other, which a backward need not ask again.
    """

    communicator: Communicator
    tokens: tuple[TokenShards, Problem] | None = None
    sums_e_grad: bool = True
    agreed: Agreed | None = None

    def problem_of_results(self, p: Problem) -> Problem:
        """That with the e that the caller gave."""
        return p if self.tokens is None else self.tokens[1]

    def sum_of_e(self, d_e: Any) -> Any:
        """The gradient of e that this rank gets, of the compute dtype, out of its part (N, D), which may be overwritten."""
        if self.tokens is not None:
            shards, own = self.tokens
            return shards.own_sum(self.communicator, d_e, own.e_shape)
        return self.communicator.all_reduce(d_e) if self.sums_e_grad else d_e


@dataclass(frozen=True, eq=False)
class Partial:
    """What a rank has found of its shard.

    Attributes:
        problem, plan: of the shard.
        statistics: what the backend found.
        numbers: those that other ranks need (`parallel/numbers.py`); empty of a whole vocabulary.
    """

    problem: Problem
    plan: Plan
    statistics: Statistics
    numbers: Numbers

    @staticmethod
    def of(p: Problem, plan: Plan, wrt: Collection[str]) -> Partial:
        """Runs the backend's forward, if there are rows."""
        record_survivors = p.options.records_survivors(wrt)
        if p.V:
            keeps = plan.kept_bytes > 0 and p.options.keeps_logits(wrt)
            found = backend_module(plan.backend).forward(p, plan, record_survivors=record_survivors, keep_logits=keeps)
        else:
            found = of_no_rows(p, backend_module(plan.backend).statistics_form(p))
            if record_survivors and p.bounds is not None:
                p.bounds.of_all(found.lse, None)  # the others wait for it
        if p.shard is None:
            return Partial(p, plan, found, {})
        share = None
        if p.options.smooths_capped:
            share = found.mean_logit * p.compute_dtype.type(p.V / p.total_V)
        elif p.options.label_smoothing and p.has_loss:
            share = mean_logit(p, mean_row(p))
        return Partial(p, plan, found, numbers.of_statistics(p, found, share))

    def packed(self) -> Any:
        """(bytes,) uint8: what is sent to the other ranks."""
        return numbers.packed(self.numbers)

    def merged(self, every: Any, ranks: Ranks | None) -> ForwardPass:
        """The forward of the whole vocabulary. every (ranks, bytes): all ranks' packed numbers, in order."""
        statistics = merged(self.problem, self.statistics, numbers.unpacked(every, self.numbers))
        keep_all_of_lost(self.problem, statistics)
        return ForwardPass.of(self.problem, self.plan, statistics, ranks)


def indexed_dot(problem: Problem, plan: Plan) -> Any:
    """(N,) the target's logit per token and nothing else; see `backend.Backend`."""
    return backend_module(plan.backend).indexed_dot(problem, plan)


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """A forward that has been done: what it found, the loss that follows, and the way back. Used inside `prepared` or its like.

    Attributes:
        problem: the checked inputs.
        plan: how it ran.
        statistics: what was found of each token, of the whole vocabulary.
        terms: the loss made of these.
        ranks: who shares the vocabulary, if the problem is one of a shard; None leaves each rank its part of the gradient of e.
    """

    problem: Problem
    plan: Plan
    statistics: Statistics
    terms: Nll | Terms | NoLoss
    ranks: Ranks | None = None

    @staticmethod
    def of(problem: Problem, plan: Plan, statistics: Statistics, ranks: Ranks | None = None) -> ForwardPass:
        """The one that has left these statistics."""
        return ForwardPass(problem, plan, statistics, terms_of(problem, plan, statistics), ranks)

    def loss(self) -> Any:
        """The loss, an array of the caller's kind: 0-d, or per token for reduction "none"."""
        if self.problem.options.reduction == "none":
            return self.problem.exported(self.terms.per_token())
        return self.problem.kind.export(self.terms.reduced())

    def logprobs(self) -> Any:
        """In the shape of `Problem.targets`, the log-probabilities of these; 0 where ignored or padded."""
        p = self.problem
        logprobs = 0 - self.statistics.nll  # which is 0, not -0, where ignored
        return logprobs if p.K is None else p.xp.where(p.is_padding, p.compute_dtype.type(0), logprobs)

    def top_logprobs(self) -> Any:
        """(N, k) the log-probabilities of the best entries, 0 where ignored; None if none were asked for."""
        found = self.statistics
        return None if found.top_logits is None else 0 - found.above(found.top_logits)

    def beside(self) -> dict[str, Any]:
        """What is returned beside the loss or the log-probabilities, as the caller sees it, by name; None if not asked for."""
        found = self.statistics
        flat = {
            "lse": found.lse,
            "entropy": found.entropy,
            "sum_squares": found.sum_squares,
            "top_logprobs": self.top_logprobs(),
            "top_ids": found.top_ids,
        }
        return {name: None if array is None else self.problem.exported(array) for name, array in flat.items()}

    def backward(
        self, d_loss: Any, d_lse: Any, destination: Destination, *, d_logprobs: Any = None, d_entropy: Any = None
    ) -> Gradients:
        """Gradients of `sum(d_loss * loss) + sum(d_lse * lse) + sum(d_logprobs * logprobs) + sum(d_entropy * entropy)`.

        They go to the caller's arrays, and to fresh ones of the caller's kind.

        Args:
            d_loss: a scalar, or for "none" also an array in the shape of the loss; None is 1.
            d_lse: a scalar or an array in the shape of the lse, `Problem.per_token`; None is 0.
            destination: where gradients go, and which.
            d_logprobs: a scalar or an array in the shape of the log-probabilities; None is 0.
            d_entropy: a scalar or an array in the shape of the lse; None is 0.

        Raises TypeError or ValueError, naming the argument, for an upstream gradient that does not fit, before anything is
        written.
        """
        p = self.problem
        weights, from_mean_logit = self._weights(d_loss, d_lse, d_logprobs, d_entropy)
        of_caller = p if self.ranks is None else self.ranks.problem_of_results(p)
        results, adds = destination.arrays(of_caller), destination.accumulate
        into = results
        sums_e = results.e is not None and self.ranks is not None
        if sums_e:  # this rank's part, which is added and rounded once all parts are summed
            into = replace(results, e=p.xp.empty(p.e.shape, p.compute_dtype))
        if from_mean_logit is not None:
            if p.options.smooths_capped:
                weights = replace(weights, uniform=from_mean_logit / p.compute_dtype.type(p.total_V))
            else:
                assert isinstance(self.terms, Terms), "no other loss has a mean logit"
                weights = replace(weights, outer=self.terms.outer_products(from_mean_logit, destination.wanted))
        if into.e is not None and (sums_e or not adds):
            interchange.write_zeros(into.e)
        if p.N and p.V:
            backend_module(self.plan.backend).backward(p, self.plan, self.statistics, weights, into, adds)
        elif not adds:
            for gradient in (into.c, into.bias):
                if gradient is not None:
                    interchange.write_zeros(gradient)
        if sums_e:
            assert self.ranks is not None, "otherwise nothing is summed"
            _finish(results.e, self.ranks.sum_of_e(into.e), adds)
        return destination.returned(of_caller, results)

    def _weights(self, d_loss: Any, d_lse: Any, d_logprobs: Any, d_entropy: Any) -> tuple[Weights, Any]:
        """The weights per token but for the uniform one; and (N,) what is taken from each token's mean logit, or None.

        With p the softmax of a token's logits, H its entropy and onehot the row of a target, the gradients with respect to the
        logits are p of the log-sum-exp, onehot - p of a log-probability, and -p * (log(p) + H) of the entropy.
        """
        p = self.problem
        if d_entropy is not None and not p.options.entropy:
            raise ValueError("d_entropy: needs a forward with entropy=True, which finds the entropy")
        of_loss_alone = d_lse is None and d_logprobs is None and d_entropy is None
        if of_loss_alone and p.logit_scale is None and isinstance(self.terms, Nll) and p.options.reduction != "none":
            return self.terms.weights_of_scalar(arguments.upstream_scalar("d_loss", 1.0 if d_loss is None else d_loss, p)), None
        per_token_shape = tuple(p.per_token(self.statistics.lse).shape)
        loss_shape = per_token_shape if p.options.reduction == "none" else ()
        d_token = arguments.upstream("d_loss", 1.0 if d_loss is None else d_loss, p, loss_shape)
        weights, from_mean_logit = self.terms.gradient_weights(d_token)
        if d_lse is not None:  # it reaches the log-sum-exp alone, whose gradient is the softmax
            softmax = weights.softmax + arguments.upstream("d_lse", d_lse, p, per_token_shape)
            weights = replace(weights, softmax=softmax)
        if d_logprobs is not None:
            shape, several = tuple(p.per_token(p.targets).shape), p.K is not None
            d_logprobs = arguments.upstream("d_logprobs", d_logprobs, p, shape, p.targets.shape)
            if several:  # whatever flows into padding
                d_logprobs = p.xp.where(p.is_padding, p.compute_dtype.type(0), d_logprobs)
            softmax = weights.softmax - (d_logprobs.sum(axis=1) if several else d_logprobs)
            weights = replace(weights, softmax=softmax, target=weights.target - d_logprobs)
        if d_entropy is not None:
            d_entropy = arguments.upstream("d_entropy", d_entropy, p, per_token_shape)
            # As of the z-loss (`terms.Terms.gradient_weights`): a lost token's gradient is NaN by its log-sum-exp.
            entropy = p.xp.nan_to_num(self.statistics.entropy, nan=1.0, posinf=1.0, neginf=1.0)
            weights = replace(weights, softmax=weights.softmax - times(d_entropy, entropy), entropy=-d_entropy)
        if (scale := p.logit_scale) is not None:  # what flows into a logit flows on through its scale
            weights = replace(
                weights,
                softmax=times(weights.softmax, scale),
                target=times(weights.target, scale if p.K is None else scale[:, None]),
                entropy=None if weights.entropy is None else times(weights.entropy, scale),
            )
            from_mean_logit = None if from_mean_logit is None else times(from_mean_logit, scale)
        return weights, from_mean_logit


def _finish(gradient: Any, total: Any, adds: bool) -> None:
    """Rounds the sum to the gradient, or adds it; stored by bits, so that CuPy need not know how to copy bfloat16."""
    if adds:
        total = total + gradient.astype(total.dtype, copy=False)
    gradient.view(f"u{gradient.itemsize}")[...] = total.astype(gradient.dtype).view(f"u{gradient.itemsize}")
