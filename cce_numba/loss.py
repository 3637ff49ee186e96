"""The public functions: check the arguments, plan, call the backend, and make the loss out of its statistics.

The algebra of the loss lives here and in `terms.py`, once for all backends: a backend gives each token's log-sum-exp and
target logit, and takes two weights per token back (`backend.Backend`). A new loss term changes how these are combined, not the
kernels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from cce_numba import arguments, dropped, interchange, terms
from cce_numba import plan as planning
from cce_numba.arguments import LossOptions, Problem
from cce_numba.backend import Gradients, Statistics, backend_module
from cce_numba.destination import Destination
from cce_numba.plan import Plan
from cce_numba.survivors import unpack_survivors
from cce_numba.terms import Terms


@dataclass(frozen=True, eq=False)
class Result:
    """What `forward` found, and what `backward` needs; arrays are of the kind that `e` was.

    Attributes:
        loss: 0-d for "mean" and "sum"; per token for "none". float32, or float64 for float64 inputs, as all below.
        nll: negative log-likelihood per token, `lse - target_logit`, in the shape of `targets[..., shift:]`; 0 where ignored.
            Without weights, label smoothing and z-loss, which are in the loss alone.
        lse: natural-log log-sum-exp of the logits per token; 0 where ignored.
        target_logit: the target's logit per token; 0 where ignored.
        n_valid: 0-d int64, how many tokens count, whatever their weights.
        plan: how it ran.
    """

    loss: Any
    lse: Any
    target_logit: Any
    n_valid: Any
    plan: Plan
    _problem: Problem
    _statistics: Statistics
    _terms: Terms | None

    @functools.cached_property
    def nll(self) -> Any:
        """Computed when it is first asked for."""
        with self._problem.kind.current():
            return _exported(self._problem, self._statistics.lse - self._statistics.target_logit)

    def survivor_counts(self) -> np.ndarray:
        """(n_blocks,) how many vocabulary entries each block of counting tokens keeps in the backward.

        A block is `plan.tiles.survivor_block` consecutive counting tokens. Waits for the device, if there is one.

        >>> e, c = np.eye(4, 8) * 50, np.eye(50, 8)
        >>> forward(e, c, np.arange(4)).survivor_counts()  # each of four certain tokens keeps its own target
        array([4])
        """
        if self._statistics.survivors is None:
            n_blocks = -(-int(self._statistics.n_valid) // self._statistics.survivor_block)
            return np.full(n_blocks, self._problem.V)
        return unpack_survivors(self._statistics, self._problem.V).sum(axis=1)

    def dropped_mass(self) -> Any:
        """Per token, the probability that the filter drops: the sum of the softmax over the entries that its block leaves out.

        It bounds the token's error in a filtered gradient: that of `dE` by `|d_loss| * dropped_mass * max_v |c_v|`, times its
        weights and `logit_scale` if there are any, less where a softcap is flat. In the shape of `nll`; 0 where ignored, and
        everywhere if nothing is filtered, or nearly everything survives. A lost token (NaN) keeps all, and so drops 0. On
        `hopper` it is at most this: where more than 70 % of all pairs survive gradients take all, which only the device knows.
        What the gradients of `c` and `bias` leave out beyond (see `filter_eps`) is not counted.

        Computes all logits again, at each call, in pieces whose memory does not grow with N or V; waits for the device.

        >>> e, c = np.eye(2, 8) * 5, np.eye(50, 8)
        >>> forward(e, c, np.arange(2), filter_eps=0.02).dropped_mass().round(3)  # 48 entries, each 1 / (exp(5) + 49)
        array([0.243, 0.243])
        """
        with self._problem.kind.current():
            return _exported(self._problem, dropped.mass(self._problem, self._statistics))


def linear_cross_entropy(e: Any, c: Any, targets: Any, *, return_lse: bool = False, **options: Unpack[LossOptions]) -> Any:
    """Cross-entropy of `softmax(e @ c.T + bias)` with `targets`, without storing the logits (arXiv 2411.09009).

    The loss of a token is that of `torch.nn.functional.cross_entropy` with the same `ignore_index`, `label_smoothing` and class
    weights, times its own weight. Gradients are with respect to `e`, `c` and `bias`, not to scales and weights.

    Args:
        e: (..., D) embeddings: float16, bfloat16 (`ml_dtypes.bfloat16`), float32 or float64; NumPy, CuPy, or anything
            with `__cuda_array_interface__` or DLPack. Strides are welcome.
        c: (V, D) classifier, of e's dtype, on e's device.
        targets: (...) integers in [0, V), or `ignore_index`.
        return_lse: return `(loss, lse)`.
        bias: (V,) added to the logits; of e's dtype or float32.
        ignore_index: tokens with this target take no part, whatever stands in their rows.
        softcap: logits become `softcap * tanh(logits / softcap)`, after the bias.
        logit_scale: multiplies the logits, after the bias, before the softcap: 1 / temperature. A positive number, or an array
            of e's shape without its last dimension, one for each token of `e`; an element that is not positive and finite
            may make its token's loss and gradient NaN, and no other's. A scale that is not 1 leaves out "hopper".
        label_smoothing: in [0, 1), this part of the target's probability is spread over all V entries. It is never filtered:
            without a softcap it is computed apart, with one rounding more of 16-bit gradients; with one, all gradients are
            exact, as with `filter_eps=None`, and "hopper" is left out.
        z_loss: >= 0, adds `z_loss * lse**2` to each token's loss; class weights do not multiply it.
        class_weights: (V,) numbers that multiply a token's loss, by its target; with label smoothing, each entry's share of it.
        token_weights: numbers or booleans, of targets' shape (they shift with the targets), that multiply a token's whole loss.
            One of weight 0 takes no part, whatever stands in its row.
        reduction: "mean" over the tokens that count (nan if none does), "sum", or "none". With weights, the mean divides by the
            sum of token weight times class weight of the target (nan, with gradients of 0, if that is 0).
        shift: predict `targets[..., shift:]` from `e[..., :-shift, :]`, without copying `e`; True means 1.
        filter_eps: gradients leave out what has a probability below this in all of a block's tokens; "auto" is
            `finfo(dtype).eps / 512` (2^-16 for bfloat16), None is exact. The loss itself is always exact. With "auto",
            "hopper" leaves out more of the gradients of `c` and `bias`: 128 entries, in an order of its own, for a block of 128
            tokens, if none of them is a target there and none reaches 4 times that.
        filter_e_grad: False keeps the gradient of `e` exact.
        filter_c_grad: False keeps the gradients of `c` and `bias` exact (the paper's FullC).
        accum_e_fp32: return the gradient of 16-bit `e` in float32, as it was accumulated.
        accum_c_fp32: return the gradient of 16-bit `c` in float32, as it was accumulated.
        check_targets: True raises for a target out of range, on any device. None does so on the host, where looking is
            free; on a device, where it would wait for the device, such a token's loss and gradient become NaN.
        backend: "cpu", "simt", "hopper", or None to choose by device and dtype (`explain` tells).

    Returns:
        The loss, an array of e's kind on e's device: 0-d, or for "none" in the shape of `targets[..., shift:]` with 0
        where ignored. float32, or float64 for float64 inputs.

    Raises:
        TypeError: an argument is no array, or has the wrong dtype.
        ValueError: shapes, devices, targets or option values do not fit.
        BackendUnavailable: the backend that was asked for cannot run here.

    >>> e, c = np.zeros((3, 4), np.float32), np.ones((8, 4), np.float32)
    >>> linear_cross_entropy(e, c, np.array([1, 2, 3])).round(4)  # log(8): all of 8 entries are as likely
    np.float32(2.0794)
    """
    return_lse = arguments.flag("return_lse", return_lse)
    with _prepared(e, c, targets, options) as (problem, plan):
        statistics = _statistics(problem, plan, with_grad=False)
        loss = _loss(problem, plan, statistics, Terms.of(problem, statistics))
        return (loss, _exported(problem, statistics.lse)) if return_lse else loss


def linear_cross_entropy_with_grad(
    e: Any,
    c: Any,
    targets: Any,
    *,
    return_lse: bool = False,
    wrt: Iterable[str] | None = None,
    out: Gradients | None = None,
    accumulate: bool = False,
    **options: Unpack[LossOptions],
) -> Any:
    """The loss and its gradients: `(loss, grads)`, or `(loss, lse, grads)` with `return_lse`.

    Arguments, errors and the loss are those of `linear_cross_entropy`. For "none" the gradients are those of the sum.

    Args:
        wrt: which gradients to compute, out of "e", "c", "bias"; all that exist by default. Others are None.
        out: arrays to write gradients to, by name; those that are None are allocated. On e's device, in the shape of the
            input, and of its dtype or float32 (which then is what `accum_*_fp32` would choose); NumPy's with any strides if the
            leading dimensions of out.e flatten to a view, on a device with a contiguous last dimension. They must not overlap
            the inputs or each other.
        accumulate: add to what `out` holds, in float32 (float64) and rounded once, where it would be overwritten. Every
            gradient that is computed then needs its array.

    Returns:
        grads.e in the shape and dtype of `e`, grads.c of `c`, grads.bias of `bias` (None without one); or the arrays of `out`.

    >>> e, c = np.zeros((1, 2)), np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> loss, grads = linear_cross_entropy_with_grad(e, c, np.array([0]))
    >>> grads.e
    array([[-0.5,  0.5]])
    >>> _ = linear_cross_entropy_with_grad(e, c, np.array([1]), out=grads, accumulate=True)  # the next micro-batch
    >>> grads.e
    array([[0., 0.]])
    """
    return_lse = arguments.flag("return_lse", return_lse)
    with _prepared(e, c, targets, options) as (problem, plan):
        destination = Destination.of(out, accumulate, arguments.wanted(wrt, problem), problem)
        statistics = _statistics(problem, plan, with_grad=True)
        parts = Terms.of(problem, statistics)
        loss = _loss(problem, plan, statistics, parts)
        grads = _backward(problem, plan, statistics, parts, None, None, destination)
        return (loss, _exported(problem, statistics.lse), grads) if return_lse else (loss, grads)


def forward(e: Any, c: Any, targets: Any, **options: Unpack[LossOptions]) -> Result:
    """The loss with its parts, ready for `backward`; arguments and errors are those of `linear_cross_entropy`.

    The result keeps `e`, `c`, `bias`, `logit_scale` and `class_weights` (not copies): they must not change before `backward`.

    >>> result = forward(np.zeros((2, 4)), np.ones((8, 4)), np.array([1, -100]))
    >>> result.nll.round(4), int(result.n_valid)
    (array([2.0794, 0.    ]), 1)
    """
    with _prepared(e, c, targets, options) as (problem, plan):
        statistics = _statistics(problem, plan, with_grad=True)
        parts = Terms.of(problem, statistics)
        return Result(
            loss=_loss(problem, plan, statistics, parts),
            lse=_exported(problem, statistics.lse),
            target_logit=_exported(problem, statistics.target_logit),
            n_valid=problem.kind.export(statistics.n_valid),
            plan=plan,
            _problem=problem,
            _statistics=statistics,
            _terms=parts,
        )


def backward(
    result: Result,
    d_loss: Any = None,
    d_lse: Any = None,
    *,
    wrt: Iterable[str] | None = None,
    out: Gradients | None = None,
    accumulate: bool = False,
) -> Gradients:
    """Vector-Jacobian product: the gradients of `sum(d_loss * loss) + sum(d_lse * lse)`.

    Args:
        result: what `forward` returned; it may be used again.
        d_loss: upstream gradient of the loss: a scalar, or for "none" also an array in the shape of the loss. 1 by default.
        d_lse: upstream gradient of the lse: a scalar or an array in its shape. 0 by default. No weights multiply it.
        wrt: which gradients to compute, out of "e", "c", "bias"; all that exist by default. Others are None.
        out: arrays to write gradients to, as in `linear_cross_entropy_with_grad`.
        accumulate: add to what `out` holds.

    Raises TypeError or ValueError, naming the argument, if an upstream gradient or an array of `out` does not fit.

    >>> result = forward(np.zeros((1, 2)), np.eye(2), np.array([0]), reduction="sum")
    >>> backward(result, d_loss=10.0).e
    array([[-5.,  5.]])
    """
    if not isinstance(result, Result):
        raise TypeError(f"result: must be what forward returned, got {type(result).__qualname__}")
    problem = result._problem
    gradients = arguments.wanted(wrt, problem)
    with problem.kind.current():
        destination = Destination.of(out, accumulate, gradients, problem)
        return _backward(problem, result.plan, result._statistics, result._terms, d_loss, d_lse, destination)


def indexed_dot(e: Any, c: Any, targets: Any, **options: Unpack[LossOptions]) -> Any:
    """Each token's target logit, one dot product per token: paper section 4.1.

    Takes `bias`, `ignore_index`, `softcap`, `logit_scale`, `shift`, `check_targets`, `backend` of `linear_cross_entropy`, and
    raises its errors.

    Returns an array in the shape of `targets[..., shift:]`, 0 where ignored; float32, or float64 for float64 inputs.

    >>> indexed_dot(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([1]))
    array([11.])
    """
    only = ("bias", "ignore_index", "softcap", "logit_scale", "shift", "check_targets", "backend")
    with _prepared(e, c, targets, options, only) as (problem, plan):
        return _exported(problem, backend_module(plan.backend).indexed_dot(problem, plan))


def linear_logsumexp(e: Any, c: Any, **options: Unpack[LossOptions]) -> Any:
    """Each token's natural-log log-sum-exp of `e @ c.T + bias`: paper section 4.2.

    Takes `bias`, `softcap`, `logit_scale`, `shift` and `backend` of `linear_cross_entropy`, and raises its errors.

    Returns an array in the shape of `e[..., :-shift, 0]`; float32, or float64 for float64 inputs.

    >>> linear_logsumexp(np.zeros((1, 2)), np.ones((4, 2))).round(4)
    array([1.3863])
    """
    only = ("bias", "softcap", "logit_scale", "shift", "backend")
    with _prepared(e, c, arguments.NO_TARGETS, options, only) as (problem, plan):
        statistics = backend_module(plan.backend).forward(problem, plan, record_survivors=False)
        return _exported(problem, statistics.lse)


def explain(e: Any, c: Any, targets: Any = arguments.NO_TARGETS, **options: Unpack[LossOptions]) -> Plan:
    """What a call with these arguments would run: backend, tiles, bytes, and why; nothing is computed.

    Takes the arguments of `linear_cross_entropy` and raises its errors. Print the result, or read its fields.

    >>> explain(np.ones((2, 4)), np.ones((8, 4)), np.array([1, 2]), backend="cpu").backend
    'cpu'
    """
    with _prepared(e, c, targets, options) as (_, plan):
        return plan


@contextlib.contextmanager
def _prepared(
    e: Any, c: Any, targets: Any, options: LossOptions, only: Iterable[str] = arguments.DEFAULTS
) -> Iterator[tuple[Problem, Plan]]:
    """Checked inputs and the plan, with the caller's device and stream current."""
    native_e = interchange.take("e", e)
    kind = interchange.kind_of(e, native_e)
    with kind.current():
        problem = arguments.problem(native_e, c, targets, options, only, kind)
        yield problem, planning.choose(problem, options.get("backend"))


def _statistics(problem: Problem, plan: Plan, *, with_grad: bool) -> Statistics:
    record = with_grad and problem.options.filters
    return backend_module(plan.backend).forward(problem, plan, record_survivors=record)


def _loss(problem: Problem, plan: Plan, statistics: Statistics, parts: Terms | None) -> Any:
    if problem.options.reduction == "none":
        return _exported(problem, statistics.lse - statistics.target_logit if parts is None else parts.per_token())
    if parts is not None:
        return problem.kind.export(parts.reduced())
    return problem.kind.export(backend_module(plan.backend).reduced_nll(problem, statistics))


def _exported(problem: Problem, flat: Any) -> Any:
    """(N,) as an array of the caller's kind and shape."""
    return problem.kind.export(problem.per_token(flat))


def _backward(
    problem: Problem,
    plan: Plan,
    statistics: Statistics,
    parts: Terms | None,
    d_loss: Any,
    d_lse: Any,
    destination: Destination,
) -> Gradients:
    per_token_shape = tuple(problem.per_token(statistics.lse).shape)
    loss_shape = per_token_shape if problem.options.reduction == "none" else ()
    d_token = arguments.upstream("d_loss", 1.0 if d_loss is None else d_loss, problem, loss_shape)
    if parts is not None:
        softmax_weight, target_weight, smooth_weight = parts.gradient_weights(d_token)
    else:
        if problem.options.reduction == "mean":
            with np.errstate(divide="ignore", invalid="ignore"):  # no token counts: then no backend reads this
                d_token /= statistics.n_valid
        softmax_weight, target_weight, smooth_weight = d_token, d_token, None  # nll = lse - target_logit
    if d_lse is not None:  # it reaches the log-sum-exp alone, whose gradient is the softmax
        softmax_weight = softmax_weight + arguments.upstream("d_lse", d_lse, problem, per_token_shape)
    if problem.logit_scale is not None:  # what flows into a logit flows on through its scale
        softmax_weight = terms.times(softmax_weight, problem.logit_scale)
        target_weight = terms.times(target_weight, problem.logit_scale)
        smooth_weight = None if smooth_weight is None else terms.times(smooth_weight, problem.logit_scale)
    into, accumulate, uniform_weight = destination.arrays(problem), destination.accumulate, None
    if parts is not None and smooth_weight is not None:
        if problem.options.smooths_capped:
            uniform_weight = smooth_weight / problem.compute_dtype.type(problem.V)
        else:
            parts.write_uniform(smooth_weight, into, accumulate)
            accumulate = True
    module = backend_module(plan.backend)
    module.backward(problem, plan, statistics, softmax_weight, target_weight, uniform_weight, into, accumulate)
    return destination.returned(problem, into)
