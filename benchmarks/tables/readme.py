"""The README's tables of `forward`, `backward` and `learning`, in Markdown, out of recorded results."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

from benchmarks.proof.problems import SECTIONS, TABLE1
from benchmarks.tables import curves, figure3, memory, table1
from benchmarks.tables.forward import BITS, CUBLAS, LOSS
from benchmarks.tables.learning import EXACT, Summary, summaries, vocabularies


def forward(results: dict[str, Any]) -> str:
    """A row for each problem."""
    rows = [
        "| N, V, D | data | cuBLAS, `e @ c.T` | loss | with survivor bits | memory for the loss |",
        "|---|---|---|---|---|---|",
    ]
    for problem in results["problems"]:
        cublas, loss, bits = (problem["calls"][name] for name in (CUBLAS, LOSS, BITS))
        data = problem["data"].split()[0]
        ratios = (f"{call['median_ms']:.2f} ms, {call['x']['median']:.2f} X" for call in (loss, bits))
        memory = f"{loss['extra_bytes'] / 2**20:.2f} MiB"
        rows.append(f"| {_shape(problem)} | {data} | {cublas['median_ms']:.2f} ms | {' | '.join(ratios)} | {memory} |")
    return "\n".join(rows)


def backward(results: dict[str, Any]) -> str:
    """A row for each call; those that were wrong are left out."""
    rows = [
        "| call | data | N, V, D | time | at most | error of dE | of dC | memory beyond the gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if "wrong" not in row:
            limit = "" if row["x_at_most"] is None else f"{row['x_at_most']:g} X"
            ratio = f"{row['call']['median_ms']:.2f} ms, {row['x']['median']:.2f} X"
            errors = (f"{row['errors'][name]['error']:.1e}" if name in row["errors"] else "" for name in ("e", "c"))
            cells = row["name"], row["data"], _shape(row), ratio, limit, *errors, f"{row['extra_bytes'] / 2**20:.1f} MiB"
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def learning(results: dict[str, Any]) -> str:
    """A row for each way, a column for each vocabulary: the last validation loss, and the columns kept at the last step."""
    found = {V: {summary.way: summary for summary in summaries(results, V)} for V in vocabularies(results)}
    ways = dict.fromkeys(way for of_ways in found.values() for way in of_ways)
    rows = [f"| gradients | {' | '.join(f'V = {V}' for V in found)} |", "|---|" + "---|" * len(found)]
    for way in ways:
        cells = (_learned(of_ways[way]) if way in of_ways else "" for of_ways in found.values())
        rows.append(f"| {_way(way, found)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _way(name: str, found: dict[int, dict[str, Summary]]) -> str:
    """A way's name with its threshold."""
    if name == EXACT or ":" in name:
        return name.replace(":", " ")
    eps = {of_ways[name].eps for of_ways in found.values() if name in of_ways}
    return f"{name} {' '.join(f'2^{math.log2(x):.0f}' for x in eps if x)}"


def _learned(summary: Summary) -> str:
    low, high = min(summary.losses), max(summary.losses)
    apart = "" if summary.way == EXACT else f", {fmean(summary.apart):+.3f}"
    kept = "" if summary.kept is None else f"; {summary.kept:.1%} of columns"
    return f"{low:.3f} - {high:.3f}{apart}{kept}"


# Tables by name, and the recorded results that each is made of.
TABLES: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    **{
        TABLE1 if section == TABLE1 else f"table1_{section}": (partial(table1.markdown, section=section), "table1_h100")
        for section in SECTIONS
    },
    "figure3": (figure3.markdown, "figure3_cpu"),
    "figure4": (curves.markdown, "figure4_h100"),
    "figure5": (curves.markdown, "figure5_h100"),
    "memory": (memory.markdown, "memory_h100"),
    "forward": (forward, "forward_h100"),
    "backward": (backward, "backward_h100"),
    "learning": (learning, "learning_h200"),
}


def _shape(problem: dict[str, Any]) -> str:
    return ", ".join(str(problem[name]) for name in ("N", "V", "D"))
