"""`ampere`: what it measures beside what, and that it times nothing that is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

import cce_numba as cce
from benchmarks.__main__ import main
from benchmarks.measure import device, mma_limit
from benchmarks.programs import ampere, simt
from cce_numba.ampere.tiles import SLABS
from cce_numba.commands import machine
from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness


@pytest.fixture
def on_hopper(without_gpu, monkeypatch):
    """A machine that tells of an H100, whose backends are all the CPU's, and which has tf32 no more than the CPU has."""
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu(0, "H100", "9.0", 2**36)])
    monkeypatch.setattr(ampere, "BACKENDS", {"ampere": "cpu", "hopper": "cpu"})
    ways = {name: way | {"backend": "cpu"} for name, way in ampere.FLOAT32_WAYS.items()}
    ways["tf32"]["allow_tf32"] = False  # which the CPU has, and every function takes
    monkeypatch.setattr(ampere, "FLOAT32_WAYS", ways)
    monkeypatch.setattr(simt, "SHAPE", (300, 500, 32))

    def calls():
        return {way: lambda: np.zeros(4).sum() for way in mma_limit.WAYS}, 10**6

    monkeypatch.setattr(mma_limit, "calls", calls)


def test_refuses_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(device, "why_none", lambda: "there is none")
    assert main(["ampere"]) == 3
    assert capsys.readouterr().err == "benchmarks ampere: error: there is none\n"


@pytest.mark.usefixtures("on_hopper")
def test_it_validates_times_shows_and_records(archive, tmp_path, capsys):
    assert main(["ampere", "--small", "--data", archive, "--rounds", "2", "--record", "name"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in ("mma.sync alone", "float32, 300 x 500 x 32", "forward alone, 300 x 1000 x 200, calibrated", "no PyTorch"):
        assert part in out
    written = json.loads((tmp_path / "name.json").read_text())
    assert set(written["limit"]["ways"]) == {"registers", "shared memory"}
    assert [(row["name"], row["data"]) for row in written["rows"]] == [
        ("forward alone", "calibrated"),
        ("default filter", "calibrated"),
        ("exact", "calibrated"),
        ("default filter", "real"),
        ("exact", "real"),
        ("forward alone", "random"),
    ]
    for row in written["rows"]:
        assert set(row["calls"]) == {"ampere", "hopper"}
        for call in row["calls"].values():
            assert call["x"]["p10"] <= call["x"]["median"] <= call["x"]["p90"]
            assert set(call["errors"]) == set(row["wrt"])
    found = written["float32"]
    assert found["errors"]["float32"] == found["errors"]["simt"] > 0
    assert set(found["calls"]) == {f"{what}, {way}" for what in ("loss", "loss and gradients") for way in found["errors"]}


@pytest.mark.usefixtures("on_hopper")
def test_a_wrong_row_is_not_timed_and_the_others_are(monkeypatch, tmp_path, capsys):
    right = cce.linear_cross_entropy_with_grad

    def wrong(*arrays, **options):
        loss, gradients = right(*arrays, **options)
        return (loss + 1, gradients) if "filter_eps" in options else (loss, gradients)

    monkeypatch.setattr(ampere.backward.cce, "linear_cross_entropy_with_grad", wrong)
    assert main(["ampere", "--parts", "rows", "--small", "--rounds", "1", "--record", "name"]) == 1
    told = capsys.readouterr()
    assert "Rows of real data are left out" in told.out
    assert told.err == "benchmarks ampere: error: wrong: exact, calibrated\n"
    rows = json.loads((tmp_path / "name.json").read_text())["rows"]
    assert ["wrong" in row for row in rows] == [False, False, True, False]


@pytest.mark.usefixtures("on_hopper")
def test_float32_that_is_too_far_off_is_told(monkeypatch, capsys):
    right = cce.linear_logsumexp
    calls = []

    def wrong(*arrays, **options):
        calls.append(options)
        return right(*arrays, **options) * np.float32(1 + 1e-5 * (len(calls) == 2))

    monkeypatch.setattr(ampere.cce, "linear_logsumexp", wrong)
    assert main(["ampere", "--parts", "float32", "--rounds", "1"]) == 1
    assert "wrong: float32: the log-sum-exp is" in capsys.readouterr().err


@pytest.mark.skipif(SimulatorHarness.is_active(), reason="the simulator compiles nothing")
@pytest.mark.parametrize("loads", [False, True])
def test_the_limit_is_that_of_products(loads, request):
    """Four steps of the forward's products a turn, and loads in one of the two kernels alone."""
    request.getfixturevalue("compiler")
    compiled = offline.compile_launched(mma_limit.make_limit_kernel(loads))
    assert compiled.spilled_bytes == 0
    assert compiled.count(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32") == 4 * SLABS * 8
    assert compiled.count(r"ldmatrix\.sync\S*") == (5 if loads else 1) * (SLABS + 4)
    assert mma_limit.flops(1, 1) == 8 * 4 * 2 * 64 * 64 * 16
