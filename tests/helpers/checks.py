"""What it means that a backend agrees with the reference: error bounds from number formats and reduction lengths.

Bounds are per element, computed in float64 from the same inputs, and relative to the magnitudes that were summed; so a
gradient of zeros, a skipped tile or a missing target term exceeds them (`test_checks.py` makes sure). NaN agrees only
with NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

import reference
from tests.helpers.cases import IGNORE, Case


def assert_within(name: str, actual: Any, exact: np.ndarray, tolerance: Any) -> None:
    """Fails, telling where and by how much, unless |actual - exact| <= tolerance everywhere, NaN exactly where NaN is due."""
    actual = np.asarray(actual)
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    wide = actual.astype(np.float64)
    assert np.array_equal(np.isnan(wide), np.isnan(exact)), (
        f"{name}: NaN at {np.argwhere(np.isnan(wide))[:5].tolist()}, expected at {np.argwhere(np.isnan(exact))[:5].tolist()}"
    )
    with np.errstate(invalid="ignore"):
        fits = (np.abs(wide - exact) <= tolerance) | np.isnan(exact) | (wide == exact)
    if not np.all(fits):
        where = tuple(np.argwhere(~fits)[0])
        bound = np.broadcast_to(tolerance, exact.shape)[where]
        raise AssertionError(
            f"{name}{list(map(int, where))} = {float(wide[where])!r}, expected {float(exact[where])!r} within {bound:.3g}; "
            f"{np.count_nonzero(~fits)} of {fits.size} are off"
        )


@dataclass(frozen=True)
class Expectation:
    """The reference's results for a case, with the error that the compute dtype explains."""

    case: Case
    forward: reference.Forward
    magnitude: np.ndarray  # (n_valid, V) of what is summed up to a logit, scale included
    z_error: np.ndarray  # (n_valid, V) of a logit
    lse_error: np.ndarray  # (n_valid,)
    valid: np.ndarray  # mask of the tokens that count, in the shape of nll

    @property
    def options(self) -> dict[str, Any]:
        """Those that the reference knows."""
        known = ("bias", "ignore_index", "softcap", "logit_scale", "reduction", "shift", *TERMS)
        return {name: self.case.options[name] for name in known if name in self.case.options}

    @property
    def scale(self) -> np.ndarray:
        """(n_valid,) what multiplies the logits of the tokens that count."""
        return self._per_token[0][self.valid]

    @property
    def weights(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n_valid,) of the tokens, (n_valid,) those times their target's, (V,) of the classes."""
        V, of_token = len(self.case.c), self._per_token[1][self.valid]
        return reference.weights(shifted_targets(self), V, self.case.options.get("class_weights"), of_token)

    @property
    def _per_token(self) -> tuple[np.ndarray, np.ndarray]:
        options = self.case.options
        given = options.get("logit_scale"), options.get("token_weights")
        return reference.loss.per_token(*given, self.case.targets.shape, options.get("shift", 0))


TERMS = ("label_smoothing", "z_loss", "class_weights", "token_weights")


def expect(case: Case) -> Expectation:
    """Runs the reference's forward and bounds the rounding errors of a backend that computes in float32 (or float64)."""
    options = Expectation(case, None, None, None, None, None).options  # type: ignore[arg-type]
    forward = reference.forward(case.e, case.c, case.targets, **options)
    shift = int(options.get("shift", 0))
    length = case.targets.shape[-1] if case.targets.ndim else 0
    targets = case.targets[..., shift:] if shift else case.targets
    e = case.e[..., : max(0, length - shift), :] if shift else case.e
    valid = targets != options.get("ignore_index", IGNORE)
    unit = compute_unit(case.e.dtype)
    with np.errstate(all="ignore"):
        magnitude = np.abs(e[valid].astype(np.float64)) @ np.abs(case.c.astype(np.float64)).T
        if options.get("bias") is not None:
            magnitude += np.abs(options["bias"].astype(np.float64))
        magnitude *= np.abs(Expectation(case, forward, magnitude, None, None, valid).scale)[:, None]  # type: ignore[arg-type]
        # gamma_D of Higham's Accuracy and Stability, section 3.1, on the products' magnitudes; tanh to a few units.
        z_error = (case.c.shape[1] + 6) * unit * magnitude + 8 * unit * np.abs(forward.logits)
        z_error[forward.logits == -np.inf] = 0  # masked by the bias
        lse = forward.lse[valid]
        largest = z_error.max(axis=1, initial=0)
        lse_error = largest + (32 + np.log2(case.c.shape[0])) * unit * (1 + np.abs(lse))
    return Expectation(case, forward, magnitude, z_error, lse_error, valid)


def compute_unit(dtype: np.dtype) -> float:
    """Unit roundoff of the arithmetic: float64 for float64 inputs, float32 for all others."""
    return 2.0**-53 if dtype == np.float64 else 2.0**-24


