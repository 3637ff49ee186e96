"""Distributions against their definition in Python floats, finite differences, algebra, and PyTorch in float64."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import backward, distribution, distribution_backward, distribution_gradient, forward, logits
from tests.helpers.dense import assert_close, assert_near, assert_same_gradients, finite_difference

pytestmark = pytest.mark.filterwarnings("error")  # NaN and inf pass through silently

V, D = 7, 3
# Padding inside, at an end, everywhere (the second token), nowhere; an id twice in one token; a token that shift=1 cuts off.
IDS = np.array([[[3, -100], [-100, -100], [2, 2], [-100, 6]], [[0, 1], [5, 4], [-100, 1], [6, 0]]])
ONE_ID = IDS[..., 1]
UPSTREAM = ("d_logprobs", "d_lse", "d_entropy")


def problem(seed=0, batch=IDS.shape[:2]):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(*batch, D)), rng.normal(size=(V, D)), rng.normal(size=V), rng


def drawn_upstream(found, rng, names=UPSTREAM):
    values = {"d_logprobs": found.logprobs, "d_lse": found.lse, "d_entropy": found.entropy}
    return {name: rng.normal(size=values[name].shape) for name in names}


def objective_of(found, upstream):
    values = {"d_logprobs": found.logprobs, "d_lse": found.lse, "d_entropy": found.entropy}
    return sum(np.sum(d * values[name]) for name, d in upstream.items())


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("ids", [ONE_ID, IDS], ids=["one", "many"])
def test_from_the_definition(ids):
    """One token at a time, in Python floats, with none of NumPy's reductions."""
    e, c, bias, _ = problem()
    found = distribution(e, c, ids, bias=bias, softcap=2.0, logit_scale=1.5, top_k=3)
    assert found.logprobs.shape == ids.shape
    assert found.top_ids.shape == found.top_logprobs.shape == (*e.shape[:-1], 3)
    n_valid = 0
    for index in np.ndindex(e.shape[:-1]):
        own = np.atleast_1d(ids[index]).tolist()
        if all(v == -100 for v in own):
            for value in (found.lse, found.entropy, found.sum_squares, found.logprobs, found.top_logprobs, found.top_ids):
                assert not value[index].any()
            continue
        dots = [sum(x * y for x, y in zip(e[index], row, strict=True)) + b for row, b in zip(c, bias, strict=True)]
        z = [2.0 * math.tanh(1.5 * dot / 2.0) for dot in dots]
        lse = math.log(math.fsum(map(math.exp, z)))
        p = [math.exp(x - lse) for x in z]
        best = sorted(range(V), key=lambda v: -z[v])[:3]
        assert_close(found.logits[n_valid], z)
        assert_close(found.lse[index], lse)
        assert_close(found.entropy[index], -math.fsum(x * math.log(x) for x in p))
        assert_close(found.sum_squares[index], math.fsum(x * x for x in p))
        assert_close(np.atleast_1d(found.logprobs[index]), [0.0 if v == -100 else z[v] - lse for v in own])
        assert found.top_ids[index].tolist() == best
        assert_close(found.top_logprobs[index], [z[v] - lse for v in best])
        n_valid += 1
    assert found.n_valid == n_valid == (6 if ids is ONE_ID else 7)


def test_one_id_is_the_loss():
    e, c, bias, rng = problem()
    options = {"bias": bias, "softcap": 2.0, "shift": 1, "logit_scale": rng.uniform(0.5, 2, ONE_ID.shape)}
    found, loss = distribution(e, c, ONE_ID, **options), forward(e, c, ONE_ID, **options)
    assert_close(found.logprobs, -loss.nll, tol=0)
    assert_close(found.lse, loss.lse, tol=0)
    assert found.n_valid == loss.n_valid
    d_logprobs, d_lse = rng.normal(size=(2, *found.lse.shape))
    grads = distribution_backward(e, c, ONE_ID, d_logprobs=d_logprobs, d_lse=d_lse, **options)
    expected = backward(e, c, ONE_ID, d_loss=-d_logprobs, d_lse=d_lse, reduction="none", **options)
    assert_same_gradients(grads, expected, tol=1e-14)


def test_many_ids_are_each_of_them():
    e, c, bias, rng = problem()
    found = distribution(e, c, IDS, bias=bias)
    upstream = drawn_upstream(found, rng, ["d_logprobs"])
    grads = distribution_backward(e, c, IDS, bias=bias, **upstream)
    singles = [
        (
            distribution(e, c, IDS[..., k], bias=bias),
            distribution_backward(e, c, IDS[..., k], bias=bias, d_logprobs=upstream["d_logprobs"][..., k]),
        )
        for k in range(IDS.shape[-1])
    ]
    assert_close(found.logprobs, np.stack([single.logprobs for single, _ in singles], axis=-1))
    for name in ("e", "c", "bias"):
        assert_close(getattr(grads, name), sum(getattr(single, name) for _, single in singles))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.floats(-50, 50), st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
