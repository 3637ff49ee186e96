"""Every backend against the reference: forward, gradients, filters, over the whole domain of the public functions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cce_numba as cce
import reference
from cce_numba.options import Options
from tests.helpers.cases import DTYPES, Case, cases, filters, make_case
from tests.helpers.checks import assert_within, check_forward, check_gradients, check_survivors, expect

GIVES = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the simulator's scalars warn where NaN and inf are due


def eps_of(case: Case) -> float | None:
    return Options.of(case.e.dtype, {"filter_eps": case.options.get("filter_eps", "auto")}).filter_eps


@GIVES
@given(data=st.data())
def test_forward(harness, edges, data):
    case = data.draw(cases(edges))
    result = harness.forward(case)
    check_forward(expect(case), harness.numbers(result))


@GIVES
@given(data=st.data())
def test_loss_and_gradients(harness, edges, data):
    case = data.draw(cases(edges))
    case = case.with_options(**data.draw(filters()))
    expected, result = expect(case), harness.forward(case)
    check_forward(expected, harness.numbers(result))
    kept = harness.kept(result, case.c.shape[0])
    if kept is not None:
        check_survivors(expected, kept, eps_of(case), result._statistics.survivor_block)
    check_gradients(expected, harness.backward(result), kept, coarse_eps=result.plan.coarse_eps)


@GIVES
@given(data=st.data())
def test_any_upstream_gradient(harness, edges, data):
    """Scalars and arrays for d_loss and d_lse, zeros among them; and only what is asked for."""
    case = data.draw(cases(edges))
    case = case.with_options(**data.draw(filters()))
    expected, result = expect(case), harness.forward(case)
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="upstream seed"))
    shape = expected.forward.nll.shape

    def draw_upstream(per_token: bool, label: str) -> object:
        kind = data.draw(st.sampled_from(["none", "scalar", "zero", *(["array", "sparse"] if per_token else [])]), label=label)
        if kind in ("array", "sparse"):
            array = rng.normal(size=shape).astype(np.float32)
            return array * (rng.random(shape) < 0.2) if kind == "sparse" else array
        return {"none": None, "scalar": 2.5, "zero": 0.0}[kind]

    d_loss = draw_upstream(case.options["reduction"] == "none", "d_loss")
    d_lse = draw_upstream(True, "d_lse")
    wrt = data.draw(st.sampled_from([None, "e", "c", ("e", "c")]), label="wrt")
    grads = harness.backward(result, d_loss, d_lse, wrt=wrt)
    wanted = {"e", "c", "bias"} if wrt is None else set(wrt)
    assert (grads.e is not None) == ("e" in wanted)
    assert (grads.c is not None) == ("c" in wanted)
    assert (grads.bias is not None) == ("bias" in wanted and case.options.get("bias") is not None)
    check_gradients(expected, grads, harness.kept(result, case.c.shape[0]), d_loss, d_lse, coarse_eps=result.plan.coarse_eps)


@GIVES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filter_eps", ["auto", None, 2.0**-5])
def test_every_dtype_with_everything_on(harness, edges, dtype, filter_eps):
    case = make_case(
        1,
        (3, edges.n[-1] // 3 + 1),
        edges.v[-1] + 3,
        edges.d[-1] + 1,
        dtype,
        ignored=0.2,
        bias=True,
        softcap=4.0,
        shift=1,
    )
    case = case.with_options(filter_eps=filter_eps, reduction="none")
    expected, result = expect(case), harness.forward(case)
    check_forward(expected, harness.numbers(result))
    d_loss = np.linspace(-1, 1, expected.forward.nll.size).reshape(expected.forward.nll.shape)
    grads = harness.backward(result, d_loss, 0.5)
    check_gradients(expected, grads, harness.kept(result, case.c.shape[0]), d_loss, 0.5, coarse_eps=result.plan.coarse_eps)


@GIVES
@pytest.mark.parametrize(("filter_e_grad", "filter_c_grad"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_filter_drops_and_the_exact_modes_do_not(harness, edges, filter_e_grad, filter_c_grad):
    """Peaked logits: most columns fall below eps, and exact gradients differ from filtered ones measurably."""
    case = make_case(5, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1] + 1, np.dtype(np.float64), spread=2.0)
    targets = case.targets % 7
    case = Case(case.c[targets] + 0.1 * case.e, case.c, targets)
    case = case.with_options(filter_eps=0.2, filter_e_grad=filter_e_grad, filter_c_grad=filter_c_grad, reduction="sum")
    expected, result = expect(case), harness.forward(case)
    grads, exact = harness.backward(result), harness.backward(harness.forward(case.with_options(filter_eps=None)))
    kept = harness.kept(result, case.c.shape[0])
    if filter_e_grad or filter_c_grad:
        assert 0 < kept.mean() < 0.95
        counts = result.survivor_counts()
        assert counts.sum() == kept[:: result._statistics.survivor_block].sum()
    assert (np.abs(grads.e - exact.e).max() > 1e-3) == filter_e_grad
    assert (np.abs(grads.c - exact.c).max() > 1e-3) == filter_c_grad
    check_gradients(expected, grads, kept, coarse_eps=result.plan.coarse_eps)


@GIVES
@given(data=st.data())
def test_dropped_gradient_is_bounded_by_dropped_mass(harness, edges, data):
    """|dE - exact| of a token <= its weight, times the probability that was dropped, times the longest row of c."""
    case = data.draw(cases(edges, (np.dtype(np.float64),), smallest_n=1))
    case = case.with_options(filter_eps=2.0**-6, reduction="sum", softcap=None)
    expected, result = expect(case), harness.forward(case)
    kept = harness.kept(result, case.c.shape[0])
    filtered = harness.backward(result).e
    exact = harness.backward(harness.forward(case.with_options(filter_eps=None))).e
    p = np.exp(expected.forward.logits - expected.forward.lse[expected.valid][:, None])
    dropped = np.where(kept, 0, p).sum(axis=1)
    longest = np.linalg.norm(case.c, axis=1).max(initial=0)
    shift = int(case.options["shift"])
    difference = (filtered - exact)[..., : max(0, filtered.shape[-2] - shift), :] if shift else filtered - exact
    assert (np.linalg.norm(difference[expected.valid], axis=-1) <= dropped * longest + 1e-12 * (1 + longest)).all()


@GIVES
@pytest.mark.parametrize("alone", [True, False])
def test_a_long_vocabulary_whose_first_entries_are_the_frequent_ones(harness, edges, alone):
    """As tokenizers number them. The log-sum-exp so far must then be a good bound: few columns are flagged in vain."""
    N, V, eps = 1 if alone else edges.n[-1] + 1, edges.long_v, 2.0**-8
    case = make_case(9, (N,), V, edges.d[-1], edges.dtype, spread=0.5, bias=True, filter_eps=eps, reduction="sum")
    case.options["bias"][:] = -1.5 * np.log1p(np.arange(V))
    expected, result = expect(case), harness.forward(case)
    check_forward(expected, harness.numbers(result))
    kept = harness.kept(result, V)
    check_survivors(expected, kept, eps, result._statistics.survivor_block)
    check_gradients(expected, harness.backward(result), kept, coarse_eps=result.plan.coarse_eps)
    p = np.exp(expected.forward.logits - expected.forward.lse[:, None])
    ideal = reference.column_filter(p, case.targets, eps, result._statistics.survivor_block)
    assert 0.0 < ideal.mean() <= kept.mean() <= max(2 * ideal.mean(), ideal.mean() + 0.15)


@GIVES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_promised_numerics(harness, edges, dtype):
    """Loss and lse within 1e-5 (1 + max |z|); exact 16-bit gradients within twice what rounding the true ones costs."""
    case = make_case(11, (edges.n[-1] + 1,), edges.long_v, edges.d[-1], dtype, spread=3.0, filter_eps=None)
    expected, result = expect(case), harness.forward(case)
    numbers, grads = harness.numbers(result), harness.backward(result)
    allowed = 1e-5 * (1 + np.abs(expected.forward.logits).max(axis=1))
    assert (np.abs(numbers["nll"] - expected.forward.nll) <= allowed).all()
    assert (np.abs(numbers["lse"] - expected.forward.lse) <= allowed).all()
    exact = reference.backward(case.e, case.c, case.targets)
    for ours, true in ((grads.e, exact.e), (grads.c, exact.c)):
        rounding = np.linalg.norm(true.astype(dtype).astype(np.float64) - true)
        # Where the logits have no more digits than the gradients, their own rounding is what is left: some 100 units of it.
        allowed = 2 * rounding if dtype.itemsize == 2 else 200 * np.finfo(dtype).eps * np.linalg.norm(true)
        assert np.linalg.norm(ours.astype(np.float64) - true) <= allowed


@GIVES
def test_many_small_terms_after_a_large_one_are_not_lost(harness, edges):
    """A tile's sum of exponentials is less than half a unit in the last place of the sum so far, again and again."""
    V = 102_403 if harness.edges.max_v > 100 else 6403
    case = make_case(12, (1,), V, 1, edges.dtype, bias=True, reduction="sum", filter_eps=None)
    case.e[:] = 0
    case.options["bias"][:] = np.log(0.45 * 2.0**-23 / (128 if harness.edges.max_v > 100 else 8))
    case.options["bias"][0] = 0
    with pytest.MonkeyPatch.context() as patch:
        if harness.backend == "simt":
            from cce_numba.simt import forward

            patch.setattr(forward, "count_splits", lambda *_: 1)
        check_forward(expect(case), harness.numbers(harness.forward(case)))


