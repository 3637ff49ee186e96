"""Losses of several processes that share a vocabulary, against one process: `python -m tests.torch.vocab_parallel_steps 4`."""

from __future__ import annotations

import itertools
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cce_numba.parallel import Disagreement
from cce_numba.torch import (
    LinearCrossEntropy,
    VocabParallelOptions,
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_logprobs,
    verl,
)
from tests.torch.processes import run

B, T, V, D = 3, 11, 83, 6
RANDOM = torch.Generator().manual_seed(0)
E, C = (torch.randn(shape, dtype=torch.float64, generator=RANDOM) for shape in ((B, T, D), (V, D)))
BIAS, CLASS_WEIGHTS = torch.randn(V, dtype=torch.float64, generator=RANDOM), torch.rand(V, generator=RANDOM)
TARGETS = torch.randint(0, V, (B, T), generator=RANDOM)
TARGETS[0, :4] = -100
PROBS = torch.rand((B, T, 2), generator=RANDOM)
TERMS: dict[str, dict[str, Any]] = {
    "default": {},
    "exact sum": {"filter_eps": None, "reduction": "sum", "shift": 1},
    "filtered none": {"filter_eps": 0.1, "reduction": "none", "return_lse": True},
    "exact c": {"filter_eps": 0.1, "filter_c_grad": False, "softcap": 5.0, "logit_scale": 1.5},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.01, "class_weights": CLASS_WEIGHTS},
    "smoothed, capped": {"label_smoothing": 0.1, "softcap": 3.0, "class_weights": CLASS_WEIGHTS},
    "weights and scales": {"token_weights": torch.rand((B, T), generator=RANDOM), "logit_scale": torch.rand((B, T)) + 0.5},
    "more": {"entropy": True, "sum_squares": True, "top_k": 3, "filter_seed": 3},
    "batch invariant": {"batch_invariant": True, "impl": "cce_exact"},
    "soft": {"target_probs": PROBS, "targets": torch.stack([TARGETS, TARGETS.flip(0)], -1)},
}


def cuts() -> list[int]:
    """Uneven: rank 1 has a single row of four, and the last but one has none."""
    size = dist.get_world_size()
    return [0, 50, V] if size == 2 else [0, 30, 31, 31, V]


def own_rows(rank: int) -> slice:
    return slice(*cuts()[rank : rank + 2])


def numbers_of(found: Any) -> list[torch.Tensor]:
    """All that is returned."""
    return [x for x in (found if isinstance(found, tuple | list) else (found,)) if x is not None]


def objective(found: Any) -> torch.Tensor:
    """A number that depends on all that has a gradient."""
    parts = [x for x in numbers_of(found) if x.requires_grad]
    return sum((x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in parts)


def check(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-9) -> None:
    if hasattr(actual, "full_tensor"):
        actual = actual.full_tensor()
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)} for {tuple(expected.shape)}"
    if expected.numel():
        error, scale = (actual.double() - expected.double()).abs().max(), expected.abs().max() + 1e-30
        assert error <= tolerance * scale, f"{name} is off by {error} of {scale}"


def check_same_bits(x: torch.Tensor) -> None:
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x.contiguous())
    assert all(torch.equal(other, x) for other in every), "ranks have different bits"


def leaves(e: torch.Tensor, c: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in (e, c, bias)]


def call(function: Any, e: Any, c: Any, bias: Any, **options: Any) -> Any:
    options = dict(options)
    targets = options.pop("targets", TARGETS)
    return function(e, c, targets, bias=bias, **options)


def alone(function: Any, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, list[torch.Tensor]]:
    inputs = leaves(*(x.to(dtype) for x in (E, C, BIAS)))
    found = call(function, *inputs, **options)
    objective(found).backward()
    return found, inputs


