"""Steps of training in two processes: `python -m tests.torch.distributed_steps WAY...` prints a line for each way."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from cce_numba.torch import linear_cross_entropy

V, D, STEPS, PROCESSES = 300, 16, 2, 2
loss_of = partial(linear_cross_entropy, shift=1, filter_eps=None)


class Head(nn.Linear):
    """A head whose forward is the loss."""

    def forward(self, e: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return loss_of(e, self.weight, targets, self.bias)


class Body(nn.Sequential):
    """What comes before the head."""


class Model(nn.Module):
    """A small language model. `own`: its head's forward is the loss; else its own forward takes the head's parameters."""

    def __init__(self, own: bool, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(V, D), Body(nn.Linear(D, D), nn.Tanh())
        self.head, self.own = Head(D, V), own
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        e = self.body(self.embedding(ids))
        return self.head(e, ids) if self.own else loss_of(e, self.head.weight, ids, self.head.bias)


def wrapped(model: Model, way: str) -> nn.Module:
    library, _, more = way.partition(" ")
    if library == "ddp":
        return DistributedDataParallel(
            model,
            static_graph=more == "static graph",
            gradient_as_bucket_view=more == "static graph",
            find_unused_parameters=more == "unused parameters",
        )
    if library == "fsdp1":
        units = {Body, Head} if more == "own" else {Body}
        original = more in ("original parameters", "tied")
        return FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy(units), use_orig_params=original, device_id=torch.device("cpu")
        )
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if more == "bfloat16" else MixedPrecisionPolicy()
    for unit in (model.body, model.head) if more == "own" else (model.body,):
        fully_shard(unit, mesh=mesh, mp_policy=precision)
    # By default the root is gathered until the backward is done.
    return fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=more != "root kept")


def whole(model: nn.Module) -> list[torch.Tensor]:
    """All parameters, gathered."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return [x.detach().clone() for x in model.parameters()]
    return [x.full_tensor() if hasattr(x, "full_tensor") else x.detach().clone() for x in model.parameters()]


def trained_alone(way: str) -> list[torch.Tensor]:
    """The parameters that one process comes to with all of the batch, by PyTorch's own loss on stored logits."""
    model = Model(own=False, tied=way.endswith("tied"))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(STEPS):
        e = model.body(model.embedding(ids := torch.cat([batch(step, rank) for rank in range(PROCESSES)])))
        logits = nn.functional.linear(e, model.head.weight, model.head.bias)[:, :-1]
        nn.functional.cross_entropy(logits.reshape(-1, V), ids[:, 1:].reshape(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))


def outcome(way: str, rank: int) -> str:
    model = wrapped(Model(own=way.endswith("own"), tied=way.endswith("tied")), way)
    start = whole(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(STEPS):
        model(batch(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tolerance = 0.02 if way.endswith("bfloat16") else 1e-5
    for before, actual, expected in zip(start, whole(model), trained_alone(way), strict=True):
        error, change = (actual - expected).norm(), (expected - before).norm()
        if not (error <= tolerance * change and change > 0):
            return f"off by {error:.2e} where parameters changed by {change:.2e}"
    return "as one process"


def outside(rank: int) -> str:
    head = fully_shard(Head(D, V), mesh=dist.init_device_mesh("cpu", (PROCESSES,)))
    try:
        loss_of(torch.ones(2, 9, D), head.weight, batch(0, rank))
    except TypeError as error:
        return f"TypeError {error}"
    return "no error"


def process(rank: int, port: int, ways: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    for way in [*ways, "outside"]:
        try:
            said: Any = outside(rank) if way == "outside" else outcome(way, rank)
        except Exception as error:  # the others are still of interest
            said = f"{type(error).__name__} {error}"
            traceback.print_exc()
        every: list[Any] = [None] * PROCESSES
        dist.all_gather_object(every, said)
        if rank == 0:
            print(f"{way}: {every[0] if every[0] == every[1] else every}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    torch.multiprocessing.spawn(process, args=(free, sys.argv[1:]), nprocs=PROCESSES)
