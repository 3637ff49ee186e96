"""What the loss costs where PyTorch trains (bfloat16): through autograd, and in the steps of a small transformer.

    python benchmarks/training.py --record training_h100     both parts
    python benchmarks/training.py --only step --tied         one part; the embedding is the head, too
    python benchmarks/training.py --quick                    small shapes: does it run?

Baselines store the logits: `F.cross_entropy((e @ c.T).float(), targets)`, as it stands and under `torch.compile`.

Part one, `autograd`: the loss of `cce_numba.torch` and its `.backward()` in turns with `linear_cross_entropy_with_grad` on the
same tensors, both in PyTorch's memory; it may take 3 % or 100 us more, of the device and of the host. The host's time is that
until a call returns when nothing is queued; where it is longer than the device's, the time in turns is the host's. Inputs are
as sparse as a real model's (`calibrated`). Memory is PyTorch's peak during a call, less what there was and the gradients.

Part two, `step`: forward, backward and AdamW, eager, with model and loss under `torch.compile(fullgraph=True)`, and that step
replayed from a CUDA graph. Compiled with the model, both baselines are one. All take the same steps on one batch, from where a
model stands that stored logits have taught which entries occur at all: one in sixteen. So its blocks keep 6 % of the vocabulary
and drop 1 % of the probability or less, about what they do of a real model; one that knows nothing gives every entry of a large
vocabulary less than the filter's threshold. Memory is the peak of a step (of its capture, for a graph), less parameters and the
optimizer's state. Times are taken at a learning rate of 0, so that all steps have the same to do.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import calibrated
import cublas
import cupy
import numpy as np
import record
import timing
import training_tables
from rich.console import Console

import cce_numba as cce
from cce_numba.commands import machine

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError as missing:
    sys.exit(f"training: needs PyTorch: {missing}")

import cce_numba.torch as cct
from cce_numba.torch import memory

DEVICE = "cuda"
PARTS = ("autograd", "step")
DIRECT, OURS, STORED, COMPILED_LOSS = "direct", "cce_numba", "stored logits", "stored logits, compiled"
EAGER, COMPILED, GRAPH = "eager", "compiled", "CUDA graph"
Shape = tuple[int, int, int]  # N, V, D
SHAPES: tuple[Shape, ...] = ((8192, 131_072, 2048), (512, 32_768, 1024))
QUICK_SHAPES: tuple[Shape, ...] = ((512, 8192, 256),)
MORE, MORE_MS = 0.03, 0.1  # autograd's share of the direct call's time, or ms: the larger may be added
# Relative errors at most, of the loss and of the gradients, against the direct call. Ours are the same kernels. Stored logits
# are rounded to bfloat16, by up to 0.06 at 16, and so are e's and c's shares of a gradient.
ERRORS = {OURS: 1e-3, STORED: 0.1, COMPILED_LOSS: 0.1}

LEARNING_RATE = 1e-3
EVERY = 16  # which entries occur: the multiples of this
LEARNING_STEPS = 60  # after which the model knows that, at either size
STEPS = 10  # after which losses must agree
# Of what the loss falls by in these steps: gradients are off by 0.2 to 0.5 % by rounding and by the filter. Besides, the filter
# leaves entries that it drops as probable as they are, and others may go on to lower them: so losses may differ by that, too.
APART = 0.02

Criterion = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Loss = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Size:
    """Of a batch and of the model that it trains."""

    sequences: int
    length: int
    vocabulary: int
    hidden: int
    layers: int
    heads: int


SIZE = Size(sequences=8, length=1024, vocabulary=131_072, hidden=768, layers=4, heads=12)
QUICK_SIZE = Size(sequences=2, length=256, vocabulary=8192, hidden=256, layers=2, heads=4)


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each added to what it was given."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(sequences, length, hidden), as it comes."""
        qkv = self.qkv(normed(x)).unflatten(-1, (3, self.heads, -1))
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(), is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(normed(x))))


