"""Tables of what `backward` has measured."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.tables.cells import judged, title


def row_table(results: dict[str, Any]) -> Table:
    """A section for each data set, a row for each call."""
    table = Table(title="loss and gradients, bfloat16, N x V x D; errors in 1/1000")
    for column, at_most in _COLUMNS.items():
        table.add_column(column, justify="left" if column == "row" else "right", no_wrap=True)
        if at_most:
            table.add_column("at most", justify="right", no_wrap=True)
    for data in results["data"]:
        table.add_section()
        table.add_row(f"[bold]{escape(title(data))}[/]")
        d_e, d_c = (f"{1e3 * data['rounding'][name]:.2f}" for name in ("e", "c"))
        table.add_row(f"loss {data['mean_loss']:.3f}; rounding alone", "", "", "", "", d_e, "", d_c)
        for row in results["rows"]:
            if row["data"] == data["data"]:
                name = f"{row['number']} {row['name']}"
                table.add_row(name, *(["[red]wrong[/]"] if "wrong" in row else _cells(row)))
    return table


def data_line(data: dict[str, Any]) -> str:
    """What a data set is like, and how long it took."""
    rounding = ", ".join(f"d{name.upper()} {error:.2e}" for name, error in data["rounding"].items())
    times = f"made in {data['made_s']} s, exact gradients in {data['exact_gradients_s']} s"
    return f"{escape(title(data))}: {times}; loss {data['mean_loss']:.3f}; rounding costs {rounding}"


def one_line(row: dict[str, Any]) -> str:
    """A row's figures, those above their limits marked."""
    start = f"{row['number']} {escape(row['name'])}, {escape(row['data'])}: "
    if "wrong" in row:
        return f"{start}[red]wrong: {escape(row['wrong'])}[/]"
    parts = [f"{judged(row['x']['median'], row['x_at_most'], 3)} X", f"{row['call']['median_ms']:.3f} ms"]
    for name, error in row["errors"].items():
        limit = error["at_most"]
        parts.append(f"d{name.upper()} {judged(1e3 * error['error'], None if limit is None else 1e3 * limit, 2)}e-3")
    parts.append(f"extra {judged(*_mebibytes(row), 1)} MiB")
    return start + ", ".join(parts)


def kernel_table(row: dict[str, Any]) -> Table | str:
    """Which kernels one call ran, or why there is nothing to show."""
    kernels = row["kernels"]
    if isinstance(kernels, str):
        return f"  no times of kernels: {escape(kernels)}"
    total = sum(kernel["us"] for kernel in kernels)
    table = Table(title=f"{row['number']} {escape(row['name'])}, {escape(row['data'])}: {total:.0f} us in kernels")
    table.add_column("kernel", no_wrap=True, overflow="ellipsis", max_width=100)
    for column in ("calls", "us", "share"):
        table.add_column(column, justify="right")
    for kernel in kernels:
        us = kernel["us"]
        table.add_row(escape(kernel["name"]), str(kernel["calls"]), f"{us:.1f}", f"{us / total:.1%}" if total else "")
    return table


# Columns, and whether a limit stands beside them.
_COLUMNS = {
    "row": False,
    "ms": False,
    "X": True,
    "p10 - p90": False,
    "dE": True,
    "dC": True,
    "zero rows": False,
    "flagged": False,
    "extra MiB": True,
}


def _cells(row: dict[str, Any]) -> list[str]:
    x, limit = row["x"], row["x_at_most"]
    cells = [f"{row['call']['median_ms']:.3f}", judged(x["median"], limit, 3), "" if limit is None else f"{limit:.2f}"]
    cells.append(f"{x['p10']:.3f} - {x['p90']:.3f}")
    for name in ("e", "c"):
        cells += _error_cells(row["errors"].get(name))
    cells.append(f"{row['zero_rows']:.1%}" if "zero_rows" in row else "")
    cells.append(f"{row['flagged']:.1%}")
    mebibytes, limit = _mebibytes(row)
    return [*cells, judged(mebibytes, limit, 1), "" if limit is None else f"{limit:.1f}"]


def _error_cells(error: dict[str, Any] | None) -> tuple[str, str]:
    if error is None:
        return "", ""
    limit = None if error["at_most"] is None else 1e3 * error["at_most"]
    return judged(1e3 * error["error"], limit, 2), "" if limit is None else f"{limit:.2f}"


def _mebibytes(row: dict[str, Any]) -> tuple[float, float | None]:
    """Extra memory and its limit."""
    limit = row["extra_bytes_at_most"]
    return row["extra_bytes"] / 2**20, None if limit is None else limit / 2**20
