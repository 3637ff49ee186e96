"""Options that several programs have, and what they mean."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from benchmarks.data.archive import Archive, read
from cce_numba.commands import UsageError


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        rounds: rounds, in each of which every call takes its turn.
        burst: how often a round queues each call.
        warm_up_s: seconds of calls before the first round.
    """

    rounds: int = 20
    burst: int = 2
    warm_up_s: float = 1.0


def add_pace(parser: argparse.ArgumentParser, *, rounds: int | None = 20, bursts: bool = True) -> None:
    """`--rounds` (None: the program says in its own help how many), and `--burst` if a round may queue a call repeatedly."""
    told = "" if rounds is None else f" (default {rounds})"
    parser.add_argument("--rounds", type=positive, default=rounds, help=f"rounds, in which the calls take turns{told}")
    if bursts:
        parser.add_argument("--burst", type=positive, default=2, help="how often a round queues each call (default 2)")


def add_data(parser: argparse.ArgumentParser) -> None:
    """`--data`."""
    parser.add_argument("--data", metavar="FILE.npz", help="real data: an archive of a model's last layer (data/archive.py)")


def add_record(parser: argparse.ArgumentParser) -> None:
    """`--record`."""
    parser.add_argument("--record", type=record_name, metavar="NAME", help="write benchmarks/results/NAME.json")


def archive_of(arguments: argparse.Namespace) -> Archive | None:
    """The archive that `--data` names. Raises UsageError if it cannot be read."""
    if arguments.data is None:
        return None
    try:
        return read(arguments.data)
    except (OSError, ValueError) as error:
        raise UsageError(f"--data: {arguments.data}: {error}") from error


def positive(text: str) -> int:
    """A whole number from 1 on, of at most 9 digits, so that products of sizes stay within 64 bits."""
    if not (text.isdecimal() and len(text) <= 9 and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1 and at most 9 digits, got {text!r}")
    return int(text)


def record_name(text: str) -> str:
    """The name of a file of results, without its suffix."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"must be a plain name without folders, got {text!r}")
    return text
