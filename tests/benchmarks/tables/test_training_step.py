"""Tables of `training_step`."""

from __future__ import annotations

from benchmarks.measure import record
from benchmarks.tables import training_step as tables


def test_what_was_recorded_is_readable(shown):
    step = record.read("training_step_h100")["step"]
    text = shown(tables.step_table(step))
    assert "10.25" in text
    assert "8 x 1024 tokens" in text
    assert shown(tables.learned_line(step)).startswith("taught with stored logits")


def test_what_broke_is_told(shown):
    step = record.read("training_step_h100")["step"]
    step["rows"][0] = {"way": "eager", "loss": "cce_numba", "wrong": "off"}
    for name in ("median_ms", "min_ms", "max_ms"):
        del step["rows"][1][name]
    text = shown(tables.step_table(step))
    assert "wrong" in text
    assert "not timed" in text
    assert "wrong: off" in shown(tables.one_line(step["rows"][0]))
