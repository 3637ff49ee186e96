"""What it means that a backend agrees with the reference on distributions and on several targets: bounds as in `checks.py`.

Errors of logits and log-sum-exps follow from number formats and lengths of sums; here they are carried on to log-probabilities,
entropies, sums of squares, best entries, and to gradients of the form p * (alpha + beta * log p) - sum of gamma_k * onehot_k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import reference
from tests.helpers.cases import Case
from tests.helpers.checks import assert_within, compute_unit, rounded, rounding_of_g

KNOWN = ("bias", "softcap", "logit_scale", "shift", "ignore_index")
EXTRAS = ("entropy", "sum_squares", "top_k")


@dataclass(frozen=True)
class Expected:
    """The reference's results for a case whose targets are ids (...) or (..., K), and errors that its dtype explains."""

    case: Case
    found: reference.Distribution
    tokens: Any  # reference.tokens.Tokens
    log_p: np.ndarray  # (n_valid, V)
    z_error: np.ndarray  # (n_valid,) the largest error of a token's logits
    lse_error: np.ndarray  # (n_valid,)
    entropy_error: np.ndarray  # (n_valid,)

    @property
    def options(self) -> dict[str, Any]:
        """Those that `reference.distribution` knows."""
        return {name: self.case.options[name] for name in KNOWN if name in self.case.options}

    @property
    def unit(self) -> float:
        return compute_unit(self.case.e.dtype)


@reference.building_blocks.quiet
def expect_distribution(case: Case) -> Expected:
    """Runs the reference's forward, and bounds the rounding errors of a backend that computes in float32 (or float64)."""
    options = {name: case.options[name] for name in KNOWN if name in case.options}
    found = reference.distribution(case.e, case.c, case.targets, top_k=case.options.get("top_k", 0), **options)
    to_tokens = {name: options[name] for name in ("shift", "ignore_index", "logit_scale") if name in options}
    tokens = reference.tokens.counting(case.e, case.targets, **to_tokens)
    unit, V = compute_unit(case.e.dtype), len(case.c)
    magnitude = np.abs(tokens.e) @ np.abs(case.c.astype(np.float64)).T
    if options.get("bias") is not None:
        magnitude += np.abs(options["bias"].astype(np.float64))
    magnitude *= np.abs(tokens.scale)[:, None]
    z_error = (case.c.shape[1] + 6) * unit * magnitude + 8 * unit * np.abs(found.logits)
    z_error[found.logits == -np.inf] = 0
    largest = z_error.max(axis=1, initial=0)
    lse_error = largest + (32 + np.log2(V)) * unit * (1 + np.abs(found.lse[tokens.valid]))
    entropy = found.entropy[tokens.valid]
    # dH/dz = -p (log p + H), whose absolute values sum to at most 2 H; the sums themselves are of V terms.
    entropy_error = 2.1 * (entropy + 1e-3) * largest + (64 + V / 8) * unit * (2 + 2 * np.log(V))
    return Expected(case, found, tokens, reference.log_softmax(found.logits), largest, lse_error, entropy_error)


def check_found(expected: Expected, numbers: dict[str, np.ndarray]) -> None:
    """logprobs, lse and whatever else there is of a `Logprobs`, by name."""
    found, tokens, unit, V = expected.found, expected.tokens, expected.unit, len(expected.case.c)

    def everywhere(of_valid: np.ndarray) -> np.ndarray:
        full = np.zeros(tokens.valid.shape)
        full[tokens.valid] = of_valid
        return full

    lse_error, log_p_error = everywhere(expected.lse_error), everywhere(expected.lse_error + expected.z_error)
    of_ids = log_p_error[..., None] if tokens.many else log_p_error
    assert_within("lse", numbers["lse"], found.lse, lse_error)
    assert_within("logprobs", numbers["logprobs"], found.logprobs, of_ids + 4 * unit * np.abs(found.logprobs))
    wide = np.float64 if expected.case.e.dtype == np.float64 else np.float32
    assert all(numbers[name].dtype == wide for name in numbers if name != "top_ids" and numbers[name] is not None)
    if numbers.get("entropy") is not None:
        assert_within("entropy", numbers["entropy"], found.entropy, everywhere(expected.entropy_error))
    if numbers.get("sum_squares") is not None:
        relative = everywhere(4.2 * (expected.z_error + expected.lse_error) + (64 + V / 8) * unit)
        assert_within("sum_squares", numbers["sum_squares"], found.sum_squares, relative * found.sum_squares + 1e-37)
    if numbers.get("top_ids") is not None:
        check_top(expected, numbers["top_logprobs"], numbers["top_ids"], log_p_error[..., None])


