"""G of a divergence: the teacher's products are parked as logarithms of probabilities, and the student's become G.

The gradient with respect to the student's product x, which becomes the logit z = cap(scale * x), is

    g = weight * gradient(log_p, log_q, of_student) * cap'(scale * x)

with the function of `launch.divergence` and a weight that contains the scale. It is 0 for entry -1, which is nobody's, and
where the weight is 0, whatever the logits are.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda

from cce_numba.launch.inlined import slope_of_cap
from cce_numba.launch.record import kind_of
from cce_numba.ptx import memory
from cce_numba.tensor_core import parked
from cce_numba.tensor_core.backward.records import ListColumns
from cce_numba.tensor_core.divergence import TeacherForm, make_functions
from cce_numba.tensor_core.fragment import visit_chunks
from cce_numba.tensor_core.logits import make_logit_of
from cce_numba.tensor_core.numbers import make_load
from cce_numba.tensor_core.records import F32, U64, DivergenceRow, HeadRow

_ZERO = np.float32(0)


@functools.cache
def make_two_rows(scaled: bool) -> tuple[Any, Any]:
    """`(of_teacher, of_both)`: device functions that load the two `HeadRow` of the teacher, or the two `DivergenceRow`.

    Each is called `(position, terms, tables, distillation)`, for the tokens at `position`, an int64, of the list, and 8 further
    on. terms: a `LogitTerms`. tables: the survey's. distillation: a `Distillation`. scaled: logits have a scale.
    """
    load = memory.load_global_f32

    @cuda.jit(device=True, forceinline=True)
    def head_row(n: Any, sums: Any, terms: Any) -> Any:
        """Of a row of e; sums: `LogSums` of the head."""
        scale = np.float32(1)
        if scaled:
            scale = load(terms.scale + np.uint64(4 * n))
        return HeadRow(sums=parked.log_sum_of(n, sums), scale=scale)

    @cuda.jit(device=True, forceinline=True)
    def some_row(position: Any, tables: Any) -> Any:
        """The row of e of a listed token; some row if there is none."""
        return np.int64(max(tables.row_of[position], np.int32(0)))

    @cuda.jit(device=True, forceinline=True)
    def row_of_both(position: Any, terms: Any, tables: Any, distillation: Any) -> Any:
        n, weight = some_row(position, tables), _ZERO
        if tables.row_of[position] >= 0:
            weight = load(distillation.weight + np.uint64(4 * n)) * tables.weight_scale[0]
        of_student = load(distillation.of_student + np.uint64(4 * n))
        return DivergenceRow(student=head_row(n, distillation.heads.student, terms), weight=weight, of_student=of_student)

    @cuda.jit(device=True, forceinline=True)
    def of_teacher(position: Any, terms: Any, tables: Any, distillation: Any) -> Any:
        sums = distillation.heads.teacher
        return head_row(some_row(position, tables), sums, terms), head_row(some_row(position + 8, tables), sums, terms)

    @cuda.jit(device=True, forceinline=True)
    def of_both(position: Any, terms: Any, tables: Any, distillation: Any) -> Any:
        return row_of_both(position, terms, tables, distillation), row_of_both(position + 8, terms, tables, distillation)

    return of_teacher, of_both


@functools.cache
def make_park_products(n: int, teacher: TeacherForm, scaled: bool) -> Any:
    """The function `park(x, columns, row_0, row_1, softcap, bias, place)` for a fragment of 64 tokens x n columns.

    x: the teacher's products. columns: a `ListColumns`. row_0, row_1: the teacher's `HeadRow`. softcap, bias: of `Teacher`; the
    bias is read where it is used, since shared memory holds the student's alone. place: see `parked.place_of`.
    """
    logit_of, biased = make_logit_of(teacher.capped, scaled), teacher.bias_dtype is not None
    itemsize = 0 if teacher.bias_dtype is None else teacher.bias_dtype.itemsize
    load: Any = None if teacher.bias_dtype is None else make_load(teacher.bias_dtype)

    def park_chunk(x: Any, first: Any, columns: Any, row_0: Any, row_1: Any, softcap: Any, bias: Any, place: Any) -> Any:
        """The 8 columns from `first` on. What is parked of a column that is nobody's is not looked at."""
        b_0, b_1 = _ZERO, _ZERO
        if biased:
            at = np.uint32(4 * (first + 2 * (np.int32(cuda.threadIdx.x) & 3)))
            v = memory.load_shared_2_i32_freely(columns.ids + at)
            b_0 = load(bias + np.uint64(itemsize * np.int64(max(v[0], np.int32(0)))))
            b_1 = load(bias + np.uint64(itemsize * np.int64(max(v[1], np.int32(0)))))
        z_0, z_1 = logit_of(x[0] + b_0, row_0, softcap), logit_of(x[1] + b_1, row_0, softcap)
        z_2, z_3 = logit_of(x[2] + b_0, row_1, softcap), logit_of(x[3] + b_1, row_1, softcap)
        parked.park(place, first, (z_0, z_1, z_2, z_3), row_0.sums, row_1.sums)
        return np.int32(0)

    row = kind_of(HeadRow)
    return visit_chunks(n, parked.CHUNK, park_chunk, kind_of(ListColumns), row, row, F32, U64, U64)


@functools.cache
def make_divergence_gradients(teacher: TeacherForm, capped: bool, scaled: bool) -> Any:
    """The function `(g_00, g_01, g_10, g_11) = gradients(x, column, columns, row_0, row_1, softcap, place)`.

    It takes the thread's four numbers in the eight columns from `column` on, two of each of its rows. x: the student's
    products, without biases. columns: a `ListColumns`. row_0, row_1: `DivergenceRow`. capped, scaled, softcap: of the student.
    place: of what the teacher's products have left, see `parked.place_of`.
    """
    logit_of, gradient = make_logit_of(capped, scaled), make_functions(teacher.which).gradient

    @cuda.jit(device=True, forceinline=True)
    def gradient_of(x: Any, log_p: Any, entry: Any, row: Any, softcap: Any) -> Any:
        """One of the four."""
        z = logit_of(x, row.student, softcap)
        g = row.weight * gradient(log_p, parked.log_probability(z, row.student.sums), row.of_student)
        if capped:
            g *= slope_of_cap(z / softcap)
        return g if entry >= 0 and row.weight != _ZERO else _ZERO

    @cuda.jit(device=True, forceinline=True)
    def gradients(x: Any, column: Any, columns: Any, row_0: Any, row_1: Any, softcap: Any, place: Any) -> Any:
        at = np.uint32(4 * (column + 2 * (np.int32(cuda.threadIdx.x) & 3)))
        v, bias = memory.load_shared_2_i32_freely(columns.ids + at), memory.load_shared_2_f32_freely(columns.biases + at)
        log_p = parked.parked_at(place, column)
        return (
            gradient_of(x[0] + bias[0], log_p[0], v[0], row_0, softcap),
            gradient_of(x[1] + bias[1], log_p[1], v[1], row_0, softcap),
            gradient_of(x[2] + bias[0], log_p[2], v[0], row_1, softcap),
            gradient_of(x[3] + bias[1], log_p[3], v[1], row_1, softcap),
        )

    return gradients
