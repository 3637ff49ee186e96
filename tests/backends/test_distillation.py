"""A student's head and a teacher's: losses and gradients of every kind against stored logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cce_numba as cce
import reference
from cce_numba.arguments import DISTILLATION, FILTERED_DISTILLATION
from cce_numba.backend import backend_module
from reference.distillation import KINDS
from tests.helpers.cases import sizes
from tests.helpers.checks import assert_within
from tests.helpers.distillation import check, heads, options_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FILTERS = [
    {},
    {"filter_eps": None},
    {"filter_eps": "auto", "filter": "drop"},
    {"filter_eps": 0.3, "filter": "drop"},
    {"filter_eps": 0.02, "filter": "drop"},
    {"filter_eps": 0.3, "filter_seed": 5},
    {"filter_eps": 0.02},
]


@pytest.fixture
def _has_it(harness):
    harness.skip_unless_it_has(DISTILLATION)


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
    d_loss = data.draw(st.sampled_from([None, -0.5]), label="d_loss")
    if reduction == "none":
        d_loss = rng.normal(size=tokens) * (rng.random(tokens) < 0.9)
    options = data.draw(st.sampled_from(FILTERS), label="filter") | ({} if targets is None else {"targets": targets})
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
    head = heads(rng, (edges.n[-1] + 1,), edges.v[-1] + 5, edges.d[-1], edges.dtype)
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
    own = {name: harness.device(bias) for name, bias in options_of(student, teacher).items()}  # no softcaps here
    arrays = [harness.device(x) for x in (student.e, student.c, teacher.e, teacher.c)]
    loss = cce.linear_distillation(*arrays, kind=kind, backend=harness.backend, **own)
    with np.errstate(all="ignore"):
        exact = reference.distillation(student, teacher, kind=kind).loss
    if np.isfinite(exact):
        assert_within("loss", harness.host(loss), np.asarray(exact), 1e-4 * (1 + exact))


@pytest.mark.usefixtures("_has_it")
@pytest.mark.parametrize(("options", "kind"), list(zip(FILTERS[2:], (*KINDS, *KINDS[::2]), strict=True)), ids=str)
def test_a_long_vocabulary_that_is_filtered(harness, edges, options, kind):
    """Several blocks of tokens, some of which take no part, and several blocks of the vocabulary."""
    rng = np.random.default_rng(5)
    N = edges.n[-1] + 3
    student, teacher = (
        heads(rng, (N,), edges.long_v, D, edges.dtype, 3.0, bias, cap)
        for D, bias, cap in ((edges.d[-1], True, None), (edges.d[-2] + 1, False, 9.0))
    )
    targets = np.where(rng.random(N) < 0.2, -100, 0)
    eps = options["filter_eps"]
    if isinstance(eps, float):  # what so many entries have
        options = options | {"filter_eps": eps * 100 / edges.long_v}
    d_loss = rng.normal(size=N) * (rng.random(N) < 0.8)
    check(harness, student, teacher, d_loss, kind=kind, reduction="none", targets=targets, temperature=1.5, **options)


@pytest.mark.usefixtures("_has_it")
def test_the_filter_s_defaults(harness, edges):
    """What bounds a gradient is filtered; what does not is exact. Numbers of the caller change draws, and not the loss."""
    rng = np.random.default_rng(6)
    student, teacher = (heads(rng, (edges.n[0] + 1,), edges.v[-1] + 5, D, edges.dtype) for D in edges.d[-2:])
    arrays = [harness.device(x) for x in (student.e, student.c, teacher.e, teacher.c)]

    def gradient(**options):
        loss, grads = cce.linear_distillation_with_grad(*arrays, backend=harness.backend, **options)
        return harness.host(loss), harness.host(grads.c)

    has = FILTERED_DISTILLATION in backend_module(harness.backend).EXTRAS
    for kind in KINDS:
        loss, given = gradient(kind=kind)
        explicit, drawn, exact = (
            gradient(kind=kind, **options) for options in ({"filter_eps": "auto"}, {"filter_seed": 1}, {"filter_eps": None})
        )
        assert loss == explicit[0] == drawn[0] == exact[0]
        np.testing.assert_array_equal(given, (exact if kind == "reverse_kl" else explicit)[1])
        seeds = [gradient(kind=kind, filter_eps=0.2, filter_seed=k)[1] for k in (0, 0, 1)]
        np.testing.assert_array_equal(*seeds[:2])
        assert (seeds[0] != seeds[2]).any() == has


@pytest.mark.usefixtures("_has_it")
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_with_a_lost_token_is_whole(harness, edges, kind):
    """Its gradient is NaN in every row that the token reaches, and no filter makes it finite."""
    rng = np.random.default_rng(7)
    student, teacher = (heads(rng, (edges.n[0] + 1,), edges.v[-1] + 5, D, edges.dtype) for D in edges.d[-2:])
    student.e[0, 0] = np.nan
    arrays = [harness.device(x) for x in (student.e, student.c, teacher.e, teacher.c)]
    for options in ({"filter_eps": 0.5, "filter": "drop"}, {"filter_eps": 0.5}):
        _, grads = cce.linear_distillation_with_grad(*arrays, kind=kind, backend=harness.backend, **options)
        assert np.isnan(harness.host(grads.c)).all()
        assert np.isnan(harness.host(grads.e)[0]).all()


@pytest.mark.usefixtures("_has_it")
def test_an_infinite_divergence_is_not_filtered(harness, edges):
    """Of the reverse KL, where the teacher masks an entry: G is infinite in every column."""
    rng = np.random.default_rng(8)
    student, teacher = (heads(rng, (edges.n[0] + 1,), edges.v[-1] + 5, D, edges.dtype) for D in edges.d[-2:])
    arrays = [harness.device(x) for x in (student.e, student.c, teacher.e, teacher.c)]
    bias = np.zeros(edges.v[-1] + 5, edges.dtype)
    bias[3] = -np.inf
    named = {"kind": "reverse_kl", "teacher_bias": harness.device(bias), "backend": harness.backend}
    for options in ({"filter_eps": 0.5, "filter": "drop"}, {"filter_eps": 0.5}):
        loss, grads = cce.linear_distillation_with_grad(*arrays, **named, **options)
        assert harness.host(loss) == np.inf
        assert not np.isfinite(harness.host(grads.c)).any()


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
        (ValueError, {"filter": "keep"}, "filter: must be one of"),
        (ValueError, {"filter_eps": 2.0}, "filter_eps: must be 'auto'"),
        (TypeError, {"filter_seed": 0.5}, "filter_seed: must be an integer"),
        (ValueError, {"teacher_bias": np.zeros(3, np.float32)}, "teacher_bias: must have shape"),
    ],
)
@pytest.mark.usefixtures("_has_it")
def test_what_does_not_fit(harness, edges, error, named, says):
    ones = [harness.device(np.ones(shape, edges.dtype)) for shape in ((2, 4), (9, 4), (2, 5), (9, 5))]
    with pytest.raises(error, match=says):
        cce.linear_distillation(*ones, backend=harness.backend, **named)


@pytest.mark.usefixtures("_has_it")
def test_heads_that_do_not_fit(harness, edges):
    ones = [harness.device(np.ones(shape, edges.dtype)) for shape in ((2, 4), (9, 4), (2, 5), (9, 5))]
    wrong = {2: ((3, 5), "teacher_e: must be|targets: must have"), 3: ((8, 5), "teacher_c: must have the vocabulary")}
    for place, (shape, says) in wrong.items():
        arrays = list(ones)
        arrays[place] = harness.device(np.ones(shape, edges.dtype))
        with pytest.raises(ValueError, match=says):
            cce.linear_distillation(*arrays, backend=harness.backend)


@pytest.mark.usefixtures("_has_it")
@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_that_are_no_neighbours(harness, edges, kind):
    """Ignored tokens leave gaps, which some backends fetch otherwise; gradients are added to what is there, in float32."""
    rng = np.random.default_rng(3)
    N, V = edges.n[-1] + 3, edges.v[-1] + 5
    student, teacher = (
        heads(rng, (N,), V, D, edges.dtype, bias=bias, softcap=cap)
        for D, bias, cap in ((edges.d[-1] + 1, True, 7.0), (edges.d[-2] + 8, True, None))
    )
    targets = np.where(rng.random(N) < 0.2, -100, 0)
    check(
        harness, student, teacher, rng.normal(size=N), kind=kind, beta=0.3, temperature=1.5, reduction="none", targets=targets,
        accum_e_fp32=True, accum_c_fp32=True,
    )  # fmt: skip


@pytest.mark.usefixtures("_has_it")
def test_gradients_are_the_same_each_time_and_added(harness, edges):
    rng = np.random.default_rng(4)
    student, teacher = (heads(rng, (edges.n[-1],), edges.v[-1], D, edges.dtype) for D in edges.d[-2:])
    arrays = [harness.device(x) for x in (student.e, student.c, teacher.e, teacher.c)]
    options = {"backend": harness.backend, "kind": "jsd", "accum_e_fp32": True, "accum_c_fp32": True, "wrt": ("e", "c")}
    once = [cce.linear_distillation_with_grad(*arrays, **options)[1] for _ in range(2)]
    first, second = ([harness.host(g) for g in (grads.e, grads.c)] for grads in once)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)
    cce.linear_distillation_with_grad(*arrays, out=once[0], accumulate=True, **options)
    for x, y in zip((once[0].e, once[0].c), second, strict=True):
        np.testing.assert_allclose(harness.host(x), 2 * y, rtol=1e-5, atol=1e-6 * np.abs(y).max())


def test_a_backend_without_it_says_so(harness, edges):
    if DISTILLATION in backend_module(harness.backend).EXTRAS:
        return
    ones = [harness.device(np.ones(shape, edges.dtype)) for shape in ((2, 4), (9, 4), (2, 5), (9, 5))]
    with pytest.raises(NotImplementedError, match=f"distillation: backend '{harness.backend}' does not have it yet"):
        cce.linear_distillation(*ones, backend=harness.backend)
