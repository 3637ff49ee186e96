"""What JAX adds to a call (bfloat16): `cce_numba.jax` under `jax.jit` against the direct call, and whether XLA copies arrays.

    python -m benchmarks jit --record jit_h100
    python -m benchmarks jit --small                    small shapes: does it run?

It runs where JAX's default device is: a GPU if JAX has one, else the CPU. The direct call is `linear_cross_entropy_with_grad`
on arrays of CuPy or NumPy with the same numbers. All are timed in turns, by the host's clock, from the call until its results
are there. Copies are told by addresses: e, c and targets must lie in the kernels' calls where the caller's arrays lie, and
gradients must lie in JAX's results where the kernels wrote them. Memory is the peak of JAX's allocator and, on a GPU, of CuPy's
pool, less the inputs and the gradients; it is left out where an earlier call of the process took more, which JAX does not
forget. The baseline stores the logits, under `jax.jit`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import cce_numba as cce
import cce_numba.jax as ccj
from benchmarks import options
from benchmarks.data import Inputs, Shape, calibrated
from benchmarks.errors import Wrong
from benchmarks.measure import device, record
from benchmarks.tables.cells import shape as shown_shape
from cce_numba.jax import buffers, callbacks

SHAPES: tuple[Shape, ...] = ((512, 32_768, 1024), (8192, 131_072, 2048))
SMALL_SHAPES: tuple[Shape, ...] = ((512, 8192, 256),)
DIRECT, OURS, STORED = "direct call", "cce_numba.jax", "stored logits"
# Relative errors at most, against the direct call. Ours are the same kernels. Stored logits are rounded to bfloat16, by up to
# 0.06 at 16, and so are e's and c's shares of a gradient.
_ERRORS = {OURS: 1e-3, STORED: 0.1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--small", action="store_true", help="small shapes alone")
    options.add_pace(parser, bursts=False)
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures, shows, records. Raises Wrong if a loss was wrong or arrays were copied."""
    console = Console(width=180)
    where = jax.devices()[0]
    results: dict[str, Any] = {"jax": jax.__version__, "device": where.device_kind, "rounds": arguments.rounds, "calls": []}
    for shape in SMALL_SHAPES if arguments.small else SHAPES:
        with console.status(f"{shape}"):
            results["calls"].append(measured(shape, arguments.rounds, where))
    console.print(shown(results["calls"]))
    if arguments.record:
        console.print(str(record.write(arguments.record, results)))
    if wrong := [f"{shown_shape(call)}: {call['wrong']}" for call in results["calls"] if call["wrong"]]:
        raise Wrong("; ".join(wrong))


def measured(shape: Shape, rounds: int, where: Any) -> dict[str, Any]:
    """All that is measured of one shape. Times are left out where something is wrong."""
    on_gpu = where.platform == "gpu"
    native = calibrated.make(*shape, device.cupy() if on_gpu else np)
    inputs = [as_jax(array, where) for array in native]
    losses = {OURS: ccj.linear_cross_entropy, STORED: stored_logits}
    steps = {name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))) for name, loss in losses.items()}
    calls = {DIRECT: functools.partial(direct, native, on_gpu)}
    calls |= {name: functools.partial(finished, step, inputs) for name, step in steps.items()}

    expected = calls[DIRECT]()
    found: dict[str, Any] = dict(zip("NVD", shape, strict=True)) | {"backend": cce.explain(*native).backend, "wrong": ""}
    found["extra_bytes"], found["errors"] = {}, {}
    for name in losses:  # ours first, since it takes less
        found["extra_bytes"][name] = extra_bytes(calls[name], inputs, where, on_gpu)
        found["errors"][name] = errors_of(calls[name](), expected)
    found["copied"] = copied(calls[OURS], inputs)
    off = [
        f"{name}: {of} is off by {error:.3g}"
        for name, errors in found["errors"].items()
        for of, error in errors.items()
        if not error <= _ERRORS[name]  # NaN is off as well
    ]
    found["wrong"] = "; ".join([*off, *(f"{name} was copied" for name in found["copied"])])
    if not found["wrong"]:
        found["ms"] = {name: record.summary(times) for name, times in in_turns(calls, rounds).items()}
    return found


def as_jax(array: Any, where: Any) -> jax.Array:
    """An array of JAX's with the same numbers, which JAX owns."""
    if array.dtype.kind == "i":
        return jax.device_put(jnp.from_dlpack(array).astype(jnp.int32), where)
    bits = jax.device_put(jnp.from_dlpack(array.view("int16")), where)  # not every library's DLPack knows bfloat16
    return jax.block_until_ready(jax.lax.bitcast_convert_type(bits, jnp.bfloat16))


