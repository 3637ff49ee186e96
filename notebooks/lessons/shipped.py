"""The stepper's walks through the package's own portable kernels: all that the lessons know of these stands here.

What is known: the names of kernels, of their parameters, and of the variables and shared arrays that the pictures show.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from . import worker
from .record import Record
from .stepper import Layout, Rows, Shown, Walk, drawn

TINY = {"block_n": 4, "block_v": 8, "block_k": 4, "thread_n": 2, "thread_v": 4}  # 2 x 2 threads: a picture's tiles
ON_GPU = {"block_n": 128, "block_v": 128, "block_k": 8, "thread_n": 8, "thread_v": 8}  # as on a GPU: 16 x 16 threads

_NOT_SHOWN = "composed.py", "numbers.py"  # what passes calls and numbers on
_STAGED = "A slice of {} and one of {}, fetched before, land in shared memory"
_FETCHED = "The next slice is fetched from global memory, into registers"
_MULTIPLIED = "The sums grow by the products of the slice in shared memory"
_LIST = "The next surviving columns are looked up"


def forward(
    e: np.ndarray, c: np.ndarray, targets: np.ndarray, *, tiles: Mapping[str, int] = TINY, n_block: int = 0, split: int = 0,
    splits: int = 1, **options: Any,
) -> Walk:  # fmt: skip
    """The forward's kernel: block `n_block` of tokens, and the `split`-th part of the vocabulary's tiles out of `splits`.

    e (N, D), c (V, D), targets (N,); options as of `cce_numba.forward`.
    """
    record = record_forward(e, c, targets, tiles=tiles, n_block=n_block, split=split, splits=splits, **options)
    n0 = n_block * tiles["block_n"]
    layout = Layout(
        left=Shown("e", "e"),
        top=Shown("c", "c", turned=True),
        result=("logits: never stored", "z"),
        shape=(len(e), len(c)),
        sums=_sums(tiles, lambda held: n0, lambda held, column: held.get("v0", -len(c)) + column),
        shared=[Shown("e_smem", "e", words=1), Shown("c_smem", "c", words=1)],
        rows=Rows({"row_max": "max", "row_sum": "sum", "row_bound": "bound"}, first=lambda held: n0),
        bits=("survivor_bits", n_block),
        tile=lambda held: [(n0, held.get("v0", held.get("first", 0)), tiles["block_n"], tiles["block_v"])],
        begins="Each token begins with max −∞ and sum 0; its bound is the target's logit",
        say={
            "c_rows": "Which rows of c belong to the tile",
            "e_smem": _STAGED.format("e", "c"),
            "row_max": "The running max of each token moves, and its sum is rescaled",
            "row_sum": "The tile's exponentials join the running sums",
            "partial": (
                "The logits are complete. Each thread finds the largest of its own in each row",
                "Each thread adds up the exponentials of its own logits in each row",
            ),
            "target_logit": "Who has a token's target among its columns stores the target's logit",
            "row_bound": "The log-sum-exp so far is a better bound",
            "hits": "Each thread marks the columns that may matter",
            "survivor_bits": "Survivor bits are written: one for each column of the tile",
            "part_max": "The (max, sum) of each token are written: all that is left of the logits",
        },
        say_read={
            "target": "Each thread looks for its tokens' targets among its columns, and finds none",
            "e_smem": _MULTIPLIED,
            "e": _FETCHED,
            "arrays_2.targets": "Targets among the tile's columns are marked, too, and there are none",
        },
    )
    return drawn(record, layout)


def record_forward(
    e: np.ndarray, c: np.ndarray, targets: np.ndarray, *, tiles: Mapping[str, int] = TINY, n_block: int = 0, split: int = 0,
    splits: int = 1, **options: Any,
) -> Record:  # fmt: skip
    """What `forward` draws. part_max, part_sum: (splits, N), what each split leaves; survivor_bits: (blocks, bytes)."""
    return _renamed(
        _record("forward", "lse_kernel", (e, c, targets), tiles, (n_block, split), options, splits),
        largest="row_max", total="row_sum", bound="row_bound", bits="survivor_bits", parts_0_0="part_max", parts_0_1="part_sum",
    )  # fmt: skip


def _renamed(record: Record, **names: str) -> Record:
    """With other names for arrays."""
    arrays, results = ({names.get(name, name): value for name, value in of.items()} for of in (record.arrays, record.results))
    return dataclasses.replace(record, arrays=arrays, results=results)


def gradient_of_logits(
    e: np.ndarray, c: np.ndarray, targets: np.ndarray, *, tiles: Mapping[str, int] = TINY, n_block: int = 0, v_tile: int = 0,
    **options: Any,
) -> Walk:  # fmt: skip
    """The backward's first kernel: G of the `v_tile`-th tile of the columns that survive in a block of tokens.

    The vocabulary must fit into one chunk, 4 * block_v entries.
    """
    record = _backward("gradient_of_logits_kernel", (e, c, targets), tiles, (n_block, v_tile), options)
    n0, n_valid = n_block * tiles["block_n"], len(e)
    listed, count = record.results["columns.listed"][n_block], int(record.results["count"][n_block])
    first = v_tile * tiles["block_v"]
    picked = [int(v) for v in listed[first : min(first + tiles["block_v"], count)]]

    def column_of(held: Mapping[str, Any], column: int) -> int:
        return picked[column] if column < len(picked) else -1

    rows = min(tiles["block_n"], n_valid - n0)
    layout = Layout(
        left=Shown("e", "e"),
        top=Shown("c", "c", turned=True),
        result=("G, of what survives", "g"),
        sums=_sums(tiles, lambda held: n0, column_of),
        stored=Shown("g", "g", turned=True),
        decimals=2,
        shared=[Shown("e_smem", "e", words=1), Shown("c_smem", "c", words=1)],
        tile=lambda held: [(n0, v, rows, 1) for v in picked],
        begins="The rows of c that survive are looked up in the block's list",
        say={
            "e_smem": _STAGED.format("e", "c"),
            "g": "The sums are logits; from each follows its element of G, which is stored",
        },
        say_read={"e_smem": _MULTIPLIED, "e": _FETCHED},
    )
    return drawn(record, layout)


def gradient_of_e(
    e: np.ndarray, c: np.ndarray, targets: np.ndarray, *, tiles: Mapping[str, int] = TINY, n_block: int = 0, d_tile: int = 0,
    **options: Any,
) -> Walk:  # fmt: skip
    """dE += G @ C: a tile of `block_n` tokens by `block_v` hidden dimensions. Each term of the sum is a surviving column."""
    record = _backward("d_e_kernel", (e, c, targets), tiles, (n_block, d_tile), options)
    n0, d0 = n_block * tiles["block_n"], d_tile * tiles["block_v"]
    layout = Layout(
        left=Shown("g", "g", turned=True, title="G"),
        top=Shown("c", "c"),
        result=("dE", "e"),
        sums=_sums(tiles, lambda held: n0, lambda held, column: d0 + column),
        stored=Shown("sum", "e"),
        decimals=2,
        shared=[Shown("g_smem", "g", words=1), Shown("c_smem", "c", words=1)],
        tile=lambda held: [(n0, d0, tiles["block_n"], tiles["block_v"])],
        begins=_LIST,
        say={
            "c_rows": _LIST,
            "g_smem": "Their slices of G and of c are fetched, and land in shared memory",
            "sum": "Each thread writes its elements of dE; nobody else does",
        },
        say_read={"g_smem": _MULTIPLIED},
    )
    return drawn(record, layout)


def gradient_of_c(
    e: np.ndarray, c: np.ndarray, targets: np.ndarray, *, tiles: Mapping[str, int] = TINY, v_tile: int = 0, d_tile: int = 0,
    **options: Any,
) -> Walk:  # fmt: skip
    """dC = G.T @ E: a tile of `block_n` entries by `block_v` hidden dimensions. Each term of the sum is a token."""
    record = _backward("d_c_kernel", (e, c, targets), tiles, (v_tile, d_tile), options)
    v0, d0 = v_tile * tiles["block_n"], d_tile * tiles["block_v"]
    layout = Layout(
        left=Shown("g", "g", title="G, on its side"),
        top=Shown("e", "e"),
        result=("dC", "c"),
        sums=_sums(tiles, lambda held: v0, lambda held, column: d0 + column),
        stored=Shown("d_c", "c"),
        decimals=2,
        shared=[Shown("g_smem", "g", words=1), Shown("e_smem", "e", words=1)],
        tile=lambda held: [(v0, d0, tiles["block_n"], tiles["block_v"])],
        begins="The sums are 0, and the first block of tokens has survivors somewhere in the vocabulary",
        say={
            "any_kept": "Which of the tile's entries survive in this block of tokens",
            "e_rows": "The next tokens are looked up",
            "g_smem": "Their slices of G and of e are fetched, and land in shared memory",
            "d_c": "Each thread writes its elements of dC; nobody else does",
        },
        say_read={
            "g_smem": _MULTIPLIED,
            "any_kept": "Does any of them survive? If none did, the block of tokens would be skipped",
        },
    )
    return drawn(record, layout)


def _sums(
    tiles: Mapping[str, int], row_0: Callable[[Mapping[str, Any]], int], column: Callable[[Mapping[str, Any], int], int]
) -> Callable[[Mapping[str, Any], int, int], Iterable[tuple[int, int, float]]]:
    """Where a thread's accumulators stand in the result: see `cce_numba/simt/product.py`."""
    thread_n, thread_v = tiles["thread_n"], tiles["thread_v"]
    vector, across = min(4, thread_v), tiles["block_v"] // thread_v

    def sums(held: Mapping[str, Any], x: int, y: int) -> Iterable[tuple[int, int, float]]:
        if "acc" in held and not np.isnan(held["acc"]).all():
            for i in range(thread_n):
                for j in range(thread_v):
                    of_tile = (j // vector * across + x) * vector + j % vector
                    yield row_0(held) + y * thread_n + i, column(held, of_tile), float(held["acc"][i, j])

    return sums


def _backward(
    kernel: str, arrays: Sequence[np.ndarray], tiles: Mapping[str, int], block: tuple[int, int], options: dict[str, Any]
) -> Record:
    return _record("linear_cross_entropy_with_grad", kernel, tuple(arrays), tiles, block, options, 1)


def _record(
    call: str, kernel: str, arrays: tuple[np.ndarray, ...], tiles: Mapping[str, int], block: tuple[int, int],
    options: dict[str, Any], splits: int,
) -> Record:  # fmt: skip
    return worker.run(_run, call, kernel, arrays, dict(tiles), block, options, splits)


def _run(
    call: str, kernel: str, arrays: tuple[np.ndarray, ...], tiles: dict[str, int], block: tuple[int, int],
    options: dict[str, Any], splits: int,
) -> Record:  # fmt: skip
    """Runs in the worker, where the simulator is."""
    import cce_numba
    from cce_numba.simt import backend, forward
    from cce_numba.simt.tiles import SimtTiles

    from . import recording

    chosen = SimtTiles(**tiles)
    folder = Path(next(iter(cce_numba.simt.__path__)))
    sources = tuple(str(path) for path in folder.rglob("*.py") if path.name not in _NOT_SHOWN)
    with (
        mock.patch.object(backend, "choose_tiles", return_value=chosen),
        mock.patch.object(forward, "count_splits", lambda n_blocks, v_tiles, *_: min(splits, v_tiles)),
    ):
        do = functools.partial(getattr(cce_numba, call), *arrays, backend="simt", **options)
        record, _ = recording.of_call(do, kernel, 0, block, sources)
    return record


def source(function: str, module: str = "product") -> str:
    """A kernel or device function of a module of `cce_numba/simt` as it stands there, without its factory's indentation."""
    text = inspect.getsource(importlib.import_module(f"cce_numba.simt.{module}"))
    start = rf"^( *)(?:@cuda\.jit[^\n]*\n\1)?def {function}\("
    found = re.search(start + r"[\s\S]*?(?=\n\1[^\s)]|\n\S|\Z)", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{module}.py has no function {function}")
    return textwrap.dedent(found[0]).rstrip()
