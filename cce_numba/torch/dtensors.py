"""DTensors as they come: a classifier in shards of its rows, and what goes with it, become this rank's plain tensors.

The loss is placed as with PyTorch's `loss_parallel`: it is a DTensor, the same on all ranks. The gradient of `c` is placed as
`c` is, and that of `e` as `e` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cce_numba.parallel.agreement import Agreement
from cce_numba.ranks import Sharing


def is_dtensor(x: Any) -> bool:
    """Whether it is a DTensor."""
    return isinstance(x, torch.Tensor) and hasattr(x, "full_tensor")


@dataclass(frozen=True, eq=False)
class Placed:
    """What a rank has of DTensors that a loss was given.

    Attributes:
        e, c, bias: this rank's parts; bias may be None.
        others: whole tensors, by name, and what is no tensor.
        sharing: who shares the vocabulary.
        device_mesh: the mesh that they are on.
    """

    e: torch.Tensor
    c: torch.Tensor
    bias: torch.Tensor | None
    others: dict[str, Any]
    sharing: Sharing
    device_mesh: Any

    @staticmethod
    def of(e: Any, c: Any, bias: Any, others: dict[str, Any], in_place: bool = False) -> Placed:
        """Takes DTensors apart; plain tensors among the others are the same on all ranks, and whole.

        in_place: what is added to the `.grad` of a part of a leaf is then in the `.grad` of the leaf.

        Raises TypeError or ValueError, naming the argument, for what does not fit together.
        """
        from torch.distributed.tensor import Replicate, Shard  # not every PyTorch has it

        for name, x in (("e", e), ("c", c)):
            if not is_dtensor(x):
                raise TypeError(_MIXED[name])
        mesh, dim = c.device_mesh, _dim_of_shards(c)
        if e.device_mesh != mesh:
            raise ValueError(f"e: must be on the mesh of c, {mesh}, got {e.device_mesh}")
        if any(place.is_partial() for place in e.placements):
            e = e.redistribute(placements=[Replicate() if place.is_partial() else place for place in e.placements])
        axis = None
        for place, of_e in enumerate(e.placements):
            if isinstance(of_e, Shard) and place == dim and of_e.dim < e.ndim - 1:
                axis = of_e.dim
            elif not of_e.is_replicate():
                raise ValueError(
                    f"e: must be Replicate or Shard along its tokens where c is Shard(0), and Replicate elsewhere, got "
                    f"{e.placements} for c {c.placements}; of a mesh with more dimensions pass tensors on its part, mesh['...']"
                )
        if bias is not None:
            if not is_dtensor(bias):
                raise TypeError("bias: must be a DTensor, as c is; distribute_tensor(bias, mesh, [Shard(0)]) makes one")
            bias = _part(bias if bias.placements == c.placements else bias.redistribute(placements=c.placements), in_place)
        from cce_numba.torch.communicator import communicator_of

        communicator = communicator_of(mesh.get_group(dim))
        sharing = Sharing(communicator, axis, agreement=Agreement(communicator, c.device.type != "cpu"))
        whole = {name: x.full_tensor() if is_dtensor(x) else x for name, x in others.items()}
        return Placed(_part(e, in_place), _part(c, in_place), bias, whole, sharing, mesh)

    def results(self, found: Any) -> Any:
        """What was found, as DTensors that are the same on all ranks: a tensor, or a tuple of tensors and None."""

        def placed(x: Any) -> Any:
            return as_replicate(x, self) if isinstance(x, torch.Tensor) else x

        if not isinstance(found, tuple):
            return placed(found)
        every = [placed(x) for x in found]
        return type(found)(*every) if hasattr(found, "_fields") else tuple(every)


def as_replicate(x: torch.Tensor, like: Any) -> Any:
    """A plain tensor, the same on all ranks, as a DTensor on the mesh of another one; recorded by autograd."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def _part(x: Any, in_place: bool) -> torch.Tensor:
    """This rank's part of a DTensor, recorded by autograd, or as a leaf whose gradient is part of that of the DTensor."""
    if not (in_place and x.is_leaf and x.requires_grad):
        return x.to_local()
    if x.grad is None:
        x.grad = torch.zeros_like(x)
    part: torch.Tensor = x.detach().to_local().requires_grad_()
    part.grad = x.grad.to_local()
    return part


_MIXED = {
    "e": "c: must be a plain tensor, got a DTensor; pass c.full_tensor(), or, if ranks share the vocabulary, e as a DTensor "
    "too (or c.to_local() with process_group=), or, if it is a parameter that FSDP shards, call the loss in the forward of the "
    "module that has it",
    "c": "e: must be a plain tensor, got a DTensor, but c is none; pass e.full_tensor(), or, if ranks share the vocabulary, "
    "c as a DTensor too",
}


def _dim_of_shards(c: Any) -> int:
    """The dimension of the mesh along which ranks have different rows of c."""
    from torch.distributed.tensor import Shard

    dims = [dim for dim, place in enumerate(c.placements) if not place.is_replicate()]
    if len(dims) != 1 or type(c.placements[dims[0]]) is not Shard or c.placements[dims[0]].dim != 0:
        raise ValueError(
            f"c: as a DTensor it must be Shard(0) along one dimension of its mesh and Replicate along others, got "
            f"{c.placements}; pass c.full_tensor(), or c.redistribute(...)"
        )
    return dims[0]