def check_forward(expected: Expectation, numbers: dict[str, np.ndarray]) -> None:
    """loss, nll, lse, target_logit, n_valid against the reference."""
    exact, valid = expected.forward, expected.valid
    per_token = np.zeros(exact.lse.shape)
    per_token[valid] = expected.lse_error
    at_target = np.zeros(exact.lse.shape)
    at_target[valid] = expected.z_error.max(axis=1, initial=0)
    assert int(numbers["n_valid"]) == exact.n_valid
    assert_within("lse", numbers["lse"], exact.lse, per_token)
    assert_within("target_logit", numbers["target_logit"], exact.target_logit, at_target)
    nll_error = per_token + at_target + 4 * compute_unit(expected.case.e.dtype) * np.abs(exact.nll)
    assert_within("nll", numbers["nll"], exact.nll, nll_error)
    loss, loss_error = np.asarray(exact.loss), np.zeros(exact.lse.shape)
    loss_error[valid] = token_loss_error(expected, nll_error[valid])
    if expected.case.options.get("reduction", "mean") != "none":
        unit = compute_unit(expected.case.e.dtype)
        loss_error = np.sum(loss_error)
        if expected.case.options.get("reduction", "mean") == "mean" and exact.total_weight:
            loss_error = loss_error / np.abs(exact.total_weight)
        loss_error += 8 * unit * np.abs(loss)
    assert_within("loss", numbers["loss"], loss, loss_error)
    wide = np.float64 if expected.case.e.dtype == np.float64 else np.float32
    assert all(numbers[name].dtype == wide for name in ("loss", "nll", "lse", "target_logit"))


def token_loss_error(expected: Expectation, nll_error: np.ndarray) -> np.ndarray:
    """(n_valid,) of each token's loss: first-order bounds of its terms' errors, and their own rounding."""
    options, V = expected.case.options, len(expected.case.c)
    unit, lse = compute_unit(expected.case.e.dtype), np.abs(expected.forward.lse[expected.valid])
    of_token, of_target, of_class = map(np.abs, expected.weights)
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    with np.errstate(all="ignore"):
        error = of_target * (1 - smoothing) * (nll_error + 8 * unit * np.abs(expected.forward.nll[expected.valid]))
        if smoothing:
            # The mean of V logits, or one product with the mean of V rows: sums of V terms either way.
            mean, mean_error = (expected.magnitude * of_class).mean(axis=1), (expected.z_error * of_class).mean(axis=1)
            at_mean = of_class.mean() * (expected.lse_error + 8 * unit * lse) + mean_error + (V + 16) * unit * mean
            error += of_token * smoothing * at_mean
        if z_loss:
            error += of_token * z_loss * ((2 * lse + expected.lse_error) * expected.lse_error + 8 * unit * lse**2)
    return np.where(of_token == 0, 0, error)


def check_survivors(expected: Expectation, kept: np.ndarray, eps: float, block: int) -> None:
    """`kept` (n_valid, V) must hold whatever the rule keeps; entries within rounding of the threshold may go either way."""
    lse, targets = expected.forward.lse[expected.valid], shifted_targets(expected)
    with np.errstate(all="ignore"):
        probabilities = np.exp(expected.forward.logits - lse[:, None])
        margin = probability_margin(expected)
    certain = np.zeros_like(kept)
    if len(probabilities):
        certain = reference.column_filter(
            np.where(np.isnan(margin), probabilities, probabilities / margin), targets, eps, block
        )
    missed = certain & ~kept
    assert not missed.any(), f"survivors missed at {np.argwhere(missed)[:5].tolist()}"


def probability_margin(expected: Expectation) -> np.ndarray:
    """(n_valid, 1) by what factor a probability may seem lower than it is."""
    return np.exp(expected.z_error.max(axis=1, initial=0) + expected.lse_error)[:, None]


