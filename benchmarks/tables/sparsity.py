"""The sparsity of made-up inputs beside that of a real model."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from benchmarks.data.sparsity import EPS, REAL, Sparsity

_SHARES = (  # name, field of `Sparsity`, digits of a percentage
    ("columns that survive in a block", "columns", 1),
    ("columns that survive in some block", "union", 0),
    ("tiles that hold a survivor", "tiles", 0),
    ("probability mass dropped", "dropped", 2),
)


def fit_table(measured: Sparsity, title: str) -> Table:
    """A real model's statistics beside those measured, whose thresholds must be `EPS`."""
    table = Table(title=title)
    for column in ("statistic", "eps", "model", "generated", "generated / model"):
        table.add_column(column, justify="left" if column == "statistic" else "right")

    def add(name: str, eps: str, real: float, ours: float, unit: str, digits: int) -> None:
        table.add_row(name, eps, f"{real:.{digits}f}{unit}", f"{ours:.{digits}f}{unit}", f"{ours / real:.2f}")

    exponents = [f"2^{int(np.log2(x))}" for x in EPS]
    for name, field, digits in _SHARES:
        for eps, real, ours in zip(exponents, getattr(REAL, field), getattr(measured, field), strict=True):
            add(name, eps, 100 * real, 100 * ours, " %", digits)
    add("entries of a token", exponents[0], REAL.entries[0], measured.entries[0], "", 0)
    add("mean loss, nats", "", REAL.loss, measured.loss, "", 2)
    return table
