"""Tables of what `training_step` has measured."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.tables.cells import add_columns


def step_table(step: dict[str, Any]) -> Table:
    """A section for each way, a row for each loss."""
    size = step["size"]
    batch = f"{size['sequences']} x {size['length']} tokens, {size['vocabulary']} entries, {size['layers']} x {size['hidden']}"
    table = Table(title=f"a training step, bfloat16: {batch}, head {'tied' if step['tied'] else 'untied'}")
    columns = "way", "loss", "ms", "min - max", "tokens / s", "peak MiB", f"loss at step {step['steps']}", "apart"
    add_columns(table, columns, left=["way", "loss"])
    way = None
    for row in step["rows"]:
        if row["way"] != way:
            table.add_section()
            way = row["way"]
        table.add_row(way, row["loss"], *(["[red]wrong[/]"] if "wrong" in row else _cells(row)))
    return table


def learned_line(step: dict[str, Any]) -> str:
    """From where the steps begin."""
    return (
        f"taught with stored logits to a loss of {step['learned_loss']:.3f}: a block keeps {step['flagged']:.2%} of the "
        f"vocabulary and drops a probability of {step['dropped']:.1e}; {step['steps']} steps take the loss from "
        f"{step['first_loss']:.4f} to {step['last_loss']:.4f}, others at most {step['apart_at_most']:.4f} apart"
    )


def one_line(row: dict[str, Any]) -> str:
    """Whether a way learns as it should."""
    start = f"{row['loss']}, {row['way']}: "
    if "wrong" in row:
        return f"{start}[red]wrong: {escape(row['wrong'])}[/]"
    return f"{start}prepared in {row['prepared_s']} s; loss {row['last_loss']:.4f}, apart {row['apart']:.4f}"


def _cells(row: dict[str, Any]) -> list[str]:
    if "median_ms" not in row:  # something broke before
        return ["not timed"]
    cells = [f"{row['median_ms']:.2f}", f"{row['min_ms']:.2f} - {row['max_ms']:.2f}", f"{row['tokens_per_s']}"]
    return [*cells, f"{row['peak_bytes'] / 2**20:.0f}", f"{row['last_loss']:.4f}", f"{row['apart']:.4f}"]
