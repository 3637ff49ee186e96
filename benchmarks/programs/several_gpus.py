"""A vocabulary in shards on 2, 4 or 8 GPUs of one host against one GPU of the same host, in the same run.

    python -m benchmarks several_gpus --gpus 4 --record several_gpus_4xh100    all shapes
    python -m benchmarks several_gpus --gpus 2 --quick                         the first shape, few rounds
    python -m benchmarks several_gpus --gpus 2 --small --cpu                   small shapes, gloo: does it run?

Each GPU has its own process, and all rows of the classifier, so that one GPU can do alone what all of them then do together,
each with its own rows. Loss and gradients of the ranks are compared with those of one GPU before anything is timed. A round
times one call on one GPU, while the others wait, and then the same call on all of them; the time of the ranks is that of the
slowest. Efficiency is one GPU's time, divided by the ranks' time and by their number.

Beside that it measures the collectives that a call makes, alone, and the peak of PyTorch's allocator in a call beyond inputs
and gradients.
"""

from __future__ import annotations

import argparse
import datetime
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import options
from benchmarks.data import Shape, calibrated, random
from benchmarks.errors import CannotRun, Wrong
from benchmarks.measure import record
from cce_numba.commands import UsageError
from cce_numba.parallel import rows_of_rank

WIDE: Shape = (8192, 256_000, 2304)
DEEP: Shape = (16_384, 131_072, 4096)
SMALL: Shape = (256, 3001, 200)


@dataclass(frozen=True)
class Case:
    """A call: of which shape and data, and what efficiency it must have on 4 GPUs.

    Attributes:
        name: what the table calls it.
        shape: N, V, D.
        data: "calibrated" or "random".
        options: of the loss.
        backward: whether gradients are computed too.
        in_shards: whether each rank has a part of the tokens too (sequence parallel).
        at_least: the efficiency that it must have; None for those that are only compared.
    """

    name: str
    shape: Shape
    data: str
    options: tuple[tuple[str, Any], ...] = ()
    backward: bool = True
    in_shards: bool = False
    at_least: float | None = None


EXACT = (("filter_eps", None),)
CASES: tuple[Case, ...] = (
    Case("forward", WIDE, "calibrated", backward=False, at_least=0.92),
    Case("exact", WIDE, "calibrated", EXACT, at_least=0.90),
    Case("default", WIDE, "calibrated", at_least=0.75),
    Case("default, tokens in shards", WIDE, "calibrated", in_shards=True),
    Case("exact", DEEP, "random", EXACT, at_least=0.90),
)


@dataclass(frozen=True)
class Settings:
    """What each process is told."""

    cases: tuple[Case, ...]
    ranks: int
    rounds: int
    on_cpu: bool
    port: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program's options."""
    parser.add_argument("--gpus", type=options.positive, default=2, metavar="N", help="how many ranks (default 2)")
    parser.add_argument("--cpu", action="store_true", help="processes on the CPU, with gloo; needs --small")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="the first shape alone, 5 rounds")
    which.add_argument("--small", action="store_true", help="small shapes alone")
    options.add_pace(parser, rounds=20, bursts=False)
    options.add_record(parser)


def run(arguments: argparse.Namespace) -> None:
    """Measures, shows, records."""
    import torch

    if arguments.cpu and not arguments.small:
        raise UsageError("--cpu: needs --small; larger shapes are for GPUs")
    if arguments.gpus < 2:
        raise UsageError("--gpus: must be at least 2")
    if not arguments.cpu and torch.cuda.device_count() < arguments.gpus:
        raise CannotRun(f"needs {arguments.gpus} GPUs, and there are {torch.cuda.device_count()}")
    cases = CASES
    if arguments.small:
        cases = tuple(Case(each.name, SMALL, each.data, each.options, each.backward, each.in_shards) for each in CASES)
    elif arguments.quick:
        cases = tuple(case for case in CASES if case.shape == WIDE)
    rounds = 5 if arguments.quick else 2 if arguments.small else arguments.rounds
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(cases, arguments.gpus, rounds, arguments.cpu, port)
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_rank, args=(settings, results), nprocs=arguments.gpus)
    found = results.get()
    if found.get("wrong"):
        raise Wrong(found["wrong"])
    Console(width=160).print(table(found))
    if arguments.record:
        print(record.write(arguments.record, found))


