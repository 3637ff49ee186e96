"""The dense reference against finite differences, algebra, hard cases by hand, and PyTorch in float64."""

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import backward, forward, logit_gradient, logits, logsumexp, onehot, softmax
from reference.loss import shifted
from tests.helpers.dense import assert_close, assert_same_gradients, finite_difference

pytestmark = pytest.mark.filterwarnings("error")  # NaN and inf pass through silently

# Two sequences of five tokens, so that shift differs from slicing the flat tokens, with an ignored one inside, one at
# an end, and one that shift=1 cuts off. V and D differ from each other and from both batch sizes.
TARGETS = np.array([[-100, 2, 6, -100, 1], [0, 3, -100, 5, 3]])
V, D = 7, 3


def problem(seed=0, batch=TARGETS.shape, vocabulary=V, hidden=D):
    rng = np.random.default_rng(seed)
    e, c = rng.normal(size=(*batch, hidden)), rng.normal(size=(vocabulary, hidden))
    return e, c, rng.normal(size=vocabulary), rng


# ---------------------------------------------------------------- values


def test_loss_from_the_definition():
    """One token at a time, in Python floats, with none of NumPy's reductions."""
    e, c, bias, _ = problem()
    result = forward(e, c, TARGETS, bias=bias, softcap=2.0)
    losses = []
    for index in np.ndindex(TARGETS.shape):
        if TARGETS[index] == -100:
            assert result.nll[index] == result.lse[index] == result.target_logit[index] == 0
            continue
        dots = [sum(x * y for x, y in zip(e[index], row, strict=True)) + b for row, b in zip(c, bias, strict=True)]
        z = [2.0 * math.tanh(dot / 2.0) for dot in dots]
        lse = math.log(math.fsum(map(math.exp, z)))
        np.testing.assert_allclose(result.lse[index], lse, rtol=1e-14, equal_nan=False)
        np.testing.assert_allclose(result.target_logit[index], z[TARGETS[index]], rtol=1e-13, equal_nan=False)
        np.testing.assert_allclose(result.logits[len(losses)], z, rtol=1e-13, equal_nan=False)
        losses.append(lse - z[TARGETS[index]])
        np.testing.assert_allclose(result.nll[index], losses[-1], rtol=1e-13, equal_nan=False)
    assert result.n_valid == len(losses) == 7
    assert_close(result.loss, math.fsum(losses) / 7)


def test_reductions():
    e, c, bias, _ = problem()
    mean, total, none = (forward(e, c, TARGETS, bias=bias, reduction=r) for r in ("mean", "sum", "none"))
    assert none.loss.shape == TARGETS.shape
    assert_close(none.loss, none.nll)
    assert_close(total.loss, none.nll.sum())
    assert_close(mean.loss, total.loss / 7)
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        forward(e, c, TARGETS, reduction="avg")


@pytest.mark.parametrize("shift", [True, 1, 2, 4])
def test_shift_is_slicing(shift):
    e, c, bias, rng = problem()
    by_hand = e[:, :-shift], c, TARGETS[:, shift:]
    d_lse = rng.normal(size=by_hand[2].shape)
    shifted, sliced = forward(e, c, TARGETS, bias=bias, shift=shift), forward(*by_hand, bias=bias)
    assert shifted.nll.shape == by_hand[2].shape
    assert_close(shifted.nll, sliced.nll)
    assert_close(shifted.loss, sliced.loss)
    grads, expected = (
        backward(e, c, TARGETS, bias=bias, shift=shift, d_lse=d_lse),
        backward(*by_hand, d_lse=d_lse, bias=bias),
    )
    assert_close(grads.c, expected.c)
    assert_close(grads.e[:, :-shift], expected.e)
    assert not grads.e[:, -shift:].any()


def test_low_precision_inputs_are_exact_in_float64():
    e, c, _, _ = problem()
    e16, c16 = e.astype(ml_dtypes.bfloat16), c.astype(ml_dtypes.bfloat16)
    grads = backward(e16, c16, TARGETS)
    assert grads.e.dtype == grads.c.dtype == np.float64
    assert_close(grads.e, backward(e16.astype(np.float64), c16.astype(np.float64), TARGETS).e, tol=0)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_d_lse", [False, True])
