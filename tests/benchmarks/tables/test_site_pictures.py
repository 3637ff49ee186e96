"""The site's pictures show what was recorded."""

from __future__ import annotations

import pytest

from benchmarks.measure import record
from benchmarks.programs import picture
from benchmarks.tables.site_pictures import PICTURES, forward


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_in_the_tree_is_drawn_from_the_record(name):
    """Otherwise `python -m benchmarks picture NAME` draws it anew. Its text stands in the SVG as it is."""
    recorded, made = PICTURES[name]
    results = record.read(recorded)
    svg = (picture.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    panels = made(results)
    assert sum(len(panel.bars) for panel in panels) >= 5
    for panel in panels:
        assert f">{panel.title}<" in svg
        for bar in panel.bars:
            assert f">{bar.name}<" in svg
            assert f">{bar.told}<" in svg
    assert results["surroundings"]["date"] in svg


def test_bars_are_the_recorded_figures():
    results = record.read("forward_h100")
    alone, with_bits = forward(results)
    first = results["problems"][0]["calls"]
    assert alone.bars[0].value == first["loss"]["x"]["median"]
    assert with_bits.bars[0].told == f"{first['loss and survivor bits']['x']['median']:.2f} X"
    assert len(alone.bars) == len(results["problems"])


@pytest.mark.parametrize("name", PICTURES)
def test_ours_are_told_from_others(name):
    recorded, made = PICTURES[name]
    ours = {bar.ours for panel in made(record.read(recorded)) for bar in panel.bars}
    assert ours == ({True} if name in ("forward", "backward") else {True, False})