class Transformer(nn.Module):
    """Tokens to embeddings, which go with `head`. It has no positions: random tokens are learned without."""

    def __init__(self, size: Size, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.blocks = nn.ModuleList(Block(size.hidden, size.heads) for _ in range(size.layers))
        self.head = self.embedding.weight if tied else nn.Parameter(torch.empty_like(self.embedding.weight))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(sequences, length) to (sequences, length, hidden)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return normed(x)


class Trainer:
    """One model, one batch, one optimizer, whose learning rate and state lie where CUDA graphs find them."""

    def __init__(self, size: Size, tied: bool) -> None:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            self.model = Transformer(size, tied).bfloat16()
            self.tokens, self.targets = torch.zeros(2, size.sequences, size.length, dtype=torch.int64)
            self.learning_rate = torch.tensor(LEARNING_RATE)
        # Fused: without temporaries, which would hide the loss's own memory. In bfloat16 the usual 0.999 would leave an average
        # of squares as it is.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), capturable=True, fused=True
        )

    def loss(self, criterion: Criterion) -> Loss:
        """The batch's loss, as something to be called."""
        return lambda: criterion(self.model(self.tokens), self.model.head, self.targets)

    def step(self, loss: Loss) -> torch.Tensor:
        """The loss before the step. No graph of autograd and no gradient outlives it."""
        value = loss()
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return value.detach()

    def learn(self, loss: Loss) -> float:
        """The last loss of steps on random batches, of which the last one stays."""
        for _ in range(LEARNING_STEPS):
            occurring = -(-self.model.head.shape[0] // EVERY)
            tokens = EVERY * torch.randint(occurring, (len(self.tokens), self.tokens.shape[1] + 1), device=self.tokens.device)
            self.tokens.copy_(tokens[:, :-1])
            self.targets.copy_(tokens[:, 1:])
            value = self.step(loss)
        return float(value)

    def state(self) -> list[torch.Tensor]:
        """All that a step changes."""
        kept = (x for state in self.optimizer.state.values() for x in state.values())
        return [*(parameter.detach() for parameter in self.model.parameters()), *kept]

    def restore(self, state: list[torch.Tensor], learning_rate: float = LEARNING_RATE) -> None:
        """Back to a copy of `state()`, in place."""
        torch._foreach_copy_(self.state(), state)
        self.learning_rate.fill_(learning_rate)

    def sparsity(self) -> dict[str, float]:
        """The share of the vocabulary that a block keeps, and the probability that it drops."""
        with torch.no_grad():
            result = cce.forward(self.model(self.tokens), self.model.head, self.targets)
            kept = float(result.survivor_counts().mean()) / len(self.model.head)
            return {"flagged": round(kept, 5), "dropped": round(float(result.dropped_mass().mean()), 7)}


def normed(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:])


