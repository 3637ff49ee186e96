"""Prints the README's table of the tensor-core forward, out of results/forward_h100.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "forward_h100.json"


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each problem."""
    rows = [
        "| N, V, D | data | cuBLAS, `e @ c.T` | loss | with survivor bits | memory for the loss |",
        "|---|---|---|---|---|---|",
    ]
    for problem in results["problems"]:
        cublas, loss, bits = (problem["calls"][name] for name in ("cuBLAS e @ c.T", "loss", "loss and survivor bits"))
        shape = ", ".join(str(problem[name]) for name in ("N", "V", "D"))
        data = problem["data"].split()[0]
        ratios = (f"{call['median_ms']:.2f} ms, {call['x']['median']:.2f} X" for call in (loss, bits))
        memory = f"{loss['extra_bytes'] / 2**20:.2f} MiB"
        rows.append(f"| {shape} | {data} | {cublas['median_ms']:.2f} ms | {' | '.join(ratios)} | {memory} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(json.loads(RESULTS.read_text())))
