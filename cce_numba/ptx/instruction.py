"""The factory: a PTX template and operand types become a function that kernels call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import types
from numba.cuda.core.errors import NumbaTypeError
from numba.cuda.extending import intrinsic

F32, I32, U32, I64, U64 = types.float32, types.int32, types.uint32, types.int64, types.uint64
VOID = types.void

_CONSTRAINTS = {F32: "f", I32: "r", U32: "r", I64: "l", U64: "l"}
_LLVM = {F32: ir.FloatType(), I32: ir.IntType(32), U32: ir.IntType(32), I64: ir.IntType(64), U64: ir.IntType(64)}


def instruction(
    template: str,
    operands: tuple[Any, ...] = (),
    result: Any = VOID,
    *,
    ordered: bool = True,
    together: bool = False,
    name: str = "",
    doc: str = "",
) -> Callable[..., Any]:
    """A function for kernels that runs one PTX instruction.

    Args:
        template: the PTX; `$0`, `$1`, ... stand for the result, if there is one, then the operands.
        operands: their types: F32, I32, U32, I64, U64.
        result: the type of the result, a tuple of them (`types.UniTuple`), or VOID.
        ordered: it touches memory or synchronises, so that nothing may move across it, and it may not be removed.
        together: it wants all threads of a warp, so that it may not move into branches; what is ordered never does.
        name: for error messages; the template's first word if left out.
        doc: what it does, and the section of the ISA.

    Calling it with operands that cannot be meant raises numba's TypingError when the kernel is compiled: floats for integers, a
    32-bit integer for a 64-bit address, float64 for float32, arrays.

    >>> instruction("mul.hi.u32 $0, $1, $2;", (U32, U32), U32, ordered=False).__name__
    'mul.hi.u32'
    """
    name = name or template.split()[0]
    results = () if result is VOID else tuple(result) if isinstance(result, types.UniTuple) else (result,)
    constraints = ["=" + _CONSTRAINTS[kind] for kind in results] + [_CONSTRAINTS[kind] for kind in operands]
    if ordered:
        constraints.append("~{memory}")

    def define(_: Any, *given: Any) -> Any:
        check_operands(name, operands, given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            several = ir.LiteralStructType([_LLVM[kind] for kind in results])
            llvm_result = several if len(results) > 1 else _LLVM[results[0]] if results else ir.VoidType()
            value = emit(builder, llvm_result, template, constraints, values, ordered=ordered, together=together)
            if len(results) > 1:
                return context.make_tuple(builder, result, [builder.extract_value(value, i) for i in range(len(results))])
            return value if results else context.get_dummy_value()

        return result(*operands), generate

    return as_intrinsic(define, len(operands), name, doc)


def as_intrinsic(define: Callable[..., Any], arity: int, name: str, doc: str = "") -> Callable[..., Any]:
    """numba's `intrinsic` for a `define(typing_context, *types)` that takes a given number of operands."""
    parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(f"operand_{i}", inspect.Parameter.POSITIONAL_OR_KEYWORD) for i in range(arity)]
    # numba reads the number of operands off the signature, and hashes functions by name.
    define.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    define.__name__ = define.__qualname__ = name
    define.__doc__ = doc
    return intrinsic(define)


def check_operands(name: str, expected: tuple[Any, ...], given: tuple[Any, ...]) -> None:
    """Raises numba's typing error, with what came and what must come, for operands that cannot be meant."""
    if len(given) != len(expected):
        raise NumbaTypeError(f"{name}: takes {len(expected)} operands, got {len(given)}")
    for position, (want, got) in enumerate(zip(expected, given, strict=True)):
        if not _fits(want, got):
            raise NumbaTypeError(f"{name}: operand {position} must be {_wanted(want)}, got {got}")


def _fits(want: Any, got: Any) -> bool:
    if isinstance(want, types.Integer):
        # Python's and numba's integers widen to 64 bits in arithmetic, so a wide one is fine where 32 bits are wanted, but a
        # 32-bit one is no global address.
        literal = isinstance(got, types.IntegerLiteral)
        return isinstance(got, types.Integer) and (literal or got.bitwidth >= want.bitwidth)
    return got == want


def _wanted(want: Any) -> str:
    return f"an integer of at least {want.bitwidth} bits" if isinstance(want, types.Integer) else str(want)


def emit(
    builder: Any,
    result: Any,
    template: str,
    constraints: list[str],
    values: list[Any],
    *,
    ordered: bool = True,
    together: bool = False,
) -> Any:
    """Puts inline PTX where the builder stands, and returns its result."""
    signature = ir.FunctionType(result, [value.type for value in values])
    code = ir.InlineAsm(signature, template, ",".join(constraints), side_effect=ordered)
    # Many of these want all threads of a warp; "convergent" keeps the compiler from moving them into branches.
    return builder.call(code, values, attrs=("convergent",) if ordered or together else ())
