"""The stepper's walks through the package's own portable kernels: all that the lessons know of them stands here.

What is known: the names of kernels, of their parameters, and of the variables and shared arrays that the pictures show.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any
from unittest import mock

import numpy as np

from . import worker
from .record import Record
from .stepper import Layout, Rows, Shown, Walk, drawn

TINY = {"block_n": 4, "block_v": 8, "block_k": 4, "thread_n": 2, "thread_v": 4}  # 2 x 2 threads: a picture's tiles
WARP = {"block_n": 16, "block_v": 16, "block_k": 8, "thread_n": 2, "thread_v": 4}  # 4 x 8 threads: a whole warp
ON_GPU = {"block_n": 128, "block_v": 128, "block_k": 8, "thread_n": 8, "thread_v": 8}  # as on a GPU: 16 x 16 threads


def forward(
    e: np.ndarray, c: np.ndarray, targets: np.ndarray, *, tiles: Mapping[str, int] = TINY, n_block: int = 0, split: int = 0,
    splits: int = 1, **options: Any,
) -> Walk:  # fmt: skip
    """The forward's kernel: block `n_block` of tokens, and the `split`-th part of the vocabulary's tiles out of `splits`.

    e (N, D), c (V, D), targets (N,); options as of `cce_numba.forward`.
    """
    record = _record("forward", "lse_kernel", (e, c, targets), tiles, splits, (n_block, split), options)
    n0 = n_block * tiles["block_n"]
    layout = Layout(
        left=Shown("e", "e"),
        top=Shown("c", "c", turned=True),
        result=("logits: never stored", "z"),
        shape=(len(e), len(c)),
        sums=functools.partial(_sums, tiles, n0, "v0"),
        shared=[Shown("e_smem", "e", words=1), Shown("c_smem", "c", words=1)],
        rows=Rows({"row_max": "max", "row_sum": "sum", "row_bound": "bound"}, first=lambda held: n0),
        bits=("survivors", n_block),
        tile=lambda held: (n0, held.get("v0", held.get("first", 0)), tiles["block_n"], tiles["block_v"]),
        begins="Each token begins with max −∞ and sum 0; its bound is the target's logit",
        say={
            "c_rows": "Which rows of c belong to the tile",
            "e_smem": "A slice of e and one of c, fetched before, land in shared memory",
            "row_max": "The running max of each token moves, and its sum is rescaled",
            "row_sum": "The tile's exponentials join the running sums",
            "hits": "Each thread marks the columns that may matter",
            "survivors": "Survivor bits are written: one for each column of the tile",
            "part_sum": "The (max, sum) of each token are written: all that is left of the logits",
        },
    )
    return drawn(record, layout)


def _sums(
    tiles: Mapping[str, int], n0: int, v0: str, held: Mapping[str, Any], x: int, y: int
) -> Iterable[tuple[int, int, float]]:
    """Where a thread's accumulators stand in the result; see `product.py` of the package."""
    if v0 not in held or "acc" not in held:
        return
    thread_n, thread_v = tiles["thread_n"], tiles["thread_v"]
    vector = min(4, thread_v)
    across = tiles["block_v"] // thread_v
    for i in range(thread_n):
        for j in range(thread_v):
            column = (j // vector * across + x) * vector + j % vector
            yield n0 + y * thread_n + i, held[v0] + column, float(held["acc"][i, j])


def _record(
    call: str, kernel: str, arrays: tuple[np.ndarray, ...], tiles: Mapping[str, int], splits: int, block: tuple[int, int],
    options: dict[str, Any], turn: int = 0,
) -> Record:  # fmt: skip
    return worker.run(_run, call, kernel, arrays, dict(tiles), splits, block, options, turn)


def _run(
    call: str, kernel: str, arrays: tuple[np.ndarray, ...], tiles: dict[str, int], splits: int, block: tuple[int, int],
    options: dict[str, Any], turn: int,
) -> Record:  # fmt: skip
    """Runs in the worker, where the simulator is."""
    import cce_numba
    from cce_numba.simt import backend, forward
    from cce_numba.simt.tiles import SimtTiles

    from . import recording

    chosen = SimtTiles(**tiles)
    sources = (str(next(iter(cce_numba.simt.__path__))),)
    with (
        mock.patch.object(backend, "choose_tiles", return_value=chosen),
        mock.patch.object(forward, "count_splits", lambda n_blocks, v_tiles: min(splits, v_tiles)),
    ):
        do = functools.partial(getattr(cce_numba, call), *arrays, backend="simt", **options)
        record, _ = recording.of_call(do, kernel, turn, block, sources)
    return record


def source(function: str) -> str:
    """A device function of `cce_numba/simt/product.py` as it stands there, without the indentation of its factory."""
    from cce_numba.simt import product

    text = inspect.getsource(product)
    found = re.search(rf"^( *)@cuda\.jit[^\n]*\n\1def {function}\(.*?(?=\n\1\S|\n\S|\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"product.py has no device function {function}")
    return textwrap.dedent(found[0]).rstrip()