def test_backward_is_the_finite_difference(reduction, shift, softcap, with_bias, with_d_lse):
    e, c, bias, rng = problem()
    parameters = [e, c, bias] if with_bias else [e, c]
    options = {"softcap": softcap, "reduction": reduction, "shift": shift}
    shape = forward(e, c, TARGETS, shift=shift).nll.shape
    d_loss = rng.normal(size=shape if reduction == "none" else ())
    d_lse = rng.normal(size=shape) if with_d_lse else None

    def objective():
        result = forward(e, c, TARGETS, bias=bias if with_bias else None, **options)
        return np.sum(d_loss * result.loss) + (np.sum(d_lse * result.lse) if with_d_lse else 0.0)

    grads = backward(e, c, TARGETS, d_loss=d_loss, d_lse=d_lse, bias=bias if with_bias else None, **options)
    assert (grads.bias is not None) == with_bias
    for parameter, actual in zip(parameters, (grads.e, grads.c, grads.bias), strict=False):
        assert_close(actual, finite_difference(objective, parameter), tol=1e-8)


def test_upstream_defaults():
    e, c, bias, _ = problem()
    for reduction in ("mean", "sum", "none"):
        default = backward(e, c, TARGETS, bias=bias, reduction=reduction)
        d_loss = np.ones(TARGETS.shape) if reduction == "none" else 1.0
        explicit = backward(e, c, TARGETS, bias=bias, reduction=reduction, d_loss=d_loss, d_lse=np.zeros(TARGETS.shape))
        assert_same_gradients(default, explicit)
    scalar_d_lse = backward(e, c, TARGETS, bias=bias, d_lse=0.5)
    assert_same_gradients(scalar_d_lse, backward(e, c, TARGETS, bias=bias, d_lse=np.full(TARGETS.shape, 0.5)))


def test_upstream_gradients_that_cancel_in_lse_leave_the_target_logit():
    """d_lse = -d_nll: what flows back is -d_nll to the target logit alone."""
    e, c, _, _ = problem()
    grads = backward(e, c, TARGETS, reduction="sum", d_loss=2.0, d_lse=-2.0)
    assert_close(grads.e, np.where((TARGETS == -100)[..., None], 0.0, -2.0 * c[TARGETS % V]))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([None, 2.0]), st.integers(-3, 3), st.integers(-3, 3))
def test_backward_is_linear_in_the_upstream_gradients(seed, softcap, x, y):
    e, c, bias, rng = problem(seed)
    (d_loss_1, d_loss_2), (d_lse_1, d_lse_2) = rng.normal(size=(2, 2, *TARGETS.shape))

    def vjp(d_loss, d_lse):
        return backward(e, c, TARGETS, d_loss=d_loss, d_lse=d_lse, bias=bias, softcap=softcap, reduction="none")

    one, two = vjp(d_loss_1, d_lse_1), vjp(d_loss_2, d_lse_2)
    both = vjp(x * d_loss_1 + y * d_loss_2, x * d_lse_1 + y * d_lse_2)
    for name in ("e", "c", "bias"):
        first, second = x * getattr(one, name), y * getattr(two, name)
        scale = np.max(np.abs(first)) + np.max(np.abs(second))  # the sum may cancel
        assert np.max(np.abs(getattr(both, name) - first - second)) <= 1e-13 * scale


# ---------------------------------------------------------------- algebra


@pytest.mark.parametrize("constant", [-3.0, 50.0])
def test_a_constant_on_all_logits_moves_only_lse(constant):
    e, c, bias, _ = problem()
    before, after = forward(e, c, TARGETS, bias=bias), forward(e, c, TARGETS, bias=bias + constant)
    valid = TARGETS != -100
    assert_close(after.loss, before.loss)
    assert_close(after.lse[valid], before.lse[valid] + constant)
    assert_same_gradients(backward(e, c, TARGETS, bias=bias + constant), backward(e, c, TARGETS, bias=bias))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(V)), st.sampled_from([None, 2.0]))
