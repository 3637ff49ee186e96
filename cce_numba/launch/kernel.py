"""Kernels that take addresses, numbers and records, launched on CuPy's current stream.

A kernel takes an array as its address, `types.CPointer` or `uint64`, which is one value; numba's own array argument has seven
and more (`array_kernel`). The arguments are packed into one block of bytes and handed to the driver directly, which takes the
host a fraction of the time that numba's own dispatch takes.

Machine code is kept on disk (`cubin_cache`), so a kernel is compiled once for a machine and not once for a process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from numba import cuda
from numba.cuda import types

from cce_numba import gpu
from cce_numba.launch import cubin_cache
from cce_numba.launch.identity import identity
from cce_numba.launch.packing import depth_of, layout_of, pointer_to
from cce_numba.launch.record import flattened, kind_of

__all__ = ["Kernel", "kernel_factory", "pointer_to", "recorded"]

_P = ParamSpec("_P")
_K = TypeVar("_K")

# What launches are told to, in place of the driver: the kernel, the grid, and the parameters, records taken apart.
Recorder = Callable[["Kernel", tuple[int, int, int], list[Any]], None]
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


class Kernel:
    """A kernel for one signature, compiled for a device the first time that it is launched there.

    Attributes:
        function: the Python function.
        signature: numba's, of scalars, pointers, arrays, and named tuples of them.
        block: threads of a CTA along x, y and z.
        threads: all threads of a CTA.
        ctas: how many CTAs a multiprocessor must have room for. It bounds the registers of a thread.
        cluster: CTAs of a cluster.
        smem_bytes: dynamic shared memory of a CTA.
        identity: what tells it from all other kernels (`identity.identity`); without one it is not kept on disk.
    """

    identity: str | None = None

    def __init__(
        self,
        function: Callable[..., None],
        parameters: tuple[Any, ...],
        *,
        threads: int | tuple[int, ...],
        ctas: int = 1,
        cluster: int = 1,
        smem_bytes: int = 0,
    ) -> None:
        """`parameters`: what the function takes, in order: numba's types of scalars and pointers, and records."""
        signature = types.void(*map(kind_of, parameters))
        self.function, self.signature = function, signature
        self.block = three_dimensions(threads)
        self.threads, self.ctas, self.cluster, self.smem_bytes = math.prod(self.block), ctas, cluster, smem_bytes
        self.layout, self._depths = layout_of(signature), tuple(map(depth_of, signature.args))
        self._by_device: dict[int, Any] = {}
        # One place for arguments, filled for each launch; the driver has copied them when it returns.
        self._buffer = ctypes.create_string_buffer(self.layout.size)
        self._parameters = ParameterBlock(ctypes.addressof(self._buffer), self.layout.size)
        self._lock = threading.Lock()

    def launch(self, ctas: int | tuple[int, ...], *values: Any) -> None:
        """Launches a grid of so many CTAs, along up to three dimensions; `values` are the parameters, records among them."""
        grid = three_dimensions(ctas)
        if 0 not in grid:
            self.launch_flat(grid, self._numbers(values))

    def launch_flat(self, grid: tuple[int, int, int], numbers: list[Any]) -> None:
        """Launches a grid that is not empty; `numbers` are the parameters, records taken apart."""
        if (recorder := _recorder.get()) is not None:
            recorder(self, grid, numbers)
            return
        cuda = gpu.cupy().cuda
        device = cuda.runtime.getDevice()
        handle, stream = self.handle(device), cuda.get_current_stream(device).ptr
        with self._lock:
            self.layout.pack_into(self._buffer, 0, *numbers)
            cuda.driver.launchKernel(handle, *grid, *self.block, self.smem_bytes, stream, 0, self._parameters.pointer)

    def handle(self, device: int) -> int:
        """The driver's handle of it on a device, which must be the current one; it is compiled there if it was not yet."""
        return (self._by_device.get(device) or self._compile(device))[0]

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
        """Numba's kernel, compiled for the current device.

        It is linked as one whole (lto): otherwise the assembler takes the device functions of its PTX for functions with any
        number of registers, and ignores setmaxnreg.
        """
        dispatcher = cuda.jit(self.signature, launch_bounds=(self.threads, self.ctas), lto=True)(self.function)
        (compiled,) = dispatcher.overloads.values()
        return compiled

    def path(self, cc: tuple[int, int]) -> Path | None:
        """The file for its machine code, for devices of a compute capability; None if it is not kept."""
        if self.identity is None:
            return None
        launch = [self.block, self.ctas, self.cluster, self.smem_bytes]
        facts = {"kernel": self.identity, "signature": str(self.signature), "launch": launch}
        return cubin_cache.path_of(self.function.__name__, facts, cc)

    def _compile(self, device: int) -> tuple[int, Any]:
        """The kernel's handle, and what keeps it loaded; from the disk if it is there."""
        with cuda.gpus[device]:
            cc = cuda.get_current_device().compute_capability
            path = self.path(cc)
            loaded, keep = cubin_cache.load(path), None
            if loaded is None:
                keep = self.build()
                loaded = keep.library.get_cufunc()
                cubin_cache.store(path, *machine_code(keep), self.identity or "", cc)
            handle = int(loaded.kernel.handle)
        if self.smem_bytes > 48 * 1024:
            _set_attribute(handle, device, "MAX_DYNAMIC_SHARED_SIZE_BYTES", self.smem_bytes)
        if self.cluster > 1:
            for axis, size in (("WIDTH", self.cluster), ("HEIGHT", 1), ("DEPTH", 1)):
                _set_attribute(handle, device, f"REQUIRED_CLUSTER_{axis}", size)
        self._by_device[device] = handle, (loaded, keep)
        return self._by_device[device]


