"""A small transformer learns text from scratch, with gradients filtered in several ways: which learn as exact ones do?

    python -m benchmarks learning --tokens FILE.npy --record learning_h100
    python -m benchmarks learning --tokens FILE.npy --record learning_h100 --add     takes what the record still lacks
    python -m benchmarks learning --tokens FILE.npy --ways exact drop:2^-12 unbiased:16/V --seeds 0 --vocabularies 49152
    python -m benchmarks learning --small                                            a small model: does it run?
    python -m benchmarks picture learning                                            draws the recorded curves

FILE.npy is what numpy.save writes of a 1-d array of uint16: the token ids of one long text, of any tokenizer with at most 65536
entries. Without it a text is drawn from a chain. The last 5 % are for validation and never learned. Ids stay as they are in a
vocabulary less than twice as large as they need; a fixed random map spreads them over a larger one, most of whose entries then
never occur.

Ways: exact; drop and unbiased, at the threshold that "auto" stands for, or at one that is named, as drop:2^-12 and
unbiased:16/V (16 / V of the vocabulary V); and paper, the package cut_cross_entropy with its defaults. Of two ways with the
same filter and threshold the first is taken. A seed says how the model starts and which batches come, the same for every way.
Validation losses are exact.

A way learns as exact ones do if its last validation loss, on average over the seeds, is above that of exact gradients by no
more than the spread of exact gradients, their highest less their lowest loss over the seeds.

"Columns kept" is the share of the vocabulary that the filter's rule keeps of a block of 128 tokens, by exact probabilities
(unbiased: on average over draws); "flagged" is what the forward notes for the backward to compute again. On the CPU all is
float32, in which "auto" is 2^-32 and drops nearly nothing.

Each run is written as soon as it has ended, so a long measurement may be stopped and go on with --add. A run of 1000 steps of
4096 tokens on an H100 should take about 4 s at V=49152 and 5 to 9 s at V=262144 (an estimate: there AdamW moves 4 GB a step).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from typing import Any

import torch
from rich.console import Console

from benchmarks import options
from benchmarks.data import text as texts
from benchmarks.measure import record
from benchmarks.peers import paper
from benchmarks.tables import learning as tables
from benchmarks.training import learner
from benchmarks.training.learner import Corpus, Course
from benchmarks.training.ways import DEFAULT, PAPER, Way, ways
from cce_numba.commands import UsageError

COURSE = Course(steps=1000, sequences=16, length=256, hidden=256, layers=4)
SMALL_COURSE = Course(steps=20, sequences=2, length=64, hidden=64, layers=1)
VOCABULARIES, SMALL_VOCABULARIES = (49_152, 262_144), (1024, 4096)
_SEEDS, _SMALL_SEEDS = (0, 1, 2), (0,)
_DRAWN, _SMALL_DRAWN = (2**21, 16_384), (2**14, 512)  # tokens and symbols of a text that is drawn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--tokens", metavar="FILE.npy", help="the text: a 1-d array of uint16, its token ids in order")
    parser.add_argument("--small", action="store_true", help="a small model, drawn text, few steps")
    parser.add_argument("--ways", nargs="+", default=DEFAULT, metavar="WAY", help=f"default: {' '.join(DEFAULT)}; or paper")
    parser.add_argument("--vocabularies", nargs="+", type=options.positive, metavar="V", help=_default(VOCABULARIES))
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help=_default(_SEEDS))
    for field in dataclasses.fields(Course):
        parser.add_argument(f"--{field.name}", type=options.positive, help=f"default {getattr(COURSE, field.name)}")
    options.add_record(parser)
    parser.add_argument("--add", action="store_true", help="keep the record's runs, and take only those that it lacks")


def run(arguments: argparse.Namespace) -> None:
    """Takes the runs, records each as it ends, shows all. Raises UsageError for arguments that do not fit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    course, text = course_of(arguments), text_of(arguments)
    how = how_of(course, text, device)
    results: dict[str, Any] = {"how": how, "runs": recorded(arguments.record, how) if arguments.add else []}
    plans, seeds = planned(arguments, text, device), arguments.seeds or (_SMALL_SEEDS if arguments.small else _SEEDS)
    console = Console(width=180)
    start = time.perf_counter()
    if PAPER in arguments.ways and (reason := paper.why_none(device)):
        console.print(f"{PAPER} is left out: {reason}", markup=False)
        plans = {vocabulary: [way for way in chosen if way.name != PAPER] for vocabulary, chosen in plans.items()}
    made_with = {"gpu": record.gpu(), "commit": record.commit()}
    for vocabulary, chosen in plans.items():
        corpus = Corpus(text.spread(vocabulary), course, device)
        for seed, way in itertools.product(seeds, chosen):
            key = {"vocabulary": vocabulary, "way": way.name, "seed": seed}
            if any(key.items() <= done.items() for done in results["runs"]):
                continue
            with console.status(f"{way.name}, V={vocabulary}, seed {seed}"):
                found = learner.run(course, corpus, way, vocabulary, seed)
            results["runs"].append(key | {"eps": way.eps} | found | made_with)
            console.print(tables.one_line(results["runs"][-1]))
            if arguments.record:
                record.write(arguments.record, results)
    for vocabulary in tables.vocabularies(results):
        console.print(tables.learning_table(results, vocabulary))
    console.print(f"{time.perf_counter() - start:.0f} s")
    if arguments.record:
        console.print(str(record.path(arguments.record)))


