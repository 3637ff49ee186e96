"""What a call computes, apart from who records it: the checked problem, the forward, and the backward of what that left.

`driver.py` computes; here its statistics (`backend.Statistics`) become tensors and come back from them. Operators need tensors
whose shapes follow from those of the arguments, as the backend's `StatisticsForm` says; and tensors are what autograd frees,
offloads and recomputes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from cce_numba import driver, interchange, ranks
from cce_numba.arguments import GRADIENTS, Ids, Problem
from cce_numba.backend import Gradients, Statistics, StatisticsForm, backend_module
from cce_numba.destination import Destination
from cce_numba.driver import ForwardPass, Ranks
from cce_numba.integers import ceil_div
from cce_numba.interchange import Kind
from cce_numba.options import DEFAULTS
from cce_numba.parallel.agreement import Agreed
from cce_numba.plan import Plan
from cce_numba.ranks import Sharing
from cce_numba.torch import memory

# All but the first three may be None. A forward alone reads the last: backwards take the seed that it made, and have None.
TENSORS = ("e", "c", "targets", "bias", "logit_scale", "class_weights", "token_weights", "target_probs", "filter_seed")
_ON_CPU = Kind("torch", None, memory.tensor_of)
SAVED = (
    "lse", "max_logit", "log_sum", "target_logit", "n_valid", "tokens", "survivors", "kept_logits", "mean_logit", "draw_seed",
    "entropy",
)  # fmt: skip
MORE = ("logprobs", "sum_squares", "top_logprobs", "top_ids")  # what a backward does not need
LOGPROBS = "logprobs"  # in place of a reduction: targets are ids whose log-probabilities are wanted, and there is no loss


class Outputs(NamedTuple):
    """What autograd sees of a forward: the loss, and flat (N, ...) what else was asked for. The last three have no gradient."""

    loss: torch.Tensor
    lse: torch.Tensor
    logprobs: torch.Tensor | None
    entropy: torch.Tensor | None
    sum_squares: torch.Tensor | None
    top_logprobs: torch.Tensor | None
    top_ids: torch.Tensor | None


class Upstream(NamedTuple):
    """What flows back into the first of the `Outputs`; None where nothing does."""

    loss: torch.Tensor | None
    lse: torch.Tensor | None
    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    def is_nothing(self) -> bool:
        """Whether nothing flows back."""
        return all(x is None for x in self)


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are not their defaults: these alone need checks, which take time."""
    return {name: value for name, value in options.items() if value != DEFAULTS[name]}


def wanted(tensors: Iterable[torch.Tensor | None]) -> list[str]:
    """The names of the gradients that a backward would be asked for, of `TENSORS`, if autograd records."""
    if not torch.is_grad_enabled():
        return []
    return [name for name, x in zip(TENSORS, tensors, strict=True) if name in GRADIENTS and x is not None and x.requires_grad]


@contextlib.contextmanager
def prepared(
    tensors: Sequence[torch.Tensor | None],
    given: Mapping[str, Any],
    plan: Plan | None = None,
    sharing: Sharing | None = None,
    agreed: Agreed | None = None,
) -> Iterator[tuple[Problem, Plan, Ranks | None]]:
    """The checked problem and its plan, as in `ranks.prepared`; inside, PyTorch's device, stream and memory are current.

    The problem has the tensors' addresses, which are theirs until this is left: later, FSDP may have freed and filled them
    again elsewhere. So a backward comes here anew.

    Args:
        tensors: `TENSORS`.
        given: the options that are no tensors, by name; defaults may be missing.
        plan: that of the same arguments, if it was made before.
        sharing: how ranks share the work, if they do.
        agreed: what they have agreed on, if they did so before.
    """
    e, c, targets, *others = tensors
    assert e is not None, "of TENSORS, the first three are never None"
    arrays = {name: x for name, x in zip(TENSORS[3:], others, strict=True) if x is not None}
    given, ids = {**given, **arrays}, given.get("reduction") == LOGPROBS
    if ids:
        del given["reduction"]
    on_cpu = e.device.type == "cpu"
    kind = _ON_CPU if on_cpu else Kind("torch", e.get_device(), memory.tensor_of)
    backend = "cpu" if on_cpu else None  # no need to ask those for GPUs
    of_targets = Ids(targets) if ids else targets
    with (
        memory.from_pytorch(e.device),
        ranks.prepared(e, c, of_targets, given, sharing, kind=kind, backend=backend, plan=plan, agreed=agreed) as call,
    ):
        yield call


