"""Teacher and student: against the definition, finite differences, algebra, and PyTorch in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import (
    Head,
    backward,
    column_filter,
    distillation,
    distillation_backward,
    divergence_and_gradient,
    draws,
    log_softmax,
    of_tokens,
    roulette,
    softmax,
    union,
)
from tests.helpers.dense import assert_close, assert_near, assert_same_gradients, finite_difference

pytestmark = pytest.mark.filterwarnings("error")  # NaN and inf pass through silently

TARGETS = np.array([[-100, 2, 6, -100, 1], [0, 3, -100, 5, 3]])  # only where they are ignored matters
V, D, D_TEACHER = 7, 3, 5
KINDS = [{"kind": "forward_kl"}, {"kind": "reverse_kl"}, {"kind": "jsd"}, {"kind": "jsd", "beta": 0.1}]


def problem(seed=0, batch=TARGETS.shape, vocabulary=V, softcaps=(None, None)):
    rng = np.random.default_rng(seed)
    student, teacher = (
        Head(rng.normal(size=(*batch, d)), rng.normal(size=(vocabulary, d)), rng.normal(size=vocabulary), softcap)
        for d, softcap in zip((D, D_TEACHER), softcaps, strict=True)
    )
    return student, teacher, rng


def finished_logits(head, temperature):
    z = head.e @ head.c.T + (0.0 if head.bias is None else head.bias)
    return (z if head.softcap is None else head.softcap * np.tanh(z / head.softcap)) / temperature


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_from_the_definition(kind, temperature):
    """One token at a time, in Python floats. The temperature divides what the softcaps have made."""
    student, teacher, _ = problem(softcaps=(2.0, 3.0))
    found = distillation(student, teacher, TARGETS, temperature=temperature, **kind)

    def probabilities(head, index):
        z = [float(x) for x in finished_logits(head, temperature)[index]]
        total = math.fsum(map(math.exp, z))
        return [math.exp(x) / total for x in z]

    def kl(a, b):
        return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    losses = []
    for index in np.ndindex(TARGETS.shape):
        if TARGETS[index] == -100:
            assert found.per_token[index] == 0
            continue
        p, q, beta = probabilities(teacher, index), probabilities(student, index), kind.get("beta", 0.5)
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
        expected = {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}
        losses.append(expected[kind["kind"]])
        assert_close(found.per_token[index], losses[-1])
    assert found.n_valid == len(losses) == 7
    assert_close(found.loss, math.fsum(losses) / 7)


def test_reductions():
    student, teacher, _ = problem()
    mean, total, none = (distillation(student, teacher, TARGETS, reduction=r) for r in ("mean", "sum", "none"))
    assert_close(none.loss, none.per_token, tol=0)
    assert_close(total.loss, none.per_token.sum())
    assert_close(mean.loss, total.loss / 7)
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        distillation(student, teacher, reduction="avg")


def test_without_targets_every_token_counts():
    student, teacher, _ = problem()
    found = distillation(student, teacher, reduction="none")
    assert found.n_valid == 10
    assert_close(found.loss, distillation(student, teacher, np.zeros(TARGETS.shape, int), reduction="none").loss, tol=0)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.floats(0.01, 0.99), st.sampled_from([0.1, 1.0, 30.0]))
def test_bounds(seed, vocabulary, beta, spread):
    """No divergence is negative, and a mixture cannot be farther away than its weights allow: log 2 for halves."""
    rng = np.random.default_rng(seed)
    log_p, log_q = log_softmax(spread * rng.normal(size=(2, 3, vocabulary)))
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        value, gradient = divergence_and_gradient(log_p, log_q, kind, beta)
        assert np.all(value >= -1e-12)
        assert np.max(np.abs(gradient.sum(axis=-1))) <= 1e-12 * (1 + np.max(value))  # a constant on all logits changes nothing
    assert np.all(value <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-12)
    mirrored, _ = divergence_and_gradient(log_q, log_p, "jsd", 1 - beta)
    assert_near(value, mirrored)
    forward_kl, _ = divergence_and_gradient(log_p, log_q, "forward_kl")
    assert_near(forward_kl, divergence_and_gradient(log_q, log_p, "reverse_kl")[0])


def test_jsd_tends_to_the_divergences_at_its_ends():
    """Divided by its smaller weight: the forward KL for beta towards 0, the reverse for beta towards 1."""
    rng = np.random.default_rng(0)
    log_p, log_q = log_softmax(rng.normal(size=(2, 4, V)))
    for kind, beta in (("forward_kl", 1e-6), ("reverse_kl", 1 - 1e-6)):
        expected = divergence_and_gradient(log_p, log_q, kind)
        limit = divergence_and_gradient(log_p, log_q, "jsd", beta)
        for actual, exact in zip(limit, expected, strict=True):
            assert_close(actual / min(beta, 1 - beta), exact, tol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind):
    student, _, _ = problem()
    assert_near(distillation(student, student, TARGETS, **kind).per_token, np.zeros(TARGETS.shape))
    grads = distillation_backward(student, student, TARGETS, **kind)
    for gradient in (grads.e, grads.c, grads.bias):
        assert_near(gradient, np.zeros(gradient.shape))


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("softcaps", [(None, None), (1.5, None), (2.0, 3.0)])
@pytest.mark.parametrize(("reduction", "shift"), [("mean", 0), ("sum", 1), ("none", 2)])
def test_backward_is_the_finite_difference(kind, temperature, softcaps, reduction, shift):
    student, teacher, rng = problem(softcaps=softcaps)
    options = {"temperature": temperature, "reduction": reduction, "shift": shift, **kind}
    d_loss = rng.normal(size=distillation(student, teacher, TARGETS, **options).loss.shape)
    grads = distillation_backward(student, teacher, TARGETS, d_loss=d_loss, **options)
    for name in ("e", "c", "bias"):
        numeric = finite_difference(
            lambda: np.sum(d_loss * distillation(student, teacher, TARGETS, **options).loss), getattr(student, name)
        )
        assert_close(getattr(grads, name), numeric, tol=1e-8)


def test_the_forward_kl_is_a_loss_with_the_teacher_s_probabilities_as_targets():
    """Their difference, the teacher's entropy, is constant to the student."""
    student, teacher, rng = problem(softcaps=(2.0, None))
    every = np.where((TARGETS == -100)[..., None], -100, np.arange(V))
    soft = {"target_probs": softmax(finished_logits(teacher, 1.0)), "bias": student.bias, "softcap": 2.0}
    d_loss = rng.normal(size=TARGETS.shape)
    expected = backward(student.e, student.c, every, d_loss=d_loss, reduction="none", **soft)
    grads = distillation_backward(student, teacher, TARGETS, d_loss=d_loss, reduction="none")
    assert_same_gradients(grads, expected)
    assert distillation_backward(replace(student, bias=None), teacher).bias is None


