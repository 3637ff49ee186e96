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
    assert all(part in line for part in ("19.397", "1.455", "1.418 - 1.463", "3.31", "3.02", "133.1"))
    assert "cuBLAS" not in text


def test_what_is_above_its_limit_is_marked(shown):
    text = shown(quick_table(recorded(), ""))
    over = {tuple(cell.strip() for cell in line.split("│")[1:3]) for line in text.splitlines() if "over" in line}
    calibrated = {(name, "calibrated") for name in ("default filter", "exact", "exact dC", "frozen classifier")}
    real = {(name, "real") for name in ("default filter", "exact", "unbiased at 2^-13", "filter that drops")}
    kept = {f"exact, {size} of kept logits" for size in ("512 MiB", "1.5 GiB")}
    assert over == calibrated | real | {(name, "random") for name in ("default filter", "exact", "exact dC", *kept)}
