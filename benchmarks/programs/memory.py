"""What a training step of a real model takes with each method: peak memory, and time.

    python -m benchmarks memory                                two models, with activations kept and recomputed
    python -m benchmarks memory --limit-seconds 480            a part of it; the same command again goes on
    python -m benchmarks memory --only Llama --methods cce     some models and methods
    python -m benchmarks memory --quick                        a small model, on the CPU too
    python -m benchmarks memory --show                         the table and the picture of what is recorded

The models have the sizes of SmolLM2-135M and Llama-3.2-1B and random weights, which take the same memory as trained ones.
Weights, gradients and AdamW's state are bfloat16, and a batch has 8 sequences of 1024 tokens. The peak is the most that
PyTorch hands out in one step (forward, backward, AdamW), beyond the weights and AdamW's state; the gradients are in it. It is
measured in the third step, after two that compile and make AdamW's state. "Recomputed" is with gradient checkpointing of every
layer, where less else is kept and the loss weighs more. "The model without a loss" is a step whose loss is the mean of the
embeddings: what no loss could go below.

On the CPU the peak is how far the whole process grows, a coarse figure.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure.memory import peak_of
from benchmarks.peers.methods import METHODS, Criterion, Method
from benchmarks.proof.operands import free
from benchmarks.proof.rows import FAILED, MISSING, OK
from benchmarks.proof.session import Session, Steps, add_options, chosen
from benchmarks.proof.turns import Clock
from benchmarks.tables import memory as tables
from benchmarks.training.pretrained import Pretrained, of_size

_ALONE = "the model without a loss"
_LEFT_OUT = ("cce_numba, frozen classifier",)  # it would train another model
_TIMED, _QUICK_TIMED = 5, 1  # steps


@dataclass(frozen=True)
class Model:
    """A model's name, its sizes as transformers' LlamaConfig has them, and the batch."""

    name: str
    config: dict[str, Any]
    sequences: int = 8
    length: int = 1024


MODELS = (
    Model(
        "SmolLM2-135M",
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    Model(
        "Llama-3.2-1B",
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
)
QUICK = (
    Model(
        "small",
        {
            "vocab_size": 4096,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        sequences=2,
        length=64,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    add_options(parser, "a small model")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="models whose names hold one of these")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="methods whose names hold one of these")
    parser.add_argument("--retry", action="store_true", help="try again what has failed")
    parser.add_argument("--show", action="store_true", help="measure nothing, show and draw what is recorded")


def run(arguments: argparse.Namespace) -> None:
    """Measures what the record lacks, shows and draws all that it has."""
    session = Session.of("memory", arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = chosen(QUICK if arguments.quick else MODELS, arguments.only, "--only")
    alone = Method(_ALONE, "torch", lambda: _no_loss, on_cpu=True)
    methods = [alone, *chosen([each for each in METHODS if each.name not in _LEFT_OUT], arguments.methods, "--methods")]
    book = session.book({"device": device})
    wanted = [(model, recompute) for recompute in (False, True) for model in models]
    left = {
        (model.name, recompute): [
            method
            for method in methods
            if (cell := book.find(_key(model, recompute, method))) is None
            or (cell["status"] == FAILED and arguments.retry)
            or (cell["status"] == MISSING and method.why_none(device) is None)
        ]
        for model, recompute in wanted
    }
    if not arguments.show:
        with session.progress(sum(map(len, left.values()))) as steps:
            for model, recompute in wanted:
                todo = left[model.name, recompute]
                if todo and not session.is_over:
                    _measure(model, recompute, todo, session, book, steps, device)
    results = book.results()
    session.console.print(tables.table(results))
    pictures = tables.draw(results, session.image()) if results["cells"] else []
    remaining = sum(book.find(_key(model, recompute, method)) is None for model, recompute in wanted for method in methods)
    session.told(book, pictures, remaining)


def _measure(
    model: Model, recompute: bool, methods: list[Method], session: Session, book: Any, steps: Steps, device: str
) -> None:
    """Steps of one model with several methods, each written as soon as it is measured."""
    steps.say(f"{model.name}: making it")
    torch.manual_seed(0)
    made = of_size(model.config, device, torch.bfloat16 if device == "cuda" else torch.float32).train()
    if recompute:
        made.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    # The fused optimizer takes no temporaries, which would hide the loss's own memory.
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(model.config["vocab_size"], (model.sequences, model.length + 1), device=device)
    for method in methods:
        if session.is_over:
            break
        steps.say(f"{model.name}, {'recomputed' if recompute else 'kept'}: {method.name}")
        key = _key(model, recompute, method)
        sizes = {"N": model.sequences * model.length, "V": model.config["vocab_size"], "D": model.config["hidden_size"]}
        timed = _QUICK_TIMED if session.quick else _TIMED
        cell = book.put(key, sizes | _measured(method, made, optimizer, tokens, timed))
        session.console.print(tables.one_line(cell))
        steps.done()
    del made, optimizer
    free(device)


def _measured(
    method: Method, model: Pretrained, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, timed: int
) -> dict[str, Any]:
    """Peak of a step, and the median time of so many; or why there are none."""
    device = tokens.device.type
    if reason := method.why_none(device):
        return {"status": MISSING, "why": reason}
    clock = Clock(device)
    try:
        criterion = method.make()
        losses = [_step(criterion, model, optimizer, tokens) for _ in range(2)]
        free(device)
        with peak_of(device) as peak:
            losses.append(_step(criterion, model, optimizer, tokens))
        marks = [clock.mark()]
        for _ in range(timed):
            _step(criterion, model, optimizer, tokens)
            marks.append(clock.mark())
        clock.wait()
        times = [clock.ms(start, stop) for start, stop in itertools.pairwise(marks)]
        return {
            "status": OK,
            "peak_bytes": peak.bytes,
            "state_bytes": _bytes(model, optimizer),
            "step_ms": round(statistics.median(times), 3),
            "losses": [round(float(loss), 5) for loss in losses],
        }
    except Exception as error:  # of a peer, whatever it raises; the other methods may do
        if not isinstance(error, torch.cuda.OutOfMemoryError):
            traceback.print_exc()
        return {"status": FAILED, "why": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    finally:
        optimizer.zero_grad()
        free(device)


def _step(criterion: Criterion, model: Pretrained, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> torch.Tensor:
    loss = criterion(model(tokens[:, :-1]), model.head, tokens[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _no_loss(e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return e.float().mean()


def _bytes(model: Pretrained, optimizer: torch.optim.Optimizer) -> int:
    """Of the weights and the optimizer's state."""
    tensors = [*model.parameters(), *(x for of in optimizer.state.values() for x in of.values() if isinstance(x, torch.Tensor))]
    return sum(x.numel() * x.element_size() for x in tensors)


def _key(model: Model, recompute: bool, method: Method) -> dict[str, Any]:
    return {"model": model.name, "recompute": recompute, "method": method.name}
