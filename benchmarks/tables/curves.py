"""The tables and the picture of what `figure4` and `figure5` have recorded. Needs matplotlib to draw.

Lines are means over the seeds, bands reach from the lowest to the highest seed. The lowest panels have each method's validation
loss less that of exact gradients of the same seed; the grey band there is what seeds differ by with exact gradients alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.tables.cells import add_columns
from benchmarks.tables.images import TEXT, save

EXACT = "cce_numba, exact"
_GREY = "#8b949e"
_COLOURS = {  # visible on white and on black
    EXACT: _GREY,
    "cce_numba": "#2f81f7",
    "cce_numba, drop": "#12a594",
    "cut_cross_entropy": "#e5484d",
    "cut_cross_entropy, kahan_full_c": "#f2923c",
    "torch.compile": "#8e6fe0",
}
_LINEAR = 0.01  # nats: differences are on a linear axis within this, or within a larger spread of exact gradients


def runs_of(results: dict[str, Any]) -> dict[int, dict[str, dict[int, dict[str, Any]]]]:
    """Runs by vocabulary, method and seed; exact gradients come first."""
    found: dict[int, dict[str, dict[int, dict[str, Any]]]] = {}
    for cell in sorted(results["cells"], key=lambda cell: (cell["vocabulary"], cell["method"] != EXACT, cell["seed"])):
        found.setdefault(cell["vocabulary"], {}).setdefault(cell["method"], {})[cell["seed"]] = cell
    return found


def last(run: dict[str, Any], curve: str = "validation") -> float:
    """A run's last loss."""
    return run[curve][-1][1]


def apart(runs: dict[int, dict[str, Any]], exact: dict[int, dict[str, Any]]) -> list[float]:
    """Last validation losses less those of exact gradients, of the seeds that both have."""
    return [last(run) - last(exact[seed]) for seed, run in runs.items() if seed in exact]


def one_line(cell: dict[str, Any]) -> str:
    """What a run came to."""
    told = f"validation loss {last(cell):.4f}, training loss {last(cell, 'train'):.4f}, {cell['seconds']:.0f} s"
    return f"V={cell['vocabulary']}, seed {cell['seed']}, {cell['method']}: {told}"


def tables(results: dict[str, Any]) -> Iterable[Table]:
    """A table for each vocabulary."""
    for vocabulary, by_method in runs_of(results).items():
        table = Table(title=f"V={vocabulary}: losses at the end, means over the seeds (lowest to highest)")
        columns = "method", "seeds", "validation loss", "less that of exact gradients", "training loss", "s a run"
        add_columns(table, columns, left=["method"])
        for row in _rows(by_method):
            table.add_row(*row)
        yield table


def markdown(results: dict[str, Any]) -> str:
    """The same for a page."""
    lines = ["| V | method | seeds | validation loss | less that of exact gradients | training loss | s a run |"]
    lines.append("|---|---|---|---|---|---|---|")
    for vocabulary, by_method in runs_of(results).items():
        lines += [f"| {vocabulary} | {' | '.join(row)} |" for row in _rows(by_method)]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """Writes `path` with the suffixes .svg and .png; returns both paths."""
    return save(lambda: _figure(results), path)


def _rows(by_method: dict[str, dict[int, dict[str, Any]]]) -> Iterable[list[str]]:
    exact = by_method.get(EXACT, {})
    for method, runs in by_method.items():
        of = list(runs.values())
        different = apart(runs, exact) if method != EXACT else []
        yield [
            *(method, f"{len(of)}", _spread([last(run) for run in of], ".4f"), _spread(different, "+.4f")),
            *(f"{fmean(last(run, 'train') for run in of):.4f}", f"{fmean(run['seconds'] for run in of):.0f}"),
        ]


def _spread(values: list[float], form: str) -> str:
    return f"{fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})" if values else ""


def _figure(results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    by_vocabulary = runs_of(results)
    figure = Figure(figsize=(5.6 * max(1.3, len(by_vocabulary)), 9.4), layout="constrained")
    panels = figure.subplots(3, len(by_vocabulary), squeeze=False, sharex=True, gridspec_kw={"height_ratios": (3, 3, 2)})
    for (train, validation, difference), (vocabulary, by_method) in zip(panels.T, by_vocabulary.items(), strict=True):
        for axes, curve in ((train, "train"), (validation, "validation")):
            for method, runs in by_method.items():
                _line(axes, [np.array(run[curve], np.float64) for run in runs.values()], method)
        _differences(difference, by_method)
        train.set_title(f"V = {vocabulary:,}", fontsize=11, color=TEXT)
        difference.set_xlabel("step")
    for axes, label in zip(
        panels[:, 0], ("training loss", "validation loss", "validation loss,\nless that of exact"), strict=True
    ):
        axes.set_ylabel(label)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        axes.patch.set_alpha(0)
    panels[0, 0].legend(fontsize=8, frameon=False, labelcolor=TEXT)
    return figure


def _line(axes: Any, curves: list[np.ndarray], method: str) -> None:
    """The mean and the band of curves (points, 2): steps and values."""
    steps, values = curves[0][:, 0], np.stack([curve[:, 1] for curve in curves])
    colour = _COLOURS.get(method, _GREY)
    axes.plot(steps, values.mean(0), color=colour, linewidth=3.5 if method == EXACT else 1.5, label=method)
    if len(curves) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)


def _differences(axes: Any, by_method: dict[str, dict[int, dict[str, Any]]]) -> None:
    exact = {seed: np.array(run["validation"], np.float64) for seed, run in by_method.get(EXACT, {}).items()}
    spread = 0.0
    if len(exact) > 1:
        every = np.stack([curve[:, 1] for curve in exact.values()])
        band = np.ptp(every, axis=0)
        spread = float(band[-1])
        axes.fill_between(next(iter(exact.values()))[:, 0], -band, band, color=_GREY, alpha=0.2, linewidth=0)
    for method, runs in by_method.items():
        curves = [np.array(run["validation"], np.float64) for seed, run in runs.items() if seed in exact]
        own = [exact[seed] for seed in runs if seed in exact]
        if method != EXACT and curves:
            _line(axes, [np.c_[curve[:, 0], curve[:, 1] - of[:, 1]] for curve, of in zip(curves, own, strict=True)], method)
    axes.axhline(0, color=_GREY, linewidth=1)
    axes.set_yscale("symlog", linthresh=max(_LINEAR, spread))
    axes.yaxis.set_major_formatter("{x:g}")
