"""The CPU's folds by themselves: what they find is right, and states of parts of the vocabulary merge to that of all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from cce_numba import arguments
from cce_numba.cpu.folds import FOLDS
from cce_numba.cpu.folds.fold import Given, Tile
from cce_numba.cpu.tiles import CpuTiles
from cce_numba.folds import ENTROPY, MAX_SUM, MEAN_LOGIT, SUM_SQUARES, SURVIVORS, TOP_K

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TILES = CpuTiles(survivor_block=4, block_n=8, block_v=8, dE_group=8)


@st.composite
def logits_of_a_problem(draw):
    """`(Given, z)`: z (n, V) float32 with infinities and NaN here and there, and whole rows of -inf."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    n, V = draw(st.integers(1, 9)), draw(st.integers(1, 40))
    z = rng.normal(size=(n, V), scale=draw(st.sampled_from([1, 30]))).astype(np.float32)
    for special, share in ((-np.inf, 0.3), (np.inf, 0.01), (np.nan, 0.01)):
        if draw(st.booleans()):
            z[rng.random(z.shape) < share] = special
    if draw(st.booleans()):
        z[rng.integers(n)] = -np.inf
    targets = rng.integers(0, V, n)
    options = {"class_weights": rng.uniform(0, 2, V) * (rng.random(V) < 0.8), "filter_eps": 2.0**-4, "top_k": min(V, 6)}
    p = arguments.problem(np.ones((n, 2), np.float32), np.ones((V, 2), np.float32), targets, options)
    return Given(p, TILES, np.arange(n), z[np.arange(n), targets]), z


def folded(names, given_, z, v0=0):
    """The states after all tiles of z, whose first column is the entry v0."""
    folds = [FOLDS[name] for name in names]
    states = [fold.begin(given_) for fold in folds]
    for first in range(0, z.shape[1], 8):
        for row in range(0, len(z), TILES.survivor_block):
            tile = z[row : row + TILES.survivor_block, first : first + 8]
            rows, columns = slice(row, row + len(tile)), slice(v0 + first, v0 + first + tile.shape[1])
            for fold, state in zip(folds, states, strict=True):
                fold.step(state, states[0], Tile(np.ascontiguousarray(tile), rows, columns))
    return states


def stored(names, given_, states):
    results = {}
    for name, state in zip(names, states, strict=True):
        results |= FOLDS[name].store(state, states[0], given_)
    return results


@given(problem=logits_of_a_problem(), split=st.integers(0, 5))
def test_states_of_two_parts_merge_to_that_of_all(problem, split):
    given_, z = problem
    names, middle = (MAX_SUM, MEAN_LOGIT), min(8 * split, z.shape[1])
    whole = stored(names, given_, folded(names, given_, z))
    parts = folded(names, given_, z[:, :middle]), folded(names, given_, z[:, middle:], v0=middle)
    merged = [FOLDS[name].merge(*states) for name, *states in zip(names, *parts, strict=True)]
    merged = stored(names, given_, merged)
    for name in ("lse", "mean_logit"):
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-6, atol=1e-6)


@given(problem=logits_of_a_problem())
def test_they_find_what_stored_logits_say(problem):
    given_, z = problem
    names = MAX_SUM, MEAN_LOGIT
    results, wide = stored(names, given_, folded(names, given_, z)), z.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    exact = (top + np.log(np.exp(wide - np.where(np.isinf(top), 0, top)).sum(axis=1, keepdims=True)))[:, 0]
    exact[np.isposinf(wide).any(axis=1)] = np.nan
    exact[np.isneginf(wide).all(axis=1)] = -np.inf
    np.testing.assert_allclose(results["lse"], exact, rtol=1e-5, atol=1e-5)
    exact = (wide * given_.problem.class_weights).sum(axis=1) / z.shape[1]
    np.testing.assert_allclose(results["mean_logit"], exact, rtol=1e-5, atol=1e-5)


@given(problem=logits_of_a_problem(), split=st.integers(0, 5))
def test_survivors_of_two_parts_merge_to_a_superset_of_what_must_survive(problem, split):
    """Each part knows less of the log-sum-exp than both together, so it keeps no less."""
    given_, z = problem
    names, middle = (MAX_SUM, SURVIVORS), min(8 * split, z.shape[1])
    parts = folded(names, given_, z[:, :middle]), folded(names, given_, z[:, middle:], v0=middle)
    largest, survivors = (FOLDS[name].merge(*states) for name, *states in zip(names, *parts, strict=True))
    bits = FOLDS[SURVIVORS].store(survivors, largest, given_)["survivors"]
    if bits is None:
        return  # nearly all survive, and so all do
    kept = np.unpackbits(bits, axis=1, bitorder="little")[:, : z.shape[1]].astype(bool).repeat(4, axis=0)[: len(z)]
    softmax = np.exp(z - largest.log_sum_exp()[:, None])
    must = (softmax >= 2.0**-4) | np.isnan(softmax)
    must[np.arange(len(z)), given_.problem.targets] = True
    assert kept[must].all()


@given(problem=logits_of_a_problem(), split=st.integers(0, 5))
def test_what_is_said_of_a_distribution(problem, split):
    """Of all tiles in turn, and of two parts that are merged; equal logits too."""
    given_, z = problem
    z[:, 1:] = np.where(np.arange(1, z.shape[1]) % 3 == 0, z[:, :-1], z[:, 1:])  # neighbours, some in different tiles
    names, middle = (MAX_SUM, ENTROPY, SUM_SQUARES, TOP_K), min(8 * split, z.shape[1])
    whole = stored(names, given_, folded(names, given_, z))
    parts = folded(names, given_, z[:, :middle]), folded(names, given_, z[:, middle:], v0=middle)
    merged = stored(names, given_, [FOLDS[name].merge(*states) for name, *states in zip(names, *parts, strict=True)])
    log_p = reference.log_softmax(z.astype(np.float64))
    lost = np.isnan(log_p).any(axis=1)
    entropy = -reference.entropy_terms(z.astype(np.float64)).sum(axis=1)
    best = np.argsort(-z, axis=1, kind="stable")[:, : given_.problem.options.top_k]
    for found in (whole, merged):
        np.testing.assert_allclose(found["entropy"], entropy, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["sum_squares"], (np.exp(log_p) ** 2).sum(axis=1), rtol=1e-5)
        np.testing.assert_array_equal(found["top_ids"][~lost], best[~lost])
        np.testing.assert_array_equal(found["top_logits"][~lost], np.take_along_axis(z, best, axis=1)[~lost])
        assert ((found["top_ids"] >= 0) & (found["top_ids"] < z.shape[1])).all()
