"""What is written down."""

from __future__ import annotations

import json

import pytest

from benchmarks.measure import record


def test_results_are_written_with_their_surroundings_and_read_back(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("CCE_COMMIT", "abc")
    path = record.write("name", {"problem": {"N": 1}})
    found = record.read("name")
    assert found == json.loads(path.read_text())
    assert found["problem"] == {"N": 1}
    assert found["surroundings"]["commit"] == "abc"
    assert found["surroundings"]["versions"]["numpy"]
    with pytest.raises(FileNotFoundError):
        record.read("absent")


def test_summary():
    assert record.summary([3.0, 1.0, 2.0004]) == {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "runs": 3}


@pytest.mark.parametrize("path", sorted(record.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_results_tell_where_they_come_from(path):
    surroundings = json.loads(path.read_text())["surroundings"]
    assert {"date", "commit", "gpu", "versions"} <= set(surroundings)
