"""Whose memory a call takes: CuPy's arrays lie in blocks of PyTorch's allocator, and go back to PyTorch as those blocks.

So there is one pool on the device, whose peak PyTorch reports, and which a CUDA graph under capture has made its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from cce_numba import gpu, interchange

NUMPY_DTYPES = {getattr(torch, name.removeprefix("torch.")): dtype for name, dtype in interchange.TORCH_DTYPES.items()}
TORCH_DTYPES = {dtype: of_torch for of_torch, dtype in NUMPY_DTYPES.items()}


@contextlib.contextmanager
def from_pytorch(device: torch.device) -> Iterator[None]:
    """Inside, and in this thread, what CuPy allocates comes from PyTorch's allocator. Nothing to do on the CPU."""
    if device.type == "cpu":
        yield
        return
    with gpu.cupy().cuda.using_allocator(functools.partial(allocate, device)):
        yield


def allocate(device: torch.device, n_bytes: int) -> Any:
    """A `cupy.cuda.MemoryPointer` to a tensor of bytes, which is its owner: PyTorch has the memory back when CuPy drops it.

    That is soon enough: both work on PyTorch's current stream, in whose order the allocator gives memory away again.
    """
    cuda = gpu.cupy().cuda
    block = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    return cuda.MemoryPointer(cuda.UnownedMemory(block.data_ptr(), n_bytes, block, device.index or 0), 0)


def tensor_of(native: Any) -> torch.Tensor:
    """A contiguous tensor of what a NumPy or CuPy array holds: the same memory, if that is contiguous and, on CUDA, PyTorch's.

    Not by DLPack, since the storage of an operator's result must be PyTorch's own for CUDA graphs to manage it.
    """
    if not interchange.is_on_device(native):
        return torch.from_numpy(native if native.flags.c_contiguous else native.copy())
    block = getattr(native.data.mem, "_owner", None)
    if not isinstance(block, torch.Tensor) or not native.flags.c_contiguous:
        return torch.from_dlpack(native).clone(memory_format=torch.contiguous_format)
    first = (native.data.ptr - block.data_ptr()) // native.itemsize
    tensor = torch.empty(0, dtype=TORCH_DTYPES[native.dtype], device=block.device)
    return tensor.set_(block.untyped_storage(), first, native.shape)


def array_of(tensor: torch.Tensor) -> Any:
    """The array in the memory of a tensor like those of `tensor_of`, which needs none of the checks of `interchange.take`."""
    # No caller resizes its storage, so the quick way will do; see `interchange.of_cpu_tensor`.
    return tensor.detach().numpy() if tensor.is_cpu else interchange.of_cuda_tensor(tensor)


def tensors_of(arrays: Iterable[Any]) -> list[torch.Tensor]:
    """`tensor_of` each, copied where two lie in one block: an operator's results must not share memory."""
    tensors: list[torch.Tensor] = []
    seen: set[int] = set()
    for array in arrays:
        tensor = tensor_of(array)
        storage = tensor.untyped_storage().data_ptr()
        tensors.append(tensor.clone() if storage in seen else tensor)
        seen.add(storage)
    return tensors
