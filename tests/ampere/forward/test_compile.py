"""The forward of the `mma.sync` kernels, compiled without a GPU for each kind of machine that runs it.

What would silently cost speed is an error here: spilled registers, operands that are not loaded by `ldmatrix`, loops that are
written out; and so are instructions that a machine lacks, and more shared memory than it has.
"""

from __future__ import annotations

import numpy as np
import pytest

from cce_numba.interchange import BFLOAT16
from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from cce_numba.ampere.forward.kernel import make_forward_kernel
from cce_numba.ampere.tiles import SLABS, WARP_COLUMNS, smem_bytes_of, tiles_for
from cce_numba.tensor_core.folds import (
    GROUP_MAXIMA,
    MAX_SUM,
    MEAN_LOGIT,
    SEVERAL_TARGET_LOGITS,
    SURVIVORS_BY_CHANCE,
    TARGET_LOGIT,
)

pytestmark = pytest.mark.usefixtures("compiler")

F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
# A100; RTX 30; L4, L40S and RTX 40; H100; B200; RTX 50.
MACHINES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
RECORDING = (MAX_SUM, TARGET_LOGIT, SURVIVORS_BY_CHANCE)
# On 8.0, what is known of a tile's rows while the tile is multiplied; none of it in the loop over stages.
SPILLED_BYTES = 128
NEWER = r"(wgmma|stmatrix|mbarrier|setmaxnreg|fence\.proxy|cp\.async\.bulk|cp\.reduce|red\.\S*\.v[24])\S*"


# Products of a step's operands: those of 16-bit numbers, of rounded ones, or of the parts of split ones.
PRODUCTS = {
    "bf16": (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32", 1),
    "f16": (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32", 1),
    "tf32": (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32", 1),
    "f32": (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32", 3),
}


def check(kernel, compiled, tiles, cc, name, spilled_bytes=SPILLED_BYTES):
    """All that is to be said of a kernel: compiling is what takes time."""
    assert compiled.notices == []
    assert compiled.spilled_bytes <= spilled_bytes
    assert compiled.count(r"(ld|st)\.local\S*") == 0, "no array has an index at run time"
    assert compiled.count(r"call(\.uni)?") == 0
    assert compiled.smem_bytes == 0, "all shared memory is dynamic"
    assert kernel.smem_bytes == tiles.smem_bytes <= smem_bytes_of(cc)
    assert compiled.count(NEWER) == 0

    # A stage has four steps. More would be loops written out.
    n, (product, times) = tiles.block_v // WARP_COLUMNS, PRODUCTS[name]
    assert compiled.count(product) == times * 4 * SLABS * n // 8
    # Of a step; and once more those of the first stage, unless registers are needed for the parts of numbers.
    loads = SLABS + n // 16
    assert compiled.count(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16") == (4 if name == "f32" else 5) * loads
    # Rows of e and of c, 32 at a time: when the ring is filled, and when it is filled again.
    assert compiled.count(r"cp\.async\.cg\.shared\.global") == 2 * (tiles.block_n + tiles.block_v) // 32


@pytest.mark.parametrize("cc", MACHINES, ids=str)
def test_what_is_launched_most(cc):
    tiles = tiles_for(cc)
    kernel = make_forward_kernel(tiles, BFLOAT16, None, False, False, True, RECORDING)
    check(kernel, offline.compile_launched(kernel, cc), tiles, cc, "bf16")


@pytest.mark.parametrize(
    "folds", [RECORDING, (MAX_SUM, SEVERAL_TARGET_LOGITS, GROUP_MAXIMA, MEAN_LOGIT)], ids=["survivors", "mean logit"]
)
def test_all_options(folds):
    tiles = tiles_for((9, 0))
    kernel = make_forward_kernel(tiles, F16, F32, True, True, False, folds)
    check(kernel, offline.compile_launched(kernel), tiles, (9, 0), "f16")


@pytest.mark.parametrize("name", ["f32", "tf32"])
def test_float32(name):
    """None of what is spilled is in the loop over stages, which nothing here can tell: states of rows are."""
    tiles = tiles_for((9, 0), wide=True)
    kernel = make_forward_kernel(tiles, F32, None, False, False, True, RECORDING, allow_tf32=name == "tf32")
    check(kernel, offline.compile_launched(kernel), tiles, (9, 0), name, 640 if name == "f32" else 0)


def test_too_many_numbers_of_a_row():
    with pytest.raises(ValueError, match="tell each other 9 numbers of a row, and shared memory has room for 8"):
        make_forward_kernel(tiles_for((9, 0)), BFLOAT16, None, False, False, True, (MAX_SUM, *(MEAN_LOGIT,) * 7))
