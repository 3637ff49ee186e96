"""The other terms of the loss, the logits' scale and the weights: each alone, all together, and where they are zero or lost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cce_numba as cce
import reference
from cce_numba import terms
from tests.helpers.cases import DROPPING, DTYPES, Case, cases, filters, make_case, with_terms
from tests.helpers.checks import (
    assert_within,
    check_forward,
    check_gradients,
    check_survivors,
    expect,
    gradient_tolerances,
    unit_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ALONE = {
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "a logit_scale": {"logit_scale": 0.4},
    "a logit_scale each": {"logit_scale": True},
    "class_weights": {"class_weights": True},
    "token_weights": {"token_weights": True},
    "class_weights and label_smoothing": {"class_weights": True, "label_smoothing": 0.2},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.1, "logit_scale": True, "class_weights": True, "token_weights": True},
}


def with_arrays(case, seed=0, **options):
    """The case with these options; True stands for an array of random numbers, zeros among the weights."""
    rng = np.random.default_rng(seed)
    shapes = {"logit_scale": case.targets.shape, "token_weights": case.targets.shape, "class_weights": (len(case.c),)}
    for name, value in options.items():
        if value is True:
            options[name] = rng.uniform(0.2, 1.8, shapes[name])
            if name != "logit_scale":
                options[name] *= rng.random(shapes[name]) < 0.9
    return case.with_options(**options)


def peaked(edges):
    """Embeddings near a few rows of the classifier: most columns fall below eps in all tokens of a block."""
    case = make_case(5, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1] + 1, edges.dtype)
    targets = case.targets % 7
    near = (case.c[targets].astype(np.float32) * 4 + 0.1 * case.e.astype(np.float32)).astype(case.e.dtype)
    return Case(near, case.c, targets, DROPPING | {"filter_eps": 0.1})


def check(harness, case, d_loss=None, d_lse=None):
    expected, result = expect(case), harness.forward(case)
    check_forward(expected, harness.numbers(result))
    kept = harness.kept(result, len(case.c))
    if kept is not None:
        check_survivors(expected, kept, result._problem.options.filter_eps, result._statistics.survivor_block)
    check_gradients(expected, harness.backward(result, d_loss, d_lse), kept, d_loss, d_lse, coarse_eps=result.plan.coarse_eps)
    return result


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alone", ALONE)
def test_each_alone(harness, edges, alone, reduction, softcap):
    case = make_case(1, (2, edges.n[-1] // 2 + 1), edges.v[-1] + 3, edges.d[-1] + 1, edges.dtype, ignored=0.2, bias=True)
    options = ALONE[alone] | {"softcap": softcap}
    case = with_arrays(case.with_options(reduction=reduction, shift=1, filter_eps=2.0**-8), **options)
    shape = expect(case).forward.nll.shape
    d_loss = np.linspace(-1, 1, np.prod(shape)).reshape(shape) if reduction == "none" else 0.75
    check(harness, case, d_loss, 0.25)


@given(data=st.data())
def test_all_together(harness, edges, data):
    """Any sizes, dtype, options, weights, upstream gradients, and pieces of any size for what is done with arrays."""
    case = data.draw(cases(edges))
    case = data.draw(with_terms(case.with_options(**data.draw(filters()))))
    rows = data.draw(st.sampled_from([1, 5, 10_000]), label="rows at a time")
    shape = expect(case).forward.nll.shape
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="upstream seed"))
    per_token = case.options["reduction"] == "none" and data.draw(st.booleans(), label="d_loss per token")
    d_loss = rng.normal(size=shape) * (rng.random(shape) < 0.8) if per_token else data.draw(st.sampled_from([None, 2.5, 0.0]))
    d_lse = rng.normal(size=shape) if data.draw(st.booleans(), label="d_lse") else None
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_HOST_BYTES", "_DEVICE_BYTES"):
            patch.setattr(terms, name, rows * case.c.shape[1] * 8)
        check(harness, case, d_loss, d_lse)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filter_eps", ["auto", None])
def test_every_dtype_with_everything_on(harness, edges, dtype, filter_eps, softcap):
    harness.skip_unless_it_takes(dtype)
    case = make_case(2, (edges.n[-1] + 1,), edges.v[-1] + 3, edges.d[-1] + 1, dtype, ignored=0.2, bias=True)
    options = ALONE["everything"] | {"softcap": softcap}
    check(harness, with_arrays(case.with_options(filter_eps=filter_eps), **options))


def test_a_long_vocabulary(harness, edges):
    """Sums over it are of many tiles, and of many pieces."""
    case = make_case(3, (edges.n[0] + 1,), edges.long_v, edges.d[-1], edges.dtype, spread=0.5, bias=True)
    options = {"label_smoothing": 0.9, "softcap": 3.0}
    check(harness, with_arrays(case, class_weights=True, **options), d_lse=-0.5)


def test_label_smoothing_does_not_defeat_the_filter(harness, edges):
    """The same entries survive as without; what it takes from all entries is exact all the same."""
    case = peaked(edges)
    plain, smooth = harness.forward(case), harness.forward(case.with_options(label_smoothing=0.3))
    assert plain.survivor_counts().tolist() == smooth.survivor_counts().tolist()
    assert 0 < harness.kept(smooth, len(case.c)).mean() < 0.9
    check(harness, case.with_options(label_smoothing=0.3))


def test_label_smoothing_under_a_softcap_is_exact(harness, edges):
    case = peaked(edges).with_options(softcap=9.0)
    assert harness.kept(harness.forward(case), len(case.c)).mean() < 0.9
    result = check(harness, case.with_options(label_smoothing=0.1))
    assert harness.kept(result, len(case.c)) is None
    assert "nothing is filtered" in result.plan.filter
    assert (result.survivor_counts() == len(case.c)).all()


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_what_is_taken_from_all_entries_may_be_all_there_is(harness, edges, softcap):
    """A target of class weight 0, and an upstream gradient of the log-sum-exp that cancels what else flows there."""
    case = make_case(13, (edges.n[-1] + 1,), 8, edges.d[-1], edges.dtype, bias=True, reduction="sum")
    case.targets[::2] = 0
    options = {"label_smoothing": 0.5, "softcap": softcap}
    case = case.with_options(class_weights=np.r_[0.0, np.ones(7)], **options)
    check(harness, case, d_lse=-0.5 * 7 / 8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_token_of_weight_0_is_as_good_as_ignored(harness, edges, reduction):
    """Whatever stands in its row, whatever its scale and target; only the log-sum-exp and n_valid tell."""
    case = make_case(7, (edges.n[-1] + 2,), edges.v[-1] + 2, edges.d[-1], edges.dtype, bias=True, reduction=reduction)
    silent = np.arange(len(case.targets)) % 3 == 1
    options = {"label_smoothing": 0.2, "z_loss": 0.1, "class_weights": True, "logit_scale": True, "check_targets": False}
    case = with_arrays(case, **options)
    ignored = Case(case.e, case.c, np.where(silent, -100, case.targets), case.options)
    poisoned, targets = case.e.copy(), case.targets.copy()
    poisoned[silent] = np.nan
    targets[np.flatnonzero(silent)[0]] = len(case.c)
    masked = Case(poisoned, case.c, targets, case.options | {"token_weights": ~silent})
    results = [harness.forward(x) for x in (masked, ignored)]
    losses = [harness.numbers(result)["loss"] for result in results]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert np.isfinite(losses[0]).all()
    grads, expected = (harness.backward(result) for result in results)
    assert not grads.e[silent].any()
    check_gradients(expect(ignored), expected)
    for name in ("e", "c", "bias"):  # blocks of tokens begin elsewhere, so other entries survive and sums have another order
        actual, exact = (getattr(x, name).astype(np.float64) for x in (grads, expected))
        assert_within(name, actual, exact, 0.02 * np.abs(exact).max())


def test_weights_that_sum_to_nothing(harness, edges):
    """As if no token counted: a mean of nan, even with a z-loss that no class weights multiply; a sum of 0, gradients of 0."""
    case = make_case(8, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1], edges.dtype, bias=True)
    nothing = [{"token_weights": np.zeros(len(case.targets))}, {"class_weights": np.zeros(len(case.c)), "z_loss": 0.1}]
    for weights in (*nothing, {"token_weights": np.where(np.arange(len(case.targets)) < 2, [1.0, -1.0, *case.targets[2:]], 0)}):
        for smoothing in (0.0, 0.1):
            result = harness.forward(case.with_options(label_smoothing=smoothing, **weights))
            grads = harness.backward(result)
            assert np.isnan(harness.numbers(result)["loss"])
            assert not any(x.any() for x in (grads.e, grads.c, grads.bias))
    total = harness.forward(case.with_options(reduction="sum", **nothing[0]))
    assert harness.numbers(total)["loss"] == 0


@pytest.mark.parametrize("filter_eps", ["auto", None])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("lost", ["row", "target", "scale", "zero scale"])
def test_a_lost_token_leaves_the_others_alone(harness, edges, lost, softcap, filter_eps):
    case = make_case(9, (edges.n[-1] + 2,), edges.v[-1] + 2, edges.d[-1], edges.dtype, bias=True, reduction="mean")
    options = ALONE["everything"] | {"softcap": softcap}
    case = with_arrays(case.with_options(check_targets=False, filter_eps=filter_eps), **options)
    n = edges.n[-1] - 1
    case.options["token_weights"][n] = 1.5
    clean = expect(case)
    if lost == "row":
        case.e[n, 0] = np.nan
    elif lost == "target":
        case.targets[n] = len(case.c)
    else:
        case.options["logit_scale"][n] = np.nan if lost == "scale" else 0
    expected, result = expect(case), harness.forward(case)
    check_forward(expected, harness.numbers(result))
    grads = harness.backward(result)
    assert (lost == "zero scale") == np.isfinite(harness.numbers(result)["loss"])
    others = np.arange(len(case.targets)) != n
    assert np.isfinite(grads.e[others]).all()
    if lost == "zero scale":
        assert not grads.e[n].any()
        check_gradients(expected, grads, harness.kept(result, len(case.c)), coarse_eps=result.plan.coarse_eps)
    else:
        assert np.isnan(grads.e[n]).all()
        assert np.isnan(grads.c).all()
        assert np.isnan(grads.bias).all()
    if lost in ("row", "scale"):  # the weights are the same
        exact = reference.backward(case.e, case.c, case.targets, **expected.options).e
        assert_within("others", grads.e[others], exact[others], 0.05 * np.abs(exact[others]).max())
        assert np.abs(clean.forward.nll[others] - harness.numbers(result)["nll"][others]).max() < 1e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_out_of_range_is_lost_where_smoothing_leaves_it_no_weight(harness, edges, reduction):
    case = make_case(15, (edges.n[-1],), edges.v[-1], edges.d[-1], edges.dtype, check_targets=False, reduction=reduction)
    case.targets[1] = len(case.c)
    result = harness.forward(case.with_options(label_smoothing=1.0, filter_eps=None))
    loss, grads = harness.numbers(result)["loss"], harness.backward(result)
    assert np.isnan(loss if reduction == "mean" else loss[1])
    assert np.isnan(grads.e[1]).all()
    assert np.isnan(grads.c).all()
    assert np.isfinite(np.delete(grads.e, 1, axis=0)).all()


def test_a_target_out_of_range_is_lost_whatever_the_class_weights(harness, edges):
    """It counts as 1 in the mean's denominator."""
    case = make_case(14, (edges.n[-1],), edges.v[-1], edges.d[-1], edges.dtype, check_targets=False)
    case.targets[:] = 1
    case.targets[0] = len(case.c)
    weights = np.r_[0.0, np.ones(len(case.c) - 2), 0.0]
    result = harness.forward(case.with_options(class_weights=weights))
    grads, plain = harness.backward(result), harness.backward(harness.forward(case))
    assert np.isnan(harness.numbers(result)["loss"])
    for x in (grads, plain):
        assert np.isnan(x.e[0]).all()
        assert np.isnan(x.c).all()
    np.testing.assert_array_equal(grads.e[1:], plain.e[1:])


