"""Kernels with an explicit signature, launched with addresses and scalars on CuPy's current stream.

A kernel takes `types.CPointer` or `uint64` for an array: its address, one value, where numba's own array argument has seven and more.
The compiled kernel is launched directly (`cuda.core`), which takes the host a fraction of numba's own dispatch.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba.interchange import BFLOAT16


def pointer_to(dtype: Any) -> Any:
    """The numba type of an array's address; bfloat16 by its bits."""
    dtype = np.dtype(np.uint16) if dtype == BFLOAT16 else np.dtype(dtype)
    return types.CPointer(importlib.import_module("numba.cuda.np.numpy_support").from_dtype(dtype))


class Kernel:
    """A kernel for one signature, compiled for a device the first time that it is launched there.

    Attributes:
        function: the Python function.
        signature: numba's, of scalars and pointers.
        threads: of a CTA. Its registers are bounded so that one CTA fits on a multiprocessor.
        cluster: CTAs of a cluster.
        smem_bytes: dynamic shared memory of a CTA.
    """

    def __init__(
        self, function: Callable[..., None], signature: Any, *, threads: int, cluster: int = 1, smem_bytes: int = 0
    ) -> None:
        self.function, self.signature = function, signature
        self.threads, self.cluster, self.smem_bytes = threads, cluster, smem_bytes
        self._convert = tuple(_converter(kind) for kind in signature.args)
        self._by_device: dict[int, Any] = {}
        self._configs: dict[int, Any] = {}

    def launch(self, ctas: int, *values: Any) -> None:
        """Launches a grid of so many CTAs; `values` are addresses, scalars and tuples of them, as in the signature."""
        if ctas == 0:
            return
        cupy, core = _modules()
        device = cupy.cuda.runtime.getDevice()
        compiled = self._by_device.get(device) or self._compile(device)
        config = self._configs.get(ctas) or self._configure(ctas)
        arguments: list[Any] = []
        for convert, value in zip(self._convert, values, strict=True):
            if type(value) is tuple:
                arguments.extend(map(convert, value))
            else:
                arguments.append(convert(value))
        core.launch(_stream(cupy.cuda.get_current_stream().ptr), config, compiled, *arguments)

    def _configure(self, ctas: int) -> Any:
        if len(self._configs) >= 64:
            self._configs.clear()
        cluster = {"cluster": self.cluster} if self.cluster > 1 else {}
        grid = ctas // self.cluster  # cuda.core counts clusters
        config = _modules()[1].LaunchConfig(grid=grid, block=self.threads, shmem_size=self.smem_bytes, **cluster)
        self._configs[ctas] = config
        return config

    def _compile(self, device: int) -> Any:
        driver = importlib.import_module("cuda.bindings.driver")
        dispatcher = cuda.jit(self.signature, launch_bounds=(self.threads, 1), lto=True)(self.function)
        (compiled,) = dispatcher.overloads.values()
        kernel = compiled._codelibrary.get_cufunc().kernel
        if self.smem_bytes > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (error,) = driver.cuKernelSetAttribute(
                attribute, self.smem_bytes, driver.CUkernel(int(kernel.handle)), driver.CUdevice(device)
            )
            if int(error):
                raise RuntimeError(f"cuKernelSetAttribute: {error.name}, for {self.smem_bytes} bytes of shared memory")
        self._dispatcher = dispatcher  # keeps the module loaded
        self._by_device[device] = kernel
        return kernel


_C_TYPES = {
    types.int32: ctypes.c_int32,
    types.int64: ctypes.c_int64,
    types.uint64: ctypes.c_uint64,
    types.float32: ctypes.c_float,
}


def _converter(kind: Any) -> Any:
    """From a Python number to what the kernel takes; a tuple is taken number by number."""
    return _C_TYPES.get(kind.dtype if isinstance(kind, types.UniTuple) else kind, ctypes.c_uint64)


@functools.cache
def _modules() -> tuple[Any, Any]:
    return importlib.import_module("cupy"), importlib.import_module("cuda.core")


@functools.lru_cache(maxsize=64)
def _stream(pointer: int) -> Any:
    return _modules()[1].Stream.from_handle(pointer)
