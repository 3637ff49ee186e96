"""What the host hands to the kernels of a backward, without a GPU: the launches in order, and their records, by name."""

from __future__ import annotations

import sys
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
from cce_numba.hopper.backward import workspace as workspace_module
from cce_numba.hopper.backward.records import Outputs, Shape, Workspace
from cce_numba.launch.kernel import Kernel
from cce_numba.options import Options
from cce_numba.tensor_core.backward.phases import RUNS_ALWAYS, RUNS_IF_DENSE, RUNS_IF_FILTERED
from cce_numba.tensor_core.records import (
    Chance,
    LogitTerms,
    Matrix,
    NoTargets,
    PlacedTargets,
    SeveralTargets,
    SurvivorBits,
    WeightedTokens,
)
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


def problem(*, bias=False, logit_scale=False, class_weights=False, K=None, **options):
    return SimpleNamespace(
        N=N, V=V, D=D, K=K, e=zeros((N, D), BFLOAT16), c=zeros((V, D), BFLOAT16), dtype=BFLOAT16,
        bias=zeros(V, BFLOAT16) if bias else None, targets=zeros(N if K is None else (N, K), np.int64),
        logit_scale=zeros(N, np.float32) if logit_scale else None,
        class_weights=zeros(V, np.float32) if class_weights else None,
        xp=SimpleNamespace(
            empty=zeros, zeros=zeros, maximum=np.maximum, isnan=np.isnan,
            where=lambda *given: np.where(*given).view(OnDevice), full=lambda *given: np.full(*given).view(OnDevice),
        ),
        options=Options.of(BFLOAT16, DROPPING | options),
    )  # fmt: skip