def table(found: dict[str, Any]) -> Table:
    """What was measured."""
    columns = (
        "call",
        "data",
        "N, V, D",
        "one GPU",
        f"{found['ranks']} ranks",
        "efficiency",
        "at least, on 4",
        "memory of a rank",
    )
    shown = Table(*columns, title=f"{found['ranks']} x {found['device']}")
    for row in found["rows"]:
        least = "" if row["efficiency_at_least"] is None else f"{row['efficiency_at_least']:.0%}"
        times = [f"{row[name]['median_ms']:.2f} ms" for name in ("one", "all")]
        memory = f"{row['extra_bytes'] / 2**20:.1f} MiB"
        shape = ", ".join(map(str, row["shape"]))
        shown.add_row(row["name"], row["data"], shape, *times, f"{row['efficiency']:.1%}", least, memory)
    return shown


def _rank(rank: int, settings: Settings, results: Any) -> None:
    """One process."""
    import torch
    import torch.distributed as dist

    if not settings.on_cpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if settings.on_cpu else "nccl",
        init_method=f"tcp://127.0.0.1:{settings.port}",
        rank=rank,
        world_size=settings.ranks,
        timeout=datetime.timedelta(minutes=10),
    )
    bench = _Bench(rank, settings)
    found: dict[str, Any] = {"ranks": settings.ranks, "rounds": settings.rounds, "device": bench.name, "rows": []}
    try:
        for case in settings.cases:
            found["rows"].append(bench.measured(case))
        found["collectives"] = bench.collectives(settings.cases[0].shape)
    except Wrong as error:  # the same on all ranks
        found["wrong"] = str(error)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


