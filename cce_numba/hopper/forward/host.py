"""All launches of a forward: the list of tokens, target logits, then tiles of logits and their merge, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba import folds as fold_names
from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.hopper import tensor_map
from cce_numba.hopper.forward.kernel import make_forward_kernel
from cce_numba.hopper.forward.layout import Layout, copy_rows
from cce_numba.integers import ceil_div
from cce_numba.parallel.bounds import phase_of_exchange
from cce_numba.survivors import coarse_eps_of, log_threshold
from cce_numba.tensor_core.draws import write_draw_seed
from cce_numba.tensor_core.folds import FOLDS, SURVIVORS_BY_CHANCE, Fold, number_count, result_names
from cce_numba.tensor_core.indexed_dot import launch_indexed_dot
from cce_numba.tensor_core.merge import Split, ctas_for, make_merge_kernel
from cce_numba.tensor_core.problem import matrix_of, terms_of
from cce_numba.tensor_core.records import Found, Parts, Survivors, Tokens, Vocabulary
from cce_numba.tensor_core.tokens import list_tokens

_NO_SURVIVORS = Survivors(bits=0, pitch_words=0, coarse_words=0, log_eps=0.0, log_coarser=0.0, first_block=0, seed=0)


def forward(p: Problem, layout: Layout, record: bool, folds: tuple[Fold, ...] | None = None) -> Statistics:
    """What the folds find of each token; by default those that the problem wants, with survivors if `record`."""
    known = FOLDS | {fold_names.SURVIVORS: SURVIVORS_BY_CHANCE} if p.options.is_unbiased else FOLDS
    folds = folds or tuple(known[name] for name in fold_names.wanted(p, record))
    arrays = _Arrays.of(p, layout, folds)
    if p.N:
        _launch(p, layout, folds, arrays)
    return arrays.statistics(p, layout)


@dataclass(frozen=True, eq=False)
class _Arrays:
    """What a forward leaves behind, on the device.

    Attributes:
        listing: (1 + ceil(N / 2),) int64: how many tokens count, then their rows of e as int32.
        numbers: (results of all folds, N) float32.
        names: of the results.
        bounds: (N,) float32 logits of the targets, by which survivors are found; None if these are not recorded.
        bits: (blocks, pitch_words) uint32 survivor bits, twice as many rows if dC has its own; None if not recorded.
        seed: (1,) int64, of the unbiased filter's draws; None for the filter that drops, and if no survivors are recorded.
        n_valid, tokens, found, survivors: addresses of the same, as kernels take them.
    """

    listing: Any
    numbers: Any
    names: tuple[str, ...]
    bounds: Any
    bits: Any
    seed: Any
    n_valid: int
    tokens: int
    found: Found
    survivors: Survivors

    @staticmethod
    def of(p: Problem, layout: Layout, folds: tuple[Fold, ...]) -> _Arrays:
        xp: Any = p.xp
        N, names = p.N, result_names(folds)
        numbers = xp.empty((len(names), N), np.float32)
        listing = (xp.empty if N else xp.zeros)(1 + (N + 1) // 2, np.int64)
        bounds, bits, seed, survivors = None, None, None, _NO_SURVIVORS
        if any(fold.name == fold_names.SURVIVORS for fold in folds):
            bounds = xp.empty(N, np.float32)
            bits, survivors = _survivor_bits(p, layout)
            if p.options.is_unbiased:
                seed = xp.zeros(1, np.int64)
                survivors = survivors._replace(seed=seed.data.ptr)
        targets, n_valid = 0 if p.targets is None else p.targets.data.ptr, listing.data.ptr
        found = Found(numbers.data.ptr, N, targets, 0 if bounds is None else bounds.data.ptr)
        return _Arrays(listing, numbers, names, bounds, bits, seed, n_valid, n_valid + 8, found, survivors)

    def statistics(self, p: Problem, layout: Layout) -> Statistics:
        """As the rest of the package takes it."""
        results = {name: self.numbers[place] for place, name in enumerate(self.names)}
        total_logit = results.pop("total_logit", None)
        return Statistics(
            tokens=self.listing[1:].view(np.int32)[: p.N],
            n_valid=self.listing[0],
            lse=results.pop("lse"),
            max_logit=results.pop("max_logit"),
            log_sum=results.pop("log_sum"),
            target_logit=results.pop("target_logit", None),
            survivors=None if self.bits is None else self.bits.view(np.uint8)[:, : ceil_div(p.V, 8)],
            survivor_block=layout.tiles.survivor_block,
            draw_seed=None if self.seed is None else self.seed[0],
            entropy=results.pop("entropy", None),
            sum_squares=results.pop("sum_squares", None),
            mean_logit=None if total_logit is None else total_logit / np.float32(p.V),
            folded=results,
        )


def _survivor_bits(p: Problem, layout: Layout) -> tuple[Any, Survivors]:
    """Zeroed bits, those of dC after those of the filter; and where they are."""
    coarse_eps = coarse_eps_of(p.options)
    planes = 1 if coarse_eps is None else 2
    bits = p.xp.zeros((planes * layout.blocks, layout.pitch_words), np.uint32)
    log_eps, log_coarse_eps = log_threshold(p.options.filter_eps), log_threshold(coarse_eps)
    survivors = Survivors(
        bits=bits.data.ptr if p.N else 0,
        pitch_words=layout.pitch_words,
        coarse_words=0 if coarse_eps is None else layout.blocks * layout.pitch_words,
        log_eps=log_eps,
        log_coarser=0.0 if coarse_eps is None else log_coarse_eps - log_eps,
        first_block=0,
        seed=0,
    )
    return bits, survivors


def _launch(p: Problem, layout: Layout, folds: tuple[Fold, ...], arrays: _Arrays) -> None:
    tiles, survivors, found = layout.tiles, arrays.survivors, arrays.found
    e, c = layout.e_in_reach(p), layout.c_in_reach(p)
    scratch = p.xp.empty(layout.scratch_bytes(number_count(folds)), np.uint8)  # tensor maps, then partial results
    maps, parts = scratch.data.ptr, Parts(scratch.data.ptr + layout.map_bytes, layout.part_numbers)
    e_map = tensor_map.encode(e, tiles.block_n, tiles.block_d)
    c_map = tensor_map.encode(c, tiles.block_v // tiles.cluster, tiles.block_d)
    tokens, n_valid = arrays.tokens, arrays.n_valid
    list_tokens(p, tokens, n_valid, found, arrays.names, (*e_map, *c_map), maps)
    terms, e_rows = terms_of(p), matrix_of(e)
    if arrays.bits is not None:
        every = Tokens(tokens, n_valid, 0, p.N)
        launch_indexed_dot(p, e_rows, terms, every, found.bound, survivors)
        if arrays.seed is not None:
            write_draw_seed(p, every, survivors.seed)

    bias_dtype = None if p.bias is None else np.dtype(p.bias.dtype)
    capped, scaled = p.options.softcap is not None, p.logit_scale is not None
    kernel = make_forward_kernel(tiles, p.dtype, bias_dtype, capped, scaled, folds)
    merge_kernel = make_merge_kernel(tiles.group_n, folds)
    phases, bounds = layout.phases(arrays.bits is not None), p.bounds
    exchange = phase_of_exchange([first_tile for _, first_tile, _ in phases], layout.n_tiles)
    for phase, (first_row, first_tile, last_tile) in enumerate(phases):
        if phase == exchange and bounds is not None and arrays.bounds is not None:
            lse = arrays.numbers[arrays.names.index("lse")] if phase else None
            arrays.bounds[...] = bounds.of_all(arrays.bounds, lse)
        if c is not p.c and first_tile * tiles.block_v == first_row:
            copy_rows(p.c[first_row : first_row + layout.c_rows], c)
        vocabulary = Vocabulary(first_tile, last_tile - first_tile, first_row, p.V)
        split = Split(layout.workers, layout.per_round, last_tile - first_tile, p.V)
        for first_token, n_tokens in layout.batches():
            batch = Tokens(tokens + 4 * first_token, n_valid, first_token, n_tokens)
            first_word = survivors.pitch_words * (first_token // tiles.block_n)
            kept = survivors._replace(bits=survivors.bits + 4 * first_word, first_block=first_token // tiles.block_n)
            kernel.launch(
                layout.workers * tiles.cluster,
                maps,
                e_rows,
                batch,
                layout.per_round,
                terms,
                found,
                first_tile > 0,
                parts,
                kept,
                vocabulary,
                p.D,
            )
            # What is lost is only known once all of the vocabulary is in.
            at_last = kept if last_tile == layout.n_tiles else _NO_SURVIVORS
            merge_kernel.launch(ctas_for(n_tokens), parts, split, batch, found, at_last)


def indexed_dot(p: Problem, layout: Layout) -> Any:
    """(N,) float32: the target's logit, a dot product by itself; 0 where ignored, NaN for a target out of range."""
    arrays = _Arrays.of(p, layout, (FOLDS[fold_names.TARGET_LOGIT],))
    if p.N:
        e = layout.e_in_reach(p)
        list_tokens(p, arrays.tokens, arrays.n_valid, arrays.found, arrays.names)
        e_rows, batch = matrix_of(e), Tokens(arrays.tokens, arrays.n_valid, 0, p.N)
        launch_indexed_dot(p, e_rows, terms_of(p), batch, arrays.numbers.data.ptr, _NO_SURVIVORS)
    return arrays.numbers[0]