def check_top(expected: Expected, top_logprobs: np.ndarray, top_ids: np.ndarray, error: np.ndarray) -> None:
    """The k best, in order: their numbers, which entries they are, and that no better one was left out."""
    found, tokens, V = expected.found, expected.tokens, len(expected.case.c)
    assert top_ids.dtype == np.int64
    assert top_ids.shape == found.top_ids.shape
    error = error + 4 * expected.unit * np.abs(np.where(np.isfinite(found.top_logprobs), found.top_logprobs, 0))
    assert_within("top_logprobs", top_logprobs, found.top_logprobs, error)
    assert ((top_ids >= 0) & (top_ids < V)).all()
    assert not top_ids[~tokens.valid].any()
    alive = ~np.isnan(expected.log_p).any(axis=1)
    ids, values = top_ids[tokens.valid][alive], top_logprobs[tokens.valid][alive]
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(), "an entry comes twice"
    assert not (values[:, 1:] > values[:, :-1]).any(), "not in descending order"
    falls = (values[:, 1:] < values[:, :-1]) | (ids[:, 1:] > ids[:, :-1])
    assert falls.all(), "equal ones not by ascending id"
    at_ids = np.take_along_axis(expected.log_p[alive], ids, axis=1)
    assert_within("the reference at top_ids", at_ids, found.top_logprobs[tokens.valid][alive], 2 * error[tokens.valid][alive])


@dataclass(frozen=True)
class Flows:
    """What flows into each valid token's logits, in magnitudes: of terms that cancel each counts. (n_valid,) but for gamma."""

    softmax: np.ndarray
    entropy: np.ndarray
    gamma: np.ndarray  # (n_valid, K)
    flat: np.ndarray | float = 0.0  # (n_valid, V) what label smoothing takes from all entries

    def scaled(self, scale: np.ndarray) -> Flows:
        flat = self.flat if np.ndim(self.flat) == 0 else self.flat * scale[:, None]
        return Flows(self.softmax * scale, self.entropy * scale, self.gamma * scale[:, None], flat)


