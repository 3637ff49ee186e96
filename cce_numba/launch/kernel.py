"""Kernels with declared parameters, launched with addresses and scalars on CuPy's current stream.

A kernel takes an array as `types.CPointer` or `uint64`: its address, one value, where numba's own array argument has seven and
more. What belongs together is a record (`launch.record`). Arguments are packed and handed to the driver directly, which takes
the host a fraction of the time that numba's own dispatch takes.

What was compiled is kept on disk, see `cubin_cache`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, cast

import numpy as np
from numba import cuda
from numba.cuda import types

from cce_numba import gpu
from cce_numba.interchange import BFLOAT16
from cce_numba.launch import cubin_cache
from cce_numba.launch.record import flattened, kind_of

_P = ParamSpec("_P")


def pointer_to(dtype: Any) -> Any:
    """The numba type of an array's address; bfloat16 by its bits."""
    dtype = np.dtype(np.uint16) if dtype == BFLOAT16 else np.dtype(dtype)
    return types.CPointer(importlib.import_module("numba.cuda.np.numpy_support").from_dtype(dtype))


_FORMATS = {types.int32: "i", types.int64: "q", types.uint64: "Q", types.float32: "f"}


class Kernel:
    """A kernel for one signature, compiled for a device the first time that it is launched there.

    Attributes:
        function: the Python function.
        signature: numba's, of scalars, pointers, and named tuples of them.
        threads: of a CTA. Its registers are bounded so that one CTA fits on a multiprocessor.
        cluster: CTAs of a cluster.
        smem_bytes: dynamic shared memory of a CTA.
        identity: what tells it from all other kernels, by `kernel_factory`; without one it is not kept on disk.
    """

    identity: str | None = None

    def __init__(
        self, function: Callable[..., None], parameters: Any, *, threads: int, cluster: int = 1, smem_bytes: int = 0
    ) -> None:
        """`parameters`: what the function takes, in order: numba's types of scalars and pointers, and records."""
        signature = types.void(*map(kind_of, parameters)) if isinstance(parameters, tuple) else parameters
        self.function, self.signature = function, signature
        self.threads, self.cluster, self.smem_bytes = threads, cluster, smem_bytes
        self._depths = tuple(map(_depth, signature.args))
        # As C lays them out, which is how kernels take their arguments.
        self._arguments = struct.Struct("@" + "".join(_format(kind) for kind in signature.args))
        self._by_device: dict[int, Any] = {}
        # One place for arguments, filled for each launch; the driver has copied them when it returns.
        self._buffer, self._size_bytes = (
            ctypes.create_string_buffer(self._arguments.size),
            ctypes.c_size_t(self._arguments.size),
        )
        # CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE, CU_LAUNCH_PARAM_END of the driver API: cuLaunchKernel
        places = 1, ctypes.addressof(self._buffer), 2, ctypes.addressof(self._size_bytes), None
        self._extra = (ctypes.c_void_p * 5)(*places)
        self._extra_pointer = ctypes.addressof(self._extra)
        self._lock = threading.Lock()

    def launch(self, ctas: int, *values: Any) -> None:
        """Launches a grid of so many CTAs; `values` are the parameters: addresses, scalars, records."""
        if ctas == 0:
            return
        cuda = gpu.cupy().cuda
        device = cuda.runtime.getDevice()
        handle = (self._by_device.get(device) or self._compile(device))[0]
        stream = cuda.get_current_stream(device).ptr
        with self._lock:
            self._arguments.pack_into(self._buffer, 0, *self._numbers(values))
            cuda.driver.launchKernel(handle, ctas, 1, 1, self.threads, 1, 1, self.smem_bytes, stream, 0, self._extra_pointer)

    def _numbers(self, values: tuple[Any, ...]) -> list[Any]:
        """What is in the records, in order. Most hold scalars alone, for which this takes the least of the host's time."""
        numbers: list[Any] = []
        for value, depth in zip(values, self._depths, strict=True):
            if depth == 0:
                numbers.append(value)
            else:
                numbers += value if depth == 1 else flattened(value)
        return numbers

    def build(self) -> Any:
        """Numba's kernel, compiled for the current device. Linked as one whole (lto): else setmaxnreg would be ignored."""
        dispatcher = cuda.jit(self.signature, launch_bounds=(self.threads, 1), lto=True)(self.function)
        (compiled,) = dispatcher.overloads.values()
        return compiled

    def _compile(self, device: int) -> tuple[int, Any]:
        """The kernel's handle, and what keeps it loaded; from the disk if it is there."""
        with cuda.gpus[device]:
            path = cubin_cache.path_of(self, cuda.get_current_device().compute_capability)
            loaded, keep = cubin_cache.load(path), None
            if loaded is None:
                keep = self.build()
                loaded = keep.library.get_cufunc()
                cubin_cache.store(path, *cubin_cache.machine_code(keep))
            handle = int(loaded.kernel.handle)
        if self.smem_bytes > 48 * 1024:
            _set_attribute(handle, device, "MAX_DYNAMIC_SHARED_SIZE_BYTES", self.smem_bytes)
        if self.cluster > 1:
            for axis, size in (("WIDTH", self.cluster), ("HEIGHT", 1), ("DEPTH", 1)):
                _set_attribute(handle, device, f"REQUIRED_CLUSTER_{axis}", size)
        self._by_device[device] = handle, (loaded, keep)
        return self._by_device[device]


def kernel_factory(make: Callable[_P, Kernel]) -> Callable[_P, Kernel]:
    """`functools.cache` for a function that makes a kernel, out of its arguments alone: by them the kernel is kept on disk."""

    @functools.cache
    def made(*args: Any, **kwargs: Any) -> Kernel:
        kernel = make(*args, **kwargs)
        kernel.identity = cubin_cache.identity(make, *args, **kwargs)
        return kernel

    return cast(Callable[_P, Kernel], functools.update_wrapper(made, make))


def _set_attribute(handle: int, device: int, name: str, value: int) -> None:
    driver = importlib.import_module("cuda.bindings.driver")
    attribute = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
    (error,) = driver.cuKernelSetAttribute(attribute, value, driver.CUkernel(handle), driver.CUdevice(device))
    if int(error):
        raise RuntimeError(f"cuKernelSetAttribute: {error.name} for {name} = {value}")


def _depth(kind: Any) -> int:
    """0 for a scalar or an address, 1 for a tuple of them, 2 for one of tuples."""
    return 1 + max(map(_depth, kind), default=0) if isinstance(kind, types.BaseTuple) else 0


def _format(kind: Any) -> str:
    """struct's letter for a scalar or an address, those of its parts for a tuple or a record."""
    if isinstance(kind, types.BaseNamedTuple):
        return "".join(_format(part) for part in kind.types)
    if isinstance(kind, types.UniTuple):
        return _format(kind.dtype) * kind.count
    if isinstance(kind, types.CPointer):
        return "Q"
    if kind not in _FORMATS:
        raise TypeError(f"kernels here take {', '.join(map(str, _FORMATS))}, pointers and tuples of these, not {kind}")
    return _FORMATS[kind]