@given(data=st.data())
def test_written_and_accumulated(harness, edges, data):
    """Label smoothing writes to the gradients before the backend adds the rest: into garbage, or onto what is to be kept."""
    case = data.draw(cases(edges, smallest_n=1)).with_options(label_smoothing=0.3, reduction="sum", **data.draw(filters()))
    case = with_arrays(case, **({"class_weights": True} if data.draw(st.booleans(), label="class_weights") else {}))
    result = harness.forward(case)
    plain = harness.backward(result)
    names = [f.name for f in dataclasses.fields(plain) if getattr(plain, f.name) is not None]

    def filled(fill):
        return cce.Gradients(**{name: harness.device(fill(getattr(plain, name))) for name in names})

    def read(out, name):
        return harness.host(getattr(out, name)).astype(np.float64)

    garbage = filled(lambda x: np.full(x.nbytes, 0xFF, np.uint8).view(x.dtype).reshape(x.shape))
    cce.backward(result, out=garbage)
    ones = filled(lambda x: np.ones(x.shape, x.dtype))
    cce.backward(result, out=ones, accumulate=True)
    tolerances = gradient_tolerances(expect(case), None, None, None, None)
    for name, tolerance in zip(("e", "c", "bias"), tolerances, strict=True):
        if name in names:
            exact, unit = getattr(plain, name).astype(np.float64), unit_of(getattr(plain, name).dtype)
            np.testing.assert_array_equal(read(garbage, name), exact)
            # The 1 is there when the first part is rounded, and when the sum is.
            assert_within(name, read(ones, name) - 1, exact, 2.1 * tolerance + unit * (2.1 + 3 * np.abs(exact)))


