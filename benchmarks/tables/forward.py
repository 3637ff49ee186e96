"""Tables of what `forward` has measured."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.tables.cells import add_columns, judged, title

CUBLAS, LOSS, BITS = "cuBLAS e @ c.T", "loss", "loss and survivor bits"  # names of the calls in records


def problem_table(problems: list[dict[str, Any]]) -> Table:
    """A section for each problem, a row for each call."""
    table = Table(title="bfloat16, N x V x D")
    columns = "call", "median ms", "min - max", "TFLOP/s", "X", "p10 - p90", "at most", "extra MiB", "at most"
    add_columns(table, columns, left=["call"])
    for problem in problems:
        table.add_section()
        table.add_row(f"[bold]{escape(title(problem))}[/]")
        survivors = problem["survivors"]
        table.add_row(
            f"loss {problem['mean_loss']:.3f}; {survivors['flagged']:.1%} flagged, {survivors['surviving']:.1%} survive"
        )
        for name, call in problem["calls"].items():
            table.add_row(name, *_time_cells(call), *_ratio_cells(call), *_memory_cells(call))
        if "no_graph" in problem:
            table.add_row(f"graph: {escape(problem['no_graph'])}")
    return table


def host_table(host_us: dict[str, Any]) -> Table:
    """A row for each library whose arrays may come."""
    limit = host_us["at_most"]
    table = Table(title=f"host: us until a call returns, median (p10 - p90), at most {limit}")
    functions = list(host_us["CuPy"])
    for column in ("arrays of", *functions):
        table.add_column(column)
    for library in ("CuPy", "PyTorch"):
        if library in host_us:
            us = [host_us[library][function] for function in functions]
            cells = [f"{judged(x['median'], limit, 0)} ({x['p10']:.0f} - {x['p90']:.0f})" for x in us]
        else:
            cells = ["not measured: no PyTorch with CUDA"]
        table.add_row(library, *cells)
    return table


def one_line(problem: dict[str, Any]) -> str:
    """A problem's ratios."""
    ratios = (f"{name} {call['x']['median']:.3f} X" for name, call in problem["calls"].items() if "x" in call)
    return f"{escape(title(problem))}: {', '.join(ratios)}"


def _time_cells(call: dict[str, Any]) -> tuple[str, ...]:
    return f"{call['median_ms']:.3f}", f"{call['min_ms']:.3f} - {call['max_ms']:.3f}", f"{call['tflops']:.0f}"


def _ratio_cells(call: dict[str, Any]) -> tuple[str, ...]:
    if "x" not in call:
        return "", "", ""
    x, limit = call["x"], call["x_at_most"]
    cells = judged(x["median"], limit, 3), f"{x['p10']:.3f} - {x['p90']:.3f}"
    return *cells, "" if limit is None else f"{limit:.2f}"


def _memory_cells(call: dict[str, Any]) -> tuple[str, ...]:
    if "extra_bytes" not in call:
        return "", ""
    mebibytes, limit = call["extra_bytes"] / 2**20, call["extra_bytes_at_most"] / 2**20
    return judged(mebibytes, limit, 2), f"{limit:.2f}"
