"""`simt` as a whole, on NumPy arrays and the CPU backend; and that it times nothing that is wrong."""

from __future__ import annotations

import dataclasses
import json

import pytest

import cce_numba as cce
from benchmarks.__main__ import main
from benchmarks.measure import record, timing
from benchmarks.programs import simt

RECORDED = record.read("simt_h100")

pytestmark = pytest.mark.usefixtures("without_gpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(simt, "SHAPE", (300, 500, 32))


def test_it_validates_times_shows_and_records(tmp_path, capsys):
    assert main(["simt", "--rounds", "2", "--burst", "1", "--record", "name"]) == 0
    assert "N=300, V=500, D=32" in capsys.readouterr().out
    written = json.loads((tmp_path / "name.json").read_text())
    assert list(written["results"]) == list(RECORDED["results"])
    assert written["problem"] == {"N": 300, "V": 500, "D": 32, "data": "random"}


def test_nothing_is_timed_that_is_wrong(monkeypatch, capsys):
    right = cce.linear_cross_entropy_with_grad

    def wrong(*arrays, **options):
        loss, grads = right(*arrays, **options)
        return loss, dataclasses.replace(grads, c=0 * grads.c)

    monkeypatch.setattr(simt.cce, "linear_cross_entropy_with_grad", wrong)
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("timed"))
    assert main(["simt"]) == 1
    assert "the error of dC is 1" in capsys.readouterr().err
