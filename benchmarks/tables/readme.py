"""The README's tables of `forward` and `backward`, in Markdown, out of recorded results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.tables.forward import BITS, CUBLAS, LOSS


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
            limit = "" if row["x_at_most"] is None else f"{row['x_at_most']:.1f} X"
            ratio = f"{row['call']['median_ms']:.2f} ms, {row['x']['median']:.2f} X"
            errors = (f"{row['errors'][name]['error']:.1e}" if name in row["errors"] else "" for name in ("e", "c"))
            cells = row["name"], row["data"], _shape(row), ratio, limit, *errors, f"{row['extra_bytes'] / 2**20:.1f} MiB"
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


# Tables by name, and the recorded results that each is made of.
TABLES: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "forward": (forward, "forward_h100"),
    "backward": (backward, "backward_h100"),
}


def _shape(problem: dict[str, Any]) -> str:
    return ", ".join(str(problem[name]) for name in ("N", "V", "D"))
