"""Paper and pencil: what a product should cost, beside what a record counts."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from .record import Record


@dataclass(frozen=True)
class Comparison:
    """Rows of (what, expected, counted). Jupyter shows a table."""

    rows: list[tuple[str, float, float]]

    @property
    def holds(self) -> bool:
        """All that was expected was counted, to the last access."""
        return all(expected == counted for _, expected, counted in self.rows)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td style='text-align:left'>{escape(what)}</td><td>{expected:,.6g}</td><td>{counted:,.6g}</td>"
            f"<td>{'✓' if expected == counted else '≠'}</td></tr>"
            for what, expected, counted in self.rows
        )
        return f"<table><tr><th></th><th>on paper</th><th>counted</th><th></th></tr>{cells}</table>"

    def __repr__(self) -> str:
        lines = [
            f"{what:32s} on paper {e:10,.6g}   counted {c:10,.6g} {'' if e == c else '  <- differs'}"
            for what, e, c in self.rows
        ]
        return "\n".join(lines)


def compare(record: Record, budget: dict[str, float]) -> Comparison:
    """`budget`: array -> reads that were expected, "write_" + array -> writes."""
    rows = []
    for name, expected in budget.items():
        write = name.startswith("write_")
        array = name.removeprefix("write_")
        what = f"{'writes' if write else 'reads'} of {array}, {record.arrays[array].space} memory"
        rows.append((what, expected, float(record.count(array, write=write))))
    return Comparison(rows)
