"""What ranks tell each other while they go forward: a bound that is never above the log-sum-exp of all."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cce_numba.parallel.bounds import HEAD, Bounds, phase_of_exchange
from tests.helpers.ranks import on_ranks

NUMBERS = st.floats(-80, 80) | st.sampled_from([-np.inf, np.nan])


@given(st.lists(st.tuples(NUMBERS, NUMBERS | st.none()), min_size=1, max_size=3))
def test_it_is_the_largest_bound_or_the_log_sum_exp_of_what_was_seen(of_ranks):
    def run(one):
        bound, lse = of_ranks[one.rank]
        return Bounds(one).of_all(np.array([bound, 0.0]), None if lse is None else np.array([lse, 0.0]))

    seen = np.array([-np.inf if lse is None else lse for _, lse in of_ranks])
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.maximum(np.max([bound for bound, _ in of_ranks]), np.logaddexp.reduce(seen))
    for found in on_ranks(len(of_ranks), run):
        np.testing.assert_allclose(found[0], expected, rtol=1e-12, atol=1e-12)  # a log near 0 has digits of 1


@given(st.integers(1, 300), st.lists(st.integers(1, 299), unique=True, max_size=6))
def test_the_exchange_is_once_and_early(tiles, cuts):
    first_tiles = [0, *sorted(cut for cut in cuts if cut < tiles)]
    phase = phase_of_exchange(first_tiles, tiles)
    assert first_tiles[phase] <= -(-tiles // HEAD)
    assert phase == len(first_tiles) - 1 or first_tiles[phase + 1] > tiles // HEAD
