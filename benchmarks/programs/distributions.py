"""What a token's distribution costs beside its loss: entropy, best entries, batch invariance, entropy's gradient; a teacher's.

    python -m benchmarks distributions --record distributions_h100    everything, some two minutes on an H100
    python -m benchmarks distributions --parts forward                forwards alone
    python -m benchmarks distributions --small --rounds 2             small shapes: does it run?

forward      `linear_logprobs` with more and more of what it can tell, beside the loss alone
gradients    loss and gradients beside those of a loss that has the mean entropy as a bonus, filtered and exact; the latter by
             Liger's kernel for Hopper, too, where `liger_kernel` is installed
distillation divergences from a teacher of the same sizes, and their gradients: four products of the loss, four more of these

X is a time over cuBLAS's for the one product `e @ c.T` in the same round. Results are validated on some tokens against float64
before anything is timed. The error of an entropy, and of a log-probability, is relative to 1 + its value.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import numpy as np
from rich.console import Console

import cce_numba as cce
from benchmarks import options
from benchmarks.data import Inputs, calibrated, random
from benchmarks.errors import Wrong
from benchmarks.measure import cublas, device, record, timing
from benchmarks.measure.device import Call
from benchmarks.options import Pace
from benchmarks.programs import backward
from benchmarks.tables import distributions as tables

PARTS = ("forward", "gradients", "distillation")
MAKERS = {"calibrated": calibrated.make, "random": random.make}
ROUNDS = 8
CUBLAS, LIGER = "cublas", "Liger, exact, with entropy"
FORWARDS: dict[str, dict[str, Any]] = {
    "log-probabilities": {},
    "and entropy": {"entropy": True},
    "and entropy, top 8": {"entropy": True, "top_k": 8},
    "and entropy, top 64": {"entropy": True, "top_k": 64},
    "and entropy, sum of squares": {"entropy": True, "sum_squares": True},
    "batch invariant": {"batch_invariant": True},
    "batch invariant, and entropy": {"batch_invariant": True, "entropy": True},
}
FORWARD_X_AT_MOST = {"and entropy": 1.08, "and entropy, top 8": 1.15}
GRADIENTS: dict[str, dict[str, Any]] = {"default": {}, "exact": {"filter_eps": None}}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
SHARPER = 1.25  # than the student: what a teacher's logits are multiplied by
BONUS = 0.01  # the weight of the mean entropy in the loss
SLOWER_AT_MOST = 1.06  # with the gradient of entropy, where the filter is the default and the data are calibrated
_TOKENS = 256  # that are validated
_ERROR_AT_MOST = 2e-5  # of a log-probability and of an entropy, over 1 + its value
_WRONG = 0.1  # an error of a gradient that no rounding and no filter makes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="these alone")
    parser.add_argument("--small", action="store_true", help="small shapes: does it run?")
    options.add_pace(parser, rounds=ROUNDS)
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures, shows, records. Raises Wrong if something was wrong: nothing of these data is timed then."""
    device.require()
    pace = Pace(arguments.rounds, arguments.burst, warm_up_s=0.1 if arguments.small else Pace.warm_up_s)
    console = Console(width=150)
    results: dict[str, Any] = {"how": {"rounds": pace.rounds, "burst": pace.burst, "cublas": cublas.library()}, "data": []}
    try:
        for name, make in MAKERS.items():
            with console.status(f"{name} data"):
                device.free_memory()  # which the data before have left in the pool
                shape = backward.SMALL_SHAPE if arguments.small else backward.SHAPES[name]
                inputs = make(*shape, device.cupy())
            found = {"data": name, **dict(zip("NVD", inputs.shape, strict=True))}
            for part in arguments.parts:
                with console.status(f"{name} data, {part}"):
                    measure = {"forward": forwards, "gradients": gradients, "distillation": distillation}[part]
                    found[part] = measure(inputs, pace)
                console.print(tables.table(found, part))
            results["data"].append(found)
    finally:  # what was measured before something broke was measured
        if arguments.record and results["data"]:
            console.print(str(record.write(arguments.record, results)))


def timed(calls: dict[str, Call], pace: Pace) -> dict[str, Any]:
    """Times of calls in turns, with X."""
    device.free_memory()
    timing.warm_up(calls.values(), pace.warm_up_s)
    times = timing.interleaved(calls, pace.rounds, pace.burst)
    return {name: record.summary(ms) | {"x": timing.ratios(ms, times[CUBLAS])} for name, ms in times.items()}


