"""Figures that were measured on a GPU, read from where they were recorded, to stand beside what is measured here."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1]
ROOT = NOTEBOOKS.parent


@functools.cache
def benchmark(name: str) -> dict[str, Any]:
    """One of `benchmarks/results`, by its name without ".json"."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def lesson(name: str) -> dict[str, Any]:
    """One of `notebooks/recorded`, which `record_on_gpu.py` makes."""
    return json.loads((NOTEBOOKS / "recorded" / f"{name}.json").read_text())


BANDWIDTH = {"H100": 3.35, "H200": 4.8}  # TB/s between a GPU and its memory, by their data sheets


def gpu(recorded: dict[str, Any]) -> str:
    """The GPU that a figure was measured on, in one word.

    >>> gpu({"surroundings": {"gpu": "NVIDIA H100 80GB HBM3, 580.95"}})
    'H100'
    """
    return recorded["surroundings"]["gpu"].removeprefix("NVIDIA ").split()[0].rstrip(",")


def source(recorded: dict[str, Any]) -> str:
    """Where and when a figure was measured, in a few words."""
    s = recorded["surroundings"]
    where = s["gpu"] or f"{s['cores']} CPU cores"
    commit = "" if s["commit"] == "unknown" else f", commit {s['commit']}"
    return f"{where.split(',')[0]}, {s['date']}{commit}"


@dataclass(frozen=True)
class Ladder:
    """Milliseconds of the product e @ c.T, N = 2048, V = 32768, D = 1024 in float32, by the lessons' kernels, slowest first.

    Attributes:
        ms: by kernel, and "cuBLAS".
        gpu: in one word.
        source: where and when.
    """

    ms: dict[str, float]
    gpu: str
    source: str

    def up_to(self, name: str) -> list[tuple[str, float]]:
        """The kernels up to one of them, and cuBLAS."""
        names = list(self.ms)
        return [(known, self.ms[known]) for known in (*names[: names.index(name) + 1], CUBLAS)]


CUBLAS = "cuBLAS"
RUNGS = ("naive_kernel", "turned_kernel", "tiled_kernel", "padded_kernel", "blocked_kernel")


def ladder() -> Ladder:
    """As recorded for the lessons."""
    recorded = lesson("ladder")
    return Ladder({name: recorded["ms"][name] for name in (*RUNGS, CUBLAS)}, gpu(recorded), source(recorded))


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers under a head, and where they come from. Jupyter shows a table."""

    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    foot: str = ""

    def _cells(self, row: Iterable[Any]) -> list[str]:
        return ["–" if x is None else f"{x:,.4g}" if isinstance(x, float) else str(x) for x in row]

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in self.head)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{escape(cell)}</td>" for cell in self._cells(row)) + "</tr>"
            for row in self.rows
        )
        foot = f"<p><small>{escape(self.foot)}</small></p>" if self.foot else ""
        return f"<table><tr>{head}</tr>{body}</table>{foot}"

    def __repr__(self) -> str:
        table = [list(self.head), *(self._cells(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, *([self.foot] if self.foot else [])])


def bfloat16() -> Any:
    """The dtype that NumPy and CuPy know bfloat16 by."""
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16)