def test_bounds(seed, vocabulary, level, spread):
    """Uniform distributions have the largest entropy, log V, and the smallest sum of squares, 1 / V; certain ones 0 and 1."""
    rng = np.random.default_rng(seed)
    bias = level + spread * rng.normal(size=vocabulary)
    ids = np.broadcast_to(np.arange(vocabulary), (2, vocabulary))
    found = distribution(np.zeros((2, 1)), np.zeros((vocabulary, 1)), ids, bias=bias, top_k=vocabulary)
    eps = 1e-12
    assert np.all((found.entropy >= 0) & (found.entropy <= np.log(vocabulary) + eps))
    assert np.all((found.sum_squares >= 1 / vocabulary - eps) & (found.sum_squares <= 1 + eps))
    assert np.all(found.sum_squares >= np.exp(-found.entropy) - eps)  # Jensen: log(sum p^2) >= sum p log(p)
    if spread == 0:
        assert_near(found.entropy, np.full(2, np.log(vocabulary)))
        assert_near(found.sum_squares, np.full(2, 1 / vocabulary))
    assert_near(np.exp(found.logprobs).sum(axis=-1), np.ones(2))
    assert np.all(np.diff(found.top_logprobs) <= 0)
    assert np.array_equal(np.sort(found.top_ids), ids)
    assert_close(np.take_along_axis(found.logprobs, found.top_ids, axis=-1), found.top_logprobs, tol=0)


