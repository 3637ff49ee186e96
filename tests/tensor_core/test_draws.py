"""The draws of the unbiased filter on tensor cores: those that `cce_numba.survivors` defines, and so everybody else's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import cuda

from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator knows no tensor cores", allow_module_level=True)

from cce_numba.launch.kernel import Kernel, pointer_to
from cce_numba.survivors import draw_seed, draws
from cce_numba.tensor_core.draws import draw, make_draw_seed_kernel
from cce_numba.tensor_core.records import I64, Tokens

SEEDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 7 + (64_001 << 32))  # the last with the first entry of a shard


def make_draw_kernel() -> Kernel:
    """out[i] = the draw of blocks[i] and entries[i]."""

    def draw_kernel(blocks: Any, entries: Any, seed: Any, out: Any) -> None:
        i = cuda.blockIdx.x * 128 + cuda.threadIdx.x
        out[i] = draw(blocks[i], entries[i], seed)

    p_i32 = pointer_to(np.int32)
    return Kernel(draw_kernel, (p_i32, p_i32, I64, pointer_to(np.float32)), threads=128)


@pytest.mark.usefixtures("compiler")
def test_a_draw_takes_a_few_instructions():
    compiled = offline.compile_hopper(make_draw_kernel())
    assert compiled.spilled_bytes == compiled.stack_bytes == 0
    assert compiled.count(r"mul\.\S+64") == 0, "products of 32 bits"
    compiled = offline.compile_hopper(make_draw_seed_kernel())
    assert compiled.spilled_bytes == compiled.stack_bytes == 0
    assert compiled.count(r"(atom|red)\.\S*") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_everybodys(gpu, seed):
    cupy, rng, n = pytest.importorskip("cupy"), np.random.default_rng(0), 4096
    blocks, entries = rng.integers(0, 2**24, n).astype(np.int32), rng.integers(0, 2**31, n).astype(np.int32)
    blocks[:4], entries[:4] = [0, 0, 1, 2**24 - 1], [0, 2**31 - 1, 1, 0]
    arrays, out = [cupy.asarray(x) for x in (blocks, entries)], cupy.empty(n, np.float32)
    make_draw_kernel().launch(n // 128, *(x.data.ptr for x in arrays), seed, out.data.ptr)
    expected = draws(blocks.astype(np.int64), entries.astype(np.int64), seed)
    np.testing.assert_array_equal(out.get(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("is_array", [False, True])
@pytest.mark.parametrize("n_valid", [0, 1, 31, 1024, 5000])
def test_the_seed_is_everybodys(gpu, n_valid, is_array):
    cupy, rng = pytest.importorskip("cupy"), np.random.default_rng(n_valid)
    targets = rng.integers(-100, 2**40, 6000)
    listed = np.sort(rng.permutation(6000)[:n_valid]).astype(np.int32)
    for number in (0, 7, 2**32 - 1):
        on_device = {
            "targets": cupy.asarray(targets),
            "listed": cupy.asarray(np.append(listed, 2**30).astype(np.int32)),  # the last one nobody reads
            "n_valid": cupy.asarray([n_valid]),
            "number": cupy.asarray([number]),
            "seed": cupy.zeros(1, np.int64),
        }
        address = {name: array.data.ptr for name, array in on_device.items()}
        tokens = Tokens(address["listed"], address["n_valid"], 0, 6000)
        given = (0, address["number"]) if is_array else (number, 0)
        for first_entry in (0, 64_001):
            make_draw_seed_kernel().launch(1, tokens, address["targets"], *given, first_entry, address["seed"])
            assert int(on_device["seed"][0]) == int(draw_seed(targets[listed], number)) + (first_entry << 32)
