"""Survivor bits become a plan of work for the backward, on the device: what each block of tokens keeps, and when its turn is.

Columns of the vocabulary that dC needs for the same blocks come to lie together, in tiles of 128 sorted columns. Tiles go in
rounds, each with about as many surviving (block, column) pairs as the workspace has slots. Nothing depends on who comes first:
atomics only count.

In `columns`:

    weigh    the scale of the weights; blocks with work
    list     each listed token's row; each column's key (for which eighths of the blocks dC needs it), and how many have which
    order    columns, sorted by key
    sort     survivor bits in that order

In `rounds`:

    rounds   how many columns of a block come before each tile; the rounds
    slots    where each block's columns go in a round's workspace
    phases   jobs of each phase of the backward
"""

from __future__ import annotations

from cce_numba.tensor_core.survey.columns import make_list_kernel, make_order_kernel, make_sort_kernel, make_weigh_kernel
from cce_numba.tensor_core.survey.rounds import make_phases_kernel, make_rounds_kernel, make_slots_kernel
from cce_numba.tensor_core.survey.tables import SurveyLayout


def survey(
    layout: SurveyLayout,
    base: int,
    *,
    survivors_pointer: int,
    pitch_words: int,
    coarse_rows: int = 0,
    keep_all: bool,
    dense_share: float,
    tokens: int,
    n_valid: int,
    softmax_weight: int,
    target_weight: int,
    lse: int,
    target_logit: int,
    targets: int,
    d_tiles_c: int,
    d_tiles_e: int,
    zero_fill: bool,
    marks: int = 0,
) -> None:
    """Fills the tables of `layout.at(base)`.

    Args:
        layout: of the problem.
        base: address of layout.nbytes bytes, a multiple of 256.
        survivors_pointer: address of (blocks, pitch_words) words of bits; bits of columns past the last are 0. If keep_all, 0.
        pitch_words: at least ceil(V / 32).
        coarse_rows: if not 0, dC needs less than survives: what it needs are bits as well, so many rows further down.
        keep_all: all columns survive.
        dense_share: if more than this share of all pairs survives, all are taken.
        tokens, n_valid, lse, target_logit: addresses of what the forward found, see `backend.Statistics`.
        softmax_weight, target_weight: addresses of (N,) float32, see `backend.Backend.backward`.
        targets: address of (N,) int64.
        d_tiles_c, d_tiles_e: jobs for each tile of dC's rows and each block of dE's rows, 0 if it is not wanted.
        zero_fill: whether tiles without survivors are jobs, too.
        marks: address of (N,) float32 if there are further weights: the largest of each token's but the target's; or 0.
    """
    table, blocks, block_words, n_ctiles, V = layout.at(base), layout.blocks, layout.block_words, layout.n_ctiles, layout.V
    token_ctas, rounds_max, coarse_words = 4 * block_words, layout.rounds_max, coarse_rows * pitch_words
    make_weigh_kernel().launch(
        1, tokens, n_valid, marks or softmax_weight, target_weight, block_words, table.alive, table.n_alive, table.scale
    )
    make_list_kernel(bool(marks)).launch(
        token_ctas + (0 if keep_all else layout.chunks),
        token_ctas,
        blocks,
        tokens,
        n_valid,
        softmax_weight,
        target_weight,
        lse,
        target_logit,
        targets,
        table.scale,
        table.rows,
        table.rows,
        table.row_of,
        table.whole,
        table.alive,
        survivors_pointer,
        pitch_words,
        coarse_words,
        V,
        table.keys,
        table.key_counts,
        table.pairs,
        *((marks,) if marks else ()),
    )
    make_order_kernel().launch(
        layout.chunks,
        keep_all,
        dense_share,
        table.keys,
        table.key_counts,
        table.pairs,
        table.n_alive,
        V,
        n_ctiles,
        table.order,
        table.dense,
        table.n_live_tiles,
    )
    make_sort_kernel().launch(
        n_ctiles,
        table.order,
        survivors_pointer,
        pitch_words,
        coarse_words,
        table.alive,
        table.dense,
        table.n_live_tiles,
        blocks,
        block_words,
        n_ctiles,
        table.bits,
        table.live,
        table.before,
        table.tile_pairs,
    )
    live_tiles, rounds = table.n_live_tiles, (table.n_rounds, table.first_tile)
    make_rounds_kernel().launch(
        blocks + 1, blocks, n_ctiles, table.before, table.tile_pairs, live_tiles, layout.cap, rounds_max, *rounds
    )
    make_slots_kernel().launch(rounds_max, blocks, n_ctiles, table.before, *rounds, table.slot0, table.first_g)
    make_phases_kernel().launch(
        1, blocks, n_valid, n_ctiles, live_tiles, *rounds, table.first_g, d_tiles_c, d_tiles_e, zero_fill, table.phase_end
    )
