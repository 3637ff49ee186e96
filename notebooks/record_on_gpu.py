"""Records what only a GPU can answer, for the lessons to show where there is none: `python record_on_gpu.py [NAME ...]`.

    ladder     how long the kernels of lessons 2 to 5 take, and cuBLAS's product
    atomics    how many different sums a kernel with atomic additions gives (lesson 8)
    fragment   which element of a tile each lane of a warp holds (lesson 10)
    timeline   cycle counters of the forward's kernel on an H100 or H200: who waits for whom (lesson 11)

Writes recorded/NAME.json. All of them take less than two minutes on an H100, most of it compilation.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import lessons
from lessons import sources

RECORDED = Path(__file__).parent / "recorded"


def surroundings() -> dict[str, Any]:
    """Where and when."""
    from lessons import machine

    # Where the files came without their history, whoever brought them says.
    commit = os.environ.get("CCE_COMMIT", "")
    if not commit:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "describe", "--always", "--dirty"]
            commit = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RECORDED.parent).stdout.strip()
    return {"date": datetime.date.today().isoformat(), "commit": commit or "unknown", "gpu": machine.name()}


def ladder(N: int = 2048, V: int = 32768, D: int = 1024, runs: int = 5) -> dict[str, Any]:
    """Milliseconds of each kernel, medians of some runs."""
    import cupy

    from lessons.machine import gpu_ms

    random = cupy.random.default_rng(0)
    e, c = (random.standard_normal((rows, D), dtype=np.float32) for rows in (N, V))
    c_turned, z = cupy.ascontiguousarray(c.T), cupy.empty((N, V), np.float32)
    first, tiles, blocked = (sources.definitions(lesson) for lesson in (3, 4, 5))
    rows_of_8, tiles_of_32, tiles_of_128 = (V // 32, N // 8), (V // 32, N // 32), (V // 128, N // 128)
    tiled, padded = tiles["make_tiled_kernel"](32), tiles["make_tiled_kernel"](32, unused=1)
    calls = {
        "naive_kernel": lambda: first["naive_kernel"][rows_of_8, (32, 8)](e, c, z),
        "turned_kernel": lambda: first["turned_kernel"][rows_of_8, (32, 8)](e, c_turned, z),
        "tiled_kernel": lambda: tiled[tiles_of_32, (32, 32)](e, c, z),
        "padded_kernel": lambda: padded[tiles_of_32, (32, 32)](e, c, z),
        "blocked_kernel": _launch(blocked["make_blocked_kernel"](16, 8, 8), tiles_of_128, (16, 16), e, c, z),
        "cuBLAS": lambda: cupy.matmul(e, c_turned, out=z),
    }
    right, ms = cupy.matmul(e[:256].astype(np.float64), c_turned[:, :256].astype(np.float64)), {}
    for name, call in calls.items():
        z.fill(0)
        call()
        error = float(abs(z[:256, :256] - right).max())
        assert error < 1e-2, f"{name} is wrong by {error}"
        ms[name] = round(gpu_ms(call, runs), 3)
    few, lse = z[:1024], cupy.empty(1024, np.float32)
    online = sources.definitions(2)["online_lse_kernel"]
    return {
        "problem": {"N": N, "V": V, "D": D, "dtype": "float32"},
        "ms": ms,
        "online_lse_ms": round(gpu_ms(lambda: online[1024 // 64, 64](few, lse), runs), 3),
    }


def _launch(kernel: Any, grid: Any, block: Any, *arguments: Any) -> Callable[[], None]:
    return lambda: kernel[grid, block](*arguments)


def atomics(runs: int = 100) -> dict[str, Any]:
    """Different sums of the same 8192 terms."""
    import cupy

    kernel = sources.definitions(8)["atomic_sum_kernel"]
    rng = np.random.default_rng(0)
    terms = cupy.asarray((rng.standard_normal(8192) * rng.random(8192) ** 4).astype(np.float32))
    sums = set()
    for _ in range(runs):
        total = cupy.zeros(1, np.float32)
        kernel[8192 // 256, 256](terms, total)
        sums.add(float(total[0]))
    return {"runs": runs, "different_sums": len(sums)}


def fragment() -> dict[str, Any]:
    """(32, 4): 8 * row + column of the elements that each lane holds."""
    import cupy
    import ml_dtypes
    from numba import cuda

    a, b = np.zeros((16, 16), np.float32), np.zeros((8, 16), np.float32)
    a[:, 0], a[:, 1], b[:, 0], b[:, 1] = np.arange(16), 1, 8, np.arange(8)
    out = cupy.zeros((32, 4), np.float32)
    bits = [cupy.asarray(x.astype(ml_dtypes.bfloat16).view(np.uint16)) for x in (a, b)]
    cuda.jit(sources.definitions(10)["tile_kernel"])[1, 32](*bits, out)
    lanes = out.get()
    assert sorted(lanes.ravel().tolist()) == list(range(128)), "each element is held once"
    return {"lanes": lanes.astype(int).tolist()}


# What is stamped. Uses of the ring are numbered; turns are not, so their stamps are kept by time.
USES, TURNS, BUCKET = 4096, 65536, 8  # uses that are kept; places for turns, each of 2**8 cycles
KINDS = ("asks", "gets", "released_0", "released_1")  # by use: the producer's empty stage, and each consumer's products
TURN_KINDS = ("asks_0", "asks_1", "hands_0", "hands_1")  # consumer 0 or 1 waits for its turn; hands it to the other
WORDS = len(KINDS) * USES + len(TURN_KINDS) * TURNS


@contextlib.contextmanager
def stamped(address: int) -> Iterator[None]:
    """Within it, kernels of the forward that are made write cycle counters of CTA 0 to uint64 words at an address."""
    from cce_numba.hopper.forward import consumer, kernel, producer

    stamp_use, stamp_turn = _stamps(address)

    def with_stamps(tiles: Any) -> SimpleNamespace:
        return _stamped_ring(tiles, stamp_use, stamp_turn)

    with (
        mock.patch.object(consumer, "make_ring", with_stamps),
        mock.patch.object(producer, "make_ring", with_stamps),
        mock.patch.object(consumer, "make_products", consumer.make_products.__wrapped__),  # not from its cache
        mock.patch.object(kernel, "make_produce", producer.make_produce.__wrapped__),
    ):
        yield


def _stamps(address: int) -> tuple[Any, Any]:
    from numba import cuda

    from cce_numba.ptx.instruction import U64, instruction

    cycles = instruction("mov.u64 $0, %clock64;", (), U64, name="clock64")
    store = instruction("st.global.u64 [$0], $1;", (U64, U64), name="st.global.u64")
    by_use, by_time = np.uint64(address), np.uint64(address + 8 * len(KINDS) * USES)
    uses, turns, bucket = np.uint64(USES), np.uint64(TURNS), np.uint64(BUCKET)

    @cuda.jit(device=True, forceinline=True)
    def stamp_use(kind: Any, use: Any) -> None:
        if cuda.blockIdx.x == 0 and np.uint64(use) < uses:
            store(by_use + np.uint64(8) * (np.uint64(kind) * uses + np.uint64(use)), cycles())

    @cuda.jit(device=True, forceinline=True)
    def stamp_turn(kind: Any) -> None:
        if cuda.blockIdx.x == 0:
            now = cycles()
            store(by_time + np.uint64(8) * (np.uint64(kind) * turns + (now >> bucket) % turns), now)

    return stamp_use, stamp_turn


def _stamped_ring(tiles: Any, stamp_use: Any, stamp_turn: Any) -> SimpleNamespace:
    from numba import cuda

    from cce_numba.hopper.ring import make_ring

    ring_ = make_ring(tiles)
    wait_empty_, release_, turn_ = ring_.wait_empty, ring_.release, ring_.turn

    @cuda.jit(device=True, forceinline=True)
    def wait_empty(ring: Any, use: Any) -> None:
        if cuda.threadIdx.x == 0:
            stamp_use(0, use)
        wait_empty_(ring, use)
        if cuda.threadIdx.x == 0:
            stamp_use(1, use)

    @cuda.jit(device=True, forceinline=True)
    def release(ring: Any, use: Any, thread: Any) -> None:
        if cuda.threadIdx.x == 128:
            stamp_use(2, use)
        if cuda.threadIdx.x == 256:
            stamp_use(3, use)
        release_(ring, use, thread)

    @cuda.jit(device=True, forceinline=True)
    def turn(ring: Any, consumer: Any) -> Any:
        """It is asked for one's own turn by those who wait, and for the other's by who hands over."""
        if cuda.threadIdx.x == 128:
            stamp_turn(0 if consumer == 0 else 2)
        if cuda.threadIdx.x == 256:
            stamp_turn(1 if consumer == 1 else 3)
        return turn_(ring, consumer)

    return SimpleNamespace(**{**vars(ring_), "wait_empty": wait_empty, "release": release, "turn": turn})


def timeline(N: int = 8192, V: int = 32768, D: int = 2304) -> dict[str, Any]:
    """Cycles of CTA 0 since its first stamp: {kind: [[use, cycle], ...]}, and {kind of turn: [cycle, ...]}."""
    import cupy

    import cce_numba as cce
    from cce_numba.hopper.forward import host, kernel
    from cce_numba.interchange import BFLOAT16

    random = cupy.random.default_rng(0)
    scales = {N: 1.0, V: 2 / D**0.5}
    e, c = ((random.standard_normal((rows, D), dtype=np.float32) * scale).astype(BFLOAT16) for rows, scale in scales.items())
    targets = random.integers(0, V, N)
    words = cupy.zeros(WORDS, np.uint64)
    right = cce.forward(e, c, targets, backend="hopper")
    made: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(kernel.make_forward_kernel.__wrapped__(*args, **kwargs))
        return made[0]

    with stamped(words.data.ptr), mock.patch.object(host, "make_forward_kernel", make):
        cce.forward(e, c, targets, backend="hopper", filter_eps=None)  # compiles, and warms up
        cupy.cuda.Device().synchronize()
        words.fill(0)
        result = cce.forward(e, c, targets, backend="hopper", filter_eps=None)
        cupy.cuda.Device().synchronize()
    assert float(abs(result.lse - right.lse).max()) < 1e-3, "stamps change no result"
    seen = words.get()
    by_use = seen[: len(KINDS) * USES].reshape(len(KINDS), USES)
    by_time = seen[len(KINDS) * USES :].reshape(len(TURN_KINDS), TURNS)
    start = int(min(row[row > 0].min() for row in by_use if (row > 0).any()))
    tiles = result.plan.tiles
    return {
        "problem": {"N": N, "V": V, "D": D, "dtype": "bfloat16", "filter_eps": None},
        "tiles": {"block_n": tiles.block_n, "block_v": tiles.block_v, "block_d": tiles.block_d, "stages": tiles.stages},
        "uses": {
            kind: [[int(use), int(row[use]) - start] for use in np.flatnonzero(row)[:600]]
            for kind, row in zip(KINDS, by_use, strict=True)
        },
        "turns": {
            kind: sorted(int(cycle) - start for cycle in row[row > 0])[:60]
            for kind, row in zip(TURN_KINDS, by_time, strict=True)
        },
    }


RECORDINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "ladder": ladder,
    "atomics": atomics,
    "fragment": fragment,
    "timeline": timeline,
}


def main() -> int:
    """Records what was asked for, one after the other; one that fails does not keep the others."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*RECORDINGS, []], help="all by default")
    names = parser.parse_args().names or list(RECORDINGS)
    if not lessons.begin(simulator=False).has_gpu():
        print("record_on_gpu: error: needs an NVIDIA GPU and CuPy", file=sys.stderr)
        return 2
    RECORDED.mkdir(exist_ok=True)
    failed = 0
    for name in names:
        begin = time.monotonic()
        try:
            recorded = RECORDINGS[name]()
        except Exception as error:
            failed += 1
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
            continue
        text = json.dumps({"surroundings": surroundings(), **recorded}, separators=(",", ":"))
        (RECORDED / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{name}: {time.monotonic() - begin:.0f} s, {len(text) / 1024:.0f} KiB", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
