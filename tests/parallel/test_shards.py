"""A vocabulary in shards against one process, and against the reference. Ranks are threads (`tests/helpers/ranks.py`).

In float64, so that what one process and several compute differs by roundings that are far from anything that is looked for.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cce_numba as cce
import reference
from cce_numba.survivors import unpack_survivors
from tests.helpers.cases import Edges, cases, filters, make_case, with_terms
from tests.helpers.distributions import with_ids
from tests.helpers.ranks import on_ranks

FLOAT64 = (np.dtype(np.float64),)
# One block of survivors and the next; bytes of bits; more entries than a tile of the CPU backend is not worth the time here.
EDGES = Edges(n=(1, 128, 256), v=(1, 8, 16), d=(1,), max_n=260, max_v=70, max_d=5, dtypes=FLOAT64)
TOLERANCE = 1e-9
TERMS = {
    "default": {},
    "exact": {"filter_eps": None},
    "filtered": {"filter_eps": 0.05},
    "filtered e": {"filter_eps": 0.05, "filter_c_grad": False},
    "dropped": {"filter": "drop", "filter_eps": 0.05},
    "smoothed": {"label_smoothing": 0.2, "z_loss": 0.1},
    "smoothed, capped": {"label_smoothing": 0.2, "softcap": 4.0},
    "more": {"entropy": True, "sum_squares": True, "top_k": 3, "batch_invariant": True},
}


def slices(V, cuts):
    """The ranks' rows, by where they are cut; two equal cuts leave one without rows."""
    return [slice(a, b) for a, b in itertools.pairwise([0, *sorted(cuts), V])]


def sharded(case, cuts, **more):
    """`(result, gradients)` on each rank."""
    ours = slices(len(case.c), cuts)

    def run(one):
        rows = ours[one.rank]
        options = case.options | ({"bias": case.options["bias"][rows]} if "bias" in case.options else {})
        result = cce.forward(case.e, case.c[rows], case.targets, communicator=one, backend="cpu", **options, **more)
        return result, cce.backward(result)

    return on_ranks(len(ours), run)


def whole(case, **more):
    result = cce.forward(case.e, case.c, case.targets, backend="cpu", **case.options, **more)
    return result, cce.backward(result)


def assert_near(actual, expected, name=""):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * (scale + 1e-300), err_msg=name)


def check_against_whole(case, ranks, one):
    expected, grads = one
    for result, own in ranks:
        for name in ("loss", "nll", "lse", "target_logit", "n_valid", "entropy", "sum_squares", "top_logprobs", "logprobs"):
            if getattr(expected, name) is not None:
                assert_near(getattr(result, name), getattr(expected, name), name)
                assert np.array_equal(getattr(result, name), getattr(ranks[0][0], name), equal_nan=True), f"{name} on ranks"
        if expected.top_ids is not None:
            np.testing.assert_array_equal(result.top_ids, expected.top_ids)
        assert_near(own.e, grads.e, "dE")
    assert_near(np.concatenate([own.c for _, own in ranks]), grads.c, "dC")
    if grads.bias is not None:
        assert_near(np.concatenate([own.bias for _, own in ranks]), grads.bias, "dbias")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_as_one_process(data):
    """Any sizes, options and cuts, shards without rows among them; the unbiased filter keeps the same columns."""
    case = data.draw(with_terms(data.draw(cases(EDGES))))
    case = case.with_options(**data.draw(filters()), filter="unbiased", filter_seed=data.draw(st.integers(0, 3)))
    V = len(case.c)
    extras = {
        "entropy": data.draw(st.booleans()),
        "sum_squares": data.draw(st.booleans()),
        "top_k": data.draw(st.integers(0, min(4, V))),
    }
    cuts = data.draw(st.lists(st.integers(0, V), min_size=0, max_size=3), label="cuts")
    case = case.with_options(**extras)
    check_against_whole(case, sharded(case, cuts), whole(case))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("cuts", [(30,), (0, 1, 30), (7, 7, 64), ()], ids=str)
