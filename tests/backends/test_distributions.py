"""Log-probabilities of one entry or many, entropies, sums of squares, best entries, and gradients through them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cce_numba as cce
import reference
from cce_numba.arguments import SEVERAL_TARGETS
from cce_numba.backend import backend_module
from tests.helpers.cases import DTYPES, Case, cases, filters, make_case
from tests.helpers.checks import assert_within
from tests.helpers.distributions import (
    EXTRAS,
    check_against,
    check_found,
    expect_distribution,
    flows_of,
    tolerances,
    with_ids,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ALONE = {"entropy": {"entropy": True}, "sum_squares": {"sum_squares": True}, "top_k": {"top_k": 5}}
TOGETHER = {"entropy": True, "sum_squares": True, "top_k": 8}


def soft(case):
    """The case as `forward` takes it: several targets come with what they count, which here is nothing."""
    if case.targets.ndim < case.e.ndim:
        return case
    return case.with_options(target_probs=np.zeros(case.targets.shape), reduction="sum")


def forward_numbers(harness, result):
    names = ("logprobs", "lse", *ALONE, "top_logprobs", "top_ids")
    return {name: harness.host(getattr(result, name)) for name in names if hasattr(result, name)}


def check(harness, case, upstream):
    """`linear_logprobs`, `forward` and `backward` of a case whose targets are ids."""
    expected = expect_distribution(case)
    asked = {name: case.options[name] for name in EXTRAS if name in case.options}
    numbers = harness.logprobs(case)
    assert {name for name in ALONE if numbers.get(name if name != "top_k" else "top_ids") is not None} == {
        name for name, value in asked.items() if value
    }
    check_found(expected, numbers)
    result = harness.forward(soft(case))
    check_found(expected, forward_numbers(harness, result))
    kept = harness.kept(result, len(case.c))
    keep_e, keep_c = (kept if case.options.get(name, True) else None for name in ("filter_e_grad", "filter_c_grad"))
    if kept is not None:
        check_targets_survive(expected, kept)
    grads = harness.backward(result, 0.0, **upstream)
    exact = reference.distribution_backward(
        case.e, case.c, case.targets, keep_e=keep_e, keep_c=keep_c, **upstream, **expected.options
    )
    check_against(exact, grads, tolerances(expected, flows_of(expected, **upstream), keep_e, keep_c))
    return result


def check_targets_survive(expected, kept):
    tokens = expected.tokens
    row, k = np.nonzero(tokens.present & (tokens.ids >= 0) & (tokens.ids < kept.shape[1]))
    assert kept[row, tokens.ids[row, k]].all()


def upstream_of(case, rng, names=("d_logprobs", "d_lse", "d_entropy")):
    """Of any sign, zero for some tokens."""
    shift = int(case.options.get("shift", 0))
    tokens = case.e.shape[:-1]
    tokens = (*tokens[:-1], tokens[-1] - shift)
    shapes = {"d_logprobs": tokens + case.targets.shape[case.e.ndim - 1 :], "d_lse": tokens, "d_entropy": tokens}
    return {name: rng.normal(size=shapes[name]) * (rng.random(shapes[name]) < 0.8) for name in names}


@pytest.mark.parametrize("K", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("alone", [*ALONE, "nothing"])
def test_each_alone(harness, edges, alone, softcap, K):
    options = ALONE.get(alone, {})
    harness.skip_unless_it_has(*options, *([SEVERAL_TARGETS] if K else []))
    case = make_case(1, (2, edges.n[-1] // 2 + 1), edges.v[-1] + 3, edges.d[-1] + 1, edges.dtype, ignored=0.2, bias=True)
    rng = np.random.default_rng(0)
    case = case.with_options(shift=1, softcap=softcap, filter_eps=2.0**-8, logit_scale=rng.uniform(0.5, 1.5, case.e.shape[:-1]))
    case = with_ids(case.with_options(**options), K, rng) if K else case.with_options(**options)
    names = ("d_logprobs", "d_lse", "d_entropy") if alone == "entropy" else ("d_logprobs", "d_lse")
    check(harness, case, upstream_of(case, rng, names))
    for name in names:
        check(harness, case, upstream_of(case, rng, [name]))


@given(data=st.data())
def test_all_together(harness, edges, data):
    """Any sizes, dtype, options, ids, upstream gradients."""
    harness.skip_unless_it_has(*ALONE, SEVERAL_TARGETS)
    case = data.draw(cases(edges)).with_options(**data.draw(filters()))
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="seed of ids"))
    K = data.draw(st.sampled_from([None, 1, 2, 5]), label="K")
    case = case if K is None else with_ids(case, K, rng)
    scale = {None: None, "number": 0.625, "array": rng.uniform(0.25, 1.5, case.e.shape[:-1])}
    case = case.with_options(
        entropy=data.draw(st.booleans(), label="entropy"),
        sum_squares=data.draw(st.booleans(), label="sum_squares"),
        top_k=data.draw(st.integers(0, min(9, len(case.c))), label="top_k"),
        logit_scale=scale[data.draw(st.sampled_from([None, "number", "array"]), label="logit_scale")],
    )
    names = ["d_logprobs", "d_lse", *(["d_entropy"] if case.options["entropy"] else [])]
    chosen = [name for name in names if data.draw(st.booleans(), label=name)]
    check(harness, case, upstream_of(case, rng, chosen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filter_eps", ["auto", None])
def test_every_dtype(harness, edges, dtype, filter_eps):
    harness.skip_unless_it_takes(dtype)
    harness.skip_unless_it_has(*ALONE, SEVERAL_TARGETS)
    rng = np.random.default_rng(1)
    case = make_case(2, (edges.n[-1] + 1,), edges.v[-1] + 3, edges.d[-1] + 1, dtype, ignored=0.2, bias=True)
    case = with_ids(case.with_options(filter_eps=filter_eps, **TOGETHER), 3, rng)
    check(harness, case, upstream_of(case, rng))


def test_a_long_vocabulary(harness, edges):
    """Of many tiles, with up to 64 best entries, and an entropy that keeps to 2e-5 of 1 and itself."""
    harness.skip_unless_it_has(*ALONE)
    case = make_case(3, (edges.n[0] + 1,), edges.long_v, edges.d[-1], edges.dtype, spread=0.5, bias=True)
    case = case.with_options(**TOGETHER | {"top_k": 64}, filter_eps=None)
    check(harness, case, upstream_of(case, np.random.default_rng(2)))
    exact = expect_distribution(case).found.entropy
    assert_within("entropy", harness.logprobs(case)["entropy"], exact, 2e-5 * (1 + exact))


@pytest.mark.parametrize("spread", [0.0, 1.0, 1000.0])
def test_certain_and_uniform_distributions(harness, edges, spread):
    harness.skip_unless_it_has(*ALONE)
    V = edges.v[-1] + 3
    case = make_case(4, (edges.n[-1] + 1,), V, edges.d[-1], edges.dtype, spread=spread).with_options(**TOGETHER)
    numbers = harness.logprobs(case)
    check_found(expect_distribution(case), numbers)
    if spread == 0:
        np.testing.assert_allclose(numbers["entropy"], np.log(V), rtol=1e-6)
        np.testing.assert_allclose(numbers["sum_squares"], 1 / V, rtol=1e-6)
        assert (numbers["top_ids"] == np.arange(8)).all()


def test_equal_logits_come_by_ascending_id(harness, edges):
    """Logits that any arithmetic has exactly, most of them several times, in one tile and in several."""
    harness.skip_unless_it_has("top_k")
    rng = np.random.default_rng(5)
    V, n = 2 * edges.v[-1] + 5, edges.n[-1] + 1
    e = rng.integers(-2, 3, (n, 2)).astype(edges.dtype)
    c = rng.integers(-2, 3, (V, 2)).astype(edges.dtype)
    case = Case(e, c, rng.integers(0, V, n))
    k = min(V, 16)
    z = e.astype(np.float64) @ c.astype(np.float64).T
    expected = np.argsort(-z, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(harness.logprobs(case, top_k=k)["top_ids"], expected)


def test_all_entries_may_be_asked_for(harness, edges):
    """Those that the bias masks come last, by ascending id, with log-probabilities of -inf."""
    harness.skip_unless_it_has("top_k", "entropy")
    V = edges.v[1]
    case = make_case(6, (edges.n[0] + 1,), V, edges.d[-1], edges.dtype, bias=True, entropy=True, top_k=V, filter_eps=None)
    case.options["bias"][::2] = -np.inf
    case = dataclasses.replace(case, targets=np.full_like(case.targets, 1))
    numbers = harness.logprobs(case)
    check_found(expect_distribution(case), numbers)
    assert (numbers["top_ids"][:, V // 2 :] == np.arange(0, V, 2)).all()
    assert (numbers["top_logprobs"][:, V // 2 :] == -np.inf).all()
    assert np.isfinite(numbers["entropy"]).all()
    check(harness, case, upstream_of(case, np.random.default_rng(3)))


@pytest.mark.parametrize("K", [None, 3])
@pytest.mark.parametrize("lost", ["row", "id", "infinite"])
def test_a_lost_token_leaves_the_others_alone(harness, edges, lost, K):
    harness.skip_unless_it_has(*ALONE, *([SEVERAL_TARGETS] if K else []))
    rng = np.random.default_rng(7)
    case = make_case(9, (edges.n[-1] + 2,), edges.v[-1] + 2, edges.d[-1], edges.dtype, bias=True, check_targets=False)
    case = case.with_options(filter_eps=None, **TOGETHER)
    case = with_ids(case, K, rng) if K else case
    n = edges.n[-1] - 1
    if lost == "id":
        case.targets[(n, 0) if K else n] = len(case.c)
    else:
        case.e[n, 0] = np.nan if lost == "row" else np.inf
    expected = expect_distribution(case)
    numbers = harness.logprobs(case)
    check_found(expected, numbers)
    upstream = upstream_of(case, rng)
    upstream["d_entropy"][n] = 0.5
    grads = harness.backward(harness.forward(soft(case)), 0.0, **upstream)
    others = np.arange(len(case.e)) != n
    assert np.isnan(grads.e[n]).all()
    assert np.isnan(grads.c).all()
    exact = reference.distribution_backward(
        case.e[others], case.c, case.targets[others], **{name: x[others] for name, x in upstream.items()}, **expected.options
    ).e
    assert_within("others", grads.e[others], exact, 0.05 * np.abs(exact).max())
    upstream = {name: np.where(others if x.ndim == 1 else others[:, None], x, 0) for name, x in upstream.items()}
    grads = harness.backward(harness.forward(soft(case)), 0.0, **upstream)
    assert np.isfinite(grads.c).all(), "a token to which nothing flows back takes no part"
    assert not grads.e[n].any()


def test_what_flows_into_padding_goes_nowhere(harness, edges):
    harness.skip_unless_it_has(SEVERAL_TARGETS)
    rng = np.random.default_rng(8)
    case = with_ids(make_case(10, (edges.n[-1],), edges.v[-1], edges.d[-1], edges.dtype, ignored=0.2), 4, rng)
    result, (d,) = harness.forward(soft(case)), upstream_of(case, rng, ["d_logprobs"]).values()
    assert (case.targets == -100).any()
    poisoned = np.where(case.targets == -100, np.nan, d)
    a, b = (harness.backward(result, 0.0, d_logprobs=x) for x in (d, poisoned))
    np.testing.assert_array_equal(a.e, b.e)
    np.testing.assert_array_equal(a.c, b.c)


def test_beside_a_loss(harness, edges):
    """The loss and its gradients are the same with extras as without; the functions that return a loss return them beside."""
    harness.skip_unless_it_has(*ALONE)
    case = make_case(11, (2, edges.n[-1]), edges.v[-1] + 3, edges.d[-1], edges.dtype, bias=True, ignored=0.2, z_loss=0.1)
    arrays, plain = harness._arrays(case), harness._options(case)
    found = cce.linear_cross_entropy(*arrays, **plain, **TOGETHER)
    assert isinstance(found, cce.LossStatistics)
    with_grad, grads = cce.linear_cross_entropy_with_grad(*arrays, **plain, **TOGETHER)
    loss, lse, plain_grads = cce.linear_cross_entropy_with_grad(*arrays, **plain, return_lse=True)
    for each in (found, with_grad):
        assert harness.host(each.loss) == harness.host(loss)
        np.testing.assert_array_equal(harness.host(each.lse), harness.host(lse))
        numbers = {name: harness.host(x) for name, x in each._asdict().items() if name != "loss"}
        check_found(
            expect_distribution(case.with_options(**TOGETHER)), numbers | {"logprobs": harness.logprobs(case)["logprobs"]}
        )
    for name in ("e", "c", "bias"):
        np.testing.assert_array_equal(*(harness.host(getattr(x, name)) for x in (grads, plain_grads)))


def test_a_loss_and_an_entropy_bonus_in_one_backward(harness, edges):
    harness.skip_unless_it_has("entropy")
    case = make_case(12, (edges.n[-1] + 1,), edges.v[-1] + 3, edges.d[-1], edges.dtype, filter_eps=None, reduction="sum")
    case = case.with_options(entropy=True)
    together = harness.backward(harness.forward(case), 2.0, d_entropy=-0.25)
    upstream = {"d_logprobs": np.full(case.targets.shape, -2.0), "d_entropy": np.full(case.targets.shape, -0.25)}
    expected = expect_distribution(case)
    exact = reference.distribution_backward(case.e, case.c, case.targets, **upstream, **expected.options)
    check_against(exact, together, tolerances(expected, flows_of(expected, **upstream)))


def test_right_on_average(harness, edges):
    """The unbiased filter multiplies columns of whatever G is: its mean over seeds is the exact gradient."""
    harness.skip_unless_it_has("entropy", SEVERAL_TARGETS)
    rng = np.random.default_rng(13)
    case = make_case(13, (edges.n[1],), edges.v[-1] + 3, 4, edges.dtype, spread=3.0)
    case = with_ids(case, 3, rng).with_options(entropy=True, filter="unbiased", filter_eps=2.0**-3)
    case = Case(case.e, case.c, case.targets, case.options)
    upstream = upstream_of(case, rng)
    exact = reference.distribution_backward(case.e, case.c, case.targets, **upstream)
    drawn = []
    for seed in range(60):
        result = harness.forward(soft(case.with_options(filter_seed=seed)))
        grads = harness.backward(result, 0.0, **upstream)
        drawn.append(np.concatenate([grads.e, grads.c]).astype(np.float64))
    mean, spread = np.mean(drawn, axis=0), np.std(drawn, axis=0) / np.sqrt(len(drawn))
    error = np.abs(mean - np.concatenate([exact.e, exact.c]))
    assert spread.max() > 1e-3, "the draws do something"
    assert np.mean(error <= 3 * spread + 1e-2 * np.abs(exact.c).max()) > 0.98
    one = np.abs(drawn[0] - np.concatenate([exact.e, exact.c]))
    assert np.linalg.norm(error) < 0.35 * np.linalg.norm(one)


@pytest.mark.parametrize("extra", [*ALONE, SEVERAL_TARGETS])
def test_what_a_backend_does_not_have_it_refuses(harness, edges, extra):
    case = make_case(14, (3,), edges.v[-1], edges.d[-1], edges.dtype)
    case = with_ids(case, 2, np.random.default_rng(0)) if extra == SEVERAL_TARGETS else case.with_options(**ALONE[extra])
    if extra in backend_module(harness.backend).EXTRAS:
        harness.logprobs(case)
        return
    with pytest.raises(NotImplementedError, match=f"{extra}: backend '{harness.backend}' does not have it yet"):
        harness.logprobs(case)