def test_permuting_the_vocabulary_permutes_the_gradients(seed, order, softcap):
    e, c, bias, rng = problem(seed)
    order, options = np.array(order), {"softcap": softcap, "d_lse": rng.normal(size=TARGETS.shape)}
    targets = np.where(TARGETS == -100, -100, np.argsort(order)[TARGETS % V])  # argsort: where each entry went
    grads, permuted = (
        backward(e, c, TARGETS, bias=bias, **options),
        backward(e, c[order], targets, bias=bias[order], **options),
    )
    assert_close(permuted.e, grads.e)
    assert_close(permuted.c, grads.c[order])
    assert_close(permuted.bias, grads.bias[order])


@settings(deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(TARGETS.size)))
def test_permuting_tokens_permutes_their_gradients(seed, order):
    e, c, bias, rng = problem(seed, batch=(TARGETS.size,))
    targets, d_lse = TARGETS.ravel(), rng.normal(size=TARGETS.size)
    result, permuted = forward(e, c, targets), forward(e[order], c, targets[order])
    assert_close(permuted.nll, result.nll[order])
    grads = backward(e, c, targets, bias=bias, d_lse=d_lse)
    moved = backward(e[order], c, targets[order], bias=bias, d_lse=d_lse[order])
    assert_close(moved.e, grads.e[order])
    assert_close(moved.c, grads.c)


def test_gradient_mass():
    """Softmax - onehot sums to 0 along the vocabulary, so only d_lse moves the sum of dbias."""
    e, c, bias, rng = problem()
    z, targets, ones = logits(e[0], c, bias), np.arange(5), np.ones(5)
    assert np.max(np.abs(logit_gradient(z, targets, ones, ones).sum(axis=-1))) <= 1e-15
    np.testing.assert_allclose(softmax(z).sum(axis=-1), ones, rtol=1e-14, equal_nan=False)
    np.testing.assert_array_equal(onehot(targets, V).sum(axis=-1), ones)
    grads = backward(e, c, TARGETS, bias=bias)
    assert abs(grads.bias.sum()) <= 1e-15 < 0.01 < np.abs(grads.bias).max()
    d_lse = rng.normal(size=TARGETS.shape)
    assert_close(backward(e, c, TARGETS, bias=bias, d_lse=d_lse).bias.sum(), d_lse[TARGETS != -100].sum())


# ---------------------------------------------------------------- terms and weights


def every_term(rng):
    """Options that turn on all of them; one token and one class weigh nothing."""
    class_weights, token_weights = rng.uniform(0.2, 2, V), rng.uniform(0.2, 2, TARGETS.shape)
    class_weights[3], token_weights[1, 1] = 0.0, 0.0
    scale = rng.uniform(0.5, 1.5, TARGETS.shape)
    weights = {"class_weights": class_weights, "token_weights": token_weights}
    return {"label_smoothing": 0.3, "z_loss": 0.2, "logit_scale": scale, **weights}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_backward_of_every_term_is_the_finite_difference(reduction, shift, softcap):
    e, c, bias, rng = problem()
    options = {"bias": bias, "softcap": softcap, "reduction": reduction, "shift": shift, **every_term(rng)}
    shape = forward(e, c, TARGETS, shift=shift).nll.shape
    d_loss, d_lse = rng.normal(size=shape if reduction == "none" else ()), rng.normal(size=shape)
    grads = backward(e, c, TARGETS, d_loss=d_loss, d_lse=d_lse, **options)

    def objective():
        result = forward(e, c, TARGETS, **options)
        return np.sum(d_loss * result.loss) + np.sum(d_lse * result.lse)

    for parameter, actual in zip((e, c, bias), (grads.e, grads.c, grads.bias), strict=True):
        assert_close(actual, finite_difference(objective, parameter), tol=1e-8)


def test_neutral_terms_change_nothing():
    e, c, bias, _ = problem()
    ones = {"logit_scale": np.ones(TARGETS.shape), "class_weights": np.ones(V), "token_weights": np.ones(TARGETS.shape)}
    for reduction in ("mean", "sum", "none"):
        plain, neutral = ({"bias": bias, "softcap": 2.0, "reduction": reduction, **terms} for terms in ({}, ones))
        assert_close(forward(e, c, TARGETS, **neutral).loss, forward(e, c, TARGETS, **plain).loss)
        assert_same_gradients(backward(e, c, TARGETS, **neutral), backward(e, c, TARGETS, **plain))


