"""Tables of what `distributions` has measured."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.tables.cells import add_columns, judged, title


def table(found: dict[str, Any], part: str) -> Table:
    """A row for each call of a part."""
    its = found[part]
    errors = ", ".join(f"{name} {error:.2e}" for name, error in its["errors"].items())
    result = Table(title=f"{title(found)}; errors: {errors}")
    add_columns(result, ("call", "median ms", "X", "over the same without"), left=["call"])
    for name, call in its["calls"].items():
        limit = its.get("x_at_most", {}).get(name)
        slower = its.get("slower", {}).get(name.removesuffix(", with entropy")) if name.endswith(", with entropy") else None
        told = "" if slower is None else judged(slower, limit_of(found, name, its), 3)
        result.add_row(name, f"{call['median_ms']:.3f}", judged(call["x"]["median"], limit, 3), told)
    if reason := its.get("no_liger"):
        result.caption = f"Liger's kernel: {reason}"
    return result


def limit_of(found: dict[str, Any], name: str, its: dict[str, Any]) -> float | None:
    """What the share is to be at most: told of the default filter on calibrated data."""
    return its["slower_at_most"] if found["data"] == "calibrated" and name.startswith("default") else None