def forward(
    problem: Problem, plan: Plan, wrt: Collection[str], together: Ranks | None = None
) -> tuple[torch.Tensor, tuple[Any, ...], tuple[Any, ...]]:
    """The loss and the arrays `SAVED` and `MORE`, inside `prepared`. `wrt`: the gradients that a backward is to give.

    Of the latter those that were not asked for are None.
    """
    done = driver.forward(problem, plan, wrt, together)
    form = backend_module(plan.backend).statistics_form(problem)
    more = None if problem.has_loss else done.logprobs(), *without_gradient(done)
    return done.loss(), _saved(problem, form, done.statistics, problem.options.records_survivors(wrt)), more


def without_gradient(done: ForwardPass) -> tuple[Any, ...]:
    """The arrays `MORE` but for the first; None where not asked for."""
    return done.statistics.sum_squares, done.top_logprobs(), done.statistics.top_ids


class Kept(NamedTuple):
    """What a backward takes of a forward, as autograd's own functions keep it: without operators, its form is nobody's concern.

    Attributes:
        tensors: on the CPU `SAVED` without the lse; on a device the blocks of memory that the statistics lie in.
        pieces: where in the blocks; None on the CPU.
    """

    tensors: list[torch.Tensor]
    pieces: list[memory.Piece | None] | None

    @staticmethod
    def of(problem: Problem, plan: Plan, found: Statistics, wrt: Collection[str]) -> Kept:
        """Inside `prepared`."""
        if problem.on_device:
            return Kept(*memory.blocks_of([getattr(found, name) for name in SAVED]))
        form = backend_module(plan.backend).statistics_form(problem)
        saved = _saved(problem, form, found, problem.options.records_survivors(wrt))
        return Kept([memory.tensor_of(array) for array in saved[1:]], None)

    def statistics(self, problem: Problem, plan: Plan, lse: torch.Tensor) -> Statistics:
        """What it was made of, inside `prepared`."""
        form = backend_module(plan.backend).statistics_form(problem)
        if self.pieces is None:
            return _statistics(problem, form, [lse, *self.tensors])
        arrays = dict(zip(SAVED, memory.arrays_in(self.tensors, self.pieces), strict=True))
        return Statistics(**arrays, survivor_block=form.survivor_block)

    def saved(
        self,
        tensors: Sequence[torch.Tensor | None],
        given: Mapping[str, Any],
        plan: Plan,
        lse: torch.Tensor,
        wrt: Collection[str],
    ) -> list[torch.Tensor]:
        """`SAVED`, for operators; arguments as of `prepared`, and the names of the gradients that the forward was told of."""
        if self.pieces is None:
            return [lse, *self.tensors]
        with torch.no_grad(), prepared(tensors, given, plan) as (problem, *_):
            found, form = self.statistics(problem, plan, lse), backend_module(plan.backend).statistics_form(problem)
            recorded = problem.options.records_survivors(wrt)
            return memory.tensors_of(defined(problem, _saved(problem, form, found, recorded)))


def statistics(problem: Problem, plan: Plan, saved: Sequence[torch.Tensor]) -> Statistics:
    """The statistics that the tensors `SAVED` were made of, inside `prepared`."""
    return _statistics(problem, backend_module(plan.backend).statistics_form(problem), saved)


def backward(
    problem: Problem,
    plan: Plan,
    found: Statistics,
    upstream: Upstream,
    grads: dict[str, torch.Tensor],
    together: Ranks | None = None,
) -> None:
    """Writes the gradients that follow from what flows into the outputs to `grads`, made by `gradients_like`."""
    of_caller = problem if together is None else together.problem_of_results(problem)
    flat = {name: interchange.take(name, grad).reshape(getattr(of_caller, name).shape) for name, grad in grads.items()}
    destination = Destination(frozenset(grads), Gradients(**grads), Gradients(**flat), False)  # fresh: nothing to check
    d_lse, d_logprobs, d_entropy = (
        None if x is None else problem.per_token(interchange.take("an upstream gradient", x)) for x in upstream[1:]
    )
    done = ForwardPass.of(problem, plan, found, together)
    d_loss = 0.0 if upstream.loss is None else upstream.loss
    done.backward(d_loss, d_lse, destination, d_logprobs=d_logprobs, d_entropy=d_entropy)


