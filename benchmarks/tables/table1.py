"""What `table1` has recorded: its figures, tables for a terminal and for Markdown, and pictures. Needs matplotlib to draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from benchmarks.measure.timing import spread
from benchmarks.proof.problems import SECTIONS, TABLE1
from benchmarks.tables import table1_pictures
from benchmarks.tables.cells import add_columns

_TIMES = "loss", "gradient", "both"
_REASON_LETTERS = 80  # of the reason why a method has no figures, on a page


@dataclass(frozen=True)
class Figures:
    """What a row comes to.

    Attributes:
        ms: median milliseconds by "loss", "gradient" and "both"; of a method whose forward computes gradients no "gradient".
        x: the same over the product's time of the round: median, p10 and p90.
        product_ms: the product's median.
        rounds: how many rounds these are of.
    """

    ms: dict[str, float]
    x: dict[str, dict[str, float]]
    product_ms: float
    rounds: int

    @classmethod
    def of(cls, cell: dict[str, Any]) -> Figures | None:
        """Of a row; None where it has no times."""
        rounds = cell.get("rounds")
        if cell["status"] != "ok" or not rounds:
            return None
        names = [name for name in _TIMES if name != "gradient" or not cell["in_forward"]]
        of = {name: np.array([each[name] for each in rounds]) for name in (*names, "product")}
        return cls(
            ms={name: float(np.median(of[name])) for name in names},
            x={name: spread(of[name] / of["product"], digits=3) for name in names},
            product_ms=float(np.median(of["product"])),
            rounds=len(rounds),
        )


def of_section(results: dict[str, Any], section: str) -> dict[str, list[dict[str, Any]]]:
    """A section's rows by problem."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        if cell["section"] == section:
            found.setdefault(cell["problem"], []).append(cell)
    return found


def tables(results: dict[str, Any]) -> Iterable[Table]:
    """A table for each section that has rows."""
    for section, told in SECTIONS.items():
        if by_problem := of_section(results, section):
            yield _table(f"{told}; {results['how']['dtype']}", by_problem)


def one_line(cell: dict[str, Any]) -> str:
    """What the validation of a row came to."""
    start = f"{escape(cell['problem'])}, {escape(cell['method'])}: "
    if cell["status"] != "ok":
        return f"{start}[{'dim' if cell['status'] == 'missing' else 'red'}]{cell['status']}: {escape(cell['why'])}[/]"
    errors = ", ".join(f"d{name.upper()} {error}" for name, error in zip("ec", _errors(cell), strict=True) if error)
    return f"{start}right; errors {errors}; loss and gradients take {_mib(cell['memory']['both'])} MiB"


def markdown(results: dict[str, Any], section: str = TABLE1) -> str:
    """A section's rows for a page, the fastest first. Methods without figures stand below, with the beginning of the reason."""
    head = "method", "loss", "gradient", "loss + gradient", "memory: loss", "loss + gradient", "error of dE", "of dC"
    lines = []
    for rows in of_section(results, section).values():
        first = rows[0]
        sizes = f"N={first['N']}, V={first['V']}, D={first['D']}"
        ignored = f", {first['ignored']:.0%} of the tokens ignored" if first["ignored"] else ""
        lines += ["", f"{first['problem']}: {sizes}{ignored}, {first['data']} data", "", f"| {' | '.join(head)} |"]
        lines.append("|---|" + "---|" * (len(head) - 1))
        shown = sorted((cell for cell in rows if cell["status"] == "ok"), key=_order)
        lines += [f"| {' | '.join(_markdown_cells(cell))} |" for cell in shown]
        if len(shown) < len(rows):
            lines += ["", f"Without figures: {_without_figures(rows)}."]
    return "\n".join(lines[1:])


def draw(results: dict[str, Any], image: Callable[[str], Path]) -> list[Path]:
    """Bars of the first section, and curves of the others; `image(name)` is a picture's path without suffix."""
    return table1_pictures.draw(results, image)