def in_a_group(function: Any, rank: int, dtype: torch.dtype = torch.float64, tolerance: float = 1e-9, **options: Any) -> None:
    """By a process group, and plain tensors."""
    expected, whole = alone(function, dtype, **options)
    rows = own_rows(rank)
    e, c, bias = leaves(*(x.to(dtype) for x in (E, C[rows], BIAS[rows])))
    found = call(function, e, c, bias, process_group=dist.group.WORLD, **options)
    for place, (actual, wanted) in enumerate(zip(numbers_of(found), numbers_of(expected), strict=True)):
        check(
            f"result {place}", actual.detach(), wanted.detach(), max(tolerance, 1e-6) if dtype != torch.float64 else tolerance
        )
        check_same_bits(actual.detach())
    objective(found).backward()
    check("dE", e.grad, whole[0].grad, tolerance)
    check("dC", c.grad, whole[1].grad[rows], tolerance)
    check("dbias", bias.grad, whole[2].grad[rows], tolerance)
    check_same_bits(e.grad)


def as_dtensors(function: Any, rank: int, place: Any, **options: Any) -> None:
    """By DTensors: what is returned and what gradients are is what users of loss_parallel expect."""
    expected, whole = alone(function, **options)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    e = distribute_tensor(E, mesh, [place]).requires_grad_()
    c, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (C, BIAS))
    found = call(function, e, c, bias, **options)
    for actual, wanted in zip(numbers_of(found), numbers_of(expected), strict=True):
        assert isinstance(actual, DTensor)
        assert actual.placements == (Replicate(),)
        check("a result", actual.detach(), wanted.detach())
    objective([x.to_local() for x in numbers_of(found)]).backward()
    for name, x, wanted, placed in (
        ("dE", e, whole[0], place),
        ("dC", c, whole[1], Shard(0)),
        ("dbias", bias, whole[2], Shard(0)),
    ):
        assert x.grad.placements == (placed,), f"{name} is {x.grad.placements}"
        check(name, x.grad, wanted.grad)


def dtensors_of_a_loss(rank: int) -> None:
    """loss.backward() on the DTensor itself, and targets that are one too."""
    _, whole = alone(linear_cross_entropy)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    e, c = distribute_tensor(E, mesh, [Replicate()]).requires_grad_(), distribute_tensor(C, mesh, [Shard(0)]).requires_grad_()
    bias, targets = distribute_tensor(BIAS, mesh, [Replicate()]), distribute_tensor(TARGETS, mesh, [Shard(1)])
    linear_cross_entropy(e, c, targets, bias).mul(0.5).backward()
    check("dE", e.grad, whole[0].grad)
    check("dC", c.grad, whole[1].grad)


def tokens_in_shards(rank: int, axis: int) -> None:
    """Plain tensors; parts of any length."""
    options = {"shift": 1, "filter_eps": 0.1}
    expected, whole = alone(linear_cross_entropy, **options)
    rows, size = own_rows(rank), dist.get_world_size()
    places = [*[0, 1, 2, 2][:size], E.shape[axis]]
    tokens = (slice(None),) * axis + (slice(*places[rank : rank + 2]),)
    e, c, bias = leaves(E[tokens], C[rows], BIAS[rows])
    loss = call(linear_cross_entropy, e, c, bias, process_group=dist.group.WORLD, tokens_axis=axis, **options)
    check("loss", loss.detach(), expected.detach())
    objective(loss).backward()
    check("dE", e.grad, whole[0].grad[tokens])
    check("dC", c.grad, whole[1].grad[rows])


def in_place(rank: int) -> None:
    """Gradients go to .grad, twice, for plain tensors and for DTensors."""
    _, whole = alone(linear_cross_entropy, filter_eps=0.1, reduction="sum")
    rows, group = own_rows(rank), dist.group.WORLD
    e, c, bias = leaves(E, C[rows], BIAS[rows])
    for _ in range(2):
        loss = linear_cross_entropy_backward(
            e, c, TARGETS, bias, process_group=group, filter_eps=0.1, reduction="sum", d_loss=0.5
        )
    check_same_bits(loss)
    scale = 0.5  # `objective` has it
    for name, x, wanted in (("dE", e, whole[0].grad), ("dC", c, whole[1].grad[rows]), ("dbias", bias, whole[2].grad[rows])):
        check(name, x.grad, wanted / scale)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    c, body = distribute_tensor(C, mesh, [Shard(0)]).requires_grad_(), distribute_tensor(E, mesh, [Shard(1)]).requires_grad_()
    e = body * 1.0
    c.grad = torch.zeros_like(c)
    memory = c.grad.to_local().data_ptr()
    linear_cross_entropy_backward(
        e, c, TARGETS, distribute_tensor(BIAS, mesh, [Shard(0)]), filter_eps=0.1, reduction="sum", d_loss=0.5
    )
    assert c.grad.to_local().data_ptr() == memory, "the gradient is another"
    check("dC of a DTensor", c.grad, whole[1].grad)
    check("dE of a DTensor", body.grad, whole[0].grad)


