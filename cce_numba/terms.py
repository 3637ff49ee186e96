"""The terms of the loss, once for all backends: array operations that make it of what a backend gives, and the way back.

A backend gives each token's log-sum-exp and target logit. The loss of the token is made of these and of its mean logit:

    loss = nll_weight * (lse - target_logit) + smooth_weight * (mean_class_weight * lse - mean_logit) + z_weight * lse**2

    nll_weight         token weight * class weight of the target * (1 - label_smoothing)
    smooth_weight      token weight * label_smoothing
    z_weight           token weight * z_loss
    mean_class_weight  the mean of the class weights over the vocabulary
    mean_logit         the mean of class weight times logit over the vocabulary
    lse                max_logit + log_sum (`backend.Statistics`), two numbers that are kept apart

What is subtracted from lse is subtracted from max_logit, and log_sum is added afterwards. For lse is as large as the logits
are, and would have lost the digits of a small loss. Label smoothing is that of `torch.nn.functional.cross_entropy`.

A token with several targets has a nll_weight of each: the above times what the target counts (`Problem.target_probs`). Then the
first part of its loss is the sum over its targets, and smooth_weight has the sum of what they count as a factor. A target that
is padding counts 0.

So each token's gradient with respect to its logits is a multiple of the softmax, less a multiple of the one-hot target, less a
multiple of the class weights (`backend.Weights`). The last part is not small anywhere, so no filter could leave it out.
Without a softcap it is of rank one, a factor per token times a factor per entry, and known without any logit
(`Weights.outer`): backends add it to what they compute.

`terms_of` says which class a problem's loss is: `Nll`, the negative log-likelihood of one target alone, or `Terms`, all of the
above. Both have `per_token`, `reduced` and `gradient_weights`. `NoLoss` is for problems that ask for log-probabilities alone.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba import interchange
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights, backend_module
from cce_numba.plan import Plan

# Of e, c and their gradients at a time, in the compute dtype; there are up to three such pieces at once.
_HOST_BYTES, _DEVICE_BYTES = 4 * 2**20, 32 * 2**20

_quiet = np.errstate(all="ignore")  # inf and nan speak for themselves


def terms_of(p: Problem, plan: Plan, statistics: Statistics) -> Nll | Terms | NoLoss:
    """The loss of a problem whose forward has left these statistics."""
    options = p.options
    if not p.has_loss:
        return NoLoss(p)
    weighted = p.K is not None or p.class_weights is not None or p.token_weights is not None
    if weighted or options.label_smoothing or options.z_loss:
        return Terms.of(p, statistics)
    return Nll(p, plan, statistics)


@dataclass(frozen=True, eq=False)
class NoLoss:
    """In place of a loss, where none is made of the targets: 0, and nothing flows back from it."""

    problem: Problem

    def per_token(self) -> Any:
        """(N,) zeros."""
        return self.problem.xp.zeros(self.problem.N, self.problem.compute_dtype)

    def reduced(self) -> Any:
        """0-d zero."""
        return self.problem.xp.zeros((), self.problem.compute_dtype)

    def gradient_weights(self, d_loss: Any) -> tuple[Weights, None]:
        """Weights of 0."""
        p = self.problem
        return Weights(self.per_token(), p.xp.zeros(p.targets.shape, p.compute_dtype)), None


@dataclass(frozen=True, eq=False)
class Nll:
    """The loss that is the negative log-likelihood alone, in which every token that counts has the same weight."""

    problem: Problem
    plan: Plan
    statistics: Statistics

    def per_token(self) -> Any:
        """(N,) the loss of each token, 0 where ignored."""
        return self.statistics.nll

    def reduced(self) -> Any:
        """0-d, of the compute dtype: the sum or the mean of the tokens' losses; the mean of none is nan."""
        return backend_module(self.plan.backend).reduced_nll(self.problem, self.statistics)

    def weights_of_scalar(self, d_loss: Any) -> Weights:
        """What flows back from the sum or the mean. d_loss: a float or a 0-d array of the compute dtype."""
        weight = backend_module(self.plan.backend).nll_weight(self.problem, self.statistics, d_loss)
        return Weights(softmax=weight, target=weight)

    def gradient_weights(self, d_loss: Any) -> tuple[Weights, None]:
        """See `Terms`. Overwrites d_loss."""
        if self.problem.options.reduction == "mean":
            with np.errstate(divide="ignore", invalid="ignore"):  # no token counts: then no backend reads this
                d_loss /= self.statistics.n_valid
        return Weights(softmax=d_loss, target=d_loss), None


