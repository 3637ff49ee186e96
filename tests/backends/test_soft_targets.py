"""A few targets a token, with what each of them counts: losses and gradients with all other terms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cce_numba as cce
import reference
from cce_numba.arguments import SEVERAL_TARGETS
from tests.helpers.cases import DTYPES, cases, filters, make_case, with_terms
from tests.helpers.checks import assert_within
from tests.helpers.distributions import Flows, check_against, expect_distribution, tolerances, with_ids

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TERMS = ("target_probs", "reduction", "label_smoothing", "z_loss", "class_weights", "token_weights")


@pytest.fixture(autouse=True)
def _has_them(harness):
    harness.skip_unless_it_has(SEVERAL_TARGETS)


def with_probs(case, K, rng, padded=0.3):
    """The case with K targets a token, and what they count: not all of them 1 together, some 0, one negative; NaN if padded."""
    case = with_ids(case, K, rng, padded)
    probs = rng.uniform(0, 1, case.targets.shape) * (rng.random(case.targets.shape) < 0.8)
    probs.reshape(-1)[:1] = -0.25
    return case.with_options(target_probs=np.where(case.targets == case.options.get("ignore_index", -100), np.nan, probs))


def of_valid(case, expected):
    """(n_valid, K) what targets count, (n_valid,) token weights."""
    options, tokens = case.options, expected.tokens
    shift = options.get("shift", 0)
    probs = reference.tokens.shifted(case.e, options["target_probs"], shift)[1]
    _, weights = reference.loss.per_token(None, options.get("token_weights"), case.e.shape[:-1], shift)
    return tokens.select_ids(probs), tokens.select(weights)


@reference.building_blocks.quiet
def check(harness, case, d_loss=None, d_lse=None):
    """Everything that `forward` and `backward` say."""
    expected, result = expect_distribution(case), harness.forward(case)
    options = expected.options | {name: case.options[name] for name in TERMS if name in case.options}
    exact = reference.forward(case.e, case.c, case.targets, **options)
    t, of_token = of_valid(case, expected)
    V, unit, tokens = len(case.c), expected.unit, expected.tokens
    _, of_target, of_class = reference.weights(tokens.ids, V, options.get("class_weights"), of_token, t)
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    numbers = harness.numbers(result)
    assert int(numbers["n_valid"]) == exact.n_valid

    # The loss: its terms' errors, and their own rounding.
    log_p_error, lse = expected.lse_error + expected.z_error, np.abs(exact.lse[tokens.valid])
    at_ids = np.abs(np.where(t == 0, 0, reference.target_logit(expected.log_p, tokens.ids)))
    mean_error = expected.z_error + (V + 32) * unit * (1 + np.abs(expected.found.logits).max(axis=1, initial=0))
    error = (np.abs(of_target) * (log_p_error[:, None] + 16 * unit * at_ids)).sum(axis=1)
    flat_weight = np.abs(of_token * t.sum(axis=1)) * smoothing
    error += flat_weight * np.abs(of_class).mean() * (expected.lse_error + 16 * unit * (1 + lse) + mean_error)
    error += np.abs(of_token) * z_loss * ((2 * lse + expected.lse_error) * expected.lse_error + 8 * unit * lse**2)
    per_token = np.zeros(exact.lse.shape)
    per_token[tokens.valid] = np.where(of_token == 0, 0, error)
    loss, reduction = np.asarray(exact.loss), options.get("reduction", "mean")
    if reduction != "none":
        per_token = per_token.sum()
        if reduction == "mean" and exact.total_weight:
            # The weights come in the compute dtype; their sum may cancel.
            uncertain = 4 * unit * np.abs(of_target).sum() / np.abs(exact.total_weight)
            per_token = per_token / np.abs(exact.total_weight) + uncertain * np.abs(loss)
        per_token += 8 * unit * np.abs(loss)
    if reduction != "mean" or np.abs(exact.total_weight) > 1e-3 * np.abs(of_target).sum() or not of_target.any():
        assert_within("loss", numbers["loss"], loss, per_token)
    nll_error = np.zeros(exact.nll.shape)
    nll_error[tokens.valid] = (np.abs(t) * (log_p_error[:, None] + 8 * unit * at_ids)).sum(axis=1)
    assert_within("nll", numbers["nll"], exact.nll, nll_error)

    kept = harness.kept(result, V)
    keep_e, keep_c = (kept if case.options.get(name, True) else None for name in ("filter_e_grad", "filter_c_grad"))
    grads = harness.backward(result, d_loss, d_lse)
    wanted = reference.backward(
        case.e, case.c, case.targets, d_loss=d_loss, d_lse=d_lse, keep_e=keep_e, keep_c=keep_c, **options
    )
    d_token = np.asarray(1.0 if d_loss is None else d_loss, np.float64)
    if reduction == "mean":
        d_token = d_token / exact.total_weight if exact.total_weight else 0 * d_token
    d_token, d_lse = (np.abs(tokens.select(x)) for x in (d_token, 0.0 if d_lse is None else d_lse))
    gamma = np.abs(of_target) * d_token[:, None] * (1 - smoothing)
    u = flat_weight * d_token / V
    into_lse = gamma.sum(axis=1) + u * np.abs(of_class).sum() + np.abs(of_token) * d_token * z_loss * 2 * lse + d_lse
    flat = u[:, None] * np.abs(of_class) if smoothing else 0.0
    flows = Flows(np.where(np.isnan(into_lse), 0, into_lse), np.zeros(len(t)), gamma, flat)
    bounds = tolerances(expected, flows, keep_e, keep_c)
    if reduction == "mean" and exact.total_weight:
        slack = 1 + 4 * unit * np.abs(of_target).sum() / np.abs(exact.total_weight)
        bounds = tuple(x * slack for x in bounds)
    if reduction != "mean" or np.abs(exact.total_weight) > 1e-3 * np.abs(of_target).sum() or not of_target.any():
        check_against(wanted, grads, bounds)
    return result


ALONE = {
    "nothing else": {},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "class_weights": {"class_weights": True},
    "token_weights": {"token_weights": True},
    "everything": {"label_smoothing": 0.2, "z_loss": 0.1, "class_weights": True, "token_weights": True},
}


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alone", ALONE)
def test_each_alone(harness, edges, alone, reduction, softcap):
    rng = np.random.default_rng(0)
    case = make_case(1, (2, edges.n[-1] // 2 + 1), edges.v[-1] + 3, edges.d[-1] + 1, edges.dtype, ignored=0.2, bias=True)
    options = dict(ALONE[alone])
    for name, shape in (("class_weights", (len(case.c),)), ("token_weights", case.e.shape[:-1])):
        if name in options:
            options[name] = rng.uniform(0.2, 1.8, shape) * (rng.random(shape) < 0.9)
    case = case.with_options(reduction=reduction, shift=1, softcap=softcap, filter_eps=2.0**-8, **options)
    case = with_probs(case, 3, rng)
    shape = (2, case.e.shape[1] - 1)
    d_loss = rng.normal(size=shape) * (rng.random(shape) < 0.8) if reduction == "none" else 0.75
    check(harness, case, d_loss, 0.25)


@given(data=st.data())
def test_all_together(harness, edges, data):
    case = data.draw(cases(edges))
    case = data.draw(with_terms(case.with_options(**data.draw(filters()))))
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="seed of targets"))
    case = with_probs(case, data.draw(st.integers(1, 5), label="K"), rng)
    shift = int(case.options["shift"])
    shape = (*case.e.shape[:-2], case.e.shape[-2] - shift)
    per_token = case.options["reduction"] == "none" and data.draw(st.booleans(), label="d_loss per token")
    d_loss = rng.normal(size=shape) * (rng.random(shape) < 0.8) if per_token else data.draw(st.sampled_from([None, 2.5, 0.0]))
    d_lse = rng.normal(size=shape) if data.draw(st.booleans(), label="d_lse") else None
    check(harness, case, d_loss, d_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(harness, edges, dtype):
    harness.skip_unless_it_takes(dtype)
    case = make_case(2, (edges.n[-1] + 1,), edges.v[-1] + 3, edges.d[-1] + 1, dtype, ignored=0.2, bias=True, z_loss=0.1)
    check(harness, with_probs(case, 4, np.random.default_rng(1)))


def test_one_target_that_counts_1_is_a_target(harness, edges):
    case = make_case(3, (edges.n[-1] + 1,), edges.v[-1] + 3, edges.d[-1] + 1, edges.dtype, ignored=0.2, label_smoothing=0.1)
    several = dataclasses.replace(case, targets=case.targets[:, None])
    several = several.with_options(target_probs=np.ones(several.targets.shape))
    one, other = harness.forward(case), harness.forward(several)
    np.testing.assert_allclose(*(harness.numbers(x)["loss"] for x in (one, other)), rtol=1e-6)
    np.testing.assert_array_equal(harness.kept(one, len(case.c)), harness.kept(other, len(case.c)))
    for name in ("e", "c"):
        a, b = (getattr(harness.backward(x), name).astype(np.float64) for x in (one, other))
        assert_within(name, b, a, 1e-6 * np.abs(a).max() + 2.0**-8 * np.abs(a) * (case.e.dtype.itemsize == 2))


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_a_target_out_of_range_is_lost_whatever_it_counts(harness, edges, probability):
    """If the token has another target that counts, or it counts itself."""
    rng = np.random.default_rng(4)
    case = make_case(5, (edges.n[-1],), edges.v[-1], edges.d[-1], edges.dtype, check_targets=False, reduction="none")
    case = with_probs(case, 3, rng, padded=0.0)
    case.targets[1, 0], case.options["target_probs"][1] = len(case.c), [probability, 0.5, 0.25]
    result = check(harness, case)
    loss, grads = harness.numbers(result)["loss"], harness.backward(result)
    assert np.isnan(loss[1])
    assert np.isfinite(np.delete(loss, 1)).all()
    assert np.isnan(grads.e[1]).all()
    assert np.isnan(grads.c).all()


def test_probabilities_of_0_cost_nothing(harness, edges):
    """A token whose targets all count 0 takes no part, whatever stands in its row."""
    case = with_probs(make_case(6, (edges.n[-1],), edges.v[-1], edges.d[-1], edges.dtype), 2, np.random.default_rng(5), 0.0)
    case.options["target_probs"][2] = 0
    case.e[2] = np.nan
    grads = harness.backward(harness.forward(case))
    assert not grads.e[2].any()
    assert np.isfinite(grads.c).all()


def test_dropped_mass(harness, edges):
    case = make_case(7, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1], edges.dtype, spread=4.0, filter_eps=2.0**-4)
    case = with_probs(case, 3, np.random.default_rng(6))
    expected, result = expect_distribution(case), harness.forward(case)
    exact = reference.dropped_mass(np.exp(expected.log_p), harness.kept(result, len(case.c)))
    assert exact.max() > 0.01
    assert_within("dropped_mass", harness.host(result.dropped_mass()), exact, 1e-4)


def test_dropped_mass_of_the_unbiased_filter(harness, edges):
    """No target is ever left out by chance, whichever of its token's it is."""
    case = make_case(7, (edges.n[-1] + 1,), edges.v[-1] + 1, edges.d[-1], edges.dtype, spread=4.0)
    case = with_probs(case, 3, np.random.default_rng(6)).with_options(filter="unbiased", filter_eps=0.9)
    expected, result = expect_distribution(case), harness.forward(case)
    p, tokens, block = np.exp(expected.log_p), expected.tokens, result._statistics.survivor_block
    u = reference.draws(-(-len(p) // block), len(case.c), reference.draw_seed(tokens.ids[tokens.present]))
    dropped = np.zeros(len(p))
    for b in range(len(u)):
        rows = slice(b * block, (b + 1) * block)
        kept = p[rows].max(axis=0) > 0.9 * u[b]
        kept[tokens.ids[rows][tokens.present[rows]]] = True
        dropped[rows] = p[rows][:, ~kept].sum(axis=1)
    assert dropped.max() > 0.01
    assert_within("dropped_mass", harness.host(result.dropped_mass()), dropped, 1e-4)


ERRORS = [
    (ValueError, {"targets": (3, 2)}, ["targets:", "(3,)", "got (3, 2)", "target_probs"]),
    (ValueError, {"targets": (3, 2), "target_probs": (3, 1)}, ["target_probs:", "shape of targets", "(3, 1)", "(3, 2)"]),
    (ValueError, {"targets": (3,), "target_probs": (3,)}, ["target_probs:", "K"]),
    (ValueError, {"targets": (3, 0), "target_probs": (3, 0)}, ["targets:", "K", "(3, 0)"]),
    (ValueError, {"targets": (2, 2), "target_probs": (2, 2)}, ["targets:", "(3,)", "(2, 2)"]),
]


@pytest.mark.parametrize(("error", "shapes", "says"), ERRORS)
def test_what_does_not_fit(harness, edges, error, shapes, says):
    case = make_case(8, (3,), edges.v[-1], edges.d[-1], edges.dtype)
    arrays = [harness.device(x) for x in (case.e, case.c, np.zeros(shapes["targets"], int))]
    options = {"target_probs": harness.device(np.ones(shapes["target_probs"]))} if "target_probs" in shapes else {}
    with pytest.raises(error) as raised:
        cce.linear_cross_entropy(*arrays, backend=harness.backend, **options)
    assert all(part in str(raised.value) for part in says), str(raised.value)
