"""What runs come to over seeds, as a table and as a picture."""

from __future__ import annotations

import math

import pytest

from benchmarks.tables import learning as tables
from benchmarks.tables import learning_curves


def made(way, seed, last, eps=None, vocabulary=1000):
    shares = {} if way == "paper" else {"kept": 0.02, "flagged": 0.03}
    curve = [[10, 6.5], [20, last]]
    found = {"train": [6.4, last + 0.5], "validation": curve, "columns": [[0, shares], [19, shares]], "seconds": 4.0}
    return {"vocabulary": vocabulary, "way": way, "seed": seed, "eps": eps} | found


@pytest.fixture
def results():
    how = {"steps": 20, "sequences": 2, "length": 64, "hidden": 64, "layers": 1, "text": "ids.npy", "dtype": "bfloat16"}
    runs = [made("drop:2^-12", seed, last, 2.0**-12) for seed, last in enumerate((6.6, 6.8, math.nan))]
    runs += [made("unbiased:2^-12", seed, last, 2.0**-12) for seed, last in enumerate((6.0, 6.3, 6.1))]
    runs += [made("unbiased:2^-11", seed, last, 2.0**-11) for seed, last in enumerate((6.5, 6.6, 6.7))]
    runs += [made("drop", seed, last, 2.0**-16) for seed, last in enumerate((5.5, 5.5, 5.5))]
    runs += [made("paper", 5, 6.0, 2.0**-12)]
    return {"how": how, "runs": runs + [made("exact", seed, last) for seed, last in enumerate((6.0, 6.2, 6.1))]}


def test_ways_are_judged_by_the_spread_of_exact_gradients(results):
    found = {each.way: each for each in tables.summaries(results, 1000)}
    assert list(found) == ["exact", "drop:2^-12", "drop", "paper", "unbiased:2^-11", "unbiased:2^-12"]
    exact = found["exact"]
    assert exact.spread == pytest.approx(0.2)
    assert found["unbiased:2^-12"].apart == pytest.approx([0, 0.1, 0])
    assert tables.verdict(found["unbiased:2^-12"], exact) == (pytest.approx(1 / 6), True)
    assert tables.verdict(found["unbiased:2^-11"], exact) == (pytest.approx(2.5), False)
    assert tables.verdict(found["drop"], exact) == (pytest.approx(-3), True)  # better is no fault


def test_what_is_nan_is_never_within_and_what_is_not_known_is_not_judged(results):
    found = {each.way: each for each in tables.summaries(results, 1000)}
    assert math.isnan(found["drop:2^-12"].spread)
    in_spreads, within = tables.verdict(found["drop:2^-12"], found["exact"])
    assert math.isnan(in_spreads)
    assert within is False
    assert found["paper"].apart == []  # exact gradients have no such seed
    assert found["paper"].kept is None
    for exact in (None, tables.Summary("exact", None, [6.0], 6.0, 1.0, 1.0, [0.0])):
        assert tables.verdict(found["unbiased:2^-12"], exact)[1] is None
    assert tables.verdict(found["paper"], found["exact"])[1] is None


def test_the_table_and_the_line_tell_it(results, shown):
    text = shown(tables.learning_table(results, 1000))
    assert "learning ids.npy, V=1000: 20 steps of 2 x 64 tokens, 1 x 64, bfloat16" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["exact"] == ["", "2.00%", "3.00%", "3", "6.1000", "0.2000", "", "", "", "6.6000", "4.0"]
    assert cells["unbiased:2^-11"] == [
        *("2^-11", "2.00%", "3.00%", "3", "6.6000", "0.2000", "+0.5000 (+0.4000 to +0.6000)", "+2.50", "no", "7.1000", "4.0")
    ]
    assert cells["unbiased:2^-12"][-3] == "yes"
    assert cells["drop:2^-12"][-3] == "no"
    assert cells["paper"][:3] == ["2^-12", "", ""]
    assert cells["paper"][-3] == ""
    line = "V=1000, seed 0, exact: validation loss 6.0000, training loss 6.5000, columns kept 2.00%, 4.0 s"
    assert tables.one_line(results["runs"][-3]) == line


def test_vocabularies_come_in_order(results):
    results["runs"].append(made("exact", 0, 6.0, vocabulary=50))
    assert tables.vocabularies(results) == [50, 1000]
    assert [each.way for each in tables.summaries(results, 50)] == ["exact"]


@pytest.mark.filterwarnings("error")
def test_the_picture_has_a_panel_for_each_vocabulary_and_a_line_for_each_way(results, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results["runs"] += [made("drop:2^-12", 0, 6.0, vocabulary=262_144), made("exact", 0, 5.5, vocabulary=262_144)]
    svg, png = learning_curves.draw(results, tmp_path / "images" / "learning")
    text = svg.read_text()
    for part in ("V = 1,000", "V = 262,144", "validation loss", "step", "exact", "unbiased:2^-11", "paper"):
        assert f">{part}<" in text
    assert len(set(learning_curves.colours(results).values())) == 6
    assert png.stat().st_size > 10_000
    again = learning_curves.draw(results, tmp_path / "again" / "learning")
    assert [path.read_bytes() for path in again] == [svg.read_bytes(), png.read_bytes()]
