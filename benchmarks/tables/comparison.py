"""Tables of what `comparison` has recorded: a row for each pair of tokens and entries, the worst over the hidden sizes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from benchmarks.tables.cells import add_columns

_NAMES = "loss", "e", "c"


def tables(results: dict[str, Any]) -> Iterable[Table]:
    """A table for each kind of shapes."""
    for kind in dict.fromkeys(cell["kind"] for cell in results["cells"]):
        yield _table(kind, [cell for cell in results["cells"] if cell["kind"] == kind], results["how"])


def _table(kind: str, cells: list[dict[str, Any]], how: dict[str, Any]) -> Table:
    right = sum(not cell["wrong"] for cell in cells)
    gradients = "default filter" if how["filter"] else "exact"
    title = f"{right} of {len(cells)} {kind} shapes right; {how['dtype']}, {gradients}; relative errors, worst over D"
    table = Table(title=title)
    columns = ["N", "V", "D", "loss"]
    columns += [f"{what}: {who}" for what in ("loss", "dE", "dC") for who in ("ours", "PyTorch")]
    add_columns(table, [*columns, "largest |difference|", "right"], left=[])
    for pair in dict.fromkeys((cell["N"], cell["V"]) for cell in cells):
        group = [cell for cell in cells if (cell["N"], cell["V"]) == pair]
        table.add_row(*(f"{size}" for size in pair), *_cells(group))
    return table


def _cells(group: list[dict[str, Any]]) -> list[str]:
    sizes, losses = [cell["D"] for cell in group], [cell["loss"] for cell in group]
    found = [f"{min(sizes)} - {max(sizes)}", f"{min(losses):.2f} - {max(losses):.2f}"]
    for name in _NAMES:
        found += [f"{max(cell['errors'][who][name] for cell in group):.1e}" for who in ("ours", "pytorch")]
    found.append(f"{max(max(cell['largest_difference'].values()) for cell in group):.1e}")
    wrong = [f"D={cell['D']}: {cell['wrong']}" for cell in group if cell["wrong"]]
    return [*found, f"[red]{'; '.join(wrong)}[/]" if wrong else "yes"]
