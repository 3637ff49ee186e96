"""The threads that a call works with: how many it may take, and how its work is shared among them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import numpy as np

from cce_numba.arguments import Problem
from cce_numba.cpu import blas

_T = TypeVar("_T")
_count: ContextVar[int | None] = ContextVar("threads", default=None)


@contextlib.contextmanager
def of(p: Problem) -> Iterator[None]:
    """Inside, and in this thread, work and products take as many threads as the caller's library may take.

    For PyTorch's tensors that is `torch.get_num_threads()`. For other arrays it is what NumPy's BLAS may take, which
    OPENBLAS_NUM_THREADS, OMP_NUM_THREADS and `threadpoolctl` choose.
    """
    of_blas = blas.threads()
    count = of_blas or _cores()
    if p.kind.library == "torch":
        count = sys.modules["torch"].get_num_threads()
    count = max(1, min(count, _cores()))
    token = _count.set(count)
    try:
        with blas.limited(count) if of_blas is not None and count < of_blas else contextlib.nullcontext():
            yield
    finally:
        _count.reset(token)


def for_each(function: Callable[[_T], Any], items: Iterable[_T]) -> None:
    """Calls the function with each item, in this thread and others, for work that releases the interpreter lock.

    Raises what a call raises; then not all items may have had their turn. Where no other thread can be had, since the
    interpreter is shutting down, this thread does all of it.
    """
    waiting = deque(items)

    def work() -> None:
        with np.errstate(all="ignore"):  # each thread has its own; inf and nan speak for themselves
            while waiting:
                try:
                    item = waiting.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    function(item)
                except BaseException:
                    waiting.clear()
                    raise

    helpers = []
    for _ in range(min(_count.get() or _cores(), len(waiting)) - 1):
        try:
            helpers.append(_pool().submit(work))
        except RuntimeError:
            break
    try:
        work()
    finally:
        done = [helper for helper in helpers if not helper.cancel()]
        errors = [helper.exception() for helper in done]
    for error in errors:
        if error is not None:
            raise error


@cache
def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="cce_numba")


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads: it makes its own
    os.register_at_fork(after_in_child=_pool.cache_clear)
