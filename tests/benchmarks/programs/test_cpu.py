"""`cpu` as a whole, on a small problem; and that it times nothing that is wrong."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import cce_numba as cce
from benchmarks.__main__ import main
from benchmarks.measure import record
from benchmarks.programs import cpu

RECORDED = record.read("cpu_2_cores")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "SHAPE", (2048, 500, 32))
    monkeypatch.setattr(record, "RESULTS", tmp_path)


@pytest.mark.parametrize(("data", "shape"), [(False, (20, 500, 32)), (True, (20, 60, 8))])
def test_it_validates_times_shows_and_records(data, shape, archive, tmp_path, capsys):
    options = ["--data", archive] if data else []
    assert main(["cpu", "--tokens", "20", "--rounds", "2", "--record", "name", *options]) == 0
    out = capsys.readouterr().out
    assert f"N={shape[0]}, V={shape[1]}, D={shape[2]}" in out
    written = json.loads((tmp_path / "name.json").read_text())
    assert tuple(written["problem"][name] for name in "NVD") == shape
    assert ("layer.npz" in written["problem"]["data"]) == data
    assert list(written["results"]) == list(RECORDED["results"])
    assert all(result["runs"] == 2 for result in written["results"].values())


def test_more_tokens_than_there_are(archive, capsys):
    assert main(["cpu", "--data", archive, "--tokens", "31"]) == 2
    assert "layer.npz has 30 tokens, got 31" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss, grads: (loss + 1, grads), "the loss is"),
        (lambda loss, grads: (loss, dataclasses.replace(grads, e=0 * grads.e)), "the error of dE is 1"),
        (lambda loss, grads: (loss, dataclasses.replace(grads, c=np.full_like(grads.c, np.nan))), "the error of dC is nan"),
    ],
)
def test_nothing_is_timed_that_is_wrong(spoil, message, monkeypatch, capsys):
    right = cce.linear_cross_entropy_with_grad
    monkeypatch.setattr(cpu.cce, "linear_cross_entropy_with_grad", lambda *arrays, **options: spoil(*right(*arrays, **options)))
    monkeypatch.setattr(cpu, "timed", lambda *_: pytest.fail("timed"))
    assert main(["cpu", "--tokens", "20"]) == 1
    assert message in capsys.readouterr().err
