"""What a backend is: the functions that it offers, what its forward leaves behind, what its backward takes.

`driver.py` calls these functions; backends do not call each other.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cce_numba.arguments import Outline, Problem

if TYPE_CHECKING:
    from cce_numba.plan import Plan

# In order of preference. A backend is a module cce_numba.<name>.backend with the functions of `Backend`.
BACKENDS = ("hopper", "ampere", "simt", "cpu")


class BackendUnavailable(RuntimeError):
    """The backend that was asked for, or every backend, cannot take this problem on this machine."""


@dataclass(frozen=True)
class Statistics:
    """What a backend's forward leaves behind, in NumPy or CuPy arrays.

    Attributes:
        tokens: integers, at least n_valid of them: the tokens that count, ascending, first.
        n_valid: 0-d int64, how many tokens count.
        lse: (N,) natural-log log-sum-exp of the compute dtype, 0 where ignored: max_logit + log_sum, rounded.
        max_logit: (N,) the largest logit, 0 where ignored.
        log_sum: (N,) natural logarithm of the sum of exp(logit - max_logit), 0 where ignored. These two keep the digits that
            the log-sum-exp of large logits has lost.
        target_logit: in the shape of `Problem.targets`, (N,) or (N, K): logits of the targets, 0 where ignored or padded, NaN
            for a target out of range; None without targets. They have the rounding of the logits that max_logit and log_sum are
            made of, so differences from these keep their digits.
        survivors: (at least ceil(n_valid / block), ceil(V / 8)) uint8, little-endian bits over the vocabulary, for blocks of
            consecutive *counting* tokens (see `Backend.forward`); None if not recorded, or if nearly all survive the filter
            that drops: then all do. Of the unbiased filter they say what may survive by its draws. Further rows, and memory
            between rows, are the backend's own: `StatisticsForm` says what there is.
        survivor_block: tokens in a block of `survivors`.
        mean_logit: (N,) mean over the vocabulary of class weight times logit, 0 where ignored, of the compute dtype; None
            unless `Options.smooths_capped`: else it follows from e and c (`terms.py`).
        draw_seed: 0-d int64 in [0, 2**32), the seed of the unbiased filter's draws (`survivors.py`), on the arrays' device;
            None for the filter that drops, and where no survivors were recorded.
        entropy: (N,) of the compute dtype, in nats, 0 where ignored; None unless `Options.entropy`.
        sum_squares: (N,) of the compute dtype, the sum of the squares of all probabilities, 0 where ignored; None unless
            `Options.sum_squares`.
        top_logits: (N, k) of the compute dtype, k being `Options.top_k`: the largest logits, in descending order, 0 where
            ignored; rounded as target_logit is. None if k is 0.
        top_ids: (N, k) int64, which entries these are, in [0, V); equal logits by ascending id; 0 where ignored. None if k is
            0. Where the token is lost they may be any entries.
        kept_logits: (bytes,) uint8 of logits that are kept for the backward (`Plan.kept_bytes`), in the backend's own form;
            None if none are.
        folded: (N,) results of further folds (`folds.py`) by name, 0 where ignored.
    """

    tokens: Any
    n_valid: Any
    lse: Any
    max_logit: Any
    log_sum: Any
    target_logit: Any  # or None
    survivors: Any  # or None
    survivor_block: int
    mean_logit: Any = None
    draw_seed: Any = None
    entropy: Any = None
    sum_squares: Any = None
    top_logits: Any = None
    top_ids: Any = None
    kept_logits: Any = None
    folded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nll(self) -> Any:
        """Negative log-likelihood of each target, lse - target_logit, in the shape of the latter.

        0 where ignored, lse where one of several is padding. A small one of large logits has its digits.
        """
        return self.above(self.target_logit)

    def above(self, logits: Any) -> Any:
        """lse - logits, for logits (N,) or (N, j) that are rounded as max_logit is, with the digits of small differences."""
        largest, rest = (x if logits.ndim == 1 else x[:, None] for x in (self.max_logit, self.log_sum))
        return (largest - logits) + rest


@dataclass(frozen=True)
class StatisticsForm:
    """The dtypes and shapes of what a backend's forward leaves, known without running it: for compilers, which run nothing.

    What it does not say is the same for all backends: see `Statistics`.

    Attributes:
        tokens: dtype of `Statistics.tokens`.
        survivor_block: tokens in a block of survivors.
        planes: rows of survivor bits for each block. Row b of plane i is row i * ceil(N / survivor_block) + b. Plane 0 holds
            the filter's bits; plane 1 of "hopper" and "ampere" the same at a higher threshold (`survivors.coarse_eps_of`).
        row_unit_bytes: the memory of a row is a whole number of so many bytes.
        kept_entries, kept_tile_bytes: of a tile of logits that can be kept for the backward, of a block of tokens and so many
            entries; 0 if none can.
    """

    tokens: np.dtype
    survivor_block: int
    planes: int = 1
    row_unit_bytes: int = 1
    kept_entries: int = 0
    kept_tile_bytes: int = 0

    def survivors_shape(self, N: int, V: int) -> tuple[int, int]:
        """(rows, bytes of a row) of the survivor bits of N tokens and V entries, all memory included.

        >>> StatisticsForm(np.dtype(np.int32), survivor_block=128, planes=2, row_unit_bytes=24).survivors_shape(129, 1000)
        (4, 144)
        """
        n_blocks = (N + self.survivor_block - 1) // self.survivor_block
        units = (V + 8 * self.row_unit_bytes - 1) // (8 * self.row_unit_bytes)
        return self.planes * n_blocks, units * self.row_unit_bytes

    def kept_tiles(self, N: int, V: int, workspace_bytes: int) -> int:
        """Of each block of tokens, the tiles of logits that can be kept in so much memory: an even number.

        >>> form = StatisticsForm(np.dtype(np.int32), survivor_block=128, kept_entries=192, kept_tile_bytes=49664)
        >>> form.kept_tiles(256, 100_000, 10**6)
        10
        """
        if self.kept_entries == 0 or workspace_bytes == 0 or N == 0:
            return 0
        blocks = (N + self.survivor_block - 1) // self.survivor_block
        of_vocabulary = (V + self.kept_entries - 1) // self.kept_entries
        return min(of_vocabulary, workspace_bytes // (blocks * self.kept_tile_bytes)) // 2 * 2

    def kept_bytes(self, N: int, V: int, workspace_bytes: int) -> int:
        """The memory of these."""
        blocks = (N + self.survivor_block - 1) // self.survivor_block
        return blocks * self.kept_tiles(N, V, workspace_bytes) * self.kept_tile_bytes

    def survivor_bytes(self, N: int, V: int) -> int:
        """Memory of the survivor bits."""
        rows, row_bytes = self.survivors_shape(N, V)
        return rows * row_bytes


@dataclass(frozen=True, eq=False)
class Weights:
    """What flows back into each token's logits: the factors of G, the gradient of the loss with respect to the logits.

        G[n, v] = softmax[n] * p[n, v] + entropy[n] * p[n, v] * log(p[n, v])
                  - target[n] * (v == targets[n]) - uniform[n] * class_weights[v]

    where p is the softmax of token n's logits, p * log(p) is 0 where p is 0, and class weights are 1 if there are none. With
    targets (N, K) the third part is the sum over k of target[n, k] * (v == targets[n, k]); the ids of a token may be equal.
    Where one is padding its weight is 0. Arrays are (N,) or (N, K) of the compute dtype, on e's device. Logit scales are in
    them. The softcap's derivative is not: a backend multiplies G by it. All terms of the loss come down to these (`terms.py`),
    and all that flows into log-probabilities and entropies (`driver.py`). A token whose weights are all 0 takes no part,
    whatever stands in its row; nor does one that does not count, whatever its weights are.

    Attributes:
        softmax: weight of the softmax.
        target: weight of the one-hot target, in the shape of `Problem.targets`.
        uniform: weight of the class weights; None unless `Options.smooths_capped`, and then nothing is filtered.
        outer: what the gradients have beside what G gives them; None, or for each gradient that is wanted a pair (column, row)
            of the compute dtype, whose outer product column[i] * row[j] is added to element (i, j); column None is of ones.
            It reaches every element, so a backend adds it before it rounds, where it can, and else begins with
            `terms.write_outer`.
        entropy: weight of p * log(p); None unless something flows back into the entropy, of a problem with `Options.entropy`.
    """

    softmax: Any
    target: Any
    uniform: Any = None  # or an array
    outer: Gradients | None = None  # of pairs
    entropy: Any = None  # or an array

    def taking_part(self, tokens: Any) -> Any:
        """Those of the `tokens` (integers) with a weight that is not 0."""
        of_target = self.target[tokens] != 0
        takes_part = (self.softmax[tokens] != 0) | (of_target if of_target.ndim == 1 else of_target.any(axis=1))
        for others in (self.uniform, self.entropy):
            if others is not None:
                takes_part = takes_part | (others[tokens] != 0)
        return tokens[takes_part]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of the loss (vector-Jacobian products), in the shapes of the inputs; None where not asked for.

    Also names the arrays that gradients are to be written to: `out` of `linear_cross_entropy_with_grad` and `backward`.
    """

    e: Any | None = None
    c: Any | None = None
    bias: Any | None = None


