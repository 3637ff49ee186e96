"""Of the functions of several folds, one each: they work on tuples, which have an item for each fold.

A kernel cannot loop over folds, since their records differ in type. So each function here calls that of the first fold, and
then another one for the rest of the tuple. Numba compiles that to straight code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from cce_numba.simt.folds.fold import Fold, Functions
from cce_numba.simt.tiles import SimtTiles


class Composed(NamedTuple):
    """Device functions of a tuple of folds. arrays, states and rows are tuples too.

    parts is a tuple as well: it has for each fold a tuple of arrays (splits, N) in global memory, one for each field of its
    `Row`. There each split writes its rows, at the positions of their tokens in the list of tokens.
    """

    begin: Any  # states = begin(arrays, block)
    step: Any  # step(states, arrays, tile)
    write: Any  # write(states, r, parts, split, position): the block's r-th rows
    read: Any  # rows = read(parts, split, position)
    merge: Any  # rows = merge(rows, later_rows)
    store: Any  # store(rows, arrays, place)


@functools.cache
def compose(folds: tuple[Fold, ...], tiles: SimtTiles, real: np.dtype) -> Composed:
    """The functions of these folds, for logits of dtype `real`."""
    functions = [fold.functions(tiles, real) for fold in folds]
    begin_each, step_each, store_each = _begin(functions), _step(functions), _store(functions)
    fields = [len(fold.row_dtypes(real)) for fold in folds]

    @cuda.jit(device=True)
    def begin(arrays: Any, block: Any) -> Any:
        return begin_each(arrays, arrays[0], block)

    @cuda.jit(device=True)
    def step(states: Any, arrays: Any, tile: Any) -> None:
        step_each(states, states[0], arrays, tile)

    @cuda.jit(device=True)
    def store(rows: Any, arrays: Any, place: Any) -> None:
        store_each(rows, rows[0], arrays, place)

    return Composed(
        begin=begin,
        step=step,
        write=_write(functions, fields),
        read=_read([fold.Row for fold in folds], fields),
        merge=_merge(functions),
        store=store,
    )


@cuda.jit(device=True)
def _no_more(*_: Any) -> Any:
    """For no fold at all: the end of the chain."""
    return ()


def _begin(functions: list[Functions]) -> Any:
    if not functions:
        return _no_more
    first, rest = functions[0].begin, _begin(functions[1:])

    @cuda.jit(device=True)
    def begin(arrays: Any, first_arrays: Any, block: Any) -> Any:
        return (first(arrays[0], first_arrays, block), *rest(arrays[1:], first_arrays, block))

    return begin


def _step(functions: list[Functions]) -> Any:
    if not functions:
        return _no_more
    first, rest = functions[0].step, _step(functions[1:])

    @cuda.jit(device=True)
    def step(states: Any, first_state: Any, arrays: Any, tile: Any) -> None:
        first(states[0], first_state, arrays[0], tile)
        rest(states[1:], first_state, arrays[1:], tile)

    return step


def _merge(functions: list[Functions]) -> Any:
    if not functions:
        return _no_more
    first, rest = functions[0].merge, _merge(functions[1:])

    @cuda.jit(device=True)
    def merge(rows: Any, later_rows: Any) -> Any:
        return (first(rows[0], later_rows[0]), *rest(rows[1:], later_rows[1:]))

    return merge


def _store(functions: list[Functions]) -> Any:
    if not functions:
        return _no_more
    first, rest = functions[0].store, _store(functions[1:])

    @cuda.jit(device=True)
    def store(rows: Any, first_row: Any, arrays: Any, place: Any) -> None:
        first(rows[0], first_row, arrays[0], place)
        rest(rows[1:], first_row, arrays[1:], place)

    return store


def _write(functions: list[Functions], fields: list[int]) -> Any:
    if not functions:
        return _no_more
    row, rest, write_fields = functions[0].row, _write(functions[1:], fields[1:]), _write_fields(fields[0])

    @cuda.jit(device=True)
    def write(states: Any, r: Any, parts: Any, split: Any, position: Any) -> None:
        write_fields(row(states[0], r), parts[0], split, position)
        rest(states[1:], r, parts[1:], split, position)

    return write


def _write_fields(count: int) -> Any:
    if count == 0:
        return _no_more
    rest = _write_fields(count - 1)

    @cuda.jit(device=True)
    def write_fields(row: Any, arrays: Any, split: Any, position: Any) -> None:
        arrays[0][split, position] = row[0]
        rest(row[1:], arrays[1:], split, position)

    return write_fields


def _read(makers: list[Callable[..., Any] | None], fields: list[int]) -> Any:
    if not makers:
        return _no_more
    make, rest, read_fields = makers[0], _read(makers[1:], fields[1:]), _read_fields(fields[0])
    if make is None:

        @cuda.jit(device=True)
        def read_nothing(parts: Any, split: Any, position: Any) -> Any:
            return ((), *rest(parts[1:], split, position))

        return read_nothing

    @cuda.jit(device=True)
    def read(parts: Any, split: Any, position: Any) -> Any:
        return (make(*read_fields(parts[0], split, position)), *rest(parts[1:], split, position))

    return read


def _read_fields(count: int) -> Any:
    if count == 0:
        return _no_more
    rest = _read_fields(count - 1)

    @cuda.jit(device=True)
    def read_fields(arrays: Any, split: Any, position: Any) -> Any:
        return (arrays[0][split, position], *rest(arrays[1:], split, position))

    return read_fields
