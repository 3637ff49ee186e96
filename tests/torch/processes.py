"""Several processes on the CPU, with gloo: what tests run in them says in a word or two how it went.

A module of steps ends with `run(CASES)`, CASES being functions `case(rank) -> str` by name, and is started by `outcomes`.
"""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
FINE = "fine"


def outcomes(module: str, processes: int, names: list[str] | None = None) -> dict[str, str]:
    """What each case of a module came to, in the words of all ranks; FINE if all say so."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", module, str(processes), *(names or [])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)


def run(cases: Mapping[str, Callable[[int], Any]]) -> None:
    """In a module of steps, as a program: `python -m MODULE PROCESSES [NAME...]`."""
    import torch.multiprocessing

    processes, names = int(sys.argv[1]), sys.argv[2:] or list(cases)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_process, args=(processes, port, cases, names), nprocs=processes)


def _process(rank: int, processes: int, port: int, cases: Mapping[str, Callable[[int], Any]], names: list[str]) -> None:
    import torch.distributed as dist

    torch = sys.modules["torch"]
    torch.set_num_threads(1)
    of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}  # as torchrun has it
    os.environ.update({name: str(number) for name, number in of_rank.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=processes, timeout=datetime.timedelta(seconds=60))
    for name in names:
        try:
            said = cases[name](rank) or FINE
        except Exception as error:  # the others are still of interest
            said = f"{type(error).__name__} {error}"
            traceback.print_exc()
        every: list[Any] = [None] * processes
        dist.all_gather_object(every, said)
        if rank == 0:
            print(name, every[0] if len(set(every)) == 1 else every, sep="\t", flush=True)
    dist.destroy_process_group()
