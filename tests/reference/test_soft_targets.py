"""A few targets a token, with probabilities: against one target, repeated tokens, finite differences, PyTorch in float64."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import backward, forward
from tests.helpers.dense import assert_close, assert_near, assert_same_gradients, finite_difference

pytestmark = pytest.mark.filterwarnings("error")  # NaN and inf pass through silently

V, D, K = 7, 3, 3
# Padding inside, at an end, everywhere (the second token), nowhere; a target twice in one token; one that shift=1 cuts off.
TARGETS = np.array(
    [[[3, -100, 1], [-100, -100, -100], [2, 2, 5], [-100, 6, 0]], [[0, 1, 4], [5, 4, 6], [-100, -100, 1], [6, 0, -100]]]
)
BATCH = TARGETS.shape[:-1]


def problem(seed=0):
    """e, c, bias, probabilities of TARGETS (whose sums are not 1, and NaN where padded), and what else is random."""
    rng = np.random.default_rng(seed)
    t = np.where(TARGETS == -100, np.nan, rng.uniform(0.1, 1, TARGETS.shape))
    return rng.normal(size=(*BATCH, D)), rng.normal(size=(V, D)), rng.normal(size=V), t, rng


def every_term(rng, z_loss=0.2):
    """Options that turn on all of them; one token and one class weigh nothing."""
    class_weights, token_weights = rng.uniform(0.2, 2, V), rng.uniform(0.2, 2, BATCH)
    class_weights[3], token_weights[1, 1] = 0.0, 0.0
    scale = rng.uniform(0.5, 1.5, BATCH)
    weights = {"class_weights": class_weights, "token_weights": token_weights}
    return {"label_smoothing": 0.3, "z_loss": z_loss, "logit_scale": scale, **weights}


def drawn_upstream(rng, shape, reduction):
    return {"d_loss": rng.normal(size=shape if reduction == "none" else ()), "d_lse": rng.normal(size=shape)}


# ---------------------------------------------------------------- one target


@settings(deadline=None)
@given(
    st.integers(0, 2**32),
    st.booleans(),
    st.sampled_from(["mean", "sum", "none"]),
    st.sampled_from([None, 2.0]),
    st.integers(0, 4),
)
def test_one_target_of_probability_1_is_the_loss(seed, terms, reduction, softcap, shift):
    e, c, bias, _, rng = problem(seed)
    targets = np.where(rng.random(BATCH) < 0.3, -100, rng.integers(-1, V + 1, BATCH))
    options = {"bias": bias, "reduction": reduction, "softcap": softcap, "shift": shift, **(every_term(rng) if terms else {})}
    soft = {"targets": targets[..., None], "target_probs": np.ones((*BATCH, 1))}
    one, many = forward(e, c, targets, **options), forward(e, c, **soft, **options)
    assert many.target_logit.shape == (*one.lse.shape, 1)
    for name in ("logits", "lse", "nll", "loss", "n_valid", "total_weight"):
        np.testing.assert_array_equal(getattr(many, name), getattr(one, name), strict=True)
    np.testing.assert_array_equal(many.target_logit[..., 0], one.target_logit)
    upstream = drawn_upstream(rng, one.lse.shape, reduction)
    expected, grads = backward(e, c, targets, **upstream, **options), backward(e, c, **soft, **upstream, **options)
    for name in ("e", "c", "bias"):
        np.testing.assert_array_equal(getattr(grads, name), getattr(expected, name))


# ---------------------------------------------------------------- many


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("terms", [False, True])
def test_many_targets_are_as_many_tokens(reduction, softcap, terms):
    """K tokens with the same row of e, one target each, and weights token_weight * t_k. No z-loss: that is the token's own."""
    e, c, bias, t, rng = problem()
    options = {"bias": bias, "softcap": softcap, "reduction": reduction, **(every_term(rng, z_loss=0.0) if terms else {})}
    repeated = dict(options)
    repeated["token_weights"] = np.asarray(options.get("token_weights", np.ones(BATCH)))[..., None] * np.nan_to_num(t)
    if terms:
        repeated["logit_scale"] = np.repeat(options["logit_scale"][..., None], K, axis=-1)
    e_repeated = np.repeat(e[..., None, :], K, axis=-2)
    soft, hard = forward(e, c, TARGETS, target_probs=t, **options), forward(e_repeated, c, TARGETS, **repeated)
    assert_close(soft.loss, hard.loss.sum(axis=-1) if reduction == "none" else hard.loss)
    assert_close(soft.total_weight, hard.total_weight)
    assert_close(soft.nll, np.sum(np.nan_to_num(t) * hard.nll, axis=-1))
    assert_close(soft.target_logit, hard.target_logit)
    assert (soft.n_valid, hard.n_valid) == (7, 16)
    d_loss = drawn_upstream(rng, BATCH, reduction)["d_loss"]
    d_repeated = np.repeat(d_loss[..., None], K, axis=-1) if reduction == "none" else d_loss
    grads = backward(e, c, TARGETS, target_probs=t, d_loss=d_loss, **options)
    expected = backward(e_repeated, c, TARGETS, d_loss=d_repeated, **repeated)
    assert_close(grads.e, expected.e.sum(axis=-2))
    assert_close(grads.c, expected.c)
    assert_close(grads.bias, expected.bias)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("terms", [False, True])
