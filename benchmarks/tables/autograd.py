"""Tables of what `autograd` has measured."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.tables.cells import add_columns, judged, shape

# Names of calls and losses in records.
DIRECT, OURS, STORED, COMPILED_LOSS = "direct", "cce_numba", "stored logits", "stored logits, compiled"


def call_table(calls: list[dict[str, Any]]) -> Table:
    """A section for each shape, a row for the device and one for the host."""
    table = Table(title="loss and gradients, bfloat16, N x V x D: through autograd against the direct call, ms (min - max)")
    add_columns(table, ("time of", "direct", "through autograd", "more", "p10 - p90", "at most"), left=["time of"])
    for call in calls:
        table.add_section()
        table.add_row(f"[bold]{escape(shape(call))}, {call['backend']}[/]" + (" [red]wrong[/]" if "wrong" in call else ""))
        for name in ("device", "host"):
            if name in call:
                times, more = call[name], call[name]["more_ms"]
                both = (times[DIRECT], times[OURS])
                cells = (f"{x['median_ms']:.3f} ({x['min_ms']:.3f} - {x['max_ms']:.3f})" for x in both)
                spread = f"{more['p10']:.3f} - {more['p90']:.3f}"
                table.add_row(name, *cells, _more(times), spread, f"{times['more_ms_at_most']:.3f}")
    return table


def memory_table(calls: list[dict[str, Any]]) -> Table:
    """A section for each shape, a row for each loss."""
    table = Table(title="through autograd: memory beyond the gradients; errors against the direct call, in 1/1000")
    add_columns(table, ("loss", "extra MiB", "loss's error", "dE's", "dC's"), left=["loss"])
    for call in calls:
        table.add_section()
        table.add_row(f"[bold]{escape(shape(call))}[/]")
        for name, found in call["losses"].items():
            if "does_not_fit" in found:
                table.add_row(name, "does not fit")
                continue
            if "wrong" in found:
                table.add_row(f"{name} [red]wrong[/]")
                continue
            errors = (f"{1e3 * found['errors'][of]:.3f}" for of in ("loss", "e", "c"))
            table.add_row(name, f"{found['extra_bytes'] / 2**20:.1f}", *errors)
    return table


def one_line(call: dict[str, Any]) -> str:
    """A shape's figures, those above their limits marked."""
    start = f"{escape(shape(call))}: "
    if "wrong" in call:
        return f"{start}[red]wrong: {escape(call['wrong'])}[/]"
    times = (f"{name} {call[name][DIRECT]['median_ms']:.3f} ms and {_more(call[name])} more" for name in ("device", "host"))
    return f"{start}{', '.join(times)} through autograd"


def _more(times: dict[str, Any]) -> str:
    return judged(times["more_ms"]["median"], times["more_ms_at_most"], 3)
