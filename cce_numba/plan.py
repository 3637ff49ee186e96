"""Which backend runs a problem, with what tiles and memory, and why: decided before anything is launched."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from cce_numba.arguments import Problem

# In order of preference. A backend is a module cce_numba.<name>.backend with the functions of `Backend`.
BACKENDS = ("hopper", "simt", "cpu")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for, or every backend, cannot take this problem on this machine."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What will run: the backend, its tiles, and the bytes that it takes beyond inputs and gradients.

    Attributes:
        backend: name of the backend.
        how: one line on how it will run.
        tiles: the backend's own tile sizes, a frozen dataclass.
        forward_bytes: workspace of the forward.
        survivor_bytes: survivor bits, kept from the forward to the backward.
        backward_bytes: workspace of the backward.
        stored_logits_bytes: what the logits would take if they were stored once, for comparison.
        rejected: why each backend that was preferred to this one was not taken.
        coarse_eps: a higher threshold than the filter's own, for the gradients of `c` and `bias`, or None. What they may leave
            out beyond the filter has lower probabilities, in all of a block's tokens, and is none's target.
    """

    backend: str
    how: str
    tiles: Any
    forward_bytes: int
    survivor_bytes: int
    backward_bytes: int
    stored_logits_bytes: int
    rejected: dict[str, str] = field(default_factory=dict)
    coarse_eps: float | None = None

    def __str__(self) -> str:
        lines = [f"backend {self.backend}: {self.how}", f"  tiles: {self.tiles}"]
        lines += [f"  {name}: {_mebibytes(size)}" for name, size in self.memory().items()]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)

    def memory(self) -> dict[str, int]:
        """Bytes by purpose, for tables."""
        return {
            "forward workspace": self.forward_bytes,
            "survivor bits": self.survivor_bytes,
            "backward workspace": self.backward_bytes,
            "stored logits would take": self.stored_logits_bytes,
        }


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
    """

    tokens: Any
    n_valid: Any
    lse: Any
    target_logit: Any  # or None
    survivors: Any  # or None
    survivor_block: int
    mean_logit: Any = None


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


def choose(p: Problem, backend: str | None) -> Plan:
    """The plan of the forced backend, or of the first in `BACKENDS` that can take the problem.

    Raises ValueError for a name that is none, BackendUnavailable if the forced one (or every one) cannot.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    rejected: dict[str, str] = {}
    for name in (backend,) if backend else BACKENDS:
        module = backend_module(name)
        reason = module.why_not(p)
        if reason is None:
            plan = module.plan(p)
            if p.options.smooths_capped:
                plan = replace(plan, how=f"{plan.how}; nothing is filtered, since labels are smoothed under a softcap")
            return replace(plan, rejected=rejected) if rejected else plan
        rejected[name] = reason
    if backend:
        raise BackendUnavailable(f"backend: {backend!r} cannot run this: {rejected[backend]}")
    raise BackendUnavailable("no backend can run this:\n" + "\n".join(f"  {name}: {why}" for name, why in rejected.items()))


def survivor_bytes(p: Problem, block: int) -> int:
    """Bytes of the survivor bits: one bit per block of tokens and vocabulary entry."""
    return ceil_div(p.N, block) * ceil_div(p.V, 8)


def unpack_survivors(statistics: Statistics, V: int) -> np.ndarray:
    """(ceil(n_valid / block), V) bool on the host, from the packed bits. Waits for the device, if there is one."""
    bits = statistics.survivors[: ceil_div(int(statistics.n_valid), statistics.survivor_block)]
    host = bits if isinstance(bits, np.ndarray) else bits.get()
    return np.unpackbits(host, axis=1, bitorder="little")[:, :V].astype(bool)


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
