"""The short table of `quick`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.tables.cells import add_columns, judged, shape

_COLUMNS = "call", "data", "N x V x D", "ms", "X", "p10 - p90", "loss", "dE", "dC", "extra MiB"


def quick_table(results: dict[str, Any], title: str) -> Table:
    """A row for each call of the forward and of the backward."""
    table = Table(title=escape(title))
    add_columns(table, _COLUMNS, left=["call", "data"])
    for problem in results["forward"]["problems"]:
        for row in _forward_rows(problem):
            table.add_row(*row)
    table.add_section()
    for row in results["backward"]["rows"]:
        table.add_row(*_backward_row(row))
    return table


def _forward_rows(problem: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of the calls whose memory was measured, which leaves out cuBLAS and graphs."""
    for name, call in problem["calls"].items():
        if "extra_bytes" in call:
            errors = problem["errors_as_shares_of_those_allowed"][name]
            extra = judged(call["extra_bytes"] / 2**20, call["extra_bytes_at_most"] / 2**20, 2)
            times = _times(call["median_ms"], call)
            yield name, problem["data"].split()[0], shape(problem), *times, f"{max(errors.values()):.2f}", "", "", extra


def _backward_row(row: dict[str, Any]) -> tuple[str, ...]:
    start = row["name"], row["data"], shape(row)
    if "wrong" in row:
        return *start, f"[red]wrong: {escape(row['wrong'])}[/]"
    errors = (_error(row["errors"].get(name)) for name in ("e", "c"))
    limit = row["extra_bytes_at_most"]
    extra = judged(row["extra_bytes"] / 2**20, None if limit is None else limit / 2**20, 1)
    return *start, *_times(row["call"]["median_ms"], row), "", *errors, extra


def _times(median_ms: float, measured: dict[str, Any]) -> tuple[str, str, str]:
    x = measured["x"]
    return f"{median_ms:.3f}", judged(x["median"], measured["x_at_most"], 3), f"{x['p10']:.3f} - {x['p90']:.3f}"


def _error(error: dict[str, Any] | None) -> str:
    if error is None:
        return ""
    return judged(1e3 * error["error"], None if error["at_most"] is None else 1e3 * error["at_most"], 2)