def for_backward(tensors: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """Those of `TENSORS` that a backward reads: the others may change before it comes."""
    return *tensors[:-1], None


def gradients_like(tensors: Sequence[torch.Tensor | None], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Empty tensors for the gradients of these of `TENSORS`, contiguous."""
    inputs = dict(zip(TENSORS, tensors, strict=True))
    return {name: torch.empty_like(inputs[name], memory_format=torch.contiguous_format) for name in names}


def _saved(p: Problem, form: StatisticsForm, statistics: Statistics, recorded: bool) -> tuple[Any, ...]:
    """The arrays `SAVED`, in the shapes that the fake of the operator tells; two may lie in one block of memory.

    Survivors are flat: of a size that is left open, a compiler asks whether it is 1 if it is the first of two. The CPU's tokens
    and blocks are only those that count: zeros follow. Zeros alone stand for bits that it did not record after all, since
    nearly everything survives: a block in which a token counts keeps its targets at least. A device has all rows. They go on
    after the last entry, where the backward may read, so all of their memory is kept.
    """
    tokens, bits, mean_logit = statistics.tokens, statistics.survivors, statistics.mean_logit
    draw_seed = statistics.n_valid.reshape(1)[:0] if statistics.draw_seed is None else statistics.draw_seed
    if len(tokens) < p.N:
        tokens = np.concatenate([tokens, np.zeros(p.N - len(tokens), tokens.dtype)])
    n_bytes = form.survivor_bytes(p.N, p.V) if recorded else 0
    if n_bytes == 0:
        bits = p.xp.empty(0, np.uint8)
    elif p.on_device:
        bits = interchange.array_module(bits).ndarray((n_bytes,), bits.dtype, bits.data)
    else:
        all_bits = np.zeros(n_bytes, np.uint8)
        if bits is not None:
            all_bits[: bits.size] = bits.reshape(-1)
        bits = all_bits
    if mean_logit is None:
        mean_logit = statistics.lse[:0]
    entropy = statistics.lse[:0] if statistics.entropy is None else statistics.entropy
    numbers = statistics.lse, statistics.max_logit, statistics.log_sum, statistics.target_logit
    kept = bits[:0] if statistics.kept_logits is None else statistics.kept_logits
    return *numbers, statistics.n_valid, tokens, bits, kept, mean_logit, draw_seed, entropy


def defined(p: Problem, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    """With zeros for tokens past those that count, where a device has left what was there: results of operators must follow
    from their arguments."""
    if not (p.on_device and p.N):
        return saved
    n_valid, tokens = (saved[SAVED.index(name)] for name in ("n_valid", "tokens"))
    tokens = p.xp.where(p.xp.arange(p.N) < n_valid, tokens, tokens.dtype.type(0))
    return tuple(tokens if name == "tokens" else array for name, array in zip(SAVED, saved, strict=True))


def _statistics(p: Problem, form: StatisticsForm, saved: Sequence[torch.Tensor]) -> Statistics:
    """What `_saved` was made of, out of tensors of it."""
    *others, mean_logit, draw_seed, entropy = saved
    lse, max_logit, log_sum, target_logit, n_valid, tokens, bits, kept = map(memory.array_of, others)
    if not p.on_device:
        tokens = tokens[: int(n_valid)]
    if bits.size:
        bits = bits.reshape(form.survivors_shape(p.N, p.V))
    recorded = bits.size > 0 and (p.on_device or bool(bits[0].any()))
    return Statistics(
        tokens=tokens,
        n_valid=n_valid,
        lse=lse,
        max_logit=max_logit,
        log_sum=log_sum,
        target_logit=target_logit,
        survivors=bits[:, : ceil_div(p.V, 8)] if recorded else None,
        survivor_block=form.survivor_block,
        mean_logit=memory.array_of(mean_logit) if p.options.smooths_capped else None,
        draw_seed=memory.array_of(draw_seed) if draw_seed.numel() else None,
        entropy=memory.array_of(entropy) if len(entropy) == p.N else None,
        kept_logits=kept if kept.size else None,
    )