def test_keep_masks_choose_entries_of_g():
    student, teacher, rng = problem()
    valid = TARGETS != -100
    d_loss = rng.normal(size=TARGETS.shape)
    d_loss[0, 2] = 0.0  # takes no part: the masks still have a row for it
    log_q, log_p = (log_softmax(finished_logits(head, 2.0)[valid]) for head in (student, teacher))
    g = d_loss[valid][:, None] * divergence_and_gradient(log_p, log_q, "jsd", 0.3)[1] / 2.0
    keep_e, keep_c = rng.random((2, *g.shape)) < 0.6
    options = {"kind": "jsd", "beta": 0.3, "temperature": 2.0, "reduction": "none", "d_loss": d_loss}
    grads = distillation_backward(student, teacher, TARGETS, keep_e=keep_e, keep_c=keep_c, **options)
    assert_close(grads.e[valid], (g * keep_e) @ student.c)
    assert_close(grads.c, (g * keep_c).T @ student.e[valid])
    assert_close(grads.bias, (g * keep_c).sum(axis=0))


# ---------------------------------------------------------------- filters


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.floats(1e-3, 0.999), st.sampled_from([0.1, 1.0, 30.0, 300.0]))
def test_the_union_bounds_the_gradient(seed, vocabulary, beta, spread):
    """Of the reverse KL up to the logarithm, without which it does not: see below."""
    rng = np.random.default_rng(seed)
    log_p, log_q = log_softmax(spread * rng.normal(size=(2, 3, vocabulary)))
    larger = union(log_p, log_q)
    assert_close(larger, np.maximum(np.exp(log_p), np.exp(log_q)))
    for kind, most in (("forward_kl", 1.0), ("jsd", 2 / math.e)):
        assert np.all(np.abs(divergence_and_gradient(log_p, log_q, kind, beta)[1]) <= most * larger + 1e-15)
    value, g = divergence_and_gradient(log_p, log_q, "reverse_kl")
    assert np.all(np.abs(g) <= larger * (np.abs(log_q - log_p) + value[:, None]) + 1e-12)


