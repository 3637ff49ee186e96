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
TORCH_DTYPES = {
    f"torch.{x}": np.dtype(x)
    for x in ("float16", "float32", "float64", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
}
TORCH_DTYPES["torch.bfloat16"] = BFLOAT16
# In NumPy's array interface, which does not know bfloat16: that goes by its bits.
_TYPE_STRINGS = {dtype: "<i2" if dtype is BFLOAT16 else dtype.str for dtype in TORCH_DTYPES.values()}
_DLPACK_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


@dataclass(frozen=True)
class Kind:
    """What the caller's arrays are: of which library, on which device (None for the host), and so how to give results back."""

    library: str
    device: int | None
    export: Callable[[Any], Any]

    def current(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, the device and the stream that the caller's library works on are current, for CuPy and for Numba.

        For host arrays, what `numpy.seterr` asks for does not count inside: inf and nan go where the arithmetic puts them.
        """
        if self.device is None:
            return np.errstate(all="ignore")
        gpu.bind_context()
        return _switched(self.device, self.library) if gpu.count() > 1 else _stream_of(self.library, self.device)


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
    if library == "torch":
        return _take_torch(name, array)
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: masked arrays are not supported (the mask would be ignored); pass a plain array")
    if isinstance(array, np.ndarray | np.generic):
        return np.asarray(array)
    if library == "cupy":
        return array
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


@functools.cache
def _numpy_dtype(torch_dtype: Any) -> np.dtype | None:
    """NumPy's dtype for PyTorch's, or None."""
    return TORCH_DTYPES.get(str(torch_dtype))


class _TensorMemory:
    """The memory of a PyTorch tensor on the CPU, which it keeps, by NumPy's array interface."""

    __slots__ = ("__array_interface__", "_tensor")

    def __init__(self, tensor: Any, dtype: np.dtype) -> None:
        self._tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "shape": tensor.shape,
            "typestr": _TYPE_STRINGS[dtype],
            "strides": None if tensor.is_contiguous() else tuple(step * dtype.itemsize for step in tensor.stride()),
            "data": (tensor.data_ptr(), False),
        }


def of_cpu_tensor(tensor: Any) -> Any:
    """The NumPy array in the memory of a PyTorch tensor on the CPU, which it keeps; unlike `take`, whoever may record it.

    After `tensor.numpy()` PyTorch never resizes the tensor's storage again, but FSDP frees and refills those of parameters.
    """
    dtype = _numpy_dtype(tensor.dtype)
    assert dtype is not None, "whoever makes such arrays has looked"
    array = np.asarray(_TensorMemory(tensor, dtype))
    return array.view(BFLOAT16) if dtype is BFLOAT16 else array


def of_cuda_tensor(tensor: Any) -> Any:
    """The CuPy array in the memory of a PyTorch tensor on CUDA, which it keeps; unlike `take`, whoever may record it."""
    cupy, device = gpu.cupy(), tensor.get_device()
    if (dtype := _numpy_dtype(tensor.dtype)) is None:
        with cupy.cuda.Device(device), _torch_stream(device):
            return cupy.from_dlpack(tensor)
    # What DLPack does, without what it takes: 60 us a tensor. Work goes to PyTorch's stream if e is a tensor, too.
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), tensor.nbytes, tensor, device)
    strides = [step * dtype.itemsize for step in tensor.stride()]
    return cupy.ndarray(tensor.shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


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


def write_zeros(array: Any) -> None:
    """Writes zeros everywhere in a NumPy or CuPy array, by bits, so that CuPy needs no kernel of the dtype."""
    if is_on_device(array) and array.flags.c_contiguous:
        array.data.memset_async(0, array.nbytes)  # takes the host a fraction of what an operation on arrays does
    else:
        array.view(f"u{array.itemsize}")[...] = 0


def kind_of(array: Any, native: Any) -> Kind:
    """The kind of the caller's `array`, of which `take` made `native`."""
    library = library_of(array)
    device = native.device.id if is_on_device(native) else None
    if library == "torch":
        return Kind(library, device, _export_torch)
    if library in ("numba", "numba_cuda"):
        return Kind(library, device, _export_numba)
    if library not in ("numpy", "cupy") and hasattr(array, "__array_namespace__"):
        return Kind(library, device, functools.partial(_export_by_dlpack, array.__array_namespace__()))
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
        return gpu.cupy()
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name}: is a GPU array ({type(array).__module__}.{type(array).__qualname__}), and GPU arrays need CuPy: "
            "pip install 'cce_numba[cuda13]' (or cuda12, to match the driver)"
        ) from error


@contextlib.contextmanager
def _switched(device: int, library: str) -> Iterator[None]:
    """Makes one of several devices current, and the library's stream there."""
    with gpu.cupy().cuda.Device(device), importlib.import_module("numba.cuda").gpus[device], _stream_of(library, device):
        yield


