"""Every instruction of `cce_numba.ptx`: what it compiles to, and that operands which cannot be meant are refused."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass
from typing import Any

import pytest
from llvmlite import ir
from numba.core.errors import TypingError
from numba.cuda import types

from cce_numba import ptx
from cce_numba.ptx import control, fragment, memory, mma, wgmma
from cce_numba.ptx.instruction import F32, I32, I64, U32, U64, VOID, emit, instruction
from tests.helpers import offline

pytestmark = pytest.mark.usefixtures("compiler")

ARRAY = types.Array(F32, 1, "C")
FRAGMENT = fragment.fragment_type(64)
TWO_F32, TWO_I32, FOUR_U32 = types.UniTuple(F32, 2), types.UniTuple(I32, 2), types.UniTuple(U32, 4)
TWO_U32, FOUR_F32 = types.UniTuple(U32, 2), types.UniTuple(F32, 4)


@dataclass(frozen=True)
class Row:
    """An instruction as kernels use it.

    Attributes:
        name: module and function.
        mnemonic: a regular expression of what stands in the PTX, once.
        operands: their types.
        result: the result's type.
        made_with: for functions that make instructions, what they take.
    """

    name: str
    mnemonic: str
    operands: tuple[Any, ...] = ()
    result: Any = VOID
    made_with: tuple[Any, ...] | None = None

    def __str__(self) -> str:
        return self.name if self.made_with is None else f"{self.name}({', '.join(map(str, self.made_with))})"

    @property
    def function(self) -> Any:
        module, function = self.name.split(".")
        found = getattr(importlib.import_module(f"cce_numba.ptx.{module}"), function)
        return found if self.made_with is None else found(*self.made_with)


_TENSOR_COPY = r"cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\.tile\.mbarrier::complete_tx::bytes"
_PRODUCT = r"wgmma\.mma_async\.sync\.aligned\.m64n64k16\.f32"
_STORE_MATRICES = r"stmatrix\.sync\.aligned\.m8n8\.x4"
_WARP_PRODUCT = r"mma\.sync\.aligned\.m16n8k"
_LOAD_MATRICES = r"ldmatrix\.sync\.aligned\.m8n8"


def several(register: str, count: int) -> str:
    """A regular expression of a vector of registers."""
    return r"\{" + ", ".join([register + r"\d+"] * count) + r"\}"


TABLE = [
    Row("arithmetic.exp2", r"ex2\.approx\.ftz\.f32", (F32,), F32),
    Row("arithmetic.log2", r"lg2\.approx\.ftz\.f32", (F32,), F32),
    Row("arithmetic.maximum", r"max\.f32", (F32, F32), F32),
    Row("arithmetic.minimum", r"min\.f32", (F32, F32), F32),
    Row("arithmetic.maximum_or_nan", r"max\.NaN\.f32", (F32, F32), F32),
    Row("arithmetic.fma", r"fma\.rn\.f32", (F32, F32, F32), F32),
    Row("arithmetic.multiply", r"mul\.rn\.f32", (F32, F32), F32),
    Row("arithmetic.widen_bf16", r"shl\.b32 bits, %r\d+, 16", (U32,), F32),
    Row("arithmetic.widen_f16", r"cvt\.f32\.f16", (U32,), F32),
    Row("arithmetic.opaque_i32", r"mov\.b32", (I32,), I32),
    Row("arithmetic.opaque_u32", r"mov\.b32", (U32,), U32),
    Row("arithmetic.pack_bf16", r"cvt\.rn\.bf16x2\.f32", (F32, F32), U32),
    Row("arithmetic.pack_f16", r"cvt\.rn\.f16x2\.f32", (F32, F32), U32),
    Row("arithmetic.float_of_bits", r"mov\.b32 %f\d+, %r\d+", (U32,), F32),
    Row("arithmetic.bits_of_float", r"mov\.b32 %r\d+, %f\d+", (F32,), U32),
    Row("cluster.cta_rank", r"mov\.u32 %r\d+, %cluster_ctarank", (), U32),
    Row("cluster.map_shared", r"mapa\.shared::cluster\.u32", (U32, U32), U32),
    Row("cluster.store_async", r"st\.async\.shared::cluster\.mbarrier::complete_tx::bytes\.u32", (U32, U32, U32)),
    Row("cluster.sync", r"barrier\.cluster\.arrive\.release; barrier\.cluster\.wait\.acquire"),
    Row("control.raise_registers", r"setmaxnreg\.inc\.sync\.aligned\.u32 232", made_with=(232,)),
    Row("control.lower_registers", r"setmaxnreg\.dec\.sync\.aligned\.u32 24", made_with=(24,)),
    Row("control.barrier_sync", r"bar\.sync", (U32, U32)),
    Row("control.barrier_mask", r"bar\.red\.and\.pred", (U32, U32), U32),
    Row("control.or_of_warp", r"redux\.sync\.or\.b32", (U32,), U32),
    Row("control.max_of_warp", r"redux\.sync\.max\.u32", (U32,), U32),
    Row("control.warp_sync", r"bar\.warp\.sync"),
    Row("control.shuffle_i32", r"shfl\.sync\.idx\.b32", (I32, U32), I32),
    Row("control.shuffle_xor_f32", r"shfl\.sync\.bfly\.b32", (F32, U32), F32),
    Row("mbarrier.init", r"mbarrier\.init\.shared::cta\.b64", (U32, U32)),
    Row("mbarrier.fence_init", r"fence\.mbarrier_init\.release\.cluster"),
    Row("mbarrier.arrive", r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\]", (U32,)),
    Row("mbarrier.arrive_many", r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\], %r\d+", (U32, U32)),
    Row("mbarrier.arrive_expect_tx", r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64", (U32, U32)),
    Row("mbarrier.arrive_cluster", r"mbarrier\.arrive\.shared::cluster\.b64", (U32,)),
    Row("mbarrier.wait", r"mbarrier\.try_wait\.parity\.shared::cta\.b64", (U32, U32)),
    Row("memory.shared_address", r"cvta\.to\.shared\.u64", (ARRAY,), U32),
    Row("memory.load_global_u64", r"ld\.global\.nc\.u64", (U64,), U64),
    Row("memory.load_global_u16", r"ld\.global\.nc\.u16", (U64,), U32),
    Row("memory.load_global_f32", r"ld\.global\.nc\.f32", (U64,), F32),
    Row("memory.load_global_i32", r"ld\.global\.nc\.s32", (U64,), I32),
    Row("memory.load_shared_f32", r"ld\.shared\.f32", (U32,), F32),
    Row("memory.store_shared_f32", r"st\.shared\.f32", (U32, F32)),
    Row("memory.load_shared_i32", r"ld\.shared\.s32", (U32,), I32),
    Row("memory.store_shared_i32", r"st\.shared\.s32", (U32, I32)),
    Row("memory.load_shared_f32_freely", r"ld\.shared\.f32", (U32,), F32),
    Row("memory.load_shared_i32_freely", r"ld\.shared\.s32", (U32,), I32),
    Row("memory.load_shared_2_f32_freely", rf"ld\.shared\.v2\.f32 {several('%f', 2)}, \[%r\d+\]", (U32,), TWO_F32),
    Row("memory.load_shared_2_i32_freely", rf"ld\.shared\.v2\.s32 {several('%r', 2)}, \[%r\d+\]", (U32,), TWO_I32),
    Row("memory.load_shared_4_u32", rf"ld\.shared\.v4\.u32 {several('%r', 4)}, \[%r\d+\]", (U32,), FOUR_U32),
    Row("memory.store_matrices", rf"{_STORE_MATRICES}\.shared\.b16 \[%r\d+\], {several('%r', 4)}", (U32,) * 5),
    Row(
        "memory.store_matrices_transposed",
        rf"{_STORE_MATRICES}\.trans\.shared\.b16 \[%r\d+\], {several('%r', 4)}",
        (U32,) * 5,
    ),
    Row(
        "memory.copy_async_16_or_zeros",
        r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, absent",
        (U32, U64, U32),
    ),
    Row("memory.copy_async_16", r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+", (U32, U64, U32)),
    Row(
        "memory.copy_async_16_of_row",
        r"mad\.wide\.u32 row, %r\d+, %r\d+, %rd\d+; cp\.async\.cg\.shared\.global \[%r\d+\], \[row\], 16, absent",
        (U32, U64, I32, U32),
    ),
    Row("memory.copy_async_commit", r"cp\.async\.commit_group"),
    Row("memory.copy_async_wait", r"cp\.async\.wait_group 0", made_with=(0,)),
    Row("memory.copy_async_wait", r"cp\.async\.wait_group 3", made_with=(3,)),
    Row("memory.copy_async_arrive", r"cp\.async\.mbarrier\.arrive\.noinc\.shared::cta\.b64 \[%r\d+\]", (U32,)),
    Row("memory.fence_proxy_async", r"fence\.proxy\.async\.shared::cta"),
    Row("memory.fence_proxy_async_all", r"fence\.proxy\.async"),
    Row("memory.or_global_u32", r"red\.global\.or\.b32", (U64, U32)),
    Row("memory.load_if_u32", r"@p ld\.global\.cg\.u32 %r\d+, \[%rd\d+\]", (U64, U32), U32),
    Row(
        "memory.load_once_4_u32",
        rf"ld\.global\.nc\.L1::no_allocate\.v4\.u32 {several('%r', 4)}, \[%rd\d+\]",
        (U64,),
        FOUR_U32,
    ),
    Row("memory.load_if_4_u32", rf"@p ld\.global\.cg\.v4\.u32 {several('%r', 4)}, \[%rd\d+\]", (U64, U32), FOUR_U32),
    Row("memory.store_if_4_u32", rf"@p st\.global\.v4\.u32 \[%rd\d+\], {several('%r', 4)}", (U64, *(U32,) * 5)),
    Row("memory.store_once_if_4_u32", rf"@p st\.global\.cs\.v4\.u32 \[%rd\d+\], {several('%r', 4)}", (U64, *(U32,) * 5)),
    Row("memory.store_if_2_f32", rf"@p st\.global\.v2\.f32 \[%rd\d+\], {several('%f', 2)}", (U64, F32, F32, U32)),
    Row("memory.store_4_f32", rf"st\.global\.v4\.f32 \[%rd\d+\], {several('%f', 4)}", (U64, *(F32,) * 4)),
    Row("memory.load_4_f32", rf"ld\.global\.v4\.f32 {several('%f', 4)}, \[%rd\d+\]", (U64,), FOUR_F32),
    Row("memory.add_4_f32", rf"red\.relaxed\.gpu\.global\.add\.v4\.f32 \[%rd\d+\], {several('%f', 4)}", (U64, *(F32,) * 4)),
    Row("memory.store_global_u32", r"st\.global\.u32 \[%rd\d+\], %r\d+", (U64, U32)),
    Row("memory.store_global_f32", r"st\.global\.f32 \[%rd\d+\], %f\d+", (U64, F32)),
    Row("memory.store_global_u16", r"cvt\.u16\.u32 x, %r\d+; st\.global\.u16 \[%rd\d+\], x", (U64, U32)),
    Row("memory.add_global_s64", r"red\.relaxed\.gpu\.global\.add\.u64 \[%rd\d+\], %rd\d+", (U64, I64)),
    Row("memory.load_acquire_u32", r"ld\.acquire\.gpu\.global\.u32", (U64,), U32),
    Row("memory.add_release_u32", r"red\.release\.gpu\.global\.add\.u32", (U64, U32)),
    Row("memory.fetch_add_u32", r"atom\.relaxed\.gpu\.global\.add\.u32", (U64, U32), U32),
    Row("mma.mma", _WARP_PRODUCT + r"16\.row\.col\.f32\.bf16\.bf16\.f32", (U32,) * 6 + (F32,) * 4, FOUR_F32, ("bf16",)),
    Row("mma.mma", _WARP_PRODUCT + r"16\.row\.col\.f32\.f16\.f16\.f32", (U32,) * 6 + (F32,) * 4, FOUR_F32, ("f16",)),
    Row("mma.mma", _WARP_PRODUCT + r"8\.row\.col\.f32\.tf32\.tf32\.f32", (U32,) * 6 + (F32,) * 4, FOUR_F32, ("tf32",)),
    Row("mma.load_matrices", _LOAD_MATRICES + r"\.x1\.shared\.b16", (U32,), U32, (1,)),
    Row("mma.load_matrices", _LOAD_MATRICES + r"\.x2\.shared\.b16", (U32,), TWO_U32, (2,)),
    Row("mma.load_matrices", _LOAD_MATRICES + r"\.x4\.shared\.b16", (U32,), FOUR_U32, (4,)),
    Row("mma.load_matrices", _LOAD_MATRICES + r"\.x1\.trans\.shared\.b16", (U32,), U32, (1, True)),
    Row("mma.load_matrices", _LOAD_MATRICES + r"\.x2\.trans\.shared\.b16", (U32,), TWO_U32, (2, True)),
    Row("mma.load_matrices", _LOAD_MATRICES + r"\.x4\.trans\.shared\.b16", (U32,), FOUR_U32, (4, True)),
    Row("mma.transpose_matrix", r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16", (U32,), U32),
    Row("tma.load_2d", _TENSOR_COPY, (U32, U64, U32, I32, I32)),
    Row("tma.load_2d_multicast", _TENSOR_COPY + r"\.multicast::cluster", (U32, U64, U32, I32, I32, U32)),
    Row("tma.fence_tensor_map", r"fence\.proxy\.tensormap::generic\.acquire\.gpu \[%rd\d+\], 128", (U64,)),
    Row("wgmma.fence", r"wgmma\.fence\.sync\.aligned"),
    Row("wgmma.commit_group", r"wgmma\.commit_group\.sync\.aligned"),
    Row("wgmma.wait_group", r"wgmma\.wait_group\.sync\.aligned 0", made_with=(0,)),
    Row("wgmma.wait_group", r"wgmma\.wait_group\.sync\.aligned 7", made_with=(7,)),
    Row("wgmma.mma", _PRODUCT + r"\.bf16\.bf16", (FRAGMENT, U64, U64, U32), FRAGMENT, (64, "bf16")),
    Row("wgmma.mma", _PRODUCT + r"\.f16\.f16", (FRAGMENT, U64, U64, U32), FRAGMENT, (64, "f16")),
]
# A type, a constant, and other names for a pointer.
NO_INSTRUCTIONS = {"fragment.fragment_type", "fragment.zeros", "pointers.address_of", "pointers.view_as"}
# They write into code that is generated.
NO_INSTRUCTIONS |= {"mma.emit_mma", "mma.emit_load", "mma.emit_load_word", "mma.emit_round_to_tf32"}


def compile_call(function: Any, operands: tuple[Any, ...], result: Any = VOID) -> offline.Compiled:
    """A kernel that calls the function with its own operands, and stores what it gives."""

    def stores(out, operands):
        out[0] = function(*operands)

    def runs(out, operands):
        function(*operands)

    out = types.CPointer(I32 if result is VOID else result)
    return offline.compile_function(runs if result is VOID else stores, types.void(out, types.Tuple(operands)))


def public_names() -> set[str]:
    """`module.function` for every instruction, and every function that makes some."""
    intrinsic = type(wgmma.fence)
    names = set()
    for module in pkgutil.iter_modules(ptx.__path__, "cce_numba.ptx."):
        if not module.name.endswith(".instruction"):
            for name, value in vars(importlib.import_module(module.name)).items():
                own = isinstance(value, intrinsic) or getattr(value, "__module__", None) == module.name
                if own and not name.startswith("_"):
                    names.add(f"{module.name.rpartition('.')[2]}.{name}")
    return names


def test_the_table_has_every_instruction():
    assert {row.name for row in TABLE} == public_names() - NO_INSTRUCTIONS


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_the_instruction_stands_in_the_ptx(row):
    """And the assembler takes it."""
    compiled = compile_call(row.function, row.operands, row.result)
    assert compiled.count(row.mnemonic) == 1, compiled.ptx
    assert compiled.spilled_bytes == 0


def wrong_types(operand: Any) -> list[Any]:
    """What a mistake would bring in place of an operand."""
    if operand == F32:
        return [types.float64, I32]  # one Python float, and arithmetic is in float64
    if operand == ARRAY:
        return [F32, U64]
    if operand == FRAGMENT:
        return [wgmma.fragment_type(56), types.UniTuple(types.float64, 32), F32]
    return [F32, types.boolean, ARRAY, *([I32, U32] if operand in (I64, U64) else [])]


@pytest.mark.parametrize("row", [row for row in TABLE if row.operands], ids=str)
def test_wrong_operands_are_refused_when_a_kernel_is_compiled(row):
    for position, operand in enumerate(row.operands):
        for wrong in wrong_types(operand):
            given = (*row.operands[:position], wrong, *row.operands[position + 1 :])
            with pytest.raises(TypingError) as error:
                compile_call(row.function, given, row.result)
            message = str(error.value)
            assert f"operand {position} must be " in message, (position, wrong)
            assert f", got {wrong}" in message, (position, wrong)


@pytest.mark.parametrize(
    ("operand", "wrong", "message"),
    [
        (U32, F32, r"my\.op: operand 0 must be an integer of at least 32 bits, got float32"),
        (U64, I32, r"my\.op: operand 0 must be an integer of at least 64 bits, got int32"),
        (F32, types.float64, r"my\.op: operand 0 must be float32, got float64"),
        (F32, types.IntegerLiteral(1), r"my\.op: operand 0 must be float32, got Literal\[int\]\(1\)"),
    ],
)
def test_the_message_says_what_came_and_what_must_come(operand, wrong, message):
    function = instruction("my.op $0;", (operand,))
    with pytest.raises(TypingError, match=message):
        compile_call(function, (wrong,))


@pytest.mark.parametrize("given", [(), (U32, U32)])
def test_the_number_of_operands_is_checked(given):
    with pytest.raises(TypingError, match=rf"my\.op: takes 1 operands, got {len(given)}"):
        compile_call(instruction("my.op $0;", (U32,)), given)


@pytest.mark.parametrize("given", [I32, U32, I64, U64], ids=str)
def test_integers_of_either_sign_and_wider_ones_are_taken(given):
    """Arithmetic makes them: in numba uint32 + uint32 is a uint64."""
    function = instruction("not.b32 $0, $1;", (U32,), U32, ordered=False)
    assert compile_call(function, (given,), U32).count(r"not\.b32") == 1


def test_python_integers_are_taken_for_addresses():
    function = instruction("not.b64 $0, $1;", (U64,), U64, ordered=False)

    def kernel(out):
        out[0] = function(1)

    assert offline.compile_function(kernel, types.void(types.CPointer(U64))).count(r"not\.b64") == 1


@pytest.mark.parametrize("ordered", [False, True])
def test_only_ordered_instructions_stay_if_nobody_uses_their_result(ordered):
    function = instruction("not.b32 $0, $1;", (U32,), U32, ordered=ordered)

    def kernel(x):
        function(x)

    assert offline.compile_function(kernel, types.void(U32)).count(r"not\.b32") == ordered


@pytest.mark.parametrize("ordered", [False, True])
def test_several_results_are_a_tuple_in_the_templates_order(ordered):
    """And the operands' numbers begin after theirs."""
    halves = instruction("mov.b64 {$0, $1}, $2;", (U64,), types.UniTuple(U32, 2), ordered=ordered)

    def kernel(out, x):
        low, high = halves(x)
        out[0] = high
        out[1] = low

    ptx = offline.compile_function(kernel, types.void(types.CPointer(U32), U64)).ptx
    low, high = re.search(r"mov\.b64 \{(%r\d+), (%r\d+)\}, %rd\d+;", ptx).groups()
    stored = re.findall(r"st\.global\.u32 \s*\[%rd\d+(\+4)?\], (%r\d+);", ptx)
    assert sorted(stored) == [("", high), ("+4", low)]


