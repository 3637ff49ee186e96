"""A call of several ranks that share a vocabulary: what they agree on before it. `driver.py` has the way through the call."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cce_numba import driver, interchange
from cce_numba.arguments import Ids, Problem, Rows
from cce_numba.driver import Ranks
from cce_numba.interchange import Kind
from cce_numba.options import DEFAULTS, integer
from cce_numba.parallel.agreement import Agreed, Agreement, before_others_wait
from cce_numba.parallel.bounds import Bounds
from cce_numba.parallel.communicator import Communicator
from cce_numba.parallel.tokens import TokenShards
from cce_numba.plan import Plan

_OF_ROWS = ("bias",)  # whose length is that of the rank's own rows of c


@dataclass(eq=False)
class Sharing:
    """How a call's ranks share their work, as the caller says it.

    Attributes:
        communicator: what carries arrays between them.
        tokens_axis: the axis of e along which each rank has a part of it; None where all ranks have all of e.
        start: the first entry that this rank says it has, which must be that after the rows of the ranks before; or None.
        sums_e_grad: whether the gradient of e is summed over ranks.
        said: what else ranks must agree on, by name.
        agreement: the call's exchange, where it began before the arrays were looked at.
    """

    communicator: Communicator
    tokens_axis: int | None = None
    start: int | None = None
    sums_e_grad: bool = True
    said: dict[str, Any] = field(default_factory=dict)
    agreement: Agreement | None = None


def sharing_of(communicator: Communicator | None, tokens_axis: int | None) -> Sharing | None:
    """How ranks share the work, or None if there are none."""
    if communicator is None:
        if tokens_axis is not None:
            raise ValueError("tokens_axis: needs a communicator, got None")
        return None
    return Sharing(communicator, None if tokens_axis is None else integer("tokens_axis", tokens_axis))


@contextlib.contextmanager
def prepared(
    e: Any,
    c: Any,
    targets: Any,
    given: Mapping[str, Any],
    sharing: Sharing | None,
    only: Iterable[str] = DEFAULTS,
    *,
    kind: Kind | None = None,
    backend: str | None = None,
    plan: Plan | None = None,
    agreed: Agreed | None = None,
) -> Iterator[tuple[Problem, Plan, Ranks | None]]:
    """As `driver.prepared`, with the ranks that share the vocabulary, if `sharing` says that any do.

    `agreed`: what was agreed on before, for a backward. Raises Disagreement too, on all ranks, if they were called with
    different arguments, or one of them with wrong ones.
    """
    if sharing is None:
        with driver.prepared(e, c, targets, given, only, kind=kind, backend=backend, plan=plan) as both:
            yield (*both, None)
        return
    native_e = interchange.take("e", e)
    kind = kind or interchange.kind_of(e, native_e)
    with kind.current():
        if agreed is None:
            agreed = agree(native_e, c, targets, given, sharing)
        communicator, own_e, shards = sharing.communicator, native_e, None
        if sharing.tokens_axis is not None:
            shards = TokenShards(sharing.tokens_axis % own_e.ndim, agreed.e_rows)
            native_e = shards.gathered(communicator, own_e)
        rows = Rows(agreed.start(communicator.rank), agreed.total)
        with driver.prepared(
            native_e, c, targets, given, only, kind=kind, backend=backend, plan=plan, rows=rows
        ) as (problem, plan):  # fmt: skip
            tokens = None
            if shards is not None:
                tokens = shards, replace(problem, e=own_e.reshape(-1, own_e.shape[-1]), e_shape=tuple(own_e.shape))
            assert problem.shard is not None, "there are rows"
            problem = replace(problem, shard=replace(problem.shard, bounds=Bounds(communicator)))
            yield problem, plan, Ranks(communicator, tokens, sharing.sums_e_grad, agreed)


def agree(e: Any, c: Any, targets: Any, given: Mapping[str, Any], sharing: Sharing) -> Agreed:
    """What all ranks were given, so that each knows its place; raises Disagreement if that does not fit together.

    e: a NumPy or CuPy array.
    """
    on_device = interchange.is_on_device(e)
    agreement = sharing.agreement or Agreement(sharing.communicator, on_device)
    with before_others_wait(agreement):
        native_c = interchange.take("c", c)
        ids = targets.ids if isinstance(targets, Ids) else targets
        axis = sharing.tokens_axis
        if (axis is not None and not -e.ndim <= axis < e.ndim - 1) or axis == -1:
            raise ValueError(f"tokens_axis: must be an axis of e {tuple(e.shape)} but the last, or None, got {axis}")
        bias = given.get("bias")
        if bias is not None and tuple(bias.shape) != native_c.shape[:1]:
            raise ValueError(f"bias: must have shape (V,) = ({native_c.shape[0]},), got shape {tuple(bias.shape)}")
        places = [str(size) for size in e.shape]
        if axis is not None:
            places[axis] = "any"
        said: dict[str, Any] = {"e": f"{e.dtype} ({', '.join(places)})", "c": f"{native_c.dtype} (any, {native_c.shape[1:]})"}
        said["targets"] = _described(interchange.take("targets", ids), not on_device)
        said |= {"tokens_axis": axis} | sharing.said
        for name in sorted(given):
            # A seed may be another number in each step; on a device each one would be compared, and waited for.
            said[name] = "an integer" if name == "filter_seed" and on_device else _said(name, given[name])
        e_rows = 0 if axis is None else e.shape[axis]
        return agreement.of(said, native_c.shape[0], e_rows, sharing.start, interchange.array_module(e))


def _said(name: str, value: Any) -> Any:
    if not hasattr(value, "dtype") or not getattr(value, "shape", ()):
        return value if not hasattr(value, "dtype") else f"a number of {value.dtype}"
    return f"{value.dtype}" if name in _OF_ROWS else f"{value.dtype} {tuple(value.shape)}"


def _described(array: Any, on_host: bool) -> str:
    """Dtype, shape and, where looking is free, contents."""
    contents = f", contents {zlib.crc32(np.ascontiguousarray(array).tobytes()):08x}" if on_host else ""
    return f"{array.dtype} {tuple(array.shape)}{contents}"
