"""Small problems that sanitizers run: each is right on the CPU backend, is about what its name says, and is judged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import cce_numba as cce
from benchmarks.__main__ import main
from benchmarks.measure import device
from benchmarks.programs import sanitize
from benchmarks.small_cases import ampere, distillation, hopper_backward, hopper_forward, simt
from benchmarks.small_cases.odd import Odd
from cce_numba import survivors
from cce_numba.ampere.backward.workspace import WorkspaceLayout as AmpereLayout
from cce_numba.commands import machine
from cce_numba.hopper.backward import workspace
from cce_numba.hopper.backward.tiles import LIST_TILE
from cce_numba.hopper.backward.workspace import WorkspaceLayout
from cce_numba.tensor_core.survey.tables import tiles_of_dense_round
from tests.helpers.cases import DTYPES
from tests.helpers.harness import CpuHarness


class OddCpuHarness(Odd, CpuHarness):
    """Rows that begin one element into wider ones, on the CPU."""


CPU, ODD = CpuHarness(), OddCpuHarness()
BACKWARD = hopper_backward.checks(CPU, ODD)
PARTS = {"simt": simt.checks(CPU), "hopper-forward": hopper_forward.checks(CPU, ODD), "hopper-backward": BACKWARD}
PARTS["hopper-distillation"] = distillation.checks(CPU, ODD)
# The same problems, so these need not run here again.
AMPERE = {"ampere-forward": ampere.forward(CPU, ODD), "ampere-backward": ampere.backward(CPU, ODD)}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("part", "name"), [(part, name) for part, checks in PARTS.items() for name in checks])
def test_each_is_right_on_the_cpu(part, name):
    PARTS[part][name]()


@pytest.mark.parametrize(
    "what",
    [
        *("filtered, pairs", "filtered, single CTAs", "two thresholds, pairs", "two thresholds, single CTAs"),
        *("exact, pairs", "exact, single CTAs", "exact dC beside filtered dE", "exact dE beside filtered dC", "dbias alone"),
        *("scattered tokens", "accumulate", "accumulate in float32", "softcap and label smoothing", "logit scale"),
        *("copied rows", "nearly all survive", "unbiased, pairs", "unbiased, single CTAs", "unbiased dC beside exact dE"),
        *("exact, G borrows memory of dC, pairs", "exact, G borrows memory of dC, single CTAs", "exact dC takes dE along"),
    ],
)
def test_the_backward_is_reached_in_every_way(what):
    assert [name for name in BACKWARD if what in name]


def case_of(name):
    """The problem of a check of the backward."""
    return next(argument for argument in BACKWARD[name].args if hasattr(argument, "targets"))


def test_hidden_sizes_make_pairs_and_single_ctas():
    """CTAs work in pairs where a row of each gradient has an even number of tiles."""
    assert -(-hopper_backward.PAIRED // LIST_TILE) % 2 == 0
    assert -(-hopper_backward.ALONE // LIST_TILE) % 2 == 1


@pytest.mark.parametrize("filtered", [False, True], ids=["exact", "filtered"])
def test_small_rounds_are_several(filtered):
    """Where workspaces are made otherwise, sanitizers would see a single round; and elsewhere nothing is changed."""
    case = case_of("bfloat16 filtered, pairs" if filtered else "bfloat16 exact, pairs")
    kept = CPU.kept(CPU.forward(case), hopper_backward.V)
    pairs = 3 * hopper_backward.V if kept is None else int(kept[::128].sum())

    def rounds():
        sizes = (*case.e.shape[:1], *case.c.shape)
        layout = WorkspaceLayout.of(*sizes, with_e=True, with_sums=True).survey
        return pairs // layout.cap

    with hopper_backward.small_rounds():
        assert rounds() >= (1 if filtered else 2), f"{pairs} pairs"
    assert rounds() == 0


def test_small_rounds_of_ampere_are_more_than_its_buffers():
    """So a round takes over the buffer of one that is done."""

    def rounds():
        layout = AmpereLayout.of(hopper_backward.N, hopper_backward.V, hopper_backward.PAIRED, with_e=True, with_sums=True)
        return layout.survey.rounds_max

    with ampere.small_rounds():
        assert rounds() > 3
    assert rounds() == 1


def test_ampere_has_the_same_problems():
    assert AMPERE["ampere-forward"].keys() == PARTS["hopper-forward"].keys()
    cases = [id(check.func) for check in AMPERE["ampere-backward"].values()]
    assert len(cases) == len([name for name in BACKWARD if "borrows" not in name])
    assert "bfloat16 exact, two tiles a row" in AMPERE["ampere-backward"]
    assert not [name for name in AMPERE["ampere-backward"] if "pairs" in name or "CTAs" in name]
    assert all(ampere.small_rounds in check.args for check in AMPERE["ampere-backward"].values())


@pytest.mark.parametrize("name", [name for name in BACKWARD if "G borrows" in name])
def test_rounds_that_borrow_are_several(name):
    """And others come after them, which write where those had been."""
    case = case_of(name)
    N, (V, D) = len(case.e), case.c.shape
    with hopper_backward.small_rounds():
        sizes = WorkspaceLayout.of(N, V, D, with_e=True, with_sums=False, c_bytes=2 * V * D).survey
        tiles, more = (tiles_of_dense_round(cap, sizes.blocks) for cap in (sizes.large_cap, sizes.borrowed_cap))
    assert (tiles, more) == (3, 6)
    assert sizes.borrowed_tiles // more >= 2
    assert sizes.column_tiles - sizes.borrowed_tiles // more * more > 2 * tiles


@pytest.mark.parametrize("name", [name for name in BACKWARD if "filtered" in name or "two thresholds" in name])
def test_what_is_filtered_keeps_some_and_drops_some(name):
    case = case_of(name)
    kept = CPU.kept(CPU.forward(case), hopper_backward.V)
    assert 0.02 < kept.mean() < survivors.DENSE_SHARE


def test_where_nearly_all_survive_the_device_takes_all(monkeypatch):
    """The forward of a GPU leaves that to the backward; the CPU's decides by itself, unless it is told not to."""
    monkeypatch.setattr(survivors, "DENSE_SHARE", 1.0)
    kept = CPU.kept(CPU.forward(case_of("bfloat16 nearly all survive, so all are taken")), hopper_backward.V)
    assert 0.75 < kept[::128].mean() < 0.98