@GIVES
def test_same_bits_every_time(harness, edges):
    case = make_case(3, (edges.n[-1] + 3,), edges.v[-1] + 5, edges.d[-1], np.dtype(np.float32), ignored=0.1, bias=True)
    runs = []
    for _ in range(2):
        result = harness.forward(case)
        grads = harness.backward(result)
        runs.append([harness.numbers(result)[name].tobytes() for name in ("loss", "nll", "lse")])
        runs[-1] += [grads.e.tobytes(), grads.c.tobytes(), grads.bias.tobytes()]
    assert runs[0] == runs[1]


@GIVES
@given(data=st.data())
def test_building_blocks_and_one_call_agree_with_forward_and_backward(harness, edges, data):
    case = data.draw(cases(edges))
    result = harness.forward(case)
    numbers, grads = harness.numbers(result), harness.backward(result)
    plain = {k: v for k, v in case.options.items() if k not in ("reduction", "ignore_index")}
    dot = Case(case.e, case.c, case.targets, plain | {"ignore_index": case.options["ignore_index"]})
    # Not the very bits: with survivors, backends may walk the vocabulary in other steps.
    np.testing.assert_allclose(harness.call("linear_cross_entropy", case), numbers["loss"], rtol=1e-5, atol=1e-5)
    # A dot product by itself sums up in another order than a tile of logits.
    expected = expect(case)
    allowed = np.zeros(expected.forward.lse.shape)
    allowed[expected.valid] = expected.z_error.max(axis=1, initial=0)
    assert_within("indexed_dot", harness.call("indexed_dot", dot), expected.forward.target_logit, allowed)
    every = harness.call("linear_logsumexp", Case(case.e, case.c, case.targets, plain), targets=False)
    valid = expected.valid
    np.testing.assert_allclose(every[valid], numbers["lse"][valid], rtol=1e-5, atol=1e-5)
    arrays, options = harness._arrays(case), harness._options(case)
    loss, lse, both = cce.linear_cross_entropy_with_grad(*arrays, **options, return_lse=True)
    np.testing.assert_array_equal(harness.host(loss), numbers["loss"])
    np.testing.assert_array_equal(harness.host(lse), numbers["lse"])
    np.testing.assert_array_equal(harness.host(both.e), grads.e)
    np.testing.assert_array_equal(harness.host(both.c), grads.c)
