"""Which backend runs a problem, with what tiles and memory, and why: decided before anything is launched."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

from cce_numba.arguments import Outline, Problem
from cce_numba.backend import BACKENDS, BackendUnavailable, backend_module
from cce_numba.options import Options
from cce_numba.survivors import SURVIVOR_BLOCK


@dataclass(frozen=True, eq=False)
class Plan:
    """What will run: the backend, its tiles, and the bytes that it takes beyond inputs and gradients.

    Attributes:
        backend: name of the backend.
        how: one line on how it will run.
        tiles: the backend's own tile sizes, a frozen dataclass.
        forward_bytes: workspace of the forward.
        survivor_bytes: survivor bits, which say what the backward must look at, kept from the forward to the backward.
        backward_bytes: workspace of the backward.
        stored_logits_bytes: what the logits would take if they were stored once, for comparison.
        rejected: why each backend that was preferred to this one was not taken.
        filter: one line on what the gradients leave out, and whether that is right on average.
        coarse_eps: a higher threshold than the filter's own, for the gradients of `c` and `bias` with `filter="drop"`, or None.
            These gradients may also leave out an entry for a block if its probability is below this in all of the block's
            tokens, and it is the target of none of them.
        kept_bytes: logits that are kept from the forward to the backward, so that they need not be computed again, if gradients
            are wanted that are exact: as many as `workspace_bytes` has room for.
    """

    backend: str
    how: str
    tiles: Any
    forward_bytes: int
    survivor_bytes: int
    backward_bytes: int
    stored_logits_bytes: int
    rejected: dict[str, str] = field(default_factory=dict)
    filter: str = ""
    coarse_eps: float | None = None
    kept_bytes: int = 0

    def __str__(self) -> str:
        lines = [f"backend {self.backend}: {self.how}", f"  filter: {self.filter}", f"  tiles: {self.tiles}"]
        lines += [f"  {name}: {_mebibytes(size)}" for name, size in self.memory().items()]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)

    def memory(self) -> dict[str, int]:
        """Bytes by purpose, for tables."""
        return {
            "forward workspace": self.forward_bytes,
            "survivor bits": self.survivor_bytes,
            **({"kept logits": self.kept_bytes} if self.kept_bytes else {}),
            "backward workspace": self.backward_bytes,
            "stored logits would take": self.stored_logits_bytes,
        }


def choose(p: Problem, backend: str | None) -> Plan:
    """The plan of the forced backend, or of the first in `BACKENDS` that can take the problem; errors of `choose_backend`."""
    name, rejected = choose_backend(p, backend)
    if p.shard is not None and not p.V:
        how = "this rank has no rows of the classifier, and computes nothing"
        return Plan(name, how, None, 0, 0, 0, 0, rejected, _filter(p.options, SURVIVOR_BLOCK))
    return _completed(backend_module(name).plan(p), tuple(rejected.items()), p.options)


@functools.lru_cache(maxsize=256)
def _completed(plan: Plan, rejected: tuple[tuple[str, str], ...], options: Options) -> Plan:
    """With what no backend says of its own plan; of the same plan always the same object."""
    return replace(plan, rejected=dict(rejected), filter=_filter(options, plan.tiles.survivor_block))


def choose_backend(p: Outline | Problem, backend: str | None) -> tuple[str, dict[str, str]]:
    """The name of the forced backend, or of the first in `BACKENDS` that can take the problem, and why not those before it.

    Raises ValueError for a name that is none, BackendUnavailable if the forced one (or every one) cannot, NotImplementedError
    if one could but for an extra that it does not have yet.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    rejected: dict[str, str] = {}
    unfinished: list[str] = []
    for name in (backend,) if backend else BACKENDS:
        module = backend_module(name)
        reason = module.why_not(p)
        if reason is None and not backend:
            reason = why_on_request(p, module)
        if reason is None:
            if not (lacking := p.extras - module.EXTRAS):
                return name, rejected
            reason = f"it does not have {', '.join(sorted(lacking))} yet"
            unfinished.append(f"backend {name!r} does not have it yet: {', '.join(sorted(lacking))}")
        rejected[name] = reason
    if unfinished:
        raise NotImplementedError(f"{', '.join(sorted(p.extras))}: {'; '.join(unfinished)}")
    if backend:
        raise BackendUnavailable(f"backend: {backend!r} cannot run this: {rejected[backend]}")
    raise BackendUnavailable("no backend can run this:\n" + "\n".join(f"  {name}: {why}" for name, why in rejected.items()))


def why_on_request(p: Outline | Problem, module: Any) -> str | None:
    """Why a backend that could take the problem does so only if it is asked for by name, or None."""
    if p.dtype not in module.ON_REQUEST or p.options.allow_tf32:
        return None
    return f"it takes {p.dtype} only on request: by its name, or, rounded to tf32, by allow_tf32=True"


@functools.lru_cache(maxsize=256)
def _filter(options: Options, block: int) -> str:
    """What the filter does, for blocks of so many tokens."""
    if options.smooths_capped:
        return "none, gradients are exact: nothing is filtered, since labels are smoothed under a softcap"
    if not options.filters:
        return "none, gradients are exact"
    rare = f"an entry whose probability is below {options.filter_eps:.3g} in all {block} tokens of a block, and which is the "
    rare += "target of none,"
    if options.is_unbiased:
        what = (
            f"unbiased, gradients are right on average: {rare} survives by chance and is then multiplied, to make up for those "
        )
        what += "that do not"
    else:
        what = f"drop, gradients are biased: {rare} is left out of them"
    if not options.filter_e_grad:
        what += "; the gradient of e is exact"
        if options.batch_invariant:
            what += ", so that a token's row of it does not depend on other tokens"
    if not options.filter_c_grad:
        what += "; the gradients of c and bias are exact"
    return what


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