class Backend(Protocol):
    """What a module must offer to be a backend. Arrays are those of `Problem`; nothing here synchronises with the host.

    Attributes:
        EXTRAS: which of `arguments.EXTRAS` its forward and its backward know. A problem that asks for another one is refused
            before anything is launched (`plan.choose_backend`). One with `arguments.DISTILLATION` has a module
            `distillation` with the names of that of "cpu".
        ON_REQUEST: dtypes that it takes only if it is asked for by name, see `plan.why_on_request`.
    """

    EXTRAS: frozenset[str]
    ON_REQUEST: frozenset[np.dtype]

    def why_not(self, p: Outline | Problem) -> str | None:
        """Why it cannot take this problem on this machine, or None if it can.

        A backend knows a `logit_scale`, and what `Options.smooths_capped` asks for. All other terms of the loss are made of
        what it gives (`terms.py`). So sizes, dtype and device decide, and no array is looked at.
        """

    def statistics_form(self, p: Outline | Problem) -> StatisticsForm:
        """What its forward's statistics look like, for a problem that it can take.

        Under a compiler sizes may be symbols. A form that does not look at a size goes for all of them; one that does is made
        anew for others.
        """

    def plan(self, p: Problem) -> Plan:
        """Tiles and memory for this problem."""

    def indexed_dot(self, p: Problem, plan: Plan) -> Any:
        """(N,) the target's logit per token, one dot product each; 0 where ignored, NaN for a target out of range.

        `Statistics.target_logit` is the same number, rounded otherwise. There is one target a token here.
        """

    def forward(self, p: Problem, plan: Plan, *, record_survivors: bool, keep_logits: bool = False) -> Statistics:
        """Largest logit, log-sum-exp and target logits per token; with `record_survivors`, also what the backward must look at.

        A column survives in a block if a token of the block has it as one of its targets, or may give it a probability of at
        least `filter_eps`: `survivors.py` has the rule. For the unbiased filter it also says which columns may survive by
        chance, and the seed of the draws, which follows from all targets that are not padding. Also the mean logit, if the
        problem `smooths_capped`; and the entropy, the sum of squares and the best entries, if the options ask for them. With
        `keep_logits`, as many logits as `Plan.kept_bytes` has room for; only backends whose plans have some are asked.
        """

    def reduced_nll(self, p: Problem, statistics: Statistics) -> Any:
        """0-d, of the compute dtype: sum or mean (as the options say) of `Statistics.nll` over the tokens that count.

        The sum of none is 0, the mean of none is nan. It is the loss where this has no other terms and no weights.
        `terms.reduced_nll` does it with array operations.
        """

    def nll_weight(self, p: Problem, statistics: Statistics, d_loss: Any) -> Any:
        """(N,) of the compute dtype: what flows back into each token's `Statistics.nll` from the sum or mean of `reduced_nll`.

        d_loss: what flows back into that, a float or a 0-d array of the compute dtype. For "mean" it is divided by n_valid;
        where no token counts nobody reads the result. `terms.nll_weight` does it with array operations.
        """

    def backward(self, p: Problem, plan: Plan, statistics: Statistics, weights: Weights, into: Gradients, adds: bool) -> None:
        """Writes the gradients that follow from G (see `Weights`), or adds them to what is there.

        dE[n] = sum over v of G[n, v] * c[v]; dC[v] = sum over n of G[n, v] * e[n]; dbias[v] = sum over n of G[n, v]. Tokens
        that do not count, or whose weights are all 0, take no part. N is at least 1. The unbiased filter decides here, by the
        exact probabilities of the tokens that take part, and multiplies columns of G: `survivors.py` has the rule.

        into: e (N, D), c (V, D), bias (V,), None where not wanted; each of its input's dtype or the compute dtype, and strided,
            on a device with contiguous rows.
        adds: whether gradients are added to what is in the arrays; the sum is of the compute dtype, and rounded at its end
            alone.

        Who writes zeros: without `adds`, `into.e` is all zeros when it comes, since only the device may know which tokens take
        part; a backend writes (or adds to) the rows of those that do, and leaves the others. `into.c` and `into.bias` may hold
        anything when they come; a backend writes every element of them, zeros where no token takes part. With `adds` nobody
        writes zeros.
        """


@functools.cache
def backend_module(name: str) -> Backend:
    """The backend's module; importing it imports what it needs, so only when it is used.

    >>> backend_module("cpu").__name__
    'cce_numba.cpu.backend'
    """
    return importlib.import_module(f"cce_numba.{name}.backend")
