"""Prints a table of the README, out of a record in benchmarks/results.

python -m benchmarks readme forward
python -m benchmarks readme backward
python -m benchmarks readme learning
"""

from __future__ import annotations

import argparse

from benchmarks.measure import record
from benchmarks.tables.readme import TABLES
from cce_numba.commands import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("table", choices=TABLES, help="which table")


def run(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    markdown, name = TABLES[arguments.table]
    try:
        results = record.read(name)
    except OSError as error:
        raise UsageError(f"{record.path(name)}: {error.strerror}; it has not been measured") from error
    print(markdown(results))
