"""Prints a table of the README or of another page, out of a record in benchmarks/results.

python -m benchmarks readme forward
python -m benchmarks readme backward
python -m benchmarks readme learning
python -m benchmarks readme table1             the paper's Table 1; table1_models, table1_vocabulary ... are its other sections
python -m benchmarks readme figure3            and figure4, figure5, memory
python -m benchmarks readme table1 --results NAME    of benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse

from benchmarks import options
from benchmarks.measure import record
from benchmarks.tables.readme import TABLES
from cce_numba.commands import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("table", choices=TABLES, help="which table")
    parser.add_argument("--results", type=options.record_name, metavar="NAME", help="another record than the usual one")


def run(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    markdown, usual = TABLES[arguments.table]
    name = arguments.results or usual
    try:
        results = record.read(name)
    except OSError as error:
        raise UsageError(f"{record.path(name)}: {error.strerror}; it has not been measured") from error
    print(markdown(results))
