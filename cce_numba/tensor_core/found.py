"""What the forwards on tensor cores leave behind, and the launches that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba import folds as fold_names
from cce_numba.arguments import Problem
from cce_numba.backend import Statistics
from cce_numba.integers import ceil_div
from cce_numba.survivors import coarse_eps_of, log_threshold
from cce_numba.tensor_core.draws import write_draw_seed
from cce_numba.tensor_core.folds import (
    FOLDS,
    GROUP_MAXIMA,
    SEVERAL_TARGET_LOGITS,
    SURVIVORS_BY_CHANCE,
    Fold,
    found_class,
    result_names,
)
from cce_numba.tensor_core.indexed_dot import launch_indexed_dot
from cce_numba.tensor_core.kept import bytes_of
from cce_numba.tensor_core.layout import Layout
from cce_numba.tensor_core.problem import matrix_of, terms_of
from cce_numba.tensor_core.records import Found, FoundOfMore, GroupMaxima, SeveralTargets, Survivors, Tokens
from cce_numba.tensor_core.tokens import list_tokens

NO_SURVIVORS = Survivors(bits=0, pitch_words=0, coarse_words=0, log_eps=0.0, log_coarser=0.0, first_block=0, seed=0)


def forward(
    p: Problem,
    layout: Layout,
    record: bool,
    folds: tuple[Fold, ...] | None,
    launch: Callable[[Problem, Any, tuple[Fold, ...], Arrays], None],
    kept_tiles: int = 0,
) -> Statistics:
    """What the folds find of each token; by default those that the problem wants, with survivors if `record`.

    launch: launches all kernels that fill `Arrays`. kept_tiles: of each block, whose logits are kept (`tensor_core.kept`).
    """
    folds = folds or folds_of(p, record, kept_tiles > 0)
    arrays = Arrays.of(p, layout, folds, kept_tiles)
    if p.N:
        launch(p, layout, folds, arrays)
    return arrays.statistics(p, layout)


def folds_of(p: Problem, record: bool, keep_logits: bool = False) -> tuple[Fold, ...]:
    """The folds that a problem's forward runs, with survivors if `record`."""
    known = dict(FOLDS)
    if p.options.is_unbiased:
        known[fold_names.SURVIVORS] = SURVIVORS_BY_CHANCE
    if p.K is not None:
        known[fold_names.TARGET_LOGIT] = SEVERAL_TARGET_LOGITS
    return tuple(known[name] for name in fold_names.wanted(p, record, keep_logits))


