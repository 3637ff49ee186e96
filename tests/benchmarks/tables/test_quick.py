"""The short table marks what is above its limit."""

from __future__ import annotations

from benchmarks.measure import record
from benchmarks.tables.quick import quick_table


def recorded():
    """What is recorded has the form of what `quick` measures."""
    return {"forward": record.read("forward_h100"), "backward": record.read("backward_h100")}


def test_figures_are_those_that_were_measured(shown):
    text = shown(quick_table(recorded(), "title [here]"))
    assert "title [here]" in text
    lines = text.splitlines()
    (line,) = [line for line in lines if "loss  " in line and "8192 x 256000" in line and "random" in line]
    assert all(part in line for part in ("13.725", "1.003", "0.980 - 1.016", "0.10", "0.35"))
    (line,) = [line for line in lines if "default filter" in line and "calibrated" in line]
    assert all(part in line for part in ("21.685", "1.587", "1.574 - 1.611", "4.63", "2.23", "134.9"))
    assert "cuBLAS" not in text


def test_what_is_above_its_limit_is_marked(shown):
    text = shown(quick_table(recorded(), ""))
    over = {tuple(cell.strip() for cell in line.split("│")[1:3]) for line in text.splitlines() if "over" in line}
    assert over == {("default filter", "real"), ("exact dC", "calibrated"), ("exact", "real")}
