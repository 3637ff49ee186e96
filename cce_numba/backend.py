"""What a backend is: the functions that it offers, what its forward leaves behind, and where it writes gradients."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cce_numba.arguments import Problem

if TYPE_CHECKING:
    from cce_numba.plan import Plan

# In order of preference. A backend is a module cce_numba.<name>.backend with the functions of `Backend`.
BACKENDS = ("hopper", "simt", "cpu")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for, or every backend, cannot take this problem on this machine."""


@dataclass(frozen=True)
class Statistics:
    """What a backend's forward leaves behind, in NumPy or CuPy arrays.

    Attributes:
        tokens: integers, at least n_valid of them: the tokens that count, ascending, first.
        n_valid: 0-d int64, how many tokens count.
        lse: (N,) natural-log log-sum-exp of the compute dtype, 0 where ignored.
        target_logit: (N,) logit of the target, 0 where ignored, NaN for a target out of range; None without targets.
        survivors: (at least ceil(n_valid / block), ceil(V / 8)) uint8, little-endian bits over the vocabulary, for blocks of
            consecutive *counting* tokens (see `Backend.forward`); None if not recorded, or if nearly all survive: then all do.
            Further rows are the backend's own: "hopper", if `Plan.coarse_eps` is a number, has 2 * ceil(N / block), of which
            the second half are the same bits at that threshold.
        survivor_block: tokens in a block of `survivors`.
        mean_logit: (N,) mean over the vocabulary of class weight times logit, 0 where ignored, of the compute dtype; None
            unless `Options.smooths_capped`: else it follows from e and c (`terms.py`).
        folded: (N,) results of further folds (`folds.py`) by name, 0 where ignored.
    """

    tokens: Any
    n_valid: Any
    lse: Any
    target_logit: Any  # or None
    survivors: Any  # or None
    survivor_block: int
    mean_logit: Any = None
    folded: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of the loss (vector-Jacobian products), in the shapes of the inputs; None where not asked for.

    Also names the arrays that gradients are to be written to: `out` of `linear_cross_entropy_with_grad` and `backward`.
    """

    e: Any | None = None
    c: Any | None = None
    bias: Any | None = None


class Backend(Protocol):
    """What a module must offer to be a backend. Arrays are those of `Problem`; nothing here synchronises with the host."""

    def why_not(self, p: Problem) -> str | None:
        """Why it cannot take this problem on this machine, or None if it can.

        A backend knows a `logit_scale`, and what `Options.smooths_capped` asks for. All other terms of the loss are made of
        what it gives (`terms.py`).
        """

    def plan(self, p: Problem) -> Plan:
        """Tiles and memory for this problem."""

    def indexed_dot(self, p: Problem, plan: Plan) -> Any:
        """(N,) the target's logit per token, as `Statistics.target_logit`."""

    def forward(self, p: Problem, plan: Plan, *, record_survivors: bool) -> Statistics:
        """Log-sum-exp and target logit per token; with `record_survivors`, also what the backward must look at.

        A column survives in a block if a token of the block has it as its target, or may give it a probability of at
        least `filter_eps`; "may", since the rule compares with a lower bound of the final log-sum-exp. NaN survives.
        Also the mean logit, if the problem `smooths_capped`.
        """

    def reduced_nll(self, p: Problem, statistics: Statistics) -> Any:
        """0-d, of the compute dtype: sum or mean (as the options say) of lse - target_logit over the tokens that count.

        The sum of none is 0, the mean of none is nan. It is the loss where this has no other terms and no weights.
        """

    def backward(
        self,
        p: Problem,
        plan: Plan,
        statistics: Statistics,
        softmax_weight: Any,
        target_weight: Any,
        uniform_weight: Any,
        into: Gradients,
        accumulate: bool,
    ) -> None:
        """Gradients from G[n, v] = softmax_weight[n] * softmax[n, v] - target_weight[n] * (v == targets[n]).

        Weights are (N,) of the compute dtype. The softcap's derivative multiplies G; that of the logit scale is in the weights.
        Tokens that do not count, or whose weights are zero, take no part. Whole loss terms are made of these weights (see
        `terms.py`).

        uniform_weight: None, unless the problem `smooths_capped`: then G[n, v] is less by uniform_weight[n] * class_weights[v]
            (1 without class weights), and nothing is filtered.

        into: e (N, D), c (V, D), bias (V,) to write, None where not wanted; each of its input's dtype or the compute dtype,
            and strided, on a device with contiguous rows. What is in there may be anything: every element is written.
        accumulate: adds to what is in there instead; the sum is of the compute dtype, and rounded at its end alone.
        """


@functools.cache
def backend_module(name: str) -> Backend:
    """The backend's module; importing it imports what it needs, so only when it is used.

    >>> backend_module("cpu").__name__
    'cce_numba.cpu.backend'
    """
    return importlib.import_module(f"cce_numba.{name}.backend")