def test_the_union_does_not_bound_the_gradient_of_the_reverse_kl():
    log_p, log_q = np.log([[1e-30, 1.0]]), np.log([[1e-3, 1 - 1e-3]])
    assert abs(divergence_and_gradient(log_p, log_q, "reverse_kl")[1][0, 0]) > 50 * union(log_p, log_q)[0, 0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dropped_columns_are_below_eps_in_both(kind):
    """And a lost token keeps all of its block."""
    rng = np.random.default_rng(1)
    log_p, log_q = log_softmax(3 * rng.normal(size=(2, 7, 20)))
    log_q[5] = np.nan
    kept, eps = column_filter(union(log_p, log_q, **kind), None, 0.05, block_n=2), 0.05
    below = ~((np.exp(log_p) >= eps) | (np.exp(log_q) >= eps))
    for n in range(7):
        block = slice(n // 2 * 2, n // 2 * 2 + 2)
        assert (kept[n] == (np.full(20, True) if 5 in range(7)[block] else ~below[block].all(axis=0))).all()
    assert kept.any()
    assert not kept.all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_roulette_is_right_on_average(kind):
    """Over draws that are spread evenly, whichever the seed is."""
    student, teacher, _ = problem(vocabulary=20)
    log_q, log_p = (log_softmax(2 * finished_logits(head, 1.0).reshape(-1, 20)) for head in (student, teacher))
    student, teacher = (replace(head, c=2 * head.c, bias=2 * head.bias) for head in (student, teacher))
    exact, mean, seeds = distillation_backward(student, teacher, **kind), 0.0, 2000
    for seed in range(seeds):
        scales = roulette(union(log_p, log_q, **kind), None, 0.2, draws(3, 20, seed), block_n=4)
        keep = of_tokens(scales, 10, block_n=4)
        assert keep.min() == 0
        mean = mean + distillation_backward(student, teacher, keep_e=keep, keep_c=keep, **kind).c / seeds
    assert np.linalg.norm(mean - exact.c) < 0.03 * np.linalg.norm(exact.c)


# ---------------------------------------------------------------- hard cases


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ignored_tokens_are_not_looked_at(kind):
    student, teacher, _ = problem()
    expected = distillation(student, teacher, TARGETS, **kind), distillation_backward(student, teacher, TARGETS, **kind)
    for head in (student, teacher):
        head.e[TARGETS == -100] = np.nan
    assert_close(distillation(student, teacher, TARGETS, **kind).per_token, expected[0].per_token, tol=0)
    grads = distillation_backward(student, teacher, TARGETS, **kind)
    assert_same_gradients(grads, expected[1], tol=0)
    assert not grads.e[TARGETS == -100].any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("poisoned", [0, 1], ids=["student", "teacher"])
def test_a_poisoned_token_is_nan_and_takes_no_part_unless_something_flows_back(kind, poisoned):
    heads = problem()[:2]
    d_loss = np.ones(TARGETS.shape)
    d_loss[1, 0] = 0.0
    options = {"reduction": "none", **kind}
    expected = distillation(*heads, TARGETS, **options), distillation_backward(*heads, TARGETS, d_loss=d_loss, **options)
    heads[poisoned].e[1, 0] = np.inf
    found, others = distillation(*heads, TARGETS, **options), np.ones(TARGETS.shape, bool)
    others[1, 0] = False
    assert np.isnan(found.loss[1, 0])
    assert_close(found.loss[others], expected[0].loss[others], tol=0)
    assert_same_gradients(distillation_backward(*heads, TARGETS, d_loss=d_loss, **options), expected[1], tol=0)
    assert np.isnan(distillation_backward(*heads, TARGETS, **options).e[1, 0]).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_entry_masked_in_both_heads_is_as_good_as_absent(kind):
    student, teacher, _ = problem()
    others = np.arange(V) != 4
    without = [replace(head, c=head.c[others], bias=head.bias[others]) for head in (student, teacher)]
    for head in (student, teacher):
        head.bias[4] = -np.inf
    assert_close(distillation(student, teacher, **kind).loss, distillation(*without, **kind).loss)
    grads, expected = distillation_backward(student, teacher, **kind), distillation_backward(*without, **kind)
    assert_close(grads.e, expected.e)
    assert_close(grads.c[others], expected.c)
    assert not grads.c[4].any()


def test_an_entry_masked_in_one_head():
    """A KL is infinite where what it is taken over has an entry that the other lacks; the mixture has every entry."""
    student, teacher, _ = problem()
    masked = [replace(head, bias=np.where(np.arange(V) == 4, -np.inf, head.bias)) for head in (student, teacher)]
    for heads, infinite in (((masked[0], teacher), "forward_kl"), ((student, masked[1]), "reverse_kl")):
        for kind in KINDS:
            loss = distillation(*heads, **kind).loss
            assert loss == np.inf if kind["kind"] == infinite else np.isfinite(loss)
            if kind["kind"] != infinite:
                assert np.isfinite(distillation_backward(*heads, **kind).c).all()
    # The gradient of the forward KL, Q - P, is finite all the same.
    assert np.isfinite(distillation_backward(masked[0], teacher).c).all()


@pytest.mark.parametrize("shift", [1, 2])
def test_shift_is_slicing(shift):
    student, teacher, _ = problem()
    sliced = [replace(head, e=head.e[:, :-shift]) for head in (student, teacher)]
    assert_close(
        distillation(student, teacher, TARGETS, shift=shift).loss, distillation(*sliced, TARGETS[:, shift:]).loss, tol=0
    )
    grads = distillation_backward(student, teacher, TARGETS, shift=shift)
    assert_close(grads.e[:, :-shift], distillation_backward(*sliced, TARGETS[:, shift:]).e, tol=0)
    assert not grads.e[:, -shift:].any()


@pytest.mark.parametrize(("shape", "shift"), [((0,), 0), ((4,), 0), ((2, 4), 4)])
def test_no_tokens(shape, shift):
    student, teacher, _ = problem(batch=shape)
    targets = np.full(shape, 1 if shift else -100)
    for reduction in ("mean", "sum", "none"):
        found = distillation(student, teacher, targets, shift=shift, reduction=reduction)
        assert found.n_valid == 0
        assert np.isnan(found.loss) if reduction == "mean" else not found.loss.any()
        grads = distillation_backward(student, teacher, targets, shift=shift, reduction=reduction)
        assert grads.e.shape == student.e.shape
        assert not grads.c.any()


def test_what_is_refused():
    student, teacher, _ = problem()
    with pytest.raises(ValueError, match="kind is 'kl'"):
        distillation(student, teacher, kind="kl")
    for beta in (0.0, 1.0, np.nan):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            distillation(student, teacher, kind="jsd", beta=beta)


# ---------------------------------------------------------------- PyTorch


@settings(deadline=None)
@given(st.data())
def test_against_torch(data):
    """The loss as TRL's `GKDTrainer.generalized_jsd_loss` writes it, with beta = 0 and 1 for the two KLs."""
    torch = pytest.importorskip("torch")
    draw = data.draw
    kind, reduction = draw(st.sampled_from(KINDS)), draw(st.sampled_from(["mean", "sum", "none"]))
    softcaps, temperature = draw(st.sampled_from([(None, None), (2.0, None), (1.5, 3.0)])), draw(st.floats(0.3, 5))
    student, teacher, rng = problem(draw(st.integers(0, 2**32)), vocabulary=draw(st.integers(1, 9)), softcaps=softcaps)
    parameters = [torch.tensor(x, requires_grad=True) for x in (student.e, student.c, student.bias)]
    z = parameters[0] @ parameters[1].T + parameters[2]
    z = z if student.softcap is None else student.softcap * torch.tanh(z / student.softcap)
    log_q = torch.log_softmax(z / temperature, dim=-1)
    log_p = torch.log_softmax(torch.tensor(finished_logits(teacher, temperature)), dim=-1)

    def kl(a, b):
        return torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(dim=-1)

    if kind["kind"] == "jsd":
        beta = torch.tensor(kind.get("beta", 0.5), dtype=torch.float64)
        log_m = torch.logsumexp(torch.stack([log_q + torch.log1p(-beta), log_p + torch.log(beta)]), dim=0)
        loss = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    else:
        loss = kl(log_p, log_q) if kind["kind"] == "forward_kl" else kl(log_q, log_p)
    loss = torch.where(torch.tensor(TARGETS) == -100, 0.0, loss)
    loss = {"mean": loss.sum() / 7, "sum": loss.sum(), "none": loss}[reduction]
    d_loss = rng.normal(size=tuple(loss.shape))
    (torch.tensor(d_loss) * loss).sum().backward()

    options = {"temperature": temperature, "reduction": reduction, **kind}
    assert_near(distillation(student, teacher, TARGETS, **options).loss, loss.detach().numpy())
    grads = distillation_backward(student, teacher, TARGETS, d_loss=d_loss, **options)
    for parameter, actual in zip(parameters, (grads.e, grads.c, grads.bias), strict=True):
        assert_near(actual, parameter.grad.numpy())