def test_a_logit_scale_is_a_scale_of_e_and_bias():
    e, c, bias, _ = problem()
    scaled, by_hand = forward(e, c, TARGETS, bias=bias, logit_scale=0.5), forward(e / 2, c, TARGETS, bias=bias / 2)
    assert_close(scaled.loss, by_hand.loss)
    assert_close(scaled.lse, by_hand.lse)


def test_a_weight_of_2_is_a_token_twice():
    e, c, bias, rng = problem(batch=(4,))
    targets, terms = np.array([0, 1, 2, 3]), {"label_smoothing": 0.1, "z_loss": 0.1, "class_weights": rng.uniform(0.2, 2, V)}
    weighted = forward(e, c, targets, bias=bias, token_weights=np.array([1, 2, 1, 0]), **terms)
    repeated = forward(e[[0, 1, 1, 2]], c, targets[[0, 1, 1, 2]], bias=bias, **terms)
    assert_close(weighted.loss, repeated.loss)
    assert weighted.n_valid == 4


def test_a_token_of_weight_0_takes_no_part():
    e, c, bias, rng = problem()
    options = {"bias": bias, **every_term(rng)}
    without = np.where(options["token_weights"] == 0, -100, TARGETS)
    e[options["token_weights"] == 0] = np.nan
    for reduction in ("mean", "sum"):
        result = forward(e, c, TARGETS, reduction=reduction, **options)
        assert_close(result.loss, forward(e, c, without, reduction=reduction, **options).loss)
        assert result.n_valid == 7
        grads = backward(e, c, TARGETS, reduction=reduction, **options)
        assert_same_gradients(grads, backward(e, c, without, reduction=reduction, **options))


def test_weights_that_sum_to_nothing_are_the_mean_of_nothing():
    e, c, bias, _ = problem()
    options = {"bias": bias, "class_weights": np.zeros(V), "z_loss": 0.1}
    assert np.isnan(forward(e, c, TARGETS, **options).loss)
    assert not backward(e, c, TARGETS, **options).c.any()
    assert backward(e, c, TARGETS, reduction="sum", **options).c.any()  # the z-loss has no class weights


def test_what_label_smoothing_takes_from_all_entries_is_never_filtered():
    e, c, bias, rng = problem()
    options = {"bias": bias, "label_smoothing": 0.2, "class_weights": rng.uniform(0.2, 2, V), "reduction": "sum"}
    nothing = np.zeros((7, V), bool)
    grads = backward(e, c, TARGETS, keep_e=nothing, keep_c=nothing, **options)
    assert_close(grads.bias, -7 * 0.2 / V * options["class_weights"])
    assert_close(grads.c, grads.bias[:, None] * e[TARGETS != -100].mean(axis=0))


# ---------------------------------------------------------------- keep masks


def test_keep_masks_choose_entries_of_g():
    e, c, bias, rng = problem()
    valid = TARGETS != -100
    n = int(valid.sum())
    d_loss = rng.normal(size=TARGETS.shape)
    d_loss[0, 2] = 0.0  # takes no part: the masks still have a row for it
    keep_e, keep_c = rng.random((2, n, V)) < 0.6
    g = logit_gradient(logits(e[valid], c, bias), TARGETS[valid], d_loss[valid], d_loss[valid])
    options = {"bias": bias, "reduction": "none", "d_loss": d_loss}
    grads = backward(e, c, TARGETS, keep_e=keep_e, keep_c=keep_c, **options)
    assert_close(grads.e[valid], (g * keep_e) @ c)
    assert_close(grads.c, (g * keep_c).T @ e[valid])
    assert_close(grads.bias, (g * keep_c).sum(axis=0))
    keep_all = np.ones((n, V), bool)
    assert_same_gradients(
        backward(e, c, TARGETS, keep_e=keep_all, keep_c=keep_all, **options), backward(e, c, TARGETS, **options)
    )


