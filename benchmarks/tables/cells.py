"""What several tables have: titles of problems, figures that are marked where they exceed a limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table


def title(problem: dict[str, Any]) -> str:
    """Shape and data."""
    return f"{shape(problem)}, {problem['data']}"


def shape(problem: dict[str, Any]) -> str:
    """N x V x D."""
    return f"{problem['N']} x {problem['V']} x {problem['D']}"


def judged(value: float, limit: float | None, digits: int) -> str:
    """The value, marked if it is above the limit."""
    return f"{value:.{digits}f}" if limit is None or value <= limit else f"[red]over: {value:.{digits}f}[/]"


def add_columns(table: Table, columns: Iterable[str], *, left: Iterable[str]) -> None:
    """Adds columns, those in `left` aligned to the left."""
    left = set(left)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
