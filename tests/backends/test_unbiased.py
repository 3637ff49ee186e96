"""The unbiased filter on every backend that has it: it does what the reference says, and is right on average."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import cce_numba as cce
import reference
from cce_numba import survivors
from cce_numba.cpu import backward
from tests.helpers.cases import Case, cases, make_case, with_terms
from tests.helpers.checks import check_gradients, expect, probability_margin, shifted_targets, unbiased_scales
from tests.helpers.harness import CpuHarness, SimulatorHarness

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FLOAT64 = np.dtype(np.float64)
EPS = st.sampled_from([0.9, 2.0**-2, 2.0**-4, 2.0**-6, 2.0**-9, "auto"])
FEW = settings(max_examples=12 if SimulatorHarness.is_active() else 60)


def scales_of(case, result, expected, part):
    """(n_valid, V) what the reference multiplies G by, of a drawn case; one within rounding of a draw is drawn anew."""
    scales = unbiased_scales(result, expected, part)
    assume(scales is not None)
    return scales


def certain_scales(result, expected):
    """(n_valid, V) what the reference multiplies G by, of a case that is not within rounding of a draw."""
    scales = unbiased_scales(result, expected)
    assert scales is not None
    return scales


def unbiased(case, data):
    options = {"filter_eps": data.draw(EPS, label="eps"), "filter_seed": data.draw(st.integers(-5, 2**33), label="seed")}
    return case.with_options(filter="unbiased", **options)


def dtype_for(harness):
    """float64, in which little is within rounding of a draw, or what the backend has instead."""
    dtypes = harness.edges.dtypes
    return FLOAT64 if FLOAT64 in dtypes else dtypes[-1]


def in_few_kernels(harness, case):
    """On tensor cores, where each combination of options is compiled by itself for half a minute: two combinations."""
    if harness.backend not in ("hopper", "ampere"):
        return case
    case = Case(*(array.astype(dtype_for(harness)) for array in (case.e, case.c)), case.targets, dict(case.options))
    bias, softcap = case.options.get("bias"), case.options.get("softcap")
    bias = np.zeros(len(case.c), np.float32) if bias is None else bias.astype(np.float32)
    scale = None if softcap is None else case.options.get("logit_scale")
    if softcap is not None and scale is None:
        scale = 0.625
    return case.with_options(bias=bias, logit_scale=scale, label_smoothing=0.0)


def takes_part(expected):
    """(n_valid,) whether a token has a weight that is not 0: of its target, of the softmax."""
    options, (of_token, of_target, of_class) = expected.case.options, expected.weights
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    by_token = smoothing * of_class.mean() != 0 or z_loss != 0
    return (of_target * (1 - smoothing) != 0) | (by_token & (of_token != 0))


@FEW
@given(data=st.data())
def test_what_is_kept_and_what_it_is_multiplied_by(harness, edges, data):
    """For any sizes, dtype and terms of the loss, and each gradient filtered or exact."""
    case = in_few_kernels(harness, data.draw(with_terms(data.draw(cases(edges)))))
    exact = data.draw(st.sampled_from([{}, {}, {"filter_e_grad": False}, {"filter_c_grad": False}]), label="exact")
    case = unbiased(case, data).with_options(**exact)
    expected, result = expect(case), harness.forward(case)
    part = takes_part(expected)
    scales = scales_of(case, result, expected, part)
    kept = harness.kept(result, len(case.c))
    if kept is not None and len(kept) and part.all():
        assert kept[scales != 0].all(), "the forward keeps at least as much"
    check_gradients(expected, harness.backward(result), scales)


@FEW
@given(data=st.data())
def test_upstream_gradients_of_any_sign_and_none(harness, edges, data):
    """Tokens to which nothing flows back have no say in what is kept."""
    case = in_few_kernels(harness, data.draw(cases(edges, smallest_n=1)))
    case = unbiased(case, data).with_options(reduction="none")
    expected, result = expect(case), harness.forward(case)
    rng = np.random.default_rng(data.draw(st.integers(0, 99), label="upstream"))
    shape = expected.forward.nll.shape
    d_loss, d_lse = rng.normal(size=(2, *shape)).astype(np.float32) * (rng.random(shape) < 0.6)
    part = (d_loss != 0)[expected.valid]
    check_gradients(expected, harness.backward(result, d_loss, d_lse), scales_of(case, result, expected, part), d_loss, d_lse)


def poisoned(harness, edges, *, token, **options):
    """A case whose token is lost, in the first of several blocks, and what the reference makes of it."""
    case = make_case(7, (3 * edges.n[1],), edges.v[-1] + 1, edges.d[-1], dtype_for(harness), spread=1.0)
    case = case.with_options(filter="unbiased", filter_eps=0.1, check_targets=False, reduction="sum", **options)
    if token == "target":
        case.targets[0] = len(case.c)
    else:
        case.e[0, 0] = token
    return case


@pytest.mark.parametrize("token", [np.nan, np.inf, "target"])
def test_a_lost_token_keeps_its_block_as_it_is(harness, edges, token):
    case = poisoned(harness, edges, token=token)
    expected, result = expect(case), harness.forward(case)
    scales = certain_scales(result, expected)
    block = result._statistics.survivor_block
    assert (scales[:block] == 1).all()
    assert (scales[block:] == 0).any()
    check_gradients(expected, harness.backward(result), scales)
    grads = harness.backward(result)
    assert np.isnan(grads.c).all()
    assert np.isfinite(grads.e[1:]).all()


def test_a_lost_token_without_weight_has_no_say(harness, edges):
    weights = np.ones(3 * edges.n[1])
    weights[0] = 0
    grads = []
    for token in (np.nan, 0.5):
        case = poisoned(harness, edges, token=token, token_weights=weights)
        grads.append(harness.backward(harness.forward(case)))
    for name in ("e", "c"):
        ours, clean = (getattr(each, name).astype(np.float64) for each in grads)
        rounding = 1e-12 if dtype_for(harness) == FLOAT64 else 2.0**-7  # the NaN flags more columns: sums have another order
        np.testing.assert_allclose(ours, clean, rtol=rounding, atol=rounding * np.abs(clean).mean())


# ---- wrong rules, so the checks above can fail


def never_multiplied(scales, targets):
    return np.minimum(scales, 1)


def targets_too(scales, targets):
    return np.where(targets, 2 * scales, scales)


@pytest.mark.parametrize("wrong", [None, never_multiplied, targets_too, "other draws"])
def test_a_wrong_rule_is_found(monkeypatch, wrong):
    """Columns that survive are not multiplied; targets are; each call has draws of its own."""
    harness, draw_seed, scales_of_part = CpuHarness(), survivors.draw_seed, backward._scales
    case = make_case(11, (300,), 200, 8, FLOAT64, spread=1.0, filter="unbiased", filter_eps=0.1, reduction="sum")
    expected = expect(case)
    scales = certain_scales(harness.forward(case), expected)

    def by_another_rule(p, statistics, part, z, block):
        columns = np.arange(block.start, block.stop) if part.columns is None else block.start + part.columns
        return wrong(scales_of_part(p, statistics, part, z, block), np.isin(columns, p.targets[part.tokens]))

    if wrong == "other draws":
        monkeypatch.setattr(survivors, "draw_seed", lambda targets, number: draw_seed(targets, number) ^ 1)
    elif wrong is not None:
        monkeypatch.setattr(backward, "_scales", by_another_rule)
    found = harness.backward(harness.forward(case))
    if wrong is None:
        check_gradients(expected, found, scales)
        return
    for name in ("e", "c"):
        alone = dataclasses.replace(found, **{other: None for other in ("e", "c") if other != name})
        with pytest.raises(AssertionError, match=f"grads.{name}"):
            check_gradients(expected, alone, scales)


# ---- draws


def some_case(edges, **options):
    case = make_case(3, (edges.n[-1] + 3,), edges.v[-1] + 5, edges.d[-1], edges.dtype, ignored=0.1, bias=True)
    return case.with_options(filter="unbiased", filter_eps=0.1, reduction="sum", **options)


def bits(grads):
    return [getattr(grads, name).tobytes() for name in ("e", "c", "bias")]


def test_the_same_inputs_and_seed_give_the_same_bits(harness, edges):
    case = some_case(edges, filter_seed=4)
    result = harness.forward(case)
    first = bits(harness.backward(result))
    assert first == bits(harness.backward(result)) == bits(harness.backward(harness.forward(case)))
    for seed in (np.array(4), np.array(4, np.int32), np.int64(4 + 2**32)):
        assert first == bits(harness.backward(harness.forward(case.with_options(filter_seed=seed))))
    _, both = cce.linear_cross_entropy_with_grad(*harness._arrays(case), **harness._options(case))
    assert first == bits(dataclasses.replace(both, **{n: harness.host(getattr(both, n)) for n in ("e", "c", "bias")}))


def test_another_seed_or_another_target_draws_anew(harness, edges):
    case = some_case(edges)
    seeds = {int(harness.host(harness.forward(case.with_options(filter_seed=k))._statistics.draw_seed)) for k in range(5)}
    assert len(seeds) == 5
    targets = case.targets.copy()
    targets[np.flatnonzero(targets >= 0)[0]] ^= 1
    assert int(harness.host(harness.forward(Case(case.e, case.c, targets, case.options))._statistics.draw_seed)) not in seeds
    grads = [bits(harness.backward(harness.forward(case.with_options(filter_seed=k)))) for k in range(2)]
    assert all(a != b for a, b in zip(*grads, strict=True))


def test_what_is_in_ignored_rows_does_not_matter(harness, edges):
    case = some_case(edges)
    before = bits(harness.backward(harness.forward(case)))
    case.e[case.targets < 0] = np.nan
    assert before == bits(harness.backward(harness.forward(case)))


def test_gradients_are_added_to_what_is_there(harness, edges):
    case = some_case(edges).with_options(filter_c_grad=False)
    result = harness.forward(case)
    fresh = harness.backward(result)
    out = cce.Gradients(*(harness.device(np.ones_like(getattr(fresh, name))) for name in ("e", "c", "bias")))
    added = harness.backward(result, out=out, accumulate=True)
    for name in ("e", "c", "bias"):
        wide, there = getattr(fresh, name).astype(np.float64), getattr(added, name).astype(np.float64)
        rounding = 1e-5 if edges.dtype == np.float32 else 2.0**-7
        np.testing.assert_allclose(there, 1 + wide, rtol=rounding, atol=rounding)


# ---- what a result says


def test_the_dropped_mass_is_that_of_these_draws(harness, edges):
    dtype = dtype_for(harness)
    case = make_case(3, (2 * edges.n[1] + 3,), edges.v[2] + 5, 8, dtype, ignored=0.1, filter="unbiased", filter_eps=0.1)
    expected, result = expect(case), harness.forward(case)
    scales = certain_scales(result, expected)
    mass = harness.host(result.dropped_mass())[expected.valid]
    exact, rounding = reference.dropped_mass(reference.softmax(expected.forward.logits), scales != 0), 1e-12
    if dtype != FLOAT64:
        rounding = probability_margin(expected).max() - 1
    np.testing.assert_allclose(mass, exact, atol=rounding)
    assert mass.max() > 0
    block = result._statistics.survivor_block
    assert (harness.host(result.survivor_counts()) >= (scales != 0)[::block].sum(axis=1)).all()
    assert "by chance" in result.plan.filter


# ---- right on average


def shares(case, expected, d_loss, d_lse, block):
    """What each column of each block adds to the gradients, in float64: (V, ..., D) to dE, (n_blocks, V, D) to dC.

    A block of one token gives what each token adds to dC.
    """
    n, V = expected.forward.logits.shape
    given = {"d_loss": d_loss, "d_lse": d_lse, **expected.options}

    def only(keep):
        return reference.backward(case.e, case.c, case.targets, keep_e=keep, keep_c=keep, **given)

    nothing = only(np.zeros((n, V), bool))
    to_e = [only(np.broadcast_to(np.arange(V) == v, (n, V))).e - nothing.e for v in range(V)]
    of_block = np.arange(n) // block
    to_c = [only(np.broadcast_to((of_block == b)[:, None], (n, V))).c - nothing.c for b in range(-(-n // block))]
    return np.array(to_e), np.array(to_c)


def check_mean(harness, case, K, d_loss=None, d_lse=None):
    """The mean over K seeds is within 6 standard deviations of the exact gradients; returns the errors in those.

    A column with scale s = eps / pmax has the variance s - 1, times the square of what it adds. Columns are independent. Draws
    of one column in different blocks are not, but its deviation is at most the sum of theirs.
    """
    expected = expect(case)
    result = harness.forward(case)
    block, eps = result._statistics.survivor_block, case.options["filter_eps"]
    targets, (n, V) = shifted_targets(expected), expected.forward.logits.shape
    certain = reference.roulette(reference.softmax(expected.forward.logits), targets, eps, np.zeros((-(-n // block), V)), block)
    deviation = np.sqrt(certain - 1)
    to_e, to_c = shares(case, expected, d_loss, d_lse, block)
    of_tokens = np.zeros((V, *expected.valid.shape))
    of_tokens[:, expected.valid] = reference.of_tokens(deviation, n, block).T
    allowed_e = np.sqrt(np.sum((of_tokens[..., None] * to_e) ** 2, axis=0) / K)
    allowed_c = np.sum(np.abs(deviation[..., None] * to_c), axis=0) / np.sqrt(K)
    each = [harness.backward(harness.forward(case.with_options(filter_seed=k)), d_loss, d_lse) for k in range(K)]
    exact = harness.backward(harness.forward(case.with_options(filter_eps=None)), d_loss, d_lse)
    errors = []
    # Of what is summed up, G and the gradients are rounded, if they have 16 bits.
    of_each = 0 if case.e.dtype == FLOAT64 else shares(case, expected, d_loss, d_lse, 1)[1]
    added_e, added_c = np.abs(to_e).sum(axis=0), np.sum(np.abs(of_each), axis=0)
    for name, allowed, added in (("e", allowed_e, added_e), ("c", allowed_c, added_c)):
        mean = np.mean([getattr(grads, name).astype(np.float64) for grads in each], axis=0)
        true = getattr(exact, name).astype(np.float64)
        error = np.abs(mean - true)
        # Of 16 bits: G and what it adds up to are rounded, by 2^-9 each, in both of the two that are compared.
        rounding = 1e-9 * (1 + np.abs(true)) + (0 if case.e.dtype == FLOAT64 else 4 * 2.0**-9) * added
        assert (error <= 6 * allowed + rounding).all(), f"d{name}: {np.max(error / (allowed + 1e-9))}"
        errors.append((error, allowed))
    return errors


def case_to_average(seed, dtype=FLOAT64, **options):
    """Entries that are nobody's target, and a threshold at which no column is multiplied by more than 12.

    Sums of rare and large numbers converge slowly.
    """
    simulated = SimulatorHarness.is_active()
    shape, V = (6,) if simulated else (140,), 14 if simulated else 60
    case = make_case(seed, shape, V, 3, dtype, spread=1.0, ignored=0.1, **options)
    case.targets[case.targets >= 0] %= 4
    return case.with_options(filter="unbiased")


def with_eps(harness, case):
    block, p = 4 if SimulatorHarness.is_active() else 128, reference.softmax(expect(case).forward.logits)
    if harness.backend == "simt" and not SimulatorHarness.is_active():
        block = 64  # the portable kernels' in float64
    largest = np.maximum.reduceat(p, np.arange(0, len(p), block), axis=0)
    return case.with_options(filter_eps=float(min(0.9, 12.0 * largest.min())))


@settings(max_examples=3 if SimulatorHarness.is_active() else 12, derandomize=True)
@given(data=st.data())
def test_gradients_are_right_on_average(harness, data):
    """For weights of any sign, and any terms of the loss."""
    softcap = data.draw(st.sampled_from([None, None, 3.0]), label="softcap")
    case = case_to_average(data.draw(st.integers(0, 99), label="seed"), dtype_for(harness), softcap=softcap)
    case = data.draw(with_terms(case)).with_options(reduction="none", token_weights=None, class_weights=None)
    case = in_few_kernels(harness, case)
    d_loss, d_lse = np.random.default_rng(1).normal(size=(2, *case.targets.shape))
    check_mean(harness, with_eps(harness, case), 8 if SimulatorHarness.is_active() else 64, d_loss, d_lse)


def test_errors_fall_as_one_over_the_square_root():
    """And are as large as the variance says: between half and twice of it, as a root mean square over many elements."""
    harness = CpuHarness()
    case = with_eps(harness, case_to_average(2, reduction="sum"))
    for K in (16, 256):
        (error, allowed), (error_c, allowed_c) = check_mean(harness, case, K)
        assert 0.5 <= np.sqrt(np.sum(error**2) / np.sum(allowed**2)) <= 2
        assert 0 < np.sum(error_c**2) <= 4 * np.sum(allowed_c**2)


def test_dropping_is_not_right_on_average():
    """So the checks above can fail."""
    harness = CpuHarness()
    case = with_eps(harness, case_to_average(2, reduction="sum")).with_options(filter="drop")
    with pytest.raises(AssertionError, match=r"d[ec]: "):
        check_mean(harness, case, 256)
