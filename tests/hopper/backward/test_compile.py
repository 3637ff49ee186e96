"""The backward's kernel, compiled for a real GPU without one.

What would silently cost speed is an error here: more spilled registers than are known, products that the assembler serialised,
or exchanges of registers that it ignored.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from cce_numba.interchange import BFLOAT16
from cce_numba.tensor_core.backward.form import GradientForm
from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from cce_numba.hopper.backward.begin import make_begin_kernel
from cce_numba.hopper.backward.kernel import make_backward_kernel
from cce_numba.hopper.backward.tiles import BackwardTiles
from cce_numba.hopper.tiles import MAX_SMEM_BYTES
from cce_numba.launch.divergence import Divergence
from cce_numba.tensor_core.divergence import TeacherForm

pytestmark = pytest.mark.usefixtures("compiler")

DTYPES = {"f16": np.dtype(np.float16), "bf16": BFLOAT16}
TENSOR_COPY = r"cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\.tile\.mbarrier::complete_tx::bytes"
# What the producer's warps know of a job, in 56 registers, and what consumers know beside 192 sums. Nothing is spilled in the
# loops over the stages that multiply, where the tensor cores would wait for it.
SPILLED_BYTES = 1024


@pytest.mark.parametrize(
    ("cluster", "dtype", "capped", "with_sums"),
    [(2, "bf16", False, False), (1, "bf16", True, True), (1, "f16", True, False), (2, "f16", False, True)],
)
def test_the_backward(cluster, dtype, capped, with_sums):
    """Each pair of options; one test for each, with all that is to be said of it: compiling is what takes time."""
    tiles = BackwardTiles(cluster=cluster)
    kernel = make_backward_kernel(tiles, DTYPES[dtype], GradientForm(capped=capped, with_sums=with_sums))
    compiled = offline.compile_hopper(kernel)

    assert compiled.notices == []
    assert compiled.registers == 65536 // 384 // 8 * 8 == 168
    assert compiled.spilled_bytes <= SPILLED_BYTES
    assert compiled.count(r"(ld|st)\.local\S*") == 0, "no array has an index at run time: what is on the stack is spilled"
    assert compiled.count(r"call(\.uni)?") == 0
    assert compiled.smem_bytes == 0, "all shared memory is dynamic: static memory would move the ring"
    assert kernel.smem_bytes == tiles.smem_bytes <= MAX_SMEM_BYTES
    assert (kernel.threads, kernel.cluster) == (tiles.threads, cluster)
    assert compiled.count(rf"setmaxnreg\.dec\.sync\.aligned\.u32 {tiles.producer_registers}") == 1
    assert compiled.count(rf"setmaxnreg\.inc\.sync\.aligned\.u32 {tiles.consumer_registers}") == 1

    # Of logits, dE and dC: two halves of 64 rows, four products of 16 terms each. More would be loops written out.
    assert compiled.count(rf"wgmma\.mma_async\.sync\.aligned\.m64n192k16\.f32\.{dtype}\.{dtype}") == 3 * 8
    assert compiled.count(r"wgmma\.mma_async\S+") == 3 * 8
    for transposed in ("0, 0", "1, 1", "0, 1"):
        assert len(re.findall(rf"p, 1, 1, {transposed};", compiled.ptx)) == 8

    assert compiled.count(TENSOR_COPY) >= 3, "panels of neighbours, for each product"
    # What a pair shares, for each product, and the number of the job that the first takes for the second.
    assert (compiled.count(rf"{TENSOR_COPY}\.multicast::cluster") >= 3) == (cluster == 2)
    assert compiled.count(r"st\.async\S+") == cluster - 1
    # Rows that are no neighbours, 16 a thread for A and 24 for B: for logits two stages of both, and one that may be left; for
    # dE two stages of B; for dC one of both. More would be loops written out.
    assert compiled.count(r"cp\.async\.cg\.shared\.global") == 3 * (16 + 24) + 2 * 24 + (16 + 24)
    assert compiled.count(r"cp\.async\.mbarrier\.arrive\.noinc\.shared::cta\.b64") == 3 + 2 + 1
    assert compiled.count(r"fence\.proxy\.async") == 2, "G, by those who store it and by the one who fetches it"

    # Tiles in registers are 24 groups of 8 columns, two rows of each thread, two halves. They leave through shared memory: G as
    # columns, dE and dC as rows; in all three, two groups at a time.
    groups = 24 * 2
    assert compiled.count(r"stmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16") == groups // 2
    assert compiled.count(r"stmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16") == 2 * groups // 2
    assert compiled.count(rf"cvt\.rn\.{dtype}x2\.f32") == 3 * 2 * groups
    assert compiled.count(r"ld\.shared\.v4\.u32") == compiled.count(r"@p st\.global(\.cs)?\.v4\.u32") == 3 * groups // 2
    # Columns of the list and their biases are loaded two at a time.
    assert compiled.count(r"ld\.shared\.v2\.s32") == compiled.count(r"ld\.shared\.v2\.f32") == groups
    assert compiled.count(r"ex2\.approx\.ftz\.f32") >= 4 * groups
    # Sums of dE that are not complete: stored, added to, and at last added. Finished rows in float32: two of dE, two of dC.
    assert compiled.count(r"st\.global\.v4\.f32") == groups
    assert compiled.count(r"red\.relaxed\.gpu\.global\.add\.v4\.f32") == groups
    assert compiled.count(r"@p ld\.global\.cg\.v4\.u32") == groups + 2 * 4 + 1, "and the lists that dE gathers by, bits for dC"
    assert compiled.count(r"@p st\.global\.v2\.f32") == 2 * 2 * groups
    # Sums cost nothing where they are not wanted: of two columns for each group, over the lanes of a column; and dbias itself.
    assert compiled.count(r"st\.global\.f32") == (2 * groups + 1 if with_sums else 0)
    assert (compiled.count(r"shfl\.sync\.bfly\.b32") >= 6 * groups) == with_sums

    assert compiled.count(r"atom\.relaxed\.gpu\.global\.add\.u32") == 1, "the next job"
    assert compiled.count(r"red\.release\.gpu\.global\.add\.u32") == 1, "one job more is done"
    # Sums are in the same order each time: of what is added to in memory, one thread owns each number in each phase.
    assert compiled.count(r"(atom|red)\.\S*") == 2 + groups


def test_the_backward_of_a_divergence():
    """From a teacher of another dtype. One alone: compiling it takes half a minute."""
    form = GradientForm(teacher=TeacherForm(Divergence("forward_kl", 0.3), DTYPES["f16"]))
    compiled = offline.compile_hopper(make_backward_kernel(BackwardTiles(cluster=2), DTYPES["bf16"], form))
    assert compiled.notices == []
    assert compiled.registers == 168
    assert compiled.spilled_bytes <= 2 * SPILLED_BYTES
    assert compiled.count(r"(ld|st)\.local\S*") == 0
    assert compiled.count(r"call(\.uni)?") == 0
    assert compiled.smem_bytes == 0
    # Of the teacher's logits, the student's, dE and dC.
    assert compiled.count(r"wgmma\.mma_async\S+") == 4 * 8
    # The teacher's logarithms are parked and read; sums of dE are stored alike.
    groups = 24 * 2
    assert compiled.count(r"ld\.global\.v4\.f32") == groups
    assert compiled.count(r"st\.global\.v4\.f32") == 2 * groups


@pytest.mark.parametrize("has_teacher", [False, True])
def test_the_beginning(has_teacher):
    compiled = offline.compile_hopper(make_begin_kernel(has_teacher))
    assert compiled.spilled_bytes == compiled.stack_bytes == 0
    assert compiled.notices == []
    assert compiled.registers <= 65536 // 1024
