"""Backward of the tensor-core kernels: every way through its jobs, in rounds as small as they get.

Rounds are cut to two tiles of columns or so, so that small problems take several of them: a round adds to the sums of dE
that the round before left, and takes over the buffer of a round that is done. Two hidden sizes take turns. With D=200 a row
of a gradient has two tiles, and CTAs work in pairs; with D=136 it has one, and CTAs work alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

import cce_numba as cce
from benchmarks.small_cases import Check
from cce_numba import survivors
from cce_numba.hopper.backward import workspace
from cce_numba.hopper.backward.tiles import LARGE_BUFFERS
from cce_numba.tensor_core.backward.records import G_ROW_BYTES
from cce_numba.tensor_core.survey.tables import COLUMN_TILE
from tests.helpers.cases import DTYPES, Case, make_case
from tests.helpers.checks import assert_within, check_gradients, check_survivors, expect, unbiased_scales
from tests.helpers.harness import Harness

Cut = Callable[[], contextlib.AbstractContextManager[None]]

N, V = 300, 1500
V_BORROWED = 5000  # so many that G borrows memory of dC
PAIRED, ALONE = 200, 136  # hidden sizes
FLOAT16, BFLOAT16 = DTYPES[:2]


def checks(harness: Harness, odd: Harness, cut: Cut | None = None) -> dict[str, Check]:
    """Checks by name. `odd` hands over matrices that the copy engine cannot read as they lie. `cut` makes rounds small."""
    found: dict[str, Check] = {}
    cut = cut or small_rounds

    def add(name: str, check: Any, case: Case, by: Harness = harness, **named: Any) -> None:
        found[f"{case.e.dtype} {name}"] = functools.partial(_in_small_rounds, check, by, case, cut, **named)

    for dtype in (BFLOAT16, FLOAT16):
        for D, ctas in ((PAIRED, "pairs"), (ALONE, "single CTAs")):
            add(f"filtered, {ctas}", check_case, _blockwise(1, D, dtype, bias=True))
            add(f"two thresholds, {ctas}", check_case, _peaked(2, D, dtype, bias=True))
            add(f"exact, {ctas}", check_case, _blockwise(3, D, dtype, filter_eps=None, bias=True))
            add(f"unbiased, {ctas}", check_unbiased, _by_chance(D, dtype))
    for D, ctas in ((PAIRED, "pairs"), (ALONE, "single CTAs")):
        filtered = _blockwise(4, D, bias=True)
        add(f"exact dC beside filtered dE, {ctas}", check_case, filtered.with_options(filter_c_grad=False))
        add(f"exact dE beside filtered dC, {ctas}", check_case, filtered.with_options(filter_e_grad=False))
        for wrt in ("e", "c"):
            add(f"d{wrt.upper()} alone, {ctas}", check_case, filtered, wrt=wrt)
        add(f"scattered tokens, {ctas}", check_case, _scattered(_blockwise(5, D, bias=True, reduction="sum")))
        by_chance = _by_chance(D)
        add(f"unbiased dC beside exact dE, {ctas}", check_unbiased, by_chance.with_options(filter_e_grad=False))
        add(f"scattered tokens, two thresholds, {ctas}", check_case, _scattered(_peaked(6, D, bias=True, reduction="sum")))
        add(f"accumulate, {ctas}", check_accumulated, _blockwise(7, D, bias=True))
        add(f"accumulate, two thresholds, {ctas}", check_accumulated, _peaked(8, D, bias=True))
        wide = _blockwise(9, D, bias=True, accum_e_fp32=True, accum_c_fp32=True)
        add(f"accumulate in float32, {ctas}", check_accumulated, wide)
    add("dbias alone", check_case, _blockwise(4, PAIRED, bias=True), wrt="bias")
    add("accumulate, exact", check_accumulated, _blockwise(10, PAIRED, filter_eps=None, bias=True))
    add("tokens without an upstream gradient", check_weighted, _blockwise(11, PAIRED, bias=True, reduction="none"))
    add("softcap", check_case, _blockwise(12, PAIRED, bias=True, softcap=4.0))
    add("label smoothing", check_case, _blockwise(13, PAIRED, bias=True, label_smoothing=0.1))
    smoothed = _blockwise(14, PAIRED, bias=True, softcap=4.0, label_smoothing=0.1)
    add("softcap and label smoothing", check_case, smoothed)
    add("logit scale", check_case, _blockwise(15, PAIRED, bias=True, logit_scale=0.625))
    scales = np.random.default_rng(16).uniform(0.25, 1.5, N).astype(np.float32)
    add("logit scale for each token", check_case, _blockwise(16, PAIRED, bias=True, logit_scale=scales))
    add("copied rows", check_case, _blockwise(17, 71, bias=True), odd)
    add("copied rows, exact", check_case, _blockwise(18, 71, filter_eps=None, bias=True), odd)
    for D, ctas in ((PAIRED, "pairs"), (ALONE, "single CTAs")):
        borrowing = make_case(20, (N,), V_BORROWED * PAIRED // D, D, BFLOAT16, filter_eps=None)
        add(f"exact, G borrows memory of dC, {ctas}", check_case, borrowing)
        for tiles in (26, 10):
            kept = make_case(22, (N,), V_BORROWED, D, BFLOAT16, filter_eps=None, workspace_bytes=3 * tiles * 49_664)
            add(f"exact, {tiles} tiles of logits are kept, {ctas}", check_case, kept)
    nearly_all = make_case(19, (N,), V, PAIRED, BFLOAT16, spread=1.0, ignored=0.1, bias=True, filter_eps=2.0**-9.8)
    for name, case in (
        ("so all are taken", nearly_all),
        ("so exact dC takes dE along", nearly_all.with_options(filter_c_grad=False)),
    ):
        found[f"{BFLOAT16} nearly all survive, {name}"] = functools.partial(_with_rounds, check_dense, harness, case, cut)
    return found


# ---- problems


def _blockwise(seed: int, D: int, dtype: np.dtype = BFLOAT16, **options: Any) -> Case:
    """A problem of which each block of 128 tokens keeps entries of its own: what is likelier than most, two in five or so."""
    case = make_case(seed, (N,), V, D, dtype, spread=2.0, **{"filter_eps": 1 / (V + 1), **options})
    of_blocks = np.random.default_rng(seed + 1).normal(size=(-(-N // 128), D))
    e = np.repeat(of_blocks, 128, axis=0)[:N] + 0.3 * case.e.astype(np.float64)
    return dataclasses.replace(case, e=e.astype(dtype))


def _by_chance(D: int, dtype: np.dtype = BFLOAT16, **options: Any) -> Case:
    """A problem of which many entries survive by chance, and none is within rounding of its draw."""
    return _blockwise(21, D, dtype, bias=True, filter="unbiased", filter_eps=2.0**-8, **options)


def _peaked(seed: int, D: int, dtype: np.dtype = BFLOAT16, **options: Any) -> Case:
    """A problem with probabilities on both sides of both thresholds of the default filter, the second of which is dC's."""
    return make_case(seed, (N,), V, D, dtype, spread=24.0, **options)