def test_a_dropped_entry_adds_nothing_even_where_its_factor_is_infinite():
    e, c, targets = np.ones((2, 2)), np.ones((4, 2)), np.array([0, 1])
    c[3] = -np.inf  # z = -inf, p = 0, and dE = 0 * -inf
    keep = np.array([[True, True, True, False]] * 2)
    assert np.isnan(backward(e, c, targets).e).all()
    assert_close(backward(e, c, targets, keep_e=keep).e, backward(e, c[:3], targets).e)
    c[3], e[1] = 1.0, np.nan  # the whole of dC is NaN by token 1, but what it is not kept in
    keep[1, :2] = False
    grads = backward(e, c, targets, bias=np.zeros(4), keep_c=keep)
    assert np.isnan(grads.c).all(axis=1).tolist() == np.isnan(grads.bias).tolist() == [False, False, True, False]


# ---------------------------------------------------------------- hard cases


def test_ignored_tokens_are_not_looked_at():
    e, c, bias, _ = problem()
    poisoned = np.where((TARGETS == -100)[..., None], np.nan, e)
    d_loss = np.where(TARGETS == -100, np.nan, 1.0)
    result = forward(poisoned, c, TARGETS, bias=bias)
    assert_close(result.nll, forward(e, c, TARGETS, bias=bias).nll, tol=0)
    grads = backward(poisoned, c, TARGETS, bias=bias, d_loss=d_loss, reduction="none")
    assert_same_gradients(grads, backward(e, c, TARGETS, bias=bias, reduction="none"), tol=0)
    assert not grads.e[TARGETS == -100].any()


def test_any_index_can_be_ignored():
    e, c, _, _ = problem()
    targets = np.where(TARGETS == -100, 4, TARGETS)
    assert_close(forward(e, c, targets, ignore_index=4).nll, forward(e, c, TARGETS).nll)
    assert forward(e, c, targets).n_valid == 10


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_token_is_nan_and_leaves_the_others_alone(poison):
    e, c, _, _ = problem()
    clean, clean_grads = forward(e, c, TARGETS), backward(e, c, TARGETS)
    e[1, 0, 0] = poison
    result, grads = forward(e, c, TARGETS), backward(e, c, TARGETS)
    others = np.ones(TARGETS.shape, bool)
    others[1, 0] = False
    assert np.isnan(result.nll[1, 0])
    assert np.isnan(result.loss)
    assert np.isnan(grads.e[1, 0]).all()
    assert_close(result.nll[others], clean.nll[others], tol=1e-15)
    assert_close(grads.e[others], clean_grads.e[others])
    assert np.isnan(grads.c).all()


def test_a_token_without_upstream_gradient_takes_no_part():
    e, c, bias, _ = problem()
    e[1, 0] = np.nan
    d_loss = np.ones(TARGETS.shape)
    d_loss[1, 0] = 0.0
    without = np.where(d_loss == 0, -100, TARGETS)
    grads = backward(e, c, TARGETS, bias=bias, d_loss=d_loss, reduction="none")
    assert_same_gradients(grads, backward(e, c, without, bias=bias, reduction="none"))
    d_lse = np.zeros(TARGETS.shape)
    d_lse[1, 0] = -1.0  # now a = b = -1
    assert np.isnan(backward(e, c, TARGETS, d_loss=d_loss, d_lse=d_lse, reduction="none").e[1, 0]).all()


@pytest.mark.parametrize("target", [-1, V, 2**40])
def test_a_target_outside_the_vocabulary_is_nan(target):
    e, c, bias, _ = problem()
    targets, others = TARGETS.copy(), TARGETS != -100
    targets[1, 0], others[1, 0] = target, False
    result, grads = forward(e, c, targets, bias=bias), backward(e, c, targets, bias=bias)
    assert np.isnan(result.target_logit[1, 0])
    assert np.isnan(result.nll[1, 0])
    assert np.isnan(result.loss)
    assert_close(result.lse, forward(e, c, TARGETS, bias=bias).lse, tol=0)
    assert_close(result.nll[others], forward(e, c, TARGETS, bias=bias).nll[others], tol=0)
    assert np.isnan(grads.e[1, 0]).all()
    assert np.isnan(grads.c).all()
    assert np.isnan(grads.bias).all()
    assert_close(grads.e[others], backward(e, c, TARGETS, bias=bias).e[others])