@pytest.mark.parametrize("name", [name for name in BACKWARD if "two thresholds" in name])
def test_two_thresholds_have_something_between_them(name):
    """So dC leaves out tiles that dE has: there are blocks and tiles whose survivors all are below the coarser one."""
    case = case_of(name)
    fine = CPU.forward(case)._problem.options.filter_eps
    kept, coarse = (
        CPU.kept(CPU.forward(case.with_options(filter_eps=eps)), hopper_backward.V)[::128] for eps in (fine, 4 * fine)
    )
    assert case.options.get("filter_eps", "auto") == "auto"
    assert coarse.sum() < 0.95 * kept.sum()


def test_odd_rows_are_nowhere_aligned():
    odd = ODD.device(np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(odd, np.arange(6.0).reshape(2, 3))
    assert odd.strides == (40, 8)
    assert odd.ctypes.data == odd.base.ctypes.data + 8


def spoiled(name, change):
    """A backward with one gradient changed."""
    right = cce.backward

    def wrong(*arguments, **named):
        gradients = right(*arguments, **named)
        array = getattr(gradients, name)
        if array is None:
            return gradients
        return dataclasses.replace(gradients, **{name: change(array)})

    return wrong


# One of each way of judging.
JUDGED = (
    "bfloat16 filtered, pairs",
    "bfloat16 unbiased, pairs",
    "bfloat16 nearly all survive, so all are taken",
    "bfloat16 tokens without an upstream gradient",
    "bfloat16 accumulate, pairs",
)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("gradient", ["e", "c", "bias"])
@pytest.mark.parametrize("change", [np.zeros_like, lambda x: np.full_like(x, np.nan)], ids=["zeros", "NaN"])
def test_a_wrong_gradient_does_not_pass(gradient, name, change, monkeypatch):
    monkeypatch.setattr(cce, "backward", spoiled(gradient, change))
    with pytest.raises(AssertionError):
        BACKWARD[name]()


def test_every_way_of_judging_was_tried():
    assert {BACKWARD[name].args[0] for name in JUDGED} == {check.args[0] for check in BACKWARD.values()}


# ---- the program


@pytest.fixture
def on_hopper(monkeypatch):
    """A machine that tells of an H100, whose parts run on the CPU."""
    monkeypatch.setattr(device, "why_none", lambda: None)
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu(0, "H100", "9.0", 2**36)])
    monkeypatch.setattr(sanitize, "_parts", lambda: {part: (lambda checks=checks: checks) for part, checks in PARTS.items()})


