"""Prints a table of the README, out of results/forward_h100.json, or backward_h100.json once it is there.

python benchmarks/readme_table.py [forward | backward]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def forward(results: dict[str, Any]) -> str:
    """Markdown: a row for each problem."""
    rows = [
        "| N, V, D | data | cuBLAS, `e @ c.T` | loss | with survivor bits | memory for the loss |",
        "|---|---|---|---|---|---|",
    ]
    for problem in results["problems"]:
        cublas, loss, bits = (problem["calls"][name] for name in ("cuBLAS e @ c.T", "loss", "loss and survivor bits"))
        data = problem["data"].split()[0]
        ratios = (f"{call['median_ms']:.2f} ms, {call['x']['median']:.2f} X" for call in (loss, bits))
        memory = f"{loss['extra_bytes'] / 2**20:.2f} MiB"
        rows.append(f"| {_shape(problem)} | {data} | {cublas['median_ms']:.2f} ms | {' | '.join(ratios)} | {memory} |")
    return "\n".join(rows)


def backward(results: dict[str, Any]) -> str:
    """Markdown: a row for each call, those left out that were wrong."""
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


def recorded(which: str) -> Path:
    """The results that a table is made of."""
    return RESULTS / f"{which}_h100.json"


def _shape(problem: dict[str, Any]) -> str:
    return ", ".join(str(problem[name]) for name in ("N", "V", "D"))


if __name__ == "__main__":
    tables = {"forward": forward, "backward": backward}
    which = sys.argv[1] if len(sys.argv) > 1 else "forward"
    if which not in tables or not recorded(which).exists():
        sys.exit(f"readme_table: must be one of {', '.join(x for x in tables if recorded(x).exists())}, got {which!r}")
    print(tables[which](json.loads(recorded(which).read_text())))
