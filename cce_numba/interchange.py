"""Arrays in and out: what the caller has becomes a NumPy or CuPy array without a copy, and results go back as the same kind.

PyTorch, JAX and Numba are touched only when the caller's array comes from them, so importing this needs none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_DLPACK_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


@dataclass(frozen=True)
class Kind:
    """Where the caller's arrays live and how to give results back: `export(native)` makes one of the caller's arrays."""

    library: str
    export: Callable[[Any], Any]


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
        return _cupy_for(name, array).asarray(array)
    if hasattr(array, "__dlpack_device__"):
        device_type = array.__dlpack_device__()[0]
        if device_type in _DLPACK_CUDA:
            return _cupy_for(name, array).from_dlpack(array)
        if device_type in _DLPACK_HOST:
            # NumPy's own DLPack import knows no bfloat16; libraries that have it offer __array__ too.
            return np.asarray(array) if hasattr(array, "__array__") else np.from_dlpack(array)
    raise TypeError(
        f"{name}: must be an array (NumPy, CuPy, or anything with __cuda_array_interface__ or DLPack on the CPU or an "
        f"NVIDIA GPU), got {type(array).__module__}.{type(array).__qualname__}"
    )


def kind_of(array: Any) -> Kind:
    """How results for a caller that passed `array` are given back."""
    library = library_of(array)
    if library == "torch":
        return Kind("torch", _export_torch)
    if library in ("jax", "jaxlib"):
        return Kind("jax", _export_jax)
    if library in ("numba", "numba_cuda"):
        return Kind("numba", lambda native: importlib.import_module("numba.cuda").as_cuda_array(native, sync=False))
    if library not in ("numpy", "cupy") and hasattr(array, "__array_namespace__"):
        return Kind(library, lambda native: array.__array_namespace__().from_dlpack(native))
    return Kind(library, lambda native: native)


@contextlib.contextmanager
def callers_stream(name: str, array: Any) -> Iterator[None]:
    """Inside, the device of `array` and the stream that its library works on are current, for CuPy and for Numba."""
    native = take(name, array)
    if not is_on_device(native):
        yield
        return
    cupy = importlib.import_module("cupy")
    cuda = importlib.import_module("numba.cuda")
    with cupy.cuda.Device(native.device.id), cuda.gpus[native.device.id]:
        if library_of(array) == "torch":
            with _TorchStream(native.device.id).as_cupy():
                yield
        else:
            yield  # CuPy's current stream; __cuda_array_interface__ and DLPack have ordered the producer's work before it


def library_of(array: Any) -> str:
    """The top-level module that defines the array's type, e.g. `"numpy"`, `"cupy"`, `"torch"`."""
    return type(array).__module__.partition(".")[0]


def _cupy_for(name: str, array: Any) -> Any:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name}: is a GPU array ({type(array).__module__}.{type(array).__qualname__}), and GPU arrays need CuPy: "
            "pip install 'cce_numba[cuda13]' (or cuda12, to match the driver)"
        ) from error


class _TorchStream:
    """PyTorch's current stream of a device, for CuPy, by the CUDA stream protocol (which old PyTorch streams lack)."""

    def __init__(self, device: int) -> None:
        self._pointer = importlib.import_module("torch").cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer

    def as_cupy(self) -> Any:
        return importlib.import_module("cupy").cuda.Stream.from_external(self)


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
        with _TorchStream(tensor.device.index).as_cupy():
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


def _export_jax(native: Any) -> Any:
    jax = importlib.import_module("jax")
    return jax.dlpack.from_dlpack(native) if is_on_device(native) else jax.numpy.asarray(native)
