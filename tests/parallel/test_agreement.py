"""Ranks that disagree raise an error that names rank and argument, all of them, where they would wait for each other."""

from __future__ import annotations

import re

import numpy as np
import pytest

import cce_numba as cce
from cce_numba.parallel import Disagreement
from tests.helpers.ranks import on_ranks

N, V, D = 12, 20, 4
RNG = np.random.default_rng(0)
E, C, TARGETS = RNG.normal(size=(N, D)), RNG.normal(size=(V, D)), RNG.integers(0, V, N)


def errors_of(changed, size=3, odd=1):
    """What each rank raises if rank `odd` is called with `changed` arguments."""

    def run(one):
        options = {"e": E, "c": C, "targets": TARGETS} | (changed if one.rank == odd else {})
        try:
            cce.linear_cross_entropy(options.pop("e"), options.pop("c"), options.pop("targets"), communicator=one, **options)
        except (TypeError, ValueError) as error:  # and no time-out of those who wait
            return error
        return None

    return on_ranks(size, run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"e": E[:5], "targets": TARGETS[:5]},
            r"e: must be .* got 'float64 \(12, 4\)' on rank 0 and 'float64 \(5, 4\)' on rank 1",
        ),
        ({"e": E.astype("f4"), "c": C.astype("f4")}, r"e: must be the same on all ranks, got 'float64 \(12, 4\)' on rank 0"),
        ({"targets": (TARGETS + 1) % V}, r"targets: must be the same on all ranks, got 'int64 \(12,\), contents"),
        ({"softcap": 3.0}, r"softcap: must be the same on all ranks, got nothing on rank 0 and 3.0 on rank 1"),
        ({"class_weights": np.ones(3 * V)}, r"class_weights: must be .* got nothing on rank 0 and 'float64 \(60,\)' on rank 1"),
        ({"filter_seed": np.array(3)}, r"filter_seed: must be .* got nothing on rank 0 and 'a number of int64' on rank 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_all_ranks_say_who_differs_in_what(changed, message):
    for error in errors_of(changed):
        assert isinstance(error, Disagreement)
        assert re.match(message, str(error)), error


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"c": "no array"}, TypeError, "c: must be an array"),
        ({"bias": np.ones(V + 1)}, ValueError, r"bias: must have shape \(V,\) = \(20,\), got shape \(21,\)"),
    ],
)
def test_an_error_of_one_rank_is_told_to_the_others(changed, kind, message):
    """The rank itself raises its own error."""
    for rank, error in enumerate(errors_of(changed)):
        expected = kind if rank == 1 else Disagreement
        assert isinstance(error, expected)
        assert re.match(message if rank == 1 else f"rank 1: raised {kind.__name__}: {message}", str(error)), error


@pytest.mark.parametrize("changed", [{"c": C[:0]}, {"c": C[:7]}])
def test_ranks_may_have_any_number_of_rows(changed):
    assert errors_of(changed) == [None] * 3


def test_targets_out_of_range_raise_everywhere():
    wrong = np.where(np.arange(N) == 3, 3 * V, TARGETS)
    for error in errors_of({"targets": wrong}, size=1, odd=0):
        assert str(error).startswith("targets: must lie in [0, V) = [0, 20)")

    def run(one):
        with pytest.raises(ValueError, match=r"targets: must lie in \[0, V\) = \[0, 40\)"):
            cce.linear_cross_entropy(E, C, wrong, communicator=one)

    on_ranks(2, run)


def test_a_long_list_of_options_is_compared_by_checksums():
    for error in errors_of({"class_weights": np.ones(60), "backend": "cpu" * 2000}):
        assert isinstance(error, Disagreement | ValueError)


def test_tokens_axis_needs_a_communicator_and_an_axis():
    with pytest.raises(ValueError, match="tokens_axis: needs a communicator, got None"):
        cce.forward(E, C, TARGETS, tokens_axis=0)
    for axis in (1, -1, 5):
        with pytest.raises(ValueError, match=r"tokens_axis: must be an axis of e \(12, 4\) but the last"):
            on_ranks(1, lambda one, axis=axis: cce.forward(E, C, TARGETS, communicator=one, tokens_axis=axis))
