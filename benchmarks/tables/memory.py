"""The table and the picture of what `memory` has recorded. Needs matplotlib to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.tables.cells import add_columns
from benchmarks.tables.images import TEXT, save
from benchmarks.tables.table1_pictures import OTHERS, OURS, OURS_TOO

_HEAD = (
    "method",
    "peak of a step, GiB",
    "beyond the model without a loss",
    "weights and AdamW, GiB",
    "ms a step",
    "first losses",
)
ALONE = "the model without a loss"


def groups(results: dict[str, Any]) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """Cells by model and by whether activations are recomputed."""
    found: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for cell in results["cells"]:
        found.setdefault((cell["model"], cell["recompute"]), []).append(cell)
    return found


def one_line(cell: dict[str, Any]) -> str:
    """What a method came to."""
    start = f"{escape(cell['model'])}, {_activations(cell)}, {escape(cell['method'])}: "
    if cell["status"] != "ok":
        return f"{start}[{'dim' if cell['status'] == 'missing' else 'red'}]{cell['status']}: {escape(cell['why'])}[/]"
    return f"{start}{_gib(cell['peak_bytes'])} GiB, {cell['step_ms']:.1f} ms a step"


def table(results: dict[str, Any]) -> Table:
    """A section for each model."""
    made = Table(title="a training step")
    add_columns(made, _HEAD, left=["method"])
    for cells in groups(results).values():
        made.add_section()
        made.add_row(f"[bold]{_title(cells[0])}[/]")
        for cell in cells:
            made.add_row(escape(cell["method"]), *_cells(cell, cells))
    return made


def markdown(results: dict[str, Any]) -> str:
    """The same for a page."""
    lines = []
    for cells in groups(results).values():
        lines += ["", _title(cells[0]), "", f"| {' | '.join(_HEAD)} |", "|---|" + "---|" * (len(_HEAD) - 1)]
        lines += [f"| {' | '.join((cell['method'], *_cells(cell, cells)))} |" for cell in cells]
    return "\n".join(lines[1:])


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """Writes `path` with the suffixes .svg and .png; returns both paths."""
    return save(lambda: _figure(results), path)


def _figure(results: dict[str, Any]) -> Any:
    """Bars of the peaks, a panel for each model; the grey line is the model without a loss."""
    from matplotlib.figure import Figure

    shown = {key: [cell for cell in cells if cell.get("peak_bytes") is not None] for key, cells in groups(results).items()}
    most = max((len(cells) for cells in shown.values()), default=1)
    figure = Figure(figsize=(10.5, (1.0 + 0.3 * most) * max(1, (len(shown) + 1) // 2)), layout="constrained")
    panels = figure.subplots(max(1, (len(shown) + 1) // 2), min(2, max(1, len(shown))), squeeze=False).ravel()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes, cells in zip(panels, shown.values(), strict=False):
        alone = next((cell["peak_bytes"] / 2**30 for cell in cells if cell["method"] == ALONE), None)
        bars = sorted((cell for cell in cells if cell["method"] != ALONE), key=lambda cell: cell["peak_bytes"])
        values = [cell["peak_bytes"] / 2**30 for cell in bars]
        axes.barh(range(len(bars)), values, height=0.7, color=[_colour(cell["method"]) for cell in bars])
        for row, value in enumerate(values):
            axes.text(value + 0.01 * max(values), row, f"{value:.2f} GiB", va="center", fontsize=8, color=TEXT)
        if alone is not None:
            axes.axvline(alone, color=TEXT, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(bars)), [cell["method"] for cell in bars], fontsize=8)
        axes.set_xlim(0, 1.25 * max([*values, 1e-9]))
        axes.xaxis.set_visible(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.patch.set_alpha(0)
        if cells:
            axes.set_title(_title(cells[0]), fontsize=9, loc="left", color=TEXT)
    figure.suptitle(
        "peak memory of a training step beyond weights and AdamW; dashed: the model without a loss", fontsize=10, color=TEXT
    )
    return figure


def _title(cell: dict[str, Any]) -> str:
    return f"{cell['model']}, {cell['N']} tokens, V={cell['V']}, activations {_activations(cell)}"


def _activations(cell: dict[str, Any]) -> str:
    return "recomputed" if cell["recompute"] else "kept"


def _cells(cell: dict[str, Any], group: list[dict[str, Any]]) -> list[str]:
    if cell["status"] != "ok":
        return [f"{cell['status']}: {cell['why'][:60]}", *[""] * 4]
    alone = next((each.get("peak_bytes") for each in group if each["method"] == ALONE), None)
    beyond = "" if alone is None or cell["peak_bytes"] is None else f"{(cell['peak_bytes'] - alone) / 2**30:+.2f} GiB"
    losses = ", ".join(f"{loss:.3f}" for loss in cell["losses"]) if cell["method"] != ALONE else ""
    return [_gib(cell["peak_bytes"]), beyond, _gib(cell["state_bytes"]), f"{cell['step_ms']:.1f}", losses]


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**30:.2f}"


def _colour(method: str) -> str:
    return OURS if method == "cce_numba" else OURS_TOO if method.startswith("cce_numba") else OTHERS
