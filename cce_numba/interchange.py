"""Arrays in and out: what the caller has becomes a NumPy or CuPy array without a copy, and results go back as the same kind.

PyTorch and Numba are touched only when the caller's array comes from them, so importing this needs none of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from cce_numba import gpu

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_LIBRARIES = ("numpy", "cupy", "torch", "numba", "numba_cuda")
_TORCH_DTYPES = {f"torch.{x}": np.dtype(x) for x in ("float16", "float32", "float64", "uint8", "int32", "int64")}
_TORCH_DTYPES["torch.bfloat16"] = BFLOAT16
_DLPACK_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


@dataclass(frozen=True)
class Kind:
    """What the caller's arrays are: of which library, on which device (None for the host), and so how to give results back."""

    library: str
    device: int | None
    export: Callable[[Any], Any]

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Inside, the device and the stream that the caller's library works on are current, for CuPy and for Numba."""
        if self.device is None:
            yield
            return
        with contextlib.ExitStack() as stack:
            gpu.bind_context()
            if gpu.count() > 1:  # else there is nothing to switch, and asking takes time
                stack.enter_context(importlib.import_module("cupy").cuda.Device(self.device))
                stack.enter_context(importlib.import_module("numba.cuda").gpus[self.device])
            if self.library == "torch":
                stack.enter_context(_TorchStream(self.device).as_cupy())
            yield  # otherwise on CuPy's current stream; `take` has ordered the producer's work before it


def is_on_device(array: Any) -> bool:
    """True for a CuPy array, False for a NumPy one."""
    return not isinstance(array, np.ndarray)


def array_module(array: Any) -> ModuleType:
    """`numpy` or `cupy`, whichever made `array`."""
    return sys.modules["cupy"] if is_on_device(array) else np


def device_of(array: Any) -> str:
    """`"cpu"`, or `"cuda:<index>"` for a CuPy array."""
    return f"cuda:{array.device.id}" if is_on_device(array) else "cpu"


def take(name: str, array: Any) -> Any:
    """The NumPy or CuPy array that shares its memory with `array`.

    Raises TypeError, naming the argument, for anything that is not an array of numbers on the host or on an NVIDIA GPU.

    >>> take("e", np.ones((2, 3))).shape
    (2, 3)
    """
    library = library_of(array)
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: masked arrays are not supported (the mask would be ignored); pass a plain array")
    if isinstance(array, np.ndarray | np.generic):
        return np.asarray(array)
    if library == "cupy":
        return array
    if library == "torch":
        return _take_torch(name, array)
    if hasattr(array, "__cuda_array_interface__"):
        return _take_cuda_array_interface(_cupy_for(name, array), array)
    if hasattr(array, "__dlpack_device__"):
        device_type = array.__dlpack_device__()[0]
        if device_type in _DLPACK_CUDA:
            return _cupy_for(name, array).from_dlpack(array)
        if device_type in _DLPACK_HOST:
            # NumPy's own DLPack import knows no bfloat16; libraries that have it offer __array__ too.
            return np.asarray(array) if hasattr(array, "__array__") else np.from_dlpack(array)
    raise TypeError(
        f"{name}: must be an array (NumPy, CuPy, or anything with __cuda_array_interface__ or DLPack on the CPU or an "
        f"NVIDIA GPU; numpy.asarray makes one of a list), got {type(array).__module__}.{type(array).__qualname__}"
    )


def take_writable(name: str, array: Any) -> Any:
    """As `take`, for an array to write to: raises ValueError, naming the argument, if it is read-only or gives a copy.

    >>> take_writable("out.e", np.ones((2, 3))).flags.writeable
    True
    """
    native, library = take(name, array), library_of(array)
    if library in ("cupy", "torch"):
        return native  # always writable, never a copy
    if native.size and address(native) != address(take(name, array)):  # copies lie elsewhere each time
        raise ValueError(
            f"{name}: must share its memory, since the gradient is written to it, got "
            f"{type(array).__module__}.{type(array).__qualname__}, which gives a copy"
        )
    if is_on_device(native):
        interface = getattr(array, "__cuda_array_interface__", None)
        read_only = interface is not None and interface["data"][1]
    else:
        read_only = not native.flags.writeable
    if read_only:
        raise ValueError(f"{name}: must be writable, since the gradient is written to it, got a read-only array")
    return native


