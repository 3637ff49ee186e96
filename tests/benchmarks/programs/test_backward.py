"""`backward`: which rows it measures, what it measures of them, and that a wrong row is not timed."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import cce_numba as cce
from benchmarks.__main__ import main
from benchmarks.data import random
from benchmarks.data.archive import read
from benchmarks.options import Pace
from benchmarks.programs import backward
from benchmarks.tables import readme
from cce_numba.commands import UsageError


@pytest.mark.parametrize(
    ("named", "with_archive", "rows", "left_out"),
    [
        ([""], False, (0, 2, 3, 4, 5, 7, 8, 10, 12, 14, 15, 16, 17), (1, 6, 9, 11, 13)),
        ([""], True, tuple(range(18)), ()),
        (["2", "1"], True, (0, 1), ()),
        (["1", "frozen"], False, (0, 4, 5), ()),
        (["exact, calibrated"], False, (2,), ()),
        (["default"], False, (0, 7), (1,)),
    ],
)
def test_rows_are_chosen_by_number_and_name(named, with_archive, rows, left_out, archive):
    found = backward.Settings.chosen(backward.rows_named(named), read(archive) if with_archive else None, Pace())
    assert (found.rows, found.left_out) == (rows, left_out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--rows", "19"], "there is no '19' among 1 default filter, calibrated; 2 "),
        (["--rows", "2"], "real data need --data"),
        (["--data", "absent.npz"], "No such file"),
        (["--quick", "--small"], "not allowed with"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, capsys):
    try:
        code = main(["backward", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_shapes_and_limits_of_rows(archive, monkeypatch):
    every = tuple(range(len(backward.ROWS)))
    settings = backward.Settings.chosen(every, read(archive), Pace())
    assert settings.shape_of("calibrated") == (8192, 256_000, 2304)
    assert settings.shape_of("real") == (30, 60, 2304)
    small = backward.Settings.chosen(every, read(archive), Pace(), small=True)
    assert small.shape_of("real") == (30, 60, backward.SMALL_SHAPE[2])
    rows = {(row.name, row.data): row for row in backward.ROWS}
    rounding = 1.7e-3
    for row, e_at_most, c_at_most in [
        (("default filter", "calibrated"), 3e-3, 4e-3),
        (("default filter", "real"), 3e-3, 4e-3),
        (("filter that drops", "real"), None, None),
        (("default filter", "random"), None, None),
        (("exact", "calibrated"), 3.4e-3, 3.4e-3),
        (("exact dC", "calibrated"), 3e-3, 3.4e-3),
    ]:
        assert rows[row].error_at_most("e", rounding) == e_at_most
        assert rows[row].error_at_most("c", rounding) == c_at_most
    monkeypatch.setattr(backward, "REAL_D", 7)
    with pytest.raises(UsageError, match="cannot be lifted to a hidden size of 7"):
        backward.Settings.chosen(every, read(archive), Pace())


@pytest.mark.usefixtures("without_gpu")
def test_it_validates_times_shows_and_records(archive, tmp_path, capsys):
    assert main(["backward", "--small", "--data", archive, "--rounds", "2", "--profile", "--record", "name"]) == 0
    out = capsys.readouterr().out
    for part in (
        "300 x 1000 x 200, calibrated",
        "30 x 60 x 200, real",
        "no PyTorch with CUDA",
        "linear_cross_entropy_with_grad",
    ):
        assert part in out
    assert "wrong" not in out
    written = json.loads((tmp_path / "name.json").read_text())
    assert [data["data"] for data in written["data"]] == ["calibrated", "real", "random"]
    assert [row["number"] for row in written["rows"]] == list(range(1, 19))
    for row, spec in zip(written["rows"], backward.ROWS, strict=True):
        assert f"{row['number']} {spec.name}, {spec.data}: " in out
        assert (row["options"], row["wrt"]) == (spec.options, list(spec.wrt))
        assert row["x"]["p10"] <= row["x"]["median"] <= row["x"]["p90"]
        assert row["cublas"]["runs"] == row["call"]["runs"] == 2
        assert list(row["errors"]) == row["wrt"]
        assert all(error["rounding"] / 2 < error["error"] < 5e-3 for error in row["errors"].values())
        assert ("zero_rows" in row) == ("c" in row["wrt"])
        assert 0 < row["flagged"] <= 1
    exact_row = written["rows"][2]
    assert exact_row["flagged"] == 1
    assert all(error["error"] <= error["at_most"] for error in exact_row["errors"].values())
    assert readme.backward(written).count("\n") == 19


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss, grads: (loss + 1, grads), "the loss is"),
        (lambda loss, grads: (loss, dataclasses.replace(grads, e=np.zeros_like(grads.e))), "the error of dE is 1"),
        (lambda loss, grads: (loss, dataclasses.replace(grads, c=np.full_like(grads.c, np.nan))), "the error of dC is nan"),
        (lambda loss, grads: 1 / 0, "ZeroDivisionError: "),
    ],
)
def test_a_wrong_row_is_not_timed_and_the_others_are(spoil, message, monkeypatch, tmp_path, capsys):
    right = cce.linear_cross_entropy_with_grad

    def wrong(*arrays, **options):
        found = right(*arrays, **options)
        return spoil(*found) if "filter_eps" in options else found

    wrong.__name__ = right.__name__
    monkeypatch.setattr(backward.cce, right.__name__, wrong)
    assert main(["backward", "--small", "--rows", "1", "3", "4", "--rounds", "1", "--record", "name"]) == 1
    told = capsys.readouterr()
    assert message in told.out
    assert told.err.endswith("benchmarks backward: error: wrong: not timed: rows 3\n")
    rows = json.loads((tmp_path / "name.json").read_text())["rows"]
    assert ["x" in row for row in rows] == [True, False, True]
    assert readme.backward({"rows": rows}).count("\n") == 3


@pytest.mark.usefixtures("without_gpu")
def test_what_was_measured_before_an_interruption_is_recorded(monkeypatch, tmp_path):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(random, "make", interrupted)
    assert main(["backward", "--small", "--rows", "1", "8", "--rounds", "1", "--record", "name"]) == 130
    assert [row["number"] for row in json.loads((tmp_path / "name.json").read_text())["rows"]] == [1]


@pytest.mark.usefixtures("without_gpu")
def test_the_quick_mode_measures_some_rows_and_no_host(monkeypatch, tmp_path, archive, capsys):
    monkeypatch.setattr(backward, "SHAPES", {"calibrated": (300, 1000, 200)})
    assert main(["backward", "--quick", "--rounds", "1", "--record", "name"]) == 0
    assert "Rows 2 are left out" in capsys.readouterr().out
    written = json.loads((tmp_path / "name.json").read_text())
    assert [row["number"] for row in written["rows"]] == [1, 3, 4, 5, 6]
    assert "host_us" not in written
