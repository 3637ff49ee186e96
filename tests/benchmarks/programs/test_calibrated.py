"""The comparison of made-up inputs with a real model."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import main
from benchmarks.data import calibrated
from benchmarks.measure import device


def test_it_prints_the_fit(monkeypatch, capsys):
    monkeypatch.setattr(device, "why_none", lambda: "none here")
    assert main(["calibrated", "--shape", "300", "2000", str(calibrated.RANK + 8), "--blocks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 blocks" in printed
    assert "3.06" in printed
    assert "with numpy" in printed


@pytest.mark.parametrize("shape", [("300", "2000", str(calibrated.RANK)), ("300", "2000", "10")])
def test_a_hidden_size_that_is_too_small(shape, capsys):
    assert main(["calibrated", "--shape", *shape]) == 2
    assert f"D must be more than {calibrated.RANK}" in capsys.readouterr().err
