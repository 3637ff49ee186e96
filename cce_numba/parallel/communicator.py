"""What carries arrays between ranks: a protocol of three collective operations.

A communicator is handed arrays of the problem's own library: NumPy's on the host, CuPy's on a device. Where it works on a
device, it does so in the order of the current stream and does not wait. All ranks must call the same operations in the same
order, with arrays of the same shape.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Communicator(Protocol):
    """What `forward` and `backward` take as `communicator`.

    Attributes:
        rank: the number of this rank, in [0, size).
        size: how many ranks there are.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102

    @property
    def size(self) -> int: ...  # noqa: D102

    def all_gather(self, array: Any) -> Any:
        """`(size, *shape)`: every rank's array, in the order of ranks. The array is contiguous, of uint8 or a real dtype."""

    def all_reduce(self, array: Any) -> Any:
        """The sum over ranks, bitwise the same on all of them. float32 or float64, contiguous; it may be written to."""

    def reduce_scatter(self, array: Any) -> Any:
        """Of `(size, *shape)`, float32 or float64, contiguous: the sum over ranks of what stands at this rank's place."""
