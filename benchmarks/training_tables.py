"""Tables of what `training` has measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from forward_tables import judged
from rich.markup import escape
from rich.table import Table


def tables(results: dict[str, Any]) -> list[Table]:
    """Of the parts that were measured."""
    found = [call_table(results["calls"]), memory_table(results["calls"])] if results["calls"] else []
    return [*found, step_table(results["step"])] if results["step"] and results["step"]["rows"] else found


def named(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each thing that may be wrong, with its name."""
    yield from ((title(call), call) for call in results["calls"])
    yield from ((f"{row['way']}, {row['loss']}", row) for row in (results["step"] or {"rows": []})["rows"])


def title(call: dict[str, Any]) -> str:
    """The shape."""
    return f"{call['N']} x {call['V']} x {call['D']}"


def call_table(calls: list[dict[str, Any]]) -> Table:
    """A section for each shape, a row for the device and one for the host."""
    table = Table(title="loss and gradients, bfloat16, N x V x D: through autograd against the direct call, ms (min - max)")
    for column in ("time of", "direct", "through autograd", "more", "p10 - p90", "at most"):
        table.add_column(column, justify="left" if column == "time of" else "right", no_wrap=True)
    for call in calls:
        table.add_section()
        table.add_row(f"[bold]{escape(title(call))}, {call['backend']}[/]" + (" [red]wrong[/]" if "wrong" in call else ""))
        for name in ("device", "host"):
            if name in call:
                times, more = call[name], call[name]["more_ms"]
                cells = (f"{x['median_ms']:.3f} ({x['min_ms']:.3f} - {x['max_ms']:.3f})" for x in _both(times))
                spread = f"{more['p10']:.3f} - {more['p90']:.3f}"
                table.add_row(name, *cells, _more(times), spread, f"{times['more_ms_at_most']:.3f}")
    return table


def memory_table(calls: list[dict[str, Any]]) -> Table:
    """A section for each shape, a row for each loss."""
    table = Table(title="through autograd: memory beyond the gradients; errors against the direct call, in 1/1000")
    for column in ("loss", "extra MiB", "loss's error", "dE's", "dC's"):
        table.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    for call in calls:
        table.add_section()
        table.add_row(f"[bold]{escape(title(call))}[/]")
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


def step_table(step: dict[str, Any]) -> Table:
    """A section for each way, a row for each loss."""
    size = step["size"]
    batch = f"{size['sequences']} x {size['length']} tokens, {size['vocabulary']} entries, {size['layers']} x {size['hidden']}"
    table = Table(title=f"a training step, bfloat16: {batch}, head {'tied' if step['tied'] else 'untied'}")
    steps = step["steps"]
    for column in ("way", "loss", "ms", "min - max", "tokens / s", "peak MiB", f"loss at step {steps}", "apart"):
        table.add_column(column, justify="left" if column in ("way", "loss") else "right", no_wrap=True)
    way = None
    for row in step["rows"]:
        if row["way"] != way:
            table.add_section()
            way = row["way"]
        table.add_row(way, row["loss"], *(["[red]wrong[/]"] if "wrong" in row else _step_cells(row)))
    return table


def call_line(call: dict[str, Any]) -> str:
    """A shape's figures, those above their limits marked."""
    start = f"{escape(title(call))}: "
    if "wrong" in call:
        return f"{start}[red]wrong: {escape(call['wrong'])}[/]"
    times = (f"{name} {call[name]['direct']['median_ms']:.3f} ms and {_more(call[name])} more" for name in ("device", "host"))
    return f"{start}{', '.join(times)} through autograd"


def learned_line(step: dict[str, Any]) -> str:
    """From where the steps begin."""
    return (
        f"taught with stored logits to a loss of {step['learned_loss']:.3f}: a block keeps {step['flagged']:.2%} of the "
        f"vocabulary and drops a probability of {step['dropped']:.1e}; {step['steps']} steps take the loss from "
        f"{step['first_loss']:.4f} to {step['last_loss']:.4f}, others at most {step['apart_at_most']:.4f} apart"
    )


def step_line(row: dict[str, Any]) -> str:
    """Whether a way learns as it should."""
    start = f"{row['loss']}, {row['way']}: "
    if "wrong" in row:
        return f"{start}[red]wrong: {escape(row['wrong'])}[/]"
    return f"{start}prepared in {row['prepared_s']} s; loss {row['last_loss']:.4f}, apart {row['apart']:.4f}"


def _both(times: dict[str, Any]) -> list[dict[str, float]]:
    """Of the direct call, and through autograd."""
    return [found for name, found in times.items() if not name.startswith("more_ms")]


def _more(times: dict[str, Any]) -> str:
    return judged(times["more_ms"]["median"], times["more_ms_at_most"], 3)


def _step_cells(row: dict[str, Any]) -> list[str]:
    if "median_ms" not in row:  # something broke before
        return ["not timed"]
    cells = [f"{row['median_ms']:.2f}", f"{row['min_ms']:.2f} - {row['max_ms']:.2f}", f"{row['tokens_per_s']}"]
    return [*cells, f"{row['peak_bytes'] / 2**20:.0f}", f"{row['last_loss']:.4f}", f"{row['apart']:.4f}"]
