"""The pictures of what `table1` has recorded: bars of the paper's problem, curves of each grid. Needs matplotlib to draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.proof.problems import HIDDEN, IGNORED, MODELS, SECTIONS, TABLE1, TOKENS, VOCABULARY
from benchmarks.tables import table1 as tables
from benchmarks.tables.images import TEXT, save

OURS, OURS_TOO, OTHERS = "#2f81f7", "#7db4fb", "#9aa3ad"  # visible on white and on black
_CURVES = {VOCABULARY: ("V", "vocabulary entries"), TOKENS: ("N", "tokens"), HIDDEN: ("D", "hidden size")}
_COLOURS = "#e5484d", "#f2923c", "#d6a700", "#c77dbb", "#46a758", "#8e6fe0", "#12a594", "#a1583a", "#94ba2c", "#5fb8e8"
_DASHES = {"cce_numba, drop": (1, 1), "cce_numba, exact dC": (3, 1), "cce_numba, exact": (5, 1)}
_HIDDEN = "cce_numba, frozen classifier"  # it computes less than the others, and would seem to win


def draw(results: dict[str, Any], image: Callable[[str], Path]) -> list[Path]:
    """All pictures for which there are rows with times."""
    paths: list[Path] = []
    timed = [cell for cell in results["cells"] if tables.Figures.of(cell) and cell["method"] != _HIDDEN]
    by_section = {name: [cell for cell in timed if cell["section"] == name] for name in SECTIONS}
    if by_section[TABLE1]:
        paths += save(lambda: _bars(by_section[TABLE1], results), image(""))
    base = by_section[TABLE1]
    for section, (axis, label) in _CURVES.items():
        if cells := by_section[section]:
            paths += save(lambda: _curves(cells + base, axis, label), image(section))  # noqa: B023  # called at once
    if cells := by_section[IGNORED]:
        paths += save(lambda: _curves(cells + base, "ignored", "share of ignored tokens"), image(IGNORED))
    if cells := by_section[MODELS]:
        paths += save(lambda: _models(cells + base), image(MODELS))
    return paths


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _bars(cells: list[dict[str, Any]], results: dict[str, Any]) -> Any:
    """Time and memory beside each other, the fastest first."""
    figures = {cell["method"]: tables.Figures.of(cell) for cell in cells}
    shown = sorted(cells, key=lambda cell: _both(figures[cell["method"]]))
    first = shown[0]
    known = all(cell["memory"]["both"] is not None for cell in shown)
    figure = _figure(10.5, 1.3 + 0.33 * len(shown))
    panels = figure.subplots(1, 2 if known else 1, sharey=True, squeeze=False)[0]
    gpu = results["surroundings"]["gpu"].split(",")[0] or "the CPU"
    sizes = f"{first['N']:,} tokens, {first['V']:,} entries, hidden size {first['D']}"
    sizes += f", {first['data']} data, {results['how']['dtype']}"
    figure.suptitle(f"Loss and gradients on {gpu}: less is better\n{sizes}", fontsize=10, color=TEXT)
    values = [[_both(figures[cell["method"]]) for cell in shown], [cell["memory"]["both"] or 0 for cell in shown]]
    told = [
        [f"{_both(of):.1f} ms, {of.x['both']['median']:.2f} X" for cell in shown if (of := figures[cell["method"]])],
        [f"{value / 2**30:.2f} GiB" for value in values[1]],
    ]
    for axes, numbers, words, title in zip(panels, values, told, ("time", "memory beyond the inputs"), strict=False):
        axes.barh(range(len(shown)), numbers, height=0.7, color=[_bar_colour(cell["method"]) for cell in shown])
        axes.set_title(title, fontsize=10, loc="left", color=TEXT)
        axes.set_xlim(0, 1.35 * max(numbers) or 1)
        for row, (number, word) in enumerate(zip(numbers, words, strict=True)):
            axes.text(number + 0.01 * max(numbers), row, word, va="center", fontsize=8.5, color=TEXT)
        axes.set_yticks(range(len(shown)), [cell["method"] for cell in shown])
        axes.xaxis.set_visible(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.patch.set_alpha(0)
    panels[0].invert_yaxis()
    return figure


def _curves(cells: list[dict[str, Any]], axis: str, label: str) -> Any:
    """X of loss and gradients by one size, a line for each method; bands from the 10th to the 90th percentile."""
    figure = _figure(8.6, 4.6)
    axes = figure.subplots()
    for name, colour in _line_colours(cells).items():
        points = sorted((cell[axis], tables.Figures.of(cell)) for cell in cells if cell["method"] == name)
        xs = [size for size, _ in points]
        of = [figures.x["both"] for _, figures in points if figures]
        style: dict[str, Any] = {"linewidth": 2.5} if name == "cce_numba" else {"linewidth": 1.4}
        if name in _DASHES:
            style["dashes"] = _DASHES[name]
        axes.plot(xs, [each["median"] for each in of], marker="o", markersize=3, color=colour, label=name, **style)
        axes.fill_between(xs, [each["p10"] for each in of], [each["p90"] for each in of], color=colour, alpha=0.15, linewidth=0)
    if axis != "ignored":
        axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0%}" if axis == "ignored" else "{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(label)
    axes.set_ylabel("time of loss and gradients in X,\nthe time of e @ c.T in the same round")
    axes.grid(alpha=0.25)
    axes.patch.set_alpha(0)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, labelcolor=TEXT)
    return figure


def _models(cells: list[dict[str, Any]]) -> Any:
    """X of loss and gradients of each model's head: a row of dots for each model."""
    figure = _figure(8.6, 1.4 + 0.42 * len({cell["problem"] for cell in cells}))
    axes = figure.subplots()
    problems = list(dict.fromkeys(cell["problem"] for cell in cells))
    for name, colour in _line_colours(cells).items():
        of = [(problems.index(cell["problem"]), tables.Figures.of(cell)) for cell in cells if cell["method"] == name]
        xs = [figures.x["both"]["median"] for _, figures in of if figures]
        size = 60 if name == "cce_numba" else 26
        marker = {"cce_numba, drop": "v", "cce_numba, exact dC": "s", "cce_numba, exact": "D"}.get(name, "o")
        axes.scatter(xs, [row for row, _ in of], color=colour, s=size, marker=marker, label=name, zorder=3)
    axes.set_yticks(range(len(problems)), problems)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time of loss and gradients in X, the time of e @ c.T in the same round")
    axes.grid(alpha=0.25)
    axes.patch.set_alpha(0)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, labelcolor=TEXT)
    return figure


def _line_colours(cells: list[dict[str, Any]]) -> dict[str, str]:
    """By method; ours are blue."""
    names = list(dict.fromkeys(cell["method"] for cell in cells))
    others = [name for name in names if not name.startswith("cce_numba")]
    return {name: _COLOURS[others.index(name) % len(_COLOURS)] if name in others else _bar_colour(name) for name in names}


def _bar_colour(name: str) -> str:
    return OURS if name == "cce_numba" else OURS_TOO if name.startswith("cce_numba") else OTHERS


def _both(figures: tables.Figures | None) -> float:
    return figures.ms["both"] if figures else 0.0