@pytest.mark.parametrize("kind", [F32, I32, U32, I64, U64], ids=str)
def test_several_results_of_each_type(kind):
    bits, register = ("64", "rd") if kind in (I64, U64) else ("32", "f" if kind == F32 else "r")
    thrice = instruction(f"mov.b{bits} $0, $3; mov.b{bits} $1, $3; mov.b{bits} $2, $3;", (kind,), types.UniTuple(kind, 3))
    compiled = compile_call(thrice, (kind,), types.UniTuple(kind, 3))
    assert compiled.count(rf"mov\.b{bits} %{register}\d+, %{register}\d+") == 3
    assert compiled.count(r"st\.global\.\w+") == 3
    assert compiled.stack_bytes == 0


@pytest.mark.parametrize("ordered", [False, True])
def test_only_ordered_instructions_stay_if_nobody_uses_their_results(ordered):
    function = instruction("mov.b64 {$0, $1}, $2;", (U64,), types.UniTuple(U32, 2), ordered=ordered)

    def neither(out, x):
        function(x)

    def one(out, x):
        out[0] = function(x)[1]

    signature = types.void(types.CPointer(U32), U64)
    assert offline.compile_function(neither, signature).count(r"mov\.b64 \{") == ordered
    assert offline.compile_function(one, signature).count(r"mov\.b64 \{") == 1


