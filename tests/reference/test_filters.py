"""The filters against their definitions in loops, the law of the forward's flags, and the bound on what is lost."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reference import (
    auto_eps,
    backward,
    column_filter,
    column_flags,
    dropped_mass,
    forward,
    forward_flags,
    softmax,
    tile_filter,
)

pytestmark = pytest.mark.filterwarnings("error")

EPS = st.integers(2, 30).map(lambda k: 2.0**-k)
BLOCK = st.integers(1, 5)
FINITE = st.floats(-30, 30)


@st.composite
def rows_and_targets(draw, elements=FINITE, outside=False):
    """Logits (n, V) and targets (n,), with ragged last blocks for most block sizes."""
    n, vocabulary = draw(st.integers(0, 9)), draw(st.integers(1, 17))
    rows = draw(hnp.arrays(np.float64, (n, vocabulary), elements=elements))
    first, last = (-2, vocabulary + 1) if outside else (0, vocabulary - 1)
    return rows, draw(hnp.arrays(np.int64, n, elements=st.integers(first, last)))


def any_logits():
    return rows_and_targets(FINITE | st.sampled_from([np.nan, np.inf, -np.inf]), outside=True)


@pytest.mark.parametrize(
    ("dtype", "exponent"), [(ml_dtypes.bfloat16, -16), (np.float16, -19), (np.float32, -32), (np.float64, -61)]
)
def test_auto_eps(dtype, exponent):
    assert auto_eps(dtype, "drop") == auto_eps(np.dtype(dtype), "drop") == 2.0**exponent
    assert auto_eps(dtype) == 16 * 2.0**exponent


@settings(deadline=None)
@given(any_logits(), EPS, BLOCK)
def test_column_filter_is_its_definition(problem, eps, block_n):
    z, targets = problem
    p = softmax(z)
    flags, keep = column_flags(p, targets, eps, block_n), column_filter(p, targets, eps, block_n)
    n, vocabulary = p.shape
    assert flags.shape == (-(-n // block_n), vocabulary)
    assert keep.shape == p.shape
    for i in range(n):
        for v in range(vocabulary):
            block = range(i // block_n * block_n, min((i // block_n + 1) * block_n, n))
            survives = any(
                p[j, v] >= eps or np.isnan(p[j, v]) or targets[j] == v or not 0 <= targets[j] < vocabulary for j in block
            )
            assert keep[i, v] == flags[i // block_n, v] == survives


@settings(deadline=None)
@given(any_logits(), EPS, BLOCK, BLOCK)
def test_tile_filter_is_its_definition(problem, eps, block_n, block_v):
    z, targets = problem
    p = softmax(z)
    keep = tile_filter(p, targets, eps, block_n, block_v)
    assert keep.shape == p.shape
    for i, v in np.ndindex(*p.shape):
        rows = slice(i // block_n * block_n, (i // block_n + 1) * block_n)
        columns = slice(v // block_v * block_v, (v // block_v + 1) * block_v)
        hot = targets[rows, None] == np.arange(p.shape[1])[columns]
        wrong = np.isnan(p[rows, columns]).any() or (targets[rows] < 0).any() or (targets[rows] >= p.shape[1]).any()
        assert keep[i, v] == (wrong or np.abs(p[rows, columns] - hot).max() >= eps)


@settings(deadline=None)
@given(any_logits(), EPS, BLOCK, BLOCK)
def test_no_eps_keeps_all_and_more_eps_keeps_less(problem, eps, block_n, block_v):
    z, targets = problem
    p = softmax(z)
    filters = (
        lambda eps: column_filter(p, targets, eps, block_n),
        lambda eps: tile_filter(p, targets, eps, block_n, block_v),
        lambda eps: forward_flags(z, targets, eps, block_n, block_v),
    )
    for keep in filters:
        assert keep(None).all()
        assert (keep(eps / 4) >= keep(eps)).all()


@settings(deadline=None)
@given(rows_and_targets(), EPS, BLOCK)
def test_dropped_mass_is_what_is_not_kept(problem, eps, block_n):
    z, targets = problem
    p = softmax(z)
    keep = column_filter(p, targets, eps, block_n)
    kept = np.array([row[kept].sum() for row, kept in zip(p, keep, strict=True)])
    np.testing.assert_allclose(dropped_mass(p, keep), 1.0 - kept, atol=1e-14, rtol=0, equal_nan=False)
    assert (dropped_mass(p, keep) <= eps * p.shape[1]).all()
    np.testing.assert_allclose(dropped_mass(p, ~keep), kept, atol=1e-14, rtol=0, equal_nan=False)


# ---------------------------------------------------------------- the forward's flags


@settings(deadline=None)
@given(any_logits(), EPS, BLOCK, BLOCK)
def test_the_forward_never_misses_a_survivor(problem, eps, block_n, block_v):
    z, targets = problem
    exact, early = column_flags(softmax(z), targets, eps, block_n), forward_flags(z, targets, eps, block_n, block_v)
    assert early.shape == exact.shape
    assert (early >= exact).all()


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 6))
def test_ties_at_the_threshold_survive(log_v, log_block_v):
    """V equal logits have p = 1 / V = eps, give or take rounding: the hardest case for the bound."""
    z, targets, eps = np.full((1, 2**log_v), 0.1), np.array([0]), np.exp(-np.log(2.0) * log_v)
    exact, early = column_flags(softmax(z), targets, eps), forward_flags(z, targets, eps, block_v=2**log_block_v)
    assert (early >= exact).all()


def test_the_target_logit_bounds_the_first_tile():
    z = np.array([[0.0, 1.0, 2.0, 30.0]])
    assert forward_flags(z, np.array([3]), eps=1e-3, block_v=2).tolist() == [[False, False, False, True]]
    assert forward_flags(z, np.array([0]), eps=1e-3, block_v=2).tolist() == [[True, True, True, True]]


def test_the_tiles_so_far_bound_the_next():
    z = np.array([[30.0, 1.0, 2.0, 0.0]])
    assert forward_flags(z, np.array([3]), eps=1e-3, block_v=2).tolist() == [[True, True, False, True]]
    assert forward_flags(z, np.array([3]), eps=1e-3, block_v=1).tolist() == [[True, False, False, True]]


def test_flags_are_per_block():
    z = np.array([[30.0, 0.0, 0.0], [30.0, 0.0, 0.0], [0.0, 30.0, 0.0]])
    early = forward_flags(z, np.array([0, 0, 1]), eps=1e-3, block_n=2, block_v=3)
    assert early.tolist() == [[True, False, False], [False, True, False]]


@pytest.mark.parametrize("position", [0, 4])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_wrong_stays_visible(poison, position):
    z = np.array([[0.0, 30.0, 0.0, 0.0, 0.0], [30.0, 0.0, 0.0, 0.0, 0.0]])
    z[0, position] = poison
    early = forward_flags(z, np.array([1, 0]), eps=1e-3, block_n=1, block_v=2)
    assert early.tolist() == [[True] * 5, [True, False, False, False, False]]


# ---------------------------------------------------------------- what filtering costs


@settings(deadline=None)
@given(st.integers(0, 2**32), EPS, st.sampled_from([1, 4, 128]), st.sampled_from([None, 8.0]), st.booleans())
def test_the_dropped_mass_bounds_the_error_of_d_e(seed, eps, block_n, softcap, early):
    """Each dropped entry of G is at most |a_n| p, times a row of c. Targets are never dropped."""
    rng = np.random.default_rng(seed)
    n, vocabulary, hidden = 11, 40, 6
    e, c = 3.0 * rng.normal(size=(n, hidden)), rng.normal(size=(vocabulary, hidden))
    targets, d_loss, d_lse = rng.integers(0, vocabulary, n), rng.normal(size=n), rng.normal(size=n)
    z = forward(e, c, targets, softcap=softcap).logits
    if early:
        keep = np.repeat(forward_flags(z, targets, eps, block_n, block_v=16), block_n, axis=0)[:n]
    else:
        keep = column_filter(softmax(z), targets, eps, block_n)
    options = {"softcap": softcap, "reduction": "none", "d_loss": d_loss, "d_lse": d_lse}
    exact, filtered = backward(e, c, targets, **options), backward(e, c, targets, keep_e=keep, **options)

    error = np.linalg.norm(filtered.e - exact.e, axis=-1)
    bound = np.abs(d_loss + d_lse) * dropped_mass(softmax(z), keep) * np.linalg.norm(c, axis=-1).max()
    assert (error <= bound + 1e-13 * np.linalg.norm(exact.e)).all()
    np.testing.assert_allclose(filtered.c, exact.c, rtol=1e-12, atol=1e-13, equal_nan=False)  # keep_e is not keep_c


def test_the_bound_is_not_empty():
    """One column holds all that is dropped and the longest row of c: the bound is reached."""
    e, c = np.array([[1.0]]), np.array([[5.0], [-6.0]])
    targets = np.array([0])
    p = softmax(forward(e, c, targets).logits)
    keep = column_filter(p, targets, eps=1e-3)
    assert keep.tolist() == [[True, False]]
    error = np.abs(backward(e, c, targets, keep_e=keep).e - backward(e, c, targets).e)
    np.testing.assert_allclose(error[0], dropped_mass(p, keep) * 6.0, rtol=1e-12, equal_nan=False)
    assert error > 0


def test_columns_drop_more_than_tiles():
    """Why columns: one probable entry keeps its tile whole, but only its own column."""
    rng = np.random.default_rng(0)
    p = softmax(4.0 * rng.normal(size=(64, 512)))
    targets = rng.integers(0, 512, 64)
    columns = column_filter(p, targets, eps=2.0**-8, block_n=16)
    tiles = tile_filter(p, targets, eps=2.0**-8, block_n=16, block_v=64)
    assert tiles.mean() > 2 * columns.mean() > 0
    assert (tiles >= (p >= 2.0**-8) * (np.arange(512) != targets[:, None])).all()
