"""A small loss of large logits keeps its digits: where products are exact, an error is relative to the loss alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from tests.helpers.cases import DTYPES, Case, Edges, sizes
from tests.helpers.checks import assert_within, compute_unit
from tests.helpers.harness import Harness

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def of_logits(z: np.ndarray, targets: np.ndarray, dtype: np.dtype, **options) -> Case:
    """Logits (N, V) of integers that are exact: token n picks row n of the transposed logits. As c's rows are rows of z.T."""
    e, c = np.eye(len(z), dtype=np.float64).astype(dtype), z.T.astype(dtype)
    assert (c.astype(np.float64) == z.T).all(), "the logits are exact in this dtype"
    return Case(e, c, targets, {"filter_eps": None, "reduction": "none", **options})


def check_nll(harness: Harness, case: Case) -> np.ndarray:
    """Each token's loss is within a few units of 1 + itself; the exact probabilities, for what follows."""
    exact = reference.forward(case.e, case.c, case.targets)
    unit = compute_unit(case.e.dtype)
    result = harness.forward(case)
    found = harness.numbers(result)["nll"]
    assert_within("nll", found, exact.nll, 16 * unit * (1 + np.abs(exact.nll)))
    return reference.softmax(exact.logits)


@pytest.mark.parametrize("exponent", [0, 4, 10, 15, 24, 60])
@pytest.mark.parametrize("V", [8, 130])
def test_equal_logits_of_any_size(harness, edges, exponent, V):
    """The loss is log V, and each gradient 1 / V, however large the logits are."""
    for dtype in (edges.dtype, *edges.dtypes[:2]):
        if 2.0**exponent > float(np.finfo(np.float16).max) and dtype == np.float16:
            continue
        z = np.full((5, V), 2.0**exponent)
        case = of_logits(z, np.arange(5) % V, dtype)
        p = check_nll(harness, case)
        np.testing.assert_allclose(p, 1 / V)
        grads = harness.call("linear_cross_entropy_with_grad", case.with_options(reduction="sum", accum_c_fp32=True))[1]
        hot = np.eye(V)[case.targets]
        # dC[v] = sum over n of G[n, v] * e[n], and e is the identity.
        tolerance = (8 * compute_unit(dtype) + rounding(dtype)) * (p + hot)
        assert_within("G", harness.host(grads.c).astype(np.float64), (p - hot).T, tolerance.T)


def rounding(dtype: np.dtype) -> float:
    """Of an entry of G, which may be kept in 16 bits."""
    return 0.0 if dtype.itemsize > 2 else 2.0 ** -(11 if dtype == np.float16 else 8)


@pytest.mark.parametrize("top", [30, 300, 3000])
@pytest.mark.parametrize("below", [5, 10, 14])
def test_confident_tokens(harness, edges, top, below):
    """The target is so far above all others that the loss is a small difference of large numbers."""
    dtype = edges.dtype if edges.dtype.itemsize > 2 else np.dtype(np.float16)  # bfloat16 has not these integers
    z = np.full((4, 200), float(top - below))
    targets = np.array([0, 7, 130, 199])
    z[np.arange(4), targets] = top
    if dtype == np.float16 and top > 2048:
        z, top = z // 2 * 2, top
    p = check_nll(harness, of_logits(z, targets, dtype))
    assert p[np.arange(4), targets].min() > 0.4


@given(data=st.data())
def test_whole_numbers(harness: Harness, edges: Edges, data):
    """Sums of products of small integers are exact in any order, so what is left is the error of the loss itself."""
    dtype = data.draw(st.sampled_from(edges.dtypes), label="dtype")
    N, V = data.draw(sizes(edges.n, edges.max_n), label="N"), data.draw(sizes(edges.v, edges.max_v), label="V")
    D = data.draw(sizes(edges.d, min(edges.max_d, 64)), label="D")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), label="seed"))
    e, c = rng.integers(-8, 9, (N, D)).astype(dtype), rng.integers(-4, 5, (V, D)).astype(dtype)
    case = Case(e, c, rng.integers(0, V, N), {"reduction": "none", "filter_eps": data.draw(st.sampled_from(["auto", None]))})
    check_nll(harness, case)


def test_results_of_the_forward_go_together(harness, edges):
    rng = np.random.default_rng(3)
    z = rng.integers(-60, 61, (7, 300)).astype(np.float64)
    case = of_logits(z, rng.integers(0, 300, 7), edges.dtype)
    statistics = harness.forward(case)._statistics
    host = {name: harness.host(getattr(statistics, name)) for name in ("lse", "max_logit", "log_sum", "target_logit", "nll")}
    unit = compute_unit(case.e.dtype)
    np.testing.assert_array_equal(host["max_logit"], z.max(axis=1))
    np.testing.assert_array_equal(host["target_logit"], z[np.arange(7), case.targets])
    assert_within("lse", host["lse"], host["max_logit"].astype(np.float64) + host["log_sum"], 2 * unit * 64)
    assert (host["log_sum"] >= 0).all()
    assert (host["log_sum"] <= math.log(300) + 1e-5).all()


def test_the_judge_sees_lost_digits(edges):
    """What float32 made of a log-sum-exp less a target's logit would not get through."""
    exact, lost = math.log(8), float(np.float32(2.0**24 + math.log(8)) - np.float32(2.0**24))
    with pytest.raises(AssertionError):
        assert_within("nll", np.array([lost]), np.array([exact]), 16 * compute_unit(DTYPES[2]) * (1 + exact))
