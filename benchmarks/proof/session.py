"""Options that these commands have, how long they may go on, and how far they have come. Imports no PyTorch."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import options
from benchmarks.measure import record
from benchmarks.proof.book import Book
from cce_numba.commands import UsageError

IMAGES = Path(__file__).parents[2] / "docs" / "images"
_KINDS = "H100", "H200", "GH200", "A100", "B200", "B300"

Named = TypeVar("Named")


def add_options(parser: argparse.ArgumentParser, quick: str) -> None:
    """The options of every command; `quick` says what --quick makes smaller."""
    parser.add_argument("--quick", action="store_true", help=f"{quick}; runs on the CPU too, its figures mean nothing")
    parser.add_argument("--record", type=options.record_name, metavar="NAME", help="name of the record (default: by the GPU)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of record and pictures (default benchmarks/results, docs/images)"
    )
    parser.add_argument(
        "--limit-seconds",
        type=options.positive,
        metavar="S",
        help="begin nothing new after so many seconds; run again to go on",
    )


@dataclass
class Session:
    """One run of a command.

    Attributes:
        command: its name.
        quick: whether --quick was given.
        console: where it shows what it does.
        out: the folder of record and pictures, None for the usual ones.
        limit_s: after so many seconds nothing new is begun; None is no limit.
        name: the record's name, None for the usual one.
    """

    command: str
    quick: bool
    console: Console
    out: Path | None = None
    limit_s: float | None = None
    name: str | None = None
    start: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, command: str, arguments: argparse.Namespace) -> Session:
        """Of the options that `add_options` has added."""
        console = Console(width=None if Console().is_terminal else 180)
        return cls(command, arguments.quick, console, arguments.out, arguments.limit_seconds, arguments.record)

    @property
    def is_over(self) -> bool:
        """Whether nothing new is to be begun."""
        return self.limit_s is not None and time.perf_counter() - self.start >= self.limit_s

    @property
    def record_name(self) -> str:
        """As --record says, or by the command, --quick and the GPU: table1_h100, table1_quick_cpu."""
        return self.name or "_".join([self.command, *(["quick"] if self.quick else []), machine()])

    def path(self) -> Path:
        """The record's file."""
        return self.out / f"{self.record_name}.json" if self.out else record.path(self.record_name)

    def image(self, name: str = "") -> Path:
        """A picture's path without suffix. Those of --quick and of a named record lie beside it, others in docs/images."""
        if self.out or self.quick or self.name:
            return self.path().with_name(f"{self.record_name}{'_' if name else ''}{name}")
        return IMAGES / (f"{self.command}_{name}" if name else self.command)

    def book(self, how: dict[str, Any], *, same: bool = True) -> Book:
        """The record, with what it already holds; `same` as `Book` has it."""
        return Book(self.path(), how, same=same)

    @contextmanager
    def progress(self, total: int) -> Iterator[Steps]:
        """Shows how many cells of `total` are done, if the console is a terminal."""
        columns = SpinnerColumn(), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bars:
            yield Steps(bars, bars.add_task("", total=total))

    def told(self, book: Book, pictures: Sequence[Path], left: int) -> None:
        """Says where the results are, and whether anything is left to do."""
        self.console.print(f"{time.perf_counter() - self.start:.0f} s; {book.path}", highlight=False, soft_wrap=True)
        for path in pictures:
            self.console.print(str(path), highlight=False, soft_wrap=True)
        if left:
            self.console.print(f"[yellow]{left} cells are left: the same command goes on with them.[/]")


@dataclass
class Steps:
    """A bar of progress."""

    bars: Progress
    task: Any

    def say(self, what: str) -> None:
        """What is being done."""
        self.bars.update(self.task, description=what)

    def done(self, cells: int = 1) -> None:
        """So many cells more are done."""
        self.bars.advance(self.task, cells)


def machine() -> str:
    """A short name of the GPU, or "cpu"."""
    name = record.gpu().splitlines()
    if not name:
        return "cpu"
    model = name[0].split(",")[0]
    short = next((kind for kind in _KINDS if kind in model.split()), model.removeprefix("NVIDIA "))
    return re.sub(r"\W+", "_", short.lower())


def chosen(every: Sequence[Named], wanted: Sequence[str] | None, option: str) -> list[Named]:
    """Those things whose name holds one of the wanted words, in their order; all, where nothing is wanted.

    Raises UsageError for a word that no name holds.
    """
    if not wanted:
        return list(every)
    names = [str(getattr(each, "name", each)) for each in every]
    for word in wanted:
        if not any(word.lower() in name.lower() for name in names):
            raise UsageError(f"{option}: there is no {word!r} among {'; '.join(names)}")
    return [each for each, name in zip(every, names, strict=True) if any(word.lower() in name.lower() for word in wanted)]