def test_the_building_blocks_scale_their_logits(harness, edges):
    case = make_case(10, (2, edges.n[-1]), edges.v[-1] + 1, edges.d[-1], edges.dtype, softcap=4.0, bias=True, shift=1)
    case = with_arrays(case, logit_scale=True)
    numbers = harness.numbers(harness.forward(case))
    np.testing.assert_allclose(harness.call("indexed_dot", case), numbers["target_logit"], rtol=1e-5, atol=1e-5)
    lse = harness.call("linear_logsumexp", case, targets=False)
    np.testing.assert_allclose(lse, numbers["lse"], rtol=1e-5, atol=1e-5)


def test_dropped_mass_of_scaled_logits(harness, edges):
    case = make_case(11, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1], edges.dtype, spread=4.0, filter_eps=2.0**-4)
    case = with_arrays(case, logit_scale=True)
    expected, result = expect(case), harness.forward(case)
    p = np.exp(expected.forward.logits - expected.forward.lse[:, None])
    exact = reference.dropped_mass(p, harness.kept(result, len(case.c)))
    assert exact.max() > 0.01
    assert_within("dropped_mass", harness.host(result.dropped_mass()), exact, 1e-4)


def test_a_scale_of_1_is_none(harness, edges):
    case = make_case(12, (3,), edges.v[-1], edges.d[-1], edges.dtype)
    result = harness.forward(case.with_options(logit_scale=1.0))
    assert result._problem.logit_scale is None
    np.testing.assert_array_equal(harness.numbers(result)["nll"], harness.numbers(harness.forward(case))["nll"])