def test_each_option_as_one_process(terms, cuts):
    """Of the filter that drops, logits are so far apart that its threshold comes between none of its bounds."""
    spread = 60.0 if terms == "dropped" else 2.0
    case = make_case(3, (2, 90), 65, 6, np.dtype(np.float64), spread=spread, ignored=0.3, bias=True, shift=1)
    case = case.with_options(**{"filter": "unbiased"} | TERMS[terms])
    check_against_whole(case, sharded(case, cuts), whole(case))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_other_dtypes_are_exact_to_their_rounding(dtype):
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    case = make_case(5, (150,), 83, 7, kind, ignored=0.2, filter_eps=None)
    ranks, (expected, grads) = sharded(case, (20, 41, 41)), whole(case)
    unit = float(ml_dtypes.finfo(kind).eps)
    for result, own in ranks:
        np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-6)
        np.testing.assert_allclose(own.e.astype(float), grads.e.astype(float), rtol=2 * unit, atol=1e-6)
        assert own.e.dtype == kind
    every = np.concatenate([own.c for _, own in ranks])
    np.testing.assert_allclose(every.astype(float), grads.c.astype(float), rtol=2 * unit, atol=1e-6)


@pytest.mark.parametrize("terms", ["exact", "smoothed", "smoothed, capped"])
def test_as_the_reference(terms):
    case = make_case(6, (140,), 37, 5, np.dtype(np.float64), ignored=0.2, bias=True)
    weights = {"class_weights": np.random.default_rng(0).uniform(0, 2, 37)}
    case = case.with_options(**TERMS[terms] | weights | {"filter_eps": None})
    options = {name: x for name, x in case.options.items() if name not in ("filter", "filter_eps")}
    exact = reference.forward(case.e, case.c, case.targets, **options)
    grads = reference.backward(case.e, case.c, case.targets, **options)
    ranks = sharded(case, (11, 12))
    for result, own in ranks:
        assert_near(result.loss, exact.loss)
        assert_near(own.e, grads.e)
    assert_near(np.concatenate([own.c for _, own in ranks]), grads.c)


@pytest.mark.parametrize("spread", [2.0, 4.0])
def test_the_filter_that_drops_keeps_what_its_rule_says_and_more(spread):
    """Each rank bounds by what it has seen itself, so it may keep more than one process does; gradients have all of that."""
    case = make_case(7, (300,), 600, 16, np.dtype(np.float64), spread=spread, filter_eps=0.1)
    ours = slices(600, (200, 500))
    exact = reference.forward(case.e, case.c, case.targets)
    z = case.e @ case.c.T
    p = np.exp(z - exact.lse[:, None])
    g = (p - np.eye(600)[case.targets]) / 300
    kept = np.ones((300, 600), bool)
    ranks = sharded(case, (200, 500))
    for (result, _), rows in zip(ranks, ours, strict=True):
        if result._statistics.survivors is not None:
            bits = unpack_survivors(result._statistics, rows.stop - rows.start)
            kept[:, rows] = bits.repeat(128, axis=0)[:300]
    must = (p >= 0.1) | np.eye(600, dtype=bool)[case.targets]
    of_block = np.stack([must[first : first + 128].any(axis=0) for first in (0, 128, 256)]).repeat(128, axis=0)[:300]
    assert not (of_block & ~kept).any()
    assert not kept.all(), "something is dropped"
    for _, own in ranks:
        assert_near(own.e, (g * kept) @ case.c)
    assert_near(np.concatenate([own.c for _, own in ranks]), (g * kept).T @ case.e)


def test_the_same_columns_by_chance_as_one_process():
    """Not by numbers alone: which rows of dC are 0 is the same, block by block."""
    case = make_case(8, (128,), 200, 6, np.dtype(np.float64), filter="unbiased", filter_eps=0.2)
    _, grads = whole(case)
    ranks = sharded(case, (33, 100, 101))
    zero = ~np.concatenate([own.c for _, own in ranks]).any(axis=1)
    np.testing.assert_array_equal(zero, ~grads.c.any(axis=1))
    assert 10 < zero.sum() < 190, "some are left out, and some are not"


