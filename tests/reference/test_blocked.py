"""The kernels' loop order against the dense reference, over ragged shapes, and the work it does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import backward, blocked, column_flags, forward, forward_flags, softmax

pytestmark = pytest.mark.filterwarnings("error")


@st.composite
def problems(draw):
    """Inputs, and block sizes that leave ragged last blocks in all of N, V and D."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, vocabulary, hidden = draw(st.integers(0, 13)), draw(st.integers(1, 40)), draw(st.integers(0, 9))
    e, c = 2.0 * rng.normal(size=(n, hidden)), rng.normal(size=(vocabulary, hidden))
    upstream = rng.normal(size=(2, n)) * (rng.random(n) < 0.8)  # to some tokens nothing flows back
    upstream[1, ::3] = -upstream[0, ::3]  # and to some only through the target logit
    options = {
        "bias": draw(st.sampled_from([None, rng.normal(size=vocabulary)])),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }
    block_n, block_v, block_d = draw(st.tuples(*[st.integers(1, 9)] * 3))
    eps, chunk_v = draw(st.sampled_from([None, 0.0, 2.0**-4, 2.0**-8])), draw(st.integers(1, 41))
    inputs = e, c, rng.integers(0, vocabulary, n)
    return inputs, upstream, options, eps, {"block_n": block_n, "block_d": block_d}, block_v, chunk_v


def assert_close(actual, expected, tol=1e-12):
    """Error relative to the largest expected entry, and where all of it cancels, to 1: NaN and zeros fail."""
    assert actual.shape == expected.shape
    if expected.size:
        assert np.max(np.abs(actual - expected)) <= tol * np.max(np.abs(expected)) + 1e-14


@settings(deadline=None)
@given(problems())
def test_forward_is_the_dense_forward(problem):
    (e, c, targets), _, options, eps, sizes, block_v, _ = problem
    lse, target_logit, flags = blocked.forward(e, c, targets, eps=eps, block_v=block_v, **sizes, **options)
    dense = forward(e, c, targets, **options)
    assert_close(lse, dense.lse)
    assert_close(target_logit, dense.target_logit)
    np.testing.assert_array_equal(flags, forward_flags(dense.logits, targets, eps, sizes["block_n"], block_v))
    assert (flags >= column_flags(softmax(dense.logits), targets, eps, sizes["block_n"])).all()


@settings(deadline=None)
@given(problems())
def test_backward_is_the_dense_backward_of_the_survivors(problem):
    (e, c, targets), (d_nll, d_lse), options, eps, sizes, block_v, chunk_v = problem
    lse, _, flags = blocked.forward(e, c, targets, eps=eps, block_v=block_v, **sizes, **options)
    grads = blocked.backward(e, c, targets, lse, flags, d_nll, d_lse, chunk_v=chunk_v, **sizes, **options)
    keep = None if eps is None else np.repeat(flags, sizes["block_n"], axis=0)[: len(e)]
    upstream = {"d_loss": d_nll, "d_lse": d_lse, "reduction": "none"}
    dense = backward(e, c, targets, keep_e=keep, keep_c=keep, **upstream, **options)
    assert_close(grads.e, dense.e)
    assert_close(grads.c, dense.c)
    assert (grads.bias is None) == (options["bias"] is None)
    if grads.bias is not None:
        assert_close(grads.bias, dense.bias)


def small_problem(n=7, vocabulary=21, hidden=5):
    rng = np.random.default_rng(0)
    e, c = 3.0 * rng.normal(size=(n, hidden)), rng.normal(size=(vocabulary, hidden))
    return e, c, rng.integers(0, vocabulary, n), np.ones(n), np.zeros(n)


@pytest.mark.parametrize("poison", [np.nan, np.inf, "target"])
def test_what_is_wrong_with_a_token_stays_its_own(poison):
    e, c, targets, d_nll, d_lse = small_problem()
    clean_lse, _, clean_flags = blocked.forward(e, c, targets, eps=2.0**-8)
    clean = blocked.backward(e, c, targets, clean_lse, clean_flags, d_nll, d_lse)
    if poison == "target":
        targets[5] = len(c)
    else:
        e[5, 0] = poison
    lse, target_logit, flags = blocked.forward(e, c, targets, eps=2.0**-8)
    grads = blocked.backward(e, c, targets, lse, flags, d_nll, d_lse)
    assert flags.shape == (2, len(c))
    assert flags[1].all()  # the block of token 5 keeps everything
    np.testing.assert_array_equal(flags[0], clean_flags[0])
    assert np.isnan(target_logit[5]) or poison is np.inf
    assert np.isnan(lse[5] - target_logit[5])
    assert np.isnan(grads.e[5]).all()
    assert np.isnan(grads.c).all()
    assert_close(lse[[0, 1, 2, 3, 4, 6]], clean_lse[[0, 1, 2, 3, 4, 6]])
    assert_close(grads.e[:4], clean.e[:4])
    dense = forward(e, c, targets)
    np.testing.assert_array_equal(flags, forward_flags(dense.logits, targets, 2.0**-8, block_n=4, block_v=8))
    d_nll[5] = 0.0  # nothing flows back: it takes no part, whatever is wrong with it
    part = np.arange(7) != 5
    grads = blocked.backward(e, c, targets, lse, np.ones_like(flags), d_nll, d_lse)
    assert_close(grads.c, backward(e[part], c, targets[part], reduction="sum").c)
    assert not grads.e[5].any()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_last_column_keeps_what_came_before_it(poison):
    """Every lse is NaN, and the tiles that were folded before it was must be looked at again."""
    e, c, targets, d_nll, d_lse = small_problem()
    bias = np.zeros(len(c))
    bias[-1] = poison
    lse, _, flags = blocked.forward(e, c, targets, bias=bias, eps=2.0**-4)
    assert np.isnan(lse).all()
    assert flags.all()
    assert np.isnan(blocked.backward(e, c, targets, lse, flags, d_nll, d_lse, bias=bias).c).all()


def test_rows_of_d_c_without_survivors_are_zero():
    e, c, targets, d_nll, d_lse = small_problem()
    lse, _, flags = blocked.forward(10 * e, c, targets, eps=2.0**-4, block_n=7)
    grads = blocked.backward(10 * e, c, targets, lse, flags, d_nll, d_lse, block_n=7)
    assert 0 < flags.sum() < flags.size
    assert not grads.c[~flags[0]].any()
    assert grads.c[flags[0]].any()


def test_tiles_are_small_and_only_survivors_are_computed_again(monkeypatch):
    """The point of it all: no tile is larger than promised, and the backward's work is the survivors."""
    e, c, targets, d_nll, d_lse = small_problem()
    d_nll[3] = 0.0
    tiles, logits_tile = [], blocked.logits_tile

    def recorded(e, c, *args):
        tiles.append((len(e), len(c)))
        return logits_tile(e, c, *args)

    monkeypatch.setattr(blocked, "logits_tile", recorded)
    lse, _, flags = blocked.forward(e, c, targets, eps=2.0**-4, block_n=4, block_v=8)
    assert tiles == [(4, 8), (4, 8), (4, 5), (3, 8), (3, 8), (3, 5)]
    tiles.clear()
    blocked.backward(e, c, targets, lse, flags, d_nll, d_lse, block_n=4, chunk_v=10)
    assert max(rows for rows, _ in tiles) <= 4
    assert max(columns for _, columns in tiles) <= 10
    assert sum(rows * columns for rows, columns in tiles) == flags[0].sum() * 3 + flags[1].sum() * 3 < 6 * 21