def statistics(*, survivors=True, planes=2, K=None):
    bits = zeros((planes * 3, PITCH_WORDS), np.uint32).view(np.uint8)[:, : V // 8] if survivors else None
    target_logit = zeros(N if K is None else (N, K), np.float32)
    of_tokens = (zeros(N, np.float32) for _ in range(3))
    return Statistics(zeros(N, np.int32), zeros((), np.int64), *of_tokens, target_logit, bits, survivor_block=128)


def gradients(names="e c bias", dtype=BFLOAT16):
    shapes = {"e": (N, D), "c": (V, D), "bias": V}
    return Gradients(**{name: zeros(shapes[name], dtype) for name in names.split()})


def run(p, found, into, *, smoothed=False, accumulate=False):
    softmax, target = zeros(N, np.float32), zeros(p.targets.shape, np.float32)
    uniform = zeros(N, np.float32) if smoothed else None
    host.backward(p, found, Weights(softmax, target, uniform), into, accumulate)
    return softmax, target, uniform


def record_of(values, kind):
    """The one argument that is such a record."""
    (record,) = (value for value in values if isinstance(value, kind))
    return record


def by_name(launches):
    return {name: values for name, _, _, values in launches}


def values_of(launches, name):
    """Of each launch of that kernel."""
    return [values for launched, _, _, values in launches if launched == name]


def runs_of(launches):
    """For which surveys each launch of the backward does anything."""
    return [record_of(values, np.int32) for values in values_of(launches, "backward")]


def gates_of(launches):
    """Of each survey: `(address of what opens dE's gate, where the survey says whether it is dense)`, 0 if there is none."""
    pairs = zip(values_of(launches, "rounds"), values_of(launches, "phases"), strict=True)
    return [(of_rounds[1], of_phases[3]) for of_rounds, of_phases in pairs]


def test_launches_are_in_order_and_kernels_take_their_records(launches):
    run(problem(bias=True), statistics(), gradients())
    assert [name for name, *_ in launches] == KERNELS
    _, kernel, ctas, values = launches[-1]
    assert ctas == 132
    assert kernel.cluster == 2, "200 hidden entries are two tiles"
    kinds = [type(value) for value in values]
    assert kinds == [int, Matrix, Matrix, LogitTerms, Chance, int, Tables, np.int32, Workspace, Outputs, Shape, NoTargets]


@pytest.mark.parametrize("bias", [False, True])
def test_several_targets_are_placed_after_the_survey(launches, bias):
    """And what they give to the gradient of the bias is taken from it at the end."""
    p, found = problem(bias=bias, K=5), statistics(K=5)
    _, target, _ = run(p, found, gradients("e c bias" if bias else "e c"))
    assert [name for name, *_ in launches] == [*KERNELS[:-1], "invert", "place", "backward", *["take_from_bias"] * bias]
    values = by_name(launches)
    placed = record_of(values["place"], PlacedTargets)
    assert record_of(values["backward"], PlacedTargets) == placed
    assert placed.K == 8, "four are looked at together"
    assert len(set(placed[:4])) == 4
    assert record_of(values["place"], SeveralTargets) == (p.targets.data.ptr, 5, -100, found.target_logit.data.ptr)
    assert values["place"][1] == target.data.ptr
    assert values["invert"][2] == values["place"][2], "which of the sorted columns each entry is"
    assert record_of(values["place"], Tables) == record_of(values["backward"], Tables)
    tokens = record_of(values["weigh"], WeightedTokens)
    assert target.data.ptr != tokens.target_weight, "the survey has one weight and one logit of each token"
    assert (values["place"][-1] != 0) == bias
    if bias:
        assert values["take_from_bias"][0] == values["place"][-1]
        assert values["take_from_bias"][-1] == record_of(values["backward"], Outputs).bias


def test_what_is_there_is_told_by_its_address(launches):
    p, found = problem(bias=True, logit_scale=True, class_weights=True, softcap=5.0), statistics(survivors=False)
    into = gradients()
    softmax, target, uniform = run(p, found, into, smoothed=True)
    values = by_name(launches)["backward"]
    assert record_of(values, LogitTerms) == LogitTerms(
        bias=p.bias.data.ptr, bias_bytes=2, softcap=5.0, scale=p.logit_scale.data.ptr, uniform_weight=uniform.data.ptr,
        class_weights=p.class_weights.data.ptr, entropy_weight=0,
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
    assert record_of(values, LogitTerms) == LogitTerms(0, 0, 0.0, 0, 0, 0, 0)
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
    assert by_name(launches)["phases"][1:3] == (1, True)
    assert by_name(launches)["rounds"][0] == 0


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
    told = [record_of(values, Chance) for values in values_of(launches, "backward")]
    by_chance, certain = Chance(eps=2.0**-10, seed=found.draw_seed.data.ptr), Chance(eps=0.0, seed=0)
    assert told == ([certain] if exact else []) + [by_chance, certain]
    assert runs_of(launches) == ([RUNS_ALWAYS] if exact else []) + [RUNS_IF_FILTERED, RUNS_IF_DENSE]
    *_, first, second = (kernel for name, kernel, *_ in launches if name == "backward")
    assert first is not second, "the draws are no part of the second, which multiplies the same workspace's G"
    *_, of_first, of_second = values_of(launches, "backward")
    assert [x for x in of_first if not isinstance(x, Chance | np.int32)] == [
        x for x in of_second if not isinstance(x, Chance | np.int32)
    ]
    assert [name for name, *_ in launches] == (KERNELS if exact else []) + [*KERNELS, "backward"]
    assert gates_of(launches) == [(0, 0)] * (2 if exact else 1)
    assert all(record_of(values, SurvivorBits).coarse_words == 0 for name, _, _, values in launches if name == "list")


def test_filters_of_their_own_take_passes_of_their_own(launches):
    into = gradients("e c bias")
    run(problem(bias=True, filter_e_grad=False), statistics(), into)
    assert [name for name, *_ in launches] == 2 * KERNELS
    first, second = (record_of(values, Outputs) for values in values_of(launches, "backward"))
    assert (first.e.address, first.c.address, first.bias) == (into.e.data.ptr, 0, 0)
    assert (second.e.address, second.c.address) == (0, into.c.data.ptr)
    assert second.bias > 0
    assert [bool(values[0]) for values in values_of(launches, "order")] == [True, False]
    assert runs_of(launches) == [RUNS_ALWAYS] * 2
    assert gates_of(launches) == [(0, 0)] * 2


@pytest.mark.parametrize("options", [{}, {"filter": "unbiased", "filter_eps": 2.0**-10}], ids=["drop", "unbiased"])
@pytest.mark.parametrize("adds", [False, True])
def test_exact_dc_takes_de_along_if_the_first_survey_was_dense(launches, options, adds):
    """The device tells the second pass. The first pass's kernel has no jobs then; the second pass's has some in any case."""
    into, found = gradients("e c bias"), statistics(planes=1 if options else 2)
    found = replace(found, draw_seed=zeros(1, np.int64).reshape(())) if options else found
    run(problem(bias=True, filter_c_grad=False, **options), found, into, accumulate=adds)
    assert [name for name, *_ in launches] == 2 * KERNELS
    first, second = (record_of(values, Outputs) for values in values_of(launches, "backward"))
    assert (first.e.address, first.c.address, first.bias) == (into.e.data.ptr, 0, 0)
    assert (second.e.address, second.c.address) == (into.e.data.ptr, into.c.data.ptr)
    assert second.bias > 0
    assert first.adds == second.adds == adds
    assert [bool(values[0]) for values in values_of(launches, "order")] == [False, True]
    assert runs_of(launches) == [RUNS_IF_FILTERED, RUNS_ALWAYS]
    (gate, said), (second_gate, second_said) = gates_of(launches)
    assert (gate, second_said) == (0, 0)
    assert said == second_gate != 0
    chances = [record_of(values, Chance).eps for values in values_of(launches, "backward")]
    assert chances == [2.0**-10 if options else 0.0, 0.0]


@pytest.mark.parametrize("names", ["e", "c", "bias", "c bias"])
@pytest.mark.parametrize("exact", [{"filter_c_grad": False}, {"filter_e_grad": False}], ids=["dC", "dE"])
def test_one_gradient_takes_one_pass(launches, exact, names):
    """By its own filter; the other's does not matter."""
    run(problem(bias=True, **exact), statistics(), gradients(names))
    assert [name for name, *_ in launches] == KERNELS
    is_exact = ("filter_e_grad" if names == "e" else "filter_c_grad") in exact
    assert bool(by_name(launches)["order"][0]) == is_exact
    assert runs_of(launches) == [RUNS_ALWAYS]
    assert gates_of(launches) == [(0, 0)]


@pytest.fixture
def many_columns(monkeypatch):
    """Enough of them, beside a small workspace, that G borrows memory of dC."""
    monkeypatch.setattr(sys.modules[__name__], "V", 8000)
    monkeypatch.setattr(workspace_module, "_G_BYTES", (0, 0))
    monkeypatch.setattr(workspace_module, "_SHARE", 0.0)
    workspace_module._known.cache_clear()
    yield
    workspace_module._known.cache_clear()


@pytest.mark.usefixtures("many_columns")
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float32)], ids=str)
def test_the_last_rows_of_dc_are_lent_to_g(launches, dtype):
    into = gradients("e c", dtype)
    run(problem(filter_eps=None), statistics(survivors=False), into)
    workspace, sizes = (record_of(by_name(launches)[name], kind) for name, kind in (("backward", Workspace), ("rounds", Sizes)))
    begin, end = into.c.data.ptr, into.c.data.ptr + into.c.nbytes
    assert workspace.borrowed_slots > workspace.large_slots > workspace.buffer_slots
    assert begin + sizes.borrowed_tiles * 128 * into.c.strides[0] <= workspace.g_borrowed
    assert 0 <= end - (workspace.g_borrowed + 2 * 256 * workspace.borrowed_slots) < 256
    assert (sizes.dense_cap, sizes.large_cap, sizes.borrowed_cap) == (
        workspace.buffer_slots, workspace.large_slots, workspace.borrowed_slots,
    )  # fmt: skip
    assert sizes.borrowed_tiles > 0


