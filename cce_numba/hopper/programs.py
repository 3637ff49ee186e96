"""The forward and the backward as programs (`launch.program`): recorded once for arrays of a form, and then run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from cce_numba.arguments import Problem
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.hopper.backward import host as backward_host
from cce_numba.hopper.forward import host as forward_host
from cce_numba.launch.blank import Blank
from cce_numba.launch.program import Programs

FORWARD, BACKWARD = Programs(), Programs()
_OF_PROBLEM = ("e", "c", "targets", "bias", "logit_scale", "class_weights")
_OF_STATISTICS = ("tokens", "n_valid", "max_logit", "log_sum", "target_logit", "survivors", "draw_seed")
_OF_WEIGHTS = ("softmax", "target", "uniform")
_OF_GRADIENTS = ("e", "c", "bias")


def forward(p: Problem, plan: Any, record: bool) -> Statistics:
    """`forward.host.forward`."""
    if p.N == 0:
        return forward_host.forward(p, plan.layout, record)

    def recorded(*inputs: Any) -> Statistics:
        *arrays, seed = inputs
        return forward_host.forward(_problem(p, arrays, filter_seed=seed), plan.layout, record)

    arrays = _of(p, _OF_PROBLEM)
    # The plan was made for these sizes, dtype, options and device. Arrays of one dimension are contiguous.
    key = plan, record, p.e.strides, p.c.strides, _dtype(p.bias)
    if isinstance(p.filter_seed, int):
        return FORWARD.run(key, arrays, recorded, (p.filter_seed,))
    return FORWARD.run(key, [*arrays, p.filter_seed], recorded)


def backward(p: Problem, plan: Any, statistics: Statistics, weights: Weights, into: Gradients, adds: bool) -> None:
    """`backward.host.backward`."""
    parts = _of(p, _OF_PROBLEM), _of(statistics, _OF_STATISTICS), _of(weights, _OF_WEIGHTS), _of(into, _OF_GRADIENTS)

    def recorded(*arrays: Any) -> None:
        problem, found, weighted, gradients = _parted(arrays, parts)
        backward_host.backward(
            _problem(p, problem),
            replace(statistics, **dict(zip(_OF_STATISTICS, found, strict=True))),
            Weights(*weighted),
            Gradients(*gradients),
            adds,
        )

    inputs = [array for part in parts for array in part]
    strides = p.e.strides, p.c.strides, _strides(into.e), _strides(into.c), _strides(statistics.survivors)
    dtypes = _dtype(p.bias), _dtype(into.e), _dtype(into.c), _dtype(into.bias)
    BACKWARD.run((plan, adds, strides, dtypes), inputs, recorded)


@dataclass(frozen=True)
class _ProblemOnBlanks(Problem):
    """A problem whose arrays are blanks, which have a library of their own."""

    @property
    def xp(self) -> Any:
        """What stands for CuPy."""
        return self.e.library


def _problem(p: Problem, arrays: Sequence[Any], **others: Any) -> Problem:
    """The problem with these arrays in the place of `_OF_PROBLEM`."""
    named = dict(zip(_OF_PROBLEM, arrays, strict=True))
    if not isinstance(named["e"], Blank):
        return p
    kept = {field.name: getattr(p, field.name) for field in fields(Problem)}
    return _ProblemOnBlanks(**{**kept, **named, **others})


def _of(record: Any, names: tuple[str, ...]) -> list[Any]:
    return [getattr(record, name) for name in names]


def _parted(values: tuple[Any, ...], parts: tuple[list[Any], ...]) -> list[tuple[Any, ...]]:
    """The values, cut as the parts are."""
    cut, start = [], 0
    for part in parts:
        cut.append(values[start : start + len(part)])
        start += len(part)
    return cut


def _strides(array: Any) -> Any:
    return None if array is None else array.strides


def _dtype(array: Any) -> Any:
    return None if array is None else array.dtype
