"""How closely the made-up inputs of `data/calibrated.py` match the sparsity of a real model.

python -m benchmarks calibrated                              with NumPy a sample of 16 blocks, with a GPU all blocks
python -m benchmarks calibrated --shape 8192 256000 2304     at another hidden size, where only rounding differs
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from rich.console import Console

from benchmarks.data import calibrated, sparsity
from benchmarks.measure import device
from benchmarks.options import positive
from benchmarks.tables.sparsity import fit_table
from cce_numba.commands import UsageError

_SAMPLE = 16  # blocks, where there is no GPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--shape", nargs=3, type=positive, metavar=("N", "V", "D"), default=(8192, 256_000, 256))
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--blocks", type=positive, help=f"measure so many blocks, evenly spread (default: all, {_SAMPLE} without a GPU)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Makes inputs, measures them, prints the comparison."""
    N, V, D = arguments.shape
    if calibrated.RANK >= D:
        raise UsageError(f"--shape: D must be more than {calibrated.RANK}, got {D}")
    no_gpu = device.why_none() is not None
    xp = np if no_gpu else device.cupy()
    n_blocks = -(-N // sparsity.BLOCK)
    wanted = min(arguments.blocks or (_SAMPLE if no_gpu else n_blocks), n_blocks)
    start = time.perf_counter()
    inputs = calibrated.make(N, V, D, xp, arguments.seed)
    float(inputs.e[-1, -1]), float(inputs.c[-1, -1])  # waits for a GPU
    made = time.perf_counter()
    measured = sparsity.measure(inputs, xp, [i * n_blocks // wanted for i in range(wanted)])
    done = time.perf_counter()
    console = Console(width=100)
    blocks = f"{wanted} of {n_blocks} blocks of {sparsity.BLOCK} tokens"
    console.print(fit_table(measured, f"N={N}, V={V}, D={D}, seed {arguments.seed}: {blocks}"))
    if wanted < n_blocks:
        console.print("The union is over the measured blocks alone; the model's is over 64.")
    console.print(f"Made in {made - start:.1f} s, measured in {done - made:.1f} s, with {xp.__name__}.")