def _stream_of(library: str, device: int) -> contextlib.AbstractContextManager[Any]:
    """A library's current stream of the current device: PyTorch's, or CuPy's, which `take` has ordered others' work before."""
    return _torch_stream(device) if library == "torch" else contextlib.nullcontext()


class _Stream:
    """A stream of another library, by its address, for CuPy: the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer

    def as_cupy(self) -> Any:
        return gpu.cupy().cuda.Stream.from_external(self)


def _torch_stream(device: int) -> Any:
    """PyTorch's current stream of a device, which must be the current one, for CuPy."""
    # torch.cuda.current_stream takes 10 us, to make an object of this address.
    return stream_of_device(sys.modules["torch"]._C._cuda_getCurrentRawStream(device), device)


@functools.lru_cache(maxsize=256)
def stream_of_device(pointer: int, device: int) -> Any:
    """The CuPy stream of an address; CuPy's streams know their device."""
    return _Stream(pointer).as_cupy()


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
    torch = sys.modules["torch"]
    if not isinstance(tensor, torch.Tensor):
        kind = type(tensor)
        way = way_to_tensor_of_module(name, tensor) if isinstance(tensor, torch.nn.Module) else ""
        raise TypeError(f"{name}: must be an array or a tensor, got {kind.__module__}.{kind.__qualname__}{way}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name}: requires grad, and these functions are not recorded by autograd; pass {name}.detach() and use the "
            "returned gradients, call them under torch.no_grad(), or take cce_numba.torch, whose loss is recorded"
        )
    if tensor.layout is not torch.strided or tensor.is_neg():  # its memory does not hold its elements one by one, as they are
        what = "a view that negates another's elements" if tensor.layout is torch.strided else f"layout {tensor.layout}"
        raise TypeError(f"{name}: must be a strided tensor whose memory holds its values, got {what}")
    on_cuda = tensor.is_cuda
    if not (on_cuda or tensor.is_cpu):
        raise TypeError(f"{name}: must be on the CPU or an NVIDIA GPU, got a tensor on {tensor.device}")
    if _numpy_dtype(tensor.dtype) is None:
        raise TypeError(f"{name}: must be real numbers of a dtype that NumPy has too, or bfloat16, got {tensor.dtype}")
    if tensor.untyped_storage().nbytes() == 0 and tensor.numel():
        raise ValueError(
            f"{name}: its memory was freed; of a parameter that FSDP shards there is memory only inside the forward and the "
            "backward of its module, so call the loss there"
        )
    if tensor.requires_grad:
        tensor = tensor.detach()  # else the array would keep what autograd has recorded
    if on_cuda:
        _cupy_for(name, tensor)
        return of_cuda_tensor(tensor)
    return of_cpu_tensor(tensor)


def way_to_tensor_of_module(name: str, module: Any) -> str:
    """What a message says of a module of PyTorch in a tensor's place: which of its tensors to pass."""
    tensor = "bias" if name == "bias" else "weight"
    if getattr(module, tensor, None) is None:
        return "; pass the tensor that it has"
    with_bias = tensor == "weight" and getattr(module, "bias", None) is not None
    return f"; pass its tensor, {name}.{tensor}" + (f", and bias={name}.bias" if with_bias else "")


class ReadAgain:
    """An array of the caller's that is read once more later, and must not have changed by then: PyTorch tells for a tensor."""

    def __init__(self, name: str, array: Any) -> None:
        self._name, self._tensor = name, array if library_of(array) == "torch" else None
        self._seen = self._state()

    def check(self) -> None:
        """Raises ValueError, naming the argument, if it was changed in place, or its memory moved or freed."""
        if self._state() != self._seen:
            raise ValueError(
                f"{self._name}: was changed in place, or its memory was freed, after forward read it, and backward reads it "
                "again; pass a copy to forward, or change it after the last backward"
            )

    def _state(self) -> Any:
        tensor = self._tensor
        return None if tensor is None else (tensor.data_ptr(), None if tensor.is_inference() else tensor._version)


def _export_torch(native: Any) -> Any:
    torch = sys.modules["torch"]
    bits = native.view(np.int16) if native.dtype == BFLOAT16 else native
    # CuPy's current stream is PyTorch's (see `Kind.current`): nothing is to be ordered, for which DLPack would record an event.
    tensor = torch.from_dlpack(bits.__dlpack__(stream=-1) if is_on_device(bits) else bits)
    return tensor.view(torch.bfloat16) if native.dtype == BFLOAT16 else tensor


def _export_by_dlpack(namespace: Any, native: Any) -> Any:
    if native.dtype == BFLOAT16 and not is_on_device(native):  # NumPy exports no bfloat16 by DLPack
        return namespace.asarray(native)
    return namespace.from_dlpack(native)


def _export_numba(native: Any) -> Any:
    return importlib.import_module("numba.cuda").as_cuda_array(native, sync=False)


def _export_native(native: Any) -> Any:
    return native
