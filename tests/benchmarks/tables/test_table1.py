"""The page's tables of `table1`: rows with figures, the fastest first; methods without figures below."""

from __future__ import annotations

import re

from benchmarks.measure import record
from benchmarks.tables import table1


def test_rows_are_in_the_order_of_their_times():
    text = table1.markdown(record.read("table1_h100"))
    times = [float(line.split(" | ")[3].partition(" ms")[0]) for line in text.splitlines() if " ms, " in line]
    assert len(times) == 10
    assert times == sorted(times)


def test_methods_without_figures_have_a_short_reason_that_is_no_markup():
    text = table1.markdown(record.read("table1_h100"))
    (line,) = [line for line in text.splitlines() if line.startswith("Without figures: ")]
    assert "quack, scaled exp (failed: `TypeError: " in line
    assert all(len(reason) <= 80 for reason in re.findall("`([^`]*)`", line))
    assert "<" not in re.sub("`[^`]*`", "", line)
    assert line.count("torch 2.11.0+cu130 has no F.linear_cross_entropy") == 1


def test_there_is_no_such_line_where_all_methods_have_figures():
    found = record.read("table1_h100")
    fine = found | {"cells": [cell for cell in found["cells"] if cell["status"] == "ok"]}
    assert "Without figures" not in table1.markdown(fine)
    assert table1.markdown(fine, "models").count("| method |") == 3
