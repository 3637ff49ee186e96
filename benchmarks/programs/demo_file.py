"""Turns an archive of a model's last layer (data/archive.py) into a file for `python -m cce_numba demo --data`.

python -m benchmarks demo_file SOURCE.npz OUT.npz
"""

from __future__ import annotations

import argparse

import ml_dtypes
import numpy as np

from benchmarks.data.archive import Archive, read
from benchmarks.options import positive
from cce_numba.commands import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("source", metavar="SOURCE.npz")
    parser.add_argument("out", metavar="OUT.npz")
    parser.add_argument("--tokens", type=positive, default=2048, help="how many tokens to take (default 2048)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of e and c: float32, in which both are exact (default), or bfloat16, which rounds c",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the file and tells what is in it."""
    try:
        arrays = demo_arrays(read(arguments.source), arguments.tokens, arguments.dtype)
    except (OSError, ValueError) as error:
        raise UsageError(f"{arguments.source}: {error}") from error
    try:
        np.savez(arguments.out, allow_pickle=False, **arrays)
    except OSError as error:
        raise UsageError(f"{arguments.out}: {error}") from error
    shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
    print(f"{arguments.out}: {shapes}")


def demo_arrays(archive: Archive, tokens: int, dtype: str) -> dict[str, np.ndarray]:
    """e, c, targets and loss of the first tokens. Raises ValueError if the archive has fewer."""
    if tokens > len(archive.targets):
        raise ValueError(f"--tokens must lie in [1, {len(archive.targets)}], got {tokens}")
    e, c = archive.e[:tokens], archive.c
    if dtype == "bfloat16":  # as bit patterns, which any NumPy can read
        e, c = (array.astype(ml_dtypes.bfloat16).view(np.uint16) for array in (e, c))
    return {"e": e, "c": c, "targets": archive.targets[:tokens], "loss": archive.loss[:tokens]}
