"""A GPU that is not there, for times of the host alone: CuPy's own arrays, in memory that nobody touches, and launches that end
where the driver would begin.

So what a call costs the host can be measured, and profiled, without a GPU. What the driver takes for a launch (about 2 us), and
CuPy for an operation on arrays (about 10 us each), is not in these times, and launches and operations are counted instead.
"""

from __future__ import annotations

import collections
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from cce_numba import gpu, interchange, recurring
from cce_numba.launch.kernel import Kernel
from cce_numba.launch.program import Programs

_ADDRESS = 2**60  # far from all real ones
_ALIGNMENT_BYTES = 512  # of PyTorch's memory on CUDA
_MULTIPROCESSORS = 132
_OPERATORS = (
    *("add", "sub", "mul", "truediv", "eq", "ne", "lt", "le", "gt", "ge", "and", "or"),
    *("radd", "rsub", "rmul", "rtruediv", "iadd", "isub", "imul", "itruediv", "neg", "abs", "invert", "matmul"),
)
_FUNCTIONS = ("where", "maximum", "full_like", "zeros_like", "ones_like", "nan_to_num", "isnan", "ldexp")
_METHODS = ("sum", "any", "copy", "fill", "clip", "max")


@dataclass
class Counts:
    """What a call asked of the device: names of kernels, in order; and of CuPy's allocations and operations, how many each."""

    launches: list[str] = field(default_factory=list)
    allocations: int = 0
    operations: collections.Counter[str] = field(default_factory=collections.Counter)

    def clear(self) -> None:
        """Begins anew."""
        self.launches.clear()
        self.operations.clear()
        self.allocations = 0


