"""The table and the picture of what `figure3` has recorded. Needs matplotlib to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.tables.cells import add_columns
from benchmarks.tables.images import TEXT, save

_BLUE, _RED, _GREY = "#2f81f7", "#e5484d", "#8b949e"  # visible on white and on black
_MARKED = (12, 16)  # thresholds 2^-12 and 2^-16, the paper's and the default of a filter that drops


def table(results: dict[str, Any]) -> Table:
    """A row for each threshold."""
    (cell,) = results["cells"]
    title = f"{escape(results['how'].get('data', ''))}: {cell['N']} tokens, {cell['V']} entries; mean loss {cell['loss']:.4f}"
    made = Table(title=title)
    columns = (
        "threshold",
        "entries a token",
        "mean falls below at rank",
        "columns that survive",
        "tiles that hold one",
        "mass dropped",
    )
    add_columns(made, columns, left=["threshold"])
    for each in cell["thresholds"]:
        rank = "never" if each["mean_rank"] >= cell["V"] else f"{each['mean_rank'] + 1}"
        shares = (f"{each[name]:.2%}" for name in ("columns", "tiles", "dropped"))
        made.add_row(f"2^-{each['power']}", f"{each['entries']:.1f}", rank, *shares)
    return made


def markdown(results: dict[str, Any]) -> str:
    """The same rows for a page."""
    (cell,) = results["cells"]
    rows = [
        "| threshold | entries of a token at or above it | columns that survive | tiles that hold one | probability dropped |"
    ]
    rows.append("|---|---|---|---|---|")
    for each in cell["thresholds"]:
        shares = " | ".join(f"{each[name]:.1%}" for name in ("columns", "tiles", "dropped"))
        rows.append(f"| 2^-{each['power']} | {each['entries']:.0f} | {shares} |")
    return "\n".join(rows)


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """Writes `path` with the suffixes .svg and .png; returns both paths."""
    return save(lambda: _figure(results), path)


def _figure(results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    (cell,) = results["cells"]
    figure = Figure(figsize=(10.5, 4.3), layout="constrained")
    falls, survives = figure.subplots(1, 2, gridspec_kw={"width_ratios": (3, 2)})
    _probabilities(falls, cell)
    _survivors(survives, cell)
    told = f"{cell['N']:,} tokens of real text, {cell['V']:,} vocabulary entries ({results['how'].get('data', '')})"
    figure.suptitle(told, fontsize=10, color=TEXT)
    for axes in (falls, survives):
        axes.grid(alpha=0.25)
        axes.patch.set_alpha(0)
    return figure


def _probabilities(axes: Any, cell: dict[str, Any]) -> None:
    axes.fill_between(
        cell["rank"], cell["p10"], cell["p90"], color=_BLUE, alpha=0.2, linewidth=0, label="10th to 90th percentile"
    )
    axes.plot(cell["rank"], cell["p50"], color=_BLUE, linewidth=1, linestyle=":", label="median")
    axes.plot(cell["rank"], cell["mean"], color=_BLUE, linewidth=2, label="mean over the tokens")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(max(min(cell["p10"]), 1e-12) / 3, 2)
    for each in cell["thresholds"]:
        if each["power"] in _MARKED:
            threshold = 2.0 ** -each["power"]
            axes.axhline(threshold, color=_RED, linewidth=1, linestyle="--")
            told = f"$2^{{-{each['power']}}}$: {each['entries']:,.0f} entries of a token"
            axes.text(1.1, threshold * 0.9, told, fontsize=8.5, color=TEXT, va="top")
    axes.set_xlabel("rank of the vocabulary entry for its token")
    axes.set_ylabel("probability")
    axes.set_title("probability by rank", fontsize=10, loc="left", color=TEXT)
    axes.legend(fontsize=8, frameon=False, labelcolor=TEXT)


def _survivors(axes: Any, cell: dict[str, Any]) -> None:
    thresholds = cell["thresholds"]
    places = range(len(thresholds))
    for name, label, colour, shift in (
        ("tiles", "tiles of 128 entries that hold a survivor", _GREY, -0.2),
        ("columns", "columns that survive", _BLUE, 0.2),
    ):
        values = [100 * each[name] for each in thresholds]
        axes.bar([place + shift for place in places], values, width=0.38, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            axes.text(
                place + shift, value + 1, f"{value:.0f}" if value >= 1 else f"{value:.1f}", ha="center", fontsize=8, color=TEXT
            )
    axes.set_xticks(list(places), [f"$2^{{-{each['power']}}}$" for each in thresholds])
    axes.set_ylim(0, 125)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("threshold")
    axes.set_ylabel("% of the vocabulary, of a block of 128 tokens")
    axes.set_title("what a filter keeps", fontsize=10, loc="left", color=TEXT)
    axes.legend(fontsize=8, frameon=False, labelcolor=TEXT, loc="upper left")