@pytest.mark.parametrize(
    ("properties", "attributes"),
    [
        ({"ordered": True}, (True, True)),
        ({"ordered": False}, (False, False)),
        ({"ordered": False, "together": True}, (False, True)),
    ],
    ids=["ordered", "neither", "together"],
)
def test_what_the_compiler_is_told(properties, attributes):
    """`sideeffect`: it is neither removed nor moved. `convergent`: it may be, but not into a branch that it was not in."""
    module, i32 = ir.Module(), ir.IntType(32)
    function = ir.Function(module, ir.FunctionType(i32, [i32]), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(emit(builder, i32, "not.b32 $0, $1;", ["=r", "r"], [*function.args], **properties))
    assert ("sideeffect" in str(module), "convergent" in str(module)) == attributes


def test_stores_do_not_move_across_ordered_instructions():
    """Two stores to one place become one, unless something that may read it stands between them."""
    function = instruction("fence.proxy.async;")

    def alone(out):
        out[0] = 1
        out[0] = 2

    def around(out):
        out[0] = 1
        function()
        out[0] = 2

    signature = types.void(types.CPointer(I32))
    assert offline.compile_function(alone, signature).count(r"st\.global\.u32") == 1
    assert offline.compile_function(around, signature).count(r"st\.global\.u32") == 2


def test_multiply_is_not_fused_with_a_sum_that_follows():
    """As `*` is, and an exponent's shift must be the very number that was subtracted before."""
    multiply = instruction("mul.rn.f32 $0, $1, $2;", (F32, F32), F32, ordered=False)

    def fused(out, x, y):
        out[0] = x * y + x

    def apart(out, x, y):
        out[0] = multiply(x, y) + x

    signature = types.void(types.CPointer(F32), F32, F32)
    assert offline.compile_function(fused, signature).count(r"fma\.rn\.f32") == 1
    compiled = offline.compile_function(apart, signature)
    assert compiled.count(r"fma\.rn\.f32") == 0
    assert compiled.count(r"mul\.rn\.f32") == 1


@pytest.mark.parametrize("count", [16, 20, 233, 264])
@pytest.mark.parametrize("make", [control.raise_registers, control.lower_registers])
def test_register_counts_that_the_hardware_lacks(make, count):
    with pytest.raises(ValueError, match=rf"must be a multiple of 8 in \[24, 256\], got {count}"):
        make(count)


@pytest.mark.parametrize("pending", [-1, 8])
def test_groups_of_products_that_the_hardware_cannot_count(pending):
    with pytest.raises(ValueError, match=rf"must be in \[0, 7\], got {pending}"):
        wgmma.wait_group(pending)


def test_groups_of_copies_that_nobody_made():
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        memory.copy_async_wait(-1)


def test_products_and_loads_that_the_hardware_lacks():
    with pytest.raises(ValueError, match="dtype must be one of 'bf16', 'f16', 'tf32', got 'f32'"):
        mma.mma("f32")
    with pytest.raises(ValueError, match="count must be 1, 2 or 4, got 3"):
        mma.load_matrices(3)


@pytest.mark.parametrize("row", [row for row in TABLE if row.name.startswith("mma.")], ids=str)
def test_products_of_a_warp_are_there_from_sm_80_on(row):
    signature = types.void(types.CPointer(row.result), types.Tuple(row.operands))
    function = row.function

    def kernel(out, operands):
        out[0] = function(*operands)

    assert offline.compile_function(kernel, signature, cc=(8, 0)).count(row.mnemonic) == 1
