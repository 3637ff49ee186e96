"""The unbiased filter against its definition in loops; its draws; that gradients are right on average, and what breaks that."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reference import backward, blocked, draw_seed, draws, forward, forward_flags, of_tokens, roulette, softmax
from reference.roulette import mixed

pytestmark = pytest.mark.filterwarnings("error")

EPS = st.integers(1, 12).map(lambda k: 2.0**-k)
BLOCK = st.integers(1, 5)


@st.composite
def problems(draw):
    """Probabilities (n, V), some of lost tokens; targets, some out of range; which tokens take part."""
    n, vocabulary = draw(st.integers(0, 9)), draw(st.integers(1, 17))
    z = draw(hnp.arrays(np.float64, (n, vocabulary), elements=st.floats(-9, 9) | st.sampled_from([np.nan, -np.inf])))
    targets = draw(hnp.arrays(np.int64, n, elements=st.integers(-1, vocabulary)))
    return softmax(z), targets, draw(hnp.arrays(bool, n))


@settings(deadline=None)
@given(problems(), EPS, BLOCK, st.integers(0, 99), st.booleans())
def test_it_is_its_definition(problem, eps, block_n, seed, all_take_part):
    p, targets, part = problem
    n, vocabulary = p.shape
    part = np.ones(n, bool) if all_take_part else part
    u = draws(-(-n // block_n), vocabulary, seed)
    scales = roulette(p, targets, eps, u, block_n, None if all_take_part else part)
    assert scales.shape == u.shape
    for b, v in np.ndindex(*scales.shape):
        tokens = [i for i in range(b * block_n, min(b * block_n + block_n, n)) if part[i]]
        largest = max([p[i, v] for i in tokens], default=0.0)
        lost = any(np.isnan(p[i]).any() or not 0 <= targets[i] < vocabulary for i in tokens)
        if lost or v in targets[tokens] or largest >= eps:
            assert scales[b, v] == 1
        elif largest > eps * u[b, v]:
            assert scales[b, v] == eps / largest > 1
        else:
            assert scales[b, v] == 0
    assert of_tokens(scales, n, block_n).shape == p.shape
    assert (roulette(p, targets, None, u, block_n) == 1).all()


# ---------------------------------------------------------------- draws


@given(st.integers(-(2**63), 2**63 - 1))
def test_the_hash_of_an_integer_is_that_of_its_lower_bits(x):
    """In Python's integers, of any length."""
    word = x % 2**32
    word = (word ^ word >> 16) * 0x21F0AAAD % 2**32
    word = (word ^ word >> 15) * 0x735A2D97 % 2**32
    assert int(mixed(x)) == word ^ word >> 15


def test_each_bit_changes_every_bit():
    x = np.random.default_rng(0).integers(0, 2**32, 20_000)
    flips = np.array([[((mixed(x) ^ mixed(x ^ 1 << i)) >> j & 1).mean() for j in range(32)] for i in range(32)])
    assert np.abs(flips - 0.5).max() < 0.03


def test_draws_are_uniform_over_entries_blocks_and_seeds():
    """Each may be what an average is taken over. Bounds are 5 standard deviations of as many independent draws."""
    cells, count = 16, 4096
    over = {
        "entries": draws(1, count, seed=1)[0],
        "blocks": draws(count, 1, seed=1)[:, 0],
        "seeds": np.array([draws(1, 5, draw_seed(np.array([3, 1, 4]), k))[0, 4] for k in range(count)]),
        "inputs": np.array([draws(1, 5, draw_seed(np.array([k, 1, 4])))[0, 4] for k in range(count)]),
    }
    for name, u in over.items():
        assert 0 < u.min() < u.max() < 1
        assert np.array_equal(u, u.astype(np.float32)), "float32 holds them"
        found = np.histogram(u, bins=cells, range=(0, 1))[0]
        assert np.abs(found - count / cells).max() <= 5 * np.sqrt(count / cells), name


def test_draws_of_one_entry_are_spread_evenly_over_blocks():
    """Of 64 blocks it survives in a share of pmax / eps, give or take two: independent draws would be 4 off, 12 at worst."""
    u = draws(64, 1000, seed=3)
    for chance in (0.1, 0.3, 0.5, 0.9):
        assert np.abs((u < chance).sum(axis=0) - 64 * chance).max() <= 2


def test_draws_of_different_entries_and_seeds_are_independent():
    """Their correlations, which are normal with a deviation of 1 / sqrt(count) if nothing is wrong."""
    count = 20_000
    u = draws(1, count, seed=3)[0] - 0.5
    others = [np.roll(u, k) for k in (1, 2, 3, 8, 64, 128)] + [draws(1, count, seed)[0] - 0.5 for seed in (2, 4, 3 ^ 1 << 20)]
    others += [draws(1, count, draw_seed(np.array([1, 2]), k))[0] - 0.5 for k in range(4)]
    for other in others:
        assert abs(np.corrcoef(u, other)[0, 1]) <= 5 / np.sqrt(count)