def test_backward_is_the_finite_difference(reduction, shift, softcap, terms):
    e, c, bias, t, rng = problem()
    options = {"bias": bias, "softcap": softcap, "reduction": reduction, "shift": shift, **(every_term(rng) if terms else {})}
    upstream = drawn_upstream(rng, (BATCH[0], BATCH[1] - shift), reduction)

    def objective():
        result = forward(e, c, TARGETS, target_probs=t, **options)
        return np.sum(upstream["d_loss"] * result.loss) + np.sum(upstream["d_lse"] * result.lse)

    grads = backward(e, c, TARGETS, target_probs=t, **upstream, **options)
    for parameter, actual in zip((e, c, bias), (grads.e, grads.c, grads.bias), strict=True):
        assert_close(actual, finite_difference(objective, parameter), tol=1e-8)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(-3, 3), st.integers(-3, 3))
def test_the_loss_is_linear_in_the_probabilities(seed, x, y):
    e, c, bias, t, rng = problem(seed)
    options = {"bias": bias, "reduction": "sum", **every_term(rng, z_loss=0.0)}
    other = rng.uniform(0.1, 1, t.shape)

    def loss_and_dc(probs):
        return forward(e, c, TARGETS, target_probs=probs, **options).loss, backward(
            e, c, TARGETS, target_probs=probs, **options
        ).c

    for one, two, both in zip(loss_and_dc(t), loss_and_dc(other), loss_and_dc(x * t + y * other), strict=True):
        assert np.max(np.abs(both - x * one - y * two)) <= 1e-12 * (abs(x) * np.max(np.abs(one)) + abs(y) * np.max(np.abs(two)))


def test_order_padding_and_repetition_do_not_matter():
    e, c, bias, t, rng = problem()
    options = {"bias": bias, **every_term(rng)}
    order = rng.permuted(np.broadcast_to(np.arange(K), TARGETS.shape), axis=-1)
    padding = np.full((*BATCH, 2), -100)
    variants = [
        (np.take_along_axis(TARGETS, order, axis=-1), np.take_along_axis(t, order, axis=-1)),
        (np.concatenate([padding, TARGETS], axis=-1), np.concatenate([padding * np.inf, t], axis=-1)),
        (np.concatenate([TARGETS, TARGETS], axis=-1), np.concatenate([0.25 * t, 0.75 * t], axis=-1)),
        # A target of probability 0, where the token has others.
        (np.where((TARGETS == -100) & ~np.isnan(t).all(axis=-1, keepdims=True), 3, TARGETS), np.nan_to_num(t)),
    ]
    result, grads = forward(e, c, TARGETS, target_probs=t, **options), backward(e, c, TARGETS, target_probs=t, **options)
    for targets, probs in variants:
        assert_close(forward(e, c, targets, target_probs=probs, **options).loss, result.loss)
        assert_same_gradients(backward(e, c, targets, target_probs=probs, **options), grads)