def test_every_token_ignored_and_no_tokens():
    for shape in ((5,), (0,)):
        case = make_case(9, shape, 20, 4, np.dtype(np.float64), ignored=1.0, filter="unbiased", entropy=True, reduction="sum")
        for result, own in sharded(case, (3, 3)):
            assert float(result.loss) == 0
            assert not own.e.any()
            assert not own.c.any()


@pytest.mark.parametrize("filter", ["drop", "unbiased"])
@pytest.mark.parametrize("row", [0, 149, 399])
def test_a_lost_token_is_lost_on_every_rank(filter, row):
    """Whichever rank has the NaN, among its first rows or not: its block's columns are NaN everywhere.

    Other tokens' losses and gradients are as before.
    """
    case = make_case(10, (200,), 400, 5, np.dtype(np.float64), filter=filter, filter_eps=0.3, reduction="none")
    before = sharded(case, (150, 300))
    of_row, case.c[row, 0] = case.c[row, 0], np.nan
    for (result, own), (earlier, _) in zip(sharded(case, (150, 300)), before, strict=True):
        assert np.isnan(result.loss).all()
        assert np.isnan(own.c).all()
        assert (result.survivor_counts() == len(own.c)).all()
        assert np.isfinite(earlier.loss).all()
    case.c[row, 0], case.e[150] = of_row, np.nan
    finite = np.arange(200) != 150
    for result, own in sharded(case, (150, 300)):
        assert np.isnan(result.loss[150])
        assert np.isfinite(result.loss[finite]).all()
        assert np.isnan(own.e[150]).all()
        assert np.isnan(own.c).all()
        assert np.isfinite(own.e[finite]).all()


def test_minus_infinity_takes_an_entry_out_and_a_whole_shard():
    case = make_case(11, (60,), 30, 4, np.dtype(np.float64), filter_eps=None)
    case = case.with_options(bias=np.where(np.arange(30) < 12, -np.inf, 0.0), ignore_index=5, entropy=True)
    case.targets[:] = np.where(case.targets < 12, 5, case.targets)
    check_against_whole(case, sharded(case, (6, 12)), whole(case))


def test_several_targets_that_different_ranks_have():
    rng = np.random.default_rng(12)
    case = with_ids(make_case(12, (140,), 50, 5, np.dtype(np.float64), filter="unbiased", filter_eps=0.05), 3, rng)
    probs = rng.uniform(0, 1, case.targets.shape)
    check_against_whole(case, sharded(case, (10, 31), target_probs=probs), whole(case, target_probs=probs))


def test_ids_of_logprobs():
    rng = np.random.default_rng(13)
    case = with_ids(make_case(13, (40,), 50, 5, np.dtype(np.float64)), 4, rng)
    options = {"entropy": True, "top_k": 2, "backend": "cpu"}
    expected = cce.linear_logprobs(case.e, case.c, case.targets, **options)
    ours = slices(50, (5, 40))
    every = on_ranks(
        3, lambda one: cce.linear_logprobs(case.e, case.c[ours[one.rank]], case.targets, communicator=one, **options)
    )
    for found in every:
        for actual, wanted in zip(found, expected, strict=True):
            if wanted is not None:
                assert_near(actual, wanted)


@pytest.mark.parametrize("axis", [0, 1, -2])
@pytest.mark.parametrize("cuts", [(4, 5), (4, 4), (0, 9)], ids=str)
def test_tokens_in_shards(axis, cuts):
    """Sequence parallel: each rank has a part of e, of any length, and gets that part's gradient, added to what is there."""
    case = make_case(14, (9, 9), 50, 5, np.dtype(np.float64), ignored=0.2, shift=1, filter="unbiased", filter_eps=0.05)
    expected, grads = whole(case)
    tokens, ours = slices(9, cuts), slices(50, (20, 20))
    place = 0 if axis == 0 else 1

    def part_of(array, rank):
        return array[tokens[rank]] if place == 0 else array[:, tokens[rank]]

    def run(one):
        e, c = part_of(case.e, one.rank), case.c[ours[one.rank]]
        found = {"communicator": one, "tokens_axis": axis, "backend": "cpu"} | case.options
        out = cce.Gradients(e=np.full(e.shape, 2.0), c=np.full(c.shape, 2.0))
        loss, added = cce.linear_cross_entropy_with_grad(e, c, case.targets, out=out, accumulate=True, **found)
        assert added.e is out.e
        return loss, added, cce.backward(cce.forward(e, c, case.targets, **found), d_loss=3.0)

    for rank, (loss, added, own) in enumerate(on_ranks(3, run)):
        assert_near(loss, expected.loss)
        assert_near(added.e, part_of(grads.e, rank) + 2)
        assert_near(own.e, 3 * part_of(grads.e, rank))
        assert_near(added.c, grads.c[ours[rank]] + 2)