def test_the_seed_is_of_all_targets_and_of_the_callers_number():
    targets = np.random.default_rng(0).integers(0, 1000, 50)
    seed = draw_seed(targets)
    assert seed == draw_seed(targets[::-1]) == draw_seed(targets, 2**32)
    assert 0 <= seed < 2**32
    for i in range(50):
        changed = targets.copy()
        changed[i] += 1
        assert draw_seed(changed) != seed
    assert len({draw_seed(targets, k) for k in range(-100, 100)}) == 200


# ---------------------------------------------------------------- right on average


def averaged(targets, scales_of, seeds):
    """(n_blocks, V): the mean of the scales over seeds."""
    return np.mean([scales_of(draw_seed(targets, k)) for k in range(seeds)], axis=0)


@pytest.mark.parametrize("block_n", [4, 16])
def test_the_mean_scale_is_one(block_n):
    """So every gradient is right on average. A scale eps / pmax with chance pmax / eps has the variance eps / pmax - 1."""
    rng, K, eps = np.random.default_rng(1), 4000, 2.0**-3
    p = softmax(2.0 * rng.normal(size=(16, 60)))
    targets = rng.integers(0, 60, 16)
    n_blocks = 16 // block_n
    largest = p.reshape(n_blocks, block_n, 60).max(axis=1)
    mean = averaged(targets, lambda seed: roulette(p, targets, eps, draws(n_blocks, 60, seed), block_n), K)
    variance = np.maximum(eps / largest - 1, 0)
    assert (np.abs(mean - 1) <= 5.5 * np.sqrt(variance / K) + 1e-12 + 2.0**-23 * eps / largest).all()
    assert (variance > 1).any(), "otherwise little is shown"


# ---------------------------------------------------------------- with a bound, and in the kernels' order


@settings(deadline=None)
@given(st.integers(0, 2**32), EPS, BLOCK, BLOCK)
def test_the_forward_never_misses_what_survives(seed, eps, block_n, block_v):
    rng = np.random.default_rng(seed)
    z, targets = 3.0 * rng.normal(size=(9, 17)), rng.integers(0, 17, 9)
    u = draws(-(-9 // block_n), 17, seed)
    early = forward_flags(z, targets, eps, block_n, block_v, u)
    assert (early >= (roulette(softmax(z), targets, eps, u, block_n) != 0)).all()
    assert (early >= forward_flags(z, targets, eps, block_n, block_v)).all()


@settings(deadline=None)
@given(st.integers(0, 2**32), EPS, BLOCK, st.integers(1, 9), st.sampled_from([None, 2.0]), st.booleans())
def test_the_kernels_order_gives_the_dense_gradients(seed, eps, block_n, block_v, softcap, lost):
    rng = np.random.default_rng(seed)
    e, c, targets = 2.0 * rng.normal(size=(11, 5)), rng.normal(size=(30, 5)), rng.integers(0, 30, 11)
    if lost:
        targets[4] = 30
    d_nll, d_lse = rng.normal(size=(2, 11)) * (rng.random(11) < 0.8)
    u, sizes = draws(-(-11 // block_n), 30, draw_seed(targets)), {"softcap": softcap, "block_n": block_n}
    lse, _, flags = blocked.forward(e, c, targets, eps=eps, draws=u, block_v=block_v, **sizes)
    grads = blocked.backward(e, c, targets, lse, flags, d_nll, d_lse, eps=eps, draws=u, **sizes)
    p, part = softmax(forward(e, c, targets, softcap=softcap).logits), (d_nll != 0) | (d_lse != 0)
    scales = of_tokens(roulette(p, targets, eps, u, block_n, part), 11, block_n)
    upstream = {"d_loss": d_nll, "d_lse": d_lse, "reduction": "none"}
    dense = backward(e, c, targets, keep_e=scales, keep_c=scales, softcap=softcap, **upstream)
    for ours, theirs in ((grads.e, dense.e), (grads.c, dense.c)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12 * np.nanmax(np.abs(theirs), initial=1))


def test_errors_are_smaller_than_those_of_dropping_at_fewer_columns():
    """Why it is there. A softmax with a long tail, and rows of c that have a direction in common, as real ones have."""
    rng = np.random.default_rng(2)
    e, c = rng.normal(size=(64, 16)), rng.normal(size=(2000, 16)) + 2.0
    bias = -1.2 * np.log1p(np.arange(2000))
    targets = rng.integers(0, 100, 64)
    z = forward(e, c, targets, bias=bias).logits
    exact = backward(e, c, targets, bias=bias)
    drops = np.repeat(forward_flags(z, targets, 2.0**-9, 16, 16), 16, axis=0)
    u = draws(4, 2000, draw_seed(targets))
    scales = of_tokens(roulette(softmax(z), targets, 2.0**-7, u, 16), 64, 16)
    assert (scales != 0).mean() < drops.mean()
    errors = [
        np.linalg.norm(backward(e, c, targets, bias=bias, keep_e=keep, keep_c=keep).e - exact.e) for keep in (drops, scales)
    ]
    assert errors[1] < errors[0]