# ---- forward


def forwards(inputs: Inputs, pace: Pace) -> dict[str, Any]:
    """Errors, then times of the loss and of all `FORWARDS`."""
    errors = errors_of_forwards(inputs)
    calls: dict[str, Call] = {CUBLAS: cublas.product(inputs), "loss": functools.partial(cce.linear_cross_entropy, *inputs)}
    for name, more in FORWARDS.items():
        calls[name] = functools.partial(cce.linear_logprobs, *inputs, **more)
    return {"errors": errors, "calls": timed(calls, pace), "x_at_most": FORWARD_X_AT_MOST}


def errors_of_forwards(inputs: Inputs) -> dict[str, float]:
    """The largest errors of some tokens. Raises Wrong if they are too large, or best entries are not the best."""
    xp = cce.interchange.array_module(inputs.e)
    some = slice(0, _TOKENS)
    z = float64_logits(inputs, some)
    log_p = z - logsumexp(xp, z)[:, None]
    exact = {"logprobs": log_p[xp.arange(len(z)), inputs.targets[some]], "entropy": -(xp.exp(log_p) * log_p).sum(axis=1)}
    worst = dict.fromkeys(exact, 0.0)
    for name, more in FORWARDS.items():
        found = cce.linear_logprobs(*inputs, **more)
        for key, expected in exact.items():
            if (given := getattr(found, key)) is not None:
                error = float((abs(given[some] - expected) / (1 + abs(expected))).max())
                if not error <= _ERROR_AT_MOST:
                    raise Wrong(f"{name}: {key} is off by {error:.3g} of 1 + its value")
                worst[key] = max(worst[key], error)
        if found.top_ids is not None:
            k = found.top_ids.shape[1]
            least = xp.sort(log_p, axis=1)[:, -k]
            if not bool((xp.take_along_axis(log_p, found.top_ids[some], axis=1).min(axis=1) >= least - 1e-4).all()):
                raise Wrong(f"{name}: the {k} entries are not the best")
    return worst


def float64_logits(inputs: Inputs, tokens: slice) -> Any:
    """(tokens, V) float64."""
    return inputs.e[tokens].astype(np.float64) @ inputs.c.astype(np.float64).T


def logsumexp(xp: Any, z: Any) -> Any:
    """Of each row."""
    largest = z.max(axis=1)
    return largest + xp.log(xp.exp(z - largest[:, None]).sum(axis=1))


# ---- gradients


def gradients(inputs: Inputs, pace: Pace) -> dict[str, Any]:
    """Errors, then times of loss and gradients without and with the entropy, for each of `GRADIENTS`."""
    calls: dict[str, Call] = {CUBLAS: cublas.product(inputs)}
    errors = {}
    for name, more in GRADIENTS.items():
        errors[name] = error_of_d_e(inputs, more)
        if not errors[name] <= _WRONG:
            raise Wrong(f"{name}: the error of dE with the entropy's gradient is {errors[name]:.3g}")
        calls[name] = functools.partial(cce.linear_cross_entropy_with_grad, *inputs, **more)
        calls[f"{name}, with entropy"] = functools.partial(with_entropy, inputs, more)
    its, beside = of_liger(inputs), {}
    if callable(its):
        errors[LIGER] = relative_error(cce.interchange.take("dE", its()), exact_d_e(inputs))
        if errors[LIGER] <= _WRONG:
            calls[LIGER] = its
    else:
        beside["no_liger"] = its
    found = timed(calls, pace)
    slower = {name: round(found[f"{name}, with entropy"]["median_ms"] / found[name]["median_ms"], 4) for name in GRADIENTS}
    return {"errors": errors, "calls": found, "slower": slower, "slower_at_most": SLOWER_AT_MOST, **beside}


def of_liger(inputs: Inputs) -> Call | str:
    """The call by Liger's kernel, or why there is none."""
    if (torch := device.torch_with_cuda()) is None:
        return "no PyTorch with CUDA"
    from benchmarks.peers import liger

    if reason := liger.why_none():
        return f"liger_kernel {reason}"
    e, c, targets = map(device.as_torch, inputs)
    call = liger.with_entropy(e, c, targets, BONUS)
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:  # a peer that fails does not keep ours from being measured
        return f"liger_kernel fails: {type(error).__name__}: {error}"[:200]
    return call