@pytest.mark.parametrize("shift", [1, 2])
def test_shift_is_slicing(shift):
    e, c, bias, t, rng = problem()
    weights = rng.uniform(0.1, 1, BATCH)
    options = {"bias": bias, "label_smoothing": 0.1}
    sliced = e[:, :-shift], c, TARGETS[:, shift:]
    more = {"target_probs": t[:, shift:], "token_weights": weights[:, shift:], **options}
    options |= {"shift": shift, "target_probs": t, "token_weights": weights}
    assert_close(forward(e, c, TARGETS, **options).loss, forward(*sliced, **more).loss, tol=0)
    grads, expected = backward(e, c, TARGETS, **options), backward(*sliced, **more)
    assert_close(grads.c, expected.c, tol=0)
    assert_close(grads.e[:, :-shift], expected.e, tol=0)
    assert not grads.e[:, -shift:].any()


def test_the_z_loss_is_the_tokens_own():
    e, c, bias, t, _ = problem()
    plain, with_z = (forward(e, c, TARGETS, target_probs=t, bias=bias, reduction="none", z_loss=x) for x in (0.0, 0.5))
    assert_close(with_z.loss - plain.loss, 0.5 * plain.lse**2)


# ---------------------------------------------------------------- hard cases


@pytest.mark.parametrize("probability", [0.0, 0.5])
@pytest.mark.parametrize("outside", [-1, V])
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_a_target_outside_the_vocabulary_is_nan_whatever_its_probability(outside, probability, smoothing):
    e, c, bias, t, _ = problem()
    clean = forward(e, c, TARGETS, target_probs=t, bias=bias, reduction="none", label_smoothing=smoothing)
    targets, others = TARGETS.copy(), np.ones(BATCH, bool)
    targets[1, 0, 1], t[1, 0, 1], others[1, 0] = outside, probability, False
    options = {"bias": bias, "target_probs": t, "reduction": "none", "label_smoothing": smoothing}
    result, grads = forward(e, c, targets, **options), backward(e, c, targets, **options)
    assert np.isnan(result.nll[1, 0])
    assert np.isnan(result.loss[1, 0])
    assert np.isnan(result.target_logit[1, 0]).tolist() == [False, True, False]
    assert_close(result.loss[others], clean.loss[others])
    assert np.isnan(grads.e[1, 0]).all()
    assert np.isnan(grads.c).all()
    assert np.isfinite(grads.e[others]).all()
    assert np.isfinite(forward(e, c, targets, target_probs=t).total_weight)


def test_a_masked_target_of_probability_0_adds_nothing():
    e, c, bias, t, _ = problem()
    bias[0] = -np.inf
    t[TARGETS == 0] = 0.0
    result = forward(e, c, TARGETS, target_probs=t, bias=bias)
    assert np.isfinite(result.loss)
    assert_close(result.loss, forward(e, c, np.where(TARGETS == 0, -100, TARGETS), target_probs=t, bias=bias).loss)
    assert np.isfinite(backward(e, c, TARGETS, target_probs=t, bias=bias).c).all()


def test_a_token_of_weight_0_and_ignored_tokens_take_no_part():
    e, c, bias, t, rng = problem()
    options = {"bias": bias, **every_term(rng)}
    without = np.where((options["token_weights"] == 0)[..., None], -100, TARGETS)
    expected = forward(e, c, without, target_probs=t, **options), backward(e, c, without, target_probs=t, **options)
    e[(without == -100).all(axis=-1)] = np.nan
    t[options["token_weights"] == 0] = np.nan
    assert_close(forward(e, c, TARGETS, target_probs=t, **options).loss, expected[0].loss)
    assert_same_gradients(backward(e, c, TARGETS, target_probs=t, **options), expected[1])


def test_probabilities_that_sum_to_nothing_are_the_mean_of_nothing():
    e, c, bias, t, _ = problem()
    options = {"bias": bias, "target_probs": 0.0 * t, "z_loss": 0.1}
    assert np.isnan(forward(e, c, TARGETS, **options).loss)
    assert not backward(e, c, TARGETS, **options).c.any()
    assert backward(e, c, TARGETS, reduction="sum", **options).c.any()  # the z-loss has no target


