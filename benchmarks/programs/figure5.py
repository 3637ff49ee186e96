"""A model learns text from scratch with each way to the gradients: the paper's Figure 5, from random weights.

    python -m benchmarks figure5 --tokens FILE.npy                        two vocabularies, six methods, five seeds
    python -m benchmarks figure5 --tokens FILE.npy --limit-seconds 480    a part of it; the same command again goes on
    python -m benchmarks figure5 --tokens FILE.npy --seeds 0 1 2          three seeds
    python -m benchmarks figure5 --quick                                  a small model and drawn text, on the CPU too
    python -m benchmarks figure5 --show                                   tables and pictures of what is recorded

FILE.npy is what numpy.save writes of a 1-d array of uint16: the token ids of one long text. Nothing else is needed. The last 5
% are for validation. A vocabulary much larger than the ids need gets them spread over it by a fixed random map.

The methods are ours (default, filter that drops, exact), the paper's kernels (default, and Kahan-FullC, which keeps the
gradient of the classifier exact), and torch.compile on stored logits. A seed says how the model starts and which batches come,
the same for every method. Validation losses are exact, by our forward. A run that --limit-seconds stops is saved in
benchmarks/checkpoints, which git ignores; each run that has ended is written to the record at once.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks import options
from benchmarks.proof import studies
from benchmarks.proof.session import Session, add_options
from benchmarks.proof.studies import Runs, Study
from benchmarks.training.trainee import Batches, Schooling
from benchmarks.training.transformer import Size, Transformer
from cce_numba.commands import UsageError

SCHOOLING = Schooling(steps=1500, sequences=16, length=256, learning_rate=1e-3)
QUICK = Schooling(steps=20, sequences=2, length=32, learning_rate=1e-3, points=5, validation_batches=2)
MODEL, QUICK_MODEL = {"hidden": 256, "layers": 4, "heads": 4}, {"hidden": 64, "layers": 1, "heads": 1}
VOCABULARIES, QUICK_VOCABULARIES = (49_152, 262_144), (600, 1100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    add_options(parser, "a small model and few steps")
    studies.add_arguments(parser)
    told = " ".join(map(str, VOCABULARIES))
    parser.add_argument("--vocabularies", nargs="+", type=options.positive, metavar="V", help=f"default {told}")


def run(arguments: argparse.Namespace) -> None:
    """Takes the runs that the record lacks, shows and draws all."""
    session = Session.of("figure5", arguments)
    schooling = QUICK if arguments.quick else SCHOOLING
    schooling = dataclasses.replace(schooling, steps=arguments.steps or schooling.steps)
    model = QUICK_MODEL if arguments.quick else MODEL
    if arguments.show:
        Runs(session, session.book({}, same=False), schooling, arguments).show()
        return
    text = studies.text_of(arguments, schooling)
    how: dict[str, Any] = asdict(schooling) | model | {"text": text.name}
    runs = Runs(session, session.book(how, same=False), schooling, arguments)
    vocabularies = arguments.vocabularies or (QUICK_VOCABULARIES if arguments.quick else VOCABULARIES)
    if small := [each for each in vocabularies if each < text.entries]:
        raise UsageError(f"--vocabularies: must be at least {text.entries} for {text.name}, got {small[0]}")

    def begin(vocabulary: int, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        with torch.device(runs.device):
            return Transformer(Size(schooling.sequences, schooling.length, vocabulary, **model), tied=False, positions=True)

    runs.take(Study(V, Batches(text.spread(V), schooling, runs.device), partial(begin, V)) for V in vocabularies)
