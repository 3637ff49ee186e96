"""The public functions, and what `forward` returns. `driver.py` has the way that all of them take."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from cce_numba import arguments, driver, ranks, survivors
from cce_numba.arguments import GRADIENTS, Problem
from cce_numba.backend import Gradients, Statistics
from cce_numba.destination import Destination
from cce_numba.driver import ForwardPass, Ranks
from cce_numba.integers import ceil_div
from cce_numba.interchange import ReadAgain
from cce_numba.options import LossOptions, flag
from cce_numba.parallel.communicator import Communicator
from cce_numba.plan import Plan
from cce_numba.ranks import sharing_of
from cce_numba.returned import LossStatistics
from cce_numba.terms import Nll, NoLoss, Terms, times


@dataclass(frozen=True, eq=False)
class Result:
    """What `forward` found, and what `backward` needs; arrays are of the kind that `e` was.

    Attributes:
        loss: 0-d for "mean" and "sum"; per token for "none". float32, or float64 for float64 inputs, as all below.
        nll: negative log-likelihood per token, `lse - target_logit`, in the shape of `targets[..., shift:]`; 0 where ignored.
            Without weights, label smoothing and z-loss, which are in the loss alone. Of several targets the sum of theirs times
            `target_probs`.
        logprobs: log-probabilities of the targets, in their shape after the shift; 0 where ignored or padded.
        lse: natural-log log-sum-exp of the logits per token; 0 where ignored.
        target_logit: the targets' logits, in their shape after the shift; 0 where ignored or padded.
        entropy, sum_squares, top_logprobs, top_ids: as in `Logprobs`; None unless they were asked for.
        n_valid: 0-d int64, how many tokens count, whatever their weights.
        plan: how it ran.
    """

    loss: Any
    lse: Any
    target_logit: Any
    n_valid: Any
    entropy: Any
    sum_squares: Any
    top_logprobs: Any
    top_ids: Any
    plan: Plan
    _problem: Problem
    _statistics: Statistics
    _terms: Nll | Terms | NoLoss
    _ranks: Ranks | None
    _read_again: tuple[ReadAgain, ReadAgain]

    @staticmethod
    def of(done: ForwardPass, read_again: tuple[ReadAgain, ReadAgain]) -> Result:
        """That of a forward that has been done."""
        problem, statistics = done.problem, done.statistics
        return Result(
            loss=done.loss(),
            **done.beside(),
            target_logit=problem.exported(statistics.target_logit),
            n_valid=problem.kind.export(statistics.n_valid),
            plan=done.plan,
            _problem=problem,
            _statistics=statistics,
            _terms=done.terms,
            _ranks=done.ranks,
            _read_again=read_again,
        )

    @functools.cached_property
    def nll(self) -> Any:
        """Computed when it is first asked for."""
        with self._problem.kind.current():
            nll = self._statistics.nll
            if (probs := self._problem.target_probs) is not None:
                nll = times(probs, nll).sum(axis=1)
                nll[self._problem.xp.isnan(self._statistics.target_logit).any(axis=1)] = np.nan
            return self._problem.exported(nll)

    @functools.cached_property
    def logprobs(self) -> Any:
        """Computed when it is first asked for."""
        with self._problem.kind.current():
            return self._problem.exported(self._done.logprobs())

    @property
    def _done(self) -> ForwardPass:
        return ForwardPass(self._problem, self.plan, self._statistics, self._terms, self._ranks)

    def survivor_counts(self) -> np.ndarray:
        """(n_blocks,) of each block of counting tokens, how many vocabulary entries the backward computes again.

        A block is `plan.tiles.survivor_block` consecutive counting tokens. With `filter="drop"` gradients keep all of these.
        With `filter="unbiased"` they are what the forward flags; the backward then leaves some out, by their exact
        probabilities. Waits for the device, if there is one.

        >>> e, c = np.eye(4, 8) * 50, np.eye(50, 8)
        >>> forward(e, c, np.arange(4)).survivor_counts()  # each of four certain tokens keeps its own target
        array([4])
        """
        if self._statistics.survivors is None:
            n_blocks = ceil_div(int(self._statistics.n_valid), self._statistics.survivor_block)
            return np.full(n_blocks, self._problem.V)
        return survivors.unpack_survivors(self._statistics, self._problem.V).sum(axis=1)

    def dropped_mass(self) -> Any:
        """Per token, the probability that the filter leaves out: the sum of the softmax over the entries that its block drops.

        In the shape of `nll`; 0 where ignored, and everywhere if nothing is filtered. A lost token (NaN) keeps all, and so
        drops 0.

        With `filter="drop"` it bounds the token's error in a filtered gradient: that of `dE` by `|d_loss| * dropped_mass *
        max_v |c_v|`, times its weights and `logit_scale` if there are any, less where a softcap is flat. Where more than 60 %
        of all pairs of a block and an entry survive, "cpu", "hopper" and "ampere" take all of them. On "cpu" it is then 0; on
        the other two, where only the device knows, it is more than what is left out. What the gradients of `c` and `bias` leave
        out beyond (see `filter_eps`) is not counted.

        With `filter="unbiased"` it is what this seed's draws leave out, if all tokens take part, and bounds no error: other
        entries are multiplied to make up for it, and the error is 0 on average over seeds.

        Computes all logits again, at each call, in pieces whose memory does not grow with N or V; waits for the device.

        >>> e, c = np.eye(2, 8) * 5, np.eye(50, 8)
        >>> result = forward(e, c, np.arange(2), filter="drop", filter_eps=0.02)
        >>> result.dropped_mass().round(3)  # 48 entries, each 1 / (exp(5) + 49)
        array([0.243, 0.243])
        """
        with self._problem.kind.current():
            return self._problem.exported(survivors.dropped_mass(self._problem, self._statistics))


def linear_cross_entropy(
    e: Any,
    c: Any,
    targets: Any,
    *,
    return_lse: bool = False,
    communicator: Communicator | None = None,
    tokens_axis: int | None = None,
    **options: Unpack[LossOptions],
) -> Any:
    """Cross-entropy of `softmax(e @ c.T + bias)` with `targets`, without storing the logits (arXiv 2411.09009).

    The loss of a token is that of `torch.nn.functional.cross_entropy` with the same `ignore_index`, `label_smoothing` and class
    weights, times its own weight. Gradients are with respect to `e`, `c` and `bias`, not to scales and weights.

    Args:
        e: (..., D) embeddings: float16, bfloat16 (`ml_dtypes.bfloat16`), float32 or float64; NumPy, CuPy, or anything
            with `__cuda_array_interface__` or DLPack. Strides are welcome.
        c: (V, D) classifier, of e's dtype, on e's device. If N == V nothing tells it from e, which comes first here.
        targets: (...) integers in [0, V), or `ignore_index`; or (..., K) with `target_probs`.
        return_lse: return `(loss, lse)`.
        communicator: carries arrays between ranks that share the vocabulary (`cce_numba.parallel.Communicator`). Then c and
            bias are this rank's rows, consecutive entries in the order of ranks, any number of them, even none. Targets, class
            weights and all options are the same on all ranks, and so is the loss, bit by bit.
        tokens_axis: with a communicator, the axis of e along which each rank has a part of it: the loss gathers e, and each
            rank gets the gradient of its part. None: all ranks have all of e, and get all of its gradient.
        bias: (V,) added to the logits; of e's dtype or float32.
        ignore_index: tokens with this target take no part, whatever stands in their rows.
        softcap: logits become `softcap * tanh(logits / softcap)`, after the bias.
        logit_scale: multiplies the logits, after the bias, before the softcap: 1 / temperature. A positive number, or an array
            of e's shape without its last dimension, one for each token of `e`; an element that is not positive and finite
            may make its token's loss and gradient NaN, and no other's.
        label_smoothing: in [0, 1], this part of the target's probability is spread over all V entries. It is never filtered:
            without a softcap it is computed apart, with one rounding more of 16-bit gradients; with one, all gradients are
            exact, as with `filter_eps=None`.
        z_loss: >= 0, adds `z_loss * lse**2` to each token's loss; class weights do not multiply it.
        class_weights: (V,) numbers that multiply a token's loss, by its target; with label smoothing, each entry's share of it.
        token_weights: numbers or booleans, of targets' shape (they shift with the targets), that multiply a token's whole loss.
            One of weight 0 takes no part, whatever stands in its row.
        target_probs: (..., K) numbers t, then targets are (..., K) too, with `ignore_index` as padding. The loss of a token is
            the sum of t_k * (lse - logit of target k), as if it were K tokens of weights t_k. They need not sum to 1. A mean
            divides by their sum, and label smoothing spreads a part of it. They shift with the targets.
        entropy: return the entropy of each token's distribution too, in nats: a `LossStatistics` in place of the loss.
        sum_squares: return the sum of the squares of each token's probabilities too.
        top_k: return each token's k largest log-probabilities and their entries too, of equal ones the lower entry first. So
            top_k=1 gives the accuracy.
        batch_invariant: what is found of a token (log-probabilities, lse, entropy, sum of squares, best entries) is bitwise the
            same whatever other tokens stand beside it, and how many. So is its row of the gradient of `e`, which is exact then,
            for the same upstream gradient of its own; a mean over all tokens is none of its own.
        allow_tf32: float32 numbers of e and c (and, in a backward, gradients of logits) may be rounded to tf32, 11 significant
            bits, on their way to tensor cores. It chooses backend "ampere"; other backends refuse it. It means nothing for
            other dtypes.
        reduction: "mean" over the tokens that count (nan if none does), "sum", or "none". With weights, the mean divides by the
            sum of token weight times class weight of the target (nan, with gradients of 0, if that is 0).
        shift: predict `targets[..., shift:]` from `e[..., :-shift, :]`, without copying `e`; True means 1.
        filter: what becomes of an entry whose probability is below `filter_eps` in all tokens of a block, and which is the
            target of none of them. "unbiased" lets it survive with probability pmax / filter_eps, pmax being the largest of
            these probabilities, and then multiplies what it adds by filter_eps / pmax. So gradients are right on average over
            seeds, at any threshold. "drop" leaves it out of the gradients, as the paper does (section 4.3).
        filter_seed: an integer, or a 0-d array of one on e's device (its value is then read there, in a CUDA graph too). The
            draws of "unbiased" follow from it and from the targets that count, and from nothing else. So the same inputs give
            the same draws; whoever trains on the same targets again should give another one each time, such as the number of
            the step.
        filter_eps: the filter's threshold, a probability. "auto" is `finfo(dtype).eps / 32` (2^-12 for bfloat16), or for "drop"
            `finfo(dtype).eps / 512` (2^-16 for bfloat16). None is exact. The loss itself is always exact. With "drop" and
            "auto", "hopper" and "ampere" leave out more of the gradients of `c` and `bias`: 128 entries, in an order of their
            own, for a block of 128 tokens, if none of them is a target there and none reaches 4 times that.
        filter_e_grad: False keeps the gradient of `e` exact.
        filter_c_grad: False keeps the gradients of `c` and `bias` exact (the paper's FullC).
        accum_e_fp32: return the gradient of 16-bit `e` in float32, as it was accumulated.
        accum_c_fp32: return the gradient of 16-bit `c` in float32, as it was accumulated.
        check_targets: True raises for a target out of range, on any device. None does so on the host, where looking is
            free; on a device, where it would wait for the device, such a token's loss and gradient become NaN.
        workspace_bytes: memory for logits that are kept from the forward to the backward, so that exact gradients need not
            compute them again: 388 bytes for each token and 192 entries. Backend "hopper" uses it, of the others none. 0 keeps
            none; None is what the environment variable CCE_WORKSPACE_BYTES says, else 0.
        backend: "cpu", "simt", "ampere", "hopper", or None to choose by device and dtype (`explain` tells).

    Returns:
        The loss, an array of e's kind on e's device: 0-d, or for "none" in the shape of `targets[..., shift:]` with 0
        where ignored. float32, or float64 for float64 inputs. With `entropy`, `sum_squares` or `top_k` a `LossStatistics`,
        which has the loss, the lse and what was asked for.

    Raises:
        TypeError: an argument is no array, or has the wrong dtype.
        ValueError: shapes, devices, targets or option values do not fit.
        BackendUnavailable: the backend that was asked for cannot run here.
        NotImplementedError: the backend does not have what is asked for yet.

    >>> e, c = np.zeros((3, 4), np.float32), np.ones((8, 4), np.float32)
    >>> linear_cross_entropy(e, c, np.array([1, 2, 3])).round(4)  # log(8): all of 8 entries are as likely
    np.float32(2.0794)
    """
    return_lse = flag("return_lse", return_lse)
    with ranks.prepared(e, c, targets, options, sharing_of(communicator, tokens_axis)) as (problem, plan, together):
        done = driver.forward(problem, plan, ranks=together)
        found = _returned(done, return_lse)
        return found if len(found) > 1 else found[0]


def _returned(done: ForwardPass, return_lse: bool) -> tuple[Any, ...]:
    """`(loss,)`, `(loss, lse)`, or a `LossStatistics` where options ask for one."""
    problem = done.problem
    if problem.options.asks_for_more:
        return LossStatistics(done.loss(), **done.beside())
    return (done.loss(), problem.exported(done.statistics.lse)) if return_lse else (done.loss(),)


def linear_cross_entropy_with_grad(
    e: Any,
    c: Any,
    targets: Any,
    *,
    return_lse: bool = False,
    wrt: Iterable[str] | None = None,
    out: Gradients | None = None,
    accumulate: bool = False,
    communicator: Communicator | None = None,
    tokens_axis: int | None = None,
    **options: Unpack[LossOptions],
) -> Any:
    """The loss and its gradients: `(loss, grads)`, or `(loss, lse, grads)` with `return_lse`.

    With `entropy`, `sum_squares` or `top_k` it is `(found, grads)`, found being a `LossStatistics`.

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
    return_lse = flag("return_lse", return_lse)
    with ranks.prepared(e, c, targets, options, sharing_of(communicator, tokens_axis)) as (problem, plan, together):
        of_caller = problem if together is None else together.problem_of_results(problem)
        destination = Destination.of(out, accumulate, arguments.wanted(wrt, problem), of_caller)
        # Of all gradients: so the loss has the same bits whichever are wanted.
        done = driver.forward(problem, plan, GRADIENTS, together)
        found = _returned(done, return_lse)
        grads = done.backward(None, None, destination)
        return (found, grads) if isinstance(found, LossStatistics) else (*found, grads)


def forward(
    e: Any,
    c: Any,
    targets: Any,
    *,
    communicator: Communicator | None = None,
    tokens_axis: int | None = None,
    **options: Unpack[LossOptions],
) -> Result:
    """The loss with its parts, ready for `backward`; arguments and errors are those of `linear_cross_entropy`.

    The result keeps `e` and `c` themselves, which must not change before the last `backward`, since that reads them again (of
    PyTorch's tensors a change is noticed), and copies of all other arrays, the targets among them, which may.

    >>> result = forward(np.zeros((2, 4)), np.ones((8, 4)), np.array([1, -100]))
    >>> result.nll.round(4), int(result.n_valid)
    (array([2.0794, 0.    ]), 1)
    """
    with ranks.prepared(e, c, targets, options, sharing_of(communicator, tokens_axis)) as (problem, plan, together):
        done = driver.forward(problem.with_own_small_arrays(), plan, GRADIENTS, together)
        return Result.of(done, (ReadAgain("e", e), ReadAgain("c", c)))


def backward(
    result: Result,
    d_loss: Any = None,
    d_lse: Any = None,
    *,
    d_logprobs: Any = None,
    d_entropy: Any = None,
    wrt: Iterable[str] | None = None,
    out: Gradients | None = None,
    accumulate: bool = False,
) -> Gradients:
    """Vector-Jacobian product: the gradients of `sum(d_loss * loss) + sum(d_lse * lse)`.

    And of `sum(d_logprobs * logprobs) + sum(d_entropy * entropy)`, where these are given.

    Args:
        result: what `forward` returned; it may be used again.
        d_loss: upstream gradient of the loss: a scalar, or for "none" also an array in the shape of the loss. 1 by default.
        d_lse: upstream gradient of the lse: a scalar or an array in its shape. 0 by default. No weights multiply it.
        d_logprobs: upstream gradient of the log-probabilities of the targets: a scalar or an array in their shape. 0 by
            default. With d_loss=0 any function of log-probabilities, lse and entropy has its gradients here.
        d_entropy: upstream gradient of the entropy, which `forward` was asked for: a scalar or an array in its shape. 0 by
            default.
        wrt: which gradients to compute, out of "e", "c", "bias"; all that exist by default. Others are None.
        out: arrays to write gradients to, as in `linear_cross_entropy_with_grad`.
        accumulate: add to what `out` holds.

    Raises TypeError or ValueError, naming the argument, if an upstream gradient or an array of `out` does not fit, or if e or c
    is a tensor of PyTorch that was changed in place after `forward`.

    >>> result = forward(np.zeros((1, 2)), np.eye(2), np.array([0]), reduction="sum")
    >>> backward(result, d_loss=10.0).e
    array([[-5.,  5.]])
    """
    if not isinstance(result, Result):
        raise TypeError(f"result: must be what forward returned, got {type(result).__qualname__}")
    problem = result._problem
    gradients = arguments.wanted(wrt, problem)
    for array in result._read_again:
        array.check()
    with problem.kind.current():
        together = result._ranks
        of_caller = problem if together is None else together.problem_of_results(problem)
        destination = Destination.of(out, accumulate, gradients, of_caller)
        return result._done.backward(d_loss, d_lse, destination, d_logprobs=d_logprobs, d_entropy=d_entropy)


def indexed_dot(e: Any, c: Any, targets: Any, **options: Unpack[LossOptions]) -> Any:
    """Each token's target logit, one dot product per token: paper section 4.1.

    Takes `bias`, `ignore_index`, `softcap`, `logit_scale`, `shift`, `check_targets`, `backend` of `linear_cross_entropy`, and
    raises its errors.

    Returns an array in the shape of `targets[..., shift:]`, 0 where ignored; float32, or float64 for float64 inputs.

    >>> indexed_dot(np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([1]))
    array([11.])
    """
    only = ("bias", "ignore_index", "softcap", "logit_scale", "shift", "check_targets", "backend")
    with driver.prepared(e, c, targets, options, only) as (problem, plan):
        return problem.exported(driver.indexed_dot(problem, plan))


def linear_logsumexp(e: Any, c: Any, **options: Unpack[LossOptions]) -> Any:
    """Each token's natural-log log-sum-exp of `e @ c.T + bias`: paper section 4.2.

    Takes `bias`, `softcap`, `logit_scale`, `shift`, `allow_tf32` and `backend` of `linear_cross_entropy`. Raises its errors.

    Returns an array in the shape of `e[..., :-shift, 0]`; float32, or float64 for float64 inputs.

    >>> linear_logsumexp(np.zeros((1, 2)), np.ones((4, 2))).round(4)
    array([1.3863])
    """
    only = ("bias", "softcap", "logit_scale", "shift", "allow_tf32", "backend")
    with driver.prepared(e, c, arguments.NO_TARGETS, options, only) as (problem, plan):
        return problem.exported(driver.forward(problem, plan).statistics.lse)


def explain(e: Any, c: Any, targets: Any = arguments.NO_TARGETS, **options: Unpack[LossOptions]) -> Plan:
    """What a call with these arguments would run: backend, tiles, bytes, and why; nothing is computed.

    Takes the arguments of `linear_cross_entropy` and raises its errors. Print the result, or read its fields.

    >>> explain(np.ones((2, 4)), np.ones((8, 4)), np.array([1, 2]), backend="cpu").backend
    'cpu'
    """
    with driver.prepared(e, c, targets, options) as (_, plan):
        return plan
