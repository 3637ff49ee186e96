"""What the commands print: tables for people, one JSON object for scripts."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cce_numba.commands.report import Report

_WIDTH = 100  # where stdout is no terminal, so that files and pipes get the same layout everywhere


def console() -> Console:
    """Standard output; brackets in paths and messages are no markup."""
    width = None if sys.stdout.isatty() else _WIDTH
    return Console(width=width, markup=False, highlight=False, emoji=False)


def facts(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of names and what there is to say of them."""
    table = Table(title=title, title_justify="left", box=box.ROUNDED, show_header=False, expand=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def as_json(value: Any) -> None:
    """Prints one JSON object; what is not finite becomes null, since JSON has no word for it."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def demo(report: Report) -> None:
    """Prints the tables of the demo."""
    out, problem, plan = console(), report.problem, report.plan
    N, V, D = len(problem.e), *problem.c.shape
    ignored = f" ({N - report.counting:,} ignored)" if report.counting < N else ""
    rows = [
        ("problem", f"{N:,} tokens{ignored}, {V:,} vocabulary entries, {D:,} dimensions, {problem.e.dtype}"),
        ("source", problem.source),
        ("backend", f"{plan.backend}: {plan.how}"),
        *((f"  not {name}", why) for name, why in plan.rejected.items()),
        ("mean loss", f"{report.loss:.6f} nats, perplexity {_perplexity(report.loss):.4g}"),
    ]
    if report.known_loss is not None:
        difference = report.loss - report.known_loss
        rows.append(("  the file's", f"{report.known_loss:.6f} nats, difference {difference:+.2e}"))
    rows += [
        ("gradients", f"|dE| = {report.norm_d_e:.4e}, |dC| = {report.norm_d_c:.4e}"),
        ("filter", plan.filter),
        ("  survivors", _survivors(report)),
        ("time", f"{report.loss_seconds:.3g} s loss, {report.grad_seconds:.3g} s loss and gradients"),
    ]
    if report.compile_seconds is not None:
        rows.append(("  first calls", f"{report.compile_seconds:.3g} s before that, to compile or to find it compiled"))
    peak, gradients = size(report.peak_bytes), size(report.grad_bytes)
    rows += [
        ("memory", f"{peak} at most beyond the inputs, of which {gradients} are gradients"),
        ("  stored logits", f"would take {size(plan.stored_logits_bytes)}, and as much again for their gradient"),
    ]
    out.print(facts("Cut Cross-Entropy: loss and gradients without stored logits", rows))
    out.print(_agreement(report))


def demo_as_json(report: Report) -> None:
    """Prints what the tables of the demo show as one JSON object."""
    problem, plan, agreement = report.problem, report.plan, report.agreement
    V, D = problem.c.shape
    as_json(
        {
            "problem": {
                "tokens": len(problem.e),
                "counting_tokens": report.counting,
                "vocab": V,
                "dim": D,
                "dtype": str(problem.e.dtype),
                "source": problem.source,
            },
            "backend": {"name": plan.backend, "how": plan.how, "tiles": str(plan.tiles), "rejected": plan.rejected},
            "loss": report.loss,
            "perplexity": _perplexity(report.loss),
            "known_loss": report.known_loss,
            "gradient_norms": {"e": report.norm_d_e, "c": report.norm_d_c},
            "filter": {
                "name": report.filter_name,
                "how": plan.filter,
                "eps": report.filter_eps,
                "block": report.survivor_block,
                "survivors": report.survivors,
                "dropped_mass": agreement.dropped_mass,
            },
            "seconds": {
                "compile": report.compile_seconds,
                "loss": report.loss_seconds,
                "loss_and_gradients": report.grad_seconds,
            },
            "bytes": {
                "peak": report.peak_bytes,
                "gradients": report.grad_bytes,
                "stored_logits": plan.stored_logits_bytes,
            },
            "agreement": {
                "passed": agreement.passed,
                "tokens": agreement.tokens,
                "entries": agreement.entries,
                "checks": [asdict(check) | {"passed": check.passed} for check in agreement.checks],
            },
        }
    )


def _survivors(report: Report) -> str:
    if report.survivors is None:
        why = "" if report.filter_eps is None else f": so many may reach a probability of {report.filter_eps:.3g}"
        return f"all, and the gradients are exact{why}"
    share = f"{report.survivors:.1%} of the vocabulary in a block of {report.survivor_block} tokens"
    mass = f"together {report.agreement.dropped_mass:.1e} of a token's probability"
    if report.filter_name == "drop":
        return f"{share} may reach that probability; the others, {mass}, are left out of the gradients"
    return (
        f"{share} may survive and are computed again; what this draw drops, {mass}, it makes up for with other entries, and "
        "'filter alone' below is the error that this leaves"
    )


def _agreement(report: Report) -> Table:
    """One row a check, and the verdict."""
    agreement = report.agreement
    sample = f"{agreement.tokens} tokens and {agreement.entries} vocabulary entries"
    title = f"Agreement with float64 mathematics, on a sample of {sample}"
    table = Table(title=title, title_justify="left", box=box.ROUNDED, expand=True)
    table.add_column("what", ratio=1)
    for name in ("error", "allowed", "rounding alone", "filter alone"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for check in agreement.checks:
        numbers = check.error, check.allowed, check.rounding, check.filtered
        cells = ["" if number is None else f"{number:.1e}" for number in numbers]
        table.add_row(check.what, *cells, "PASS" if check.passed else "FAIL", style=None if check.passed else "red")
    return table


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def size(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**20:,.1f} MiB"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
