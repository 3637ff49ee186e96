"""`cupyx.distributed`'s communicators, over NCCL, as a `Communicator`."""

from __future__ import annotations

from typing import Any

from cce_numba import gpu


class CupyCommunicator:
    """What `cupyx.distributed.init_process_group(n_devices, rank)` returns, for arrays of CuPy.

    Each rank makes its device current before it makes the group. Work is on CuPy's current stream.

    Args:
        group: a `cupyx.distributed.NCCLBackend`.
    """

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, int(group.rank), int(group._n_devices)

    def all_gather(self, array: Any) -> Any:
        """See `Communicator`."""
        every = gpu.cupy().empty((self.size, *array.shape), array.dtype)
        self.group.all_gather(array, every, array.size)
        return every

    def all_reduce(self, array: Any) -> Any:
        """See `Communicator`. In place."""
        self.group.all_reduce(array, array)
        return array

    def reduce_scatter(self, array: Any) -> Any:
        """See `Communicator`."""
        own = gpu.cupy().empty(array.shape[1:], array.dtype)
        self.group.reduce_scatter(array, own, own.size)
        return own