@pytest.mark.parametrize(("shape", "shift"), [((0,), 0), ((3, 0), 1), ((4,), 0), ((2, 4), 4), ((2, 4), 5)])
def test_no_tokens(shape, shift):
    """No tokens at all, none but ignored ones, and none left by the shift."""
    e, c, bias, _ = problem(batch=shape)
    targets = np.full(shape, 1 if shift else -100)
    for reduction in ("mean", "sum", "none"):
        options = {"bias": bias, "shift": shift, "reduction": reduction}
        result, grads = forward(e, c, targets, **options), backward(e, c, targets, d_lse=1.0, **options)
        assert result.n_valid == 0
        assert result.logits.shape == (0, V)
        assert shifted(e, targets, shift)[0].shape[:-1] == result.nll.shape
        expected = {"mean": np.isnan, "sum": lambda x: x == 0, "none": lambda x: not x.any()}[reduction]
        assert expected(result.loss)
        assert grads.e.shape == e.shape
        assert not grads.e.any()
        assert grads.c.shape == c.shape
        assert not grads.c.any()
        assert not grads.bias.any()


def test_smallest_problems():
    only_choice = forward(np.ones((2, 3)), np.ones((1, 3)), np.array([0, 0]))
    assert only_choice.loss == 0
    assert not backward(np.ones((2, 3)), np.ones((1, 3)), np.array([0, 0])).c.any()
    no_features = forward(np.ones((2, 0)), np.ones((4, 0)), np.array([0, 3]))
    np.testing.assert_allclose(no_features.loss, np.log(4.0), rtol=1e-15, equal_nan=False)
    e, c, _, _ = problem(batch=())  # a single token without any batch dimension
    result, grads = forward(e, c, np.array(2)), backward(e, c, np.array(2))
    assert result.nll.shape == ()
    assert grads.e.shape == (D,)
    assert_close(grads.e, backward(e[None], c, np.array([2])).e[0])


def test_logsumexp_at_the_edges():
    inf, nan = np.inf, np.nan
    rows = np.array([[-inf, -inf], [-inf, 2.0], [1e4, 1e4], [-1e4, -1e4], [inf, 0.0], [nan, 0.0]])
    lse = logsumexp(rows)
    np.testing.assert_allclose(lse[:4], [-inf, 2.0, 1e4 + np.log(2), -1e4 + np.log(2)], rtol=1e-15, equal_nan=False)
    assert np.isnan(lse[4:]).all()


def test_a_vocabulary_entry_masked_by_its_bias_is_as_good_as_absent():
    e, c, bias, _ = problem()
    bias[4] = -np.inf  # TARGETS has no 4
    others = np.arange(V) != 4
    targets = np.where(TARGETS > 4, TARGETS - 1, TARGETS)
    grads, expected = backward(e, c, TARGETS, bias=bias), backward(e, c[others], targets, bias=bias[others])
    assert_close(grads.e, expected.e)
    assert_close(grads.c[others], expected.c)
    assert not grads.c[4].any()
    impossible = forward(e, c, TARGETS, bias=np.full(V, -np.inf))
    assert np.isnan(impossible.nll[TARGETS != -100]).all()
    assert (impossible.lse[TARGETS != -100] == -np.inf).all()


# ---------------------------------------------------------------- PyTorch

TORCH_OPTIONS = list(itertools.product(["mean", "sum", "none"], [0, 1], [None, 1.5], [False, True], [False, True]))


