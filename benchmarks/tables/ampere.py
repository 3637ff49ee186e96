"""Tables of what `ampere` has measured."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.tables.cells import add_columns, judged, shape, title


def row_line(row: dict[str, Any]) -> str:
    """A row's ratios and errors, those above their limits marked."""
    start = f"{escape(row['name'])}, {escape(title(row))}: "
    if "wrong" in row:
        return f"{start}[red]wrong: {escape(row['wrong'])}[/]"
    parts = []
    for name, call in row["calls"].items():
        limit = row["x_at_most"] if name == "ampere" else None
        errors = ", ".join(f"d{key.upper()} {1e3 * error['error']:.2f}e-3" for key, error in call.get("errors", {}).items())
        parts.append(f"{name} {judged(call['x']['median'], limit, 3)} X{f' ({errors})' if errors else ''}")
    if "no_paper" in row:
        parts.append(f"paper's kernels: {escape(row['no_paper'])}")
    return start + "; ".join(parts)


def limit_lines(limit: dict[str, Any]) -> str:
    """What `mma.sync` alone would take."""
    ways = (f"{name} {way['x']['median']:.3f} X ({way['tflops']:.0f} TFLOP/s)" for name, way in limit["ways"].items())
    return f"mma.sync alone, for {shape(limit)}, operands from {', from '.join(ways)}"


def float32_table(found: dict[str, Any]) -> Table:
    """A row for each call."""
    errors = ", ".join(f"{name} {error:.2e}" for name, error in found["errors"].items())
    table = Table(title=f"float32, {shape(found)}; relative errors of the log-sum-exp: {errors}")
    add_columns(table, ("call", "median ms", "times as fast as simt"), left=["call"])
    for name, call in found["calls"].items():
        table.add_row(name, f"{call['median_ms']:.3f}", f"{call['speed']['median']:.2f}")
    return table
