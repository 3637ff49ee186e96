"""That all ranks were called with the same arguments: a small exchange before anything else, so that they do not hang instead.

Each rank says what it was given, name by name, and how many rows of the classifier it has; or that its own arguments are
wrong. On the host that is done in each call. On a device it would wait for the device, so it is done in the first call with
given shapes, dtypes and options, and remembered. After that a rank that alone has other shapes is not found out: then what
helps is the communicator's own time-out.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cce_numba.parallel.communicator import Communicator

_BYTES = 4096  # of what a rank says
_ERROR = "error"
_MOST_KNOWN = 1024
_KNOWN = "_agreed_by_cce_numba"  # an attribute of communicators: what was agreed on, for devices


class Disagreement(ValueError):
    """Ranks were called with different arguments, or one of them has raised an error of its own."""


@dataclass(frozen=True)
class Agreed:
    """What ranks have told each other: of each rank, in their order, its rows of the classifier and of e."""

    c_rows: tuple[int, ...]
    e_rows: tuple[int, ...]

    def start(self, rank: int) -> int:
        """The first entry of a rank's shard."""
        return sum(self.c_rows[:rank])

    @property
    def total(self) -> int:
        """Entries of the vocabulary."""
        return sum(self.c_rows)


@dataclass(eq=False)
class Agreement:
    """One call's exchange. `on_device`: whether the arrays are on a device."""

    communicator: Communicator
    on_device: bool
    is_done: bool = False

    def of(self, said: Mapping[str, Any], c_rows: int, e_rows: int, start: int | None, array_module: Any) -> Agreed:
        """Tells all ranks what this one was given, and returns what they have. Raises Disagreement, the same on all ranks.

        said: by argument, anything whose repr is the same where ranks agree. c_rows and e_rows may differ. start: the
            first entry that this rank says it has, or None. array_module: NumPy or CuPy, of whose arrays the exchange is made.
        """
        known: dict[Any, Agreed] = self.communicator.__dict__.setdefault(_KNOWN, {}) if self.on_device else {}
        key = json.dumps({name: repr(value) for name, value in said.items()}), c_rows, e_rows, start
        if (agreed := known.get(key)) is not None:
            self.is_done = True
            return agreed
        every = self._exchange({"said": json.loads(key[0]), "rows": [c_rows, e_rows, start]}, array_module)
        _check(every)
        if len(known) >= _MOST_KNOWN:
            known.clear()
        c_rows_of, e_rows_of, starts = zip(*(each["rows"] for each in every), strict=True)
        known[key] = agreed = Agreed(c_rows_of, e_rows_of)
        for rank, said_start in enumerate(starts):
            if said_start not in (None, agreed.start(rank)):
                raise Disagreement(
                    f"vocab_parallel_options: start must be {agreed.start(rank)} on rank {rank}, after the rows of the ranks "
                    f"before it, {list(c_rows_of)}, got {said_start}"
                )
        return agreed

    def _exchange(self, told: Mapping[str, Any], array_module: Any) -> list[dict[str, Any]]:
        self.is_done = True
        text = json.dumps(told).encode()
        if len(text) > _BYTES:
            short = {name: f"(checksum {zlib.crc32(value.encode()):08x})" for name, value in told["said"].items()}
            text = json.dumps({**told, "said": short}).encode()
        array = array_module.asarray(np.frombuffer(text.ljust(_BYTES), np.uint8).copy())
        every = self.communicator.all_gather(array)
        every = every.get() if hasattr(every, "get") else every
        return [json.loads(bytes(row)) for row in every]

    def decline(self, error: BaseException) -> None:
        """Tells the other ranks that this one raises an error, in place of what it was given."""
        if not self.is_done and not self.on_device:
            with contextlib.suppress(Exception):  # the error is of more interest
                self._exchange(
                    {_ERROR: f"{type(error).__name__}: {error}"[: _BYTES // 4], "said": {}, "rows": [0, 0, None]}, np
                )


@contextlib.contextmanager
def before_others_wait(agreement: Agreement | None) -> Iterator[None]:
    """Inside, an error of this rank before the exchange is told to the others, which raise too. Nothing to do for None."""
    try:
        yield
    except Exception as error:
        if agreement is not None:
            agreement.decline(error)
        raise


def _check(every: list[dict[str, Any]]) -> None:
    for rank, told in enumerate(every):
        if _ERROR in told:
            raise Disagreement(f"rank {rank}: raised {told[_ERROR]}")
    first = every[0]["said"]
    for rank, told in enumerate(every):
        said = told["said"]
        for name in (*first, *(name for name in said if name not in first)):
            ours, others = said.get(name, "nothing"), first.get(name, "nothing")
            if ours != others:
                raise Disagreement(f"{name}: must be the same on all ranks, got {others} on rank 0 and {ours} on rank {rank}")
