"""Tables of `autograd` mark what is above its limit, and tell what was wrong."""

from __future__ import annotations

from benchmarks.measure import record
from benchmarks.tables import autograd as tables


def test_what_is_above_its_limit_is_marked(shown):
    times = {name: {"median_ms": 1.0, "min_ms": 0.9, "max_ms": 1.2} for name in (tables.DIRECT, tables.OURS)}
    slow = times | {"more_ms": {"median": 0.2, "p10": 0.1, "p90": 0.3}, "more_ms_at_most": 0.1}
    good = times | {"more_ms": {"median": 0.05, "p10": 0.1, "p90": 0.3}, "more_ms_at_most": 0.1}
    losses = {tables.OURS: {"errors": {"loss": 0, "e": 1e-3, "c": 2e-3}, "extra_bytes": 2**21}}
    losses[tables.STORED] = {"does_not_fit": True}
    call = {"N": 1, "V": 2, "D": 3, "backend": "hopper", "losses": losses, "device": good, "host": slow}
    bad = {"N": 4, "V": 5, "D": 6, "backend": "hopper", "losses": {}, "wrong": "off"}
    text = shown(tables.call_table([call, bad])) + shown(tables.memory_table([call, bad]))
    assert text.count("over: 0.200") == 1
    assert "does not fit" in text
    assert "4 x 5 x 6, hopper wrong" in text
    assert "wrong: off" in shown(tables.one_line(bad))


def test_what_was_recorded_is_readable(shown):
    calls = record.read("training_h100")["calls"]
    assert "13.594" in shown(tables.call_table(calls))
    assert "109.2" in shown(tables.memory_table(calls))
