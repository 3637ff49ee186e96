"""The README's tables are those of the recorded results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.measure import record

README = (Path(__file__).parents[3] / "README.md").read_text()


@pytest.mark.parametrize("table", ["forward", "backward", "learning"])
def test_the_table_is_what_was_measured(table, capsys):
    assert main(["readme", table]) == 0
    told = capsys.readouterr().out
    assert told.count("\n") > 4
    assert told in README, f"python -m benchmarks readme {table} prints it"


def test_what_was_not_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert main(["readme", "forward"]) == 2
    assert "it has not been measured" in capsys.readouterr().err
