"""XLA's buffers as NumPy and CuPy arrays without a copy, and the device and stream that XLA works on.

A buffer belongs to XLA and is there while the Python function that got it runs. On a GPU the work that this function queues on
XLA's stream comes before whatever XLA does next with the memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from cce_numba import gpu, interchange
from cce_numba.interchange import Kind

_CPU, _CUDA = 1, 2  # DLPack's numbers: kDLCPU, kDLCUDA

_pointer_of_capsule = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of_capsule.restype, _pointer_of_capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def kind_of(buffer: Any) -> Kind:
    """Where the arrays are; results stay what they are, since they are copied to XLA's buffers.

    Raises NotImplementedError for a device that is neither the host nor an NVIDIA GPU.
    """
    device_type, device = buffer.__dlpack_device__()
    if device_type not in (_CPU, _CUDA):
        raise NotImplementedError(
            f"cce_numba.jax: arrays must be on the CPU or an NVIDIA GPU, got DLPack's device type {device_type}"
        )
    return Kind("jax", None if device_type == _CPU else device, _as_it_is)


@contextlib.contextmanager
def current(context: Any, kind: Kind) -> Iterator[None]:
    """Inside, the device and the stream that XLA works on are current, for CuPy and for Numba. Nothing to do on the CPU.

    `context`: what XLA gives a callback. XLA calls from threads of its own, so the device is made current each time.
    """
    if kind.device is None:
        yield
        return
    stream = context.stream() if callable(context.stream) else context.stream  # versions differ
    with gpu.cupy().cuda.Device(kind.device) as device:
        device.use()
        with interchange.stream_of_device(stream, kind.device):
            yield


def array_of(buffer: Any) -> Any:
    """The NumPy or CuPy array in the memory of one of XLA's buffers; only those of results may be written."""
    device_type, device = buffer.__dlpack_device__()
    if device_type == _CPU:
        return np.asarray(buffer)
    # Not by __cuda_array_interface__, which does not know bfloat16; and without DLPack's flag that inputs are read-only.
    cupy, dtype = gpu.cupy(), np.dtype(buffer.dtype)
    n_bytes = math.prod(buffer.shape) * dtype.itemsize
    memory = cupy.cuda.UnownedMemory(address(buffer), n_bytes, buffer, device)
    return cupy.ndarray(tuple(buffer.shape), dtype, cupy.cuda.MemoryPointer(memory, 0))


def address(buffer: Any) -> int:
    """Where the first element lies, on the host or on a device: the first field of what DLPack tells of a buffer."""
    capsule = buffer.__dlpack__()
    tensor = ctypes.cast(_pointer_of_capsule(capsule, b"dltensor"), ctypes.POINTER(ctypes.c_void_p))
    return tensor[0] or 0


def _as_it_is(native: Any) -> Any:
    return native
