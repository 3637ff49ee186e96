"""Does a result agree with float64 mathematics? Found out on a sample, with whole rows of stored logits.

The gradients are compared with the exact ones *of the entries that the filter kept*, so that the filter's own effect is
no excuse for an error, but for what dC may leave out beyond it; and every entry that it dropped must be one that it may
drop. A gradient of zeros, one without the target's term, or a filter that drops too much does not get through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from cce_numba.commands.problems import IGNORE_INDEX, DemoProblem
from cce_numba.progress import advance

SAMPLE = 64  # tokens, and as many vocabulary entries
_LOSS_ERROR = 1e-5  # of a float32 log-probability, relative to 1 + its token's largest logit
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Computed:
    """The result to be judged, on the host.

    Attributes:
        loss: mean loss.
        nll: (N,) negative log-likelihood of each token.
        lse: (N,) log-sum-exp of each token.
        d_e: (N, D) gradient of e.
        d_c: (V, D) gradient of c.
        kept: (n_blocks, V) bool, the entries that each block of counting tokens keeps in the gradients; None keeps all.
        block: how many counting tokens are a block.
        filter_eps: the filter's threshold, or None.
        coarse_eps: see `plan.Plan`.
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


@dataclass(frozen=True)
class Check:
    """One comparison: it passes if the error is not above what is allowed.

    Attributes:
        name: "loss", "dE", "dC" or "filter", for scripts.
        what: what was compared, and by what it is divided.
        error: how far it is off.
        allowed: how far it may be off.
        rounding: the error that rounding the exact gradient to its dtype makes by itself.
        filtered: how far the exact gradient of the kept entries is from that of all; None if nothing is dropped.
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
        dropped_mass: mean probability that the filter drops of a token.
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
    """Sampled rows of a gradient in float64: of all entries and of the kept ones.

    And bounds (rows,) of what was summed, and of what of the kept ones may be left out after all.
    """

    exact: np.ndarray
    exact_kept: np.ndarray
    magnitude: np.ndarray
    left_out: np.ndarray | float = 0.0


def compare(problem: DemoProblem, computed: Computed, seed: int) -> Agreement:
    """Compares a random sample of tokens and vocabulary entries; half of the entries are targets of some token."""
    rng = np.random.default_rng(seed)
    counting = np.flatnonzero(problem.targets != IGNORE_INDEX)
    positions = np.sort(rng.choice(len(counting), min(SAMPLE, len(counting)), replace=False))
    occurring = np.unique(problem.targets[counting])
    entries = rng.choice(occurring, min(SAMPLE // 2, len(occurring)), replace=False)
    others = np.setdiff1d(np.arange(len(problem.c)), entries, assume_unique=True)
    entries = np.concatenate([entries, rng.choice(others, min(SAMPLE - len(entries), len(others)), replace=False)])

    with np.errstate(all="ignore"):  # inf and NaN in the data go through, and no comparison is passed with a NaN
        loss, d_e, delta, dropped, dropped_mass = _compare_tokens(problem, computed, counting, positions)
        d_c, dropped_of_entries = _compare_entries(problem, computed, counting, entries, delta)
    checks = [loss, d_e, d_c]
    if computed.kept is not None and computed.filter_eps is not None:
        # "log-probabilities may be off by delta" holds for those that the filter judged by, too.
        largest = float(np.maximum(dropped, dropped_of_entries))  # NaN if either is
        checks.append(Check("filter", "largest dropped probability", largest, computed.filter_eps * float(np.exp(delta))))
    return Agreement(len(positions), len(entries), tuple(checks), dropped_mass)


def _compare_tokens(
    problem: DemoProblem, computed: Computed, counting: np.ndarray, positions: np.ndarray
) -> tuple[Check, Check, float, float, float]:
    """Checks of the loss and of dE; how far a log-probability may be off; the largest and the mean sum of what was dropped."""
    tokens = counting[positions]
    e, targets, V = problem.e[tokens].astype(np.float64), problem.targets[tokens], len(problem.c)
    z, row_norms = np.empty((len(tokens), V)), np.empty(V)
    for block in _blocks("logits of the sample", V, problem.c.shape[1]):
        c = problem.c[block].astype(np.float64)
        z[:, block] = e @ c.T
        row_norms[block] = np.linalg.norm(c, axis=1)
    top = z.max(axis=1)
    lse = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
    nll = lse - z[np.arange(len(tokens)), targets]
    scale = 1 + np.abs(z).max(axis=1)
    errors = [np.abs(computed.nll[tokens] - nll) / scale, np.abs(computed.lse[tokens] - lse) / scale]
    mean = computed.nll[counting].mean(dtype=np.float64)
    errors.append(np.array([np.abs(computed.loss - mean) / (1 + np.abs(mean))]))
    loss = Check("loss", "loss per token, / (1 + max |logit|)", float(np.concatenate(errors).max()), _loss_error(problem))

    p = np.exp(z - lse[:, None])
    hot = np.zeros_like(p)
    hot[np.arange(len(tokens)), targets] = 1
    keep = np.ones(p.shape, bool) if computed.kept is None else computed.kept[positions // computed.block]
    g, weight = (p - hot) / len(counting), 1 / len(counting)
    shape = (len(tokens), problem.c.shape[1])
    rows = _Rows(np.zeros(shape), np.zeros(shape), weight * ((p + hot) @ row_norms))
    for block in _blocks("dE of the sample", V, problem.c.shape[1]):
        c = problem.c[block].astype(np.float64)
        rows.exact += g[:, block] @ c
        rows.exact_kept += np.where(keep[:, block], g[:, block], 0) @ c
    delta = _loss_error(problem) * float(scale.max())
    d_e = _gradient_check("dE", computed.d_e[tokens], rows, delta, computed.kept is not None)
    dropped = np.where(keep, 0, p)
    return loss, d_e, delta, _largest_dropped(dropped, hot, keep), float(dropped.sum(axis=1).mean())


def _compare_entries(
    problem: DemoProblem, computed: Computed, counting: np.ndarray, entries: np.ndarray, delta: float
) -> tuple[Check, float]:
    """Check of dC, and the largest probability dropped in the sampled columns.

    A row of dC is a sum over all tokens, and needs the log-sum-exp of each. Those in float64 would take all logits, so the
    computed ones are used: the sample of tokens has shown how good they are, and `delta` allows for that.
    """
    c = problem.c[entries].astype(np.float64)
    shape = (len(entries), problem.c.shape[1])
    rows = _Rows(np.zeros(shape), np.zeros(shape), np.zeros(len(entries)), np.zeros(len(entries)))
    least = 0.0 if computed.kept is None or computed.coarse_eps is None else computed.coarse_eps * float(np.exp(delta))
    weight, largest = 1 / len(counting), 0.0
    for block in _blocks("dC of the sample", len(counting), problem.c.shape[1], computed.block):
        tokens = counting[block]
        e = problem.e[tokens].astype(np.float64)
        p = np.exp(e @ c.T - computed.lse[tokens, None].astype(np.float64))
        hot = (problem.targets[tokens, None] == entries).astype(np.float64)
        positions = np.arange(block.start, block.stop)
        keep = np.ones(p.shape, bool) if computed.kept is None else computed.kept[positions // computed.block][:, entries]
        g = weight * (p - hot)
        rows.exact += g.T @ e
        rows.exact_kept += np.where(keep, g, 0).T @ e
        norms = np.linalg.norm(e, axis=1)
        rows.magnitude += weight * ((p + hot).T @ norms)
        needed = np.logical_or.reduceat(~(p < least) | (hot == 1), range(0, len(tokens), computed.block))
        needed = needed.repeat(computed.block, axis=0)[: len(tokens)]
        rows.left_out += weight * (np.where(keep & ~needed, p, 0).T @ norms)
        largest = float(np.maximum(largest, _largest_dropped(np.where(keep, 0, p), hot, keep)))
    return _gradient_check("dC", computed.d_c[entries], rows, delta, computed.kept is not None), largest


def _gradient_check(name: str, actual: np.ndarray, rows: _Rows, delta: float, filtered: bool) -> Check:
    """Frobenius norms, relative to that of the exact rows.

    Allowed is twice what rounding to the gradient's dtype costs, and what comes of probabilities that are off by the factor
    exp(delta) each, as the error allowed in a log-probability says: at most delta times the sum of what they multiply. And
    what may be left out beyond the filter.
    """
    rounded = rows.exact_kept.astype(actual.dtype).astype(np.float64)
    norm = float(np.linalg.norm(rows.exact_kept)) or 1.0  # an exact gradient of zero: then the errors are absolute
    rounding = float(np.linalg.norm(rounded - rows.exact_kept)) / norm
    return Check(
        name,
        f"{name}, / |{name}|",
        float(np.linalg.norm(actual.astype(np.float64) - rows.exact_kept)) / norm,
        2 * rounding + (delta * float(np.linalg.norm(rows.magnitude)) + float(np.linalg.norm(rows.left_out))) / norm,
        rounding,
        float(np.linalg.norm(rows.exact_kept - rows.exact)) / norm if filtered else None,
    )


def _largest_dropped(dropped: np.ndarray, hot: np.ndarray, keep: np.ndarray) -> float:
    """The largest probability dropped; a dropped target counts as a probability of 1, since targets are always kept."""
    return float(np.where(~keep & (hot == 1), 1, dropped).max(initial=0))


def _loss_error(problem: DemoProblem) -> float:
    """The error allowed in a log-probability, relative to 1 + its token's largest logit: as many roundings in any dtype."""
    if problem.e.dtype == np.float64:
        return _LOSS_ERROR * float(ml_dtypes.finfo(np.float64).eps / ml_dtypes.finfo(np.float32).eps)
    return _LOSS_ERROR


def _blocks(what: str, total: int, dim: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of range(total), in steps of a multiple, whose rows of `dim` float64 numbers are not many; progress is told."""
    step = max(1, _BLOCK_BYTES // (8 * max(dim, SAMPLE)) // multiple) * multiple
    for start in range(0, total, step):
        stop = min(start + step, total)
        yield slice(start, stop)
        advance(what, stop, total)