def test_shapes_that_do_not_fit_are_refused():
    e, c, _, t, _ = problem()
    for targets, probs in ((TARGETS, None), (TARGETS, t[..., :2]), (TARGETS[..., 0], t[..., 0]), (TARGETS[:, :3], t[:, :3])):
        with pytest.raises(ValueError, match=r"shapes do not fit|which does not go with"):
            forward(e, c, targets, target_probs=probs)


# ---------------------------------------------------------------- PyTorch

TERMS = ("label_smoothing", "z_loss", "logit_scale", "class_weights", "token_weights")
CHOICES = [{name for name, on in zip(TERMS, choice, strict=True) if on} for choice in itertools.product((0, 1), repeat=5)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "+".join(sorted(choice)) or "none")
def test_against_torch(choice, softcap, reduction):
    """`F.cross_entropy` with the targets written out over the vocabulary, which sum to 1 where labels are smoothed.

    Its mean divides by the number of tokens, and ours by the weights of the targets.
    """
    torch = pytest.importorskip("torch")
    e, c, bias, t, rng = problem(seed=2)
    options = {name: value for name, value in every_term(rng).items() if name in choice}
    if "label_smoothing" in choice:
        t = t / np.maximum(np.nansum(t, axis=-1, keepdims=True), 1e-9)
    d_loss = rng.normal(size=BATCH if reduction == "none" else ())
    parameters = [torch.tensor(x, requires_grad=True) for x in (e, c, bias)]
    z = parameters[0].reshape(-1, D) @ parameters[1].T + parameters[2]
    z = z * torch.tensor(np.ravel(options.get("logit_scale", np.ones(BATCH))))[:, None]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    weight = torch.tensor(options.get("class_weights", np.ones(V)))
    dense = np.zeros((*BATCH, V))
    for index in np.ndindex(TARGETS.shape):
        if TARGETS[index] != -100:
            dense[index[:-1]][TARGETS[index]] += t[index]
    dense, valid = torch.tensor(dense.reshape(-1, V)), torch.tensor((TARGETS != -100).any(axis=-1).ravel())
    counts = torch.where(valid, torch.tensor(np.ravel(options.get("token_weights", np.ones(BATCH)))), 0.0)
    smoothing = options.get("label_smoothing", 0.0)
    loss = torch.nn.functional.cross_entropy(z, dense, weight=weight, label_smoothing=smoothing, reduction="none")
    loss = counts * (loss + options.get("z_loss", 0.0) * torch.logsumexp(z, dim=-1) ** 2)
    if reduction != "none":
        loss = loss.sum() / ((counts[:, None] * dense * weight).sum() if reduction == "mean" else 1.0)
    (torch.tensor(d_loss).reshape(loss.shape) * loss).sum().backward()

    options |= {"bias": bias, "softcap": softcap, "reduction": reduction, "target_probs": t}
    assert_close(np.ravel(forward(e, c, TARGETS, **options).loss), np.ravel(loss.detach().numpy()))
    grads = backward(e, c, TARGETS, d_loss=d_loss, **options)
    for parameter, actual in zip(parameters, (grads.e, grads.c, grads.bias), strict=True):
        assert_near(actual, parameter.grad.numpy())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_distributions_without_weights_are_torch_s_loss(reduction):
    """All of its reductions are ours where every token has probabilities that sum to 1, and nothing is weighted."""
    torch = pytest.importorskip("torch")
    e, c, bias, _, rng = problem()
    dense = rng.dirichlet(np.ones(V), BATCH)
    targets = np.broadcast_to(np.arange(V), dense.shape)
    z, truth = torch.tensor((e @ c.T + bias).reshape(-1, V)), torch.tensor(dense.reshape(-1, V))
    theirs = torch.nn.functional.cross_entropy(z, truth, label_smoothing=0.2, reduction=reduction)
    ours = forward(e, c, targets, target_probs=dense, bias=bias, label_smoothing=0.2, reduction=reduction).loss
    assert_close(np.ravel(ours), np.ravel(theirs.numpy()))