@contextmanager
def stand_in(cc: tuple[int, int] = (9, 0)) -> Iterator[Counts]:
    """Inside, a GPU of a compute capability seems to be there, for CuPy, with as many multiprocessors as an H100 has.

    No array holds anything, and no other thread may use a GPU.
    """
    cupy: Any = importlib.import_module("cupy")
    driver = importlib.import_module("cuda.bindings.driver")
    programs = importlib.import_module("cce_numba.tensor_core.programs")
    backends = [importlib.import_module(f"cce_numba.{name}.backend") for name in ("hopper", "ampere")]
    counts = Counts()
    stream = _Stream()

    def allocate(n_bytes: int) -> Any:
        counts.allocations += 1
        # As from a pool: where the same sizes are asked for again, the same addresses come.
        memory = cupy.cuda.UnownedMemory(_ADDRESS + (n_bytes << 8), n_bytes, None, 0)
        return cupy.cuda.MemoryPointer(memory, 0)

    def zeros(shape: Any, dtype: Any = float) -> Any:
        counts.operations["zeros"] += 1
        return cupy.ndarray(shape, dtype)

    def full(shape: Any, value: Any, dtype: Any) -> Any:
        counts.operations["full"] += 1
        return cupy.ndarray(shape, dtype)

    def clear(*arguments: Any) -> None:
        counts.operations["memset"] += 1

    def launch(handle: int, *others: Any) -> None:
        counts.launches.append(names[handle])

    names: dict[int, str] = {}

    def handle_of(kernel: Kernel, device: int) -> int:
        names[id(kernel)] = kernel.function.__name__
        return id(kernel)

    array = _array_class(cupy, counts)
    tensor_map = SimpleNamespace(opaque=[0] * 16)
    with ExitStack() as stack:
        for target, name, value in (
            (cupy, "ndarray", array),
            (cupy, "zeros", zeros),
            (cupy, "full", full),
            (cupy, "ones", zeros),
            (cupy, "frexp", lambda array: (array, array)),
            (cupy, "arange", lambda stop: full(stop, None, np.int64)),
            (cupy, "asarray", lambda array, dtype=None: array),
            (cupy.cuda.runtime, "getDevice", lambda: 0),
            (cupy.cuda.runtime, "memsetAsync", clear),
            (cupy.cuda.driver, "launchKernel", launch),
            (cupy.cuda, "get_current_stream", lambda device=0: stream),
            (interchange, "write_zeros", clear),
            (interchange, "stream_of_device", lambda pointer, device: stream),
            (gpu, "count", lambda: 1),
            (gpu, "_facts", lambda device: gpu.Gpu(cc, _MULTIPROCESSORS)),
            (gpu, "_missing_compiler", lambda: None),
            (gpu, "bind_context", lambda: None),
            (driver, "cuTensorMapEncodeTiled", lambda *arguments: (0, tensor_map)),
            (Kernel, "handle", handle_of),
            # Nothing that was found outside holds inside, nor the other way round.
            (programs, "FORWARD", Programs()),
            (programs, "BACKWARD", Programs()),
            *((backend, "_plans", {}) for backend in backends),
            (recurring, "_found", {}),
            *((cupy, name, _counted(name, counts)) for name in _FUNCTIONS),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(cupy.cuda.using_allocator(allocate))
        yield counts


@contextmanager
def stand_in_for_torch() -> Iterator[None]:
    """Inside `stand_in`: tensors say that they are on CUDA. They are on the CPU, where PyTorch does its own part."""
    torch: Any = importlib.import_module("torch")
    empty, device = torch.empty, torch.device("cuda", 0)

    def empty_on_cpu(*shape: Any, device: Any = None, **others: Any) -> Any:
        if others.get("dtype") is not torch.uint8 or not isinstance(shape[0], int):
            return empty(*shape, **others)
        # Memory on CUDA begins at multiples of 512 bytes; elsewhere each call would have a program of its own.
        memory = empty(shape[0] + _ALIGNMENT_BYTES, **others)
        first = -memory.data_ptr() % _ALIGNMENT_BYTES
        return memory[first : first + shape[0]]

    with ExitStack() as stack:
        for target, name, value in (
            (torch.Tensor, "is_cuda", property(lambda tensor: True)),
            (torch.Tensor, "is_cpu", property(lambda tensor: False)),
            (torch.Tensor, "device", property(lambda tensor: device)),
            (torch.Tensor, "get_device", lambda tensor: 0),
            (torch, "empty", empty_on_cpu),
            (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
        ):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        yield


class _Stream:
    """As much of a stream of CuPy's as host code asks for."""

    ptr = 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def _array_class(cupy: Any, counts: Counts) -> Any:
    """CuPy's arrays, whose operations are counted, and compute nothing."""

    def store(array: Any, key: Any, value: Any) -> None:
        counts.operations["store"] += 1

    methods: dict[str, Callable[..., Any]] = {f"__{name}__": _counted(name, counts) for name in _OPERATORS}
    methods |= {name: _counted(name, counts) for name in _METHODS}
    cast = cupy.ndarray.astype

    def astype(array: Any, dtype: Any, copy: bool = True) -> Any:
        if copy or array.dtype != np.dtype(dtype):
            counts.operations["astype"] += 1
            return cupy.ndarray(array.shape, dtype)
        return cast(array, dtype, copy=False)

    body = {"__module__": "cupy", "__setitem__": store, "astype": astype, "__hash__": None, **methods}
    return type("ndarray", (cupy.ndarray,), body)


def _counted(name: str, counts: Counts) -> Callable[..., Any]:
    """An operation that is counted, and gives an array like its first argument that is one."""

    def operation(*arguments: Any, **options: Any) -> Any:
        counts.operations[name] += 1
        first, *others = (x for x in arguments if hasattr(x, "data") and not isinstance(x, np.generic))
        if name in ("sum", "any", "max"):
            shape = first.shape[:1] if options.get("axis") == 1 else ()
            return importlib.import_module("cupy").ndarray(shape, options.get("dtype", first.dtype))
        return others[0] if name == "where" and others else first

    return operation
