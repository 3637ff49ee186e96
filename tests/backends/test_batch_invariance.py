"""`batch_invariant=True`: a token's numbers have the same bits whatever other tokens stand beside it, and however many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.cases import Case, make_case, sizes
from tests.helpers.distributions import check_found, expect_distribution

NUMBERS = ("logprobs", "lse", "entropy", "sum_squares", "top_logprobs", "top_ids")


@pytest.fixture(autouse=True)
def _has_it(harness):
    harness.skip_unless_it_has("batch_invariant", "entropy", "sum_squares", "top_k")


def numbers_of(harness, case, n, upstream):
    """The bits of what is found of token n, and of its row of dE, for upstream gradients of its own."""
    found = harness.logprobs(case)
    result = harness.forward(case.with_options(reduction="none"))
    of_all = {name: np.full(len(case.e), value) for name, value in upstream.items()}
    of_all = {name: np.where(np.arange(len(case.e)) == n, x, 0.3 * x + 0.1) for name, x in of_all.items()}
    grads = harness.backward(result, **of_all)
    rows = {name: found[name][n] for name in NUMBERS} | {"dE": grads.e[n]}
    rows |= {f"forward.{name}": harness.host(getattr(result, name))[n] for name in (*NUMBERS, "loss")}
    return {name: row.tobytes() for name, row in rows.items()}


@given(data=st.data())
def test_a_token_does_not_know_its_batch(harness, edges, data):
    V, D = data.draw(sizes(edges.v, edges.max_v), label="V"), data.draw(sizes(edges.d, edges.max_d), label="D")
    dtype = data.draw(st.sampled_from(edges.dtypes), label="dtype")
    options = {
        "batch_invariant": True,
        "entropy": True,
        "sum_squares": True,
        "top_k": min(4, V),
        "softcap": data.draw(st.sampled_from([None, 5.0]), label="softcap"),
        "z_loss": data.draw(st.sampled_from([0.0, 0.1]), label="z_loss"),
        "filter": data.draw(st.sampled_from(["drop", "unbiased"]), label="filter"),
        "bias": data.draw(st.booleans(), label="bias"),
    }
    one = make_case(data.draw(st.integers(0, 2**16), label="seed"), (1,), V, D, dtype, **options)
    upstream = {"d_loss": 0.5, "d_lse": -0.25, "d_logprobs": 1.5, "d_entropy": 0.75}
    alone = numbers_of(harness, one, 0, upstream)
    for seed in range(2):
        N = data.draw(sizes(edges.n, edges.max_n), label="N")
        n = data.draw(st.integers(0, N - 1), label="place")
        beside = make_case(seed, (N,), V, D, dtype, ignored=data.draw(st.sampled_from([0.0, 0.4]), label="ignored"))
        e, targets = beside.e.copy(), beside.targets.copy()
        e[n], targets[n] = one.e[0], one.targets[0]
        assert numbers_of(harness, Case(e, one.c, targets, one.options), n, upstream) == alone


def test_strides_do_not_matter(harness, edges):
    """Nor does it whether the row lies beside others in memory."""
    case = make_case(1, (edges.n[-1] + 1,), edges.v[-1] + 3, edges.d[-1] + 1, edges.dtype)
    case = case.with_options(batch_invariant=True, entropy=True, sum_squares=True, top_k=3)
    wide = np.zeros((len(case.e), 2 * case.e.shape[1]), case.e.dtype)
    wide[:, ::2] = case.e
    found, other = harness.logprobs(case), harness.logprobs(Case(wide[:, ::2], case.c, case.targets, case.options))
    for name in NUMBERS:
        np.testing.assert_array_equal(found[name], other[name])


def test_numbers_are_right(harness, edges):
    case = make_case(2, (edges.n[-1] + 1,), edges.v[-1] + 3, edges.d[-1] + 1, edges.dtype, bias=True, ignored=0.2)
    case = case.with_options(batch_invariant=True, entropy=True, sum_squares=True, top_k=3)
    check_found(expect_distribution(case), harness.logprobs(case))
    assert not harness.forward(case)._problem.options.filter_e_grad