@pytest.mark.usefixtures("on_hopper")
def test_each_check_prints_a_line(capsys):
    assert main(["sanitize", "--only", "filtered, pairs", "simt float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        *(f"simt {name}: right" for name in PARTS["simt"] if name.startswith("float32")),
        "hopper-backward bfloat16 filtered, pairs: right",
        "hopper-backward float16 filtered, pairs: right",
    ]


@pytest.mark.usefixtures("on_hopper")
def test_a_wrong_check_is_told_and_the_others_run(monkeypatch, capsys):
    monkeypatch.setattr(cce, "backward", spoiled("c", np.zeros_like))
    only = ["bfloat16 dC alone, pairs", "bfloat16 dE alone, pairs"]
    assert main(["sanitize", "--only", *only]) == 1
    told = capsys.readouterr()
    assert "hopper-backward bfloat16 dC alone, pairs: wrong" in told.out
    assert "hopper-backward bfloat16 dE alone, pairs: right" in told.out
    assert told.err.endswith("benchmarks sanitize: error: wrong: hopper-backward bfloat16 dC alone, pairs\n")


@pytest.mark.usefixtures("on_hopper")
def test_on_another_gpu_hopper_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu(0, "A100", "8.0", 2**36)])
    assert main(["sanitize", "--only", "float64 filter_eps=None"]) == 0
    told = capsys.readouterr().out
    assert "hopper-forward, hopper-backward, hopper-distillation: not run, since the GPU has compute capability 8.0" in told
    assert "simt float64 filter_eps=None: right" in told
    assert main(["sanitize", "--only", "hopper-backward"]) == 3


@pytest.mark.usefixtures("on_hopper")
def test_before_ampere_the_portable_kernels_are_left(monkeypatch, capsys):
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu(0, "T4", "7.5", 2**34)])
    assert main(["sanitize", "--only", "float64 filter_eps=None"]) == 0
    told = capsys.readouterr().out
    assert "hopper-forward, hopper-backward, hopper-distillation: not run, since the GPU has compute capability 7.5" in told
    assert "ampere-forward, ampere-backward: not run, since the GPU has compute capability 7.5" in told
    assert main(["sanitize", "--only", "ampere-forward", "ampere-backward"]) == 3


def test_checks_are_listed_without_a_gpu(capsys):
    pytest.importorskip("cupy", reason="harnesses of a GPU need CuPy")
    assert main(["sanitize", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == sum(map(len, (PARTS | AMPERE).values()))
    assert main(["sanitize", "--list", "--only", "absent"]) == 2
    assert "no check's line contains 'absent'" in capsys.readouterr().err


def test_dtypes_are_those_that_a_backend_takes():
    assert all(sum(name.startswith(str(dtype)) for name in PARTS["simt"]) == 3 for dtype in DTYPES)
    for part in ("hopper-forward", "hopper-backward", "ampere-forward", "ampere-backward"):
        assert {name.split()[0] for name in (PARTS | AMPERE)[part]} == {"float16", "bfloat16"}


def test_private_names_that_small_rounds_replaces_are_there():
    """`small_rounds` cuts workspaces through these; a change of `workspace` must take it along."""
    assert {"_G_BYTES", "_SHARE", "_BORROWED_BYTES", "_known"} <= set(vars(workspace))