@reference.building_blocks.quiet
def tolerances(expected: Expected, flows: Flows, keep_e: Any = None, keep_c: Any = None) -> tuple[np.ndarray, ...]:
    """First-order bounds, per element of dE, dC, dbias, before the rounding to their dtypes."""
    case, unit, tokens = expected.case, expected.unit, expected.tokens
    V, flows = len(case.c), flows.scaled(np.abs(tokens.scale))
    p, log_p = np.exp(expected.log_p), np.where(np.exp(expected.log_p) > 0, np.abs(expected.log_p), 0)
    hot = np.zeros_like(p)
    for k in range(tokens.ids.shape[1]):
        inside = (tokens.ids[:, k] >= 0) & (tokens.ids[:, k] < V)
        np.add.at(hot, (np.flatnonzero(inside), tokens.ids[inside, k]), np.abs(flows.gamma[inside, k]))
    log_p_error = (expected.z_error + expected.lse_error)[:, None]
    underflow = 100 * float(np.finfo(np.float64 if case.e.dtype == np.float64 else np.float32).smallest_normal)
    p_error = underflow + p * np.expm1(np.minimum(log_p_error, 50)) + 8 * unit * p
    entropy = np.abs(expected.found.entropy[tokens.valid])
    factor = (flows.softmax + flows.entropy * entropy)[:, None] + flows.entropy[:, None] * log_p
    factor_error = 16 * unit * factor + flows.entropy[:, None] * (expected.entropy_error[:, None] + log_p_error)
    g = factor * p + hot + flows.flat
    g_error = factor * p_error + factor_error * p + 8 * unit * g
    if (softcap := case.options.get("softcap")) is not None:
        tanh = expected.found.logits / softcap
        slope_error = 2 * np.abs(tanh) * (expected.z_error[:, None] / softcap + 8 * unit) + 8 * unit
        g_error = g_error * (1 - tanh**2) + g * slope_error
        g = g * (1 - tanh**2)
    g, g_error = (np.where(np.isnan(x), 0, x) for x in (g, g_error))
    largest = np.maximum(flows.softmax + flows.entropy, np.abs(flows.gamma).max(axis=1, initial=0))
    rounded_error = g_error + rounding_of_g(g + g_error, largest, case.e.dtype)
    c, e = (np.where(np.isfinite(x), x, 0) for x in (np.abs(case.c.astype(np.float64)), np.abs(tokens.e)))

    def of(keep: Any, terms: int, error: np.ndarray) -> np.ndarray:
        bound = error + (terms + 8) * unit * (g + error)
        return bound if keep is None else np.where(keep, bound, 0) * (1 if keep.dtype == bool else keep)

    d_e = tokens.gradient_of_e(of(keep_e, V, rounded_error) @ c, case.e.shape, case.options.get("shift", 0))
    n = len(p)
    d_c, d_bias = of(keep_c, n, rounded_error).T @ e, of(keep_c, n, g_error).sum(axis=0)
    if np.ndim(flows.flat):  # it may be of rank one, rounded before the rest is added to it; or be in sums of V or n terms
        flat = np.where(np.isnan(flows.flat), 0, flows.flat)
        unit_ = unit if case.e.dtype.itemsize > 2 else 2.0**-8
        d_e += tokens.gradient_of_e(
            (2 * (V + 16) * unit + 1.01 * unit_) * (flat @ c), case.e.shape, case.options.get("shift", 0)
        )
        d_c += (2 * (n + 16) * unit + 1.01 * unit_) * (flat.T @ e)
        d_bias += (2 * (n + 16) * unit + 1.01 * unit_) * flat.sum(axis=0)
    return d_e, d_c, d_bias


def check_against(exact: reference.Gradients, grads: Any, bounds: tuple[np.ndarray, ...]) -> None:
    """Gradients (NumPy) against the reference's."""
    for name, bound in zip(("e", "c", "bias"), bounds, strict=True):
        actual = getattr(grads, name)
        if actual is not None:
            wanted = getattr(exact, name)
            assert_within(f"grads.{name}", actual, wanted, rounded(bound, wanted, actual.dtype))


def flows_of(expected: Expected, d_logprobs: Any = None, d_lse: Any = None, d_entropy: Any = None) -> Flows:
    """Of upstream gradients of log-probabilities, log-sum-exp and entropy, as `reference.distribution_backward` takes them."""
    tokens = expected.tokens
    gamma = np.abs(tokens.select_ids(0.0 if d_logprobs is None else d_logprobs))
    d_lse, d_entropy = (np.abs(tokens.select(0.0 if d is None else d)) for d in (d_lse, d_entropy))
    return Flows(gamma.sum(axis=1) + d_lse, d_entropy, gamma)


def with_ids(case: Case, K: int, rng: np.random.Generator, padded: float = 0.3) -> Case:
    """The case with K ids a token: some padded, some twice, some tokens of padding alone where the case ignores them."""
    ignore = case.options.get("ignore_index", -100)
    ids = rng.integers(0, len(case.c), (*case.targets.shape, K))
    ids[..., 0] = case.targets
    if K > 1:
        ids[..., -1] = np.where(rng.random(case.targets.shape) < 0.3, ids[..., 0], ids[..., -1])
    ids[..., 1:][rng.random((*case.targets.shape, K - 1)) < padded] = ignore
    ids[case.targets == ignore] = ignore
    return replace(case, targets=ids[..., ::-1].copy())
