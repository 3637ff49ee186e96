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
from cce_numba.integers import ceil_div

_T = TypeVar("_T")
_SMALL = 2**25  # multiplications in a product, which one thread does in a millisecond or so
_FEWEST_ROWS = 64  # of a product, that are worth a call of their own
_count: ContextVar[int] = ContextVar("threads", default=1)


@contextlib.contextmanager
def of(p: Problem) -> Iterator[None]:
    """Inside, and in this thread, work is shared by as many threads as the caller's library may take.

    For PyTorch's tensors that is `torch.get_num_threads()`. For other arrays it is what NumPy's BLAS may take, which
    OPENBLAS_NUM_THREADS, OMP_NUM_THREADS and `threadpoolctl` choose. A small problem is not worth waking another thread.

    Each product is left to one thread. OpenBLAS's own threads wait for each other in a loop at every product, which takes many
    times as long as the product if another process keeps a core busy.
    """
    count = blas.threads() or _cores()
    if p.kind.library == "torch":
        count = sys.modules["torch"].get_num_threads()
    token = _count.set(1 if p.N * p.V * p.D < _SMALL else max(1, min(count, _cores())))
    try:
        with blas.limited(1):
            yield
    finally:
        _count.reset(token)


@contextlib.contextmanager
def at_most(count: int) -> Iterator[None]:
    """Inside, and in this thread, no more threads than these share work."""
    token = _count.set(max(1, min(count, _allowed())))
    try:
        yield
    finally:
        _count.reset(token)


def spans(total: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Consecutive [start, stop), two for each thread: a multiple of `multiple` long, all but the last.

    More than one for each thread, so that one that gets less of its core leaves work to the others.
    """
    step = ceil_div(total, 2 * _allowed()) if _allowed() > 1 else total
    step = max(1, ceil_div(step, multiple)) * multiple
    return ((start, min(start + step, total)) for start in range(0, total, step))


def multiply(a: Any, b: Any, out: Any = None) -> Any:
    """a (m, k) @ b (k, n), its rows shared among threads."""
    if out is None:
        out = np.empty((a.shape[0], b.shape[1]), a.dtype)

    def part(span: tuple[int, int]) -> None:
        rows = slice(*span)
        np.matmul(a[rows], b, out=out[rows])

    for_each(part, spans(len(a), _FEWEST_ROWS))
    return out


def for_each(function: Callable[[_T], Any], items: Iterable[_T]) -> None:
    """Calls the function with each item, in this thread and others, for work that releases the interpreter lock.

    Raises what a call raises; then not all items may have had their turn. Where no other thread can be had, since the
    interpreter is shutting down, this thread does all of it.
    """
    waiting = deque(items)
    shares = len(waiting) > 1

    def work() -> None:
        # Each thread has its own settings. Inf and nan speak for themselves; and what is shared already is not shared again.
        with np.errstate(all="ignore"), at_most(1) if shares else contextlib.nullcontext():
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
    for _ in range(min(_allowed(), len(waiting)) - 1):
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


def _allowed() -> int:
    return _count.get()


@cache
def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="cce_numba")


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads: it makes its own
    os.register_at_fork(after_in_child=_pool.cache_clear)