def unbiased_scales(result: Any, expected: Expectation, part: np.ndarray | None = None) -> np.ndarray | None:
    """(n_valid, V) what the unbiased filter multiplies G by, with the draws that are due; None if rounding may decide.

    part: (n_valid,) bool, which tokens take part; None means all.
    """
    z, targets, block = expected.forward.logits, shifted_targets(expected), result._statistics.survivor_block
    options, (n, V) = result._problem.options, z.shape
    if not n or options.smooths_capped:
        return np.ones((n, V))
    seed = reference.draw_seed(targets, expected.case.options.get("filter_seed", 0))
    u = reference.draws(-(-n // block), V, seed)
    p, margin = reference.softmax(z), np.nanmax(probability_margin(expected), initial=1)
    scales, low, high = (
        reference.of_tokens(reference.roulette(x, targets, options.filter_eps, u, block, part), n, block)
        for x in (p, p / margin, p * margin)
    )
    return scales if ((low == 0) == (high == 0)).all() else None


def check_gradients(
    expected: Expectation,
    grads: Any,
    kept: np.ndarray | None = None,
    d_loss: Any = None,
    d_lse: Any = None,
    *,
    coarse_eps: float | None = None,
) -> None:
    """Gradients (NumPy) against the reference's with the same entries of G kept: exact where `kept` is None.

    kept: (n_valid, V) bool, or of the unbiased filter what multiplies G.
    coarse_eps: see `plan.Plan`. What dC and dbias may leave out for it is allowed for, entry by entry.
    """
    case, options = expected.case, expected.options
    filters = case.options
    keep_e = kept if filters.get("filter_e_grad", True) and filters.get("filter_eps", "auto") is not None else None
    keep_c = kept if filters.get("filter_c_grad", True) and filters.get("filter_eps", "auto") is not None else None
    exact = reference.backward(
        case.e, case.c, case.targets, d_loss=d_loss, d_lse=d_lse, keep_e=keep_e, keep_c=keep_c, **options
    )
    tolerance_e, tolerance_c, tolerance_bias = gradient_tolerances(expected, d_loss, d_lse, keep_e, keep_c, coarse_eps)
    wide = np.dtype(np.float64 if case.e.dtype == np.float64 else np.float32)
    e_dtype = wide if filters.get("accum_e_fp32") else case.e.dtype
    c_dtype = wide if filters.get("accum_c_fp32") else case.c.dtype
    if grads.e is not None:
        assert grads.e.dtype == e_dtype
        assert_within("grads.e", grads.e, exact.e, rounded(tolerance_e, exact.e, e_dtype))
    if grads.c is not None:
        assert grads.c.dtype == c_dtype
        assert_within("grads.c", grads.c, exact.c, rounded(tolerance_c, exact.c, c_dtype))
    if grads.bias is not None:
        assert grads.bias.dtype == options["bias"].dtype
        assert_within("grads.bias", grads.bias, exact.bias, rounded(tolerance_bias, exact.bias, grads.bias.dtype))


def rounded(tolerance: np.ndarray, exact: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tolerance, with what one rounding to `dtype` adds: half its spacing, relative, and its subnormals' spacing."""
    info = ml_dtypes.finfo(dtype)
    # Past the largest number a rounding gives inf: nothing bounds the error there.
    beyond = np.where(np.abs(exact) > float(info.max) * 0.99, np.inf, 0)
    half = float(info.eps) / 2
    return (1 + half) * tolerance + half * np.abs(exact) + float(info.smallest_subnormal) + beyond


def gradient_tolerances(
    expected: Expectation,
    d_loss: Any,
    d_lse: Any,
    keep_e: np.ndarray | None,
    keep_c: np.ndarray | None,
    coarse_eps: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First-order bounds, per element of dE, dC, dbias: G's error times its factor, and the rounding of the sums.

    coarse_eps: dC and dbias may leave out columns of a block of 128 tokens that all give a lower probability to them, and of
        which none has them as its target.
    """
    case, exact = expected.case, expected.forward
    unit = compute_unit(case.e.dtype)
    smoothing, z_loss = case.options.get("label_smoothing", 0.0), case.options.get("z_loss", 0.0)
    lse, scale = exact.lse[expected.valid], np.abs(expected.scale)
    d_token = np.broadcast_to(np.asarray(1.0 if d_loss is None else d_loss, np.float64), exact.nll.shape)[expected.valid]
    if case.options.get("reduction", "mean") == "mean":
        d_token = d_token / exact.total_weight if exact.total_weight else d_token * 0
    d_lse = np.broadcast_to(np.asarray(0.0 if d_lse is None else d_lse, np.float64), exact.lse.shape)[expected.valid]
    of_token, of_target, of_class = expected.weights
    with np.errstate(all="ignore"):
        b = d_token * of_target * (1 - smoothing) * scale
        u = d_token * of_token * smoothing / len(case.c) * scale
        z = np.where(of_token * d_token == 0, 0, d_token * of_token * z_loss * scale)
        into_lse = [b, u * of_class.sum(), 2 * z * lse, d_lse * scale]
        a, b, u, of_class = np.abs(sum(into_lse)), np.abs(b), np.abs(u), np.abs(of_class)
        # The weights come in the compute dtype, where their sum may cancel.
        a_error = 8 * unit * (sum(map(np.abs, into_lse)) + a + u * of_class.sum())
        a_error += reference.weighted(2 * np.abs(z), expected.lse_error)
        p = np.exp(exact.logits - exact.lse[expected.valid][:, None])
        hot = reference.onehot(shifted_targets(expected), case.c.shape[0]) if len(p) else np.zeros_like(p)
        underflow = 2 * float(np.finfo(np.float64 if case.e.dtype == np.float64 else np.float32).smallest_normal)
        p_error = underflow + p * np.expm1(np.minimum(expected.z_error + expected.lse_error[:, None], 50)) + 8 * unit * p
        g = a[:, None] * p + b[:, None] * hot  # magnitudes: of terms that cancel, both count
        g_error = a[:, None] * p_error + a_error[:, None] * p + 4 * unit * g
        flat = u[:, None] * of_class  # what label smoothing takes from all entries
        if (softcap := case.options.get("softcap")) is not None:
            g, g_error, flat = g + flat, g_error + 16 * unit * flat, np.zeros_like(flat)
            tanh = exact.logits / softcap
            slope_error = 2 * np.abs(tanh) * (expected.z_error / softcap + 8 * unit) + 8 * unit
            g_error = g_error * (1 - tanh**2) + g * slope_error
            g = g * (1 - tanh**2)
        needed = ~(p < probability_margin(expected) * (coarse_eps or 0)) | (hot != 0)  # NaN is, of a lost token too
    # What takes no part has no error either, whatever stands in it.
    g, g_error = (np.where(np.isnan(x), 0, x) for x in (g, g_error))
    e_all = np.abs(case.e.astype(np.float64))
    shift = int(case.options.get("shift", 0))
    length = case.targets.shape[-1] if case.targets.ndim else 0
    e = (e_all[..., : max(0, length - shift), :] if shift else e_all)[expected.valid]
    c = np.abs(case.c.astype(np.float64))
    e, c, flat = (np.where(np.isfinite(x), x, 0) for x in (e, c, flat))

    def of(keep: np.ndarray | None, terms: int, error: np.ndarray) -> np.ndarray:
        bound = error + (terms + 8) * unit * (g + error)
        if keep is not None and keep.dtype != bool:  # it follows from a probability
            return np.where(keep == 0, 0, keep * (bound + (g + error) * of_scale))
        return bound if keep is None else np.where(keep, bound, 0)

    of_scale = np.nanmax(probability_margin(expected), initial=1) - 1
    rounded_error = g_error + rounding_of_g(g + g_error, np.maximum(a, b), case.e.dtype)
    d_e = np.zeros_like(e_all)
    view = d_e[..., : max(0, length - shift), :] if shift else d_e
    view[expected.valid] = of(keep_e, case.c.shape[0], rounded_error) @ c
    d_c, d_bias = of(keep_c, exact.n_valid, rounded_error).T @ e, of(keep_c, exact.n_valid, g_error).sum(axis=0)
    if coarse_eps is not None and keep_c is not None and len(needed):
        left_out = np.where(keep_c & ~any_of_block(needed), g + g_error, 0)
        d_c, d_bias = d_c + left_out.T @ e, d_bias + left_out.sum(axis=0)
    if flat.any():
        # It is of rank one: one sum over the vocabulary, or over the tokens; and rounded before the rest is added to it.
        e_unit, c_unit = (
            unit if case.e.dtype.itemsize > 2 or case.options.get(f"accum_{name}_fp32") else unit_of(case.e.dtype)
            for name in ("e", "c")
        )
        bias_unit = unit if case.options.get("bias") is None else unit_of(case.options["bias"].dtype)
        view[expected.valid] += (2 * (len(case.c) + 16) * unit + 1.01 * e_unit) * (flat @ c)
        d_c += (2 * (exact.n_valid + 16) * unit + 1.01 * c_unit) * (flat.T @ e)
        d_bias += (2 * (exact.n_valid + 16) * unit + 1.01 * bias_unit) * flat.sum(axis=0)
    return d_e, d_c, d_bias


def any_of_block(flags: np.ndarray, block: int = 128) -> np.ndarray:
    """(n_valid, V) whether it holds for any token of the block."""
    of_blocks = np.logical_or.reduceat(flags, np.arange(0, len(flags), block), axis=0)
    return np.repeat(of_blocks, block, axis=0)[: len(flags)]


def unit_of(dtype: np.dtype) -> float:
    """Unit roundoff of a format."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def rounding_of_g(g: np.ndarray, weights: np.ndarray, dtype: np.dtype) -> np.ndarray | float:
    """What tensor cores cost: they take G in the inputs' dtype, scaled so that the largest weight is at least 2^13."""
    if dtype.itemsize > 2:
        return 0.0
    info = ml_dtypes.finfo(dtype)
    largest = np.max(weights, where=np.isfinite(weights), initial=0)
    return float(info.eps) / 2 * g + float(info.smallest_subnormal) / 2 * largest * 2.0**-13


def shifted_targets(expected: Expectation) -> np.ndarray:
    """(n_valid,) targets of the tokens that count."""
    shift = int(expected.case.options.get("shift", 0))
    targets = expected.case.targets[..., shift:] if shift else expected.case.targets
    return targets[expected.valid]
