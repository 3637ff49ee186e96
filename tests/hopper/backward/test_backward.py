"""What the shared tests of backends do not reach in the backward: its tiles' edges, many rounds, all surviving, graphs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import cce_numba as cce
from tests.helpers.cases import DROPPING, DTYPES, Case, make_case
from tests.helpers.checks import assert_within, check_gradients, check_survivors, expect
from tests.helpers.harness import SimulatorHarness

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("gpu"),
    pytest.mark.skipif(SimulatorHarness.is_active(), reason="about a real GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
FLOAT16, BFLOAT16 = DTYPES[:2]
NAMES = ("e", "c", "bias")


@pytest.fixture
def never_dense(monkeypatch):
    """What was recorded is what is kept, even where nearly all was."""
    from cce_numba import survivors

    monkeypatch.setattr(survivors, "DENSE_SHARE", 1.0)


@pytest.fixture
def small_rounds(monkeypatch):
    """A function that cuts problems into rounds of two tiles of columns or so. It can say how much of dC rounds may borrow."""
    from cce_numba.hopper.backward import workspace
    from cce_numba.tensor_core import programs

    def cut(borrowed_bytes=0):
        monkeypatch.setattr(workspace, "_G_BYTES", (0, 0))
        monkeypatch.setattr(workspace, "_SHARE", 0.0)
        monkeypatch.setattr(workspace, "_BORROWED_BYTES", borrowed_bytes)
        workspace._known.cache_clear()
        programs.clear()  # they were recorded with the sizes of before

    yield cut
    workspace._known.cache_clear()


def check(harness, case, d_loss=None, d_lse=None, **named):
    """The gradients, which agree with the reference's of the same survivors."""
    expected, result = expect(case), harness.forward(case)
    kept = harness.kept(result, len(case.c))
    if kept is not None:
        check_survivors(expected, kept, result._problem.options.filter_eps, 128)
    grads = harness.backward(result, d_loss, d_lse, **named)
    check_gradients(expected, grads, kept, d_loss, d_lse, coarse_eps=result.plan.coarse_eps)
    return grads


def all_kept(result):
    """The result, as if nothing had been filtered: gradients of the same log-sum-exps, exact."""
    return dataclasses.replace(result, _statistics=dataclasses.replace(result._statistics, survivors=None))