def with_entropy(inputs: Inputs, more: dict[str, Any]) -> cce.Gradients:
    """Gradients of the mean loss less `BONUS` times the mean entropy."""
    result = cce.forward(*inputs, entropy=True, **more)
    return cce.backward(result, d_entropy=-BONUS / len(inputs.e))


def error_of_d_e(inputs: Inputs, more: dict[str, Any]) -> float:
    """The relative error of some tokens' rows of dE."""
    d_e = with_entropy(inputs, more).e
    assert d_e is not None, "all gradients are wanted"
    return relative_error(d_e, exact_d_e(inputs))


def exact_d_e(inputs: Inputs) -> Any:
    """(_TOKENS, D) float64: some tokens' rows of dE."""
    xp = cce.interchange.array_module(inputs.e)
    some = slice(0, _TOKENS)
    z = float64_logits(inputs, some)
    log_p = z - logsumexp(xp, z)[:, None]
    p = xp.exp(log_p)
    g = p * (1 + BONUS * (log_p - (p * log_p).sum(axis=1)[:, None]))
    g[xp.arange(len(z)), inputs.targets[some]] -= 1
    return (g / len(inputs.e)) @ inputs.c.astype(np.float64)


def relative_error(d_e: Any, exact: Any) -> float:
    """Of the first rows of dE, those that `exact` has."""
    xp = cce.interchange.array_module(exact)
    return float(xp.linalg.norm(d_e[: len(exact)].astype(np.float64) - exact) / xp.linalg.norm(exact))


# ---- distillation


def distillation(inputs: Inputs, pace: Pace) -> dict[str, Any]:
    """Errors, then times of the divergences from a teacher, and of these with gradients for the student, which are exact."""
    heads = *inputs[:2], (inputs.e * SHARPER).astype(inputs.e.dtype), inputs.c.copy()
    exact = functools.partial(cce.linear_cross_entropy_with_grad, *inputs, filter_eps=None)
    calls: dict[str, Call] = {CUBLAS: cublas.product(inputs), "exact gradients without a teacher": exact}
    errors = {}
    for kind in DIVERGENCES:
        errors[kind] = error_of_divergence(heads, kind)
        calls[kind] = functools.partial(cce.linear_distillation, *heads, kind=kind)
        calls[f"{kind}, with gradients"] = functools.partial(cce.linear_distillation_with_grad, *heads, kind=kind)
    return {"errors": errors, "calls": timed(calls, pace)}


def error_of_divergence(heads: tuple[Any, Any, Any, Any], kind: str) -> float:
    """The relative error of some tokens' rows of dE. Raises Wrong if it is large, or that of a token's loss is."""
    e, c, teacher_e, teacher_c = heads
    xp, some = cce.interchange.array_module(e), slice(0, _TOKENS)
    log_q, log_p = (float64_log_probabilities(xp, *head, some) for head in ((e, c), (teacher_e, teacher_c)))
    log_other = {"forward_kl": log_q, "reverse_kl": log_p, "jsd": xp.logaddexp(log_p, log_q) - np.log(2)}[kind]
    p, q = xp.exp(log_p), xp.exp(log_q)
    of_teacher, of_student = (p * (log_p - log_other)).sum(axis=1), q * (log_q - log_other)
    mean = of_student.sum(axis=1)
    loss = {"forward_kl": of_teacher, "reverse_kl": mean, "jsd": (of_teacher + mean) / 2}[kind]
    g = q - p if kind == "forward_kl" else (of_student - q * mean[:, None]) / (1 if kind == "reverse_kl" else 2)
    found, grads = cce.linear_distillation_with_grad(*heads, kind=kind, reduction="none")
    error = float((abs(found[some] - loss) / (1 + loss)).max())
    if not error <= _ERROR_AT_MOST:
        raise Wrong(f"{kind}: a token's divergence is off by {error:.3g} of 1 + its value")
    exact = g @ c.astype(np.float64)
    assert grads.e is not None, "all gradients are wanted"
    error = float(xp.linalg.norm(grads.e[some].astype(np.float64) - exact) / xp.linalg.norm(exact))
    if not error <= _WRONG:
        raise Wrong(f"{kind}: the error of dE is {error:.3g}")
    return error


def float64_log_probabilities(xp: Any, e: Any, c: Any, tokens: slice) -> Any:
    """(tokens, V) float64, of a head."""
    z = e[tokens].astype(np.float64) @ c.astype(np.float64).T
    return z - logsumexp(xp, z)[:, None]
