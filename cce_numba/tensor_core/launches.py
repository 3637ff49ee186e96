"""The launches of a forward: part by part of the vocabulary and batch by batch of the tokens, each with its merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cce_numba.arguments import Problem
from cce_numba.parallel.bounds import phase_of_exchange
from cce_numba.tensor_core.folds import Fold
from cce_numba.tensor_core.found import NO_SURVIVORS, Arrays
from cce_numba.tensor_core.layout import Layout, copy_rows
from cce_numba.tensor_core.merge import Split, ctas_for, make_merge_kernel
from cce_numba.tensor_core.problem import terms_of
from cce_numba.tensor_core.records import Parts, Survivors, Tokens, Vocabulary
from cce_numba.tensor_core.top_k import find_best


class Part(NamedTuple):
    """What one launch works on, as kernels take it.

    has_earlier: whether results of earlier parts of the vocabulary are there. survivors: from the batch's first block on.
    """

    batch: Tokens
    vocabulary: Vocabulary
    has_earlier: bool
    survivors: Survivors


def launch_parts(
    p: Problem,
    layout: Layout,
    folds: tuple[Fold, ...],
    arrays: Arrays,
    e: Any,
    c: Any,
    parts: Parts,
    launch: Callable[[Part], None],
) -> None:
    """Launches everything that follows the beginning.

    e, c: of the layout, in reach of copies. parts: where a launch leaves its partial results. launch: of the kernel of tiles.
    """
    tiles, found, terms = layout.tiles, arrays.found, terms_of(p)
    merge_kernel = make_merge_kernel(tiles.group_n, folds, layout.fixed)
    in_reach = None
    for (first_row, first_tile, last_tile), (first_token, n_tokens) in launches_of(p, layout, arrays):
        if c is not p.c and first_row != in_reach:
            copy_rows(p.c[first_row : first_row + layout.c_rows], c)
            in_reach = first_row
        batch, survivors = batch_of(arrays, first_token, n_tokens, tiles.block_n)
        vocabulary = Vocabulary(first_tile, last_tile - first_tile, first_row, p.V)
        launch(Part(batch, vocabulary, first_tile > 0, survivors))
        # What is lost is only known once all of the vocabulary is in.
        is_last = last_tile == layout.n_tiles
        split = Split(layout.workers, layout.per_round, last_tile - first_tile, p.V)
        merge_kernel.launch(ctas_for(n_tokens), parts, split, batch, found, survivors if is_last else NO_SURVIVORS)
        if layout.with_best and is_last:
            find_best(p, layout, e, terms, batch, arrays)


def launches_of(p: Problem, layout: Layout, arrays: Arrays) -> Iterator[tuple[tuple[int, int, int], tuple[int, int]]]:
    """`Layout.launches`; before one of them ranks tell each other what bounds the log-sum-exps of all from below."""
    launches, bounds = layout.launches(arrays.bits is not None), p.bounds
    if bounds is None or arrays.bounds is None:
        yield from launches
        return
    phases, is_told = layout.phases(True), False
    exchange = 0 if layout.with_best else phase_of_exchange([first_tile for _, first_tile, _ in phases], layout.n_tiles)
    for phase, batch in launches:
        if not is_told and phase == phases[exchange]:
            lse = arrays.numbers[arrays.names.index("lse")] if exchange else None
            arrays.bounds[...] = bounds.of_all(arrays.bounds, lse)
            is_told = True
        yield phase, batch


def batch_of(arrays: Arrays, first_token: int, n_tokens: int, block_n: int) -> tuple[Tokens, Survivors]:
    """The tokens of a launch, of all that are listed, and their survivor bits."""
    survivors, first_block = arrays.survivors, first_token // block_n
    batch = Tokens(arrays.tokens + 4 * first_token, arrays.n_valid, first_token, n_tokens)
    first_word = survivors.pitch_words * first_block
    return batch, survivors._replace(bits=survivors.bits + 4 * first_word, first_block=first_block)
