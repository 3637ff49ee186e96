"""The portable kernels, compiled for real GPUs without one: accumulators in registers, wide reads, fused multiply-adds."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest

import cce_numba.simt
from cce_numba.simt.tiles import choose_tiles
from tests.helpers import offline
from tests.helpers.cases import DTYPES
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from cce_numba.commands.precompile import kernels_of

TERMS = ("bias", "softcap", "label-smoothing", "class-weights", "logit-scale")
OPTIONS = {"default": ("bias",), "drop": ("bias", "drop"), "terms": TERMS}
LARGE = {"lse_kernel", "gradient_of_logits_kernel", "d_e_kernel", "d_c_kernel"}


# Each dtype, for one compute capability and filter or the others; and once with all that a call may have.
CONFIGURATIONS = [
    *((dtype, (8, 0), "drop") for dtype in DTYPES[::2]),
    *((dtype, (9, 0), "default") for dtype in DTYPES[1::2]),
    (np.dtype(np.float32), (9, 0), "terms"),
]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("dtype", "cc", "what"), CONFIGURATIONS, ids=[f"{d}, sm_{a}{b}, {w}" for d, (a, b), w in CONFIGURATIONS]
)
def test_kernels_compile_within_their_budget(dtype, cc, what):
    _, kernels = kernels_of("simt", dtype.name, OPTIONS[what], cc)
    small = {"list_tokens_kernel", "finish_kernel", "list_columns_kernel", "d_bias_kernel"}
    if what == "default":
        small.add("draw_seed_kernel")
    if what != "terms":  # the bound of survivors, of which none are recorded where labels are smoothed under a softcap
        small.add("indexed_dot_kernel")
    assert {kernel.function.__name__ for kernel in kernels} == LARGE | small
    tiles = choose_tiles(np.dtype(np.float64 if dtype == np.float64 else np.float32), simulated=False)
    fma = "fma.rn.f64" if dtype == np.float64 else "fma.rn.f32"
    for kernel in kernels:
        compiled, name = offline.compile_launched(kernel, cc), kernel.function.__name__
        assert compiled.smem_bytes <= 48 * 1024, name
        if name in LARGE:
            assert compiled.registers <= 65536 // (tiles.threads * tiles.ctas), name
            # A few values that live across the tile may be spilled; accumulators or operands would be hundreds of bytes.
            assert compiled.spilled_bytes <= 192, name
            assert compiled.count(fma) >= tiles.thread_n * tiles.thread_v * tiles.block_k, name
            if dtype != np.float64:
                assert compiled.count(r"ld\.shared\.v4\.f32") >= tiles.block_k * (tiles.thread_n + tiles.thread_v) // 4, name
        assert not compiled.count(r"(shfl|vote|redux|atom|red)\.\S+"), f"{name}: no warp-level operation, no atomics"
        assert compiled.count(r"call(\.uni)?") == 0, f"{name}: a function that is called keeps its arrays in memory"


def test_kernels_say_what_every_parameter_is():
    """Each has a line of its own, with a comment: a record by its name, an array by its shape."""
    for path in sorted(Path(inspect.getfile(cce_numba.simt)).parent.rglob("*.py")):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and not node.name.startswith("make_"):
                for parameter in node.args.args:
                    assert "  # " in lines[parameter.lineno - 1], f"{path.name}: {node.name}: {parameter.arg}"