def test_upstream_gradients_and_wrt():
    case = make_case(15, (130,), 40, 5, np.dtype(np.float64), filter="unbiased", reduction="none", entropy=True)
    rng = np.random.default_rng(0)
    upstream = {name: rng.normal(size=130) for name in ("d_loss", "d_lse", "d_logprobs", "d_entropy")}
    one = cce.forward(case.e, case.c, case.targets, backend="cpu", **case.options)
    expected = cce.backward(one, **upstream)
    ours = slices(40, (17,))

    def run(comm):
        result = cce.forward(case.e, case.c[ours[comm.rank]], case.targets, communicator=comm, **case.options)
        calls = len(comm.calls)
        frozen = cce.backward(result, **upstream, wrt="c")
        assert len(comm.calls) == calls, "a gradient of c alone needs no communication"
        assert frozen.e is None
        return frozen.c, cce.backward(result, **upstream, wrt="e").e

    for rank, (d_c, d_e) in enumerate(on_ranks(2, run)):
        assert_near(d_c, expected.c[ours[rank]])
        assert_near(d_e, expected.e)


def test_what_is_carried():
    """In training 8 bytes a token while ranks go forward and 12 afterwards, then dE in float32; 12 for a loss alone.

    And 4 KiB before, by which they agree.
    """
    case = make_case(16, (100,), 40, 8, np.dtype(np.float16), filter="unbiased", filter_eps=0.1)
    ours = slices(40, (17, 17))

    def run(one):
        arguments = case.e, case.c[ours[one.rank]], case.targets
        cce.linear_cross_entropy(*arguments, communicator=one)
        of_loss, one.calls[:] = list(one.calls), []
        cce.linear_cross_entropy_with_grad(*arguments, communicator=one)
        return of_loss, one.calls

    agreed, bounds, numbers = (("all_gather", n_bytes) for n_bytes in (4096, 8 * 100, 12 * 100))
    for of_loss, of_both in on_ranks(3, run):
        assert of_loss == [agreed, numbers]
        assert of_both == [agreed, bounds, numbers, ("all_reduce", 4 * 100 * 8)]


def test_ranks_that_exchange_bounds_flag_fewer_columns():
    """Most probability is on the first rank, as with entries that are ordered by frequency."""
    rng = np.random.default_rng(17)
    e = np.concatenate([np.ones((256, 1)), rng.normal(size=(256, 7))], axis=1)
    c = np.concatenate([-np.log(np.arange(1, 2001))[:, None] * 2, rng.normal(size=(2000, 7))], axis=1)
    targets, options = rng.integers(0, 50, 256), {"filter_eps": 1e-3, "backend": "cpu"}
    ours = slices(2000, (500, 1000, 1500))
    together = on_ranks(4, lambda one: cce.forward(e, c[ours[one.rank]], targets, communicator=one, **options))
    by_hand = [cce.forward_shard(e, c[rows], targets, vocab_start=rows.start, vocab_size=2000, **options) for rows in ours]
    by_hand = [cce.merge(part, [other.packed for other in by_hand]) for part in by_hand]
    flagged, alone = (sum(result.survivor_counts().sum() for result in results) for results in (together, by_hand))
    whole = cce.forward(e, c, targets, **options).survivor_counts().sum()
    assert flagged < 1.2 * whole < 0.6 * alone, (flagged, whole, alone)
