"""What `figure4` and `figure5` share: runs of several methods and seeds, in pieces, and their record. Imports PyTorch."""

from __future__ import annotations

import argparse
import gc
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import options
from benchmarks.data import text as texts
from benchmarks.data.text import Text
from benchmarks.peers.methods import BY_NAME, Method
from benchmarks.proof.book import Book
from benchmarks.proof.session import Session, Steps, chosen
from benchmarks.tables import curves
from benchmarks.training.trainee import Batches, Schooling, Trainee
from cce_numba.commands import UsageError

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
SEEDS, QUICK_SEEDS = (0, 1, 2, 3, 4), (0, 1)
METHODS = tuple(
    BY_NAME[name]
    for name in (
        *("cce_numba, exact", "cce_numba", "cce_numba, drop", "cut_cross_entropy"),
        *("cut_cross_entropy, kahan_full_c", "torch.compile"),
    )
)
_QUICK_TEXT = 2**14, 512  # tokens and symbols of a text that is drawn


@dataclass(frozen=True)
class Study:
    """One learning task: a name for its vocabulary, the text in it, and how a model begins for a seed."""

    vocabulary: int
    batches: Batches
    begin: Callable[[int], torch.nn.Module]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both commands."""
    parser.add_argument("--tokens", metavar="FILE.npy", help="the text: a 1-d array of uint16, its token ids in order")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="methods whose names hold one of these")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help=f"default {' '.join(map(str, SEEDS))}")
    parser.add_argument("--steps", type=options.positive, metavar="STEPS", help="other than the usual number of steps")
    parser.add_argument("--show", action="store_true", help="learn nothing, show and draw what is recorded")


def text_of(arguments: argparse.Namespace, schooling: Schooling) -> Text:
    """The text of the file, or for --quick one that is drawn. Raises UsageError if there is none or it cannot be read."""
    if arguments.tokens is None:
        if arguments.quick:
            return texts.drawn(*_QUICK_TEXT)
        raise UsageError("--tokens: names the text to learn; only --quick and --show do without")
    try:
        return texts.read(arguments.tokens, round((schooling.length + 1) / texts.VALIDATION_SHARE) + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tokens: {arguments.tokens}: {error}") from error


class Runs:
    """The runs of a command: which there are, which are done, and how they are taken."""

    def __init__(self, session: Session, book: Book, schooling: Schooling, arguments: argparse.Namespace) -> None:
        self.session, self.book, self.schooling = session, book, schooling
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.seeds = arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS)
        self.methods: list[Method] = []
        self.failed: list[Method] = []  # peers that have failed in this session
        for method in chosen(METHODS, arguments.methods, "--methods"):
            if reason := method.why_none(self.device):
                session.console.print(f"{method.name} is left out: {reason}", markup=False)
            else:
                self.methods.append(method)

    def take(self, studies: Iterable[Study]) -> None:
        """Takes what the record lacks, seed by seed, so that each seed has all methods before the next begins."""
        studies = list(studies)
        wanted = [(seed, study, method) for seed in self.seeds for study in studies for method in self.methods]
        with self.session.progress(len(wanted) * self.schooling.points) as steps:
            for seed, study, method in wanted:
                if self.session.is_over:
                    break
                key = self._key(study, method, seed)
                if self.book.find(key) is not None or method in self.failed:
                    steps.done(self.schooling.points)
                    continue
                try:
                    self._run(study, method, seed, steps)
                except Exception as error:  # of a peer, whatever it raises; the other methods may do
                    if method.is_ours:
                        raise
                    self.failed.append(method)
                    told = f"{_told(key)}: failed and is left out: {type(error).__name__}: {error}".splitlines()[0]
                    self.session.console.print(told, markup=False)
        left = sum(self.book.find(self._key(study, method, seed)) is None for seed, study, method in wanted)
        self.show(left)

    def show(self, left: int = 0) -> None:
        """Shows and draws what is recorded."""
        results = self.book.results()
        for table in curves.tables(results):
            self.session.console.print(table)
        pictures = curves.draw(results, self.session.image()) if results["cells"] else []
        self.session.told(self.book, pictures, left)

    def _run(self, study: Study, method: Method, seed: int, steps: Steps) -> None:
        key = self._key(study, method, seed)
        trainee = Trainee(study.begin(seed), self.schooling, method)
        saved = self._checkpoint(key)
        if trainee.restore(saved):
            self.session.console.print(f"{_told(key)}: goes on after step {trainee.step}", markup=False)
            steps.done(len(trainee.validation))
        steps.say(_told(key))
        if trainee.learn(study.batches, seed, lambda: self.session.is_over, steps.done):
            cell = self.book.put(key, trainee.found())
            saved.unlink(missing_ok=True)
            self.session.console.print(curves.one_line(cell), markup=False)
        else:
            trainee.save(saved)
            self.session.console.print(f"{_told(key)}: stops after step {trainee.step}, {saved}", markup=False, soft_wrap=True)
        del trainee
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _checkpoint(self, key: dict[str, Any]) -> Path:
        folder = self.session.out / "checkpoints" if self.session.out else CHECKPOINTS
        return folder / self.session.record_name / (re.sub(r"\W+", "_", _told(key)) + ".pt")

    @staticmethod
    def _key(study: Study, method: Method, seed: int) -> dict[str, Any]:
        return {"vocabulary": study.vocabulary, "method": method.name, "seed": seed}


def _told(key: dict[str, Any]) -> str:
    return f"V={key['vocabulary']}, seed {key['seed']}, {key['method']}"
