"""What the host hands to the kernels of a backward, without a GPU: the launches in order, and their records, by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cce_numba.interchange import BFLOAT16
from tests.helpers.cases import DROPPING
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator has none of these kernels", allow_module_level=True)


from cce_numba import gpu
from cce_numba.backend import Gradients, Statistics, Weights
from cce_numba.hopper import tensor_map
from cce_numba.hopper.backward import host
from cce_numba.hopper.backward.records import Outputs, Shape, Workspace
from cce_numba.launch.kernel import Kernel
from cce_numba.options import Options
from cce_numba.tensor_core.records import Chance, LogitTerms, Matrix, SurvivorBits, WeightedTokens
from cce_numba.tensor_core.survey.tables import Sizes, Tables

N, V, D = 300, 1000, 200
KERNELS = ["begin", "weigh", "list", "order", "sort", "rounds", "slots", "phases", "backward"]
PITCH_WORDS = 40


class OnDevice(np.ndarray):
    """An array that has what the host looks at in CuPy's, at a multiple of 16 bytes."""

    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))


def zeros(shape, dtype):
    shape = shape if isinstance(shape, tuple) else (shape,)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 16, np.uint8)
    return memory[-memory.ctypes.data % 16 :][:size].view(dtype).reshape(shape).view(OnDevice)


@pytest.fixture
def launches(monkeypatch):
    """`(name, kernel, grid, arguments)` of each launch, whose arguments can be packed."""
    seen = []

    def launch(kernel, ctas, *values):
        kernel.layout.pack(*kernel._numbers(values))  # raises if they are too many, too few, or too large
        seen.append((kernel.function.__name__.removesuffix("_kernel"), kernel, ctas, values))

    monkeypatch.setattr(Kernel, "launch", launch)
    monkeypatch.setattr(gpu, "current", lambda: gpu.Gpu((9, 0), 132))
    monkeypatch.setattr(tensor_map, "_encode", lambda *told: (7,) * tensor_map.WORDS)
    return seen


def problem(*, bias=False, logit_scale=False, class_weights=False, **options):
    return SimpleNamespace(
        N=N, V=V, D=D, e=zeros((N, D), BFLOAT16), c=zeros((V, D), BFLOAT16), dtype=BFLOAT16,
        bias=zeros(V, BFLOAT16) if bias else None, targets=zeros(N, np.int64),
        logit_scale=zeros(N, np.float32) if logit_scale else None,
        class_weights=zeros(V, np.float32) if class_weights else None,
        xp=SimpleNamespace(empty=zeros, zeros=zeros, maximum=np.maximum), options=Options.of(BFLOAT16, DROPPING | options),
    )  # fmt: skip


