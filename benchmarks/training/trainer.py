"""One model, one batch, one optimizer, and the steps that all losses take alike."""

from __future__ import annotations

from collections.abc import Callable

import torch

import cce_numba as cce
from benchmarks.measure.device import Call
from benchmarks.measure.memory import torch_peak
from benchmarks.training.transformer import Size, Transformer

DEVICE = "cuda"
LEARNING_RATE = 1e-3
LEARNING_STEPS = 60  # after which the model knows which entries occur, at either size
_EVERY = 16  # which entries occur: the multiples of this

Criterion = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Loss = Callable[[], torch.Tensor]


class Trainer:
    """Learning rate and state of the optimizer lie in tensors, where CUDA graphs find them."""

    def __init__(self, size: Size, tied: bool) -> None:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = Transformer(size, tied).bfloat16()
            self.tokens, self.targets = torch.zeros(2, size.sequences, size.length, dtype=torch.int64)
            self.learning_rate = torch.tensor(LEARNING_RATE)
        # The fused optimizer takes no temporaries, which would hide the loss's own memory. With the usual 0.999, an average of
        # squares in bfloat16 would never change.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), capturable=True, fused=True
        )

    def loss(self, criterion: Criterion) -> Loss:
        """A function that computes the batch's loss."""
        return lambda: criterion(self.model(self.tokens), self.model.head, self.targets)

    def step(self, loss: Loss) -> torch.Tensor:
        """Takes a step and returns the loss before it. No graph of autograd and no gradient outlives the step."""
        value = loss()
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value.detach()

    def learn(self, loss: Loss) -> float:
        """Takes `LEARNING_STEPS` steps on random batches, of which the last stays; returns the last loss."""
        for _ in range(LEARNING_STEPS):
            occurring = -(-self.model.head.shape[0] // _EVERY)
            tokens = _EVERY * torch.randint(occurring, (len(self.tokens), self.tokens.shape[1] + 1), device=self.tokens.device)
            self.tokens.copy_(tokens[:, :-1])
            self.targets.copy_(tokens[:, 1:])
            value = self.step(loss)
        return float(value)

    def state(self) -> list[torch.Tensor]:
        """All tensors that a step changes."""
        kept = (x for state in self.optimizer.state.values() for x in state.values())
        return [*(parameter.detach() for parameter in self.model.parameters()), *kept]

    def restore(self, state: list[torch.Tensor], learning_rate: float = LEARNING_RATE) -> None:
        """Returns to a copy of `state()`, in place."""
        torch._foreach_copy_(self.state(), state)
        self.learning_rate.fill_(learning_rate)

    def sparsity(self) -> dict[str, float]:
        """The share of the vocabulary that a block keeps, and the probability that it drops."""
        with torch.no_grad():
            result = cce.forward(self.model(self.tokens), self.model.head, self.targets)
            kept = float(result.survivor_counts().mean()) / len(self.model.head)
            return {"flagged": round(kept, 5), "dropped": round(float(result.dropped_mass().mean()), 7)}


def with_peak(step: Call) -> tuple[Call, int]:
    """The step with nothing left to compile, and its peak memory in bytes."""
    step()
    with torch_peak() as peak:
        step()
    return step, peak.bytes


def captured(step: Call) -> tuple[Call, int]:
    """A replay of the step from a CUDA graph, which returns the loss; and the capture's peak bytes, which the graph keeps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch_peak() as peak, torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay, peak.bytes
