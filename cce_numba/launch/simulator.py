"""Numba's simulator, which runs kernels without a GPU: made reliable, and as fast as it can be.

It runs each CUDA thread of a CTA as a Python thread, one CTA after the other. Kernels see plain NumPy arrays.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from numba import cuda

from cce_numba.interchange import BFLOAT16


def kernel(function: Callable[..., None]) -> Any:
    """The simulator's kernel of a Python function."""
    return cuda.jit(function)


def launch(kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    """Runs a kernel; the arrays among its arguments, and in its records, are of `array_argument`."""
    with steady():
        kernel[grid, block](*map(_outermost, arguments))


def array_argument(array: Any) -> Any:
    """A NumPy array as kernels see it; bfloat16, which numba has not, by its bits."""
    return array.view(np.uint16) if array.dtype == BFLOAT16 else array


def _outermost(argument: Any) -> Any:
    """An argument in the simulator's wrapper for arrays on a device.

    The simulator copies host arrays in and out, and only takes contiguous ones. What is in such a wrapper, or in a record, it
    uses where it is.
    """
    return _device_array_class()(argument) if isinstance(argument, np.ndarray) else argument


@functools.cache
def _device_array_class() -> Any:
    return importlib.import_module("numba.cuda.simulator.cudadrv.devicearray").FakeCUDAArray


@contextlib.contextmanager
def steady(make: Callable[[Any, Any, tuple[str, int]], np.ndarray] | None = None) -> Iterator[None]:
    """Within it, the threads of a simulated CTA take turns, and its shared arrays are really shared.

    Numba's own manager lets all threads run at once, and polls them until all have come to a barrier. Polling takes more time
    than the kernel, and where a barrier is missing, results differ from run to run. Here one thread runs at a time, from
    barrier to barrier, in an order that is shuffled for each barrier, and alike in each CTA. So a kernel gives the same every
    time.

    The simulator looks up a CTA's shared array by the line that asks for it, and makes one if there is none. Since the line is
    the key, no two shared arrays of a kernel may be made by the same line.

    Args:
        make: makes a shared array from its shape, dtype and line (file, number); by default one with anything in it.
    """
    simulated = importlib.import_module("numba.cuda.simulator.kernel")
    kernelapi = importlib.import_module("numba.cuda.simulator.kernelapi")
    # The notebooks' recorder puts a class of its own in its place, made from it.
    block_thread = next(kind for kind in simulated.BlockThread.__mro__ if kind.__module__ == simulated.__name__)
    make = make or (lambda shape, dtype, line: np.empty(shape, dtype))

    def shared_array(shared: Any, shape: Any, dtype: Any, alignment: None = None) -> np.ndarray:
        caller = sys._getframe(1)
        line = (caller.f_code.co_filename, caller.f_lineno)
        if line not in shared._allocations:
            shared._allocations[line] = make(shape, dtype, line)
        return shared._allocations[line]

    with (
        mock.patch.object(block_thread, "run", _run_thread),
        mock.patch.object(block_thread, "syncthreads", _syncthreads),
        mock.patch.object(simulated.BlockManager, "run", _run_block),
        mock.patch.object(kernelapi.FakeCUDAShared, "array", shared_array),
    ):
        yield


def _run_block(manager: Any, grid_point: tuple[int, ...], *arguments: Any) -> None:
    """Runs the threads of one CTA. Raises what the first thread that fails has raised."""
    simulated = importlib.import_module("numba.cuda.simulator.kernel")
    order = random.Random(0)
    manager.back = _locked()  # until a thread's turn is over
    threads = [
        simulated.BlockThread(functools.partial(manager._f, *arguments), manager, grid_point, point, manager._debug)
        for point in np.ndindex(*manager._block_dim)
    ]
    for thread in threads:
        thread.turn = _locked()
    waiting = threads[:]
    while waiting:
        order.shuffle(waiting)
        for thread in waiting:
            _give_turn(thread)
            if thread.exception:
                for other in threads:
                    if other.syncthreads_blocked:
                        other.abort = True
                        _give_turn(other)
                    if other.ident is not None:
                        other.join()
                raise thread.exception[0].with_traceback(thread.exception[1])
        waiting = [thread for thread in waiting if thread.syncthreads_blocked]  # the others have finished
    for thread in threads:
        thread.join()


def _locked() -> Any:
    """A lock that whoever wants it must wait for."""
    lock = threading.Lock()
    lock.acquire()
    return lock


def _give_turn(thread: Any) -> None:
    """Lets a thread run until it comes to a barrier or ends."""
    if thread.ident is None:
        thread.start()
    else:
        thread.syncthreads_blocked = False
        thread.turn.release()
    thread._manager.back.acquire()


def _syncthreads(thread: Any) -> None:
    """Instead of `BlockThread.syncthreads`."""
    thread.syncthreads_blocked = True
    thread._manager.back.release()
    thread.turn.acquire()
    if thread.abort:
        raise RuntimeError("another thread of the CTA has failed")


def _run_thread(thread: Any) -> None:
    """Instead of `BlockThread.run`."""
    try:
        thread._target()
    except Exception as error:
        words = f"tid={list(thread.threadIdx)} ctaid={list(thread.blockIdx)}" + (f": {error}" if str(error) else "")
        thread.exception = type(error)(words), error.__traceback__
    finally:
        thread._manager.back.release()