def surviving_pairs(harness, case):
    """Pairs of a block and a column that survives in it."""
    kept = harness.kept(harness.forward(case), len(case.c))
    return -(-len(case.e) // 128) * len(case.c) if kept is None else int(kept[::128].sum())


def bits_of(gradients):
    """The bytes of NumPy or CuPy gradients, by name."""
    arrays = {name: getattr(gradients, name) for name in NAMES if getattr(gradients, name) is not None}
    return {name: (x.get() if hasattr(x, "get") else x).tobytes() for name, x in arrays.items()}


def blockwise(seed, N, V, D, dtype, *, filtered, **options):
    """A problem of which each block of 128 tokens keeps others, if filtered: what is likelier than most, 2 in 5 or so."""
    case = make_case(seed, (N,), V, D, dtype, spread=2.0, filter_eps=1 / (V + 1) if filtered else None, **options)
    of_blocks = np.random.default_rng(seed + 1).normal(size=(-(-N // 128), D))
    e = np.repeat(of_blocks, 128, axis=0)[:N] + 0.3 * case.e.astype(np.float64)
    return dataclasses.replace(case, e=e.astype(dtype))


# ---- sizes


SIZES = [
    (1, 1, 8),
    (1, 127, 64),
    (127, 128, 192),
    (128, 129, 200),
    (129, 191, 250),
    (700, 192, 584),
    (700, 193, 7),
    (257, 1000, 64),
    (1000, 2049, 136),
    (33 * 128 + 5, 300, 72),
]


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
@pytest.mark.parametrize(("N", "V", "D"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_sizes_around_tiles(hopper, never_dense, dtype, N, V, D, filtered):
    check(hopper, blockwise(N + V + D, N, V, D, dtype, filtered=filtered))


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
@pytest.mark.parametrize(("N", "V", "D"), [(1, 6000, 64), (300, 3000, 200), (700, 5000, 250), (33 * 128 + 5, 1500, 64)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_many_rounds(hopper, never_dense, small_rounds, dtype, N, V, D, filtered):
    """Each adds to what dE is so far; each takes the buffer of one that is done."""
    from cce_numba.hopper.backward.workspace import WorkspaceLayout
    from cce_numba.tensor_core.survey.tables import tiles_of_dense_round

    small_rounds()
    case = blockwise(N + V + D, N, V, D, dtype, filtered=filtered, bias=True)
    layout, pairs = WorkspaceLayout.of(N, V, D, with_e=True, with_sums=True).survey, surviving_pairs(hopper, case)
    assert not filtered or pairs // layout.cap >= 2, f"{pairs} pairs, {layout.cap} for a round"
    assert layout.column_tiles // tiles_of_dense_round(layout.large_cap, layout.blocks) >= 3
    check(hopper, case)


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
def test_rounds_do_not_change_what_is_kept_in_float32(hopper, never_dense, small_rounds, filtered):
    """Sums are in float32 in either case, rounded at their end."""
    case = blockwise(1, 400, 3000, 192, BFLOAT16, filtered=filtered)
    small_rounds()
    narrow = check(hopper, case)
    wide = check(hopper, case.with_options(accum_e_fp32=True, accum_c_fp32=True))
    np.testing.assert_array_equal(narrow.e, wide.e.astype(BFLOAT16))
    np.testing.assert_array_equal(narrow.c, wide.c.astype(BFLOAT16))


def test_every_column_and_step_counts(hopper, small_rounds):
    """Each entry stands out for one token, so that a tile, a round or a step of the sum that is skipped is seen."""
    N, V, D = 300, 2000, 640
    case = make_case(2, (N,), V, D, BFLOAT16, spread=0.1, reduction="sum", filter_eps=None)
    for n in range(N):
        case.e[n] = 0
        case.e[n, (n * 37) % D] = 8
        case.c[(n * 131) % V, (n * 37) % D] = 4
    check(hopper, case)
    small_rounds()
    check(hopper, case)


# ---- options


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
@pytest.mark.parametrize("wrt", ["e", "c", "bias", ("e", "bias"), ("c", "bias")])
def test_what_is_not_asked_for_is_not_needed(hopper, never_dense, small_rounds, wrt, filtered):
    """The same numbers, whatever else is computed."""
    small_rounds()
    case = blockwise(3, 300, 1500, 200, BFLOAT16, filtered=filtered, bias=True)
    every, some = bits_of(check(hopper, case)), bits_of(check(hopper, case, wrt=wrt))
    wanted = {wrt} if isinstance(wrt, str) else set(wrt)
    assert set(some) == wanted
    assert some == {name: every[name] for name in wanted}


@pytest.mark.parametrize(("filter_e_grad", "filter_c_grad"), [(True, False), (False, True)])
def test_one_filtered_and_the_other_exact(hopper, never_dense, small_rounds, filter_e_grad, filter_c_grad):
    """The one that is filtered is the same as where both are."""
    small_rounds()
    case = blockwise(4, 300, 1500, 200, BFLOAT16, filtered=True, bias=True)
    mixed = bits_of(check(hopper, case.with_options(filter_e_grad=filter_e_grad, filter_c_grad=filter_c_grad)))
    both = bits_of(check(hopper, case))
    assert (mixed["e"] == both["e"]) == filter_e_grad
    assert (mixed["c"] == both["c"]) == filter_c_grad


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
@pytest.mark.parametrize("bias", [None, "16 bits", "float32"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bias_and_softcap(hopper, never_dense, dtype, softcap, bias, filtered):
    case = blockwise(5, 300, 700, 136, dtype, softcap=softcap, filtered=filtered, bias=bias is not None)
    if bias == "float32":
        case.options["bias"] = case.options["bias"].astype(np.float32)
    check(hopper, case)


@pytest.mark.parametrize("accum", [(True, False), (False, True), (True, True)], ids=["e", "c", "both"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gradients_in_float32(hopper, never_dense, small_rounds, dtype, accum):
    small_rounds()
    case = blockwise(6, 300, 1000, 72, dtype, filtered=True, accum_e_fp32=accum[0], accum_c_fp32=accum[1])
    check(hopper, case)


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
def test_shift(hopper, never_dense, filtered):
    options = {"filter_eps": 1 / 700 if filtered else None}
    case = make_case(7, (3, 150), 700, 72, BFLOAT16, ignored=0.2, shift=1, spread=4.0, **options)
    check(hopper, case)


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
@pytest.mark.parametrize("ignored", ["first half", "every other", "all but one", "runs", "all"])
def test_tokens_that_count_are_gathered_wherever_they_are(hopper, never_dense, small_rounds, ignored, filtered):
    small_rounds()
    case = blockwise(8, 1000, 1500, 200, BFLOAT16, filtered=filtered, bias=True)
    n = np.arange(1000)
    out = {
        "first half": n < 500,
        "every other": n % 2 == 0,
        "all but one": n != 777,
        "runs": n // 90 % 2 == 0,
        "all": n >= 0,
    }[ignored]
    case.targets[out] = -100
    case.e[out] = np.nan  # whatever stands in their rows
    grads = check(hopper, case.with_options(reduction="sum"))
    assert not grads.e[out].any()
    assert grads.c.any() == (ignored != "all")


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
def test_tokens_without_upstream_gradient_cost_nothing(hopper, never_dense, small_rounds, filtered):
    """Single ones, a whole block, and NaN and infinity in their rows; one weight of two may be zero."""
    small_rounds()
    case = blockwise(9, 700, 1500, 136, BFLOAT16, filtered=filtered, bias=True, reduction="none")
    d_loss, d_lse = np.random.default_rng(9).normal(size=(2, 700)).astype(np.float32)
    d_loss[::3] = d_loss[128:256] = 0
    d_lse[::2] = d_lse[128:256] = 0
    d_lse[1::7] = -d_loss[1::7]  # then the softmax has no weight, and the target has
    silent = (d_loss == 0) & (d_lse == 0)
    assert silent.sum() > 200
    case.e[silent] = np.where(np.arange(silent.sum())[:, None] % 2, np.nan, np.inf)
    grads = check(hopper, case, d_loss, d_lse)
    assert not grads.e[silent].any()
    assert np.isfinite(grads.c.astype(np.float32)).all()


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40], ids=["tiny", "huge"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_weights_of_any_size(hopper, never_dense, dtype, scale):
    """G is rounded relative to the largest weight, so that neither float16's range nor its subnormals are met."""
    case = blockwise(10, 300, 700, 72, dtype, filtered=True, reduction="sum", accum_e_fp32=True, accum_c_fp32=True)
    check(hopper, case, d_loss=scale)


# ---- what is lost


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
@pytest.mark.parametrize("target", [-1, 10**6, 2**40])
def test_a_target_out_of_range_is_lost(hopper, never_dense, small_rounds, target, filtered):
    small_rounds()
    case = blockwise(11, 300, 1500, 136, BFLOAT16, filtered=filtered, bias=True, check_targets=False)
    case.targets[200] = target
    grads = check(hopper, case)
    assert np.isnan(grads.e[200].astype(np.float32)).all()
    assert np.isfinite(np.delete(grads.e, 200, axis=0).astype(np.float32)).all()


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
@pytest.mark.parametrize("v", [0, 777, 1499])
def test_a_row_of_the_classifier_that_is_no_number(hopper, small_rounds, v, filtered):
    """All tokens meet it, so all is lost."""
    small_rounds()
    case = blockwise(12, 300, 1500, 136, BFLOAT16, filtered=filtered, bias=True)
    case.c[v, 5] = np.nan
    grads = hopper.backward(hopper.forward(case))
    for gradient in (grads.e, grads.c, grads.bias):
        assert np.isnan(gradient.astype(np.float32)).all()


def test_masked_entries_get_nothing(hopper, never_dense):
    """A bias of -inf removes them."""
    case = blockwise(13, 300, 1500, 136, BFLOAT16, filtered=True, bias=True)
    case.options["bias"][1000:] = -np.inf
    case.targets[:] %= 1000
    grads = check(hopper, case)
    assert not grads.c[1000:].any()
    assert not grads.bias[1000:].any()


# ---- where gradients go


def view_in_wider_rows(cupy, array, dtype, offset, columns):
    """Memory full of threes, and a view of the array's shape in it, `offset` numbers into its rows."""
    parent = cupy.asarray(np.full((len(array), offset + array.shape[1] + columns), 3, dtype))
    return parent, parent[:, offset : offset + array.shape[1]]


@pytest.mark.parametrize(("offset", "columns"), [(0, 8), (1, 0), (3, 4)], ids=["longer rows", "misaligned", "both"])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("D", [64, 71])
def test_into_views_and_added_to_them(hopper, never_dense, small_rounds, D, dtype, offset, columns):
    import cupy

    small_rounds()
    wide = dtype == np.float32
    case = blockwise(14, 300, 1500, D, BFLOAT16, filtered=True, accum_e_fp32=wide, accum_c_fp32=wide)
    result, plain = hopper.forward(case), check(hopper, case)
    for name in ("e", "c"):
        expected = getattr(plain, name)
        parent, view = view_in_wider_rows(cupy, expected, dtype, offset, columns)
        out = cce.Gradients(**{name: view})
        cce.backward(result, wrt=name, out=out)
        written = parent.get()
        np.testing.assert_array_equal(written[:, offset : offset + D], expected)
        written[:, offset : offset + D] = 3
        assert (written == np.asarray(3, dtype)).all(), "what lies between the rows was touched"
        cce.backward(result, wrt=name, out=out, accumulate=True)
        twice = 2 * expected.astype(np.float64)
        tolerance = (2.0**-8 if dtype == BFLOAT16 else 0) * np.abs(twice) + 2.0**-14 * np.abs(twice).max()
        assert_within(f"out.{name}", view.get(), twice, tolerance)


def test_an_array_that_begins_between_two_numbers(hopper, never_dense):
    """Contiguous, but at an address that is no multiple of what two numbers take."""
    import cupy

    case = blockwise(15, 300, 700, 64, BFLOAT16, filtered=True)
    result, plain = hopper.forward(case), check(hopper, case)
    memory = cupy.asarray(np.full(300 * 64 + 2, 3, BFLOAT16))
    view = memory[1:-1].reshape(300, 64)
    assert view.data.ptr % 4 == 2
    cce.backward(result, wrt="e", out=cce.Gradients(e=view))
    np.testing.assert_array_equal(view.get(), plain.e)
    assert memory.get()[[0, -1]].tolist() == [3, 3]


def test_two_calls_add_up(hopper, never_dense, small_rounds):
    """Of different problems, into one gradient of the classifier."""
    import cupy

    small_rounds()
    cases = [blockwise(seed, 300, 1500, 136, BFLOAT16, filtered=True, accum_c_fp32=True, bias=True) for seed in (16, 17)]
    cases[1] = dataclasses.replace(cases[1], c=cases[0].c, options=cases[0].options)
    one, two = (check(hopper, case) for case in cases)
    out = cce.Gradients(c=cupy.zeros(one.c.shape, np.float32), bias=cupy.zeros(one.bias.shape, np.float32))
    for case in cases:
        cce.backward(hopper.forward(case), wrt=("c", "bias"), out=out, accumulate=True)
    total = one.c.astype(np.float64) + two.c
    assert_within("out.c", out.c.get(), total, 2.0**-14 * np.abs([one.c, two.c]).max())
    scale = np.abs([one.bias.astype(np.float64), two.bias.astype(np.float64)]).max()
    assert_within("out.bias", out.bias.get(), one.bias.astype(np.float64) + two.bias.astype(np.float64), 2.0**-7 * scale)


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
def test_views_of_inputs(hopper, never_dense, filtered):
    """Rows apart, and a few columns of wider rows that begin where the copy engine cannot."""
    case = blockwise(18, 300, 700, 72, BFLOAT16, filtered=filtered)
    expected = expect(case)
    for apart, offset in ((2, 0), (1, 3)):
        e, c = (np.zeros((apart * len(x), 72 + 8 + offset), BFLOAT16) for x in (case.e, case.c))
        for parent, x in ((e, case.e), (c, case.c)):
            parent[::apart, offset : offset + 72] = x
        views = (hopper.device(parent)[::apart, offset : offset + 72] for parent in (e, c))
        result = cce.forward(*views, hopper.device(case.targets), backend=hopper.backend, **case.options)
        check_gradients(expected, hopper.backward(result), hopper.kept(result, 700), coarse_eps=result.plan.coarse_eps)


# ---- all survive


@pytest.mark.parametrize("small", [False, True], ids=["", "small rounds"])
@pytest.mark.parametrize("D", [64, 250])
def test_where_nearly_all_survive_all_are_taken(hopper, small_rounds, D, small):
    """The device decides; then the gradients are the exact ones, to the bit."""
    if small:
        small_rounds()
    case = make_case(19, (700,), 1500, D, BFLOAT16, bias=True, ignored=0.1, spread=1.0, filter_eps=2.0**-9.5)
    result = hopper.forward(case)
    share = hopper.kept(result, 1500)[::128].mean()
    assert 0.7 < share < 1, f"{share} survive, and this is about nearly all"
    assert bits_of(hopper.backward(result)) == bits_of(hopper.backward(all_kept(result)))
    check_gradients(expect(case), hopper.backward(result), None)


def test_where_all_survive_lists_and_neighbours_are_the_same(hopper, never_dense, small_rounds):
    """Whether rows come one by one or by the copy engine."""
    small_rounds()
    case = make_case(20, (700,), 1500, 200, BFLOAT16, bias=True, spread=1.0, filter_eps=1e-30)
    result = hopper.forward(case)
    assert hopper.kept(result, 1500).all()
    in_lists, in_order = hopper.backward(result), hopper.backward(all_kept(result))
    for name in ("c", "bias"):
        assert bits_of(in_lists)[name] == bits_of(in_order)[name]
    # Rounds are cut elsewhere, so sums of dE are added up in another order, in float32: a last bit may be another.
    exact = in_order.e.astype(np.float64)
    assert_within("grads.e", in_lists.e, exact, 2.0**-7 * np.abs(exact) + 2.0**-20 * np.abs(exact).max())


@pytest.mark.parametrize("kind", ["drop", "unbiased"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("D", [136, 200, 71], ids=["single CTAs", "pairs", "copied rows"])
def test_exact_dc_takes_filtered_de_along_where_nearly_all_survive(hopper, small_rounds, D, adds, bias, kind):
    """The first pass does nothing, so dE is written once, and added once. Its bits are those of exact gradients."""
    from cce_numba import survivors

    small_rounds()
    options = {"filter_eps": 1e-30, "filter": kind, "filter_c_grad": False}
    case = make_case(26, (700,), 1500, D, BFLOAT16, bias=bias, ignored=0.1, spread=1.0, **options)
    result = hopper.forward(case)
    assert hopper.kept(result, 1500)[::128].mean() > survivors.DENSE_SHARE
    exact = hopper.backward(all_kept(result))
    check_gradients(expect(case), exact, None)
    names = [name for name in NAMES if getattr(exact, name) is not None]
    mixed = hopper.backward(result)
    assert bits_of(mixed) == bits_of(exact)
    if adds:
        results = {}
        for which, each in (("mixed", result), ("exact", all_kept(result))):
            out = cce.Gradients(**{name: hopper.device(getattr(exact, name).copy()) for name in names})
            cce.backward(each, out=out, accumulate=True)
            results[which] = bits_of(out)
        assert results["mixed"] == results["exact"]
        twice = 2 * exact.e.astype(np.float64)
        assert_within("out.e", hopper.host(out.e), twice, 2.0**-7 * np.abs(twice) + 2.0**-14 * np.abs(twice).max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("D", [136, 200, 71], ids=["single CTAs", "pairs", "copied rows"])
def test_exact_dc_leaves_filtered_de_alone_where_little_survives(hopper, never_dense, small_rounds, D, bias):
    """Then each pass makes its own: dE has the bits of filtered gradients, dC and dbias those of exact ones."""
    small_rounds()
    case = blockwise(27, 300, 1500, D, BFLOAT16, filtered=True, bias=bias)
    result = hopper.forward(case.with_options(filter_c_grad=False))
    mixed = check(hopper, case.with_options(filter_c_grad=False))
    filtered, exact = bits_of(check(hopper, case)), bits_of(hopper.backward(all_kept(result)))
    assert filtered["e"] != exact["e"]
    assert bits_of(mixed) == exact | {"e": filtered["e"]}
    out = cce.Gradients(**{name: hopper.device(np.zeros_like(getattr(mixed, name))) for name in exact})
    cce.backward(result, out=out, accumulate=True)
    for name in exact:  # each is added once
        np.testing.assert_array_equal(hopper.host(getattr(out, name)), getattr(mixed, name), err_msg=name)


def test_a_survey_says_anew_whether_it_is_dense(hopper, small_rounds, monkeypatch):
    """One call after the other, in memory that is used again: nearly all survives, not so much does, nothing counts."""
    from cce_numba import survivors

    monkeypatch.setattr(survivors, "DENSE_SHARE", 0.9)
    small_rounds()
    dense = make_case(26, (300,), 1500, 136, BFLOAT16, spread=1.0, filter_eps=1e-30, filter_c_grad=False)
    sparse = blockwise(27, 300, 1500, 136, BFLOAT16, filtered=True, filter_c_grad=False)
    nothing = dataclasses.replace(dense, targets=np.full_like(dense.targets, -100)).with_options(reduction="sum")
    for case in (dense, sparse, dense, nothing, sparse, dense):
        check(hopper, case)


@pytest.mark.parametrize(
    "options", [{}, {"filter_c_grad": False}, {"filter_e_grad": False}], ids=["both filtered", "exact dC", "exact dE"]
)
@pytest.mark.parametrize("wrt", [("e", "c", "bias"), "e", "c", "bias"])
@pytest.mark.parametrize("D", [136, 200], ids=["single CTAs", "pairs"])
def test_nothing_is_left_to_chance_where_all_are_taken(hopper, small_rounds, monkeypatch, D, wrt, options):
    """By the unbiased filter, too: gradients are the exact ones, to the bit."""
    from cce_numba import survivors

    monkeypatch.setattr(survivors, "DENSE_SHARE", 0.0)
    small_rounds()
    case = blockwise(28, 300, 1500, D, BFLOAT16, filtered=True, bias=True, ignored=0.1)
    by_chance = case.with_options(filter="unbiased", filter_eps=2.0**-8, **options)
    result = hopper.forward(by_chance)
    assert 0 < hopper.kept(result, 1500)[::128].mean() < 0.9, "many are dropped elsewhere"
    grads = hopper.backward(result, wrt=wrt)
    assert bits_of(grads) == bits_of(hopper.backward(all_kept(result), wrt=wrt))
    exact = hopper.backward(hopper.forward(case.with_options(filter_eps=None)), wrt=wrt)
    check_gradients(expect(case), grads, None)
    for name in (wrt,) if isinstance(wrt, str) else wrt:
        wide = getattr(exact, name).astype(np.float64)
        assert_within(name, getattr(grads, name), wide, 2.0**-7 * np.abs(wide) + 2.0**-14 * np.abs(wide).max())


# ---- memory of dC that rounds borrow


@pytest.fixture
def layouts(monkeypatch):
    """Those of the passes that were made, in order."""
    from cce_numba.hopper.backward import host

    made, layout_of = [], host.layout_of

    def seen(*given):
        made.append(layout_of(*given))
        return made[-1]

    monkeypatch.setattr(host, "layout_of", seen)
    return made


def borrow_of(N):
    """Bytes of two buffers that have 768 columns of all blocks: rounds of six tiles, and others have three of them."""
    return 2 * 768 * 256 * -(-N // 128)


def rounds_of(layout, active_blocks):
    """Rounds that borrow, and others, of a problem in which all columns survive in so many blocks."""
    from cce_numba.tensor_core.survey.tables import tiles_of_dense_round

    sizes = layout.survey
    tiles, more = (tiles_of_dense_round(cap, active_blocks) for cap in (sizes.large_cap, sizes.borrowed_cap))
    borrowed = min(sizes.borrowed_tiles, sizes.column_tiles) // more if more > tiles else 0
    return borrowed, -(-(sizes.column_tiles - borrowed * more) // tiles)


BORROWED = [(160, 6001, 200), (300, 6000, 250), (740, 12_001, 136)]  # pairs of CTAs twice, single ones; ragged ends


@pytest.mark.parametrize("ignored", [0.0, 0.1], ids=["", "some ignored"])
@pytest.mark.parametrize(("N", "V", "D"), BORROWED)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rounds_that_borrow(hopper, small_rounds, layouts, dtype, N, V, D, ignored):
    """Several, so that each buffer is used again, and several others after them, which write where the buffers were."""
    case = make_case(N + D, (N,), V, D, dtype, ignored=ignored, filter_eps=None, spread=2.0)
    small_rounds()
    plain = check(hopper, case)
    assert layouts.pop().borrowed_slots == 0
    small_rounds(borrow_of(N))
    grads = check(hopper, case)
    counted = -(-int((case.targets != -100).sum()) // 128)
    borrowed, others = rounds_of(layouts.pop(), counted)
    assert min(borrowed, others) >= 3
    assert bits_of(grads)["c"] == bits_of(plain)["c"], "each of its sums is made in one round"
    first = bits_of(grads)
    for _ in range(3):
        assert bits_of(hopper.backward(hopper.forward(case))) == first


@pytest.mark.parametrize("accum", [(False, True), (True, True)], ids=["c", "both"])
@pytest.mark.parametrize(("N", "V", "D"), BORROWED[:2])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rounds_that_borrow_of_dc_in_float32(hopper, small_rounds, layouts, dtype, N, V, D, accum):
    """Rows of dC are longer than G's numbers would have them."""
    case = make_case(N + D, (N,), V, D, dtype, filter_eps=None, accum_e_fp32=accum[0], accum_c_fp32=accum[1])
    small_rounds(borrow_of(N))
    check(hopper, case)
    assert min(rounds_of(layouts.pop(), -(-N // 128))) >= 3


def test_rounds_that_borrow_where_few_blocks_are_active(hopper, small_rounds, layouts):
    """One block of three has no weight, and takes no slots; a round has more tiles."""
    case = make_case(29, (300,), 6000, 250, BFLOAT16, filter_eps=None, reduction="none")
    d_loss = np.random.default_rng(29).normal(size=300).astype(np.float32)
    d_loss[128:256] = d_loss[::5] = 0
    small_rounds(borrow_of(300))
    grads = check(hopper, case, d_loss)
    assert min(rounds_of(layouts.pop(), 2)) >= 3
    assert not grads.e[d_loss == 0].any()
    half = make_case(30, (300,), 6000, 250, BFLOAT16, filter_eps=None, ignored=0.4)
    check(hopper, half)
    counted = -(-int((half.targets != -100).sum()) // 128)
    assert counted < 3
    assert min(rounds_of(layouts.pop(), counted)) >= 3


@pytest.mark.parametrize("D", [71, 200], ids=["copied rows", "as they lie"])
def test_rounds_that_borrow_of_an_array_that_is_given(hopper, small_rounds, layouts, D):
    """Whatever was in it; and nothing beside it is touched, where it is part of a larger one."""
    import cupy

    N, V = 300, 12_000
    case = make_case(31, (N,), V, D, BFLOAT16, filter_eps=None)
    small_rounds(borrow_of(N))
    result, plain = hopper.forward(case), check(hopper, case)
    parent = cupy.asarray(np.full((V + 16, D), np.nan, BFLOAT16))
    out = cce.Gradients(e=cupy.asarray(np.full((N, D), np.nan, BFLOAT16)), c=parent[8:-8])
    cce.backward(result, wrt=("e", "c"), out=out)
    assert bits_of(out) == bits_of(plain)
    assert np.isnan(parent.get()[[*range(8), *range(-8, 0)]].astype(np.float32)).all()
    wider, view = view_in_wider_rows(cupy, plain.c, BFLOAT16, 8, 8)
    cce.backward(result, wrt=("e", "c"), out=cce.Gradients(e=out.e, c=view))
    assert view.get().tobytes() == plain.c.tobytes()
    written = wider.get()
    written[:, 8 : 8 + D] = 3
    assert (written == np.asarray(3, BFLOAT16)).all(), "what lies between the rows was touched"
    assert all(min(rounds_of(layout, 3)) >= 2 for layout in layouts)


@pytest.mark.parametrize("what", ["adds", "bias", "dC alone", "dE alone", "filtered"])
def test_rounds_that_borrow_nothing(hopper, small_rounds, layouts, monkeypatch, what):
    """Gradients that hold values; sums of columns, which have no place there; no sums of dE that larger rounds would spare."""
    from cce_numba import survivors

    filtered = what == "filtered"
    if filtered:
        monkeypatch.setattr(survivors, "DENSE_SHARE", 1.0)
    case = blockwise(32, 300, 6000, 200, BFLOAT16, filtered=filtered, bias=what == "bias")
    small_rounds(borrow_of(300))
    if what == "adds":
        once = hopper.backward(hopper.forward(case))
        out = cce.Gradients(e=hopper.device(once.e.copy()), c=hopper.device(once.c.copy()))
        layouts.clear()
        cce.backward(hopper.forward(case), out=out, accumulate=True)
        for name in ("e", "c"):
            twice = 2 * getattr(once, name).astype(np.float64)
            tolerance = 2.0**-7 * np.abs(twice) + 2.0**-14 * np.abs(twice).max()
            assert_within(f"out.{name}", hopper.host(getattr(out, name)), twice, tolerance)
    else:
        check(hopper, case, wrt={"dC alone": "c", "dE alone": "e", "bias": ("e", "c", "bias")}.get(what, ("e", "c")))
    layout = layouts.pop()
    assert all(other == layout for other in layouts), "host code that is no program runs twice"
    # Of a filtered problem, only the device knows whether it borrows.
    assert (layout.borrowed_slots > 0) == filtered


def test_where_nearly_all_survive_rounds_borrow_too(hopper, small_rounds, layouts):
    """The bits are those of exact gradients: both filtered, or dE alone, which exact dC takes along."""
    case = make_case(33, (300,), 6000, 200, BFLOAT16, spread=1.0, filter_eps=1e-30)
    small_rounds(borrow_of(300))
    result, mixed = hopper.forward(case), hopper.forward(case.with_options(filter_c_grad=False))
    exact = bits_of(hopper.backward(all_kept(result)))
    assert min(rounds_of(layouts.pop(), 3)) >= 3
    layouts.clear()
    small_rounds(borrow_of(300))  # so that its host code runs again
    assert bits_of(hopper.backward(result)) == exact
    assert bits_of(hopper.backward(mixed)) == exact
    assert [layout.borrowed_slots > 0 for layout in layouts] == [True, False, True], "the first pass makes dE alone"


# ---- coarser for the classifier

EPS_OF = {FLOAT16: 2.0**-19, BFLOAT16: 2.0**-16}  # that "auto" means


def nearest_probable(dtype, log_p, lse, upwards):
    """The number of the dtype next to what gives a log-probability, above or below it."""
    z = np.asarray(lse + log_p, dtype)
    step = np.asarray(np.inf if upwards else -np.inf, dtype)
    while (float(z) - lse < log_p) if upwards else (float(z) - lse > log_p):
        z = np.nextafter(z, step)
    return z


@pytest.fixture
def early_bounds(monkeypatch):
    """The first tile of the vocabulary is a phase of its own, so all others know the log-sum-exp that it makes."""
    from cce_numba.tensor_core import layout

    monkeypatch.setattr(layout, "LEAST_TILES", 1)
    layout._known.cache_clear()
    yield
    layout._known.cache_clear()


def tiles_that_dc_may_leave_out(dtype, **options):
    """Tokens of three blocks, of which each sees one column of c. And what is needed for dC, and why: both (3, 1024) bool.

    The blocks are groups 0, 2 and 5 of 8, in whose Gray code those columns come first that block 0 alone needs, then all, 1, 2.
    So tiles of sorted columns are: what block 0 gives 4 eps and block 1 twice eps; the likely ones, which come first in c and
    make the log-sum-exp; one that block 1 gives 4 eps, with 127 that block 2 does, and that all give twice eps at least; one
    that is a target in block 2 and 127 others, to which blocks 0 and 2 give twice eps; and what blocks 1 and 2 give 4 eps
    nearly. The others nobody keeps. Nothing is so near to a threshold that a lower bound of the log-sum-exp changes it.
    """
    eps = EPS_OF[dtype]
    e, c = np.zeros((384, 64), dtype), np.zeros((1024, 64), dtype)
    e[np.arange(384), np.arange(384) // 128] = 1
    reached, needed = np.zeros((3, 1024), bool), np.zeros((3, 1024), bool)
    c[:, :3] = -30
    c[:128, :3] = 0
    reached[:, :128] = needed[:, :128] = True
    lse = np.log(128 * (1 + 1100 * eps))  # or so, with all that follows

    def give(block, columns, times, upwards=True):
        c[columns, block] = nearest_probable(dtype, np.log(times * eps), lse, upwards)
        reached[block, columns] = times > 4

    give(0, slice(128, 256), 4.1)
    give(1, slice(128, 256), 2)
    needed[0, 128:256] = True
    give(0, slice(256, 384), 2)
    give(1, slice(257, 384), 2)
    give(1, 256, 4.1)
    give(2, 256, 2)
    give(2, slice(257, 384), 4.1)
    needed[1:, 256:384] = True
    give(0, slice(384, 512), 2)
    give(2, slice(384, 512), 2)
    needed[2, 384:512] = True
    give(1, slice(512, 640), 3.8, upwards=False)
    give(2, slice(512, 640), 3.8, upwards=False)
    targets = np.arange(384) % 128
    targets[300] = 400
    reached[2, 400] = True
    return Case(e, c, targets, DROPPING | {"reduction": "sum", **options}), needed, reached


def of_blocks(rows):
    """(3, 1024) of (384, 1024), where a block's rows are the same."""
    return rows[::128]


@pytest.mark.parametrize("small", [False, True], ids=["", "small rounds"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_tiles_that_no_token_gives_4_eps_are_left_out_of_dc(hopper, early_bounds, small_rounds, dtype, small):
    """And others whole, and nothing of dE; nor where the threshold is the caller's choice."""
    if small:
        small_rounds()
    case, needed, reached = tiles_that_dc_may_leave_out(dtype, bias=np.zeros(1024, dtype))
    expected, result, given = expect(case), hopper.forward(case), hopper.forward(case.with_options(filter_eps=EPS_OF[dtype]))
    kept = of_blocks(hopper.kept(result, 1024))
    p = of_blocks(np.exp(expected.forward.logits - expected.forward.lse[:, None]))
    np.testing.assert_array_equal(kept, p >= EPS_OF[dtype])
    np.testing.assert_array_equal(of_blocks(hopper.kept_coarsely(result, 1024)), reached)
    np.testing.assert_array_equal(of_blocks(hopper.kept(given, 1024)), kept)
    assert hopper.kept_coarsely(given, 1024) is None
    assert result.plan.coarse_eps == 4 * EPS_OF[dtype]
    assert given.plan.coarse_eps is None

    auto, fine = hopper.backward(result), hopper.backward(given)
    rows, needed_rows = np.repeat(kept, 128, axis=0), np.repeat(needed & kept, 128, axis=0)
    check_gradients(expected, fine, rows)
    check_gradients(expected, cce.Gradients(e=auto.e), rows)
    check_gradients(expected, auto, rows, coarse_eps=result.plan.coarse_eps)
    check_gradients(expected, cce.Gradients(c=auto.c, bias=auto.bias), needed_rows)
    # Block b's tokens have their only hidden entry at b, so dC's column b is the sum over them alone.
    for block in range(3):
        both, left_out = kept[block] & needed[block], kept[block] & ~needed[block]
        np.testing.assert_array_equal(auto.c[both, block], fine.c[both, block])
        assert left_out.sum() == [256, 256, 128][block]
        assert fine.c[left_out, block].all()
        assert not auto.c[left_out, block].any()

    for wrt in ("c", "bias"):
        assert getattr(hopper.backward(result, wrt=wrt), wrt).tobytes() == getattr(auto, wrt).tobytes()
    out = cce.Gradients(c=hopper.device(auto.c.copy()))
    cce.backward(result, wrt="c", out=out, accumulate=True)
    twice = 2 * auto.c.astype(np.float64)
    assert_within("out.c", out.c.get(), twice, 2.0**-7 * np.abs(twice))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_lost_token_is_lost_for_all_columns(hopper, early_bounds, dtype):
    """However improbable: nothing of its block is left out."""
    case, _, reached = tiles_that_dc_may_leave_out(dtype, bias=np.zeros(1024, dtype), check_targets=False)
    case.targets[5] = 10**6
    check(hopper, case)
    result = hopper.forward(case)
    kept, coarse = of_blocks(hopper.kept(result, 1024)), of_blocks(hopper.kept_coarsely(result, 1024))
    assert kept[0].all()
    assert coarse[0].all()
    np.testing.assert_array_equal(coarse[1:], reached[1:])
    grads = hopper.backward(result)
    assert np.isnan(grads.c.astype(np.float32)).all()
    assert np.isnan(grads.bias.astype(np.float32)).all()
    assert np.isfinite(grads.e[128:].astype(np.float32)).all()


def test_where_all_are_taken_nothing_is_left_out(hopper, small_rounds, monkeypatch):
    """The device decides; then gradients are the exact ones, to the bit."""
    from cce_numba import survivors

    monkeypatch.setattr(survivors, "DENSE_SHARE", 0.0)
    small_rounds()
    case, *_ = tiles_that_dc_may_leave_out(BFLOAT16, bias=np.zeros(1024, BFLOAT16))
    result = hopper.forward(case)
    assert bits_of(hopper.backward(result)) == bits_of(hopper.backward(all_kept(result)))


@pytest.mark.parametrize(("N", "V", "D"), [*SIZES[4:], (33 * 128 + 5, 1500, 64)])
@pytest.mark.parametrize("spread", [4.0, 24.0])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_what_is_left_out_is_small(hopper, never_dense, small_rounds, dtype, spread, N, V, D):
    """Of anything, with tokens that do not count or have no weight among the others."""
    small_rounds()
    case = make_case(N + V, (N,), V, D, dtype, spread=spread, ignored=0.1, bias=True, reduction="none")
    d_loss = np.random.default_rng(N).normal(size=N).astype(np.float32)
    d_loss[::3] = d_loss[128:256] = 0
    first = check(hopper, case, d_loss)
    assert bits_of(check(hopper, case, d_loss)) == bits_of(first)


def test_where_nothing_is_between_the_thresholds_they_are_the_same(hopper, small_rounds):
    """To the bit: each of nine blocks likes some columns, 1 in 16 or so, and gives the others next to nothing."""
    small_rounds()
    rng = np.random.default_rng(25)
    case = make_case(25, (1100,), 2000, 64, BFLOAT16, reduction="sum")
    case.e[...], case.c[...] = 0, 0
    case.e[np.arange(1100), np.arange(1100) // 128] = 1
    likes = rng.random((2000, 9)) < 1 / 16
    likes[:64] = True
    case.c[:, :9] = np.where(likes, 0, -40)
    case.targets[:] = rng.integers(0, 64, 1100)
    result, given = hopper.forward(case), hopper.forward(case.with_options(filter_eps=2.0**-16))
    np.testing.assert_array_equal(hopper.kept(result, 2000)[::128], likes.T)
    np.testing.assert_array_equal(hopper.kept_coarsely(result, 2000)[::128], likes.T)
    assert bits_of(hopper.backward(result)) == bits_of(hopper.backward(given))
    check(hopper, case)


# ---- the same each time


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
def test_the_same_bits_each_time(hopper, small_rounds, filtered):
    """Five times, on a stream of its own, and while another one is busy."""
    import cupy

    small_rounds()
    case = blockwise(21, 1000, 5000, 200, BFLOAT16, filtered=filtered, bias=True, ignored=0.1)
    result = hopper.forward(case)
    first = bits_of(cce.backward(result))
    assert all(bits_of(cce.backward(result)) == first for _ in range(4))
    cupy.cuda.Device().synchronize()
    stream, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with stream:
        own = bits_of(cce.backward(hopper.forward(case)))
    with other:
        busy = cupy.ones(2**24, np.float32)
        for _ in range(200):
            busy = cupy.sqrt(busy + 1)
    with stream:
        beside = [bits_of(cce.backward(hopper.forward(case))) for _ in range(3)]
    cupy.cuda.Device().synchronize()
    assert own == first
    assert all(each == first for each in beside)


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
def test_a_call_with_gradients_can_be_captured_in_a_graph(hopper, filtered):
    """And replayed with other inputs, of which other columns survive. It also shows that nothing waits for the device."""
    import cupy

    eps = 1 / 3001 if filtered else None
    cases = [blockwise(seed, 300, 3000, 256, BFLOAT16, filtered=filtered, bias=True) for seed in (22, 23)]
    arrays = [[cupy.asarray(x) for x in (case.e, case.c, case.targets, case.options["bias"])] for case in cases]
    e, c, targets, bias = (x.copy() for x in arrays[0])

    def call():
        loss, grads = cce.linear_cross_entropy_with_grad(e, c, targets, bias=bias, filter_eps=eps, backend="hopper")
        return loss, grads.e, grads.c, grads.bias

    def fill(which):
        for place, values in zip((e, c, targets, bias), arrays[which], strict=True):
            place[...] = values

    expected = []
    for which in (0, 1):
        fill(which)
        expected.append([x.get().tobytes() for x in call()])
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        with cupy.cuda.using_allocator(pool.malloc):
            call()
            stream.begin_capture()
            captured = call()
            graph = stream.end_capture()
        for which in (1, 0, 1):
            fill(which)
            graph.launch(stream)
            stream.synchronize()
            assert [x.get().tobytes() for x in captured] == expected[which]


# ---- large


def test_more_logits_than_32_bits_can_count(hopper):
    """Some tokens' dE and some columns' dC against float64, with the log-sum-exps that were found."""
    import cupy

    N, V, D = 16_384, 140_000, 64
    assert N * V > 2**31
    rng = np.random.default_rng(24)
    e, c = rng.standard_normal((N, D)).astype(BFLOAT16), (rng.standard_normal((V, D)) / 4).astype(BFLOAT16)
    targets = rng.integers(0, V, N)
    on_device = (cupy.asarray(x) for x in (e, c, targets))
    result = cce.forward(*on_device, reduction="sum", filter_eps=None, backend="hopper")
    grads = cce.backward(result)
    lse, e, c = result.lse.get().astype(np.float64), e.astype(np.float64), c.astype(np.float64)
    some_n, some_v = np.array([0, 127, 128, 9999, N - 1]), np.array([0, 127, 128, 70_001, V - 1])
    z = e[some_n] @ c.T
    np.testing.assert_allclose(lse[some_n], np.log(np.exp(z).sum(axis=1)), rtol=1e-5)
    g = np.exp(z - lse[some_n, None])
    g[np.arange(len(some_n)), targets[some_n]] -= 1
    of_columns = np.exp(e @ c[some_v].T - lse[:, None]) - (targets[:, None] == some_v)
    for name, got, exact, magnitude in (
        ("dE", grads.e.get()[some_n], g @ c, np.abs(g) @ np.abs(c)),
        ("dC", grads.c.get()[some_v], of_columns.T @ e, np.abs(of_columns).T @ np.abs(e)),
    ):
        # G and the result are rounded to bfloat16, half a unit of 2^-8 each; of G's errors, many cancel.
        assert_within(name, got, exact, 2.0**-8 * np.abs(exact) + 2.0**-9 * magnitude)
