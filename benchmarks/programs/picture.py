"""Draws the README's picture, out of benchmarks/results/peers_h100.json: time and memory of ours against other ways.

    python -m benchmarks picture

It writes an SVG and a PNG. Both have no background of their own, and colours that are visible on white and on black.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from benchmarks.errors import CannotRun
from benchmarks.measure import record
from benchmarks.tables import peers

OUT = Path(__file__).parents[2] / "docs" / "images" / "peers"
RESULTS = "peers_h100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument(
        "--out", type=Path, default=OUT, metavar="PATH", help="where to write it, without a suffix (default docs/images/peers)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Draws, and tells where."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CannotRun("needs matplotlib: pip install 'cce_numba[bench]'")
    for path in peers.draw(record.read(RESULTS), arguments.out):
        print(f"{path}, {path.stat().st_size / 1024:.0f} KiB")