def byte_range(array: Any) -> tuple[int, int]:
    """The addresses [first, last) between which all elements of a NumPy or CuPy array lie; (0, 0) if it has none.

    >>> first, last = byte_range(np.zeros((2, 3))[:, ::-2])
    >>> last - first
    48
    """
    if array.size == 0:
        return 0, 0
    start = address(array)
    spans = [(size - 1) * step for size, step in zip(array.shape, array.strides, strict=True)]
    return start + sum(min(0, span) for span in spans), start + sum(max(0, span) for span in spans) + array.itemsize


def address(array: Any) -> int:
    """Where the first element of a NumPy or CuPy array lies."""
    return int(array.data.ptr if is_on_device(array) else array.__array_interface__["data"][0])


def kind_of(array: Any, native: Any) -> Kind:
    """The kind of the caller's `array`, of which `take` made `native`."""
    library = library_of(array)
    device = native.device.id if is_on_device(native) else None
    if library == "torch":
        return Kind(library, device, _export_torch)
    if library in ("numba", "numba_cuda"):
        return Kind(library, device, _export_numba)
    if library not in ("numpy", "cupy") and hasattr(array, "__array_namespace__"):
        return Kind(library, device, array.__array_namespace__().from_dlpack)
    return Kind(library, device, _export_native)


def library_of(array: Any) -> str:
    """The library whose array this is, or is derived from: `"numpy"`, `"cupy"`, `"torch"`, `"numba"`; else its own module.

    >>> library_of(np.ones(2)), library_of([1])
    ('numpy', 'builtins')
    """
    kind: Any = type(array)
    return _library_of_type(kind)


@functools.lru_cache(maxsize=256)
def _library_of_type(kind: type) -> str:
    modules = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((module for module in modules if module in _LIBRARIES), modules[0])


def _cupy_for(name: str, array: Any) -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name}: is a GPU array ({type(array).__module__}.{type(array).__qualname__}), and GPU arrays need CuPy: "
            "pip install 'cce_numba[cuda13]' (or cuda12, to match the driver)"
        ) from error


class _Stream:
    """A stream of another library, by its address, for CuPy: the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer

    def as_cupy(self) -> Any:
        return importlib.import_module("cupy").cuda.Stream.from_external(self)


class _TorchStream(_Stream):
    """PyTorch's current stream of a device."""

    def __init__(self, device: int) -> None:
        super().__init__(importlib.import_module("torch").cuda.current_stream(device).cuda_stream)


class _WithoutStream:
    """The same memory, without the producer's stream, on which CuPy would make the host wait."""

    def __init__(self, array: Any) -> None:
        self._owner = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": None}


def _take_cuda_array_interface(cupy: Any, array: Any) -> Any:
    native = cupy.asarray(_WithoutStream(array))
    producer = array.__cuda_array_interface__.get("stream")
    if producer is not None and producer != cupy.cuda.get_current_stream().ptr:
        with native.device:
            cupy.cuda.get_current_stream().wait_event(_Stream(producer).as_cupy().record())
    return native


def _take_torch(name: str, tensor: Any) -> Any:
    torch = importlib.import_module("torch")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name}: requires grad, and these functions are not recorded by autograd; pass {name}.detach() and use the "
            "returned gradients, or call them under torch.no_grad()"
        )
    tensor = tensor.detach()
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # bfloat16 by its bits: all versions do
    if tensor.device.type == "cuda":
        cupy = _cupy_for(name, tensor)
        if (dtype := _TORCH_DTYPES.get(str(tensor.dtype))) is not None and tensor.numel():
            # What DLPack does, without what it takes: 60 us a tensor. Work goes to PyTorch's stream if e is a tensor, too.
            memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), tensor.numel() * dtype.itemsize, tensor, tensor.device.index)
            strides = tuple(step * dtype.itemsize for step in tensor.stride())
            return cupy.ndarray(tuple(tensor.shape), dtype, cupy.cuda.MemoryPointer(memory, 0), strides)
        with cupy.cuda.Device(tensor.device.index), _TorchStream(tensor.device.index).as_cupy():
            native = cupy.from_dlpack(bits)
    elif tensor.device.type == "cpu":
        native = bits.numpy()
    else:
        raise TypeError(f"{name}: must be on the CPU or an NVIDIA GPU, got a tensor on {tensor.device}")
    return native.view(BFLOAT16) if tensor.dtype == torch.bfloat16 else native


def _export_torch(native: Any) -> Any:
    torch = importlib.import_module("torch")
    if native.dtype == BFLOAT16:
        return torch.from_dlpack(native.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(native)


def _export_numba(native: Any) -> Any:
    return importlib.import_module("numba.cuda").as_cuda_array(native, sync=False)


def _export_native(native: Any) -> Any:
    return native
