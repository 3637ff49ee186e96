"""Tokens in shards (sequence parallel): a rank has some rows of e, gathers the others', and gets its rows' gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cce_numba import interchange
from cce_numba.parallel.communicator import Communicator


@dataclass(frozen=True)
class TokenShards:
    """How ranks share e.

    Attributes:
        axis: the axis of e along which each rank has a part, >= 0.
        counts: how long each rank's part is; any numbers.
    """

    axis: int
    counts: tuple[int, ...]

    def gathered(self, communicator: Communicator, e: Any) -> Any:
        """All of e, out of this rank's part."""
        xp: Any = interchange.array_module(e)
        bits = e.view(f"u{e.itemsize}")  # CuPy need not know how to copy bfloat16
        rows = _gather_rows(communicator, xp.moveaxis(bits, self.axis, 0), self.counts)
        return xp.ascontiguousarray(xp.moveaxis(rows, 0, self.axis)).view(e.dtype)

    def own_sum(self, communicator: Communicator, d_e: Any, own_shape: tuple[int, ...]) -> Any:
        """(n, D) the sum over ranks of d_e (N, D), at the n tokens of this rank, whose part of e has `own_shape`."""
        xp: Any = interchange.array_module(d_e)
        shape = (*own_shape[: self.axis], sum(self.counts), *own_shape[self.axis + 1 :])
        rows = xp.ascontiguousarray(xp.moveaxis(d_e.reshape(shape), self.axis, 0))
        own = _sum_own_rows(communicator, rows, self.counts)
        return xp.moveaxis(own, 0, self.axis).reshape(-1, own_shape[-1])


def _gather_rows(communicator: Communicator, array: Any, counts: Sequence[int]) -> Any:
    """(sum of counts, ...) every rank's rows, of which rank i has counts[i]."""
    xp: Any = interchange.array_module(array)
    longest = max(counts)
    if longest == 0:
        return array
    bits = xp.ascontiguousarray(array).view(f"u{array.itemsize}")
    padded = xp.zeros((longest, *array.shape[1:]), bits.dtype)
    padded[: len(array)] = bits
    every = communicator.all_gather(padded.reshape(-1).view("u1")).reshape(len(counts), -1).view(bits.dtype)
    every = every.reshape(len(counts), *padded.shape)
    if min(counts) == longest:
        return every.reshape(-1, *array.shape[1:]).view(array.dtype)
    return xp.concatenate([rows[:count] for rows, count in zip(every, counts, strict=True)]).view(array.dtype)


def _sum_own_rows(communicator: Communicator, array: Any, counts: Sequence[int]) -> Any:
    """(counts[rank], ...) the sum over ranks of this rank's rows of an array (sum of counts, ...)."""
    xp: Any = interchange.array_module(array)
    longest, rest = max(counts), array.shape[1:]
    if longest == 0:
        return array
    if min(counts) == longest:
        padded = xp.ascontiguousarray(array).reshape(len(counts), longest, *rest)
    else:
        padded, first = xp.zeros((len(counts), longest, *rest), array.dtype), 0
        for place, count in enumerate(counts):
            padded[place, :count] = array[first : first + count]
            first += count
    return communicator.reduce_scatter(padded)[: counts[communicator.rank]]
