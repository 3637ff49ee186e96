"""Draws a picture out of recorded results: the README's, or one of the site's.

    python -m benchmarks picture                                      peers: the README's picture, out of peers_h100.json
    python -m benchmarks picture learning                             the curves of learning_h100.json
    python -m benchmarks picture backward                             one of the site's pictures: each out of its record
    python -m benchmarks picture learning --results NAME --out PATH   those of benchmarks/results/NAME.json

It writes an SVG and a PNG. Both have no background of their own, and colours that are visible on white and on black.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from benchmarks import options
from benchmarks.errors import CannotRun
from benchmarks.measure import record
from benchmarks.tables import learning_curves, peers, site_pictures
from cce_numba.commands import UsageError

PEERS, LEARNING = "peers", "learning"
DRAWN: dict[str, tuple[str, site_pictures.Draw]] = {  # the record, and who draws it
    PEERS: ("peers_h100", peers.draw),
    LEARNING: ("learning_h100", learning_curves.draw),
}
DRAWN |= {name: (recorded, site_pictures.drawing(made)) for name, (recorded, made) in site_pictures.PICTURES.items()}
FOLDER = Path(__file__).parents[2] / "docs" / "images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("name", nargs="?", choices=DRAWN, default=PEERS, help=f"which picture (default {PEERS})")
    parser.add_argument("--results", type=options.record_name, metavar="NAME", help="of benchmarks/results/NAME.json")
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="where to write it, without a suffix (default docs/images/ and its name)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Draws, and tells where."""
    if importlib.util.find_spec("matplotlib") is None:
        raise CannotRun("needs matplotlib: pip install 'cce_numba[bench]'")
    recorded, draw = DRAWN[arguments.name]
    try:
        results = record.read(arguments.results or recorded)
    except OSError as error:
        raise UsageError(f"--results: {error}") from error
    for path in draw(results, arguments.out or FOLDER / arguments.name):
        print(f"{path}, {path.stat().st_size / 1024:.0f} KiB")
