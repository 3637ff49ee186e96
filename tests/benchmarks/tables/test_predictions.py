"""The predictions of docs/which_kernels.md: out of records and datasheets, and said to be predictions."""

from __future__ import annotations

from pathlib import Path

from benchmarks.__main__ import main
from benchmarks.measure import record
from benchmarks.tables import predictions

PAGE = (Path(__file__).parents[3] / "docs" / "which_kernels.md").read_text()


def test_the_page_has_the_table_of_the_records(capsys):
    assert main(["predictions"]) == 0
    table = capsys.readouterr().out.strip()
    assert table in PAGE, "run `python -m benchmarks predictions`, and put its table there"
    assert "These are predictions, not measurements." in PAGE


def test_products_scale_with_rates_and_calls_with_the_limit():
    forward = {"problems": [{"N": 8192, "V": 256_000, "D": 2304, "calls": {"cuBLAS e @ c.T": {"median_ms": 13.0}}}]}
    rows = [
        {"name": name, "data": "calibrated", "calls": {"ampere": {"x": {"median": x}}}}
        for name, x in (("forward alone", 1.8), ("default filter", 2.4), ("exact", 6.0))
    ]
    ampere = {"limit": {"ways": {"registers": {"x": {"median": 1.5}}}}, "rows": rows}
    lines = predictions.markdown(forward, ampere).splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines}
    floor = 13.0 * 989.4 / 312
    assert cells["A100 SXM"][2:6] == [
        f"{floor:.1f} ms",
        f"{1.2 * floor:.0f} ms",
        f"{1.6 * floor:.0f} ms",
        f"{4 * floor:.0f} ms",
    ]
    assert cells["B200 SXM"][3:7] == ["not known"] * 4
    assert float(cells["A100 SXM"][6]) > 1.5 > 1 > float(cells["RTX 4090"][6])
    assert "wrong" not in predictions.markdown(forward, {"limit": ampere["limit"], "rows": [{"data": "real", "wrong": "x"}]})


def test_records_are_there():
    assert record.path("forward_h100").exists()