@dataclass(frozen=True, eq=False)
class Arrays:
    """What a forward leaves behind, on the device.

    Attributes:
        listing: (1 + ceil(N / 2),) int64: how many tokens count, then their rows of e as int32.
        numbers: (results of all folds, N) float32.
        names: of the results.
        target_logits: (N, K) float32, where tokens have several targets; else None.
        maxima: (3, positions of a batch, groups) float32, `records.GroupMaxima`; None unless the best entries are wanted.
        top_logits: (N, k) float32, the best logits; else None.
        top_ids: (N, k) int64, their entries; else None.
        bounds: (N,) float32 logits of the targets, by which survivors are found, of several the largest; None if these are not
            recorded.
        bits: (blocks, pitch_words) uint32 survivor bits, twice as many rows if dC has its own; None if not recorded.
        kept: (bytes,) uint8 of logits that are kept, or None.
        seed: (1,) int64, of the unbiased filter's draws; None for the filter that drops, and if no survivors are recorded.
        n_valid, tokens, found, survivors: addresses of the same, as kernels take them.
    """

    listing: Any
    numbers: Any
    names: tuple[str, ...]
    target_logits: Any
    maxima: Any
    top_logits: Any
    top_ids: Any
    bounds: Any
    bits: Any
    kept: Any
    seed: Any
    n_valid: int
    tokens: int
    found: Found | FoundOfMore
    survivors: Survivors

    @staticmethod
    def of(p: Problem, layout: Layout, folds: tuple[Fold, ...], kept_tiles: int = 0) -> Arrays:
        """Arrays for what these folds find of a problem, still to be filled."""
        xp: Any = p.xp
        N, names = p.N, result_names(folds)
        numbers = xp.empty((len(names), N), np.float32)
        listing = (xp.empty if N else xp.zeros)(1 + (N + 1) // 2, np.int64)
        bounds, bits, kept, seed, survivors = None, None, None, None, NO_SURVIVORS
        if any(fold.name == fold_names.SURVIVORS for fold in folds):
            bounds = xp.empty(N, np.float32)
            bits, survivors = _survivor_bits(p, layout)
            if p.options.is_unbiased:
                seed = xp.zeros(1, np.int64)
                survivors = survivors._replace(seed=seed.data.ptr)
        if kept_tiles:
            kept = xp.empty(bytes_of(layout.blocks, kept_tiles), np.uint8)
        targets, n_valid = 0 if p.targets is None else p.targets.data.ptr, listing.data.ptr
        of_one = {
            "results": numbers.data.ptr,
            "pitch": N,
            "targets": targets,
            "bound": 0 if bounds is None else bounds.data.ptr,
            "kept": 0 if kept is None or not N else kept.data.ptr,
            "kept_tiles": kept_tiles,
            "kept_blocks": layout.blocks,
        }
        found: Any = Found(**of_one)
        target_logits = maxima = top_logits = top_ids = None
        several, groups = SeveralTargets(0, 0, 0, 0), GroupMaxima(0, 0, 0)
        if p.K is not None:
            target_logits = xp.empty((N, p.K), np.float32)
            several = SeveralTargets(targets, p.K, p.options.ignore_index, target_logits.data.ptr)
        if GROUP_MAXIMA in folds:
            maxima, k = xp.empty((3, layout.rows, layout.groups), np.float32), p.options.top_k
            top_logits, top_ids = xp.zeros((N, k), np.float32), xp.zeros((N, k), np.int64)
            groups = GroupMaxima(maxima.data.ptr, maxima[1].data.ptr, layout.groups)
        if found_class(folds) is FoundOfMore:
            found = FoundOfMore(**of_one, several=several, maxima=groups)
        of_more = target_logits, maxima, top_logits, top_ids
        return Arrays(listing, numbers, names, *of_more, bounds, bits, kept, seed, n_valid, n_valid + 8, found, survivors)

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
            target_logit=results.pop("target_logit", self.target_logits),
            survivors=None if self.bits is None else self.bits.view(np.uint8)[:, : ceil_div(p.V, 8)],
            survivor_block=layout.tiles.survivor_block,
            draw_seed=None if self.seed is None else self.seed[0],
            kept_logits=self.kept,
            entropy=results.pop("entropy", None),
            sum_squares=results.pop("sum_squares", None),
            top_logits=self.top_logits,
            top_ids=self.top_ids,
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


def begin(p: Problem, arrays: Arrays, e: Any, constants: tuple[int, ...] = (), constants_to: int = 0) -> None:
    """Launches what comes before tiles of logits: lists tokens, and, where survivors are recorded, finds what they begin with.

    e: that of p, or a copy in aligned rows. constants, constants_to: see `list_tokens`.
    """
    list_tokens(p, arrays.tokens, arrays.n_valid, arrays.found, arrays.names, constants, constants_to)
    if arrays.bits is not None:
        every = Tokens(arrays.tokens, arrays.n_valid, 0, p.N)
        launch_indexed_dot(p, matrix_of(e), terms_of(p), every, arrays.found.bound, arrays.survivors)
        if arrays.seed is not None:
            write_draw_seed(p, every, arrays.survivors.seed)


def indexed_dot(p: Problem, layout: Layout) -> Any:
    """(N,) float32: the target's logit, a dot product by itself; 0 where ignored, NaN for a target out of range."""
    arrays = Arrays.of(p, layout, (FOLDS[fold_names.TARGET_LOGIT],))
    if p.N:
        e = layout.e_in_reach(p)
        list_tokens(p, arrays.tokens, arrays.n_valid, arrays.found, arrays.names)
        e_rows, batch = matrix_of(e), Tokens(arrays.tokens, arrays.n_valid, 0, p.N)
        launch_indexed_dot(p, e_rows, terms_of(p), batch, arrays.numbers.data.ptr, NO_SURVIVORS)
    return arrays.numbers[0]
