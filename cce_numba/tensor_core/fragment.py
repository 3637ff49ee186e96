"""What can be done with a tile of logits in registers: ordinary functions of one logit, applied to a thread's whole fragment.

A thread holds two rows of a (64, n) tile and n / 4 columns of each, in n / 2 registers (layout in `ptx.fragment`). Registers
have no index at run time, so each function is written out for every element when the kernel is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.cuda import types

from cce_numba.ptx import control
from cce_numba.ptx.fragment import fragment_type
from cce_numba.ptx.instruction import F32, I32, U32, as_intrinsic, check_operands


def row_of(i: int) -> int:
    """Which of the thread's two rows element i is in: 0, or 1 for the one that is 8 further down."""
    return i >> 1 & 1


def column_of(i: int) -> int:
    """The column of element i, counted from the thread's first, which is 2 * (lane % 4)."""
    return 8 * (i // 4) + (i & 1)


def fold_rows(n: int, step: Callable[..., Any]) -> Any:
    """Folds each row's logits into a number: `step(so_far, z, by_row) -> so_far`, all float32.

    In a kernel: `(row_0, row_1) = fold(fragment, start_0, start_1, by_row_0, by_row_1)`, over this thread's columns.
    """
    operands = (fragment_type(n), F32, F32, F32, F32)
    result = types.UniTuple(F32, 2)

    def define(_: Any, *given: Any) -> Any:
        check_operands(step.__name__, operands, given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            call = _inlined(context, builder, step, F32(F32, F32, F32))
            fragment, so_far, by_row = values[0], list(values[1:3]), values[3:5]
            for i in range(n // 2):
                row = row_of(i)
                so_far[row] = call(so_far[row], builder.extract_value(fragment, i), by_row[row])
            return context.make_tuple(builder, result, so_far)

        return result(*operands), generate

    return as_intrinsic(define, len(operands), f"fold_rows_{step.__name__}")


def best_two_of_rows(n: int) -> Any:
    """The two largest logits of each row, over this thread's columns, and which of these columns the largest is in.

    In a kernel: `(best_0, second_0, best_1, second_1), (place_0, place_1) = best(fragment)`; places count the thread's columns
    of a row from 0. Equal logits count as often as they come, and the first is the best. What is not there is -inf, at place 0.
    A NaN is left out.
    """
    operands, numbers, places = (fragment_type(n),), types.UniTuple(F32, 4), types.UniTuple(I32, 2)
    result = types.Tuple((numbers, places))

    def define(_: Any, *given: Any) -> Any:
        check_operands("best_two_of_rows", operands, given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            nothing, first = ir.Constant(ir.FloatType(), float("-inf")), ir.Constant(ir.IntType(32), 0)
            best, second, place = [nothing] * 2, [nothing] * 2, [first] * 2
            for i in range(n // 2):
                row, z = row_of(i), builder.extract_value(values[0], i)
                is_best = builder.fcmp_ordered(">", z, best[row])
                is_second = builder.fcmp_ordered(">", z, second[row])
                second[row] = builder.select(is_best, best[row], builder.select(is_second, z, second[row]))
                best[row] = builder.select(is_best, z, best[row])
                place[row] = builder.select(is_best, ir.Constant(ir.IntType(32), 2 * (i // 4) + (i & 1)), place[row])
            of_rows = context.make_tuple(builder, numbers, [best[0], second[0], best[1], second[1]])
            return context.make_tuple(builder, result, [of_rows, context.make_tuple(builder, places, place)])

        return result(*operands), generate

    return as_intrinsic(define, len(operands), "best_two_of_rows")


def map_rows(n: int, change: Callable[..., Any]) -> Any:
    """Changes each logit by a number of its row: `change(z, by_row) -> z`, all float32.

    In a kernel: `fragment = changed(fragment, by_row_0, by_row_1)`.
    """
    operands = (fragment_type(n), F32, F32)

    def define(_: Any, *given: Any) -> Any:
        check_operands(change.__name__, operands, given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            call = _inlined(context, builder, change, F32(F32, F32))
            fragment, by_row = values[0], values[1:3]
            for i in range(n // 2):
                changed = call(builder.extract_value(fragment, i), by_row[row_of(i)])
                fragment = builder.insert_value(fragment, changed, i)
            return fragment

        return operands[0](*operands), generate

    return as_intrinsic(define, len(operands), f"map_rows_{change.__name__}")


def map_elements(n: int, change: Callable[..., Any], *extras: Any) -> Any:
    """Changes each logit: `change(z, column, *extras) -> z`.

    In a kernel: `fragment = changed(fragment, first_column, *extras)`; the int32 column counts from where `first_column` does.
    `extras` here are the numba types of the operands that follow.
    """
    operands = (fragment_type(n), I32, *extras)

    def define(_: Any, *given: Any) -> Any:
        check_operands(change.__name__, operands[:2], given[:2])

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            call = _inlined(context, builder, change, F32(F32, I32, *extras))
            fragment, first_column = values[:2]
            for i in range(n // 2):
                column = builder.add(first_column, ir.Constant(ir.IntType(32), column_of(i)))
                changed = call(builder.extract_value(fragment, i), column, *values[2:])
                fragment = builder.insert_value(fragment, changed, i)
            return fragment

        return operands[0](*operands), generate

    return as_intrinsic(define, len(operands), f"map_elements_{change.__name__}")


def fill_columns(n: int, value: Callable[..., Any], *extras: Any) -> Any:
    """A fragment whose elements depend on the column alone: `value(column, *extras) -> z`.

    In a kernel: `fragment = filled(first_column, *extras)`, with columns and `extras` as in `map_elements`.
    """
    operands = (I32, *extras)

    def define(_: Any, *given: Any) -> Any:
        check_operands(value.__name__, operands[:1], given[:1])

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            call = _inlined(context, builder, value, F32(I32, *extras))
            fragment = ir.Constant(context.get_value_type(signature.return_type), ir.Undefined)
            for i in range(n // 2):
                column = builder.add(values[0], ir.Constant(ir.IntType(32), column_of(i)))
                fragment = builder.insert_value(fragment, call(column, *values[1:]), i)
            return fragment

        return fragment_type(n)(*operands), generate

    return as_intrinsic(define, len(operands), f"fill_columns_{value.__name__}")


def fold_columns(n: int, weight: Callable[..., Any], step: Callable[..., Any], *extras: Any) -> Any:
    """Folds each row's logits, each with its column's weight: `weight(column, *extras)`, `step(so_far, z, weight) -> so_far`.

    In a kernel: `(row_0, row_1) = fold(fragment, first_column, start_0, start_1, *extras)`, over this thread's columns, with
    columns and `extras` as in `map_elements`.
    """
    operands = (fragment_type(n), I32, F32, F32, *extras)
    result = types.UniTuple(F32, 2)

    def define(_: Any, *given: Any) -> Any:
        check_operands(step.__name__, operands[:4], given[:4])

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            weigh = _inlined(context, builder, weight, F32(I32, *extras))
            call = _inlined(context, builder, step, F32(F32, F32, F32))
            fragment, first_column, so_far = values[0], values[1], list(values[2:4])
            for upper in (i for i in range(n // 2) if row_of(i) == 0):
                column = builder.add(first_column, ir.Constant(ir.IntType(32), column_of(upper)))
                of_column = weigh(column, *values[4:])
                for i in (upper, upper + 2):
                    so_far[row_of(i)] = call(so_far[row_of(i)], builder.extract_value(fragment, i), of_column)
            return context.make_tuple(builder, result, so_far)

        return result(*operands), generate

    return as_intrinsic(define, len(operands), f"fold_columns_{step.__name__}")


def pick_columns(n: int) -> Any:
    """The logit of each row in a column of its own.

    In a kernel: `(z_0, z_1) = pick(fragment, first_column, column_0, column_1)`, where first_column is the thread's first; 0
    for a row whose column is none of this thread's. Columns are int32, and count from where `first_column` does.
    """
    operands = (fragment_type(n), I32, I32, I32)
    result = types.UniTuple(F32, 2)

    def define(_: Any, *given: Any) -> Any:
        check_operands("pick_columns", operands, given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            wanted = [builder.sub(column, values[1]) for column in values[2:4]]
            picked = [ir.Constant(ir.FloatType(), 0.0)] * 2
            for i in range(n // 2):
                row = row_of(i)
                is_it = builder.icmp_signed("==", wanted[row], ir.Constant(ir.IntType(32), column_of(i)))
                picked[row] = builder.select(is_it, builder.extract_value(values[0], i), picked[row])
            return context.make_tuple(builder, result, picked)

        return result(*operands), generate

    return as_intrinsic(define, len(operands), "pick_columns")


def change_chunks(n: int, chunk: int, change: Callable[..., Any], *extras: Any) -> Any:
    """Changes `chunk` columns at a time: `change(numbers, first, *extras) -> numbers`, tuples of chunk / 2 float32.

    In a kernel: `fragment = changed(fragment, *extras)`; `first` is the chunk's first column, the numbers are in the order of a
    fragment of so many columns, and the chunks come in order. `extras` here are the numba types of the operands that follow.
    """
    operands, numbers = (fragment_type(n), *extras), fragment_type(chunk)

    def define(_: Any, *given: Any) -> Any:
        check_operands(change.__name__, operands[:1], given[:1])

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            call = _inlined(context, builder, change, numbers(numbers, I32, *extras))
            fragment = values[0]
            for first in range(0, n, chunk):
                part = _part(context, builder, values[0], first, chunk)
                changed = call(part, ir.Constant(ir.IntType(32), first), *values[1:])
                for i in range(chunk // 2):
                    fragment = builder.insert_value(fragment, builder.extract_value(changed, i), first // 2 + i)
            return fragment

        return operands[0](*operands), generate

    return as_intrinsic(define, len(operands), f"change_chunks_{change.__name__}")


def visit_chunks(n: int, chunk: int, visit: Callable[..., Any], *extras: Any) -> Any:
    """As `change_chunks`, for a function that changes nothing, and returns an int32 that nobody reads."""
    operands, numbers = (fragment_type(n), *extras), fragment_type(chunk)

    def define(_: Any, *given: Any) -> Any:
        check_operands(visit.__name__, operands[:1], given[:1])

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            call = _inlined(context, builder, visit, I32(numbers, I32, *extras))
            for first in range(0, n, chunk):
                call(_part(context, builder, values[0], first, chunk), ir.Constant(ir.IntType(32), first), *values[1:])
            return context.get_dummy_value()

        return types.void(*operands), generate

    return as_intrinsic(define, len(operands), f"visit_chunks_{visit.__name__}")


def fold_chunks(n: int, chunk: int, count: int, step: Callable[..., Any], *extras: Any) -> Any:
    """Folds `chunk` columns at a time into `count` float32: `step(state, numbers, first, *extras) -> state`, tuples of float32.

    In a kernel: `state = fold(fragment, state, *extras)`, with numbers, `first` and `extras` as in `change_chunks`.
    """
    state = types.UniTuple(F32, count)
    operands, numbers = (fragment_type(n), state, *extras), fragment_type(chunk)

    def define(_: Any, *given: Any) -> Any:
        check_operands(step.__name__, operands[:2], given[:2])

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            call = _inlined(context, builder, step, state(state, numbers, I32, *extras))
            so_far = values[1]
            for first in range(0, n, chunk):
                part = _part(context, builder, values[0], first, chunk)
                so_far = call(so_far, part, ir.Constant(ir.IntType(32), first), *values[2:])
            return so_far

        return state(*operands), generate

    return as_intrinsic(define, len(operands), f"fold_chunks_{step.__name__}")


def _part(context: Any, builder: Any, fragment: Any, first: int, columns: int) -> Any:
    """The fragment of so many columns from the first on."""
    part = ir.Constant(context.get_value_type(fragment_type(columns)), ir.Undefined)
    for i in range(columns // 2):
        part = builder.insert_value(part, builder.extract_value(fragment, first // 2 + i), i)
    return part


def collect_bits(n: int, keep: Callable[..., Any]) -> Any:
    """One bit for each column: whether `keep(z, by_row) -> bool` holds in either row of this thread.

    In a kernel: `words = bits(fragment, by_row_0, by_row_1)`; n / 32 words of 32 columns each, where bit 8 * j + c is that of
    column 8 * j + c counted from the thread's first. So once shifted by 2 * (lane % 4), the union over a warp is in order of
    columns.
    """
    operands = (fragment_type(n), F32, F32)
    result = types.UniTuple(U32, n // 32)

    def define(_: Any, *given: Any) -> Any:
        check_operands(keep.__name__, operands, given)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            call = _inlined(context, builder, keep, types.boolean(F32, F32))
            fragment, by_row = values[0], values[1:3]
            zero = ir.Constant(ir.IntType(32), 0)
            words = [zero] * (n // 32)
            for upper in (i for i in range(n // 2) if row_of(i) == 0):
                either = builder.or_(*(call(builder.extract_value(fragment, i), by_row[row_of(i)]) for i in (upper, upper + 2)))
                word, bit = divmod(column_of(upper), 32)
                bits = builder.select(either, ir.Constant(ir.IntType(32), 1 << bit), zero)
                words[word] = builder.or_(words[word], bits)
            return context.make_tuple(builder, result, words)

        return result(*operands), generate

    return as_intrinsic(define, len(operands), f"collect_bits_{keep.__name__}")


def collect_bits_by_column(n: int, weight: Callable[..., Any], keep: Callable[..., Any], *extras: Any) -> Any:
    """As `collect_bits`, where columns have numbers too: `weight(column, *extras)`, `keep(z, by_row, weight) -> bool`.

    In a kernel: `words = bits(fragment, first_column, by_row_0, by_row_1, *extras)`, columns and `extras` as in `map_elements`.
    By whole warps. Numbers of columns are loaded 32 columns at a time: all at once would spill registers.
    """
    operands = (fragment_type(n), I32, F32, F32, *extras)
    result = types.UniTuple(U32, n // 32)

    def define(_: Any, *given: Any) -> Any:
        check_operands(keep.__name__, operands[:4], given[:4])

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            weigh = _inlined(context, builder, weight, F32(I32, *extras))
            call = _inlined(context, builder, keep, types.boolean(F32, F32, F32))
            fragment, first_column, by_row = values[0], values[1], values[2:4]
            hold_back = _inlined(context, builder, _hold_back, types.void())
            zero = ir.Constant(ir.IntType(32), 0)
            words = [zero] * (n // 32)
            for upper in (i for i in range(n // 2) if row_of(i) == 0):
                word, bit = divmod(column_of(upper), 32)
                if bit == 0:
                    hold_back()
                column = builder.add(first_column, ir.Constant(ir.IntType(32), column_of(upper)))
                of_column = weigh(column, *values[4:])
                both = (call(builder.extract_value(fragment, i), by_row[row_of(i)], of_column) for i in (upper, upper + 2))
                bits = builder.select(builder.or_(*both), ir.Constant(ir.IntType(32), 1 << bit), zero)
                words[word] = builder.or_(words[word], bits)
            return context.make_tuple(builder, result, words)

        return result(*operands), generate

    return as_intrinsic(define, len(operands), f"collect_bits_by_column_{keep.__name__}")


def _hold_back() -> None:
    """Keeps the assembler from moving what follows in memory up here, where its results would take registers."""
    control.warp_sync()


def _inlined(context: Any, builder: Any, function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """A Python function, compiled into the module that is being built, as something to call on LLVM values."""
    compiled = context.compile_subroutine(builder, function, signature)

    def call(*values: Any) -> Any:
        return context.call_internal(builder, compiled.fndesc, signature, values)

    return call
