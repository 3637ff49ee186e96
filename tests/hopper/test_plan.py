"""What `explain` tells of the tensor-core kernels: bytes, work and copies, by arithmetic alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from cce_numba import gpu
from cce_numba.interchange import BFLOAT16
from cce_numba.options import Options
from tests.helpers.cases import DROPPING
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)

from cce_numba.hopper import backend
from cce_numba.hopper.backward.workspace import workspace_bytes
from cce_numba.hopper.forward.layout import Layout
from cce_numba.hopper.tiles import HopperTiles

N, V = 1000, 50_000


@pytest.fixture(autouse=True)
def an_h100(monkeypatch):
    monkeypatch.setattr(gpu, "current", lambda: gpu.Gpu((9, 0), 132))
    monkeypatch.setattr(backend, "_plans", {})


def matrix(rows, columns, apart=None):
    """Of 16-bit numbers, as plans look at it; rows `apart` numbers apart."""
    memory = SimpleNamespace(ptr=1024)
    return SimpleNamespace(shape=(rows, columns), strides=(2 * (apart or columns), 2), itemsize=2, dtype=BFLOAT16, data=memory)


def problem(D, bias=None, apart=None, **given):
    return SimpleNamespace(
        N=N, V=V, D=D, K=None, e=matrix(N, D, apart), c=matrix(V, D, apart), bias=bias, dtype=BFLOAT16, device="cuda:0",
        targets=np.zeros(N, np.int64), options=Options.of(BFLOAT16, DROPPING | given), logits_bytes=4 * N * V,
    )  # fmt: skip


def test_the_gradient_of_a_bias_takes_workspace_whichever_was_planned_first():
    with_bias = np.zeros(V, np.float32)
    first, second = backend.plan(problem(64)), backend.plan(problem(64, bias=with_bias))
    assert first.backward_bytes == workspace_bytes(problem(64))
    assert second.backward_bytes == workspace_bytes(problem(64, bias=with_bias)) != first.backward_bytes
    assert backend.plan(problem(64)) is first
    assert backend.plan(problem(64, bias=with_bias)) is second


@pytest.mark.parametrize(
    ("given", "numbers", "results", "bound"),
    [
        ({"filter_eps": None}, 2, ["lse", "max_logit", "log_sum", "target_logit"], 0),
        ({}, 2, ["lse", "max_logit", "log_sum", "target_logit"], 1),
        ({"softcap": 5.0, "label_smoothing": 0.1}, 3, ["lse", "max_logit", "log_sum", "target_logit", "total_logit"], 0),
    ],
    ids=["exact", "filtered", "smoothed under a softcap"],
)
def test_the_forward_takes_what_its_folds_take(given, numbers, results, bound):
    """Numbers of a row between workers; for each token its results, its place in the list, and a bound for survivors."""
    plan = backend.plan(problem(64, **given))
    assert plan.forward_bytes == plan.layout.scratch_bytes(numbers) + 4 * (len(results) + 1 + bound) * N


def test_work_is_told():
    assert "; 0.0064 TFLOP of products in the forward" in backend.plan(problem(64)).how
    assert "copies" not in backend.plan(problem(64)).how


@pytest.mark.parametrize(
    ("given", "coarse_eps", "planes"),
    [
        ({}, 2.0**-14, 2),
        ({"filter_eps": "auto", "filter_e_grad": False}, 2.0**-14, 2),
        ({"filter_c_grad": False}, None, 1),
        ({"filter_eps": 2.0**-16}, None, 1),
        ({"filter_eps": None}, None, 0),
        ({"filter_e_grad": False, "filter_c_grad": False}, None, 0),
        ({"softcap": 5.0, "label_smoothing": 0.1}, None, 0),
    ],
    ids=str,
)
def test_a_filter_that_nobody_chose_is_coarser_for_the_classifier(given, coarse_eps, planes):
    """Then there is a second bit for each block and entry."""
    plan = backend.plan(problem(64, **given))
    assert plan.coarse_eps == coarse_eps
    assert ("128 tokens at once where all are below 6.1e-05" in plan.how) == (coarse_eps is not None)
    assert plan.survivor_bytes == planes * 8 * 261 * 24, "8 blocks of tokens, 261 tiles of entries"
    form = backend.statistics_form(problem(64, **given))
    assert (form.tokens, form.survivor_block, form.planes) == (np.int32, plan.tiles.survivor_block, max(1, planes))


@pytest.mark.parametrize("N", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("V", [1, 191, 192, 193, 256, 50_000])
@pytest.mark.parametrize("given", [{}, {"filter_c_grad": False}], ids=str)
def test_the_form_of_survivors_is_that_of_the_layout(N, V, given):
    """Of which the forward makes them: a row for each block, and words for whole tiles."""
    p = problem(64, **given)
    p.N, p.V, p.e, p.c = N, V, matrix(N, 64), matrix(V, 64)
    layout, form = Layout.of(p, HopperTiles()), backend.statistics_form(p)
    assert form.planes == (1 if given else 2)
    assert form.survivors_shape(N, V) == (form.planes * layout.blocks, 4 * layout.pitch_words)
    assert backend.plan(p).survivor_bytes == form.survivor_bytes(N, V) == form.planes * layout.survivor_bytes


@pytest.mark.parametrize("apart", [None, 72], ids=["contiguous", "a view that the copy engine reads"])
def test_rows_that_are_no_whole_16_bytes_are_copied_for_the_backward(apart):
    """And so are the gradients, which are stored 16 bytes at a time."""
    how = backend.plan(problem(65, apart=apart)).how
    reason = "since its rows of 65 elements are not a multiple of 16 bytes long"
    assert f"for the backward whole copies: e, {reason} and c, {reason}" in how
    assert ("c is copied" in how) == (apart is None)
    assert workspace_bytes(problem(65, apart=apart)) == workspace_bytes(problem(72)) + 2 * 2 * (N + V) * 72
