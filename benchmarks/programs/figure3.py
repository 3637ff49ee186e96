"""How probability falls with the rank in a real model, and how much of a vocabulary survives a filter: the paper's Figure 3.

    python -m benchmarks figure3 --data FILE.npz            of an archive of a real last layer (data/archive.py)
    python -m benchmarks figure3 --quick --data FILE.npz    of 256 tokens
    python -m benchmarks figure3 --quick                    of made-up inputs: does it run?
    python -m benchmarks figure3 --show                     draws what is recorded

The picture has two panels. On the left, each token's probabilities are sorted, and their mean over the tokens is drawn by rank
on logarithmic axes, with the 10th and the 90th percentile. Lines show where 2^-12 and 2^-16 fall. On the right are shares of
the vocabulary that survive a threshold in a block of 128 tokens: single columns, and tiles of 128 columns that hold a
survivor. A filter by tiles, as the paper has it, computes the tiles; ours computes the columns.

All of it is float32 mathematics, in CuPy where there is a GPU and in NumPy elsewhere, so no GPU is needed. The losses that
follow are compared with those that the archive knows.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks import options
from benchmarks.data import calibrated, ranks
from benchmarks.data.archive import Archive
from benchmarks.errors import Wrong
from benchmarks.measure import device
from benchmarks.proof.session import Session, add_options
from benchmarks.tables import figure3 as tables
from cce_numba.commands import UsageError

QUICK_TOKENS = 256
_MADE_UP = (256, 4096, 256)
# How far losses may be from the known ones, in nats: the archive's embeddings are rounded to bfloat16, which moves a logit of
# 30 by up to 0.06, and the mean by next to nothing.
_TOKEN_APART, _MEAN_APART = 0.2, 2e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    add_options(parser, f"{QUICK_TOKENS} tokens")
    options.add_data(parser)
    parser.add_argument("--show", action="store_true", help="measure nothing, draw what is recorded")


def run(arguments: argparse.Namespace) -> None:
    """Measures, shows, draws. Raises Wrong if the losses are not those that are known."""
    session = Session.of("figure3", arguments)
    archive = options.archive_of(arguments)
    if archive is None:
        if not (arguments.quick or arguments.show):
            raise UsageError("--data: names an archive of a real last layer; without it only --quick and --show work")
        archive = made_up()
    book = session.book({} if arguments.show else {"data": archive.name})
    key = {"name": "ranks"}
    if not arguments.show:
        tokens = min(len(archive.e), QUICK_TOKENS) if arguments.quick else len(archive.e)
        xp = np if device.why_none() else device.cupy()
        with session.progress(-(-tokens // ranks.BLOCK)) as steps:
            steps.say("blocks of 128 tokens")
            found = ranks.measure(archive, xp, tokens, steps.done)
        token, mean = found["apart_from_known_loss"], found["mean_apart_from_known_loss"]
        if not (token <= _TOKEN_APART and mean <= _MEAN_APART):  # so written, NaN is wrong as well
            raise Wrong(f"losses are {mean:.3g} nats from the known ones on average, and up to {token:.3g}")
        book.put(key, found)
    elif book.find(key) is None and not book.cells:
        raise UsageError(f"--show: {book.path} holds nothing; it has not been measured")
    results = book.results() if book.find(key) else {"how": book.how, "cells": book.cells}
    session.console.print(tables.table(results))
    session.told(book, tables.draw(results, session.image()), 0)


def made_up() -> Archive:
    """An archive of calibrated inputs, whose losses are computed in float64."""
    e, c, targets = (np.asarray(x) for x in calibrated.make(*_MADE_UP, np))
    e, c = e.astype(np.float32), c.astype(np.float32)
    z = e.astype(np.float64) @ c.astype(np.float64).T
    top = z.max(axis=1)
    loss = top + np.log(np.exp(z - top[:, None]).sum(axis=1)) - z[np.arange(len(z)), targets]
    return Archive("made up", e, c, targets, loss.astype(np.float32))
