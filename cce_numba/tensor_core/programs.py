"""Forwards and backwards on tensor cores as programs (`launch.program`): recorded once for arrays of a form, then run again.

What a host function may read is what its key and its inputs hold. All else of a problem is withheld while it is recorded, so
that host code which comes to read more is not recorded, and runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from cce_numba import survivors
from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.launch.blank import WITHHELD, Blank
from cce_numba.launch.program import Programs

FORWARD, BACKWARD = Programs(), Programs()
OF_PROBLEM = ("e", "c", "targets", "bias", "logit_scale", "class_weights")
OF_STATISTICS = ("tokens", "n_valid", "max_logit", "log_sum", "target_logit", "survivors", "draw_seed", "kept_logits")
OF_WEIGHTS = ("softmax", "target", "uniform", "entropy")
OF_GRADIENTS = ("e", "c", "bias")


def clear() -> None:
    """Forgets all programs, for whoever changes a constant that host functions read."""
    FORWARD.clear()
    BACKWARD.clear()


def forward(p: Problem, plan: Any, record: bool, kept_tiles: int, function: Callable[[Problem], Statistics]) -> Statistics:
    """`function(p)`, the launches of a forward, or the program of it.

    plan: of the problem; of equal ones always the same object. record, kept_tiles: what else the function was made of.
    """
    if p.N == 0 or p.shard is not None:
        return function(p)

    def recorded(*inputs: Any) -> Statistics:
        *arrays, seed = inputs
        return function(_problem(p, arrays, seed))

    arrays, key = _of(p, OF_PROBLEM), (plan, p.options, p.has_loss, record, kept_tiles)
    if isinstance(p.filter_seed, int):
        return FORWARD.run(key, arrays, recorded, (p.filter_seed,))
    return FORWARD.run(key, [*arrays, p.filter_seed], recorded)


def backward(
    p: Problem,
    plan: Any,
    statistics: Statistics,
    weights: Weights,
    into: Gradients,
    adds: bool,
    function: Callable[[Problem, Statistics, Weights, Gradients, bool], None],
) -> None:
    """`function(p, statistics, weights, into, adds)`, the launches of a backward, or the program of it.

    The function leaves `Weights.outer` alone: it was written before.
    """
    if p.shard is not None:
        function(p, statistics, weights, into, adds)
        return
    parts = _of(p, OF_PROBLEM), _of(statistics, OF_STATISTICS), _of(weights, OF_WEIGHTS), _of(into, OF_GRADIENTS)

    def recorded(*arrays: Any) -> None:
        of_problem, *others = _parted(arrays, parts)
        if not isinstance(of_problem[0], Blank):
            function(p, statistics, weights, into, adds)
            return
        found, weighted, gradients = others
        function(
            _problem(p, of_problem, WITHHELD),
            _with_others_withheld(statistics, OF_STATISTICS, found, survivor_block=statistics.survivor_block),
            _with_others_withheld(weights, OF_WEIGHTS, weighted),
            Gradients(*gradients),
            adds,
        )

    inputs = [array for part in parts for array in part]
    key = plan, p.options, p.has_loss, adds, statistics.survivor_block, survivors.DENSE_SHARE
    BACKWARD.run(key, inputs, recorded)


@dataclass(frozen=True)
class _ProblemOnBlanks(Problem):
    """A problem whose arrays are blanks, which have a library of their own."""

    @property
    def xp(self) -> Any:
        """What stands for CuPy."""
        return self.e.library


def _problem(p: Problem, arrays: Sequence[Any], seed: Any) -> Problem:
    """The problem with these arrays in the place of `OF_PROBLEM`."""
    if not isinstance(arrays[0], Blank):
        return p
    known = {"filter_seed": seed, "options": p.options, "has_loss": p.has_loss, "shard": None}
    names = [field.name for field in fields(Problem)]
    return _ProblemOnBlanks(**dict.fromkeys(names, WITHHELD) | known | dict(zip(OF_PROBLEM, arrays, strict=True)))


def _with_others_withheld(record: Any, names: tuple[str, ...], arrays: Sequence[Any], **known: Any) -> Any:
    """The dataclass with these arrays by name, what is known, and nothing else."""
    every = dict.fromkeys([field.name for field in fields(record)], WITHHELD)
    return type(record)(**every | dict(zip(names, arrays, strict=True)) | known)


def _of(record: Any, names: tuple[str, ...]) -> list[Any]:
    return [getattr(record, name) for name in names]


def _parted(values: tuple[Any, ...], parts: tuple[list[Any], ...]) -> list[tuple[Any, ...]]:
    """The values, cut as the parts are."""
    cut, start = [], 0
    for part in parts:
        cut.append(values[start : start + len(part)])
        start += len(part)
    return cut
