"""How fast `mma.sync` is on this GPU: kernels that do nothing else, with the tiles of the `mma.sync` kernels.

Eight warps on each multiprocessor multiply 64 x 64 x 16 at a time, as the forward's do. "registers" multiplies the same
operands again and again; "shared memory" loads them by `ldmatrix` before each product. Nothing is copied and nobody waits, so
no kernel of ours can be faster than the first, nor than the second unless it loads less. Operands are random, since a GPU's
clock follows its power.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from benchmarks.measure import device, timing
from cce_numba.ampere.product import make_a_address, make_b_address, make_load_operands, make_multiply
from cce_numba.ampere.tiles import ALIGNMENT_BYTES, SLABS, THREADS, AmpereTiles
from cce_numba.launch.kernel import Kernel, kernel_factory
from cce_numba.ptx import arithmetic, memory
from cce_numba.ptx import fragment as fragments
from cce_numba.survivors import make_mix
from cce_numba.tensor_core.fragment import fold_rows
from cce_numba.tensor_core.records import I32, U64

WAYS = ("registers", "shared memory")
_TILES = AmpereTiles()  # of whose stages one is used
_TURNS, _STEPS = 4000, 4


@kernel_factory
def make_limit_kernel(loads: bool) -> Kernel:
    """The kernel. loads: operands come from shared memory each time."""
    n, words = _TILES.warp_v, _TILES.stage_bytes // 4
    load_0, load_1, load_2, load_3 = (make_load_operands(n, step, False, False) for step in range(_STEPS))
    multiply, zeros = make_multiply(n, "bf16"), fragments.zeros(n)
    a_address, b_address = make_a_address(False), make_b_address(n, False)
    a_bytes, alignment = np.uint32(_TILES.a_bytes), np.uint32(ALIGNMENT_BYTES - 1)
    mix = cuda.jit(device=True, forceinline=True)(make_mix(np.uint32))

    def plus(so_far: Any, x: Any, _: Any) -> Any:
        return so_far + x

    total_of_rows = fold_rows(n, plus)

    @cuda.jit(device=True, forceinline=True)
    def total(sums: Any) -> Any:
        zero = np.float32(0)
        rows = total_of_rows(sums, zero, zero, zero, zero)
        return rows[0] + rows[1]

    def limit_kernel(turns: Any, results: Any) -> None:
        """results: address of float32 for each thread, by which the sums are used."""
        smem = np.uint32((memory.shared_address(cuda.shared.array(0, np.uint8)) + alignment) & ~alignment)
        thread = np.int32(cuda.threadIdx.x)
        warp, lane = np.int32(thread >> 5), np.int32(thread & 31)
        for word in range(thread, words, THREADS):
            # Two bfloat16 numbers of random signs and mantissas between 1/2 and 2.
            random = np.uint32(np.uint32(mix(np.int64(word))) & np.uint32(0x80FF80FF)) | np.uint32(0x3F003F00)
            memory.store_shared_i32(np.uint32(smem + np.uint32(4 * word)), np.int32(random))
        cuda.syncthreads()
        a = np.uint32(smem + a_address(lane, np.int32(warp & 1)))
        first = np.uint32(smem + a_bytes + b_address(lane, np.int32(warp >> 1), 0))
        b = first, np.uint32(first + np.uint32(2048)), np.uint32(first + np.uint32(4096)), np.uint32(first + np.uint32(6144))
        sums = (zeros(), zeros(), zeros(), zeros())
        operands = load_0(a, b)
        turn = np.int32(0)
        while turn < turns:
            if loads:
                operands_1 = load_1(a, b)
                sums = multiply(sums, operands)
                operands_2 = load_2(a, b)
                sums = multiply(sums, operands_1)
                operands_3 = load_3(a, b)
                sums = multiply(sums, operands_2)
                operands = load_0(a, b)
                sums = multiply(sums, operands_3)
            else:
                sums = multiply(multiply(multiply(multiply(sums, operands), operands), operands), operands)
            turn = arithmetic.opaque_i32(np.int32(turn + 1))
        found = total(sums[0]) + total(sums[1]) + total(sums[2]) + total(sums[3])
        memory.store_global_f32(results + np.uint64(4 * (THREADS * cuda.blockIdx.x + thread)), found)

    return Kernel(limit_kernel, (I32, U64), threads=THREADS, smem_bytes=ALIGNMENT_BYTES + _TILES.stage_bytes)


def flops(ctas: int, turns: int) -> int:
    """What so many CTAs compute: a product is 16 x 8 x 16."""
    products = _STEPS * SLABS * _TILES.warp_v // 8
    return ctas * THREADS // 32 * turns * products * 2 * 16 * 8 * 16


def calls(turns: int = _TURNS) -> tuple[dict[str, Any], int]:
    """A call for each of `WAYS`, and the operations of one."""
    xp, multiprocessors = device.cupy(), device.multiprocessors()
    results = xp.empty(THREADS * multiprocessors, np.float32)

    def call_of(way: str) -> Any:
        kernel = make_limit_kernel(way == "shared memory")
        return lambda: kernel.launch(multiprocessors, turns, results.data.ptr)

    return {way: call_of(way) for way in WAYS}, flops(multiprocessors, turns)


def measured(product: device.Call, product_flops: int, rounds: int) -> dict[str, Any]:
    """Rates in TFLOP/s, and X: the time that each way would take for the product, over cuBLAS's, which takes turns with it."""
    ours, ours_flops = calls()
    timing.warm_up([product, *ours.values()], 0.5)
    ms = timing.interleaved({"cuBLAS": product} | ours, rounds, burst=1)
    found: dict[str, Any] = {}
    for way in WAYS:
        scaled = [time * product_flops / ours_flops for time in ms[way]]
        median = sorted(ms[way])[len(ms[way]) // 2]
        found[way] = {"tflops": round(ours_flops / median / 1e9, 1), "x": timing.ratios(scaled, ms["cuBLAS"])}
    return found
