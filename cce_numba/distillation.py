"""A student's head that is trained on a teacher's distribution, with neither's logits stored.

prepared        both heads' problems, checked, and a backend that has distillation
forward         the log-sum-exps of both heads, by the driver; then the divergence of each token
DistillationPass
  loss          the divergence, reduced
  backward      the gradients for the student's e, c and bias
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import numpy as np

from cce_numba import arguments, driver, interchange, survivors
from cce_numba.arguments import DISTILLATION, FILTERED_DISTILLATION, Problem
from cce_numba.backend import BACKENDS, BackendUnavailable, Gradients, backend_module
from cce_numba.destination import Destination
from cce_numba.options import DEFAULTS, Filter, integer, positive
from cce_numba.plan import Plan

KINDS = ("forward_kl", "reverse_kl", "jsd")


class DistillationOptions(TypedDict, total=False):
    """What the functions take by name; `linear_distillation` tells what they mean."""

    kind: str
    beta: float
    temperature: float
    bias: Any
    teacher_bias: Any
    softcap: float | None
    teacher_softcap: float | None
    targets: Any
    ignore_index: int
    shift: int | bool
    reduction: str
    filter: Filter
    filter_eps: float | str | None
    filter_seed: Any
    accum_e_fp32: bool
    accum_c_fp32: bool
    backend: str | None


_OF_STUDENT = ("bias", "softcap")
_OF_BOTH = ("shift", "backend")
_OF_LOSS = ("reduction", "filter", "filter_eps", "filter_seed", "accum_e_fp32", "accum_c_fp32")
# The filter's threshold, where it is not given. Where a gradient is not bounded by the larger probability, nothing is filtered.
_FILTER_EPS = {"forward_kl": "auto", "reverse_kl": None, "jsd": "auto"}


def linear_distillation(e: Any, c: Any, teacher_e: Any, teacher_c: Any, **options: Unpack[DistillationOptions]) -> Any:
    """The divergence of `Q = softmax(e @ c.T / temperature)` from a teacher's `P`, with neither's logits stored.

    Backends "hopper", "simt" and "cpu" have it. On "simt" and "cpu" gradients are filtered as those of `linear_cross_entropy`,
    by the larger of P and Q: an entry of the vocabulary survives in a block of tokens if one of them gives it a P or a Q of at
    least `filter_eps`. On "hopper" they are exact, whatever filter is asked for.

    Args:
        e: (..., D) the student's embeddings, as in `linear_cross_entropy`.
        c: (V, D) the student's classifier.
        teacher_e: (..., D') the teacher's embeddings of the same tokens, of any dtype and hidden size.
        teacher_c: (V, D') the teacher's classifier, over the same vocabulary.
        kind: "forward_kl" is KL(P || Q), "reverse_kl" KL(Q || P), and "jsd" beta * KL(P || M) + (1 - beta) * KL(Q || M) with
            M = beta * P + (1 - beta) * Q (Agarwal et al., arXiv 2306.13649, equation 1).
        beta: of "jsd", between 0 and 1.
        temperature: divides the finished logits of both. The loss is not multiplied by its square, as some do.
        bias, teacher_bias: (V,) added to the logits.
        softcap, teacher_softcap: as in `linear_cross_entropy`.
        targets: (...) integers that only say which tokens are ignored: those that are `ignore_index`. None ignores none.
        filter_eps: the threshold; None makes gradients exact. Let G be the gradient with respect to the student's logits, for
            an upstream gradient and a temperature of 1. Below the threshold abs(G) < `filter_eps` for "forward_kl", where G is
            Q - P, and for "jsd". So the default for these is "auto", as in `linear_cross_entropy`. For "reverse_kl" G is
            Q * (log(Q / P) - KL), whose logarithm has no bound where P is small: `filter_eps` bounds Q and P and not G. So the
            default is None; "auto" and numbers are taken there too.
        filter, filter_seed: as in `linear_cross_entropy`. Draws follow from the teacher's log-sum-exps and `filter_seed`.
        ignore_index, shift, reduction, accum_e_fp32, accum_c_fp32, backend: as in `linear_cross_entropy`.

    Returns the loss, in nats, as `linear_cross_entropy` does.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `linear_cross_entropy` does.
        NotImplementedError: the backend does not have distillation yet.

    >>> student, teacher = np.zeros((2, 1)), np.log([[0.25], [0.75]])
    >>> linear_distillation(np.ones((1, 1)), student, np.ones((1, 1)), teacher).round(3)
    np.float64(0.131)
    """
    with prepared(e, c, teacher_e, teacher_c, options) as heads:
        return forward(heads).loss()


def linear_distillation_with_grad(
    e: Any,
    c: Any,
    teacher_e: Any,
    teacher_c: Any,
    *,
    d_loss: Any = None,
    wrt: Iterable[str] | None = None,
    out: Gradients | None = None,
    accumulate: bool = False,
    **options: Unpack[DistillationOptions],
) -> tuple[Any, Gradients]:
    """`(loss, grads)`: the loss of `linear_distillation` and its gradients for the student's e, c and bias.

    d_loss is the upstream gradient of the loss, 1 by default; wrt, out and accumulate are those of
    `linear_cross_entropy_with_grad`. Raises what these do.

    >>> student, teacher = np.zeros((2, 1)), np.log([[0.25], [0.75]])
    >>> linear_distillation_with_grad(np.ones((1, 1)), student, np.ones((1, 1)), teacher)[1].c.round(3).tolist()
    [[0.25], [-0.25]]
    """
    with prepared(e, c, teacher_e, teacher_c, options) as heads:
        destination = Destination.of(out, accumulate, arguments.wanted(wrt, heads.student), heads.student)
        done = forward(heads, destination.wanted)
        return done.loss(), done.backward(d_loss, destination)


@dataclass(frozen=True, eq=False)
class Heads:
    """Both heads, checked: a problem of each, with the temperature as a scale of the logits, and the plans of both."""

    student: Problem
    teacher: Problem
    plans: tuple[Plan, Plan]
    kind: str
    beta: float

    @property
    def module(self) -> Any:
        """The backend's module for distillation."""
        return importlib.import_module(f"cce_numba.{self.plans[0].backend}.distillation")


@contextlib.contextmanager
def prepared(e: Any, c: Any, teacher_e: Any, teacher_c: Any, given: Mapping[str, Any]) -> Iterator[Heads]:
    """Checks the arguments of `linear_distillation`; inside, the device and stream of the arrays are current."""
    for name in given:
        if name not in DistillationOptions.__annotations__:
            raise TypeError(f"{name}: is not an option; options are {', '.join(DistillationOptions.__annotations__)}")
    kind, beta = given.get("kind", "forward_kl"), given.get("beta", 0.5)
    if kind not in KINDS:
        raise ValueError(f"kind: must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if not isinstance(beta, float | np.floating) or not 0 < beta < 1:
        raise ValueError(f'beta: must be a number between 0 and 1 (at these take "forward_kl" and "reverse_kl"), got {beta!r}')
    temperature = positive("temperature", given.get("temperature", 1.0), np.dtype(np.float32), "a positive number")
    targets = _mask(e, given.get("targets"), given.get("ignore_index", DEFAULTS["ignore_index"]))
    both = {name: given[name] for name in _OF_BOTH if name in given} | {"logit_scale": 1 / temperature}
    own = {"filter_eps": _FILTER_EPS[kind]} | {name: given[name] for name in (*_OF_LOSS, *_OF_STUDENT) if name in given}
    of_teacher = {name: given[f"teacher_{name}"] for name in _OF_STUDENT if f"teacher_{name}" in given} | {"filter_eps": None}
    of_student, of_teacher = (_heated(options, temperature) for options in (both | own, both | of_teacher))
    with contextlib.ExitStack() as stack:
        for backend in _backends(e, given.get("backend")):
            try:
                student, plan = stack.enter_context(driver.prepared(e, c, targets, of_student, backend=backend))
                teacher, other = stack.enter_context(_teacher(teacher_e, teacher_c, targets, of_teacher, plan.backend))
                break
            except BackendUnavailable as error:
                unavailable = error
        else:
            raise unavailable
        if student.token_shape != teacher.token_shape:
            raise ValueError(f"teacher_e: must be of e's tokens, {student.token_shape}, got {teacher.token_shape}")
        if student.V != teacher.V:
            raise ValueError(f"teacher_c: must have the vocabulary of c, V = {student.V}, got {teacher.V} entries")
        yield Heads(_filtered(student, plan.backend), teacher, (plan, other), kind, float(beta))


def _backends(e: Any, asked: str | None) -> list[str]:
    """Those to try, in order: the one that was asked for; else, for arrays of a GPU, all for GPUs that have distillation."""
    having = [name for name in BACKENDS if DISTILLATION in backend_module(name).EXTRAS]
    if asked is None:
        return having[:-1] if interchange.is_on_device(interchange.take("e", e)) else having[-1:]
    if asked in BACKENDS and asked not in having:
        has = ", ".join(map(repr, having))
        raise NotImplementedError(f"distillation: backend {asked!r} does not have it yet; those that have are {has}")
    return [asked]


@contextlib.contextmanager
def _teacher(e: Any, c: Any, targets: Any, options: Mapping[str, Any], backend: str) -> Iterator[tuple[Problem, Plan]]:
    """`driver.prepared` of the teacher, whose errors name the teacher's arguments."""
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(driver.prepared(e, c, targets, options, backend=backend))
        except (TypeError, ValueError) as error:
            ours = str(error).startswith(("e:", "c:", "bias:", "softcap:"))
            raise type(error)(f"teacher_{error}" if ours else str(error)) from None
        except BackendUnavailable as error:
            raise BackendUnavailable(f"teacher_e: {error}") from None
        yield found


def _filtered(student: Problem, backend: str) -> Problem:
    """With the threshold that the backend takes: none where it has no filter of distillation.

    What costs no accuracy beyond the threshold is known of a cross-entropy alone, so "auto" leaves a backend no choice.
    """
    has = FILTERED_DISTILLATION in backend_module(backend).EXTRAS
    eps = student.options.filter_eps if has else None
    return replace(student, options=replace(student.options, filter_eps=eps, filter_is_auto=False))


def _heated(options: dict[str, Any], temperature: float) -> dict[str, Any]:
    """With the softcap of logits that are divided: a temperature divides softcap * tanh(x / softcap), the finished logit."""
    softcap = options.get("softcap")
    return options if not isinstance(softcap, int | float) or softcap <= 0 else options | {"softcap": softcap / temperature}


def _mask(e: Any, targets: Any, ignore_index: Any) -> Any:
    """Targets that ignore what the caller's do, by our own `ignore_index`; elsewhere they are an entry that all have."""
    native = interchange.take("e", e)
    xp = interchange.array_module(native)
    if targets is None:
        return xp.zeros(native.shape[:-1], np.int64)
    given = interchange.take("targets", targets)
    if given.dtype.kind not in "iu":
        raise TypeError(f"targets: must be integers, the ids of entries, got dtype {given.dtype}")
    return xp.where(given == integer("ignore_index", ignore_index), np.int64(DEFAULTS["ignore_index"]), np.int64(0))


@dataclass(frozen=True, eq=False)
class DistillationPass:
    """A forward that has been done, and the way back.

    Attributes:
        heads: both.
        student, teacher: `Head` of the backend's module: with what their forwards found, and of the student's also with the
            survivors, if a backward is to come that filters.
        which: the backend's `Divergence`.
        divergence: (N,) of each token, 0 where ignored.
        of_student: (N,) see the backend's `distillation.divergence`.
    """

    heads: Heads
    student: Any
    teacher: Any
    which: Any
    divergence: Any
    of_student: Any

    def loss(self) -> Any:
        """Of the caller's kind: 0-d, or per token for reduction "none"."""
        p = self.heads.student
        if p.options.reduction == "none":
            return p.exported(self.divergence)
        total = self.divergence.sum(dtype=np.float64)
        if p.options.reduction == "mean":
            total = total / self.student.statistics.n_valid  # the mean of none is nan
        return p.kind.export(p.xp.asarray(total, dtype=p.compute_dtype))

    def backward(self, d_loss: Any, destination: Destination) -> Gradients:
        """Gradients for the student, as `driver.ForwardPass.backward`."""
        p, module = self.heads.student, self.heads.module
        shape = tuple(p.per_token(self.divergence).shape) if p.options.reduction == "none" else ()
        d_token = arguments.upstream("d_loss", 1.0 if d_loss is None else d_loss, p, shape)
        if p.options.reduction == "mean":
            d_token /= p.xp.maximum(self.student.statistics.n_valid, 1)
        if p.logit_scale is not None:
            d_token = d_token * p.logit_scale
        into = destination.arrays(p)
        if not destination.accumulate:
            for name in ("e", *(("c", "bias") if not p.N else ())):
                if (gradient := getattr(into, name)) is not None:
                    interchange.write_zeros(gradient)
        if p.N:
            tiles = module.tiles_of(p, self.heads.teacher)
            gradients = into, destination.accumulate
            module.backward(self.student, self.teacher, self.which, self.of_student, d_token, tiles, *gradients)
        return destination.returned(p, into)


def forward(heads: Heads, wrt: Collection[str] = ()) -> DistillationPass:
    """Goes forward, inside `prepared`. `wrt` names the gradients that a backward may be asked for, out of "e", "c", "bias"."""
    module = heads.module
    student, teacher = (
        module.Head(problem, driver.forward(problem, plan).statistics)
        for problem, plan in zip((heads.student, heads.teacher), heads.plans, strict=True)
    )
    which, p = module.Divergence(heads.kind, heads.beta), heads.student
    record = p.options.records_survivors(wrt)
    if record and p.options.is_unbiased:
        seed = survivors.seed_of_numbers(teacher.statistics.lse, p.filter_seed)
        student = replace(student, statistics=replace(student.statistics, draw_seed=seed))
    tiles = module.tiles_of(p, heads.teacher)
    divergence, of_student, student = module.divergence(student, teacher, which, tiles, record)
    if record:
        own = () if heads.kind == "forward_kl" else (of_student,)  # whose gradient does not have it
        lost = ~p.xp.isfinite(sum(0 * x for x in (student.statistics.lse, teacher.statistics.lse, *own)))
        survivors.keep_blocks_with(lost, p, student.statistics)
    return DistillationPass(heads, student, teacher, which, divergence, of_student)
