"""The paper's Table 1 on this machine: time, memory and errors of the loss and its gradients, by every method that installs.

    python -m benchmarks table1                                     all sections, the most important first
    python -m benchmarks table1 --limit-seconds 480                 a part of it; the same command again goes on
    python -m benchmarks table1 --only table1 models                some sections or problems, by a part of their names
    python -m benchmarks table1 --methods cce_numba Liger           some methods
    python -m benchmarks table1 --data FILE.npz                     a real last layer, where a problem can be made of it
    python -m benchmarks table1 --quick                             small problems, on the CPU too
    python -m benchmarks table1 --show                              tables and pictures of what is recorded

The first section has 8192 tokens, 256000 vocabulary entries and a hidden size of 2304, in bfloat16. The others are the heads
of models, and the same problem with another vocabulary, number of tokens, hidden size, or share of ignored tokens. On the CPU
the same bfloat16 numbers are in float32, and memory is how far the process grew: a coarse figure.

A method is validated before it is timed: its loss and gradients against float32 mathematics on the same inputs. One that is
missing, fails or is wrong says so in its row. Then the methods take turns with the product `e @ c.T`. X is a method's time
over the product's in the same round. "loss" is the forward without a gradient recorded, "gradient" is the backward alone, and
"both" is a forward that is recorded and its backward. Some methods compute gradients in the forward; their "gradient" is left
out. Memory is the peak beyond the inputs, as PyTorch hands it out, with the gradients included.

Each validated row and each round of times is written at once. Rows of another commit or GPU are measured anew.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks import options
from benchmarks.data.archive import Archive
from benchmarks.peers.methods import METHODS, Method
from benchmarks.proof import operands as making
from benchmarks.proof import problems as all_problems
from benchmarks.proof.book import Book
from benchmarks.proof.problems import Problem
from benchmarks.proof.rows import OK, Ready, prepared
from benchmarks.proof.session import Session, Steps, add_options, chosen
from benchmarks.proof.turns import Clock, one_round, product
from benchmarks.tables import table1 as tables
from benchmarks.tables.table1 import draw

ROUNDS, QUICK_ROUNDS = 12, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    add_options(parser, "small problems and few rounds")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sections or problems whose names hold one of these")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="methods whose names hold one of these")
    parser.add_argument("--retry", action="store_true", help="try again what has failed or was wrong")
    parser.add_argument("--show", action="store_true", help="measure nothing, show and draw what is recorded")
    options.add_data(parser)
    options.add_pace(parser, rounds=None, bursts=False)


def run(arguments: argparse.Namespace) -> None:
    """Measures what the record lacks, shows and draws all that it has."""
    session = Session.of("table1", arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problems = selected(all_problems.QUICK if arguments.quick else all_problems.PROBLEMS, arguments.only)
    methods = chosen(METHODS, arguments.methods, "--methods")
    archive = options.archive_of(arguments)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    book = session.book(
        {"dtype": "bfloat16" if device == "cuda" else "float32", "data": archive.name if archive else "calibrated"}
    )
    table = Table1(session, book, methods, archive, rounds, device, retry=arguments.retry)
    if not arguments.show:
        with session.progress(len(problems) * len(methods)) as steps:
            for problem in problems:
                if session.is_over:
                    break
                table.measure(problem, steps)
        table.retry = False  # what has failed again is done
    results = book.results()
    for shown in tables.tables(results):
        session.console.print(shown)
    session.told(book, draw(results, session.image), sum(len(table.left(problem)) for problem in problems))


def selected(problems: tuple[Problem, ...], only: list[str] | None) -> list[Problem]:
    """The problems of the sections, or with the names, that hold one of the words. Raises UsageError if none does."""
    sections = [name for name in dict.fromkeys(each.section for each in problems) if only and name in only]
    words = [word for word in only or [] if word not in sections]
    named = chosen(problems, words, "--only") if words else []
    return [each for each in problems if not only or each.section in sections or each in named]


class Table1:
    """What is to be measured, and where it is written."""

    def __init__(
        self,
        session: Session,
        book: Book,
        methods: list[Method],
        archive: Archive | None,
        rounds: int,
        device: str,
        *,
        retry: bool = False,
    ) -> None:
        self.session, self.book, self.methods, self.archive = session, book, methods, archive
        self.rounds, self.device, self.retry = rounds, device, retry

    def left(self, problem: Problem) -> list[Method]:
        """The methods that the record lacks, in whole or in part."""
        return [method for method in self.methods if not self._is_done(problem, method)]

    def measure(self, problem: Problem, steps: Steps) -> None:
        """Validates what is left of the problem's methods, then times them in turns, until the time is over."""
        left = self.left(problem)
        steps.done(len(self.methods) - len(left))
        if not left:
            return
        steps.say(f"{problem.name}: inputs and exact gradients")
        operands = making.make(problem, self.archive, self.device)
        described = {"data": operands.data, "exact_loss": round(operands.exact.loss, 6), "rounding": operands.exact.rounding}
        ready: list[Ready] = []
        for method in left:
            if self.session.is_over:
                return
            steps.say(f"{problem.name}: {method.name}")
            found, right = prepared(method, operands)
            key = self._key(problem, method)
            before = self.book.find(key) or {}
            found |= {"rounds": before.get("rounds", []), "in_forward": method.in_forward}
            cell = self.book.put(key, described | found)
            self.session.console.print(tables.one_line(cell))
            if right is None:
                steps.done()
            else:
                ready.append(right)
        self._time(problem, ready, operands, steps)

    def _time(self, problem: Problem, ready: list[Ready], operands: making.Operands, steps: Steps) -> None:
        """Rounds in which those take their turns that still lack some."""
        multiply, clock = product(operands), Clock(self.device)
        while ready and not self.session.is_over:
            steps.say(f"{problem.name}: {len(ready)} methods in turns")
            times = one_round(ready, operands, multiply, clock)
            for each, taken in zip(ready, times, strict=True):
                cell = self.book.find(self._key(problem, each.method))
                assert cell is not None
                cell["rounds"].append({name: round(ms, 4) for name, ms in taken.items()})
            self.book.write()
            still = [each for each in ready if not self._is_done(problem, each.method)]
            steps.done(len(ready) - len(still))
            ready = still
        making.free(self.device)

    def _is_done(self, problem: Problem, method: Method) -> bool:
        cell = self.book.find(self._key(problem, method))
        if cell is None:
            return False
        if cell["status"] == OK:
            return len(cell["rounds"]) >= self.rounds
        return not self.retry if cell["status"] != "missing" else method.why_none(self.device) is not None

    @staticmethod
    def _key(problem: Problem, method: Method) -> dict[str, Any]:
        return problem.key | {"method": method.name}