@pytest.mark.usefixtures("many_columns")
@pytest.mark.parametrize(
    ("names", "adds"), [("e c bias", False), ("e c", True), ("c", False), ("e", False)], ids=["bias", "adds", "dC", "dE"]
)
def test_nothing_is_lent(launches, names, adds):
    """Sums have no place there; dC holds values; and without dE, or without dC, there is no use for it."""
    run(problem(bias=True, filter_eps=None), statistics(survivors=False), gradients(names), accumulate=adds)
    assert record_of(by_name(launches)["backward"], Workspace).borrowed_slots == 0
    assert record_of(by_name(launches)["rounds"], Sizes)[-2:] == (0, 0)


def test_parts_of_the_workspace_do_not_overlap(launches):
    """As records say where they begin: maps, counters, tables, and what the kernel keeps from job to job."""
    run(problem(bias=True), statistics(), gradients())
    maps, *_, tables, _, workspace, _, _, _ = by_name(launches)["backward"]
    counters = by_name(launches)["begin"][-2]
    assert workspace.next_job == counters
    assert workspace.done == counters + 4
    starts = [maps, counters, *tables, workspace.lists, workspace.g, workspace.sums]
    assert starts == sorted(starts)
    assert all(start % 16 == 0 for start in starts)
    assert (workspace.done_e - workspace.done) % 8 == 0
    assert maps + 4 * 128 <= counters
    assert workspace.done_e + 4 * 3 <= tables[0]
    slots = max(3 * workspace.buffer_slots, 2 * workspace.large_slots)
    assert workspace.g - workspace.lists >= 4 * slots
    assert workspace.sums - workspace.g >= 256 * slots
    assert record_of(by_name(launches)["weigh"], Sizes).blocks == 3