def statistics(*, survivors=True, planes=2):
    bits = zeros((planes * 3, PITCH_WORDS), np.uint32).view(np.uint8)[:, : V // 8] if survivors else None
    return Statistics(
        zeros(N, np.int32), zeros((), np.int64), *(zeros(N, np.float32) for _ in range(4)), bits, survivor_block=128
    )


def gradients(names="e c bias", dtype=BFLOAT16):
    shapes = {"e": (N, D), "c": (V, D), "bias": V}
    return Gradients(**{name: zeros(shapes[name], dtype) for name in names.split()})


def run(p, found, into, *, smoothed=False, accumulate=False):
    softmax, target = zeros(N, np.float32), zeros(N, np.float32)
    uniform = zeros(N, np.float32) if smoothed else None
    host.backward(p, found, Weights(softmax, target, uniform), into, accumulate)
    return softmax, target, uniform


def record_of(values, kind):
    """The one argument that is such a record."""
    (record,) = (value for value in values if isinstance(value, kind))
    return record


def by_name(launches):
    return {name: values for name, _, _, values in launches}


def test_launches_are_in_order_and_kernels_take_their_records(launches):
    run(problem(bias=True), statistics(), gradients())
    assert [name for name, *_ in launches] == KERNELS
    _, kernel, ctas, values = launches[-1]
    assert ctas == 132
    assert kernel.cluster == 2, "200 hidden entries are two tiles"
    kinds = [type(value) for value in values]
    assert kinds == [int, Matrix, Matrix, LogitTerms, Chance, int, Tables, Workspace, Outputs, Shape]


def test_what_is_there_is_told_by_its_address(launches):
    p, found = problem(bias=True, logit_scale=True, class_weights=True, softcap=5.0), statistics(survivors=False)
    into = gradients()
    softmax, target, uniform = run(p, found, into, smoothed=True)
    values = by_name(launches)["backward"]
    assert record_of(values, LogitTerms) == LogitTerms(
        bias=p.bias.data.ptr, bias_bytes=2, softcap=5.0, scale=p.logit_scale.data.ptr, uniform_weight=uniform.data.ptr,
        class_weights=p.class_weights.data.ptr,
    )  # fmt: skip
    assert values[1:3] == (Matrix(p.e.data.ptr, 2 * D), Matrix(p.c.data.ptr, 2 * D))
    outputs = record_of(values, Outputs)
    assert outputs.e == (into.e.data.ptr, 2 * D, 0, 2)
    assert outputs.c == (into.c.data.ptr, 2 * D, 0, 2)
    assert outputs.bias > 0
    assert record_of(values, Shape) == Shape(blocks=3, V=V, D=D)
    tokens = record_of(by_name(launches)["list"], WeightedTokens)
    assert (tokens.softmax_weight, tokens.target_weight) == (softmax.data.ptr, target.data.ptr)
    assert tokens.largest_weight not in (0, softmax.data.ptr)
    assert tokens.listed == found.tokens.data.ptr
    assert (tokens.n_valid, values[5]) == (found.n_valid.data.ptr,) * 2
    assert (tokens.max_logit, tokens.log_sum) == (found.max_logit.data.ptr, found.log_sum.data.ptr)
    assert tokens.target_logit == found.target_logit.data.ptr
    assert tokens.targets == p.targets.data.ptr


def test_what_is_not_there_is_0(launches):
    softmax, *_ = run(problem(), statistics(survivors=False), gradients("e"), accumulate=True)
    values = by_name(launches)["backward"]
    assert record_of(values, LogitTerms) == LogitTerms(0, 0, 0.0, 0, 0, 0)
    outputs = record_of(values, Outputs)
    assert outputs.c == (0, 0, 0, 0)
    assert outputs.bias == 0
    assert outputs.adds
    assert record_of(by_name(launches)["list"], WeightedTokens).largest_weight == softmax.data.ptr
    assert record_of(by_name(launches)["sort"], SurvivorBits) == SurvivorBits(0, 0, 0)
    assert by_name(launches)["order"][0], "all columns survive"


def test_the_gradient_of_the_bias_alone_takes_one_job_for_each_tile(launches):
    run(problem(bias=True), statistics(), gradients("bias"))
    outputs = record_of(by_name(launches)["backward"], Outputs)
    assert outputs.c == (0, 0, 0, 1)
    assert outputs.e == (0, 0, 0, 0)
    (kernel,) = (kernel for name, kernel, *_ in launches if name == "backward")
    assert kernel.cluster == 1, "jobs of a cluster must be tiles of the same rows"
    assert by_name(launches)["phases"][1:4] == (1, 0, True)


@pytest.mark.parametrize("given", [{}, {"filter_eps": 2.0**-10}], ids=["auto", "the caller's"])
def test_survivor_bits_of_dc_follow_the_filters_own(launches, given):
    """Three blocks further down, unless the caller chose the threshold."""
    found = statistics()
    run(problem(**given), found, gradients("e c"))
    coarse_words = 0 if given else 3 * PITCH_WORDS
    expected = SurvivorBits(words=found.survivors.data.ptr, pitch_words=PITCH_WORDS, coarse_words=coarse_words)
    assert record_of(by_name(launches)["list"], SurvivorBits) == expected
    assert not by_name(launches)["order"][0]


@pytest.mark.parametrize("exact", [{}, {"filter_e_grad": False}], ids=["both", "dC alone"])
def test_the_unbiased_filter_has_one_plane_of_bits_and_tells_what_it_decides_by(launches, exact):
    found = statistics(planes=1)
    found = replace(found, draw_seed=zeros(1, np.int64)[0:1].reshape(()))
    run(problem(filter="unbiased", filter_eps=2.0**-10, **exact), found, gradients("e c"))
    told = [record_of(values, Chance) for name, _, _, values in launches if name == "backward"]
    by_chance = Chance(eps=2.0**-10, seed=found.draw_seed.data.ptr)
    assert told == ([Chance(eps=0.0, seed=0), by_chance] if exact else [by_chance])
    assert all(record_of(values, SurvivorBits).coarse_words == 0 for name, _, _, values in launches if name == "list")


def test_filters_of_their_own_take_passes_of_their_own(launches):
    run(problem(filter_c_grad=False), statistics(), gradients("e c"))
    assert [name for name, *_ in launches] == 2 * KERNELS
    first, second = (record_of(values, Outputs) for name, _, _, values in launches if name == "backward")
    assert first.e.address > 0 == first.c.address
    assert second.c.address > 0 == second.e.address
    assert [bool(values[0]) for name, _, _, values in launches if name == "order"] == [False, True]


def test_parts_of_the_workspace_do_not_overlap(launches):
    """As records say where they begin: maps, counters, tables, and what the kernel keeps from job to job."""
    run(problem(bias=True), statistics(), gradients())
    maps, *_, tables, workspace, _, _ = by_name(launches)["backward"]
    counters = by_name(launches)["begin"][-2]
    assert workspace.next_job == counters
    assert workspace.done == counters + 4
    starts = [maps, counters, *tables, workspace.lists, workspace.g, workspace.sums]
    assert starts == sorted(starts)
    assert all(start % 16 == 0 for start in starts)
    slots = workspace.buffers * workspace.buffer_slots
    assert workspace.g - workspace.lists >= 4 * slots
    assert workspace.sums - workspace.g >= 256 * slots
    assert record_of(by_name(launches)["weigh"], Sizes).blocks == 3
