"""Does a result agree with float64 mathematics? Found out on a sample, without storing the logits of all.

The gradients are compared with exact ones *behind the same filter*, so that the filter's own effect is no excuse for an error.
Each column of G, in each block of tokens, is multiplied by what the filter's rule says: 0 where it is dropped, 1 where it is
kept as it is, and eps / pmax where the unbiased filter keeps it by chance (`survivors.py`). The filter that drops is taken at
its word for what it keeps, and every entry that it drops must be one that it may drop. For the unbiased one float64 decides
anew; only where a probability is so near to the decision that rounding may turn it, either outcome is allowed. A gradient of
zeros, one without the target's term, a forgotten factor, or a filter that drops too much does not get through. Only a
mistake that costs less than rounding may cost does; at a higher threshold a filter's mistakes cost more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from cce_numba import survivors
from cce_numba.commands.problems import IGNORE_INDEX, DemoProblem
from cce_numba.progress import advance

SAMPLE = 64  # tokens, and as many vocabulary entries
_WHOLE_BLOCKS = 256  # tokens, where those of a block decide together what is dropped: as many blocks as fit, and at least one
_LOSS_ERROR = 1e-5  # of a float32 log-probability, relative to 1 + its token's largest logit
_BLOCK_BYTES = 32 * 2**20

_scale = np.vectorize(survivors.make_scale(np.float64), otypes=[np.float64])


@dataclass(frozen=True)
class Computed:
    """The result to be judged, on the host.

    Attributes:
        loss: mean loss.
        nll: (N,) negative log-likelihood of each token.
        lse: (N,) log-sum-exp of each token.
        d_e: (N, D) gradient of e.
        d_c: (V, D) gradient of c.
        kept: (n_blocks, V) bool, the entries that each block of counting tokens computes again for the gradients; None: all.
        block: how many counting tokens are a block.
        filter_eps: the filter's threshold, or None.
        coarse_eps: see `plan.Plan`.
        draw_seed: of the unbiased filter's draws, in [0, 2**32); None for the filter that drops.
    """

    loss: float
    nll: np.ndarray
    lse: np.ndarray
    d_e: np.ndarray
    d_c: np.ndarray
    kept: np.ndarray | None
    block: int
    filter_eps: float | None
    coarse_eps: float | None = None
    draw_seed: int | None = None


@dataclass(frozen=True)
class Check:
    """One comparison: it passes if the error is not above what is allowed.

    Attributes:
        name: "loss", "dE", "dC" or "filter", for scripts.
        what: what was compared, and by what it is divided.
        error: how far it is off.
        allowed: how far it may be off.
        rounding: the error that rounding the exact gradient to its dtype makes by itself.
        filtered: how far the exact gradient behind the filter is from the one without it; None if nothing is filtered.
    """

    name: str
    what: str
    error: float
    allowed: float
    rounding: float | None = None
    filtered: float | None = None

    @property
    def passed(self) -> bool:
        """False for an error of NaN too."""
        return bool(self.error <= self.allowed)


@dataclass(frozen=True)
class Agreement:
    """All comparisons.

    Attributes:
        tokens: how many tokens were compared.
        entries: how many vocabulary entries were compared.
        checks: what was found.
        dropped_mass: mean probability that the filter drops of a token, by these draws if it is the unbiased one.
    """

    tokens: int
    entries: int
    checks: tuple[Check, ...]
    dropped_mass: float

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)


@dataclass
class _Rows:
    """Sampled rows of a gradient in float64, without the filter and behind it.

    And bounds (rows,): of what of the latter is as uncertain as a log-probability, and of what may be there or not.
    """

    exact: np.ndarray
    filtered: np.ndarray
    uncertain: np.ndarray
    undecided: np.ndarray

    @staticmethod
    def zeros(rows: int, D: int) -> _Rows:
        return _Rows(np.zeros((rows, D)), np.zeros((rows, D)), np.zeros(rows), np.zeros(rows))


@dataclass(frozen=True)
class _Filtered:
    """What a filter makes of some tokens' probabilities of some entries: (n, v) each, but for the last.

    Attributes:
        scale: what G is multiplied by.
        uncertain: what the probability is multiplied by at most, and how often its relative error counts: once, and once more
            where it is divided by another probability.
        undecided: what the probability is multiplied by if rounding decides otherwise, where it may.
        worst_drop: the largest probability among those that the forward does not keep, divided by its draw if there is one. A
            target counts as a probability of 1, since it is always kept.
    """

    scale: np.ndarray
    uncertain: np.ndarray
    undecided: np.ndarray
    worst_drop: float


def compare(problem: DemoProblem, computed: Computed, seed: int) -> Agreement:
    """Compares a random sample of tokens and vocabulary entries; half of the entries are targets of some token."""
    rng = np.random.default_rng(seed)
    counting = np.flatnonzero(problem.targets != IGNORE_INDEX)
    positions = _sample_of_tokens(rng, len(counting), computed)
    occurring = np.unique(problem.targets[counting])
    entries = rng.choice(occurring, min(SAMPLE // 2, len(occurring)), replace=False)
    others = np.setdiff1d(np.arange(len(problem.c)), entries, assume_unique=True)
    entries = np.concatenate([entries, rng.choice(others, min(SAMPLE - len(entries), len(others)), replace=False)])

    with np.errstate(all="ignore"):  # inf and NaN in the data go through, and no comparison is passed with a NaN
        loss, lse, delta = _compare_losses(problem, computed, counting, positions)
        d_e, worst_of_tokens, dropped_mass = _compare_tokens(problem, computed, counting, positions, lse, delta)
        d_c, worst_of_entries = _compare_entries(problem, computed, counting, entries, delta)
    checks = [loss, d_e, d_c]
    if computed.kept is not None and computed.filter_eps is not None:
        # "log-probabilities may be off by delta" holds for those that the filter judged by, too.
        worst = float(np.maximum(worst_of_tokens, worst_of_entries))  # NaN if either is
        what = "largest dropped probability" if computed.draw_seed is None else "largest dropped probability / draw"
        checks.append(Check("filter", what, worst, computed.filter_eps * float(np.exp(delta))))
    return Agreement(len(positions), len(entries), tuple(checks), dropped_mass)


def _sample_of_tokens(rng: np.random.Generator, n: int, computed: Computed) -> np.ndarray:
    """Ascending positions out of n counting tokens: from anywhere, or whole blocks where these decide what is dropped."""
    if computed.draw_seed is None:
        return np.sort(rng.choice(n, min(SAMPLE, n), replace=False))
    n_blocks = -(-n // computed.block)
    blocks = np.sort(rng.choice(n_blocks, min(max(1, _WHOLE_BLOCKS // computed.block), n_blocks), replace=False))
    positions = (blocks[:, None] * computed.block + np.arange(computed.block)).ravel()
    return positions[positions < n]


def _compare_losses(
    problem: DemoProblem, computed: Computed, counting: np.ndarray, positions: np.ndarray
) -> tuple[Check, np.ndarray, float]:
    """Check of the loss; the log-sum-exp of the sampled tokens; how far a log-probability of theirs may be off."""
    tokens = counting[positions]
    e, targets, n = problem.e[tokens].astype(np.float64), problem.targets[tokens], len(tokens)
    top, total, largest, of_target = np.full(n, np.finfo(np.float64).min), np.zeros(n), np.zeros(n), np.empty(n)
    for block in _blocks("logits of the sample", len(problem.c), problem.c.shape[1], n):
        z = e @ problem.c[block].astype(np.float64).T
        before, top = top, np.maximum(top, z.max(axis=1))
        total = total * np.exp(before - top) + np.exp(z - top[:, None]).sum(axis=1)
        largest = np.maximum(largest, np.abs(z).max(axis=1))
        here = np.flatnonzero((targets >= block.start) & (targets < block.stop))
        of_target[here] = z[here, targets[here] - block.start]
    lse = top + np.log(total)
    scale = 1 + largest
    errors = [np.abs(computed.nll[tokens] - (lse - of_target)) / scale, np.abs(computed.lse[tokens] - lse) / scale]
    mean = computed.nll[counting].mean(dtype=np.float64)
    errors.append(np.array([np.abs(computed.loss - mean) / (1 + np.abs(mean))]))
    allowed = _loss_error(problem)
    loss = Check("loss", "loss per token, / (1 + max |logit|)", float(np.concatenate(errors).max()), allowed)
    return loss, lse, allowed * float(scale.max())


def _compare_tokens(
    problem: DemoProblem, computed: Computed, counting: np.ndarray, positions: np.ndarray, lse: np.ndarray, delta: float
) -> tuple[Check, float, float]:
    """Check of dE, the worst drop, and the mean of the probability that is dropped of a token."""
    tokens = counting[positions]
    e, targets, D = problem.e[tokens].astype(np.float64), problem.targets[tokens], problem.c.shape[1]
    rows, weight, worst, dropped = _Rows.zeros(len(tokens), D), 1 / len(counting), 0.0, 0.0
    for block in _blocks("dE of the sample", len(problem.c), D, len(tokens)):
        c, entries = problem.c[block].astype(np.float64), np.arange(block.start, block.stop)
        p = np.exp(e @ c.T - lse[:, None])
        hot = targets[:, None] == entries
        filtered = _filtered(computed, p, hot, positions // computed.block, entries, delta, None)
        g, norms = weight * (p - hot), np.linalg.norm(c, axis=1)
        rows.exact += g @ c
        rows.filtered += (filtered.scale * g) @ c
        rows.uncertain += weight * ((filtered.uncertain * p + hot) @ norms)
        rows.undecided += weight * ((filtered.undecided * p) @ norms)
        worst = float(np.maximum(worst, filtered.worst_drop))
        dropped += float(np.where(filtered.scale == 0, p, 0).sum()) / len(tokens)
    return _gradient_check("dE", computed.d_e[tokens], rows, delta, computed.kept is not None), worst, dropped


def _compare_entries(
    problem: DemoProblem, computed: Computed, counting: np.ndarray, entries: np.ndarray, delta: float
) -> tuple[Check, float]:
    """Check of dC, and the worst drop in the sampled columns.

    A row of dC is a sum over all tokens, and needs the log-sum-exp of each. Those in float64 would take all logits, so the
    computed ones are used: the sample of tokens has shown how good they are, and `delta` allows for that.
    """
    c = problem.c[entries].astype(np.float64)
    rows, weight, worst = _Rows.zeros(*c.shape), 1 / len(counting), 0.0
    for block in _blocks("dC of the sample", len(counting), c.shape[1], len(entries), computed.block):
        tokens = counting[block]
        e = problem.e[tokens].astype(np.float64)
        p = np.exp(e @ c.T - computed.lse[tokens, None].astype(np.float64))
        hot = problem.targets[tokens, None] == entries
        numbers = np.arange(block.start, block.stop) // computed.block
        filtered = _filtered(computed, p, hot, numbers, entries, delta, computed.coarse_eps)
        g, norms = weight * (p - hot), np.linalg.norm(e, axis=1)
        rows.exact += g.T @ e
        rows.filtered += (filtered.scale * g).T @ e
        rows.uncertain += weight * ((filtered.uncertain * p + hot).T @ norms)
        rows.undecided += weight * ((filtered.undecided * p).T @ norms)
        worst = float(np.maximum(worst, filtered.worst_drop))
    return _gradient_check("dC", computed.d_c[entries], rows, delta, computed.kept is not None), worst


def _filtered(
    computed: Computed,
    p: np.ndarray,
    hot: np.ndarray,
    blocks: np.ndarray,
    entries: np.ndarray,
    delta: float,
    coarse_eps: float | None,
) -> _Filtered:
    """What the filter makes of the probabilities p (n, v).

    hot: (n, v) bool, which are of targets. blocks: (n,) ascending, of which block the tokens are; all of a block's, if the
    filter is unbiased. entries: (v,). delta: how far a log-probability may be off. coarse_eps: see `plan.Plan`.
    """
    if computed.kept is None or computed.filter_eps is None:
        ones = np.broadcast_to(1.0, p.shape)
        return _Filtered(ones, ones, np.broadcast_to(0.0, p.shape), 0.0)
    numbers, first, which = np.unique(blocks, return_index=True, return_inverse=True)
    kept = computed.kept[numbers][:, entries]
    largest = np.maximum.reduceat(np.where(hot, np.inf, p), first)  # NaN of a lost token, all of whose block is kept
    if computed.draw_seed is None:
        u = np.ones(kept.shape)
        scale = uncertain = kept.astype(np.float64)
        coarse = 0.0 if coarse_eps is None else coarse_eps * float(np.exp(delta))
        undecided = np.where(largest < coarse, scale, 0)
    else:
        eps, u = computed.filter_eps, survivors.draws(numbers[:, None], entries, computed.draw_seed).astype(np.float64)
        scale = _scale(largest, eps, u)
        uncertain = np.where(largest < eps * np.exp(delta), 2, 1) * scale
        undecided = np.where(np.abs(np.log(largest / (eps * u))) <= delta, eps / largest, 0)
    worst_drop = float(np.where(kept, 0, np.minimum(largest, 1) / u).max(initial=0))
    return _Filtered(scale[which], uncertain[which], undecided[which], worst_drop)


def _gradient_check(name: str, actual: np.ndarray, rows: _Rows, delta: float, filtered: bool) -> Check:
    """Frobenius norms, relative to that of the exact rows behind the filter.

    Allowed is twice what rounding to the gradient's dtype costs, and what comes of probabilities that are off by the factor
    exp(delta) each, as the error allowed in a log-probability says: at most delta times the sum of what they multiply. And
    what may be there or not.
    """
    rounded = rows.filtered.astype(actual.dtype).astype(np.float64)
    norm = float(np.linalg.norm(rows.filtered)) or 1.0  # an exact gradient of zero: then the errors are absolute
    rounding = float(np.linalg.norm(rounded - rows.filtered)) / norm
    return Check(
        name,
        f"{name}, / |{name}|",
        float(np.linalg.norm(actual.astype(np.float64) - rows.filtered)) / norm,
        2 * rounding + (delta * float(np.linalg.norm(rows.uncertain)) + float(np.linalg.norm(rows.undecided))) / norm,
        rounding,
        float(np.linalg.norm(rows.filtered - rows.exact)) / norm if filtered else None,
    )


def _loss_error(problem: DemoProblem) -> float:
    """The error allowed in a log-probability, relative to 1 + its token's largest logit: as many roundings in any dtype."""
    if problem.e.dtype == np.float64:
        return _LOSS_ERROR * float(ml_dtypes.finfo(np.float64).eps / ml_dtypes.finfo(np.float32).eps)
    return _LOSS_ERROR


def _blocks(what: str, total: int, dim: int, others: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of range(total), in steps of a multiple, whose rows of `dim` float64 numbers, and of `others`, are not many.

    Progress is told.
    """
    step = max(1, _BLOCK_BYTES // (8 * max(dim, others)) // multiple) * multiple
    for start in range(0, total, step):
        stop = min(start + step, total)
        yield slice(start, stop)
        advance(what, stop, total)
