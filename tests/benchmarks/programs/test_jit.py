"""`jit` as a whole, with JAX on the CPU."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.measure import record

jax = pytest.importorskip("jax", reason="JAX is not installed")
jit = pytest.importorskip("benchmarks.programs.jit")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(jit, "SMALL_SHAPES", ((128, 1000, 200),))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(jax, "devices", lambda *given, devices=jax.devices: devices(*given or ("cpu",)))


def test_it_validates_times_shows_and_records(tmp_path, capsys):
    assert main(["jit", "--small", "--rounds", "2", "--record", "name"]) == 0
    out = capsys.readouterr().out
    assert "128 x 1000 x 200, cpu" in out
    assert "nothing" in out
    (call,) = json.loads((tmp_path / "name.json").read_text())["calls"]
    assert call["errors"][jit.OURS] == {"loss": 0, "e": 0, "c": 0}
    assert 0 < call["errors"][jit.STORED]["c"] < 0.1
    assert call["copied"] == []
    assert call["ms"][jit.OURS]["runs"] == 2


def test_copies_and_errors_are_told_and_not_timed(monkeypatch, tmp_path, capsys):
    right = jit.ccj.linear_cross_entropy
    monkeypatch.setattr(jit.ccj, "linear_cross_entropy", lambda e, c, targets: right(e * 2, c, targets))
    assert main(["jit", "--small", "--rounds", "1", "--record", "name"]) == 1
    told = capsys.readouterr().err
    assert "cce_numba.jax: e is off by" in told
    assert "e was copied" in told
    assert "ms" not in json.loads((tmp_path / "name.json").read_text())["calls"][0]
