"""A student's head and a teacher's: losses and gradients of every kind against stored logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cce_numba as cce
import reference
from cce_numba.arguments import DISTILLATION
from cce_numba.backend import backend_module
from reference.distillation import Head
from reference.distillation import heads as reference_heads
from tests.helpers.cases import sizes
from tests.helpers.checks import assert_within, compute_unit, rounded

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
KINDS = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture
def _has_it(harness):
    harness.skip_unless_it_has(DISTILLATION)


def heads(rng, shape, V, D, dtype, spread=2.0, bias=False, softcap=None):
    e = rng.normal(size=(*shape, D)).astype(dtype)
    c = (rng.normal(size=(V, D)) * spread / np.sqrt(D)).astype(dtype)
    return Head(e, c, rng.normal(size=V).astype(dtype) if bias else None, softcap)


def options_of(student, teacher):
    named = {"bias": student.bias, "teacher_bias": teacher.bias, "softcap": student.softcap, "teacher_softcap": teacher.softcap}
    return {name: x for name, x in named.items() if x is not None}


def log_error(head, temperature, unit):
    """(tokens...) of logarithms of probabilities."""
    e, c = (np.abs(x.astype(np.float64)) for x in (head.e, head.c))
    magnitude = (e @ c.T + (0 if head.bias is None else np.abs(head.bias.astype(np.float64)))).max(axis=-1) / temperature
    return 2 * (c.shape[1] + 16) * unit * magnitude + (64 + np.log2(len(c))) * unit * (1 + magnitude)


def check(harness, student, teacher, d_loss=None, **options):
    own = options_of(student, teacher)
    arrays = [harness.device(x) for x in (student.e, student.c, teacher.e, teacher.c)]
    given = {name: harness.device(x) if isinstance(x, np.ndarray) else x for name, x in (own | options).items()}
    d = harness.device(d_loss) if isinstance(d_loss, np.ndarray) else d_loss
    loss, grads = cce.linear_distillation_with_grad(*arrays, d_loss=d, backend=harness.backend, **given)
    alone = cce.linear_distillation(*arrays, backend=harness.backend, **given)
    np.testing.assert_array_equal(harness.host(alone), harness.host(loss))
    known = {name: x for name, x in options.items() if not name.startswith("accum")}
    exact = reference.distillation(student, teacher, **known)
    wanted = reference.distillation_backward(student, teacher, d_loss=d_loss, **known)

    unit, V = max(compute_unit(head.e.dtype) for head in (student, teacher)), len(student.c)
    temperature, shift, reduction = (
        options.get("temperature", 1.0),
        int(options.get("shift", 0)),
        options.get("reduction", "mean"),
    )
    error = sum(log_error(head, temperature, unit) for head in (student, teacher))
    error = error[..., : error.shape[-1] - shift] if shift else error
    # A divergence moves with its logarithms by at most 2 + their difference, of which largest is told by the reference.
    tokens, _, log_q, log_p = reference_heads(
        student, teacher, options.get("targets"), temperature, shift, options.get("ignore_index", -100)
    )
    apart = 3 + np.abs(log_p - log_q).max(axis=1, initial=0)
    of_token = apart * (error[tokens.valid] + (64 + V / 8) * unit)
    full = np.zeros(tokens.valid.shape)
    full[tokens.valid] = of_token
    if reduction != "none":
        full = np.asarray(full.sum() / (max(exact.n_valid, 1) if reduction == "mean" else 1))
        full = full + 8 * unit * np.abs(exact.loss)
    assert_within("loss", harness.host(loss), np.asarray(exact.loss), full)

    d_token = np.abs(tokens.select(1.0 if d_loss is None else d_loss)) / temperature
    d_token = d_token / max(exact.n_valid, 1) if reduction == "mean" else d_token
    p, q = np.exp(log_p), np.exp(log_q)
    g_error = (d_token * of_token)[:, None] * (p + q) * (2 + np.abs(log_p - log_q)) + 1e-37
    g = (d_token * apart)[:, None] * (p + q)
    g_error = 2 * g_error + 16 * unit * g
    bounds = {
        "e": tokens.gradient_of_e((g_error + V * unit * g) @ np.abs(student.c.astype(np.float64)), student.e.shape, shift),
        "c": (g_error + (len(g) + 8) * unit * g).T @ np.abs(tokens.e),
        "bias": (g_error + (len(g) + 8) * unit * g).sum(axis=0),
    }
    for name, bound in bounds.items():
        actual = harness.host(getattr(grads, name))
        if actual is not None:
            expected = getattr(wanted, name)
            assert_within(f"grads.{name}", actual, expected, rounded(bound, expected, actual.dtype))
    return grads


@pytest.mark.usefixtures("_has_it")
@given(data=st.data())
def test_any_heads(harness, edges, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), label="seed"))
    N, V = data.draw(sizes(edges.n, edges.max_n, 1), label="N"), data.draw(sizes(edges.v, edges.max_v), label="V")
    rows = data.draw(st.sampled_from([1, 2]), label="rows")
    shape = (rows, max(1, N // rows))
    made = [
        heads(
            rng,
            shape,
            V,
            data.draw(sizes(edges.d, edges.max_d), label="D"),
            data.draw(st.sampled_from(edges.dtypes), label="dtype"),
            data.draw(st.sampled_from([0.0, 2.0, 10.0]), label="spread"),
            data.draw(st.booleans(), label="bias"),
            data.draw(st.sampled_from([None, 5.0]), label="softcap"),
        )
        for _ in range(2)
    ]
    ignore = data.draw(st.sampled_from([-100, 0]), label="ignore_index")
    targets = None
    if data.draw(st.booleans(), label="targets"):
        targets = np.where(rng.random(shape) < data.draw(st.sampled_from([0.3, 1.0]), label="ignored"), ignore, 1)
    shift = data.draw(st.sampled_from([0, 1] if shape[1] > 1 else [0]), label="shift")
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]), label="reduction")
    tokens = (rows, shape[1] - shift)
    d_loss = rng.normal(size=tokens) if reduction == "none" else data.draw(st.sampled_from([None, -0.5]), label="d_loss")
    options = {} if targets is None else {"targets": targets}
    check(
        harness,
        *made,
        d_loss,
        kind=data.draw(st.sampled_from(KINDS), label="kind"),
        beta=data.draw(st.sampled_from([0.5, 0.1]), label="beta"),
        temperature=data.draw(st.sampled_from([1.0, 2.5]), label="temperature"),
        reduction=reduction,
        shift=shift,
        ignore_index=ignore,
        **options,
    )


@pytest.mark.usefixtures("_has_it")
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_its_own_is_no_loss(harness, edges, kind):
    rng = np.random.default_rng(0)
    head = heads(rng, (edges.n[-1] + 1,), edges.long_v, edges.d[-1], edges.dtype)
    grads = check(harness, head, head, kind=kind, reduction="sum")
    assert np.abs(grads.e.astype(np.float64)).max() < 1e-4


@pytest.mark.usefixtures("_has_it")
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_vocabulary_and_masked_entries(harness, edges, kind):
    """Entries that both heads mask count nothing; for the forward KL also those that the teacher alone masks."""
    rng = np.random.default_rng(1)
    student, teacher = (heads(rng, (edges.n[0] + 2,), edges.long_v, D, edges.dtype, 1.0, True) for D in edges.d[-2:])
    for head in (student, teacher):
        head.bias[:5] = -np.inf
    own = options_of(student, teacher)
    arrays = [harness.device(x) for x in (student.e, student.c, teacher.e, teacher.c)]
    loss = cce.linear_distillation(*arrays, kind=kind, backend=harness.backend, **own)
    with np.errstate(all="ignore"):
        exact = reference.distillation(student, teacher, kind=kind).loss
    if np.isfinite(exact):
        assert_within("loss", harness.host(loss), np.asarray(exact), 1e-4 * (1 + exact))


@pytest.mark.usefixtures("_has_it")
def test_a_lost_token_leaves_the_others_alone(harness, edges):
    rng = np.random.default_rng(2)
    student, teacher = (heads(rng, (edges.n[-1],), edges.v[-1], D, edges.dtype) for D in edges.d[-2:])
    arrays = [student.e.copy(), student.c, teacher.e.copy(), teacher.c]
    for place, n in ((0, 1), (2, 3)):
        arrays[place][n, 0] = np.nan
    loss, grads = cce.linear_distillation_with_grad(*map(harness.device, arrays), reduction="none", backend=harness.backend)
    loss, d_e = harness.host(loss), harness.host(grads.e)
    lost = np.isin(np.arange(len(loss)), [1, 3])
    assert np.isnan(loss[lost]).all()
    assert np.isfinite(loss[~lost]).all()
    assert np.isnan(d_e[lost]).all()
    assert np.isfinite(d_e[~lost]).all()


@pytest.mark.parametrize(
    ("error", "named", "says"),
    [
        (ValueError, {"kind": "kl"}, "kind: must be one of 'forward_kl'"),
        (ValueError, {"beta": 1.0}, "beta: must be a number between 0 and 1"),
        (ValueError, {"temperature": 0}, "temperature: must be positive"),
        (TypeError, {"z_loss": 0.1}, "z_loss: is not an option"),
        (ValueError, {"teacher_bias": np.zeros(3, np.float32)}, "teacher_bias: must have shape"),
    ],
)
@pytest.mark.usefixtures("_has_it")
def test_what_does_not_fit(harness, error, named, says):
    ones = [harness.device(np.ones(shape, np.float32)) for shape in ((2, 4), (9, 4), (2, 5), (9, 5))]
    with pytest.raises(error, match=says):
        cce.linear_distillation(*ones, backend=harness.backend, **named)


@pytest.mark.usefixtures("_has_it")
def test_heads_that_do_not_fit(harness):
    ones = [harness.device(np.ones(shape, np.float32)) for shape in ((2, 4), (9, 4), (2, 5), (9, 5))]
    wrong = {2: ((3, 5), "teacher_e: must be|targets: must have"), 3: ((8, 5), "teacher_c: must have the vocabulary")}
    for place, (shape, says) in wrong.items():
        arrays = list(ones)
        arrays[place] = harness.device(np.ones(shape, np.float32))
        with pytest.raises(ValueError, match=says):
            cce.linear_distillation(*arrays, backend=harness.backend)


def test_a_backend_without_it_says_so(harness, edges):
    if DISTILLATION in backend_module(harness.backend).EXTRAS:
        return
    ones = [harness.device(np.ones(shape, edges.dtype)) for shape in ((2, 4), (9, 4), (2, 5), (9, 5))]
    with pytest.raises(NotImplementedError, match=f"distillation: backend '{harness.backend}' does not have it yet"):
        cce.linear_distillation(*ones, backend=harness.backend)
