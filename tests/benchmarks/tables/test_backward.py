"""Tables of the backward mark what is above its limit; the README's leaves out what was wrong."""

from __future__ import annotations

from benchmarks.tables import backward as tables
from benchmarks.tables import readme


def measured_row(number, **values):
    error = {"error": 4e-3, "rounding": 1.7e-3, "at_most": 5e-3}
    row = {"number": number, "name": f"row {number}", "data": "real", "N": 1, "V": 2, "D": 3, "wrt": ["e", "c"]}
    row |= {"x": {"median": 1.5, "p10": 1.4, "p90": 1.6}, "x_at_most": 1.5, "call": {"median_ms": 2.0}}
    row |= {"errors": {"e": error, "c": error}, "zero_rows": 0.25, "flagged": 0.5, "mean_loss": 1.0}
    return row | {"extra_bytes": 2**20, "extra_bytes_at_most": 2**20} | values


def test_what_is_above_its_limit_is_marked(shown):
    far = {"error": 6e-3, "rounding": 1.7e-3, "at_most": 5e-3}
    rows = [
        measured_row(1),
        measured_row(2, x_at_most=1.4),
        measured_row(3, errors={"c": far}),
        measured_row(4, extra_bytes=2**21),
        measured_row(5, x_at_most=None, extra_bytes_at_most=None, errors={}),
        {"number": 6, "name": "row 6", "data": "real", "wrong": "off"},
    ]
    data = {"data": "real", "N": 1, "V": 2, "D": 3, "mean_loss": 1.0, "rounding": {"e": 1.7e-3, "c": 1.6e-3}}
    text = shown(tables.row_table({"data": [data], "rows": rows}))
    lines = [next(line for line in text.splitlines() if row["name"] in line) for row in rows]
    for row, line, over in zip(rows, lines, (None, "1.500", "6.00", "2.0", None, None), strict=True):
        told = shown(tables.one_line(row))
        for where in (line, told):
            assert where.count("over") == (over is not None)
            assert over is None or f"over: {over}" in where
    assert "wrong" in lines[5]
    assert "wrong: off" in shown(tables.one_line(rows[5]))
    assert readme.backward({"rows": rows}).splitlines()[2] == (
        "| row 1 | real | 1, 2, 3 | 2.00 ms, 1.50 X | 1.5 X | 4.0e-03 | 4.0e-03 | 1.0 MiB |"
    )


def test_kernels_are_shown(shown):
    kernels = [{"name": "a_kernel", "calls": 2, "us": 5.0}, {"name": "copy", "calls": 1, "us": 1.0}]
    text = shown(tables.kernel_table(measured_row(1, kernels=kernels)))
    assert "a_kernel" in text
    assert "83.3%" in text
    assert "not there" in shown(tables.kernel_table(measured_row(1, kernels="not there")))
