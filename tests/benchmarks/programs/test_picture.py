"""The README's picture shows what was recorded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.measure import record
from benchmarks.programs import picture
from benchmarks.tables import peers

ROOT = Path(__file__).parents[3]
RESULTS, _ = picture.DRAWN[picture.PEERS]
SVG = picture.FOLDER / "peers.svg"


def test_bars_are_the_recorded_figures_and_the_fastest_comes_first():
    found = peers.bars(record.read(RESULTS))
    assert [(bar.name, bar.ms) for bar in found] == [
        ("cce_numba", 21.1),
        ("torch.compile", 46.0),
        ("cce_numba, exact", 64.0),
        ("PyTorch, logits stored", 75.1),
        ("cut_cross_entropy", 84.7),
        ("Liger", 141),
    ]
    assert found[0].gib == 1297 / 1024
    assert len({bar.colour for bar in found}) == 3


def test_the_picture_in_the_tree_is_drawn_from_the_record():
    """Otherwise `python -m benchmarks picture` draws it anew. Its text stands in the SVG as it is."""
    svg = SVG.read_text()
    results = record.read(RESULTS)
    for bar in peers.bars(results):
        assert f">{bar.name}<" in svg
        assert f">{bar.ms:.0f} ms<" in svg
        assert f">{bar.gib:.1f} GiB<" in svg
    assert f"{results['problem']['V']:,} vocabulary entries" in svg
    assert results["surroundings"]["gpu"] in svg


def test_the_readme_shows_it():
    source = SVG.relative_to(ROOT).as_posix()
    assert source in (ROOT / "README.md").read_text()


def test_it_is_drawn_and_the_same_each_time(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for name in ("one", "two"):
        assert main(["picture", "--out", str(tmp_path / name / "peers")]) == 0
    assert "peers.svg, " in capsys.readouterr().out
    for suffix in (".svg", ".png"):
        one, two = ((tmp_path / name / "peers").with_suffix(suffix).read_bytes() for name in ("one", "two"))
        assert one == two
        assert 1000 < len(one) < 100_000


def test_what_is_needed_is_told(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["picture"]) == 3
    assert "needs matplotlib: pip install" in capsys.readouterr().err


def test_a_record_that_is_not_there_is_told(capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main(["picture", "learning", "--results", "absent"]) == 2
    assert "absent.json" in capsys.readouterr().err