@pytest.mark.parametrize(("reduction", "shift", "softcap", "with_bias", "with_d_lse"), TORCH_OPTIONS)
def test_against_torch(reduction, shift, softcap, with_bias, with_d_lse):
    torch = pytest.importorskip("torch")
    e, c, bias, rng = problem(seed=1)
    parameters = [torch.tensor(x, requires_grad=True) for x in ((e, c, bias) if with_bias else (e, c))]
    targets = torch.tensor(TARGETS)[:, shift:].reshape(-1)
    z = parameters[0][:, : TARGETS.shape[1] - shift].reshape(-1, D) @ parameters[1].T
    z = z + parameters[2] if with_bias else z
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    lse = torch.where(targets == -100, 0.0, torch.logsumexp(z, dim=-1))
    loss = torch.nn.functional.cross_entropy(z, targets, ignore_index=-100, reduction=reduction)

    shape = TARGETS[:, shift:].shape
    d_loss = rng.normal(size=shape if reduction == "none" else ())
    d_lse = rng.normal(size=shape) if with_d_lse else np.zeros(shape)
    ((torch.tensor(d_loss).reshape(loss.shape) * loss).sum() + (torch.tensor(d_lse).reshape(-1) * lse).sum()).backward()

    options = {"bias": bias if with_bias else None, "softcap": softcap, "reduction": reduction, "shift": shift}
    result = forward(e, c, TARGETS, **options)
    assert_close(np.ravel(result.loss), np.ravel(loss.detach().numpy()))
    assert_close(np.ravel(result.lse), lse.detach().numpy())
    grads = backward(e, c, TARGETS, d_loss=d_loss, d_lse=d_lse if with_d_lse else None, **options)
    for parameter, actual in zip(parameters, (grads.e, grads.c, grads.bias), strict=False):
        assert_close(actual, parameter.grad.numpy())


TERMS = ("label_smoothing", "z_loss", "logit_scale", "class_weights", "token_weights")
CHOICES = [{name for name, on in zip(TERMS, choice, strict=True) if on} for choice in itertools.product((0, 1), repeat=5)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "+".join(sorted(choice)) or "none")
def test_terms_against_torch(choice, softcap, reduction):
    """`F.cross_entropy` is the whole loss but for the z-loss and the token weights, and then all of its reductions are ours."""
    torch = pytest.importorskip("torch")
    e, c, bias, rng = problem(seed=2)
    options = {name: value for name, value in every_term(rng).items() if name in choice}
    d_loss = rng.normal(size=TARGETS.shape if reduction == "none" else ())
    parameters = [torch.tensor(x, requires_grad=True) for x in (e, c, bias)]
    z = parameters[0].reshape(-1, D) @ parameters[1].T + parameters[2]
    z = z * torch.tensor(np.ravel(options.get("logit_scale", np.ones(TARGETS.shape))))[:, None]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    weight = torch.tensor(options["class_weights"]) if "class_weights" in choice else None
    targets, smoothing = torch.tensor(TARGETS).reshape(-1), options.get("label_smoothing", 0.0)

    def cross_entropy(reduction):
        return torch.nn.functional.cross_entropy(z, targets, weight=weight, label_smoothing=smoothing, reduction=reduction)

    if choice & {"z_loss", "token_weights"}:
        counts = torch.tensor(np.ravel(np.where(TARGETS == -100, 0.0, options.get("token_weights", 1.0))))
        loss = counts * (cross_entropy("none") + options.get("z_loss", 0.0) * torch.logsumexp(z, dim=-1) ** 2)
        if reduction != "none":
            of_target = 1.0 if weight is None else weight[targets.clamp(min=0)]
            loss = loss.sum() / ((counts * of_target).sum() if reduction == "mean" else 1.0)
    else:
        loss = cross_entropy(reduction)
    (torch.tensor(d_loss).reshape(loss.shape) * loss).sum().backward()

    options |= {"bias": bias, "softcap": softcap, "reduction": reduction}
    assert_close(np.ravel(forward(e, c, TARGETS, **options).loss), np.ravel(loss.detach().numpy()))
    grads = backward(e, c, TARGETS, d_loss=d_loss, **options)
    for parameter, actual in zip(parameters, (grads.e, grads.c, grads.bias), strict=True):
        assert_close(actual, parameter.grad.numpy())


def test_no_valid_token_as_in_torch():
    torch = pytest.importorskip("torch")
    z, targets = torch.zeros(2, 3), torch.full((2,), -100)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        theirs = torch.nn.functional.cross_entropy(z, targets, reduction=reduction).item()
        ours = forward(np.zeros((2, 1)), np.zeros((3, 1)), targets.numpy(), reduction=reduction).loss
        np.testing.assert_array_equal([theirs, ours], [expected, expected])  # NaN is expected for "mean"
