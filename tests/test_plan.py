"""Which backend is chosen and why; what it says of memory; a GPU asked for where there is none."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest

import cce_numba as cce
from cce_numba import arguments
from cce_numba import backend as backend_
from cce_numba import plan as planning
from cce_numba.backend import backend_module
from cce_numba.cpu.tiles import WORKSPACE_BYTES
from cce_numba.simt.tiles import GPU_TILES, GPU_TILES_FLOAT64, SIMULATOR_TILES, SimtTiles
from tests.helpers.harness import SimulatorHarness, why_no_gpu

e, c, targets = np.ones((3, 4), np.float32), np.ones((5, 4), np.float32), np.array([0, 1, 4])
not_simulated = pytest.mark.skipif(SimulatorHarness.is_active(), reason="about a process without the simulator")


@not_simulated
def test_host_arrays_go_to_the_cpu_and_the_plan_says_why():
    plan = cce.explain(e, c, targets)
    assert plan.backend == "cpu"
    assert set(plan.rejected) == {"hopper", "ampere", "simt"}
    assert "host" in plan.rejected["simt"]
    assert plan.stored_logits_bytes == 3 * 5 * 4
    for part in (
        "backend cpu",
        "survivor bits",
        "not hopper: the arrays are on the host",
        "not simt: the arrays are on the host",
    ):
        assert part in str(plan)


@not_simulated
def test_a_gpu_asked_for_and_none_there_or_arrays_not_on_it():
    with pytest.raises(cce.BackendUnavailable) as caught:
        cce.linear_cross_entropy(e, c, targets, backend="simt")
    message = str(caught.value)
    assert "backend: 'simt'" in message
    assert ("cupy.asarray" in message) if why_no_gpu() is None else ("CuPy" in message or "GPU" in message)


@pytest.mark.parametrize("name", planning.BACKENDS)
def test_backends_offer_what_the_protocol_asks(name):
    module = backend_module(name)
    for function in ("why_not", "statistics_form", "plan", "indexed_dot", "forward", "reduced_nll", "nll_weight", "backward"):
        asked = list(inspect.signature(getattr(backend_.Backend, function)).parameters.values())[1:]
        offered = list(inspect.signature(getattr(module, function)).parameters.values())
        assert [(p.name, p.kind) for p in offered] == [(p.name, p.kind) for p in asked], function


@pytest.mark.parametrize(
    "options",
    [
        {"logit_scale": 0.5, "softcap": 30.0},
        {"logit_scale": np.ones(3)},
        {"label_smoothing": 0.1, "z_loss": 0.1, "class_weights": np.ones(5), "token_weights": np.ones(3)},
        {"label_smoothing": 0.1, "class_weights": np.ones(5), "logit_scale": np.ones(3), "softcap": 30.0},
    ],
)
def test_tensor_cores_take_every_term(monkeypatch, options):
    from cce_numba.hopper import backend

    monkeypatch.setattr(backend.gpu, "SIMULATED", False)
    monkeypatch.setattr(backend.gpu, "why_not", lambda on_device: None)
    monkeypatch.setattr(backend.gpu, "current", lambda: SimpleNamespace(compute_capability=(9, 0)))
    assert backend.why_not(arguments.problem(e.astype(np.float16), c.astype(np.float16), targets, options)) is None


@not_simulated
def test_a_filter_that_is_left_out_is_told():
    options = {"softcap": 30.0, "label_smoothing": 0.1}
    assert "nothing is filtered, since" in cce.explain(e, c, targets, **options).filter
    assert cce.explain(e, c, targets, **options).survivor_bytes == 0
    assert cce.explain(e, c, targets, label_smoothing=0.1).survivor_bytes > 0


@not_simulated
def test_what_the_filter_does_is_told_in_a_line():
    """Its name, its threshold, whether gradients are right on average, and which of them are exact."""
    for named, parts in (
        ({}, ("unbiased, gradients are right on average", "below 3.73e-09 in all 128 tokens", "multiplied")),
        ({"filter": "drop"}, ("drop, gradients are biased", "below 2.33e-10 in all 128 tokens", "left out")),
        ({"filter_eps": 0.25}, ("unbiased", "below 0.25 in")),
        ({"filter_e_grad": False}, ("unbiased", "; the gradient of e is exact")),
        ({"filter": "drop", "filter_c_grad": False}, ("drop", "; the gradients of c and bias are exact")),
        ({"filter_e_grad": False, "filter_c_grad": False}, ("none, gradients are exact",)),
        ({"filter": "drop", "filter_eps": None}, ("none, gradients are exact",)),
    ):
        plan = cce.explain(e, c, targets, **named)
        assert plan.filter.startswith(parts[0])
        assert all(part in plan.filter for part in parts)
        assert f"  filter: {plan.filter}\n" in str(plan)


@not_simulated
def test_survivors_take_memory_where_some_gradient_is_filtered():
    """Where both are exact none are recorded, whichever way it was asked for."""
    for named, any_filtered in (
        ({}, True),
        ({"filter_e_grad": False}, True),
        ({"filter_c_grad": False}, True),
        ({"filter_e_grad": False, "filter_c_grad": False}, False),
        ({"filter_eps": None}, False),
    ):
        assert (cce.explain(e, c, targets, **named).survivor_bytes > 0) == any_filtered
        assert (cce.forward(e, c, targets, **named)._statistics.survivors is not None) <= any_filtered


@not_simulated
def test_no_backend_at_all(monkeypatch):
    monkeypatch.setattr(planning, "BACKENDS", ("simt",))
    with pytest.raises(cce.BackendUnavailable, match="no backend can run this:\n  simt: the arrays are on the host"):
        cce.linear_cross_entropy(e, c, targets)


def test_explain_computes_nothing_and_checks_everything():
    assert cce.explain(e, c, backend="cpu").backend == "cpu"
    with pytest.raises(ValueError, match="targets"):
        cce.explain(e, c, targets[:2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("N", [1, 100, 8192, 100_000])
@pytest.mark.parametrize("V", [1, 1000, 256_000])
@pytest.mark.parametrize("D", [1, 640, 8192, 50_000])
def test_the_cpu_plan_keeps_its_promise_of_memory(dtype, N, V, D):
    wide = np.lib.stride_tricks.as_strided  # shapes without their memory
    huge_e, huge_c = (wide(np.zeros(1, dtype), (rows, D), (0, 0)) for rows in (N, V))
    plan = cce.explain(huge_e, huge_c, backend="cpu")
    assert plan.forward_bytes <= plan.backward_bytes <= WORKSPACE_BYTES < 64 * 2**20
    tiles = plan.tiles
    assert tiles.block_v % 8 == 0
    assert tiles.block_n % tiles.survivor_block == 0
    assert tiles.dE_group == N or tiles.dE_group % tiles.survivor_block == 0


@pytest.mark.parametrize("tiles", [GPU_TILES, GPU_TILES_FLOAT64, SIMULATOR_TILES])
def test_simt_tiles_in_use(tiles):
    assert tiles.threads == tiles.threads_n * tiles.threads_v
    assert tiles.survivor_block == tiles.block_n


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((100, 128, 8, 8, 8), "block_n must be a multiple of thread_n"),
        ((128, 100, 8, 8, 8), "block_v must be a multiple of thread_v"),
        ((8, 12, 8, 4, 4), "block_v must be a multiple of 8"),
        ((128, 120, 8, 8, 6), "thread_v must be a multiple of 4"),
        ((128, 128, 1, 8, 8), "multiples of the 256 threads"),
        ((64, 128, 32, 1, 4), "at most 1024"),
    ],
)
def test_simt_tiles_that_cannot_work_say_why(sizes, says):
    with pytest.raises(ValueError, match=says):
        SimtTiles(*sizes)