class _Bench:
    """One process's view of all measurements."""

    def __init__(self, rank: int, settings: Settings) -> None:
        import torch

        self.torch, self.rank, self.settings = torch, rank, settings
        self.device = torch.device("cpu") if settings.on_cpu else torch.device("cuda", rank)
        self.name = "CPU" if settings.on_cpu else torch.cuda.get_device_name(rank)
        self.made: tuple[Any, tuple[Any, Any, Any]] | None = None

    def inputs(self, case: Case) -> tuple[Any, Any, Any]:
        """e, c and targets, the same on all ranks, all of them."""
        key = case.shape, case.data
        if self.made is None or self.made[0] != key:
            self.made = None
            from cce_numba.torch import memory

            xp: Any = np
            if not self.settings.on_cpu:
                import cupy as xp  # type: ignore[no-redef]
            made = (calibrated if case.data == "calibrated" else random).make(*case.shape, xp)
            e, c = (
                memory.tensor_of(x.view(np.int16)).view(self.torch.bfloat16).clone() for x in (made.e, made.c)
            )  # which NumPy's tensors know by their bits alone
            self.made = key, (e, c, memory.tensor_of(made.targets).clone())
        return self.made[1]

    def call_of(self, case: Case, alone: bool) -> Callable[[], tuple[Any, Any, Any]]:
        """The call: it returns the loss and the gradients of e and c, or of their parts."""
        from cce_numba.torch import linear_cross_entropy

        e, c, targets = self.inputs(case)
        more = dict(case.options)
        if not alone:
            c = c[slice(*rows_of_rank(len(c), self.rank, self.settings.ranks))]
            more["process_group"] = self.torch.distributed.group.WORLD
            if case.in_shards:
                e, more["tokens_axis"] = e[slice(*rows_of_rank(len(e), self.rank, self.settings.ranks))], 0
        e, c = e.detach().requires_grad_(case.backward), c.detach().requires_grad_(case.backward)

        def call() -> tuple[Any, Any, Any]:
            loss = linear_cross_entropy(e, c, targets, **more)
            if not case.backward:
                return loss, None, None
            return loss.detach(), *self.torch.autograd.grad(loss, (e, c))

        return call

    def measured(self, case: Case) -> dict[str, Any]:
        """A row of the table; the same on all ranks."""
        one, ours = self.call_of(case, alone=True), self.call_of(case, alone=False)
        errors = self.validated(case, one(), ours())
        extra_bytes = self.extra_bytes(ours)
        alone, together = [], []
        for _ in range(self.settings.rounds):
            alone.append(self.slowest(self.ms(one) if self.rank == 0 else 0.0))
            together.append(self.slowest(self.ms(ours)))
        efficiency = statistics.median(alone) / self.settings.ranks / statistics.median(together)
        return {
            "name": case.name,
            "data": case.data,
            "shape": list(case.shape),
            "options": dict(case.options),
            "in_shards": case.in_shards,
            "errors": errors,
            "one": record.summary(alone),
            "all": record.summary(together),
            "efficiency": round(efficiency, 4),
            "efficiency_at_least": case.at_least,
            "extra_bytes": extra_bytes,
        }

    def validated(self, case: Case, one: tuple[Any, Any, Any], ours: tuple[Any, Any, Any]) -> dict[str, float]:
        """Relative errors against one GPU. Raises Wrong, on all ranks, if one is more than rounding to bfloat16 explains."""
        rows = slice(*rows_of_rank(case.shape[1], self.rank, self.settings.ranks))
        tokens = slice(*rows_of_rank(case.shape[0], self.rank, self.settings.ranks)) if case.in_shards else slice(None)
        errors = {"loss": self.error(ours[0], one[0])}
        if case.backward:
            errors |= {"e": self.error(ours[1], one[1][tokens]), "c": self.error(ours[2], one[2][rows])}
        at_most = {"loss": 1e-5, "e": 2.0**-8, "c": 2.0**-8}
        for name, error in errors.items():
            if not error <= at_most[name]:
                raise Wrong(f"{case.name}, {case.shape}: {name} is off by {error:.2e}, at most {at_most[name]:.2e}")
        return errors

    def error(self, x: Any, expected: Any) -> float:
        """The relative error in the Frobenius norm, the largest of all ranks."""
        expected = expected.float()
        return self.slowest(float((x.float() - expected).norm() / expected.norm()))

    def slowest(self, number: float) -> float:
        """The largest of all ranks' numbers; all ranks wait for each other."""
        tensor = self.torch.tensor(number, dtype=self.torch.float64, device=self.device)
        self.torch.distributed.all_reduce(tensor, op=self.torch.distributed.ReduceOp.MAX)
        return float(tensor)

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        if not self.settings.on_cpu:
            self.torch.cuda.synchronize()

    def ms(self, call: Callable[[], Any]) -> float:
        """Milliseconds of a call, from an idle device until it is idle again."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return (time.perf_counter() - start) * 1e3

    def extra_bytes(self, call: Callable[[], tuple[Any, Any, Any]]) -> int:
        """The peak of PyTorch's allocator in a call, less what it returns; 0 on the CPU."""
        if self.settings.on_cpu:
            return 0
        self.torch.cuda.reset_peak_memory_stats()
        before = self.torch.cuda.memory_allocated()
        found = call()
        self.wait()
        returned = sum(x.nbytes for x in found if x is not None)
        return self.torch.cuda.max_memory_allocated() - before - returned

    def collectives(self, shape: Shape) -> list[dict[str, Any]]:
        """Each collective of a call, alone: bytes, ms, and bytes a second through a link of a ring."""
        from cce_numba.torch.communicator import _all_gather, _reduce_scatter

        N, _, D = shape
        R, torch, dist = self.settings.ranks, self.torch, self.torch.distributed
        packed = torch.zeros(12 * N, dtype=torch.uint8, device=self.device)
        every = packed.new_empty(R * 12 * N)
        d_e = torch.zeros(-(-N * D // R) * R, device=self.device)
        part = d_e.new_empty(len(d_e) // R)
        calls: tuple[tuple[str, int, float, Callable[[], Any]], ...] = (
            ("all_gather", packed.nbytes, R - 1, lambda: _all_gather(every, packed)),
            ("all_reduce", d_e.nbytes, 2 * (R - 1) / R, lambda: dist.all_reduce(d_e)),
            ("reduce_scatter", d_e.nbytes, (R - 1) / R, lambda: _reduce_scatter(part, d_e)),
        )
        found = []
        for name, n_bytes, moved, call in calls:
            call()
            times = [self.slowest(self.ms(call)) for _ in range(self.settings.rounds)]
            per_second = n_bytes * moved / statistics.median(times) * 1e3
            found.append({"name": name, "bytes": n_bytes, "time": record.summary(times), "bytes_per_second": per_second})
        return found
