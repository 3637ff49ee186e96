"""`forward`: what it measures, and that it times nothing that is wrong."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import cce_numba as cce
from benchmarks.__main__ import main
from benchmarks.measure import device, timing
from benchmarks.programs import forward


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "8", "0", "8"], "at least 1"),
        (["--burst", "0"], "at least 1"),
        (["--quick", "--shape", "8", "8", "8"], "not allowed with"),
        (["--data", "absent.npz"], "No such file"),
        (["--data", "ARCHIVE", "--shape", "8", "59", "8"], "cannot be extended to 8 x 59 x 8: V must be at least 60"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, archive, capsys):
    try:
        code = main(["forward", *(archive if argument == "ARCHIVE" else argument for argument in arguments)])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_refuses_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(device, "why_none", lambda: "there is none")
    assert main(["forward"]) == 3
    assert capsys.readouterr().err == "benchmarks forward: error: there is none\n"


def test_allowed_bytes():
    assert forward.allowed_bytes(8192, 256_000, bits=False) == 2**21 + 20 * 8192
    assert forward.allowed_bytes(8192, 256_000, bits=True) == 2**21 + 24 * 8192 + 64 * 32_000
    assert forward.allowed_bytes(129, 9, bits=True) == 2**21 + 24 * 129 + 2 * 2


@pytest.mark.usefixtures("without_gpu")
def test_it_validates_times_shows_and_records(archive, tmp_path, capsys):
    assert main(["forward", "--small", "--data", archive, "--rounds", "2", "--record", "name"]) == 0
    out = capsys.readouterr().out
    for part in (
        "300 x 1000 x 32, random",
        "1100 x 70 x 8, real (layer.npz)",
        "no graphs [here]",
        "no PyTorch",
        "survivor bits",
    ):
        assert part in out
    assert "Random data alone" not in out
    written = json.loads((tmp_path / "name.json").read_text())
    assert written["surroundings"]["commit"]
    assert [problem["data"] for problem in written["problems"]] == ["random", "real (layer.npz)"] * 2
    assert written["host_us"]["CuPy"]["forward"]["median"] > 0
    for problem in written["problems"]:
        assert 0 < problem["survivors"]["surviving"] <= problem["survivors"]["flagged"] <= 1
        calls = problem["calls"]
        assert list(calls) == [forward.CUBLAS, forward.LOSS, forward.BITS]
        assert "x" not in calls[forward.CUBLAS]
        for name in (forward.LOSS, forward.BITS):
            assert calls[name]["x"]["p10"] <= calls[name]["x"]["median"] <= calls[name]["x"]["p90"]
            assert calls[name]["runs"] == 2
        assert ("no_graph" in problem) == (problem["N"] == 300)


@pytest.mark.usefixtures("without_gpu")
def test_the_quick_mode_measures_one_shape_and_no_host(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(forward, "QUICK_SHAPE", (300, 1000, 32))
    assert main(["forward", "--quick", "--record", "name"]) == 0
    assert "Random data alone" in capsys.readouterr().out
    written = json.loads((tmp_path / "name.json").read_text())
    assert "host_us" not in written
    assert len(written["problems"]) == 1
    assert written["problems"][0]["calls"][forward.LOSS]["runs"] == forward.QUICK_ROUNDS


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("function", "spoil", "message"),
    [
        ("forward", lambda result: dataclasses.replace(result, lse=result.lse + 1), "lse: "),
        ("forward", lambda result: dataclasses.replace(result, target_logit=result.target_logit * np.nan), "target_logit: "),
        ("linear_cross_entropy", lambda found: (found[0], found[1] + 1), "lse: "),
        ("linear_cross_entropy", lambda found: (found[0] + 1, found[1]), "loss: "),
    ],
)
def test_nothing_is_timed_that_is_wrong(function, spoil, message, monkeypatch, capsys):
    right = getattr(cce, function)

    def wrong(*arrays, **options):
        found = right(*arrays, **options)
        return spoil(found) if options else found  # without options, it is the host's time that is measured

    wrong.__name__ = function
    monkeypatch.setattr(forward.cce, function, wrong)
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("timed"))
    assert main(["forward", "--small"]) == 1
    assert f"benchmarks forward: error: wrong: {message}" in capsys.readouterr().err
