"""Steps of patched models in two processes: `python -m tests.transformers.parallel_steps 2` prints a line for each way."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from cce_numba.transformers import patch
from cce_numba.transformers.logits import NoLogits
from tests.torch.processes import run
from tests.transformers.models import SIZES, V

STEPS, MICRO_BATCHES = 2, 2


def make(tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied, attention_bias=False)
    return transformers.LlamaForCausalLM(config).train()


def batch(step: int, rank: int) -> torch.Tensor:
    """Of equally many tokens on each rank, so that a mean of means is the mean."""
    return torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))


def whole(model: Any) -> list[torch.Tensor]:
    return [x.full_tensor() if hasattr(x, "full_tensor") else x.detach().clone() for x in model.parameters()]


def trained_alone(tied: bool, micro_batches: int) -> list[torch.Tensor]:
    """The parameters that one process comes to with all of the batches, by stored logits."""
    model = make(tied)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(STEPS):
        for micro in range(micro_batches):
            ids = torch.cat([batch(step * 7 + micro, rank) for rank in range(dist.get_world_size())])
            (model(ids, labels=ids).loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def train(model: Any, rank: int, micro_batches: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(STEPS):
        for micro in range(micro_batches):
            if micro_batches > 1:
                model.set_requires_gradient_sync(micro == micro_batches - 1)
            ids = batch(step * 7 + micro, rank)
            output = model(ids, labels=ids)
            assert isinstance(output.logits, NoLogits), "logits were made"
            (output.loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()


def compare(start: list[torch.Tensor], actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for before, x, wanted in zip(start, actual, expected, strict=True):
        error, change = (x.float() - wanted).norm(), (wanted - before).norm()
        assert change > 0
        assert error <= tolerance * change, f"off by {error:.2e} where parameters changed by {change:.2e}"


def data_parallel(rank: int, patched_before: bool) -> None:
    model = make()
    start = whole(model)
    if patched_before:
        patch(model, filter_eps=None)
    wrapped = DistributedDataParallel(model)
    if not patched_before:
        patch(wrapped, filter_eps=None)
    train(wrapped, rank, 1)
    compare(start, whole(model), trained_alone(False, 1), 1e-4)


def sharded(rank: int, head: str = "root", tied: bool = False, bfloat16: bool = False, micro_batches: int = 1) -> None:
    """`fully_shard` of each layer, of the head too where it is in a unit of its own, and of the model."""
    model = make(tied)
    start = whole(model)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
    shard = partial(fully_shard, mesh=mesh, mp_policy=precision)
    for layer in model.model.layers:
        shard(layer)
    if head == "own":
        shard(model.lm_head)
    shard(model)
    patch(model, filter_eps=None)
    train(model, rank, micro_batches)
    compare(start, whole(model), trained_alone(tied, micro_batches), 0.05 if bfloat16 else 1e-4)


def tensor_parallel(rank: int, tied: bool = False, **options: Any) -> None:
    """The model's own plan, whose head has rows of the classifier on each rank."""
    alone = make(tied)
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        if rank == 0:
            alone.save_pretrained(own)
        dist.broadcast_object_list(folders)
        [folder] = folders
        model = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).train()
        dist.barrier()
    assert hasattr(model.lm_head.weight, "full_tensor"), "the head is in shards"
    ids = batch(0, 0)
    expected = patch(alone, **options)(ids, labels=ids).loss
    expected.backward()
    output = patch(model, **options)(ids, labels=ids)
    assert isinstance(output.logits, NoLogits), "logits were made"
    assert torch.allclose(output.loss, expected, rtol=1e-5), (output.loss, expected)
    output.loss.backward()
    for (name, x), wanted in zip(model.named_parameters(), alone.parameters(), strict=True):
        gradient = x.grad.full_tensor() if hasattr(x.grad, "full_tensor") else x.grad
        error, scale = (gradient - wanted.grad).norm(), wanted.grad.norm()
        assert error <= 1e-4 * scale, f"{name} is off by {error:.2e} of {scale:.2e}"


def with_trainer(rank: int, **arguments: Any) -> None:
    """transformers.Trainer, as torchrun starts it: it wraps the model in DDP; patched and not."""
    rows = [{"input_ids": row, "labels": row} for step in range(4) for row in batch(step, 0)]
    with tempfile.TemporaryDirectory() as folder:

        def trained(model: Any) -> list[torch.Tensor]:
            given = transformers.TrainingArguments(
                output_dir=folder, use_cpu=True, max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, report_to=[],
                save_strategy="no", disable_tqdm=True, optim="sgd", seed=0, **arguments
            )  # fmt: skip
            trainer = transformers.Trainer(model=model, args=given, train_dataset=rows)
            trainer.train()
            assert trainer.args.world_size == dist.get_world_size()
            return whole(model)

        compare(whole(make()), trained(patch(make(), filter_eps=None)), trained(make()), 1e-3)


def refused_plan(rank: int) -> None:
    """A head in another style is refused when the model is patched."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model = make()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    apply_tensor_parallelism(model, mesh, {"lm_head": "rowwise", "lm_head.weight": "rowwise"})
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM: cannot be patched, since it has an output head that is"):
        patch(model)


CASES = {
    "ddp, patched before": partial(data_parallel, patched_before=True),
    "ddp, patched after": partial(data_parallel, patched_before=False),
    "fsdp2": sharded,
    "fsdp2, own unit": partial(sharded, head="own"),
    "fsdp2, tied": partial(sharded, tied=True),
    "fsdp2, bfloat16": partial(sharded, bfloat16=True),
    "fsdp2, accumulation": partial(sharded, micro_batches=MICRO_BATCHES),
    "tensor parallel": tensor_parallel,
    "tensor parallel, exact": partial(tensor_parallel, filter_eps=None),
    "tensor parallel, smoothed": partial(tensor_parallel, label_smoothing=0.1, z_loss=0.01),
    "another plan": refused_plan,
    "trainer": with_trainer,
    "trainer, accumulation": partial(with_trainer, gradient_accumulation_steps=2, label_smoothing_factor=0.1),
}

if __name__ == "__main__":
    run(CASES)
