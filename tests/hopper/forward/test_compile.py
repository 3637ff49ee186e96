"""The tensor-core kernels, compiled for a real GPU without one.

What would silently cost speed is an error here: spilled registers, products that the assembler serialised, or exchanges of
registers that it ignored.
"""

from __future__ import annotations

import numpy as np
import pytest

from cce_numba.interchange import BFLOAT16
from tests.helpers import offline
from tests.helpers.harness import SimulatorHarness

if SimulatorHarness.is_active():
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from cce_numba.hopper.forward.kernel import make_forward_kernel
from cce_numba.hopper.tiles import MAX_SMEM_BYTES, HopperTiles
from cce_numba.launch.divergence import Divergence
from cce_numba.tensor_core.divergence import TeacherForm
from cce_numba.tensor_core.folds import KEPT_LOGITS, MAX_SUM, SURVIVORS, TARGET_LOGIT, divergence_of
from cce_numba.tensor_core.indexed_dot import make_indexed_dot_kernel
from cce_numba.tensor_core.merge import make_merge_kernel
from cce_numba.tensor_core.reduction import make_reduce_kernel
from cce_numba.tensor_core.tokens import make_list_tokens_kernel

pytestmark = pytest.mark.usefixtures("compiler")

DTYPES = {"f16": np.dtype(np.float16), "bf16": BFLOAT16}
BIASES = {"none": lambda dtype: None, "float32": lambda dtype: np.dtype(np.float32), "same": lambda dtype: dtype}
TENSOR_COPY = r"cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\.tile\.mbarrier::complete_tx::bytes"
LOSS_ALONE, RECORDING = (MAX_SUM, TARGET_LOGIT), (MAX_SUM, TARGET_LOGIT, SURVIVORS)
# A dozen numbers of a thread that a loop over stages does not touch: rows' sums, and what they are multiplied by.
SPILLED_WITH_A_TEACHER = 512
REGISTERS = 65536 // 384 // 8 * 8  # each of the threads' share of a multiprocessor's, in units of 8


def check_fits(compiled: offline.Compiled, spilled_bytes: int = 0) -> None:
    """All in registers, nothing called, and nothing that the assembler had to remark on."""
    assert compiled.spilled_bytes <= spilled_bytes
    assert compiled.stack_bytes <= spilled_bytes
    assert compiled.notices == []
    assert compiled.count(r"call(\.uni)?") == 0


# Each pair of options, and what is launched most.
CONFIGURATIONS = [
    ("bf16", "none", False, False),
    ("bf16", "none", False, True),
    ("bf16", "none", True, True),
    ("bf16", "float32", False, False),
    ("bf16", "same", True, False),
    ("f16", "none", False, False),
    ("f16", "float32", True, True),
    ("f16", "same", False, True),
]


@pytest.mark.parametrize(("dtype", "bias", "capped", "record"), CONFIGURATIONS)
def test_the_forward(dtype, bias, capped, record):
    """One test for each configuration, with all that is to be said of it: compiling is what takes time."""
    tiles = HopperTiles()
    folds = RECORDING if record else LOSS_ALONE
    kernel = make_forward_kernel(tiles, DTYPES[dtype], BIASES[bias](DTYPES[dtype]), capped, False, folds)
    compiled = offline.compile_hopper(kernel)

    # Of a tile's fold, not of its products: three registers, stored and loaded.
    check_fits(compiled, 24 if capped and record and bias != "none" else 0)
    assert compiled.registers <= REGISTERS == 168
    assert compiled.smem_bytes == 0, "all shared memory is dynamic: static memory would move the ring"
    assert kernel.smem_bytes == tiles.smem_bytes <= MAX_SMEM_BYTES
    assert (kernel.threads, kernel.cluster) == (tiles.threads, tiles.cluster)

    # Two halves of 64 tokens, four products of 16 terms each. More would be loops written out: code that no cache holds.
    assert compiled.count(rf"wgmma\.mma_async\.sync\.aligned\.m64n192k16\.f32\.{dtype}\.{dtype}") == 8
    assert compiled.count(r"wgmma\.mma_async\S+") == 8
    assert compiled.count(rf"{TENSOR_COPY}\.multicast::cluster") >= 1, "parts of c, for the cluster"
    assert compiled.count(TENSOR_COPY) >= 1, "rows of e"
    assert compiled.count(r"cp\.async\.cg\.shared\.global") >= 1, "rows of e that are no neighbours"
    assert compiled.count(rf"setmaxnreg\.dec\.sync\.aligned\.u32 {tiles.producer_registers}") == 1
    assert compiled.count(rf"setmaxnreg\.inc\.sync\.aligned\.u32 {tiles.consumer_registers}") == 1

    # Survivor bits cost nothing where they are not wanted.
    words = tiles.block_v // 32
    assert compiled.count(r"redux\.sync\.or\.b32") == (4 * words if record else 0), "of each half, for the filter and for dC"
    assert compiled.count(r"red\.global\.or\.b32") == (4 if record else 0)
    # An exponential for each logit of both halves, and some for each row.
    logits = 2 * 64 * tiles.block_v // 128
    assert compiled.count(r"ex2\.approx\.ftz\.f32") >= logits


