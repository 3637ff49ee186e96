"""The backward of the `mma.sync` kernels, compiled without a GPU for machines that run it; see `forward/test_compile.py`."""

from __future__ import annotations

import numpy as np
import pytest

from cce_numba.interchange import BFLOAT16
from cce_numba.tensor_core.backward.form import GradientForm
from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from cce_numba.ampere.backward.kernel import make_backward_kernel
from cce_numba.ampere.backward.tiles import backward_tiles_for
from cce_numba.ampere.tiles import SLABS, smem_bytes_of
from tests.ampere.forward.test_compile import MACHINES, NEWER, PRODUCTS

pytestmark = pytest.mark.usefixtures("compiler")

DTYPES = {"f16": np.dtype(np.float16), "bf16": BFLOAT16, "f32": np.dtype(np.float32)}
SPILLED_BYTES = 256  # with all options: what a slab's tokens are multiplied by, and what the loops over stages do not touch


@pytest.mark.parametrize(
    ("cc", "dtype", "options"),
    [
        # Each machine: what is launched most. Then all options.
        *((cc, "bf16", {"by_chance": True}) for cc in MACHINES),
        ((9, 0), "f16", {"capped": True, "with_sums": True, "scaled": True, "smoothed": True, "several": True}),
    ],
    ids=str,
)
def test_the_backward(cc, dtype, options):
    """One test for each, with all that is to be said of it: compiling is what takes time."""
    tiles = backward_tiles_for(cc)
    kernel = make_backward_kernel(tiles, DTYPES[dtype], GradientForm(**options))
    compiled = offline.compile_launched(kernel, cc)

    assert compiled.notices == []
    assert compiled.spilled_bytes <= (SPILLED_BYTES if len(options) > 1 else 0)
    assert compiled.count(r"(ld|st)\.local\S*") == 0, "no array has an index at run time"
    assert compiled.count(r"call(\.uni)?") == 0
    assert compiled.smem_bytes == 0, "all shared memory is dynamic"
    assert kernel.smem_bytes == tiles.smem_bytes <= smem_bytes_of(cc)
    assert compiled.count(NEWER) == 0

    # Of logits, dE and dC: a stage is four times 16 terms, and a warp has six times eight columns of four slabs.
    assert compiled.count(PRODUCTS[dtype][0]) == 3 * 4 * SLABS * 6
    # Operands of 16 terms, once more those of the first stage. Logits have A and B along K, dE none of them, dC only A.
    a, b = 5 * SLABS, 5 * 3
    assert compiled.count(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16") == (a + b) + a
    assert compiled.count(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16") == (a + b) + b
    # 128 rows of A and 192 of B, 32 at a time, when the ring is filled and when it is filled again.
    assert compiled.count(r"cp\.async\.cg\.shared\.global") == 3 * 2 * (128 + 192) // 32
    # Tiles of G leave as columns: each word of two numbers is transposed.
    assert compiled.count(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16") == SLABS * 6 * 2
    assert compiled.count(rf"cvt\.rn\.{dtype}x2\.f32") == 3 * SLABS * 6 * 2 + options.get("several", False)

    assert compiled.count(r"atom\.relaxed\.gpu\.global\.add\.u32") == 2, "the first job, and the next one"
    assert compiled.count(r"red\.release\.gpu\.global\.add\.u32") == 1, "one job more is done"
    # Sums are in the same order each time: one thread owns each number in each phase.
    assert compiled.count(r"(atom|red)\.\S*") == 3


def test_the_backward_in_float32():
    """G goes to memory as it is; operands across K are loaded number by number."""
    kernel = make_backward_kernel(backward_tiles_for((9, 0)), DTYPES["f32"], GradientForm(by_chance=True))
    compiled = offline.compile_launched(kernel)
    product, times = PRODUCTS["f32"]
    assert compiled.notices == []
    assert compiled.spilled_bytes <= 512  # none of it in the loops over stages, but for a few addresses
    assert compiled.count(r"(ld|st)\.local\S*") == 0
    assert compiled.count(product) == times * 3 * 4 * SLABS * 6
    # Logits have A and B along K, dE none of them, dC only A.
    assert compiled.count(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16") == 4 * (SLABS + 3) + 4 * SLABS
    assert compiled.count(r"ld\.shared\.b32") == 4 * 4 * (SLABS + 3) + 4 * 4 * 3
    assert compiled.count(r"cp\.async\.cg\.shared\.global") == 3 * 2 * (128 + 192) // 32
    assert compiled.count(r"movmatrix\S*") == 0
    assert compiled.count(r"(atom|red)\.\S*") == 3
