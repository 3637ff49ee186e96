"""`quick`: forward and backward, one table."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import cce_numba as cce
from benchmarks.__main__ import main
from benchmarks.programs import backward, forward


@pytest.mark.usefixtures("without_gpu")
def test_one_table_of_both(archive, tmp_path, capsys):
    assert main(["quick", "--small", "--data", archive, "--rounds", "2", "--record", "name"]) == 0
    table = capsys.readouterr().out.rpartition("┏")[2]
    lines = [line for line in table.splitlines() if line.startswith("│")]
    told = [tuple(cell.strip() for cell in line.strip("│").split("│"))[:2] for line in lines]
    assert told == [
        (forward.LOSS, "random"),
        (forward.BITS, "random"),
        (forward.LOSS, "real"),
        (forward.BITS, "real"),
        *((backward.ROWS[i].name, backward.ROWS[i].data) for i in (0, 2, 3, 4, 5, 1)),
    ]
    written = json.loads((tmp_path / "name.json").read_text())
    assert written["forward"]["problems"][0]["calls"][forward.LOSS]["runs"] == 2
    assert len(written["backward"]["rows"]) == 6


@pytest.mark.usefixtures("without_gpu")
def test_a_wrong_row_is_told(monkeypatch, capsys):
    right = cce.linear_cross_entropy_with_grad

    def wrong(*arrays, **options):
        loss, grads = right(*arrays, **options)
        return loss, dataclasses.replace(grads, c=np.zeros_like(grads.c)) if "filter_eps" in options else grads

    wrong.__name__ = right.__name__
    monkeypatch.setattr(backward.cce, right.__name__, wrong)
    assert main(["quick", "--small", "--rounds", "1"]) == 1
    told = capsys.readouterr()
    assert "wrong: the error of dC is 1" in told.out
    assert "Without real data" in told.out
    assert "not timed: rows 3" in told.err


def test_it_measures_what_is_recorded():
    """So that a run compares with results/*.json, too."""
    assert forward.QUICK_SHAPE in forward.SHAPES
    quick = {(backward.ROWS[i].name, backward.ROWS[i].data) for i in backward.QUICK_ROWS}
    assert {("default filter", "real")} | {
        (name, "calibrated") for name in ("default filter", "exact", "exact dC", "frozen classifier", "frozen body")
    } == quick