def stored_logits(e: jax.Array, c: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean loss from logits that are stored in bfloat16, as a linear layer gives them."""
    logits = (e @ c.T).astype(jnp.float32)
    of_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return (jax.nn.logsumexp(logits, axis=-1) - of_target).mean()


def direct(native: Inputs, on_gpu: bool) -> tuple[Any, tuple[Any, Any]]:
    """Loss and gradients by the functions for arrays, when they are there."""
    loss, grads = cce.linear_cross_entropy_with_grad(*native)
    if on_gpu:
        device.wait()
    return loss, (grads.e, grads.c)


def finished(step: Callable[..., Any], inputs: list[jax.Array]) -> Any:
    """What a step returns, when it is there."""
    return jax.block_until_ready(step(*inputs))


def errors_of(found: Any, expected: Any) -> dict[str, float]:
    """Norms of the differences over the norms of what is expected."""
    pairs = zip(("loss", "e", "c"), jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    wide = {name: (on_host(x), on_host(y)) for name, x, y in pairs}
    return {name: float(np.linalg.norm(x - y) / np.linalg.norm(y)) for name, (x, y) in wide.items()}


def on_host(array: Any) -> np.ndarray:
    """A NumPy array of float32."""
    return np.asarray(array.get() if hasattr(array, "get") else array).astype(np.float32)


@contextlib.contextmanager
def watched() -> Iterator[list[dict[str, int]]]:
    """Inside, the addresses of what the kernels read and write are noted: a dict for each call, by name."""
    seen: list[dict[str, int]] = []
    run_forward, run_backward = callbacks.Forward.__call__, callbacks.Backward.__call__

    def forward(self: Any, context: Any, out: Any, arrays: Any) -> None:
        seen.append({name: buffers.address(buffer) for name, buffer in arrays.items()})
        run_forward(self, context, out, arrays)

    def backward(self: Any, context: Any, out: Any, arrays: Any, *others: Any) -> None:
        seen.append({name: buffers.address(buffer) for name, buffer in arrays.items()})
        seen[-1] |= {f"gradient of {name}": buffers.address(buffer) for name, buffer in out.items()}
        run_backward(self, context, out, arrays, *others)

    callbacks.Forward.__call__, callbacks.Backward.__call__ = forward, backward  # type: ignore
    try:
        yield seen
    finally:
        callbacks.Forward.__call__, callbacks.Backward.__call__ = run_forward, run_backward  # type: ignore


def copied(call: Callable[[], Any], inputs: list[jax.Array]) -> list[str]:
    """The names of arrays that lie elsewhere in the kernels' calls than for the caller."""
    with watched() as seen:
        _, grads = call()
    assert len(seen) == 2, "a forward and a backward"
    theirs = dict(zip(("e", "c", "targets"), inputs, strict=True))
    theirs |= {f"gradient of {name}": grad for name, grad in zip("ec", grads, strict=True)}
    addresses = {name: array.unsafe_buffer_pointer() for name, array in theirs.items()}
    return sorted({name for each in seen for name, address in each.items() if address != addresses[name]})


def extra_bytes(call: Callable[[], Any], inputs: list[jax.Array], where: Any, on_gpu: bool) -> int | None:
    """Peak of memory during a call, less inputs and gradients; None where JAX does not tell."""
    if not on_gpu or not (before := where.memory_stats()):
        return None
    pool = device.cupy().get_default_memory_pool()
    pool.free_all_blocks()
    kept = pool.total_bytes()
    call()
    peak = where.memory_stats()["peak_bytes_in_use"]
    if peak <= before["peak_bytes_in_use"]:
        return None
    return peak - before["bytes_in_use"] - sum(x.nbytes for x in inputs[:2]) + pool.total_bytes() - kept


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds from a call until its results are there, for each name and round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def shown(calls: list[dict[str, Any]]) -> Table:
    """A row for each shape and way."""
    table = Table("N x V x D", "way", "ms, median", "lowest", "highest", "extra MiB", "error of dE", "of dC", "copied")
    for call in calls:
        for name in (DIRECT, OURS, STORED):
            errors, ms = call["errors"].get(name, {}), call.get("ms", {}).get(name, {})
            extra = call.get("extra_bytes", {}).get(name)
            table.add_row(
                f"{shown_shape(call)}, {call['backend']}",
                name,
                *(f"{ms[of]:.2f}" if ms else "" for of in ("median_ms", "min_ms", "max_ms")),
                "" if extra is None else f"{extra / 2**20:.1f}",
                *(f"{errors[of]:.1e}" if errors else "" for of in "ec"),
                (", ".join(call["copied"]) or "nothing") if name == OURS else "",
            )
    return table