def as_module(rank: int) -> None:
    criterion = LinearCrossEntropy(process_group=dist.group.WORLD, filter_eps=None)
    loss = criterion(E, C[own_rows(rank)], TARGETS)
    check("loss", loss, linear_cross_entropy(E, C, TARGETS))


def with_options(rank: int) -> None:
    """cut_cross_entropy's: from_vocab, and no sum of dE."""
    _, whole = alone(linear_cross_entropy)
    options = VocabParallelOptions.from_vocab(V, reduce_e_grad=False)
    rows = slice(options.start, options.stop)
    e, c, bias = leaves(E, C[rows], BIAS[rows])
    objective(linear_cross_entropy(e, c, TARGETS, bias, vocab_parallel_options=options)).backward()
    part = e.grad.clone()
    dist.all_reduce(part)
    check("the sum of dE", part, whole[0].grad)
    check("dC", c.grad, whole[1].grad[rows])
    assert not torch.equal(part, e.grad), "parts are summed already"


def as_verl(rank: int) -> None:
    """Its signature; the gradient of hidden is in parts."""
    e, c, _ = leaves(E, C[own_rows(rank)], BIAS)
    whole_e, whole_c, _ = leaves(E, C, BIAS)
    expected = verl.linear_cross_entropy(whole_e, whole_c, TARGETS, 0.7)
    found = verl.linear_cross_entropy(e, c, TARGETS, 0.7, "none", dist.group.WORLD)
    for actual, wanted in zip(found, expected, strict=True):
        check("a result", actual.detach(), wanted.detach())
    objective(found).backward()
    objective(expected).backward()
    dist.all_reduce(e.grad)
    check("dE", e.grad, whole_e.grad)
    check("dC", c.grad, whole_c.grad[own_rows(rank)])