def stored_logits(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss as one writes it without these kernels."""
    return F.cross_entropy((e @ c.T).float().flatten(0, -2), targets.flatten())


def compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, dynamic=False)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    reason = machine.why_no_gpu() or (cublas.torch_with_cuda() is None and "this PyTorch finds no GPU: it needs one with CUDA")
    if reason:
        sys.exit(f"training: {reason}")
    console = Console(width=180)
    results: dict[str, Any] = {"how": {"rounds": arguments.rounds, "burst": arguments.burst}, "calls": [], "step": None}
    start = time.perf_counter()
    try:
        if "autograd" in arguments.parts:
            measure_calls(arguments, results["calls"], console)
        if "step" in arguments.parts:
            results["step"] = {"rows": []}
            measure_steps(arguments, results["step"], console)
    finally:  # what was measured before something broke was measured
        console.print(*training_tables.tables(results))
        console.print(f"{time.perf_counter() - start:.0f} s")
        if arguments.record:
            console.print(str(record.write(arguments.record, results)))
    if wrong := [name for name, found in training_tables.named(results) if "wrong" in found]:
        sys.exit(f"training: wrong, and not timed: {'; '.join(wrong)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, and what follows from them: `parts`, `shapes`, `size`, `warm_up_s`. Exits if they do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--quick", action="store_true", help="small shapes alone")
    parser.add_argument("--tied", action="store_true", help="the transformer's embedding is its head, too")
    parser.add_argument("--rounds", type=int, default=20, help="default 20")
    parser.add_argument("--burst", type=int, default=2, help="calls of a kind that a round queues (default 2); of steps, one")
    parser.add_argument("--record", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.burst) < 1:
        parser.error("numbers must be at least 1")
    arguments.parts = (arguments.only,) if arguments.only else PARTS
    arguments.shapes = QUICK_SHAPES if arguments.quick else SHAPES
    arguments.size = QUICK_SIZE if arguments.quick else SIZE
    arguments.warm_up_s = 0.1 if arguments.quick else 1.0
    return arguments


@contextlib.contextmanager
def peak_memory() -> Iterator[SimpleNamespace]:
    """Afterwards its `bytes` tell the most that PyTorch handed out at once, less what was handed out before."""
    peak, before = SimpleNamespace(bytes=0), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield peak
    peak.bytes = torch.cuda.max_memory_allocated() - before


# Part one: a call through autograd.


def measure_calls(arguments: argparse.Namespace, calls: list[dict[str, Any]], console: Console) -> None:
    """All shapes, each shown as soon as it is done."""
    for shape in arguments.shapes:
        with console.status(f"{shape}, autograd"):
            calls.append(measured_call(shape, arguments))
        console.print(training_tables.call_line(calls[-1]))


def measured_call(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of one shape."""
    tensors = made(shape)
    e, c, targets = tensors
    found: dict[str, Any] = dict(zip("NVD", shape, strict=True))
    found["backend"] = cce.explain(e.detach(), c.detach(), targets).backend

    def direct() -> Any:
        return cce.linear_cross_entropy_with_grad(e.detach(), c.detach(), targets)

    criteria = {OURS: cct.linear_cross_entropy, STORED: stored_logits, COMPILED_LOSS: compiled(stored_logits)}
    with memory.from_pytorch(e.device):
        expected = direct()
        found["losses"] = {name: validated(name, criterion, tensors, expected) for name, criterion in criteria.items()}
        del expected
        if wrong := [f"{name}: {of['wrong']}" for name, of in found["losses"].items() if "wrong" in of]:
            return found | {"wrong": "; ".join(wrong)}
        e.grad = c.grad = None
        calls = {DIRECT: direct, OURS: lambda: with_backward(cct.linear_cross_entropy, *tensors)}
        timing.warm_up(calls.values(), arguments.warm_up_s)
        ms = timing.interleaved(calls, arguments.rounds, arguments.burst)
        host_ms = {name: timing.host_ms(call) for name, call in calls.items()}
    return found | {"device": compared(ms), "host": compared(host_ms)}


def made(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(e, c, targets)` in PyTorch's memory; CuPy's is given back."""
    e, c, targets = (cublas.as_torch(array).clone() for array in calibrated.calibrated(*shape, cupy))
    cupy.get_default_memory_pool().free_all_blocks()
    return e.requires_grad_(), c.requires_grad_(), targets


def with_backward(criterion: Criterion, e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss; its gradients are those of e and c, in place of the ones before."""
    e.grad = c.grad = None
    loss = criterion(e, c, targets)
    loss.backward()
    return loss.detach()


def validated(name: str, criterion: Criterion, tensors: tuple[torch.Tensor, ...], expected: Any) -> dict[str, Any]:
    """Errors against the direct call, and extra memory; or that it does not fit, or what is wrong."""
    e, c, _ = tensors
    loss, gradients = expected
    try:
        value = with_backward(criterion, *tensors)
        errors = {"loss": error(value, loss), "e": error(e.grad, gradients.e), "c": error(c.grad, gradients.c)}
        e.grad = c.grad = None
        with peak_memory() as peak:
            with_backward(criterion, *tensors)
    except torch.OutOfMemoryError:
        return {"does_not_fit": True}
    except Exception as problem:  # a compiler's, perhaps; there is more to be measured
        traceback.print_exc()
        return {"wrong": f"{type(problem).__name__}: {problem}"}
    finally:
        e.grad = c.grad = None
    found = {"errors": errors, "extra_bytes": peak.bytes - e.nbytes - c.nbytes}
    off = [f"{of} is off by {error:.3g}" for of, error in errors.items() if not error <= ERRORS[name]]  # nor is NaN
    return found | ({"wrong": ", ".join(off)} if off else {})


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def compared(ms: dict[str, list[float]]) -> dict[str, Any]:
    """Both times, what autograd adds in a round, and what it may."""
    allowed = max(MORE * float(np.median(ms[DIRECT])), MORE_MS)
    more = timing.spread(np.subtract(ms[OURS], ms[DIRECT]), digits=4)
    return {name: record.summary(times) for name, times in ms.items()} | {"more_ms": more, "more_ms_at_most": round(allowed, 4)}


# Part two: a training step.


@dataclass(frozen=True)
class Course:
    """The state from which all take their steps, what the losses then are to be, and how far apart they may be."""

    start: list[torch.Tensor]
    losses: list[float]
    allowed: float


def measure_steps(arguments: argparse.Namespace, results: dict[str, Any], console: Console) -> None:
    """Every way with every loss: first whether it learns as it should, then how fast, in turns."""
    trainer = Trainer(arguments.size, arguments.tied)
    losses = losses_of(trainer)
    results |= {"size": asdict(arguments.size), "tied": arguments.tied, "steps": STEPS, "learning_rate": LEARNING_RATE}
    with console.status("learning with stored logits"):
        course = course_of(trainer, losses[EAGER][STORED], results)
    console.print(training_tables.learned_line(results))
    steps: dict[tuple[str, str], timing.Call] = {}
    for way, by_name in losses.items():
        for name, loss in by_name.items():
            with console.status(f"{name}, {way}"):
                found, step = checked(trainer, way, loss, course)
            results["rows"].append({"way": way, "loss": name} | found)
            if "wrong" not in found:
                steps[way, name] = step
            console.print(training_tables.step_line(results["rows"][-1]))
    with console.status("steps, in turns"):
        trainer.restore(course.start, learning_rate=0.0)
        timing.warm_up(steps.values(), arguments.warm_up_s)
        times = timing.interleaved(steps, arguments.rounds, burst=1)
    for row in results["rows"]:
        if ms := times.get((row["way"], row["loss"])):
            row |= record.summary(ms)
            row["tokens_per_s"] = round(1e3 * trainer.tokens.numel() / row["median_ms"])


def course_of(trainer: Trainer, loss: Loss, results: dict[str, Any]) -> Course:
    """What this loss teaches and then does; the results tell of it."""
    results["learned_loss"] = round(trainer.learn(loss), 5)
    start = [x.clone() for x in trainer.state()]
    results |= trainer.sparsity()
    losses = [float(trainer.step(loss)) for _ in range(STEPS)]
    allowed = APART * (losses[0] - losses[-1]) + results["dropped"]
    results |= {"first_loss": round(losses[0], 5), "last_loss": round(losses[-1], 5), "apart_at_most": round(allowed, 5)}
    return Course(start, losses, allowed)


def checked(trainer: Trainer, way: str, loss: Loss, course: Course) -> tuple[dict[str, Any], Any]:
    """What there is to tell before it is timed, and the step, if nothing is wrong."""
    began = time.perf_counter()
    try:
        step, peak_bytes = prepared(trainer, way, loss)
        found = {"peak_bytes": peak_bytes, "prepared_s": round(time.perf_counter() - began, 1)}
        return found | agreement(trainer, step, course), step
    except Exception as problem:  # of this one alone, perhaps; the others are still to be measured
        traceback.print_exc()
        trainer.optimizer.zero_grad()
        return {"wrong": f"{type(problem).__name__}: {problem}"}, None


def losses_of(trainer: Trainer) -> dict[str, dict[str, Loss]]:
    """By way and name. Nothing is compiled before it is called, and a graph captures what was."""
    eager = {OURS: trainer.loss(cct.linear_cross_entropy), STORED: trainer.loss(stored_logits)}
    whole = {name: compiled(loss) for name, loss in eager.items()}
    return {EAGER: eager | {COMPILED_LOSS: trainer.loss(compiled(stored_logits))}, COMPILED: whole, GRAPH: whole}


def prepared(trainer: Trainer, way: str, loss: Loss) -> tuple[timing.Call, int]:
    """A step with nothing left to compile, and its peak memory."""

    def step() -> torch.Tensor:
        return trainer.step(loss)

    if way == GRAPH:
        return captured(step)
    step()
    with peak_memory() as peak:
        step()
    return step, peak.bytes


def captured(step: timing.Call) -> tuple[timing.Call, int]:
    """A replay of the step from a CUDA graph, which gives the loss, and the capture's peak memory: the graph keeps it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with peak_memory() as peak, torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay, peak.bytes


def agreement(trainer: Trainer, step: timing.Call, course: Course) -> dict[str, Any]:
    """The loss at the last of the course's steps, and how far any of them is from the one expected."""
    trainer.restore(course.start)
    losses = [float(step()) for _ in course.losses]
    apart = float(np.abs(np.subtract(losses, course.losses)).max())
    found = {"last_loss": round(losses[-1], 5), "apart": round(apart, 5)}
    if not apart <= course.allowed:  # nor is NaN
        found["wrong"] = f"losses are up to {apart:.4f} from those of stored logits, not {course.allowed:.4f} at most"
    return found


if __name__ == "__main__":
    main()
