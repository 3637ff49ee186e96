"""Compiles kernels for a device that is not there, into the cache on disk, where a device finds them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from cce_numba.launch import cubin_cache
from cce_numba.launch.kernel import Kernel, machine_code


def precompile(kernel: Kernel, cc: tuple[int, int] = (9, 0)) -> Path:
    """Compiles a kernel without a GPU, for devices of a compute capability, which then find it in the cache's directory.

    No other thread may compile meanwhile, since numba is made to believe that the device is there.

    Args:
        kernel: of a `kernel.kernel_factory`.
        cc: major and minor number.

    Returns:
        The file, which may have been there before.

    Raises:
        ValueError: the kernel is not kept: the cache is off, sources are newer than this process, or the kernel is of no
            `kernel_factory` of this package, or of one that was told what `identity` cannot tell apart.
        OSError: the file cannot be written.
    """
    path = kernel.path(cc)
    if path is None:
        raise ValueError(f"kernel must be one that is kept, with the cache on (CCE_CACHE_DIR); {kernel.identity} is not")
    if cubin_cache.read(path) is None:
        with compiling_for(cc):
            symbol, image = machine_code(kernel.build())
            cubin_cache.write(path, symbol, image, kernel.identity or "", cc)
    return path


@contextmanager
def compiling_for(cc: tuple[int, int]) -> Iterator[None]:
    """Inside, numba compiles for a compute capability as if there were such a device, and loads nothing."""
    dispatcher = importlib.import_module("numba.cuda.dispatcher")
    library = importlib.import_module("numba.cuda.codegen").CUDACodeLibrary
    full = (*cc, "a" if cc >= (9, 0) else "")  # as numba for a device
    with (
        mock.patch.object(dispatcher, "get_current_device", return_value=SimpleNamespace(compute_capability=cc)),
        mock.patch.object(dispatcher._Kernel, "bind"),
        mock.patch.object(library, "_ensure_cc", lambda self, asked: asked or full),
    ):
        yield
