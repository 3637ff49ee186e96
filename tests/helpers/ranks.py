"""Ranks that are threads of this process, for tests: what `torch.distributed` does, without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class ThreadCommunicator:
    """One rank of several threads. `calls` lists what was carried: an operation's name, and bytes."""

    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank, self.size, self.shared, self.calls = rank, shared.size, shared, []

    def _exchanged(self, name: str, array: np.ndarray) -> list[np.ndarray]:
        self.calls.append((name, array.nbytes))
        self.shared.slots[self.rank] = array
        self.shared.barrier.wait()
        every = [np.array(slot) for slot in self.shared.slots]
        self.shared.barrier.wait()
        if len({(slot.shape, slot.dtype) for slot in every}) > 1:
            raise RuntimeError(f"{name}: arrays of different shapes")
        return every

    def all_gather(self, array: np.ndarray) -> np.ndarray:
        return np.stack(self._exchanged("all_gather", array))

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        return sum(self._exchanged("all_reduce", array))

    def reduce_scatter(self, array: np.ndarray) -> np.ndarray:
        return sum(self._exchanged("reduce_scatter", array))[self.rank]


class Shared:
    """What the threads share."""

    def __init__(self, size: int) -> None:
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size, timeout=60)


def on_ranks(size: int, function: Callable[[ThreadCommunicator], Any]) -> list[Any]:
    """What `function` returns on each rank; the first error of a rank is raised here, or returned if it returns them."""
    shared, results, errors = Shared(size), [None] * size, [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadCommunicator(rank, shared))
        except BaseException as error:
            errors[rank] = error
            if not isinstance(error, threading.BrokenBarrierError):
                shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [error for error in errors if error is not None and not isinstance(error, threading.BrokenBarrierError)]
    for error in real or [error for error in errors if error is not None]:
        raise error
    return results