def _order(cell: dict[str, Any]) -> tuple[bool, float]:
    figures = Figures.of(cell)
    return (figures is None, 0.0 if figures is None else figures.ms["both"])


def _without_figures(rows: list[dict[str, Any]]) -> str:
    """The methods that failed or are missing, by reason. A reason is cut: it may be a page, and the record has all of it."""
    by_reason: dict[str, list[str]] = {}
    for cell in rows:
        if cell["status"] != "ok":
            why = " ".join(cell["why"].replace("`", "'").split())
            why = why if len(why) <= _REASON_LETTERS else f"{why[: _REASON_LETTERS - 3]}..."
            by_reason.setdefault(f"{cell['status']}: `{why}`", []).append(cell["method"])
    return "; ".join(f"{', '.join(methods)} ({reason})" for reason, methods in by_reason.items())


def _markdown_cells(cell: dict[str, Any]) -> list[str]:
    name = f"**{cell['method']}**" if cell["method"].startswith("cce_numba") else cell["method"]
    figures = Figures.of(cell)
    times = ["" if figures is None or what not in figures.ms else _time(figures, what) for what in _TIMES]
    if cell["in_forward"]:
        times[1] = "in the forward"
    memory = (f"{_mib(cell['memory'][what])} MiB" for what in ("loss", "both"))
    return [name, *times, *memory, *_errors(cell)]


def _time(figures: Figures, what: str) -> str:
    return f"{figures.ms[what]:.1f} ms, {figures.x[what]['median']:.2f} X"


def _table(title: str, by_problem: dict[str, list[dict[str, Any]]]) -> Table:
    left_out: dict[str, list[str]] = {}
    table = Table(title=f"{title}; errors in 1/1000; memory in MiB; X is a time over that of e @ c.T in the same round")
    columns = ["method", "loss ms", "X", "gradient ms", "X", "both ms", "X", "p10 - p90", "rounds"]
    add_columns(table, [*columns, "mem. loss", "mem. both", "dE", "dC", "zero rows"], left=["method"])
    for problem, rows in by_problem.items():
        table.add_section()
        first = rows[0]
        rounding = ", ".join(f"d{name.upper()} {1e3 * error:.2f}" for name, error in first["rounding"].items())
        table.add_row(f"[bold]{escape(problem)}[/]: {first['N']} x {first['V']} x {first['D']}, {escape(first['data'])}")
        table.add_row(f"loss {first['exact_loss']:.3f}; rounding alone {rounding}")
        for cell in sorted(rows, key=_order):
            if cell["status"] == "ok":
                table.add_row(*_cells(cell))
            else:
                left_out.setdefault(f"{cell['status']}: {cell['why']}", []).append(f"{cell['method']} ({problem})")
    told = "; ".join(f"{', '.join(dict.fromkeys(who))}: {why}" for why, who in left_out.items())
    table.caption = escape(told) or None
    return table


def _cells(cell: dict[str, Any]) -> list[str]:
    name, figures = escape(cell["method"]), Figures.of(cell)
    times = []
    for what in _TIMES:
        shown = figures is not None and what in figures.ms
        times += [f"{figures.ms[what]:.2f}", f"{figures.x[what]['median']:.2f}"] if shown and figures else ["", ""]
    spread_ = f"{figures.x['both']['p10']:.2f} - {figures.x['both']['p90']:.2f}" if figures else ""
    memory = (_mib(cell["memory"][what]) for what in ("loss", "both"))
    errors = ("" if name not in cell["errors"] else f"{1e3 * cell['errors'][name]:.2f}" for name in ("e", "c"))
    zero = f"{cell['errors']['zero_rows']:.1%}" if "zero_rows" in cell["errors"] else ""
    return [name, *times, spread_, f"{figures.rounds if figures else 0}", *memory, *errors, zero]


def _errors(cell: dict[str, Any]) -> list[str]:
    return [f"{cell['errors'][name]:.1e}" if name in cell["errors"] else "" for name in ("e", "c")]


def _mib(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.1f}"
