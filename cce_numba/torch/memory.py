"""Whose memory a call takes: CuPy's arrays lie in blocks of PyTorch's allocator, and go back to PyTorch as those blocks.

So there is one pool on the device, whose peak PyTorch reports, and which a CUDA graph under capture has made its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from cce_numba import gpu, interchange

NUMPY_DTYPES = {getattr(torch, name.removeprefix("torch.")): dtype for name, dtype in interchange.TORCH_DTYPES.items()}
TORCH_DTYPES = {dtype: of_torch for of_torch, dtype in NUMPY_DTYPES.items()}


def from_pytorch(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Inside, and in this thread, what CuPy allocates comes from PyTorch's allocator. Nothing to do on the CPU."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return gpu.cupy().cuda.using_allocator(functools.partial(allocate, device))


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


class Piece(NamedTuple):
    """Where in which of several blocks of memory an array lies, and what it looks like."""

    block: int
    offset_bytes: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]


def blocks_of(arrays: Iterable[Any]) -> tuple[list[torch.Tensor], list[Piece | None]]:
    """The blocks that CuPy arrays lie in, each once, and where they lie there; None for None. `arrays_in` is the way back.

    A block is a tensor of bytes, as `allocate` makes it, or a tensor of an array's own, if another allocator made that.
    """
    blocks: list[torch.Tensor] = []
    numbers: dict[int, tuple[int, int]] = {}  # of a block: its number, and its address
    pieces: list[Piece | None] = []
    for array in arrays:
        if array is None:
            pieces.append(None)
            continue
        block = getattr(array.data.mem, "_owner", None)
        if not isinstance(block, torch.Tensor):
            block = tensor_of(array)
            array = array_of(block)
        if (place := numbers.get(id(block))) is None:
            place = numbers[id(block)] = len(blocks), block.data_ptr()
            blocks.append(block)
        pieces.append(Piece(place[0], array.data.ptr - place[1], array.shape, array.dtype, array.strides))
    return blocks, pieces


def arrays_in(blocks: Iterable[torch.Tensor], pieces: Iterable[Piece | None]) -> list[Any]:
    """The CuPy arrays whose `blocks_of` these are; blocks may have gone elsewhere since, as offloaded tensors do."""
    cupy = gpu.cupy()
    starts = []
    for block in blocks:
        memory = cupy.cuda.UnownedMemory(block.data_ptr(), block.nbytes, block, block.get_device())
        starts.append(cupy.cuda.MemoryPointer(memory, 0))
    return [
        None
        if piece is None
        else cupy.ndarray(piece.shape, piece.dtype, starts[piece.block] + piece.offset_bytes, piece.strides)
        for piece in pieces
    ]


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
