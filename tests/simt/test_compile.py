"""The portable kernels, compiled for real GPUs without one: accumulators in registers, wide reads, fused multiply-adds."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda
from numba.cuda.typing.typeof import typeof

from cce_numba import arguments
from cce_numba.backend import Gradients, Weights
from cce_numba.simt import backward, forward, indexed_dot, tokens
from cce_numba.simt.tiles import choose_tiles
from tests.helpers import offline
from tests.helpers.cases import DTYPES, make_case

pytestmark = pytest.mark.usefixtures("compiler")


TERMS = {"softcap": 30.0, "label_smoothing": 0.1, "class_weights": np.ones(1000), "logit_scale": np.ones(300)}


def launches_of(dtype, monkeypatch, terms):
    """{kernel's name: (kernel, signature)}: what the host code would launch, by letting it run with launches recorded."""
    recorded = {}

    def record(kernel, grid, block, *arguments):
        types = [typeof(x.view(np.uint16) if getattr(x, "dtype", None) == DTYPES[1] else x) for x in arguments]
        recorded[kernel.py_func.__name__] = (kernel, cuda.types.void(*types))

    for module in (backward, forward, indexed_dot, tokens):
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(backward, "argument", lambda array: array)
    monkeypatch.setattr(forward, "multiprocessors", lambda: 132)
    case = make_case(0, (300,), 1000, 64, dtype, bias=True)
    p = arguments.problem(case.e, case.c, case.targets, case.options | terms)
    tiles = choose_tiles(p.compute_dtype, simulated=False)
    statistics = forward.forward(p, tiles, record_survivors=True)
    weight = np.ones(p.N, p.compute_dtype)
    into = Gradients(*(np.empty_like(x) for x in (p.e, p.c, p.bias)))
    backward.backward(p, tiles, statistics, Weights(weight, weight, weight if terms else None), into, adds=True)
    return recorded, tiles


@pytest.mark.parametrize(("cc", "terms"), [((8, 0), {}), ((9, 0), {}), ((8, 0), TERMS)], ids=["sm_80", "sm_90", "sm_80, terms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_compile_within_their_budget(dtype, cc, terms, monkeypatch):
    launches, tiles = launches_of(dtype, monkeypatch, terms)
    assert set(launches) == {
        "list_tokens_kernel",
        "indexed_dot_kernel",
        "lse_kernel",
        "finish_kernel",
        "list_columns_kernel",
        "gradient_of_logits_kernel",
        "d_e_kernel",
        "d_c_kernel",
        "d_bias_kernel",
    }
    fma = "fma.rn.f64" if dtype == np.float64 else "fma.rn.f32"
    for name, (kernel, signature) in launches.items():
        compiled = offline.compile_kernel(kernel, signature, cc)
        assert compiled.smem_bytes <= 48 * 1024, name
        if name in ("lse_kernel", "gradient_of_logits_kernel", "d_e_kernel", "d_c_kernel"):
            assert compiled.registers <= 65536 // (tiles.threads * tiles.ctas), name
            # A few values that live across the tile may be spilled; accumulators or operands would be hundreds of bytes.
            assert compiled.spilled_bytes <= 192, name
            assert compiled.count(fma) >= tiles.thread_n * tiles.thread_v * tiles.block_k, name
            if dtype != np.float64:
                assert compiled.count(r"ld\.shared\.v4\.f32") >= tiles.block_k * (tiles.thread_n + tiles.thread_v) // 4, name
        assert not compiled.count(r"(shfl|vote|redux|atom|red)\.\S+"), f"{name}: no warp-level operation, no atomics"