def kernel_factory(make: Callable[_P, _K]) -> Callable[_P, _K]:
    """`functools.cache` for a function that makes a kernel (a `Kernel` or an `ArrayKernel`) out of its arguments alone.

    The function and its arguments are the kernel's identity, under which it is kept on disk.
    """

    @functools.cache
    def made(*args: Any, **kwargs: Any) -> Any:
        kernel: Any = make(*args, **kwargs)
        kernel.identity = identity(make, *args, **kwargs)
        return kernel

    return cast(Callable[_P, _K], functools.update_wrapper(made, make))


class ParameterBlock:
    """Tells the driver where a kernel's parameters lie: `pointer` is what cuLaunchKernel takes as `extra`."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self._size_bytes = ctypes.c_size_t(size_bytes)
        # CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE, CU_LAUNCH_PARAM_END of the driver API
        self._extra = (ctypes.c_void_p * 5)(1, address, 2, ctypes.addressof(self._size_bytes), None)
        self.pointer = ctypes.addressof(self._extra)


@contextmanager
def recorded() -> Iterator[list[Kernel]]:
    """Inside, and in this thread, launches run nothing: the kernels that they are of are added to the list, in order."""
    kernels: list[Kernel] = []
    with told_to(lambda kernel, grid, numbers: kernels.append(kernel)):
        yield kernels


@contextmanager
def told_to(recorder: Recorder) -> Iterator[None]:
    """Inside, and in this thread, launches run nothing, and are told to the recorder."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def is_recorded() -> bool:
    """Whether launches of this thread run nothing."""
    return _recorder.get() is not None


def machine_code(compiled: Any) -> tuple[str, bytes]:
    """A kernel's name, and the file that the driver loads, out of what numba has compiled for the current device."""
    return compiled.entry_name, compiled.library.get_cubin().code


def three_dimensions(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    """The size of a grid or of a block along x, y and z.

    >>> three_dimensions(7), three_dimensions((2, 3))
    ((7, 1, 1), (2, 3, 1))
    """
    x, y, z, *_ = (size, 1, 1) if isinstance(size, int) else (*size, 1, 1)
    return x, y, z


def _set_attribute(handle: int, device: int, name: str, value: int) -> None:
    driver = importlib.import_module("cuda.bindings.driver")
    attribute = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
    (error,) = driver.cuKernelSetAttribute(attribute, value, driver.CUkernel(handle), driver.CUdevice(device))
    if int(error):
        raise RuntimeError(f"cuKernelSetAttribute: {error.name} for {name} = {value}")
