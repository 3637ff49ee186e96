"""What `learning` has found, over seeds, and its tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.table import Table

from benchmarks.tables.cells import add_columns

EXACT = "exact"


@dataclass(frozen=True)
class Summary:
    """A way over its seeds.

    Attributes:
        losses: the last validation loss of each seed.
        train: the mean loss of the last steps learned, over seeds.
        kept, flagged: shares of columns at the last step, over seeds; None where there are none.
        apart: each seed's last validation loss less that of exact gradients, of the seeds that both have.
    """

    way: str
    eps: float | None
    losses: list[float]
    train: float
    kept: float | None
    flagged: float | None
    apart: list[float]

    @property
    def spread(self) -> float:
        """The highest loss less the lowest; NaN if any is, or for one seed."""
        return max(self.losses) - min(self.losses) if len(self.losses) > 1 and not _any_nan(self.losses) else math.nan


def vocabularies(results: dict[str, Any]) -> list[int]:
    """Of the runs, from the smallest on."""
    return sorted({run["vocabulary"] for run in results["runs"]})


def ways_of(results: dict[str, Any], vocabulary: int) -> dict[str, list[dict[str, Any]]]:
    """Runs by way, the exact ones first, then by name and from the highest threshold on."""
    runs = [run for run in results["runs"] if run["vocabulary"] == vocabulary]
    runs.sort(key=lambda run: (run["way"] != EXACT, run["way"].partition(":")[0], -(run["eps"] or 0), run["seed"]))
    by_way: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_way.setdefault(run["way"], []).append(run)
    return by_way


def summaries(results: dict[str, Any], vocabulary: int) -> list[Summary]:
    """Of all ways of a vocabulary."""
    by_way = ways_of(results, vocabulary)
    exact = {run["seed"]: _last(run) for run in by_way.get(EXACT, [])}
    return [_summary(way, runs, exact) for way, runs in by_way.items()]


def verdict(summary: Summary, exact: Summary | None) -> tuple[float, bool | None]:
    """The mean difference from exact gradients, in units of their spread, and whether it is at most 1.

    NaN and None where their spread is not known or no seed is common; never True for a loss that is NaN.
    """
    if exact is None or not summary.apart or not exact.spread > 0:
        return math.nan, None
    in_spreads = fmean(summary.apart) / exact.spread
    return in_spreads, in_spreads <= 1


def learning_table(results: dict[str, Any], vocabulary: int) -> Table:
    """A row for each way."""
    how = results["how"]
    batch = f"{how['steps']} steps of {how['sequences']} x {how['length']} tokens, {how['layers']} x {how['hidden']}"
    table = Table(title=f"learning {how['text']}, V={vocabulary}: {batch}, {how['dtype']}")
    columns = "way", "threshold", "columns kept", "flagged", "seeds", "validation loss", "spread", "apart from exact"
    add_columns(table, [*columns, "in spreads of exact", "within", "training loss", "s a run"], left=["way"])
    found = summaries(results, vocabulary)
    seconds = {way: fmean(run["seconds"] for run in runs) for way, runs in ways_of(results, vocabulary).items()}
    exact = next((each for each in found if each.way == EXACT), None)
    for each in found:
        in_spreads, within = verdict(each, exact)
        cells = [
            *(each.way, "" if each.eps is None else f"2^{math.log2(each.eps):.4g}", _share(each.kept), _share(each.flagged)),
            *(f"{len(each.losses)}", f"{fmean(each.losses):.4f}", _number(each.spread)),
        ]
        if each.way == EXACT:
            cells += ["", "", ""]
        else:
            apart = f"{fmean(each.apart):+.4f} ({min(each.apart):+.4f} to {max(each.apart):+.4f})" if each.apart else ""
            cells += [apart, _number(in_spreads, "+.2f"), {None: "", True: "yes", False: "[red]no[/]"}[within]]
        table.add_row(*cells, f"{each.train:.4f}", f"{seconds[each.way]:.1f}")
    return table


def one_line(run: dict[str, Any]) -> str:
    """What a run came to."""
    kept = run["columns"][-1][1].get("kept")
    told = f"validation loss {_last(run):.4f}, training loss {run['train'][-1]:.4f}, columns kept {_share(kept) or 'not known'}"
    return f"V={run['vocabulary']}, seed {run['seed']}, {run['way']}: {told}, {run['seconds']:.1f} s"


def _summary(way: str, runs: list[dict[str, Any]], exact: dict[int, float]) -> Summary:
    last = [run["columns"][-1][1] for run in runs]
    kept, flagged = ([shares[name] for shares in last if name in shares] for name in ("kept", "flagged"))
    return Summary(
        way=way,
        eps=runs[0]["eps"],
        losses=[_last(run) for run in runs],
        train=fmean(run["train"][-1] for run in runs),
        kept=fmean(kept) if kept else None,
        flagged=fmean(flagged) if flagged else None,
        apart=[_last(run) - exact[run["seed"]] for run in runs if run["seed"] in exact],
    )


def _last(run: dict[str, Any]) -> float:
    return run["validation"][-1][1]


def _any_nan(values: list[float]) -> bool:
    return any(math.isnan(value) for value in values)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _number(value: float, form: str = ".4f") -> str:
    return "" if math.isnan(value) else f"{value:{form}}"
