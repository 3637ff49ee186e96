"""What it means that a backend agrees with the reference on a student's head and its teacher's: bounds as in `checks.py`."""

from __future__ import annotations

import numpy as np

import cce_numba as cce
import reference
from cce_numba import distillation
from cce_numba.survivors import unpack_survivors
from reference.distillation import Head
from reference.distillation import heads as reference_heads
from tests.helpers.checks import assert_within, compute_unit, rounded, rounding_of_g


def heads(rng, shape, V, D, dtype, spread=2.0, bias=False, softcap=None):
    """A head of random numbers whose logits are about as large as `spread`."""
    e = rng.normal(size=(*shape, D)).astype(dtype)
    c = (rng.normal(size=(V, D)) * spread / np.sqrt(D)).astype(dtype)
    return Head(e, c, rng.normal(size=V).astype(dtype) if bias else None, softcap)


def options_of(student, teacher):
    """What the heads have beside their matrices, as `linear_distillation` takes it."""
    named = {"bias": student.bias, "teacher_bias": teacher.bias, "softcap": student.softcap, "teacher_softcap": teacher.softcap}
    return {name: x for name, x in named.items() if x is not None}


def log_error(head, temperature, unit):
    """(tokens...) of logarithms of probabilities."""
    e, c = (np.abs(x.astype(np.float64)) for x in (head.e, head.c))
    magnitude = (e @ c.T + (0 if head.bias is None else np.abs(head.bias.astype(np.float64)))).max(axis=-1) / temperature
    return 2 * (c.shape[1] + 16) * unit * magnitude + (64 + np.log2(len(c))) * unit * (1 + magnitude)


def check(harness, student, teacher, d_loss=None, **options):
    """Judges a backend's loss and gradients by the reference, and returns the gradients."""
    own = options_of(student, teacher)
    arrays = [harness.device(x) for x in (student.e, student.c, teacher.e, teacher.c)]
    given = {name: harness.device(x) if isinstance(x, np.ndarray) else x for name, x in (own | options).items()}
    d = harness.device(d_loss) if isinstance(d_loss, np.ndarray) else d_loss
    loss, grads = cce.linear_distillation_with_grad(*arrays, d_loss=d, backend=harness.backend, **given)
    alone = cce.linear_distillation(*arrays, backend=harness.backend, **given)
    np.testing.assert_array_equal(harness.host(alone), harness.host(loss))
    known = {name: x for name, x in options.items() if not name.startswith(("accum", "filter"))}
    exact = reference.distillation(student, teacher, **known)

    unit, V = max(compute_unit(head.e.dtype) for head in (student, teacher)), len(student.c)
    temperature, shift, reduction = (
        options.get("temperature", 1.0),
        int(options.get("shift", 0)),
        options.get("reduction", "mean"),
    )
    error = sum(log_error(head, temperature, unit) for head in (student, teacher))
    error = error[..., : error.shape[-1] - shift] if shift else error
    # A divergence moves with its logarithms by at most 2 + their difference, of which largest is told by the reference.
    tokens, _, log_q, log_p = reference_heads(
        student, teacher, options.get("targets"), temperature, shift, options.get("ignore_index", -100)
    )
    apart = 3 + np.abs(log_p - log_q).max(axis=1, initial=0)
    of_token = apart * (error[tokens.valid] + (64 + V / 8) * unit)
    full = np.zeros(tokens.valid.shape)
    full[tokens.valid] = of_token
    if reduction != "none":
        full = np.asarray(full.sum() / (max(exact.n_valid, 1) if reduction == "mean" else 1))
        full = full + 8 * unit * np.abs(exact.loss)
    assert_within("loss", harness.host(loss), np.asarray(exact.loss), full)

    d_token = np.abs(tokens.select(1.0 if d_loss is None else d_loss)) / temperature
    with distillation.prepared(*arrays, {"backend": harness.backend, **given}) as prepared:
        done = distillation.forward(prepared, ("e", "c"))
    scales, unsure = filtered(harness, done, log_p, log_q, np.exp(error[tokens.valid])[:, None], d_token != 0)
    wanted = reference.distillation_backward(student, teacher, d_loss=d_loss, keep_e=scales, keep_c=scales, **known)
    d_token = d_token / max(exact.n_valid, 1) if reduction == "mean" else d_token
    p, q = np.exp(log_p), np.exp(log_q)
    g_error = (d_token * of_token)[:, None] * (p + q) * (2 + np.abs(log_p - log_q)) + 1e-37
    g = (d_token * apart)[:, None] * (p + q)
    g_error = scales * (2 * g_error + (16 * unit + error[tokens.valid][:, None]) * g) + unsure * g
    g = scales * g
    rounded_error = g_error + rounding_of_g(g, d_token, student.e.dtype)
    bounds = {
        "e": tokens.gradient_of_e(
            (rounded_error + V * unit * g) @ np.abs(student.c.astype(np.float64)), student.e.shape, shift
        ),
        "c": (rounded_error + (len(g) + 8) * unit * g).T @ np.abs(tokens.e),
        "bias": (g_error + (len(g) + 8) * unit * g).sum(axis=0),
    }
    for name, bound in bounds.items():
        actual = harness.host(getattr(grads, name))
        if actual is not None:
            expected = getattr(wanted, name)
            assert_within(f"grads.{name}", actual, expected, rounded(bound, expected, actual.dtype))
    return grads


def filtered(harness, done, log_p, log_q, margin, part):
    """What the filter multiplies G by, and what more or less it may be, `(n_valid, V)` both; after a look at the survivors.

    done: a `DistillationPass`. margin (n_valid, 1): by what factor a probability may seem larger or smaller. part (n_valid,):
    which tokens take part.
    """
    found, options = done.student.statistics, done.heads.student.options
    (n, V), eps, which = log_p.shape, options.filter_eps, (done.heads.kind, done.heads.beta)
    if eps is None or found.survivors is None or not n:
        return np.ones((n, V)), np.zeros((n, V))
    block = found.survivor_block
    kept = np.repeat(unpack_survivors(found, V), block, axis=0)[:n]
    union = reference.union(log_p, log_q, *which)
    u, unbiased = np.ones((-(-n // block), V)), options.is_unbiased
    if unbiased:
        u = reference.draws(len(u), V, int(harness.host(found.draw_seed)))

    def of_tokens(probabilities, who=None):
        scales = reference.roulette(probabilities, None, eps, u, block, who)
        return reference.of_tokens(scales, n, block)

    slack = 1.002 * np.nanmax(margin)  # with what a forward takes off the threshold
    certain, possible = of_tokens(union / slack) != 0, of_tokens(np.minimum(union * slack, 1)) != 0
    assert not (certain & ~kept).any(), "what reaches the threshold is kept"
    assert not (kept & ~possible).any(), "what is below it is dropped"
    if not unbiased:
        return kept.astype(np.float64), np.zeros((n, V))
    scales, low, high = (of_tokens(x, part) for x in (union, union / margin, union * margin))
    return scales, np.where((low == 0) != (high == 0), np.maximum(low, high) * np.nanmax(margin), 0)