def groups_beside_each_other(rank: int) -> None:
    """Two groups of half the ranks: each computes the loss of its own tokens."""
    size = dist.get_world_size() // 2
    groups = [dist.new_group(list(range(first, first + size))) for first in (0, size)]
    mine, place = rank // size, rank % size
    targets = (TARGETS.clamp(min=0) + mine).clamp(max=V - 1)
    rows = slice(place * V // size, (place + 1) * V // size)
    check("loss", linear_cross_entropy(E, C[rows], targets, process_group=groups[mine]), linear_cross_entropy(E, C, targets))


def two_dimensions(rank: int) -> None:
    """A mesh of data and tensor parallel ranks: tensors on its part are taken, those on all of it only if the rest is equal."""
    size = dist.get_world_size() // 2
    mesh = dist.init_device_mesh("cpu", (2, size), mesh_dim_names=("data", "tensor"))
    part = mesh["tensor"]
    c, e = distribute_tensor(C, part, [Shard(0)]), distribute_tensor(E, part, [Replicate()])
    check("loss", linear_cross_entropy(e, c, TARGETS), linear_cross_entropy(E, C, TARGETS))
    c = distribute_tensor(C, mesh, [Replicate(), Shard(0)])
    e = distribute_tensor(E, mesh, [Replicate(), Replicate()])
    check("loss", linear_cross_entropy(e, c, TARGETS), linear_cross_entropy(E, C, TARGETS))
    e = distribute_tensor(E, mesh, [Shard(1), Replicate()])
    with pytest.raises(ValueError, match=r"e: must be Replicate or Shard along its tokens where c is Shard\(0\)"):
        linear_cross_entropy(e, c, TARGETS)


def refused(rank: int, message: str, **changed: Any) -> None:
    """One rank has other arguments: all of them raise."""
    options = {"e": E, "c": C[own_rows(rank)], "targets": TARGETS} | (changed if rank == 1 else {})
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as raised:
        linear_cross_entropy(process_group=dist.group.WORLD, **options)
    assert rank == 1 or raised.type is Disagreement


def mixed(rank: int) -> str:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    c, e = distribute_tensor(C, mesh, [Shard(0)]), distribute_tensor(E, mesh, [Replicate()])
    said = []
    for ours in ((E, c), (e, C), (e, distribute_tensor(C, mesh, [Shard(1)])), (e, distribute_tensor(C, mesh, [Replicate()]))):
        try:
            linear_cross_entropy(*ours, TARGETS)
        except (TypeError, ValueError) as error:
            said.append(str(error)[:60])
    return " | ".join(said)


def compiled(rank: int) -> None:
    """A compiler leaves its program for the loss."""
    rows = own_rows(rank)

    def step(e: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(e * 2, c, TARGETS, process_group=dist.group.WORLD) * 3

    loss = torch.compile(step, backend="eager")(E, C[rows])
    check("loss", loss, 3 * linear_cross_entropy(E * 2, C, TARGETS))


def recomputed(rank: int) -> None:
    """Activation checkpointing goes forward twice, on all ranks."""
    _, whole = alone(linear_cross_entropy)
    rows = own_rows(rank)
    e, c, bias = leaves(E, C[rows], BIAS[rows])
    loss = torch.utils.checkpoint.checkpoint(
        lambda *x: linear_cross_entropy(x[0], x[1], TARGETS, x[2], process_group=dist.group.WORLD),
        e,
        c,
        bias,
        use_reentrant=False,
    )
    objective(loss).backward()
    check("dE", e.grad, whole[0].grad)


_GROUP = {f"loss, {name}": partial(in_a_group, linear_cross_entropy, **options) for name, options in TERMS.items()}
_DTENSORS = {
    f"dtensors, {name}, {place}": partial(as_dtensors, linear_cross_entropy, place=place, **TERMS[name])
    for name, place in itertools.product(("default", "more", "smoothed", "filtered none"), (Replicate(), Shard(0), Shard(1)))
}
_LOGPROBS = {"entropy": True, "top_k": 2, "filter_eps": 0.1}
CASES = (
    _GROUP
    | _DTENSORS
    | {
        "float32": partial(in_a_group, linear_cross_entropy, dtype=torch.float32, tolerance=1e-5, filter_eps=None),
        "bfloat16": partial(in_a_group, linear_cross_entropy, dtype=torch.bfloat16, tolerance=1e-2, filter_eps=None),
        "logprobs": partial(in_a_group, linear_logprobs, **_LOGPROBS),
        "logprobs, dtensors": partial(as_dtensors, linear_logprobs, place=Shard(1), **_LOGPROBS),
        "a loss that is a dtensor": dtensors_of_a_loss,
        "tokens in shards, 0": partial(tokens_in_shards, axis=0),
        "tokens in shards, 1": partial(tokens_in_shards, axis=1),
        "in place": in_place,
        "module": as_module,
        "cut_cross_entropy": with_options,
        "verl": as_verl,
        "groups": groups_beside_each_other,
        "mesh": two_dimensions,
        "mixed": mixed,
        "compiled": compiled,
        "recomputed": recomputed,
        "other shape": partial(refused, message="e: must be the same on all ranks, got ", e=E[:2], targets=TARGETS[:2]),
        "other option": partial(refused, message="softcap: must be the same on all ranks, got nothing on rank 0", softcap=3.0),
        "other targets": partial(
            refused, message="targets: must be the same on all ranks, got 'int64 (3, 11)", targets=TARGETS + 1
        ),
        "an error of one": partial(refused, message="c: must be a torch.Tensor, got ", c=C.numpy()),
        "frozen on one": partial(
            refused,
            message="gradients: must be the same on all ranks, got [] on rank 0 and ['e'] on rank 1",
            e=E.clone().requires_grad_(),
        ),
    }
)

if __name__ == "__main__":
    run(CASES)