def how_of(course: Course, text: texts.Text, device: str) -> dict[str, Any]:
    """What the runs of a record have in common."""
    return dataclasses.asdict(course) | {
        "learning_rate": learner.LEARNING_RATE,
        "betas": list(learner.BETAS),
        "text": text.name,
        "tokens": len(text.ids),
        "dtype": str(learner.dtype_on(device)).removeprefix("torch."),
    }


def course_of(arguments: argparse.Namespace) -> Course:
    """The course, with what the arguments change of it."""
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Course)}
    changed = {name: value for name, value in given.items() if value is not None}
    course = dataclasses.replace(SMALL_COURSE if arguments.small else COURSE, **changed)
    if course.hidden % learner.HEAD:
        raise UsageError(f"--hidden: must be a multiple of {learner.HEAD}, got {course.hidden}")
    return course


def text_of(arguments: argparse.Namespace) -> texts.Text:
    """The text of the file, or one that is drawn."""
    if arguments.tokens is None:
        return texts.drawn(*(_SMALL_DRAWN if arguments.small else _DRAWN))
    if arguments.small:
        raise UsageError("--tokens: --small draws a text of its own, leave one of them out")
    at_least = round((course_of(arguments).length + 1) / texts.VALIDATION_SHARE) + 1  # one sequence for validation
    try:
        return texts.read(arguments.tokens, at_least)
    except (OSError, ValueError) as error:
        raise UsageError(f"--tokens: {arguments.tokens}: {error}") from error


def planned(arguments: argparse.Namespace, text: texts.Text, device: str) -> dict[int, list[Way]]:
    """The ways of each vocabulary."""
    vocabularies = arguments.vocabularies or (SMALL_VOCABULARIES if arguments.small else VOCABULARIES)
    if small := [each for each in vocabularies if each < text.entries]:
        raise UsageError(f"--vocabularies: must be at least {text.entries} for {text.name}, got {small[0]}")
    try:
        return {each: ways(list(arguments.ways), each, learner.dtype_on(device)) for each in vocabularies}
    except ValueError as error:
        raise UsageError(f"--ways: {error}") from error


def recorded(name: str | None, how: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of the record, none if there is no record yet. Raises UsageError if they were taken otherwise."""
    if name is None:
        raise UsageError("--add: needs --record NAME, the record to add to")
    if not record.path(name).exists():
        return []
    results = record.read(name)
    other = results.get("how", {})
    for key in how:
        if other.get(key) != how[key]:
            raise UsageError(f"--add: {record.path(name)} was taken with {key} {other.get(key)}, not {how[key]}")
    return results["runs"]


def _default(values: tuple[int, ...]) -> str:
    return f"default {' '.join(map(str, values))}"