@pytest.mark.parametrize("aligned", [False, True], ids=["", "aligned"])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dot_products_of_targets(dtype, bias, aligned):
    compiled = offline.compile_hopper(make_indexed_dot_kernel(DTYPES[dtype], BIASES[bias](DTYPES[dtype]), aligned))
    check_fits(compiled)
    assert compiled.smem_bytes == 0
    assert (compiled.count(r"ld\.global\.nc\.u64") >= 2) == aligned, "four numbers of e and of c at a time"
    assert compiled.count(r"ld\.global\.nc\.u16") >= 2, "what is left over, or rows that are not contiguous"
    assert compiled.count(r"red\.global\.or\.b32") == 2, "for the filter, and for dC"


@pytest.mark.parametrize("n_constants", [0, 32])
def test_the_list_of_tokens_and_constants_beside_it(n_constants):
    compiled = offline.compile_hopper(make_list_tokens_kernel(n_constants))
    check_fits(compiled)
    assert compiled.registers <= 65536 // 1024
    assert compiled.count(r"atom\S*") == 0, "the order of tokens does not depend on who comes first"


@pytest.mark.parametrize("folds", [RECORDING, (*RECORDING, KEPT_LOGITS)], ids=["survivors", "and kept logits"])
def test_the_merge_of_partial_results(folds):
    compiled = offline.compile_hopper(make_merge_kernel(HopperTiles().group_n, folds))
    check_fits(compiled)
    assert compiled.count(r"(atom|red)\.\S*") == 0, "sums are in the same order each time"


def test_the_reduction():
    check_fits(offline.compile_hopper(make_reduce_kernel()))


@pytest.mark.parametrize(
    ("kind", "dtype", "bias", "capped", "scaled"),
    [
        ("forward_kl", "bf16", "none", False, False),
        ("jsd", "f16", "none", False, True),
    ],
)
def test_the_divergence_from_a_teacher(kind, dtype, bias, capped, scaled):
    """The forward's kernel with a second head: twice the products, and nothing of the log-sum-exp."""
    tiles, which = HopperTiles(), Divergence(kind, 0.3)
    teacher = TeacherForm(which, DTYPES["bf16"], BIASES[bias](DTYPES["bf16"]), capped)
    own = DTYPES[dtype], BIASES[bias](DTYPES[dtype]), capped, scaled
    compiled = offline.compile_hopper(make_forward_kernel(tiles, *own, (divergence_of(which),), False, teacher))
    check_fits(compiled, SPILLED_WITH_A_TEACHER)
    assert compiled.registers == REGISTERS
    assert compiled.count(r"(ld|st)\.local\S*") == 0
    assert compiled.count(r"wgmma\.mma_async\S+") == 2 * 8
    assert compiled.count(rf"{TENSOR_COPY}\.multicast::cluster") == compiled.count(TENSOR_COPY) == 2, "of each head"
    # Four logarithms for each 8 columns of both halves, parked and read.
    groups = 2 * tiles.block_v // 8
    assert compiled.count(r"st\.global\.v4\.f32") == compiled.count(r"ld\.global\.v4\.f32") == groups


def test_the_merge_of_divergences():
    """Of two sums."""
    check_fits(offline.compile_hopper(make_merge_kernel(HopperTiles().group_n, (divergence_of(Divergence("jsd", 0.3)),))))


def test_a_cluster_of_one_fetches_all_of_c_itself():
    compiled = offline.compile_hopper(make_forward_kernel(HopperTiles(cluster=1), BFLOAT16, None, False, False, RECORDING))
    check_fits(compiled)
    assert compiled.count(rf"{TENSOR_COPY}\.multicast::cluster") == 0
    assert compiled.count(TENSOR_COPY) >= 2