def reduced_nll(p: Problem, statistics: Statistics) -> Any:
    """`backend.Backend.reduced_nll`, for backends that have no kernel for it."""
    total = statistics.nll.sum(dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # no token counts: 0 / 0 = nan, as PyTorch has it
        loss = total / statistics.n_valid if p.options.reduction == "mean" else total
    return p.xp.asarray(loss, dtype=p.compute_dtype)


def nll_weight(p: Problem, statistics: Statistics, d_loss: Any) -> Any:
    """`backend.Backend.nll_weight`, for backends that have no kernel for it."""
    weight = p.xp.empty(p.N, p.compute_dtype)
    weight[...] = d_loss
    if p.options.reduction == "mean":
        with np.errstate(divide="ignore", invalid="ignore"):
            weight /= statistics.n_valid
    return weight


@dataclass(frozen=True, eq=False)
class Terms:
    """The loss of each token by the weights of its terms, which are (N,) of the compute dtype, 0 where ignored or padded.

    Attributes:
        problem: whose loss it is.
        statistics: what the backend found.
        token_weight: of all terms.
        nll_weight: of the negative log-likelihood of each target, in the shape of `Problem.targets`.
        smooth_weight: of the label smoothing, or None without.
        z_weight: of the squared log-sum-exp, or None without.
        total_weight: 0-d float64, what a mean divides by: the sum of token weight * class weight of the target.
    """

    problem: Problem
    statistics: Statistics
    token_weight: Any
    nll_weight: Any
    smooth_weight: Any
    z_weight: Any
    total_weight: Any

    @staticmethod
    @_quiet
    def of(p: Problem, statistics: Statistics) -> Terms:
        """The terms of this problem."""
        options, xp, real = p.options, p.xp, p.compute_dtype.type
        counts, probs = p.counts, p.target_probs
        of_token = counts.astype(p.compute_dtype)
        if p.token_weights is not None:
            of_token = xp.where(counts, p.token_weights, of_token)  # whatever an ignored token's weight is
        of_target = of_token if probs is None else times(xp.broadcast_to(of_token[:, None], probs.shape), probs)
        if p.class_weights is not None:
            targets, all_weights = (p.targets, p.class_weights) if p.shard is None else (p.shard.targets, p.shard.class_weights)
            in_range = (targets >= 0) & (targets < p.total_V)
            picked = all_weights[xp.where(in_range, targets, xp.zeros_like(targets))]
            # A target out of range makes its token's loss NaN by its logit. With a weight of 1 it spoils no other token's loss.
            of_target = times(of_target, xp.where(in_range, picked, xp.ones_like(picked)))
        smoothed = of_token if probs is None else times(of_token, probs.sum(axis=1))
        return Terms(
            problem=p,
            statistics=statistics,
            token_weight=of_token,
            nll_weight=of_target * real(1 - options.label_smoothing),
            smooth_weight=smoothed * real(options.label_smoothing) if options.label_smoothing else None,
            z_weight=of_token * real(options.z_loss) if options.z_loss else None,
            total_weight=of_target.sum(dtype=np.float64),
        )

    @_quiet
    def per_token(self) -> Any:
        """(N,) the loss of each token, 0 where ignored or of weight 0."""
        found, largest = self.statistics, self.statistics.max_logit
        loss = times(self.nll_weight, found.nll)
        if self.problem.K is not None:
            loss = loss.sum(axis=1)
            lost = self.problem.xp.isnan(found.target_logit).any(axis=1) & (self.token_weight != 0)
            loss[lost] = np.nan  # whatever a target counts that is out of range
        elif self.problem.options.label_smoothing == 1:  # then no weight of its target loses a token that has none in range
            largest = self.problem.xp.where(found.target_logit != found.target_logit, found.target_logit, largest)
        if self.smooth_weight is not None:
            mean_weight = self._mean_class_weight
            from_mean = largest * mean_weight - self._mean_logit()
            loss += times(self.smooth_weight, from_mean + found.log_sum * mean_weight)
        if self.z_weight is not None:
            loss += times(self.z_weight, found.lse * found.lse)
        return loss

    @_quiet
    def reduced(self) -> Any:
        """0-d, of the compute dtype: the sum or the mean of the tokens' losses; the mean over a total weight of 0 is nan."""
        p, total = self.problem, self.per_token().sum(dtype=np.float64)
        if p.options.reduction == "mean":
            total = p.xp.where(self.total_weight == 0, np.nan, total / self.total_weight)
        return p.xp.asarray(total, dtype=p.compute_dtype)

    @_quiet
    def gradient_weights(self, d_loss: Any) -> tuple[Weights, Any]:
        """What flows back from d_loss (N,), the upstream gradient of each token's loss (of the loss, for "mean" and "sum").

        Returns the weights of the softmax and of the target, without logit scales; and (N,), what is taken from each token's
        mean logit, or None without label smoothing.
        """
        p = self.problem
        if p.options.reduction == "mean":  # the mean over a total weight of 0 is nan, and its gradient is 0
            per_weight = p.xp.where(self.total_weight == 0, 0.0, 1 / self.total_weight)
            d_loss = d_loss * per_weight.astype(p.compute_dtype)
        if p.K is None:
            target_weight = softmax_weight = times(self.nll_weight, d_loss)
        else:
            target_weight = times(self.nll_weight, d_loss[:, None])
            softmax_weight = target_weight.sum(axis=1)
        smooth_weight = None
        if self.smooth_weight is not None:
            smooth_weight = times(self.smooth_weight, d_loss)
            softmax_weight = softmax_weight + smooth_weight * self._mean_class_weight
        if self.z_weight is not None:
            # A lost token's gradient is NaN by its log-sum-exp. Its weight stays finite, so that weights can be scaled, and is
            # not 0, with which the token would take no part.
            lse = p.xp.nan_to_num(self.statistics.lse, nan=1.0, posinf=1.0, neginf=1.0)
            softmax_weight = softmax_weight + times(self.z_weight, d_loss) * (lse + lse)
        return Weights(softmax_weight, target_weight), smooth_weight

    @_quiet
    def outer_products(self, smooth_weight: Any, wanted: Collection[str]) -> Gradients:
        """What the mean logits, which are linear in e, c and bias, give to the gradients that are wanted: `Weights.outer`.

        smooth_weight (N,): what is taken from each token's mean logit, times its logit scale.
        """
        p, xp = self.problem, self.problem.xp
        pairs: dict[str, tuple[Any, Any]] = {}
        if "e" in wanted:
            pairs["e"] = -smooth_weight, self._mean_row[0]
        if "c" in wanted:
            total = xp.zeros(p.D, np.float64)
            for n0, n1 in _pieces(p, p.N):
                e, weight = p.e[n0:n1].astype(p.compute_dtype, copy=False), smooth_weight[n0:n1]
                # Zero times a NaN in a row that takes no part would be NaN.
                total += weight @ xp.where((weight == 0)[:, None], xp.zeros((), e.dtype), e)
            pairs["c"] = p.class_weights, (-total / p.total_V).astype(p.compute_dtype)
        if "bias" in wanted:
            mean = (-smooth_weight.sum(dtype=np.float64) / p.total_V).astype(p.compute_dtype)
            pairs["bias"] = p.class_weights, mean.reshape(1)
        return Gradients(**pairs)

    @functools.cached_property
    def _mean_class_weight(self) -> Any:
        """0-d, of the compute dtype."""
        p = self.problem
        weights = p.class_weights if p.shard is None else p.shard.class_weights
        return p.compute_dtype.type(1) if weights is None else _mean(p, weights)

    @functools.cached_property
    def _mean_row(self) -> tuple[Any, Any]:
        return mean_row(self.problem)

    def _mean_logit(self) -> Any:
        """(N,) of the compute dtype: the mean over the vocabulary of class weight times logit."""
        found = self.statistics.mean_logit  # by a fold, or by all ranks
        return mean_logit(self.problem, self._mean_row) if found is None else found


def mean_row(p: Problem) -> tuple[Any, Any]:
    """(D,) and 0-d, of the compute dtype: the means over the vocabulary of class weight times row of c, and times bias.

    Of a shard of the vocabulary its share in them.
    """
    xp: Any = p.xp
    total = xp.zeros(p.D, np.float64)
    weights = xp.ones(p.V, p.compute_dtype) if p.class_weights is None else p.class_weights
    for v0, v1 in _pieces(p, p.V):
        weight, c = weights[v0:v1], p.c[v0:v1].astype(p.compute_dtype, copy=False)
        if p.class_weights is not None:  # zero times an inf would be NaN
            c = xp.where((weight == 0)[:, None], xp.zeros((), c.dtype), c)
        total += weight @ c
    bias = xp.zeros((), np.float64)
    if p.bias is not None:
        bias = times(weights, p.bias.astype(p.compute_dtype, copy=False)).sum(dtype=np.float64)
    return (total / p.total_V).astype(p.compute_dtype), (bias / p.total_V).astype(p.compute_dtype)


@_quiet
def mean_logit(p: Problem, mean: tuple[Any, Any]) -> Any:
    """(N,) of the compute dtype: the mean over the vocabulary of class weight times logit; `mean`: of `mean_row`."""
    of_row, of_bias = mean
    result = p.xp.empty(p.N, p.compute_dtype)
    for n0, n1 in _pieces(p, p.N):
        result[n0:n1] = p.e[n0:n1].astype(p.compute_dtype, copy=False) @ of_row
    result += of_bias
    return result if p.logit_scale is None else result * p.logit_scale


@_quiet
def times(weight: Any, x: Any) -> Any:
    """weight * x, where a weight of 0 gives 0 whatever x is: what does not count need not be finite.

    >>> times(np.array([0.0, 2.0]), np.array([np.nan, 3.0]))
    array([0., 6.])
    """
    xp: Any = interchange.array_module(weight)
    return xp.where(weight == 0, weight, weight * x)


def _mean(p: Problem, array: Any) -> Any:
    return array.mean(dtype=np.float64).astype(p.compute_dtype)


@_quiet
def write_outer(p: Problem, outer: Gradients | None, into: Gradients, adds: bool) -> bool:
    """Writes the outer products `Weights.outer` to the gradients, or adds them; returns whether the rest is to be added.

    With it a backend begins that cannot add them itself: 16-bit gradients are rounded once here, and once more by the backend.
    """
    if outer is None:
        return adds
    for name, pair in (("e", outer.e), ("c", outer.c), ("bias", outer.bias)):
        if pair is not None:
            gradient = getattr(into, name)
            _write_outer(p, gradient[:, None] if name == "bias" else gradient, pair, adds)
    return True


def outer_product(pair: tuple[Any, Any], rows: Any) -> Any:
    """These rows (a slice, or integers) of an outer product of `Weights.outer`, (k, d); (1, d) where all rows are the same."""
    column, row = pair
    return row[None, :] if column is None else times(column[rows, None], row)


def _write_outer(p: Problem, gradient: Any, pair: tuple[Any, Any], adds: bool) -> None:
    """Writes an outer product to a gradient (k, d), a piece at a time, or adds it.

    Rounded in the array's own dtype, and stored by bits, so that CuPy need not know how to copy bfloat16 between strides.
    """
    bits = gradient.view(f"u{gradient.itemsize}")
    column, row = pair
    if column is None and not adds:
        bits[...] = row.astype(gradient.dtype).view(bits.dtype)
        return
    for start, stop in _pieces(p, len(gradient)):
        value = outer_product(pair, slice(start, stop))
        if adds:
            value = value + gradient[start:stop].astype(value.dtype, copy=False)
        bits[start:stop] = value.astype(gradient.dtype).view(bits.dtype)


def _pieces(p: Problem, total: int) -> Iterator[tuple[int, int]]:
    """Consecutive [start, stop) of rows of D elements of the compute dtype, of bounded size."""
    step = max(1, (_DEVICE_BYTES if p.on_device else _HOST_BYTES) // (p.compute_dtype.itemsize * p.D))
    return ((start, min(start + step, total)) for start in range(0, total, step))