def _scattered(case: Case) -> Case:
    """The problem with every other token ignored, and NaN in their rows."""
    case.targets[::2] = -100
    case.e[::2] = np.nan
    return case


# ---- rounds


@contextlib.contextmanager
def small_rounds() -> Iterator[None]:
    """Cuts rounds as small as they get; those that borrow memory of dC are of six tiles, twice as many as others of theirs."""
    workspace._known.cache_clear()
    try:
        with (
            mock.patch.object(workspace, "_G_BYTES", (0, 0)),
            mock.patch.object(workspace, "_SHARE", 0.0),
            mock.patch.object(workspace, "_BORROWED_BYTES", LARGE_BUFFERS * G_ROW_BYTES * 6 * COLUMN_TILE * -(-N // 128)),
        ):
            yield
    finally:
        workspace._known.cache_clear()


def _with_rounds(check: Any, harness: Harness, case: Case, cut: Cut, **named: Any) -> None:
    with cut():
        check(harness, case, **named)


def _in_small_rounds(check: Any, harness: Harness, case: Case, cut: Cut, **named: Any) -> None:
    with mock.patch.object(survivors, "DENSE_SHARE", 1.0):
        _with_rounds(check, harness, case, cut, **named)


# ---- checks


def check_case(harness: Harness, case: Case, d_loss: Any = None, d_lse: Any = None, **named: Any) -> cce.Gradients:
    """The gradients. Raises AssertionError unless they are the reference's for the same survivors, and none is missed."""
    expected, result = expect(case), harness.forward(case)
    kept = harness.kept(result, len(case.c))
    if kept is not None:
        check_survivors(expected, kept, result._problem.options.filter_eps, result._statistics.survivor_block)
    gradients = harness.backward(result, d_loss, d_lse, **named)
    check_gradients(expected, gradients, kept, d_loss, d_lse, coarse_eps=result.plan.coarse_eps)
    return gradients


def check_unbiased(harness: Harness, case: Case, **named: Any) -> None:
    """Raises AssertionError unless the gradients are those of the draws that are due."""
    expected, result = expect(case), harness.forward(case)
    scales, kept = unbiased_scales(result, expected), harness.kept(result, V)
    assert scales is not None
    assert kept is not None
    assert kept[scales != 0].all()
    assert (scales > 1).any()
    check_gradients(expected, harness.backward(result, **named), scales)


def check_dense(harness: Harness, case: Case) -> None:
    """Raises AssertionError unless the device takes all columns, since nearly all survive: the gradients are the exact ones."""
    result = harness.forward(case)
    kept = harness.kept(result, V)
    if kept is not None:  # a backend that decides in the forward has recorded nothing
        share = kept.mean()
        assert survivors.DENSE_SHARE < share < 1, f"{share:.2%} survive, and this is about nearly all"
    check_gradients(expect(case), harness.backward(result), None)


def check_weighted(harness: Harness, case: Case) -> None:
    """Checks as `check_case` does. Some tokens have no upstream gradient and give nothing, whatever is in their rows."""
    d_loss, d_lse = np.random.default_rng(9).normal(size=(2, N)).astype(np.float32)
    d_loss[::3] = d_loss[128:256] = 0
    d_lse[::2] = d_lse[128:256] = 0
    d_lse[1::7] = -d_loss[1::7]  # then the softmax has no weight, and the target has
    silent = (d_loss == 0) & (d_lse == 0)
    case.e[silent] = np.nan
    gradients = check_case(harness, case, d_loss, d_lse)
    assert gradients.e is not None
    assert not gradients.e[silent].any()


def check_accumulated(harness: Harness, case: Case) -> None:
    """Writes gradients into arrays that hold something else, then adds them once more."""
    plain, result = check_case(harness, case), harness.forward(case)
    names = ("e", "c", "bias")
    out = cce.Gradients(**{name: harness.device(np.full_like(getattr(plain, name), 3)) for name in names})
    cce.backward(result, out=out)
    for name in names:
        np.testing.assert_array_equal(harness.host(getattr(out, name)), getattr(plain, name), err_msg=name)
    cce.backward(result, out=out, accumulate=True)
    for name in names:
        once = getattr(plain, name)
        twice = 2 * once.astype(np.float64)
        rounding = 0 if once.dtype == np.float32 else 2.0**-8
        tolerance = rounding * np.abs(twice) + 2.0**-14 * np.abs(twice).max()
        assert_within(f"out.{name}", harness.host(getattr(out, name)), twice, tolerance)