def test_equal_logits_come_by_ascending_id():
    bias = np.array([1.0, 3.0, 3.0, -np.inf, 1.0, 3.0, -np.inf])
    found = distribution(np.zeros((1, D)), np.zeros((V, D)), np.array([0]), bias=bias, top_k=V)
    assert found.top_ids.tolist() == [[1, 2, 5, 0, 4, 3, 6]]
    assert found.top_logprobs[0, -2:].tolist() == [-np.inf, -np.inf]
    for k in range(V):
        fewer = distribution(np.zeros((1, D)), np.zeros((V, D)), np.array([0]), bias=bias, top_k=k)
        assert fewer.top_ids.tolist() == found.top_ids[:, :k].tolist()
    for k in (-1, V + 1):
        with pytest.raises(ValueError, match=f"top_k is {k}"):
            distribution(np.zeros((1, D)), np.zeros((V, D)), np.array([0]), top_k=k)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("ids", [ONE_ID, IDS], ids=["one", "many"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("upstream", [UPSTREAM, *((name,) for name in UPSTREAM)], ids="+".join)
def test_backward_is_the_finite_difference(ids, shift, softcap, scaled, upstream):
    e, c, bias, rng = problem()
    scale = rng.uniform(0.5, 1.5, e.shape[:-1]) if scaled else None
    options = {"bias": bias, "softcap": softcap, "shift": shift, "logit_scale": scale}
    upstream = drawn_upstream(distribution(e, c, ids, **options), rng, upstream)
    grads = distribution_backward(e, c, ids, **upstream, **options)
    for parameter, actual in zip((e, c, bias), (grads.e, grads.c, grads.bias), strict=True):
        numeric = finite_difference(lambda: objective_of(distribution(e, c, ids, **options), upstream), parameter)
        assert_close(actual, numeric, tol=1e-8)


def test_a_constant_on_all_logits_moves_only_lse():
    """So of all upstream gradients only that of lse is in the sum of dbias."""
    e, c, bias, rng = problem()
    upstream = drawn_upstream(distribution(e, c, IDS), rng)
    valid = (IDS != -100).any(axis=-1)
    assert_close(distribution_backward(e, c, IDS, bias=bias, **upstream).bias.sum(), upstream["d_lse"][valid].sum())
    before, after = distribution(e, c, IDS, bias=bias, top_k=V), distribution(e, c, IDS, bias=bias + 50, top_k=V)
    for name in ("logprobs", "entropy", "sum_squares", "top_logprobs"):
        assert_close(getattr(after, name), getattr(before, name))
    assert_close(after.lse[valid], before.lse[valid] + 50)


def test_upstream_defaults_and_scalars():
    e, c, bias, _ = problem()
    assert not distribution_backward(e, c, IDS, bias=bias).c.any()
    for name, shape in zip(UPSTREAM, (IDS.shape, IDS.shape[:-1], IDS.shape[:-1]), strict=True):
        scalar, array = (distribution_backward(e, c, IDS, bias=bias, **{name: value}) for value in (0.5, np.full(shape, 0.5)))
        assert_same_gradients(scalar, array, tol=0)
        assert scalar.c.any()
    assert distribution_backward(e, c, IDS, d_entropy=1.0).bias is None


def test_the_one_form_of_gradients():
    """alpha, beta and gamma as they come: p * (alpha + beta * log p) less gammas at the ids, which may be equal."""
    ids = np.array([[1, 1], [0, 2]])
    with np.errstate(divide="ignore"):
        z = np.log([[0.2, 0.3, 0.5], [0.0, 0.25, 0.75]])
    alpha, beta, gamma = np.array([2.0, 3.0]), np.array([-1.0, 4.0]), np.array([[0.5, 0.25], [7.0, 1.0]])
    expected = [
        [0.2 * (2 - math.log(0.2)), 0.3 * (2 - math.log(0.3)) - 0.75, 0.5 * (2 - math.log(0.5))],
        [-7.0, 0.25 * (3 + 4 * math.log(0.25)), 0.75 * (3 + 4 * math.log(0.75)) - 1.0],
    ]
    assert_close(distribution_gradient(z, ids, alpha, beta, gamma), expected)
    assert_close(distribution_gradient(z, ids, alpha, beta, gamma, softcap=4.0)[0], expected[0] * (1 - (z[0] / 4) ** 2))


def test_keep_masks_choose_entries_of_g():
    e, c, bias, rng = problem()
    tokens = (IDS != -100).any(axis=-1)
    d_entropy = rng.normal(size=tokens.shape)
    d_entropy[0, 2] = 0.0  # takes no part: the masks still have a row for it
    found = distribution(e, c, IDS, bias=bias)
    beta, no_ids = -d_entropy[tokens], np.zeros((found.n_valid, 1))
    g = distribution_gradient(logits(e[tokens], c, bias), no_ids.astype(int), beta * found.entropy[tokens], beta, no_ids)
    keep_e, keep_c = rng.random((2, found.n_valid, V)) < 0.6
    grads = distribution_backward(e, c, IDS, bias=bias, d_entropy=d_entropy, keep_e=keep_e, keep_c=keep_c)
    assert_close(grads.e[tokens], (g * keep_e) @ c)
    assert_close(grads.c, (g * keep_c).T @ e[tokens])
    assert_close(grads.bias, (g * keep_c).sum(axis=0))


# ---------------------------------------------------------------- hard cases


@pytest.mark.parametrize("shift", [1, 2])
def test_shift_is_slicing(shift):
    e, c, bias, rng = problem()
    for ids in (ONE_ID, IDS):
        sliced = e[:, :-shift], c, ids[:, shift:]
        found, expected = distribution(e, c, ids, bias=bias, shift=shift), distribution(*sliced, bias=bias)
        for name in ("logprobs", "lse", "entropy", "sum_squares"):
            assert_close(getattr(found, name), getattr(expected, name), tol=0)
        upstream = drawn_upstream(found, rng)
        grads = distribution_backward(e, c, ids, bias=bias, shift=shift, **upstream)
        expected = distribution_backward(*sliced, bias=bias, **upstream)
        assert_close(grads.e[:, :-shift], expected.e, tol=0)
        assert not grads.e[:, -shift:].any()
        assert_close(grads.c, expected.c, tol=0)


def test_ignored_tokens_and_padding_are_not_looked_at():
    e, c, bias, rng = problem()
    found = distribution(e, c, IDS, bias=bias)
    upstream = drawn_upstream(found, rng)
    grads = distribution_backward(e, c, IDS, bias=bias, **upstream)
    assert not found.logprobs[IDS == -100].any()
    ignored = (IDS == -100).all(axis=-1)
    assert not grads.e[ignored].any()
    e[ignored] = np.nan
    poisoned = {name: np.where(IDS == -100 if d.ndim == 3 else ignored, np.nan, d) for name, d in upstream.items()}
    assert_close(distribution(e, c, IDS, bias=bias).entropy, found.entropy, tol=0)
    assert_same_gradients(distribution_backward(e, c, IDS, bias=bias, **poisoned), grads, tol=0)


def test_any_index_can_pad():
    e, c, _, _ = problem()
    ids = np.where(IDS == -100, 4, np.where(IDS == 4, 3, IDS))
    with_4 = distribution(e, c, ids, ignore_index=4)
    assert_close(with_4.logprobs, distribution(e, c, np.where(ids == 4, -100, ids)).logprobs, tol=0)
    assert distribution(e, c, ids).n_valid == 8


@pytest.mark.parametrize("outside", [-1, V, 2**40])
def test_an_id_outside_the_vocabulary_is_nan(outside):
    e, c, bias, _ = problem()
    ids = IDS.copy()
    ids[1, 0, 1] = outside
    found, clean = distribution(e, c, ids, bias=bias, top_k=2), distribution(e, c, IDS, bias=bias, top_k=2)
    assert np.isnan(found.logprobs[1, 0, 1])
    others = ids != outside
    assert_close(found.logprobs[others], clean.logprobs[others], tol=0)
    for name in ("lse", "entropy", "sum_squares", "top_logprobs"):
        assert_close(getattr(found, name), getattr(clean, name), tol=0)
    for name in UPSTREAM:  # whatever flows back
        grads = distribution_backward(e, c, ids, bias=bias, **{name: 1.0})
        assert np.isnan(grads.e[1, 0]).all()
        assert np.isnan(grads.c).all()
        assert np.isnan(grads.bias).all()
        others = np.ones(e.shape[:-1], bool)
        others[1, 0] = False
        assert_close(grads.e[others], distribution_backward(e, c, IDS, bias=bias, **{name: 1.0}).e[others])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_token_is_nan_and_takes_no_part_unless_something_flows_back(poison):
    e, c, bias, rng = problem()
    clean = distribution(e, c, IDS, bias=bias, top_k=2)
    upstream = drawn_upstream(clean, rng)
    for d in upstream.values():
        d[1, 1] = 0.0
    expected = distribution_backward(e, c, IDS, bias=bias, **upstream)
    e[1, 1, 0] = poison
    found, others = distribution(e, c, IDS, bias=bias, top_k=2), np.ones(IDS.shape[:-1], bool)
    others[1, 1] = False
    for name in ("logprobs", "lse", "entropy", "sum_squares", "top_logprobs"):
        assert np.isnan(getattr(found, name)[1, 1]).all()
        assert_close(getattr(found, name)[others], getattr(clean, name)[others], tol=0)
    assert_same_gradients(distribution_backward(e, c, IDS, bias=bias, **upstream), expected, tol=0)
    for d in upstream.values():
        d[1, 1] = 1.0
        assert np.isnan(distribution_backward(e, c, IDS, bias=bias, **upstream).e[1, 1]).all()
        d[1, 1] = 0.0


def test_upstream_gradients_that_cancel_in_lse_leave_the_ids():
    e, c, _, _ = problem()
    grads = distribution_backward(e, c, ONE_ID, d_logprobs=2.0, d_lse=2.0)
    assert_close(grads.e, np.where((ONE_ID == -100)[..., None], 0.0, 2.0 * c[ONE_ID % V]))


def test_a_masked_entry_is_as_good_as_absent():
    """p = 0 and log p = -inf: an entropy and gradients without a NaN."""
    e, c, bias, rng = problem()
    ids = np.where(IDS == 4, 3, IDS)  # now there is no 4
    bias[4] = -np.inf
    others = np.arange(V) != 4
    found = distribution(e, c, ids, bias=bias, top_k=V - 1)
    without = e, c[others], np.where(ids > 4, ids - 1, ids)
    expected = distribution(*without, bias=bias[others], top_k=V - 1)
    for name in ("logprobs", "entropy", "sum_squares", "top_logprobs"):
        assert_close(getattr(found, name), getattr(expected, name))
    assert np.array_equal(found.top_ids, np.where(expected.top_ids > 3, expected.top_ids + 1, expected.top_ids))
    upstream = drawn_upstream(found, rng)
    grads, expected = (
        distribution_backward(e, c, ids, bias=bias, **upstream),
        distribution_backward(*without, bias=bias[others], **upstream),
    )
    assert_close(grads.e, expected.e)
    assert_close(grads.c[others], expected.c)
    assert not grads.c[4].any()
    assert grads.bias[4] == 0


def test_certain_tokens_have_no_entropy_and_no_gradient_of_it():
    e, c = np.full((1, 1), 1e4), np.arange(4.0)[:, None]  # all other probabilities underflow
    found = distribution(e, c, np.array([3]), top_k=2)
    assert found.entropy.tolist() == [0.0]
    assert found.sum_squares.tolist() == [1.0]
    assert found.top_logprobs.tolist() == [[0.0, -1e4]]
    grads = distribution_backward(e, c, np.array([3]), d_entropy=1.0)
    assert not grads.e.any()
    assert not grads.c.any()


def test_nothing_but_masked_entries_is_nan():
    e, c, _, _ = problem()
    found = distribution(e, c, ONE_ID, bias=np.full(V, -np.inf))
    assert np.isnan(found.entropy[ONE_ID != -100]).all()
    assert (found.lse[ONE_ID != -100] == -np.inf).all()


@pytest.mark.parametrize(("shape", "shift"), [((0,), 0), ((3, 0), 1), ((4,), 0), ((2, 4), 4), ((2, 4), 5)])
@pytest.mark.parametrize("many", [(), (1,), (3,)])
def test_no_tokens(shape, shift, many):
    e, c, bias, _ = problem(batch=shape)
    ids = np.full((*shape, *many), 1 if shift else -100)
    found = distribution(e, c, ids, bias=bias, shift=shift, top_k=2)
    grads = distribution_backward(e, c, ids, bias=bias, shift=shift, d_logprobs=1.0, d_lse=1.0, d_entropy=1.0)
    assert found.n_valid == 0
    assert found.logprobs.shape == found.lse.shape + many
    assert found.top_ids.shape == (*found.entropy.shape, 2)
    assert grads.e.shape == e.shape
    for gradient in (grads.e, grads.c, grads.bias):
        assert not gradient.any()


def test_a_single_token():
    e, c, bias, _ = problem(batch=())
    for ids in (np.array(2), np.array([2, 0])):
        found = distribution(e, c, ids, bias=bias, top_k=1)
        assert found.logprobs.shape == ids.shape
        assert found.entropy.shape == ()
        expected = distribution_backward(e[None], c, ids[None], d_entropy=1.0).e[0]
        assert_close(distribution_backward(e, c, ids, d_entropy=1.0).e, expected)


def test_ids_that_do_not_go_with_e_are_refused():
    e, c, _, _ = problem()
    for ids in (IDS[0], IDS[..., None], IDS[:, :3]):
        with pytest.raises(ValueError, match="which does not go with e"):
            distribution(e, c, ids)


# ---------------------------------------------------------------- PyTorch


@settings(deadline=None)
@given(st.data())
def test_against_torch(data):
    torch = pytest.importorskip("torch")
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch = draw(st.sampled_from([(1,), (4,), (2, 3)]))
    vocabulary, hidden, many = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.sampled_from([(), (1,), (4,)]))
    shift, softcap = draw(st.integers(0, 2)), draw(st.sampled_from([None, 1.5]))
    top_k = draw(st.integers(0, vocabulary))
    e, c, bias = rng.normal(size=(*batch, hidden)), rng.normal(size=(vocabulary, hidden)), rng.normal(size=vocabulary)
    scale = rng.uniform(0.5, 3, batch)
    ids = np.where(rng.random((*batch, *many)) < 0.3, -100, rng.integers(0, vocabulary, (*batch, *many)))

    parameters = [torch.tensor(x, requires_grad=True) for x in (e, c, bias)]
    z = (parameters[0] @ parameters[1].T + parameters[2]) * torch.tensor(scale)[..., None]
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    keep = max(batch[-1] - shift, 0)
    z, own = z[..., :keep, :], torch.tensor(ids)[(*(slice(None),) * (len(batch) - 1), slice(shift, None))]
    own = own if many else own[..., None]
    valid, log_p = (own != -100).any(dim=-1), torch.log_softmax(z, dim=-1)
    picked = torch.where(own == -100, 0.0, log_p.gather(-1, own.clamp(min=0)))
    values = {
        "logprobs": picked if many else picked[..., 0],
        "lse": torch.where(valid, torch.logsumexp(z, dim=-1), 0.0),
        "entropy": torch.where(valid, -(log_p.exp() * log_p).sum(dim=-1), 0.0),
        "sum_squares": torch.where(valid, (log_p.exp() ** 2).sum(dim=-1), 0.0),
        "top_logprobs": torch.where(valid[..., None], log_p.topk(top_k, dim=-1).values, 0.0),
        "top_ids": torch.where(valid[..., None], z.topk(top_k, dim=-1).indices, 0),
    }
    options = {"bias": bias, "softcap": softcap, "logit_scale": scale, "shift": shift}
    found = distribution(e, c, ids, top_k=top_k, **options)
    for name, value in values.items():
        assert_near(getattr(found, name), value.detach().numpy())

    upstream = drawn_upstream(found, rng, [name for name in UPSTREAM if draw(st.booleans(), label=name)])
    sum(((values[name[2:]] * torch.tensor(d)).sum() for name, d in upstream.items()), 0.0 * z.sum()).backward()
    grads = distribution_backward(e, c, ids, **upstream, **options)
    for parameter, actual in zip(parameters, (grads.e, grads.c, grads.bias), strict=True):
        assert_near(actual, parameter.grad.numpy())
