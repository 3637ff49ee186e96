"""The merge law of the online log-sum-exp, and that every order of folding gives the log-sum-exp."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reference import logsumexp, merge, online_logsumexp, to_lse
from reference.online import IDENTITY, fold

pytestmark = pytest.mark.filterwarnings("error")

# Logits far enough apart to underflow, equal ones, and masked ones (-inf).
LOGITS = st.floats(-1e3, 1e3) | st.integers(-3, 3).map(float) | st.just(-np.inf)
ROWS = hnp.arrays(np.float64, st.tuples(st.integers(0, 4), st.integers(1, 20)), elements=LOGITS)

# States that some logits can lead to: nothing but -inf, or a finite largest logit, which itself adds 1 to the sum.
STATES = st.just(IDENTITY) | st.tuples(st.floats(-1e3, 1e3), st.floats(1.0, 1e6))


def assert_close(actual, expected, rtol=1e-13):
    """Numbers relative to 1 + size, infinities exactly; NaN fails."""
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol, equal_nan=False)


def as_arrays(*states):
    return [(np.array([m]), np.array([s])) for m, s in states]


@settings(deadline=None)
@given(STATES, STATES, STATES)
def test_merge_is_associative_and_commutative(x, y, z):
    x, y, z = as_arrays(x, y, z)
    assert_close(merge(merge(x, y), z), merge(x, merge(y, z)))
    assert_close(merge(x, y), merge(y, x), rtol=0)


@settings(deadline=None)
@given(STATES)
def test_identity(x):
    x, identity = as_arrays(x, IDENTITY)
    assert_close(merge(x, identity), x, rtol=0)
    assert_close(merge(identity, x), x, rtol=0)


@settings(deadline=None)
@given(STATES, STATES)
def test_merge_adds_the_sums_of_exponentials(x, y):
    x, y = as_arrays(x, y)
    assert_close(to_lse(*merge(x, y)), np.logaddexp(to_lse(*x), to_lse(*y)))


@settings(deadline=None)
@given(ROWS, st.data())
def test_folding_pieces_is_folding_the_whole(rows, data):
    cut = data.draw(st.integers(1, rows.shape[1]))
    pieces = fold(IDENTITY, rows[:, :cut])
    if cut < rows.shape[1]:
        pieces = fold(pieces, rows[:, cut:])
    assert_close(pieces, fold(IDENTITY, rows))


@settings(deadline=None)
@given(ROWS, st.integers(1, 21), st.integers(1, 6))
def test_every_tiling_gives_the_logsumexp(rows, block_v, splits):
    assert_close(online_logsumexp(rows, block_v, splits), logsumexp(rows))


@pytest.mark.parametrize("block_v", [1, 3, 4, 5, 12, 13])  # around 4, the width of the rows below, and past the end
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 99])
def test_every_column_is_folded_once(block_v, splits):
    """exp(z) = 2^v: the sum shows which columns were skipped or seen twice."""
    rows = np.log(2.0) * np.arange(12.0)[None]
    sums = np.exp(online_logsumexp(rows, block_v, splits))
    assert_close(sums, [2.0**12 - 1])


@pytest.mark.parametrize("position", [0, 4, 9])
@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_poison_makes_its_row_nan_wherever_it_stands(poison, position):
    rows = np.zeros((2, 10))
    rows[0, position] = poison
    for block_v in (1, 3, 10):
        lse = online_logsumexp(rows, block_v, splits=2)
        assert np.isnan(lse[0])
        assert_close(lse[1], np.log(10.0))


def test_scale_of_the_logits_does_not_overflow():
    rows = np.array([[1e308, -1e308, 1e308], [-1e308, -1e308, -np.inf]])
    assert_close(online_logsumexp(rows, block_v=1), rows[:, 0])
