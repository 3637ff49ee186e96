"""How far a long computation on the host has come, for whoever wants to show it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Report = Callable[[str, int, int], None]

_report: ContextVar[Report | None] = ContextVar("progress", default=None)


@contextlib.contextmanager
def reported_to(report: Report) -> Iterator[None]:
    """Inside, `report(what, done, total)` is called after each block that the CPU backend finishes.

    >>> with reported_to(lambda what, done, total: print(what, f"{done}/{total}")):
    ...     advance("forward", 1, 2)
    forward 1/2
    """
    token = _report.set(report)
    try:
        yield
    finally:
        _report.reset(token)


def advance(what: str, done: int, total: int) -> None:
    """Tells whoever listens that `done` of `total` blocks of `what` are finished."""
    if (report := _report.get()) is not None:
        report(what, done, total)
