"""`torch.distributed` as a communicator (`cce_numba.parallel.Communicator`): NCCL for CUDA, gloo for the CPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist

from cce_numba.torch import memory

# Before PyTorch 2.13 they have other names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_of_groups: weakref.WeakKeyDictionary[Any, TorchCommunicator] = weakref.WeakKeyDictionary()


class TorchCommunicator:
    """A process group of `torch.distributed`, for arrays of NumPy or CuPy: those of tensors on the CPU or on CUDA.

    Args:
        group: the process group; None for the default one.

    Raises RuntimeError if there is no group, or this process is not one of it.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError("process_group: torch.distributed.init_process_group must be called before")
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("process_group: this process is not one of the group")

    def all_gather(self, array: Any) -> Any:
        """See `Communicator`."""
        tensor = memory.tensor_of(array)
        every = tensor.new_empty((self.size, *tensor.shape))
        _all_gather(every.view(-1), tensor.view(-1), group=self.group)
        return memory.array_of(every)

    def all_reduce(self, array: Any) -> Any:
        """See `Communicator`. In place, where the array's memory is PyTorch's."""
        tensor = memory.tensor_of(array)
        dist.all_reduce(tensor, group=self.group)
        return memory.array_of(tensor)

    def reduce_scatter(self, array: Any) -> Any:
        """See `Communicator`."""
        tensor = memory.tensor_of(array)
        own = tensor.new_empty(tensor.shape[1:])
        _reduce_scatter(own.view(-1), tensor.view(-1), group=self.group)
        return memory.array_of(own)


def communicator_of(group: Any) -> TorchCommunicator:
    """That of a group, the same one each time: it remembers what its ranks have agreed on."""
    if group is None or not dist.is_initialized():
        group = dist.group.WORLD if dist.is_initialized() else None
    if group is None or group is dist.GroupMember.NON_GROUP_MEMBER:
        return TorchCommunicator(group)
    if group not in _of_groups:
        _of_groups[group] = TorchCommunicator(group)
    return _of_groups[group]


def is_available() -> bool:
    """Whether this PyTorch has `torch.distributed`."""
    return bool(torch.distributed.is_available())
