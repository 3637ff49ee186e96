"""Prints the table of docs/which_kernels.md: what other GPUs are predicted to take, by an H100's records and datasheets' rates.

python -m benchmarks predictions
"""

from __future__ import annotations

import argparse

from benchmarks.measure import record
from benchmarks.tables import predictions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(arguments: argparse.Namespace) -> None:
    """Prints the table."""
    print(table())


def table() -> str:
    """The table by what has been recorded so far."""
    ampere = record.read("ampere_h100") if record.path("ampere_h100").exists() else None
    return predictions.markdown(record.read("forward_h100"), ampere)
